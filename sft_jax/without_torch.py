"""Keeps transformers from importing torch, lets it again, and leaves out its notice that torch is missing."""

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


def bring_back_torch() -> None:
    """Undo :func:`leave_out_torch`, for commands that compare with torch; call it before transformers is imported."""
    modules: dict[str, Any] = sys.modules
    if "transformers" not in modules and modules.get("torch", ...) is None:
        del modules["torch"]


def leave_out_notice() -> None:
    """Filter out the notice of transformers that its models need torch: nothing here uses them."""
    import logging  # only here: the command line starts without it

    logging.getLogger("transformers").addFilter(_is_no_notice)


def _is_no_notice(record: Any) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")
