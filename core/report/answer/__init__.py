"""What a run found, computed and in words. Imports no figure."""
