"""Commands of clouds and clusters that are not there: they record how they were called and answer what a test says."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from kit import ROOT

CLOUD = ROOT / "tools" / "cloud"
NAMES = ["gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "squeue", "nvidia-smi", "uv", "pip", "sft-jax"]

# All else that the scripts call. A real gcloud or kubectl is out of their reach: it might delete what a person needs.
_PROGRAMS = ["base64", "bash", "cat", "chmod", "cp", "cut", "date", "dirname", "env", "grep", "gzip", "head", "wc"]
_PROGRAMS += ["hostname", "mkdir", "mktemp", "mv", "nohup", "rm", "sed", "setsid", "sort", "tail", "tar", "touch", "tr"]

_STUB = r"""#!/usr/bin/env bash
name=${0##*/}
printf -v call '%s\x1f' "$name" "$@"
[ "$name" = sleep ] || printf '%s\x1e' "$call" >>"$STUBS/calls" # at once: others may write at the same time
take() { # the next line of a list of answers
    head -n 1 "$STUBS/$1"
    sed -i 1d "$STUBS/$1"
}
[ ! -e "$STUBS/answer" ] || . "$STUBS/answer"
"""


class Stubs:
    """A folder of such commands, which is all there is on the PATH."""

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
        self.source = folder / "source"  # what is installed: all that the scripts need of a source tree
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
        """What all the commands do after recording a call, in bash, with ``$name``; ``take LIST`` is its next line."""
        (self.folder / "answer").write_text(text)
        for name, lines in lists.items():
            (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def run(self, *words: object, timeout: float = 60, **env: str) -> subprocess.CompletedProcess:
        """A script of tools/cloud, or ``bash``, to its end."""
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
        """The same, without waiting for its end; it gets SIGINT even if this process was started to ignore it."""
        # What is ignored here stays ignored in the started program, what is handled does not. Not by preexec_fn: that
        # forks in Python, about which jax warns once another test of this process has imported it.
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
        """All calls so far in their order, or those of these commands; they are then forgotten."""
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        calls = [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]
        return [call for call in calls if not names or call[0] in names]


def tool(name: str) -> str:
    """A program of this environment, such as shellcheck."""
    path = Path(sys.prefix) / "bin" / name
    return str(path) if path.exists() else name
