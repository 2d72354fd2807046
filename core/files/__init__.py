"""Files: writing them in one step, reading them from a folder or an object store, fingerprints of settings."""
