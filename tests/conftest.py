"""Before any test imports Ray: what brainsweep asks of Ray's import."""

import distributed  # noqa: F401
