"""One image at a time: reading, intensity, resampling, registration, left and right."""
