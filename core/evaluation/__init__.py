"""Probes and metrics; everything here takes arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32 | np.float64]
"""Embeddings, ages, probabilities, affines: results are float64, input may be float32."""

Names = npt.NDArray[np.object_ | np.str_]
"""Names of sites or other groups; missing ones may be None or NaN."""

Classes = npt.NDArray[np.int64 | np.object_ | np.str_]
"""The class of each subject: a whole number or a name."""
