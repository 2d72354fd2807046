"""What a run found, drawn."""
