"""Exceptions of the library, and the exit codes of the command line."""

from sft_jax.redaction import without_secrets

USER_ERROR = 2  # the same command would fail again
BUG = 70  # EX_SOFTWARE of sysexits.h: an error that the library does not know
RETRY = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes where this one stopped


class UserError(ValueError):
    """An error in a config, a file or a row. The message is one line that names the cause and the fix.

    The command line prints the message and exits with :data:`USER_ERROR`. Any other exception is a bug in this library:
    its traceback is kept in a file, or shown with ``--debug``, and the exit code is :data:`BUG`.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Preempted(Exception):
    """The machine is being preempted; the state is saved."""


class Stopped(Preempted):
    """A callback asked the run to stop; the state is saved."""


class CheckFailed(Exception):
    """What was written is not what it should be; the message is one line."""


class Unreachable(RuntimeError):
    """Another process of the run could not be reached."""


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with ``error``."""
    if isinstance(error, UserError):
        return USER_ERROR
    if isinstance(error, (Preempted, Unreachable)):
        return RETRY
    if isinstance(error, CheckFailed):
        return 1
    return 130 if isinstance(error, KeyboardInterrupt) else BUG


def refuse_lfs_pointer(first: bytes, name: object) -> None:
    """Reject a git-lfs pointer, which stands in for a large file that was not fetched.

    Args:
        first: the first bytes of the file.

    Raises:
        UserError: the file is such a pointer.
    """
    if first.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{name}: is a pointer of git-lfs and not the file itself; fetch it with git lfs pull")


def one_line(text: str) -> str:
    """Return ``text`` as one line, with unprintable characters written as escapes, and without secrets."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in without_secrets(text))
