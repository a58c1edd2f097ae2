"""Chunked attention: backends against a dense reference, devices, decoding, and Llama 4 in transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import assert_alike, on_mesh, random_inputs

from sft_jax.models.architecture import Norm, Temperature
from sft_jax.models.attention.backend import XLA, Backend, attention
from sft_jax.models.attention.segments import chunk_segments


def by_chunks(segments, chunk):
    """Each chunk of each document as a document of its own."""
    apart = np.zeros(segments.shape, np.int32)
    for row, ids in zip(apart, np.asarray(segments), strict=True):
        for segment in np.unique(ids[ids > 0]):
            (places,) = np.nonzero(ids == segment)
            row[places] = 100 * segment + np.arange(len(places)) // chunk
    return jnp.asarray(apart)


@pytest.mark.smoke
def test_segments_of_chunks():
    """Distinct where chunks are, also for documents whose ids return; padding stays padding."""
    segments = random_inputs([[11, 19], [3, 20], [1, 1, 28]], 1, 1, 2)[3]
    found, expected = np.asarray(chunk_segments(segments, 5)), np.asarray(by_chunks(segments, 5))
    assert np.array_equal(found == 0, expected == 0)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours[:, None] == ours[None], theirs[:, None] == theirs[None])


def compare(rows, chunk, backend=XLA, window=None, heads=(8, 2, 4)):
    """Values and gradients of the backend on documents, and of the dense reference on their chunks."""
    q, k, v, segments = random_inputs(rows, *heads)
    apart = by_chunks(segments, chunk)

    def ours(q, k, v, ids, **options):
        return attention(q, k, v, segments, chunk=chunk, backend=backend, **options)

    assert_alike(ours, q, k, v, apart, window=window)


@pytest.mark.smoke
@pytest.mark.parametrize(("chunk", "window"), [(5, None), (9, 4), (4, 9), (28, None), (64, None)])
def test_xla_matches_dense(chunk, window):
    compare([[11, 19], [3, 20], [1, 1, 28]], chunk, Backend("xla", 8), window)


@pytest.mark.smoke
def test_splash_matches_dense():
    compare([[100, 156]], 60, Backend("splash", 128, interpret=True), heads=(2, 2, 64))


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", [(2, 1, 1, 2), (1, 1, 2, 2)])
def test_chunks_on_a_mesh(sizes):
    with on_mesh(sizes):
        compare([[13, 35], [48], [20, 20], [1, 46]], 10, Backend("xla", 4))


@pytest.mark.parametrize(("layer", "lengths"), [(0, (23, 17)), (1, (23,))])
def test_llama4(layer, lengths):
    """A rotated layer with chunks and norms, and one with a temperature that is not rotated.

    One document for the temperature, because transformers counts its positions over all documents, and we in each.
    """
    from attention_kit import assert_equal, reference
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextAttention, Llama4TextRotaryEmbedding

    from sft_jax.models.families import standard

    config = Llama4TextConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=2,
        attention_chunk_size=6,
        no_rope_layers=[1, 0],
        floor_scale=4,
        attn_scale=0.3,
    )
    rope = standard.rope(config.rope_parameters, config.max_position_embeddings, 8, interleaved=True)
    norm = Norm(config.rms_norm_eps, has_weight=False)
    rotated = {"rope": rope, "qk_norm": norm, "qk_norm_last": True, "chunk": 6}
    not_rotated = {"rope": None, "temperature": Temperature(0.3, 4, offset=1)}
    spec = standard.attention(config, **(rotated, not_rotated)[layer])
    mask = (create_chunked_causal_mask, create_causal_mask)[layer]
    rotary = Llama4TextRotaryEmbedding(config)
    module = reference(lambda: Llama4TextAttention(config, layer), config, mask, rotary, lengths)
    assert_equal(spec, 24, module, {rope: 8}, lengths)
