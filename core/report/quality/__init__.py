"""The quality page of a cohort."""
