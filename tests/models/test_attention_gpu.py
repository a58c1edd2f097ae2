"""Kernels for GPUs as far as a CPU can tell: the masks they are given, and the check that stands before a run.

The kernels themselves do not run here. Each hands its mask to a function of its library that has a plain form too, and
that form is compared with the dense reference.
"""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from test_attention import ROWS, assert_alike, dense_attention, device, llama, random_inputs

from sft_jax.config import Config, DataConfig, ModelConfig, SourceConfig, TrainingConfig
from sft_jax.errors import UserError
from sft_jax.models.attention.backend import CHECKED, Backend, _in_parts, check_backend, choose_backend
from sft_jax.models.attention.cudnn import cudnn_attention
from sft_jax.models.attention.parity import TOLERANCE, WINDOW, Refused, check_compiles, check_parity
from sft_jax.models.attention.triton import triton_attention
from sft_jax.run.announce import Announcer
from sft_jax.run.attention import settle_attention
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


def test_a_kernel_is_compiled_at_its_real_size():
    """All heads of the layer, the run's sequence length, and the gradient; nothing runs."""
    shapes = []

    def compute(q, k, v, segments, window, softcap):
        shapes.append((q.shape, k.shape, segments.shape, window, softcap))
        return _rounded(dense_attention)(q, k, v, segments, window, softcap)

    spec = dataclasses.replace(llama(head_dim=64)[0], window=100)
    check_compiles("this", compute, spec, 384, "xla")
    assert shapes == [((1, 384, 4, 64), (1, 384, 2, 64), (1, 384), 100, None)]


def test_which_backends_are_checked(monkeypatch):
    """Those for GPUs, with the grouping, head dimension and windows of the model; the others compare nothing."""
    called, compiled = [], []
    monkeypatch.setattr(
        "sft_jax.models.attention.backend.check_parity", lambda *one, fallback: called.append((*one, fallback))
    )
    monkeypatch.setattr(
        "sft_jax.models.attention.backend.check_compiles", lambda name, compute, *rest: compiled.append((name, *rest))
    )
    for name in ("splash", "triton", "cudnn", "xla"):
        check_backend(Backend(name, 128), make_mesh(), llama(head_dim=128), 4096)
    assert [call[0] for call in called] == list(CHECKED)
    assert compiled == [("triton", *llama(128), 4096, "cudnn"), ("cudnn", *llama(128), 4096, "xla")]
    assert all(call[2:5] == (2, 128, [None]) for call in called)
    assert [call[6] for call in called] == ["cudnn", "xla"]


def test_what_is_checked_is_what_parts_of_rows_need():
    """On a mesh with three parts a row, each third of the queries by itself."""
    compute = partial(_in_parts, Backend("xla", 64), 3)
    assert check_parity("parts", _rounded(compute), group=2, head_dim=64, windows=[None, WINDOW]) < TOLERANCE / 2


def _gpu():
    """A mesh of a GPU whose programs are compiled for a CPU, where the kernels of GPUs are refused."""
    return SimpleNamespace(**vars(device("gpu")), local_devices=jax.devices("cpu")[:1])


def _config(attention):
    return Config(
        model=ModelConfig(path="none", attention=attention),
        data=DataConfig(train=[SourceConfig(path="none")], max_length=256),
        training=TrainingConfig(output_dir="none"),
    )


def _arch(**changes):
    return SimpleNamespace(attention_specs=[dataclasses.replace(llama()[0], **changes)])


def test_auto_takes_the_next_backend_where_one_refuses(capsys, monkeypatch):
    """Each refusal is said in one line with its reason; the config that is saved does not change."""
    asked = _config("auto")
    settled = settle_attention(asked, _arch(), _gpu(), Announcer(enabled=True))
    assert (settled.model.attention, asked.model.attention) == ("xla", "auto")
    triton, cudnn = capsys.readouterr().err.splitlines()
    assert (
        "attention  triton does not run here, so auto takes the next backend: Only interpret mode is supported on CPU"
        in triton
    )
    assert "attention  cudnn does not run here, so auto takes the next backend: cuDNN is not detected" in cudnn

    def compiles_short_ones_only(name, compute, spec, length, fallback):
        raise Refused(name, RuntimeError(f"no engine for {length} tokens"), fallback)

    monkeypatch.setattr("sft_jax.models.attention.backend.check_parity", lambda *_, **__: 0.0)
    monkeypatch.setattr("sft_jax.models.attention.backend.check_compiles", compiles_short_ones_only)
    assert settle_attention(_config("auto"), _arch(), _gpu(), Announcer(enabled=True)).model.attention == "xla"
    assert (
        "cudnn does not run here, so auto takes the next backend: no engine for 256 tokens" in capsys.readouterr().err
    )


def test_auto_keeps_what_runs_and_takes_only_what_has_the_mask(capsys, monkeypatch):
    """A backend that has no soft cap is not the next one; and a backend that runs is kept, as is the config."""

    def only_triton_refuses(name, *_, fallback):
        if name == "triton":
            raise Refused(name, RuntimeError("out of shared memory"), fallback)

    monkeypatch.setattr("sft_jax.models.attention.backend.check_parity", only_triton_refuses)
    monkeypatch.setattr("sft_jax.models.attention.backend.check_compiles", lambda *_: None)
    say = Announcer(enabled=True)
    assert settle_attention(_config("auto"), _arch(), _gpu(), say).model.attention == "cudnn"
    assert settle_attention(_config("auto"), _arch(softcap=2.0), _gpu(), say).model.attention == "xla"
    assert (
        capsys.readouterr().err.count("triton does not run here, so auto takes the next backend: out of shared memory")
        == 2
    )
    asked = _config("cudnn")
    assert settle_attention(asked, _arch(), _gpu(), say) is asked
    with pytest.raises(UserError, match=r"model\.attention: cudnn has no soft cap"):
        settle_attention(asked, _arch(softcap=2.0), _gpu(), say)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("name", "reason"), [("triton", "Only interpret mode"), ("cudnn", "cuDNN is not detected")])
def test_a_backend_that_was_asked_for_raises(name, reason):
    with pytest.raises(Refused, match=f"model.attention: {name} does not run here: {reason}"):
        settle_attention(_config(name), _arch(), _gpu(), Announcer(enabled=True))


def test_auto_does_not_skip_a_wrong_result(monkeypatch):
    """A kernel that computes something else is a fault of its own, not a refusal."""
    monkeypatch.setattr(
        "sft_jax.models.attention.triton.triton_attention",
        lambda q, k, v, segments, window, softcap, scale, sinks: _rounded(_without_segments)(
            q, k, v, segments, window, softcap
        ),
    )
    with pytest.raises(UserError, match=r"model\.attention: triton is wrong on cpu: its output differs"):
        settle_attention(_config("auto"), _arch(), _gpu(), Announcer(enabled=True))


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
