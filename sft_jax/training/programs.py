"""Compiled programs on disk, beside the cached tokens, so that the next start of a run compiles nothing.

JAX looks a program up by its text, its compiler options and the compiler's version. On a CPU the machine code also
depends on the processor and on the number of cores, so each kind has a folder of its own.

JAX reads whatever lies there. A start therefore first deletes what an earlier one did not finish, or what is not what
it wrote: only files whose digest is recorded stay. A program costs seconds, a wrong one a run.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from sft_jax.cores import usable_cores
from sft_jax.data.read.folders import cache_folder
from sft_jax.files.digests import file_digest

_CPU_INFO = Path("/proc/cpuinfo")
# What tells one kind of processor from another, on x86 and on ARM.
_OF_PROCESSOR = {
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
}
_ENDING = ".digest"  # of the file that records a program's digest
_MAX_BYTES = 2**28  # of programs for a kind of processor; the oldest ones go first
_MIN_SECONDS = 1.0  # JAX's default: it does not keep programs that compile faster


def keep_programs(device: Any) -> None:
    """Makes JAX keep compiled programs on disk and read them from there.

    Does nothing if the user has set ``JAX_COMPILATION_CACHE_DIR``, on a CPU of unknown kind, or if the cache is not
    writable there.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    folder = cache_folder() / "programs"
    if device.platform == "cpu":
        if (kind := kind_of_processor()) is None:
            return
        folder /= f"cpu-{kind}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:  # which alone writes programs
                remove_damaged(folder)
        except OSError:
            return  # what is damaged there cannot be deleted
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.jax_persistent_cache_min_compile_time_secs == _MIN_SECONDS:  # type: ignore[attr-defined]
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs cost seconds, too
    compilation_cache.reset_cache()  # JAX decides once, at the first program, whether there is a folder
    atexit.register(record_programs)


def kind_of_processor() -> str | None:
    """Returns a digest of the processor's kind, features and usable cores; None if they are unknown."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    told = sorted({line for line in lines if line.partition(":")[0].strip() in _OF_PROCESSOR})
    if not told:
        return None
    # The compiler divides loops by the number of threads, which NPROC overrides.
    parts = [platform.machine(), *told, f"{usable_cores()} cores", os.environ.get("NPROC", "")]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def record_programs() -> None:
    """Records the digests of the programs that this process wrote, which the next start will then use."""
    folder = _own_folder()
    if folder is None or jax.process_index() != 0:
        return
    try:
        for program in _programs(folder):
            record = program.with_name(program.name + _ENDING)
            if not record.exists():
                record.write_text(file_digest(program), encoding="ascii")
    except OSError:
        return  # a full or read-only disk: the next start compiles again


def remove_damaged(folder: Path, max_bytes: int = _MAX_BYTES) -> None:
    """Deletes programs that were not recorded, or that are not what was recorded, and the oldest beyond a size.

    Raises:
        OSError: one cannot be deleted.
    """
    total = 0
    for program in sorted(_programs(folder), key=_age):
        record = program.with_name(program.name + _ENDING)
        try:
            total += program.stat().st_size
            if total <= max_bytes and record.read_text(encoding="ascii") == file_digest(program):
                continue
        except (OSError, UnicodeDecodeError):  # not recorded, or deleted by another start just now
            pass
        record.unlink(missing_ok=True)
        program.unlink(missing_ok=True)


def _own_folder() -> Path | None:
    """Returns the folder of programs if it is one for CPUs that :func:`keep_programs` chose."""
    folder: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder is None or Path(folder).parent != cache_folder() / "programs":
        return None
    return Path(folder)


def _programs(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*-cache") if file.is_file()]


def _age(program: Path) -> float:
    """Returns a number that is smaller for newer files."""
    try:
        return -program.stat().st_mtime
    except OSError:
        return 0.0
