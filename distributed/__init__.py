"""Sweeps, trials and data flow on Ray.

This is a package of brainsweep.
"""

import os

# Only `connect` may start Ray. Otherwise a thread that outlives it, such as one of Ray Data, starts a second Ray with
# its next call, and Ray ends the whole process when this second Ray ends (ray-project/ray#64206). `import ray` reads
# it.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
