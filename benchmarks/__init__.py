"""Measurements; each is a ratio to a plain implementation of the published method."""
