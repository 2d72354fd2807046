"""Measurements, each a ratio to a plain implementation of what was published."""
