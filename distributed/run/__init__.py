"""The folder of a run: what it contains, which process writes to it, and where it lies."""
