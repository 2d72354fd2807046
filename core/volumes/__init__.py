"""Brain volumes, from files to the batches of training.

sources    finds the scans of a folder or table, with their ages, sexes and sites (`list_scans`)
images     reads, resamples, registers and scales one image
ingest     prepares the scans of a source and writes them as a cohort (`ingest`)
phantom    makes synthetic brains and cohorts of them
cohort     the format of a cohort on disk: writes, reads, describes and verifies it (`Cohort`)
views      random views of volumes for training (`make_views`)
"""
