"""Entry point of ``sft-jax`` and ``python -m sft_jax``."""

import atexit
import gc
import os
import sys
import threading
import warnings
from typing import NoReturn

from sft_jax.cli import main
from sft_jax.errors import one_line
from sft_jax.without_torch import leave_out_torch
from sft_jax.without_tpus import leave_out_tpus


def run() -> int:
    """Run a command in a process of its own; :func:`sft_jax.cli.main` also runs inside other programs."""
    # The objects of modules and traced programs stay: looking for garbage among them takes a tenth of a start.
    gc.set_threshold(50_000, 20, 100)
    leave_out_torch()
    leave_out_tpus()
    if "--debug" not in sys.argv:
        # What Python prints, with tracebacks, of objects that are removed while a command ends with an error.
        sys.unraisablehook = lambda _: None
        threading.excepthook = _one_line_of_a_thread
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    code = main()
    if code and _has_threads():
        _exit_now(code)
    return code


def _has_threads() -> bool:
    """Whether there are threads that Python would wait for at the end."""
    return any(one is not threading.main_thread() and not one.daemon for one in threading.enumerate())


def _exit_now(code: int) -> NoReturn:
    """End after an error: threads of the checkpoint library wait ten minutes for a checkpoint that is not written."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _one_line_of_a_thread(error: threading.ExceptHookArgs) -> None:
    if error.exc_type is not SystemExit:
        name = error.thread.name if error.thread is not None else "a thread"
        text = one_line(f"{error.exc_type.__name__}: {error.exc_value}")
        print(f"sft-jax: {name} ended with {text}; --debug shows its traceback", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run())
