"""Prevents transformers from importing torch."""

from __future__ import annotations

import sys
from typing import Any


def leave_out_torch() -> None:
    """Make torch look as if it were not installed. Does nothing if transformers is already imported.

    transformers imports torch wherever it is installed, even for configs and tokenizers. That costs 3 s and 240 MB of
    host memory per process, and nothing here uses it. ``None`` in ``sys.modules`` makes Python raise an import error.
    """
    modules: dict[str, Any] = sys.modules
    if "transformers" not in modules:
        modules.setdefault("torch", None)
