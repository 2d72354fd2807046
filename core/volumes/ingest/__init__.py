"""From scans to a cohort."""
