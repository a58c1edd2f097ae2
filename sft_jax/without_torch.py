"""A process without torch, where the process is ours alone."""

from __future__ import annotations

import sys
from typing import Any


def leave_out_torch() -> None:
    """Make torch look as if it were not installed, before transformers looks: afterwards this does nothing.

    transformers imports it wherever it is, for configs and tokenizers as well: 3 s and 240 MB of the host a process,
    for nothing that is used here. ``None`` in ``sys.modules`` is Python's way to say that a module cannot be imported.
    """
    modules: dict[str, Any] = sys.modules
    if "transformers" not in modules:
        modules.setdefault("torch", None)
