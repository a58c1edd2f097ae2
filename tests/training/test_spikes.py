"""The guard against spikes of the gradient norm, and the alarms of a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kit import config_of, losses, one_device, trained_leaves

from sft_jax.errors import UserError
from sft_jax.run.alarms import Alarms
from sft_jax.run.train import train
from sft_jax.training import spikes
from sft_jax.training.spikes import guard_spikes


@pytest.mark.smoke
def test_a_spike_changes_nothing_and_is_counted():
    """As if the steps with spikes had not been: parameters, moments and average."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=4), jnp.float32) for _ in range(30)]
    large = {22: 100.0, 25: 1e6}

    def run(optimizer, gradients):
        params = jnp.ones(4, jnp.float32)
        state = optimizer.init(params)
        for gradient in gradients:
            with jax.numpy_dtype_promotion("standard"):  # of optax
                updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    adam = optax.with_extra_args_support(optax.adamw(0.1, weight_decay=0.1))
    guarded, state = run(guard_spikes(adam, 10.0), [g * large.get(i, 1.0) for i, g in enumerate(grads)])
    plain, inner = run(adam, [g for i, g in enumerate(grads) if i not in large])
    assert np.array_equal(guarded, plain)
    assert jax.tree.all(jax.tree.map(np.array_equal, state.inner, inner))
    assert (int(state.skipped), int(state.num_seen)) == (2, 28)


@pytest.mark.smoke
def test_the_first_steps_are_no_spikes():
    guard = guard_spikes(optax.with_extra_args_support(optax.sgd(1.0)), 2.0)
    state = guard.init(jnp.zeros(1))
    for norm in [1e-3, 1.0, 50.0]:
        _, state = guard.update(jnp.full(1, norm), state)
    assert int(state.skipped) == 0


def test_a_run_skips_or_stops_at_a_spike(tiny, chats, tmp_path, capsys, monkeypatch):
    """With a factor just above 1, the first gradient above the average is a spike."""
    monkeypatch.setattr(spikes, "_FIRST", 3)
    keys = {"training__max_steps": 12, "training__save_every": 12, "optimizer__spike_factor": 1.001}
    stop = config_of(tiny, chats, tmp_path / "run", optimizer__spike_guard="stop", **keys)
    with pytest.raises(UserError, match=r"step \d+: spike: loss .* is saved as step \d+; .*spike_guard=skip") as raised:
        train(stop, one_device())
    step = int(str(raised.value).split(":")[0].removeprefix("step "))
    assert json.loads((tmp_path / "run" / "report" / f"spike_step_{step}.json").read_text())["rows"]
    skip = config_of(tiny, chats, tmp_path / "run", optimizer__spike_guard="skip", **keys)
    train(skip, one_device())
    assert f"step {step}/12  spike: gradient norm" in capsys.readouterr().err
    whole = config_of(tiny, chats, tmp_path / "whole", optimizer__spike_guard="skip", **keys)
    last = train(whole, one_device())
    assert last["skipped_steps"] >= 1
    # Two programs: skip and stop round differently.
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    one, other = (trained_leaves(tmp_path / name) for name in ("run", "whole"))
    assert all(np.allclose(one[path], other[path], atol=1e-5) for path in one)


@pytest.mark.smoke
def test_alarms():
    alarms = Alarms()
    row = {"target_tokens": 5, "grad_norm": 1.0}
    assert alarms.of(row) == []
    still = [alarms.of(row | {"grad_norm": 0.0}) for _ in range(8)]
    assert [len(one) for one in still] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert "all gradients were 0 in the last 5 steps" in still[4][0]
    empty = [alarms.of({"target_tokens": 0, "grad_norm": 0.0}) for _ in range(3)]
    assert [len(one) for one in empty] == [1, 0, 0]
