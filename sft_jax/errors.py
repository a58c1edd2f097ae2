"""The one exception for mistakes a user can make."""


class UserError(ValueError):
    """A mistake in a config, a file or a row, told in one line that names it and the way out.

    The command line prints the message without a traceback and exits with code 2; everything else that is raised is
    a fault of this library and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text that may quote anything, as one line: what cannot be printed is written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
