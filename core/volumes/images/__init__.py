"""Operations on one image: NIfTI reading, intensity scaling, resampling, registration to MNI152, left and right."""
