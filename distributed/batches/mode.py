"""Where volumes may wait for the workers; see `hold`."""

from __future__ import annotations

from typing import Literal

Mode = Literal["auto", "resident", "streaming", "direct"]
