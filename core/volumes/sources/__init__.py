"""Where scans come from: one module per layout, all giving a `Listing`."""
