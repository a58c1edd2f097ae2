"""Faults of the machine that end a command: a full disk, a folder that may not be written, too little memory."""

import errno
from collections.abc import Iterator

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_ROOM_WORDS = ("No space left on device", "Disk quota exceeded")  # of the library that writes checkpoints
_NO_MEMORY_WORDS = ("RESOURCE_EXHAUSTED", "Out of memory")  # of XLA
_LESS = {
    "train": "a smaller training.batch_size, more training.num_microbatches, a smaller data.max_length, "
    "more devices along mesh.fsdp, or model.quantization=nf4 under LoRA take less; sft-jax plan tells how much",
    "evaluate": "a smaller evaluation.batch_size or training.batch_size, or more devices along mesh.fsdp take less",
    "generate": "a smaller --batch-size, fewer --max-new-tokens, --dtype bfloat16, or more devices take less",
    "score": "shorter rows, --dtype bfloat16, or more devices take less",
    "inspect": "fewer rows (data.*.max_rows) take less",
}


def told(error: BaseException, command: str) -> str | None:
    """What to say of an error that is the machine's, in one line with the way out; None of all others.

    Args:
        command: what ran, ``train`` and so on.
    """
    for one in _chain(error):
        text = " ".join(str(one).split())
        full = isinstance(one, OSError) and one.errno in _NO_ROOM
        if full or any(words in text for words in _NO_ROOM_WORDS):
            where = getattr(one, "filename", None)
            on = f"{where}: cannot be written" if where else "cannot write"
            way_on = "; run the command again then, it goes on from the last checkpoint" if command == "train" else ""
            return f"{on}: no space is left on the device; free some{way_on}" + ("" if where else f" ({text[:120]})")
        if isinstance(one, OSError) and one.errno in _NO_ACCESS:
            return f"{one.filename}: {one.strerror}; name another place, or change who may use it"
        if isinstance(one, MemoryError) or any(words in text for words in _NO_MEMORY_WORDS):
            less = _LESS.get(command, "stop what runs beside it")
            return f"memory does not suffice: {less} ({text[:120]})"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
