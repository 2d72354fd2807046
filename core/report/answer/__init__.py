"""The findings of a run, as numbers and in words. This package imports no figure."""
