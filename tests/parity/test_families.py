"""What each family has to do besides giving the logits of transformers: pack, decode with a cache, take an adapter."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import FAMILIES, compare_gradients, reference
from kit import load_model, logits

import sft_jax.models.families
from sft_jax.config import LoraConfig
from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.ties import architecture_of
from sft_jax.models.decoder import resize_cache, update_cache
from sft_jax.models.families import families
from sft_jax.sharding import make_mesh
from sft_jax.training.losses import batch_loss
from sft_jax.training.weights import build, load_weights
from sft_jax.typing import Batch

ONE_EACH = list({kind: name for name, (kind, _) in FAMILIES.items()}.values())  # the last row of each family
# By default those with the most of their own; all of them where models or their families change.
ALWAYS = ("gemma3_text", "mixtral")
EACH = pytest.mark.parametrize(
    "name",
    [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.drill("sft_jax/models")) for name in ONE_EACH],
)


def test_every_family_has_a_row(tmp_path):
    found = set()
    for name in ONE_EACH:
        reference(name, tmp_path / name)
        found.add(read_architecture(tmp_path / name).family)
    assert found == families().keys()
    table = (Path(sft_jax.models.families.__file__).parent / "MODELS.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert set(named) - {"model_type"} == families().keys()


@EACH
def test_packed_sequences_and_cache(name, tmp_path):
    """Documents packed into a sequence give the logits that each gives alone; so do a prefix and tokens one by one."""
    reference(name, tmp_path)
    model, _, _ = load_model(tmp_path)
    documents = [np.random.default_rng(i).integers(0, 131, size).tolist() for i, size in enumerate((19, 5, 24))]
    alone = [logits(model, np.asarray([one]))[0] for one in documents]
    ids = jnp.asarray([[token for one in documents for token in one]])
    segments = jnp.asarray([[i + 1 for i, one in enumerate(documents) for _ in one]])
    positions = jnp.asarray([[at for one in documents for at in range(len(one))]])
    packed = jax.jit(lambda *given: model.logits(model(*given)))(ids, segments, positions)
    np.testing.assert_allclose(packed[0], np.concatenate(alone), atol=1e-5, rtol=1e-5)

    prefix = 20
    row = jnp.asarray([documents[2]])
    where = jnp.arange(prefix)[None]
    _, cache = model.prefill(row[:, :prefix], jnp.ones_like(where), where)
    cache = resize_cache(cache, 32)
    decode = jax.jit(lambda token, at, cache: model.decode(token[:, None], at[:, None], cache))
    for at in range(prefix, 24):
        hidden, new = decode(row[:, at], jnp.asarray([at]), cache)
        cache = update_cache(cache, new, jnp.asarray([at]))
        np.testing.assert_allclose(model.logits(hidden)[0, 0], alone[2][at], atol=1e-5, rtol=1e-5)


@EACH
def test_gradients_are_those_of_transformers(name, tmp_path):
    """The norm of the gradient of each tensor, and an adapter on every linear layer that does nothing at first."""
    model = reference(name, tmp_path)
    ids = np.random.default_rng(0).integers(1, 131, (1, 40))
    ids[ids == model.config.get_text_config().pad_token_id] = 130  # torch gives the embedding of padding no gradient
    torch.nn.functional.cross_entropy(
        model(torch.tensor(ids[:, :-1])).logits[0], torch.tensor(ids[0, 1:]), reduction="sum"
    ).backward()
    mesh, reader = make_mesh(devices=jax.devices()[:1]), TensorReader(tmp_path)
    arch = architecture_of(tmp_path, reader)
    split = build(arch, mesh, None, "float32")
    params, frozen = load_weights(split, reader)
    row = jnp.asarray(ids, jnp.int32)
    ones = jnp.ones((1, 39), jnp.int32)
    batch = Batch(row[:, :-1], row[:, 1:], ones.astype(jnp.float32), ones, jnp.arange(39, dtype=jnp.int32)[None])
    loss, grads = jax.jit(jax.value_and_grad(lambda one: batch_loss(split.merge(one, frozen), batch)["loss"]))(params)
    compare_gradients(split, grads, model)

    lora = build(arch, mesh, LoraConfig(rank=2), "float32")
    adapter, frozen = load_weights(lora, reader, LoraConfig(rank=2))
    assert float(batch_loss(lora.merge(adapter, frozen), batch)["loss"]) == pytest.approx(float(loss), rel=1e-6)
