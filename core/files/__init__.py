"""Files: written whole, found in folders and object stores, and told apart by fingerprints."""
