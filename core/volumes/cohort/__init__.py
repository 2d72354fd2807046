"""A cohort on disk: its shards, how they are written and read, and what is in it."""
