"""Attention sinks: every backend against a dense reference, devices, decoding, and GPT-OSS in transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import ROWS, dense_attention, device, on_mesh, random_inputs

from sft_jax.errors import UserError
from sft_jax.models.attention.backend import Backend, attention, choose_backend
from sft_jax.models.attention.spec import AttentionSpec
from sft_jax.models.attention.splash import splash_attention
from sft_jax.models.attention.triton import triton_attention
from sft_jax.models.attention.xla import xla_attention


def assert_alike(ours, q, k, v, segments, atol=5e-6, **options):
    """Equal outputs and gradients, also those of the sinks; padding is left out."""
    real = (segments > 0)[..., None, None]
    sinks = jnp.asarray(np.random.default_rng(1).normal(size=q.shape[2]), jnp.float32)

    def value_and_grads(f):
        def total(q, k, v, sinks):
            out = f(q, k, v, segments, sinks=sinks, **options).astype(jnp.float32)
            return jnp.sum(jnp.where(real, jnp.sin(out), 0.0)), jnp.where(real, out, 0.0)

        return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)

    (_, out), grads = value_and_grads(ours)
    (_, expected), expected_grads = value_and_grads(dense_attention)
    np.testing.assert_allclose(out, expected, atol=atol, rtol=1e-5)
    for one, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=4 * atol, rtol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (1, 2.0)])
@pytest.mark.parametrize("block", [7, 64])
def test_xla_matches_dense(window, softcap, block):
    assert_alike(partial(xla_attention, block=block), *random_inputs(ROWS, 6, 2, 6), window=window, softcap=softcap)


@pytest.mark.smoke
def test_triton_matches_dense():
    """The Pallas kernels, interpreted."""
    inputs = random_inputs([[70, 1, 57]], 4, 2, 16)
    assert_alike(partial(triton_attention, interpret=True), *inputs, window=40, softcap=2.0)


@pytest.mark.smoke
def test_splash_matches_dense():
    """The Pallas kernel, interpreted."""
    inputs = random_inputs([[100, 156], [3, 130, 90]], 4, 2, 64)
    assert_alike(partial(splash_attention, block=128, interpret=True), *inputs, window=40, softcap=3.0)


@pytest.mark.parametrize(
    "ours",
    [
        xla_attention,
        partial(triton_attention, interpret=True),
        partial(splash_attention, block=128, interpret=True),
    ],
)
def test_sixteen_bits(ours):
    """The sinks stay in float32, and so does their gradient."""
    q, k, v, segments = random_inputs([[70, 58]], 2, 1, 16)
    sinks = jnp.linspace(-1.0, 1.0, 2)

    def gradient(dtype):
        inputs = [x.astype(dtype) for x in (q, k, v)]
        return jax.jit(jax.grad(lambda sinks: jnp.sum(ours(*inputs, segments, sinks=sinks), dtype=jnp.float32)))(sinks)

    found = gradient(jnp.bfloat16)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, gradient(jnp.float32), rtol=0.05, atol=0.05)


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", [(2, 1, 1, 2), (1, 1, 1, 4), (1, 1, 4, 1), (1, 1, 2, 2)])
@pytest.mark.parametrize("window", [None, 9])
def test_sinks_on_a_mesh(sizes, window):
    """Heads, sequences or both over devices; sinks go with the heads, and their gradient is summed."""
    inputs = random_inputs([[13, 35], [48], [20, 20], [1, 46]], 8, 2, 4)
    with on_mesh(sizes):
        assert_alike(partial(attention, backend=Backend("xla", 4)), *inputs, window=window)


def test_splash_on_a_mesh():
    with on_mesh((1, 1, 2, 2)):
        kernel = partial(attention, backend=Backend("splash", 128, interpret=True))
        assert_alike(kernel, *random_inputs([[3, 200, 309]], 2, 2, 64))


@pytest.mark.smoke
def test_choice():
    specs = [AttentionSpec(4, 2, 64, sinks=True)]
    assert choose_backend("auto", device("tpu"), specs, "bfloat16", 2048).name == "splash"
    assert choose_backend("auto", device("gpu"), specs, "bfloat16", 2048).name == "triton"
    chosen = choose_backend("auto", device("gpu", sequence=4), specs, "bfloat16", 2048)
    assert chosen.name == "xla"
    assert "cudnn has no attention sinks" in str(chosen)
    with pytest.raises(UserError, match=r"cudnn has no attention sinks; use one of auto, triton, xla"):
        choose_backend("cudnn", device("gpu"), specs, "bfloat16", 2048)


@pytest.mark.parametrize("layer", [0, 1])
def test_gpt_oss(layer):
    """A layer with a sliding window, and one without."""
    from attention_kit import assert_equal, reference
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    from sft_jax.models.families import standard

    config = GptOssConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=7, num_hidden_layers=2
    )
    spec = standard.attention(config, qkv_bias=True, o_bias=True, sinks=True, window=(7, None)[layer])
    mask = (create_sliding_window_causal_mask, create_causal_mask)[layer]
    expected = reference(lambda: GptOssAttention(config, layer), config, mask, GptOssRotaryEmbedding(config))
    assert_equal(spec, 24, expected, {spec.rope: 8})
