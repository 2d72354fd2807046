"""A cohort on disk: `Cohort` reads it, `CohortWriter` writes it; the format of its shards, a description, checks."""
