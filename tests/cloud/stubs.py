"""Stubs of cloud and cluster commands: they record their arguments and return the answers that a test sets."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from kit import ROOT

CLOUD = ROOT / "tools" / "cloud"
NAMES = ["gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "squeue", "nvidia-smi", "uv", "pip", "sft-jax"]

# All other programs that the scripts call. The real gcloud and kubectl, which could delete resources, are not on the
# PATH.
_PROGRAMS = ["base64", "bash", "cat", "chmod", "cp", "cut", "date", "dirname", "env", "grep", "gzip", "head", "wc"]
_PROGRAMS += ["hostname", "mkdir", "mktemp", "mv", "nohup", "rm", "sed", "setsid", "sort", "tail", "tar", "touch", "tr"]

_STUB = r"""#!/usr/bin/env bash
name=${0##*/}
printf -v call '%s\x1f' "$name" "$@"
[ "$name" = sleep ] || printf '%s\x1e' "$call" >>"$STUBS/calls" # a single write: others may write concurrently
take() { # prints and removes the next line of a list of answers
    head -n 1 "$STUBS/$1"
    sed -i 1d "$STUBS/$1"
}
[ ! -e "$STUBS/answer" ] || . "$STUBS/answer"
"""


class Stubs:
    """A folder of stubs, which is the whole PATH of the scripts."""

    def __init__(self, folder: Path):
        self.folder, self.home = folder / "stubs", folder / "home"
        (self.folder / "bin").mkdir(parents=True)
        self.home.mkdir()
        for name in [*NAMES, "sleep"]:
            path = self.folder / "bin" / name
            path.write_text(_STUB)
            path.chmod(0o755)
        for name in _PROGRAMS:
            (self.folder / "bin" / name).symlink_to(shutil.which(name) or name)
        self.config = folder / "my.yaml"
        self.config.write_text("training:\n  output_dir: gs://bucket/mine\n")
        self.source = folder / "source"  # the source tree to install, with the files that the scripts need
        for name in ("sft_jax/cli.py", "pyproject.toml", "README.md", "LICENSE"):
            (self.source / name).parent.mkdir(exist_ok=True, parents=True)
            (self.source / name).write_text("")
        (self.source / "tools").mkdir()
        (self.source / "tools" / "cloud").symlink_to(CLOUD)
        self.env = {
            "PATH": str(self.folder / "bin"),
            "HOME": str(self.home),
            "STUBS": str(self.folder),
            "LANG": os.environ.get("LANG", "C.UTF-8"),
        }

    def answer(self, text: str, **lists: list[str]) -> None:
        """Sets the bash code that all stubs run after recording a call; ``$name`` is the stub, see ``take LIST``."""
        (self.folder / "answer").write_text(text)
        for name, lines in lists.items():
            (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def run(self, *words: object, timeout: float = 60, **env: str) -> subprocess.CompletedProcess:
        """Runs a script of tools/cloud, or ``bash``."""
        return subprocess.run(
            self._command(*words),
            env=self.env | env,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def start(self, *words: object, **env: str) -> subprocess.Popen:
        """Starts a script without waiting; it receives SIGINT even if this process ignores it."""
        # A child inherits ignored signals but not handlers. preexec_fn would fork in Python, and JAX warns about that
        # if another test of this process has imported it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(self._command(*words), env=self.env | env, cwd=self.home, stdin=subprocess.DEVNULL)
        finally:
            signal.signal(signal.SIGINT, before)

    def _command(self, *words: object) -> list[str]:
        script, *others = map(str, words)
        bash = str(self.folder / "bin" / "bash")
        return [bash, *others] if script == "bash" else [bash, str(CLOUD / script), *others]

    def calls(self, *names: str) -> list[list[str]]:
        """Returns and clears the recorded calls in order, optionally only those of the given commands."""
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        calls = [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]
        return [call for call in calls if not names or call[0] in names]


def tool(name: str) -> str:
    """Path of a program of this environment, such as shellcheck."""
    path = Path(sys.prefix) / "bin" / name
    return str(path) if path.exists() else name
