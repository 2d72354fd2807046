"""Models, objectives, volumes and their evaluation. Nothing here knows of Ray.

This is a package of brainsweep.
"""

import getpass
import os

# In a container a process may run as a user id without a name. Importing MONAI asks for the name and would fail; Python
# looks for it in LOGNAME first. It stands here because every process imports this before MONAI, also workers of Ray.
try:
    getpass.getuser()
except (KeyError, OSError):
    os.environ["LOGNAME"] = f"user-{os.getuid()}"
