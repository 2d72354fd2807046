"""A sweep from beginning to end, and one training run without a search."""
