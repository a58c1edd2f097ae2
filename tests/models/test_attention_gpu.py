"""Kernels for GPUs as far as a CPU can tell: the masks they are given, and the check that stands before a run.

The kernels themselves do not run here. Each hands its mask to a function of its library that has a plain form too, and
that form is compared with the dense reference.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from test_attention import ROWS, assert_alike, dense_attention, device, llama, random_inputs

from sft_jax.errors import UserError
from sft_jax.models.attention.backend import CHECKED, Backend, _in_parts, check_backend, choose_backend
from sft_jax.models.attention.cudnn import cudnn_attention
from sft_jax.models.attention.parity import TOLERANCE, WINDOW, check_parity
from sft_jax.models.attention.triton import triton_attention
from sft_jax.sharding import make_mesh


@pytest.mark.parametrize("window", [None, 1, 5])
def test_cudnn_is_given_the_right_mask(window):
    assert_alike(partial(cudnn_attention, implementation="xla"), *random_inputs(ROWS, 6, 2, 6), window=window)


def test_a_correct_kernel_passes_the_check():
    """In 16 bits, with and without a window; and well below what it allows."""
    worst = check_parity("dense", _rounded(dense_attention), group=2, head_dim=64, windows=[None, WINDOW])
    assert 0.001 < worst < TOLERANCE / 2


def _rounded(compute):
    """As a kernel in 16 bits: sums in float32, what comes out rounded."""

    def rounded(q, k, v, *others):
        return compute(*(x.astype(jnp.float32) for x in (q, k, v)), *others).astype(q.dtype)

    return rounded


def _without_segments(q, k, v, segments, window, softcap):
    return dense_attention(q, k, v, jnp.minimum(segments, 1), window, softcap)


def _one_slot_late(q, k, v, segments, window, softcap):
    """Each document but the first begins one position late, for keys of the position before it."""
    return dense_attention(q, k, v, jnp.concatenate([segments[:, :1], segments[:, :-1]], axis=1), window, softcap)


def _wide_window(q, k, v, segments, window, softcap):
    return dense_attention(q, k, v, segments, None if window is None else window + 1, softcap)


def _without_a_gradient(q, k, v, segments, window, softcap):
    return dense_attention(q, k, jax.lax.stop_gradient(v), segments, window, softcap)


def _not_a_number(q, k, v, segments, window, softcap):
    return dense_attention(q, k, v, segments, window, softcap) * jnp.where(segments == 2, jnp.nan, 1)[..., None, None]


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (_without_segments, "its output differs"),
        (_one_slot_late, "its output differs"),
        (_wide_window, "its output differs .* with a window"),
        (_without_a_gradient, "dv differs"),
        (_not_a_number, "its output differs .* by nan"),
    ],
)
def test_a_wrong_kernel_is_found_out(wrong, what):
    with pytest.raises(UserError, match=rf"model\.attention: this is wrong on cpu: {what}.*model\.attention=xla"):
        check_parity("this", _rounded(wrong), group=2, head_dim=64, windows=[None, WINDOW])


def test_a_kernel_that_does_not_run_is_named():
    def refuses(*inputs):
        raise NotImplementedError("needs another card\nand more")

    with pytest.raises(UserError, match=r"this does not run here: needs another card; use model\.attention=xla"):
        check_parity("this", refuses, group=2, head_dim=64)


def test_which_backends_are_checked(monkeypatch):
    """Those for GPUs, with the grouping, head dimension and windows of the model; the others compare nothing."""
    called = []
    monkeypatch.setattr(
        "sft_jax.models.attention.backend.check_parity", lambda *one, fallback: called.append((*one, fallback))
    )
    for name in ("splash", "triton", "cudnn", "xla"):
        check_backend(Backend(name, 128), make_mesh(), llama(head_dim=128))
    assert [call[0] for call in called] == list(CHECKED)
    assert all(call[2:5] == (2, 128, [None]) for call in called)
    assert [call[6] for call in called] == ["cudnn", "xla"]


def test_what_is_checked_is_what_parts_of_rows_need():
    """On a mesh with three parts a row, each third of the queries by itself."""
    compute = partial(_in_parts, Backend("xla", 64), 3)
    assert check_parity("parts", _rounded(compute), group=2, head_dim=64, windows=[None, WINDOW]) < TOLERANCE / 2


def test_triton_is_lowered_for_gpus():
    """Three kernels, forward and for the gradients; what is only there for others is refused by the lowering."""
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    k, segments = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def run(q, k, v, segments):
        out, pullback = jax.vjp(lambda *given: triton_attention(*given, segments, 100, 2.0), q, k, v)
        return pullback(out)

    lowered = jax.jit(run).trace(q, k, k, segments).lower(lowering_platforms=("cuda",))
    for kernel in ("forward", "queries", "keys"):
        assert lowered.as_text().count(f'name = "attention_{kernel}"') == 1


@pytest.mark.parametrize(
    ("mesh", "dtype", "row_length", "head_dim", "message"),
    [
        (device("cpu"), "bfloat16", 2048, 64, "needs an NVIDIA GPU"),
        (device("gpu", "7.5"), "bfloat16", 2048, 64, "needs compute capability 8.0"),
        (device("gpu", "gfx942"), "bfloat16", 2048, 64, "needs compute capability 8.0"),
        (device("gpu"), "float32", 2048, 64, r"needs bfloat16 \(model.dtype\)"),
        (
            device("gpu"),
            "bfloat16",
            2000,
            64,
            r"needs sequences of a multiple of 64 tokens, not 2000 \(data",
        ),
        (device("gpu"), "bfloat16", 2048, 96, "needs a head dimension of 16, 32, 64 or 128, not 96"),
        (device("gpu", sequence=2), "bfloat16", 2048, 64, "needs whole sequences, and mesh.sequence splits them"),
    ],
)
def test_triton_is_refused(mesh, dtype, row_length, head_dim, message):
    with pytest.raises(UserError, match=f"model.attention: triton {message}"):
        choose_backend("triton", mesh, llama(head_dim), dtype, row_length)
