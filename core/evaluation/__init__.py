"""Probes and metrics; everything here takes arrays."""
