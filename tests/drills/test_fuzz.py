"""Any bytes are read or refused with a user error; ``fuzzing/run.py`` looks for more with atheris."""

import random
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzzing"))

from attempt import attempt, mutations
from run import targets

pytestmark = pytest.mark.drill("sft_jax/hf", "sft_jax/files", "sft_jax/data/chat", "sft_jax/models/families")
INPUTS, FULL = 150, 5_000  # of each target


@pytest.mark.parametrize("name", sorted(targets()))
def test_random_changes(name, is_full):
    function, seeds = targets()[name]
    before = signal.getsignal(signal.SIGVTALRM)
    rng = random.Random(name)
    found = {}
    for data in mutations(seeds, FULL if is_full else INPUTS, rng):
        if finding := attempt(function, data):
            found.setdefault(finding.key, finding)
    assert not found, "\n".join(f"{one.kind} at {one.place}: {one.message} {one.data!r}" for one in found.values())
    assert signal.getsignal(signal.SIGVTALRM) == before


def test_what_counts_as_a_finding():
    def fails(data: bytes) -> None:
        raise KeyError(data)

    assert attempt(fails, b"a").kind == "KeyError"
    assert attempt(len, b"a") is None
