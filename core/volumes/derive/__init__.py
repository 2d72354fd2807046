"""What is computed once from the volumes of a cohort and lies beside them: maps that guide a pre-training."""
