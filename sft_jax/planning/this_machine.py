"""The topology of the devices of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from sft_jax.planning.chips import CHIPS

_TPUS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
_LIST = "import jax, json; print(json.dumps([one.device_kind for one in jax.devices()]))"
_SECONDS = 120


def this_machine() -> str | None:
    """The topology of this machine's accelerators, such as ``h100:8``; None if there are none that are known.

    Asks in a process of its own, because ahead-of-time compilation leaves the devices of this one alone.
    """
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LIST],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        kinds = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None
    return topology_of(kinds)


def topology_of(kinds: list[str]) -> str | None:
    """The topology of devices by their kinds, as jax names them.

    >>> topology_of(["TPU v5 lite"] * 8), topology_of(["NVIDIA H200"]), topology_of(["cpu"])
    ('v5e:8', 'h200:1', None)
    """
    gpus = {chip.gpu.description: name for name, chip in CHIPS.items() if chip.gpu is not None}
    name = (_TPUS | gpus).get(kinds[0]) if kinds else None
    return None if name is None else f"{name}:{len(kinds)}"
