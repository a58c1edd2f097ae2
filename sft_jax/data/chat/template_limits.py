"""Limits of chat templates, which are programs that come with a model: of their source, time, memory and output."""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jinja2
import jinja2.nodes

from sft_jax.errors import UserError

SECONDS = 5.0  # processor time for rendering one conversation
MOST_BYTES = 2**28  # memory that rendering one conversation may add
MOST_SOURCE = 2**20  # characters of a template
MOST_DEPTH = 300  # of expressions inside each other
_LOOP = 10  # a loop counts as so many: Python compiles at most twenty inside each other, and Jinja takes seconds to try
LARGEST_NUMBER = 10**6  # in the source of a template, and of the product of all by which it multiplies
MOST_GROWTH = 10  # characters that a template may write for each character of a conversation,
FREE_CHARACTERS = 10**6  # beyond these
_INTERVAL = 0.1  # seconds between looks at time and memory

GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_WIDTH = re.compile(r"[%:<>^=.](\d{7,40})")
_STATISTICS = Path("/proc/self/statm")
_running: list[_Limits] = []  # empty where there are no limits


class OutOfBounds(BaseException):
    """Rendering takes too much time or memory. No ``Exception``, so that nothing on the way catches it."""


def parse(source: str) -> jinja2.nodes.Template:
    """The syntax tree of a template, without the tags that mark assistant turns.

    Raises:
        jinja2.TemplateSyntaxError, RecursionError: rendering raises it as well, and says more.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    # What walks the tree would compute filters of constants, and `'1000000000'|int` makes any constant a large one.
    environment.filters = dict.fromkeys(environment.filters, _computed_later)
    return environment.parse(GENERATION.sub("", source))


@jinja2.pass_context
def _computed_later(context: object, value: object) -> object:
    raise AssertionError("a tree is not rendered")


def check_source(source: object) -> None:
    """Checks the source of a template before anything compiles it. Errors of its syntax are found by rendering.

    Jinja computes constant expressions when it compiles, each in a single step of Python, which no limit of time or
    memory ends: ``9 ** 9 ** 9`` takes hours, and ``'x' * 999999 * 999999`` all memory.

    Raises:
        UserError: it is no text, too long, too deep, or computes with numbers that no template needs.
    """

    def refused(what: str) -> UserError:
        return UserError(f"the chat template {what}; set data.chat_template to another one")

    if not isinstance(source, str):
        raise refused(f"is no text but {str(source)[:40]!r}")
    if len(source) > MOST_SOURCE:
        raise refused(f"has {len(source):,} characters, and at most {MOST_SOURCE:,} are read")
    try:
        parsed = parse(source)
    except (jinja2.TemplateSyntaxError, RecursionError):
        return
    repeated = 1
    waiting: list[tuple[jinja2.nodes.Node, int]] = [(parsed, 0)]
    while waiting:
        node, depth = waiting.pop()
        inside = depth + (_LOOP if isinstance(node, jinja2.nodes.For) else 1)
        waiting += [(child, inside) for child in node.iter_child_nodes()]
        if depth > MOST_DEPTH:
            raise refused(f"nests more than {MOST_DEPTH} expressions, or {MOST_DEPTH // _LOOP} loops")
        if isinstance(node, jinja2.nodes.Pow):
            raise refused("computes powers (**)")
        if isinstance(node, jinja2.nodes.Const) and _is_large(node.value):
            raise refused(f"has the number {str(node.value)[-20:]}, and at most {LARGEST_NUMBER:,} is allowed")
        if isinstance(node, jinja2.nodes.Mul):
            factors = [one.value for one in (node.left, node.right) if isinstance(one, jinja2.nodes.Const)]
            repeated *= math.prod(max(1, abs(one)) for one in factors if isinstance(one, int))
        if repeated > LARGEST_NUMBER:
            raise refused(f"repeats texts or lists more than {LARGEST_NUMBER:,} times")


def _is_large(value: object) -> bool:
    if isinstance(value, str):  # a width in a format, such as '%999999999d'
        return any(int(width) > LARGEST_NUMBER for width in _WIDTH.findall(value))
    return isinstance(value, (int, float)) and not abs(value) <= LARGEST_NUMBER


class _Limits:
    """Looks at the time and the memory of the renderings of this process, one after the other."""

    def __init__(self) -> None:
        # Kept open, because reading it anew takes as long as rendering a short conversation.
        self._statistics = os.open(_STATISTICS, os.O_RDONLY) if _STATISTICS.exists() else None
        self.start()

    def start(self) -> None:
        self._began, self._before = time.thread_time(), self._resident_bytes()

    def look(self, number: int, frame: object) -> None:
        if time.thread_time() - self._began > SECONDS:
            raise OutOfBounds(f"does not finish within {SECONDS:g} seconds")
        if self._resident_bytes() - self._before > MOST_BYTES:
            raise OutOfBounds(f"needs more than {MOST_BYTES // 2**20} MiB of memory")

    def close(self) -> None:
        if self._statistics is not None:
            os.close(self._statistics)

    def _resident_bytes(self) -> int:
        """The memory of this process, where the system says it; elsewhere its largest so far."""
        if self._statistics is not None:
            return int(os.pread(self._statistics, 100, 0).split()[1]) * resource.getpagesize()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def limited() -> Iterator[None]:
    """Limit time and memory of a block inside :func:`enforce_limits`; elsewhere there is no limit.

    Raises:
        OutOfBounds: the message names what there is too much of.
    """
    if not _running or not _is_main_thread():
        yield
        return
    _running[-1].start()
    signal.setitimer(signal.ITIMER_REAL, _INTERVAL, _INTERVAL)  # most blocks end before the first look
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def enforce_limits() -> Iterator[None]:
    """Enable the limits of rendering; has an effect in the main thread of a process only."""
    if _running or not _is_main_thread():
        yield
        return
    limits = _Limits()
    before = signal.signal(signal.SIGALRM, limits.look)
    _running.append(limits)
    try:
        yield
    finally:
        _running.pop()
        signal.signal(signal.SIGALRM, before)
        limits.close()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
