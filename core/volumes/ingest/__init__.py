"""From the scans of a source to a cohort: `prepare` processes one scan, `shards` one shard, `cohort` all of them."""
