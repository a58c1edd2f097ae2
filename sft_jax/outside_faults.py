"""Messages for errors that are not in the user's files: a full disk, missing permissions, too little memory, a bug."""

import errno
import tempfile
import traceback
from collections.abc import Iterator

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_DISK_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded")  # raised by the checkpoint library
_OUT_OF_MEMORY_MESSAGES = ("RESOURCE_EXHAUSTED", "Out of memory")  # raised by XLA
_MEMORY_ADVICE = {
    "train": "use a smaller training.batch_size, more training.num_microbatches, a smaller data.max_length, "
    "more devices along mesh.fsdp, or model.quantization=nf4 with LoRA; sft-jax plan computes the memory",
    "evaluate": "use a smaller evaluation.batch_size or training.batch_size, or more devices along mesh.fsdp",
    "generate": "use a smaller --batch-size, fewer --max-new-tokens, --dtype bfloat16, or more devices",
    "score": "use shorter rows, --dtype bfloat16, or more devices",
    "inspect": "use fewer rows (data.*.max_rows)",
}


def explain(error: BaseException, command: str) -> str | None:
    """A one-line message with the fix for an error caused by the machine; None for any other error.

    Args:
        command: the command that ran, such as ``train``.
    """
    for one in _chain(error):
        text = " ".join(str(one).split())
        full = isinstance(one, OSError) and one.errno in _DISK_FULL
        if full or any(words in text for words in _DISK_FULL_MESSAGES):
            path = getattr(one, "filename", None)
            problem = f"{path}: cannot be written" if path else "cannot write"
            retry = " and run the same command again; it resumes from the last checkpoint" if command == "train" else ""
            details = "" if path else f" ({text[:120]})"
            return f"{problem}: no space left on the device; free some space{retry}{details}"
        if isinstance(one, OSError) and one.errno in _NO_ACCESS:
            return f"{one.filename}: {one.strerror}; use another path, or change its permissions"
        if isinstance(one, MemoryError) or any(words in text for words in _OUT_OF_MEMORY_MESSAGES):
            advice = _MEMORY_ADVICE.get(command, "stop other programs on this machine")
            return f"out of memory: {advice} ({text[:120]})"
    return None


def unknown(error: BaseException) -> str:
    """A message for an error that no other message fits, with its place; its traceback is written to a file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "sft_jax" in frame.filename] or frames
    place = f" at {own[-1].filename.rpartition('/sft_jax/')[2]}:{own[-1].lineno}" if own else ""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="sft-jax-error-", suffix=".txt", delete=False) as file:
            file.write(text)
        where = f"its traceback is in {file.name}"
    except OSError:
        where = "--debug shows its traceback"
    return f"an error that sft-jax does not know{place}: {type(error).__name__}: {error}; {where}; please report it"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
