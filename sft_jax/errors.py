"""What ends a command besides success, and the exit code it has."""

USER_MISTAKE = 2  # not to be tried again as it is
AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on where this one stopped


class UserError(ValueError):
    """A mistake in a config, a file or a row, told in one line that names it and the way out.

    The command line prints the message without a traceback and exits with :data:`USER_MISTAKE`; everything else that is
    raised is a fault of this library and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Preempted(Exception):
    """The machine is about to be taken away; the state is saved."""


class Stopped(Preempted):
    """A callback asked the run to stop; the state is saved."""


class Unreachable(RuntimeError):
    """Another process of the run did not come."""


def exit_code(error: BaseException) -> int:
    """Of a command that ends by ``error``."""
    if isinstance(error, UserError):
        return USER_MISTAKE
    if isinstance(error, (Preempted, Unreachable)):
        return AGAIN
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def refuse_lfs_pointer(first: bytes, name: object) -> None:
    """Refuse a file that begins as git-lfs writes one in place of a large file that was not fetched.

    Raises:
        UserError: it does.
    """
    if first.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{name}: is a pointer of git-lfs and not the file itself; fetch it with git lfs pull")


def one_line(text: str) -> str:
    """A text that may quote anything, as one line: what cannot be printed is written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
