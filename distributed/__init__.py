"""Sweeps, trials and data flow on Ray.

This is a package of brainsweep.
"""

import os

# Only `connect` starts Ray. Else a thread that outlives it, such as one of Ray Data's, starts a Ray of its own
# with its next call, and Ray ends the whole process when that one goes (ray-project/ray#64206). Read by `import ray`.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
