"""Models, objectives, volumes and their evaluation. Nothing here knows of Ray.

This is a package of brainsweep.
"""
