"""Where the volumes of a cohort are kept during a sweep; see `hold`."""

from __future__ import annotations

from typing import Literal

Mode = Literal["auto", "resident", "streaming", "direct"]
