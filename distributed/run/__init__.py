"""A run's folder: what is in it, who writes to it, and where it lies."""
