"""Synthetic brains from the ICBM152 anatomy, with known ageing."""
