"""The load-balancing loss of routers: values and gradients beside transformers', and in a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import compare_gradients, reference
from kit import make_model, one_device, run_config, write_chats
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from sft_jax.errors import UserError
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.ties import architecture_of
from sft_jax.run.train import train
from sft_jax.sharding import make_mesh
from sft_jax.training.losses import batch_loss
from sft_jax.training.weights import build, load_weights
from sft_jax.typing import Batch

WEIGHT = 0.3


def theirs(model, ids, mask):
    """Loss and balance. The balance is a mean over layers, where transformers averages counts before it multiplies."""
    out = model(torch.tensor(ids.astype(np.int64)), attention_mask=torch.tensor(mask), output_router_logits=True)
    experts, per_token = model.config.num_local_experts, model.config.num_experts_per_tok
    of_layers = [load_balancing_loss_func((one,), experts, per_token, torch.tensor(mask)) for one in out.router_logits]
    targets = torch.tensor(np.where(mask, ids, -100)[:, 1:].astype(np.int64))
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets.flatten())
    return loss, torch.stack(of_layers).mean()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])  # the last has a dense layer between
def test_loss_and_gradients_are_those_of_transformers(name, tmp_path):
    model = reference(name, tmp_path)
    ids = np.random.default_rng(0).integers(1, 131, (2, 30)).astype(np.int32)
    mask = np.arange(30) < np.array([[30], [17]])  # the rest is padding
    loss, balance = theirs(model, ids, mask)
    (loss + WEIGHT * balance).backward()

    reader = TensorReader(tmp_path)
    split = build(architecture_of(tmp_path, reader), make_mesh(devices=one_device()), None, "float32")
    params, frozen = load_weights(split, reader)
    supervised = np.pad(mask[:, 1:], ((0, 0), (0, 1))).astype(np.float32)
    positions = np.broadcast_to(np.arange(30, dtype=np.int32), ids.shape)
    batch = Batch(ids, np.roll(ids, -1, 1), supervised, mask.astype(np.int32), positions)
    batch = jax.tree.map(jnp.asarray, batch)

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        sums = batch_loss(split.merge(params, frozen), batch, router_aux_loss=WEIGHT)
        return sums["loss"] / sums["weight"]

    value, grads = ours(params)
    assert float(value) == pytest.approx((loss + WEIGHT * balance).item(), rel=1e-5)
    compare_gradients(split, grads, model)


def test_a_run_balances_its_experts(tmp_path):
    """Two of four experts per token: 2 is balanced. With microbatches, and without the loss no metric."""
    model = make_model(tmp_path / "model", model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    config = run_config(
        model, write_chats(tmp_path / "chats.jsonl"), tmp_path / "run", lora=None, training__router_aux_loss=1.0,
        training__num_microbatches=2, training__batch_size=16, training__max_steps=20, optimizer__learning_rate=2e-3,
    )  # fmt: skip
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    balance = [row["router_aux_loss"] for row in rows if "router_aux_loss" in row]
    assert len(balance) == 20
    assert 2 < np.mean(balance[-5:]) < np.mean(balance[:5]) - 0.02


def test_a_model_without_experts_is_refused(tmp_path):
    data = write_chats(tmp_path / "chats.jsonl")
    model = make_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"training.router_aux_loss: .* has no experts; leave it at 0"):
        train(run_config(model, data, tmp_path / "run", training__batch_size=8, training__router_aux_loss=0.01))
    assert not (tmp_path / "run").exists()
