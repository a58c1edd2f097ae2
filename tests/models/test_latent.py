"""Latent attention: values of another head dimension in every backend, devices, adapters, DeepSeek in transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_attention import assert_alike, device, on_mesh, random_inputs

from sft_jax.adapters.lora import LoRA
from sft_jax.models.architecture import Norm, Rope
from sft_jax.models.attention.backend import XLA, Backend, _compute, _Scores, attention, choose_backend
from sft_jax.models.attention.latent import LatentAttentionSpec
from sft_jax.models.attention.splash import splash_attention
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer
from sft_jax.models.rope import sin_cos
from sft_jax.models.work import Work
from sft_jax.sharding import make_mesh

SPEC = LatentAttentionSpec(
    num_heads=4,
    num_kv_heads=4,
    head_dim=10,
    v_head_dim=6,
    rope=Rope(1e4, dims=4, interleaved=True),
    kv_rank=8,
    q_rank=12,
    norm=Norm(1e-6),
)


def inputs_with_values(rows, heads, kv_heads, head_dim, v_head_dim):
    q, k, v, segments = random_inputs(rows, heads, kv_heads, max(head_dim, v_head_dim))
    return q[..., :head_dim], k[..., :head_dim], v[..., :v_head_dim], segments


@pytest.mark.smoke
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(6, 4), (4, 6)])
def test_xla_matches_dense(head_dim, v_head_dim):
    inputs = inputs_with_values([[11, 19], [3, 20]], 4, 2, head_dim, v_head_dim)
    assert_alike(partial(attention, backend=Backend("xla", 7)), *inputs, window=9)
    with on_mesh((1, 1, 2, 2)):
        assert_alike(partial(attention, backend=Backend("xla", 7)), *inputs)


@pytest.mark.smoke
def test_splash_matches_dense():
    inputs = inputs_with_values([[100, 156]], 2, 2, 96, 64)
    assert_alike(partial(splash_attention, block=128, interpret=True), *inputs)


@pytest.mark.smoke
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(16, 8), (8, 16)])
def test_padded_values_match_dense(head_dim, v_head_dim, monkeypatch):
    """On a kernel that asks for one head dimension; it is given zeros."""
    from sft_jax.models.attention import triton

    kernel = partial(triton.triton_attention, interpret=True)
    monkeypatch.setattr(triton, "triton_attention", kernel)

    def ours(q, k, v, segments):
        return _compute(Backend("triton", 64), _Scores(None, None), q, k, v, segments)

    assert_alike(ours, *inputs_with_values([[70, 58]], 2, 1, head_dim, v_head_dim))


@pytest.mark.smoke
def test_choice():
    """A kernel with one head dimension is asked for the larger one."""
    small = [LatentAttentionSpec(**{**vars(SPEC), "head_dim": 96, "v_head_dim": 128})]
    assert choose_backend("auto", device("gpu"), small, "bfloat16", 2048).name == "triton"
    large = [LatentAttentionSpec(**{**vars(SPEC), "head_dim": 192, "v_head_dim": 128})]
    assert choose_backend("auto", device("tpu"), large, "bfloat16", 2048).name == "splash"
    assert "needs a head dimension of 16, 32, 64 or 128, not 192" in str(
        choose_backend("auto", device("gpu"), large, "bfloat16", 2048)
    )


def make(spec, dim=24):
    return spec.module(dim, Initializer(jax.random.key(0), 0.3), ())


def run(module, x, positions, segment_ids=None, **more):
    angles = {SPEC.rope: sin_cos(positions, SPEC.rope, 4)}
    return module(x, Context(positions, segment_ids, angles, XLA, **more))


@pytest.mark.smoke
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 1, 2)])
def test_decoding_equals_the_full_pass(adapted, sizes):
    """With projections on the other side, their adapters too; and the cache holds latents only."""
    module, length = make(SPEC), 9
    if adapted:
        LoRA(2, 3.0).attach(module.kv_b_proj)
        for name in ("lora_a", "lora_b"):
            parameter = getattr(module.kv_b_proj, name)
            parameter[...] = 0.3 * jax.random.normal(jax.random.key(len(name)), parameter.shape)
    x = jax.random.normal(jax.random.key(1), (2, length, 24))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    graph, params = nnx.split(module)

    @jax.jit
    def full(params, x):
        return run(nnx.merge(graph, params), x, positions, jnp.ones_like(positions))

    @jax.jit
    def step(params, x, positions, cache):
        return run(nnx.merge(graph, params), x, positions, weight_stationary=True, cache=cache)

    with jax.set_mesh(make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])):
        expected, entries = full(params, x)
        assert entries.entries.shape == (2, length, 8 + 4)
        cache = jax.tree.map(lambda x: jnp.zeros_like(x)[None], entries).resize(length + 1)
        for t in range(length):
            layer = jax.tree.map(lambda x: x[0], cache)
            out, new = step(params, x[:, t : t + 1], positions[:, t : t + 1], layer)
            np.testing.assert_allclose(out[:, 0], expected[:, t], atol=1e-5, rtol=1e-5)
            cache = cache.update(jax.tree.map(lambda x: x[None], new), positions[:, t])
    np.testing.assert_allclose(cache.entries[0, :, :length], entries.entries, atol=1e-6)


@pytest.mark.smoke
def test_flops_of_mixing():
    """Scores have ten channels, values six; half of the pairs, three times for both passes."""
    assert make(SPEC).mixing_flops(Work(tokens=5.0, targets=5.0, squares=25.0)) == 3 * 25 * 4 * (10 + 6)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None, "rope_interleave": False, "v_head_dim": 12},
        {
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
                "original_max_position_embeddings": 16,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        },
    ],
    ids=["plain", "yarn"],
)
def test_deepseek_v3(changes):
    from attention_kit import assert_equal, reference
    from transformers.masking_utils import create_causal_mask
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    from sft_jax.models.families.deepseek_v3 import attention as read

    sizes = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "q_lora_rank": 12, "kv_lora_rank": 8}
    config = DeepseekV3Config(
        **{"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
        | sizes
        | changes
    )
    spec = read(config)
    rotary = DeepseekV3RotaryEmbedding(config)
    module = reference(lambda: DeepseekV3Attention(config, 0), config, create_causal_mask, rotary)
    assert_equal(spec, 24, module, {spec.rope: 4})
