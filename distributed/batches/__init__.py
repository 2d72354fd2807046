"""From the plan of an epoch to batches of volumes on the device."""
