"""The command of lm-evaluation-harness where it is not installed; tests/drills/test_harness.py compares its results."""

import sys

import pytest

from sft_jax.evaluation.harness import main


@pytest.mark.smoke
def test_the_package_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main() == 2
    assert capsys.readouterr().err == (
        "sft-jax: lm_eval: the package is not installed (pip install 'sft-jax[lm-eval]')\n"
    )
