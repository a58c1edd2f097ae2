"""Loss weights in rows."""

import pytest

from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError


@pytest.mark.parametrize(
    "weight", [-0.5, 10_001, 10**400, 1e300, float("nan"), float("inf")], ids=lambda one: str(one)[:8]
)
def test_loss_weights_are_in_a_range(weight):
    """Also integers that no float can hold."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": weight}]
    with pytest.raises(RowError, match=r"'weight' must be between 0 and 10,000, it is (int|float)"):
        parse("messages", {"messages": messages})
    messages[1]["weight"] = 10_000
    assert parse("messages", {"messages": messages}).weights[1] == 10_000
