"""Sweeps, trials and data flow on Ray."""
