"""``sft-jax --version``: this library, the ones that it computes with, and the devices."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from sft_jax.commands.shared import quiet_imports
from sft_jax.version import __version__


class Version(argparse.Action):
    """Prints the versions, and exits."""

    def __init__(self, option_strings: list[str], dest: str):
        super().__init__(option_strings, dest, nargs=0, help="show versions, commit and devices, and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print three lines."""
        quiet_imports()
        import jax

        commit = _commit()
        print(f"sft-jax {__version__}" + (f", commit {commit}" if commit else ""))
        packages = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "transformers")
        versions = [f"{name} {version}" for name in packages if (version := _version(name))]
        print(f"Python {platform.python_version()}, {', '.join(versions)}")
        devices = jax.devices()
        print(f"devices: {len(devices)} × {devices[0].device_kind}")
        parser.exit()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of a checkout, or of an installation from a repository; None for a release."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "log", "-1", "--format=%h", "--", str(folder.parent)],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    try:
        installed = metadata.distribution("sft-jax").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    commit = json.loads(installed or "{}").get("vcs_info", {}).get("commit_id")
    return commit[:7] if commit else None
