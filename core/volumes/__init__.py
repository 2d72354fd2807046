"""Volumes: reading, preprocessing, shards, cohorts, splits and views."""
