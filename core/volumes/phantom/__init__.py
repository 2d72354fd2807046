"""Synthetic brains with known ageing, made from the ICBM152 average anatomy, and cohorts of them."""
