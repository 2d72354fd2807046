"""Fingerprints of settings: equal settings have equal fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def fingerprint(settings: Mapping[str, object]) -> str:
    """sha256 of the settings as canonical JSON; the order of the keys does not matter."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
