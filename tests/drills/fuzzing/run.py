"""Fuzzes what reads files that others made: any bytes are read, or refused with a :class:`UserError`.

    pip install -e '.[fuzz]'
    python tests/drills/fuzzing/run.py chat_template --seconds 300

A target is an entry of the dict ``TARGETS`` of a file in this folder: a function of bytes, and seeds. atheris changes
the seeds, guided by the branches of ``sft_jax`` that an input reaches. Without a target, all names are printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from attempt import MOST_BYTES, Targets, attempt

from sft_jax.without_torch import leave_out_torch

_FOLDER = Path(__file__).parent
_MOST_MB = 6144  # memory of the process: imports and the fuzzer's corpus need a part of it
_GRACE = 60  # seconds for imports, and for a hang outside of Python to be called one


def targets() -> Targets:
    """The targets of all files in this folder."""
    found: Targets = {}
    for path in sorted(_FOLDER.glob("*_files.py")):
        targets = importlib.import_module(path.stem).TARGETS
        assert not found.keys() & targets.keys(), f"{path.name} has names of another file"
        found |= targets
    return found


def main() -> int:
    """Fuzz a target in a process of its own, which may crash, and print what came out.

    Returns:
        1 if there is a finding.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", nargs="?", help="the name of a target; by default the names are printed")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument(
        "--inputs", type=int, default=-1, help="at most so many; by default as many as there is time for"
    )
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target is None:
        print(*targets(), sep="\n")
        return 0
    if options.inside is not None:
        _fuzz(options.target, options.seconds, options.inputs, Path(options.inside))
    with tempfile.TemporaryDirectory(prefix="sft-jax-fuzz-") as folder:
        return _watch(options, Path(folder))


def _watch(options: argparse.Namespace, folder: Path) -> int:
    command = [sys.executable, __file__, options.target, f"--inside={folder}"]
    command += [f"--seconds={options.seconds}", f"--inputs={options.inputs}"]
    began, log = time.monotonic(), folder / "log"
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
        try:
            code = child.wait(options.seconds + _GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
    said = log.read_text(errors="replace")
    lines = (folder / "findings").read_text().splitlines() if (folder / "findings").exists() else []
    findings = [json.loads(line) for line in lines]
    if code:
        crashes = [path.read_bytes() for name in ("crash-*", "oom-*") for path in folder.glob(name)]
        data = crashes[0] if crashes else (folder / "now").read_bytes() if (folder / "now").exists() else b""
        raised = re.search(r"Uncaught Python exception[^\n]*\n(.*?)\n(?:INFO|==)", said, re.DOTALL)
        last = [" ".join(raised[1].split())] if raised else said.strip().splitlines()[-1:] or [""]
        findings.append({"kind": f"ended with {code}", "place": "", "message": last[0][:300], "data": repr(data)})
    inputs = re.findall(r"^#(\d+)", said, re.MULTILINE) + re.findall(r"Done (\d+) runs", said)
    coverage = re.findall(r"cov: (\d+)", said)
    print(
        f"{options.target}: {int(inputs[-1]) if inputs else 0:,} inputs, {time.monotonic() - began:.0f} s, "
        f"coverage {coverage[-1] if coverage else 0} branches, {len(findings)} findings"
    )
    for one in findings:
        print(f"  {one['kind']} at {one['place']}: {one['message']}\n    {one['data'][:600]}")
    return 1 if findings else 0


def _fuzz(name: str, seconds: int, inputs: int, folder: Path) -> None:
    """Fuzz until the time is over; does not return. A finding is written at once, and fuzzing continues."""
    import atheris  # type: ignore[import-not-found]

    leave_out_torch()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with atheris.instrument_imports(include=["sft_jax"], enable_loader_override=False):
        function, seeds = targets()[name]
    corpus, known = folder / "corpus", set()
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)

    def one_input(data: bytes) -> None:
        (folder / "now").write_bytes(data)  # what a hang outside of Python, which ends this process, was about
        finding = attempt(function, data)
        if finding is not None and finding.key not in known:
            known.add(finding.key)
            with (folder / "findings").open("a") as file:
                shown = {"kind": finding.kind, "place": finding.place, "message": finding.message, "data": repr(data)}
                file.write(json.dumps(shown) + "\n")

    # The fuzzer's own time limit is out of reach: its signal is that of the time limit of templates.
    flags = [f"-max_total_time={seconds}", f"-runs={inputs}", f"-max_len={MOST_BYTES}", f"-rss_limit_mb={_MOST_MB}"]
    flags += ["-timeout=1000000", "-len_control=0", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
