"""Messages for errors that are not in the user's files: a full disk, missing permissions, too little memory, a bug."""

import errno
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from sft_jax.redaction import without_secrets

_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
_OTHER = {
    errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY,
    errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO,
}  # fmt: skip
_ADVICE = {
    errno.EFBIG: "larger files than the file system or the limit of this process (ulimit -f) allows",
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
}
_OUT_OF_MEMORY_MESSAGES = ("RESOURCE_EXHAUSTED", "Out of memory")  # raised by XLA
_REPORTED = (*_ADVICE, *_NO_ACCESS, *_TOO_MANY_FILES)  # recognised by their text, as the checkpoint library has them
_MEMORY_ADVICE = {
    "train": "use a smaller training.batch_size, more training.num_microbatches, a smaller data.max_length, "
    "more devices along mesh.fsdp, or model.quantization=nf4 with LoRA; sft-jax plan computes the memory",
    "evaluate": "use a smaller evaluation.batch_size or training.batch_size, or more devices along mesh.fsdp",
    "generate": "use a smaller --batch-size, fewer --max-new-tokens, --dtype bfloat16, or more devices",
    "score": "use shorter rows, --dtype bfloat16, or more devices",
    "inspect": "use fewer rows (data.*.max_rows)",
}


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Gives errors of the operating system that name no file the name of the folder that is written."""
    try:
        yield
    except Exception as error:
        text = str(error)
        number = _errno(error, text)
        if number is None or getattr(error, "filename", None) or _path_in(text):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def explain(error: BaseException, command: str) -> str | None:
    """A one-line message with the fix for an error caused by the machine; None for any other error.

    Args:
        command: the command that ran, such as ``train``.
    """
    for one in chain(error):
        text = " ".join(str(one).split())
        number = _errno(one, text)
        path = getattr(one, "filename", None) or _path_in(text)
        if number in _ADVICE:
            retry = " and run the same command again; it resumes from the last checkpoint" if command == "train" else ""
            where = f"{path}: cannot be written" if path else "cannot write"
            return f"{where}: {_ADVICE[number]}; free some space{retry}"
        if number in _NO_ACCESS:
            return f"{path or text[:160]}: {os.strerror(number)}; use another path, or change its permissions"
        if number in _TOO_MANY_FILES:
            return f"{path or 'a file'}: too many open files; raise the limit of this process (ulimit -n)"
        if number in _OTHER and path:
            return f"{path}: {os.strerror(number)}"
        if isinstance(one, MemoryError) or any(words in text for words in _OUT_OF_MEMORY_MESSAGES):
            advice = _MEMORY_ADVICE.get(command, "stop other programs on this machine")
            return f"out of memory: {advice} ({text[:120]})"
    return None


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error comes from missing permissions, memory or open files, and not from what is read."""
    for one in chain(error):
        text = str(one)
        if isinstance(one, MemoryError) or any(words in text for words in _OUT_OF_MEMORY_MESSAGES):
            return True
        if _errno(one, text) in {*_NO_ACCESS, *_TOO_MANY_FILES, errno.ENOMEM}:
            return True
    return False


def _errno(error: BaseException, text: str) -> int | None:
    """The number of an error of the operating system, also where a library in another language reports it as text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", text):  # Rust
        return int(found[1])
    return next((number for number in _REPORTED if os.strerror(number) in text), None)


def _path_in(text: str) -> str | None:
    """The path that a message of the checkpoint library has in quotes; of a checkpoint, its folder."""
    found = re.search(r'"(/[^"]+)"', text)
    return re.sub(r"(/checkpoints/\d+)\.orbax.*", r"\1", found[1]) if found else None


def unknown(error: BaseException) -> str:
    """A message for an error that no other message fits, with its place; its traceback is written to a file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "sft_jax" in frame.filename] or frames
    place = f" at {own[-1].filename.rpartition('/sft_jax/')[2]}:{own[-1].lineno}" if own else ""
    text = without_secrets("".join(traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="sft-jax-error-", suffix=".txt", delete=False) as file:
            file.write(text)
        where = f"its traceback is in {file.name}"
    except OSError:
        where = "--debug shows its traceback"
    return f"an error that sft-jax does not know{place}: {type(error).__name__}: {error}; {where}; please report it"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
