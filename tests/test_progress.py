"""Long work says how far it is, with or without a terminal; short work says nothing."""

import io
import re
import sys
import time

import pytest

from sft_jax import progress
from sft_jax.progress import Work


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    monkeypatch.setattr(progress, "_is_silent", False)


def wait_for(capsys, lines):
    """The lines that appear while the work counts nothing."""
    said = ""
    deadline = time.monotonic() + 20
    while said.count("\n") < lines and time.monotonic() < deadline:
        time.sleep(0.01)
        said += capsys.readouterr().err
    return said.splitlines()


def test_short_work_is_silent(capsys):
    with Work("compiling", of="the step"):
        pass
    with Work("reading", 3, "rows") as work:
        work.update(3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "done", "pattern"),
    [
        (("compiling", None, "", "the step"), 0, r"compiling  the step, \d+ s"),
        (("reading", 4000, "rows"), 1200, r"  reading  1,200 of 4,000 rows, \d+ s"),
        (("loading", 1_300_000_000, "B", "weights"), 900_000_000, r"  loading  0\.9 of 1\.3 GB of weights, \d+ s"),
        (("fetching", None, "B"), 5_000_000, r" fetching  5\.0 MB, \d+ s"),
        (("waiting",), 0, r"  waiting  \d+ s"),
    ],
)
def test_long_work_prints_lines(arguments, done, pattern, quick, capsys):
    with Work(*arguments) as work:
        work.update(done)
        lines = wait_for(capsys, 2)
    assert len(lines) >= 2
    assert all(re.fullmatch(pattern, line) for line in lines), lines


def test_one_process_shows_its_progress(quick, capsys):
    progress.silence()
    with Work("reading", 3, "rows") as work:
        work.update()
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(quick, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Work("loading", 2_000_000, "B", "weights") as work:
        work.update(1_000_000)
        deadline = time.monotonic() + 20
        while "1.00M/2.00M" not in sys.stderr.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "loading:  50%" in sys.stderr.getvalue()
    assert "1.00M/2.00M" in sys.stderr.getvalue()
