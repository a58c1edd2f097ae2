"""Gradients of weights that devices sum and scatter in stages: the sum on any mesh, and what a TPU's program has."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.models.weight_gradient import _product, _stages, _Sums, scattered, weight_gradient
from sft_jax.sharding import make_mesh

B, T, IN, N, H = 8, 16, 24, 5, 8


def inputs():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, IN), (B, T, N, H))]


@pytest.mark.parametrize("piece", [2**25, 1000, 1])  # bytes: at most one piece, some, and one for each row
@pytest.mark.parametrize("embed", [0, 1])
@pytest.mark.parametrize("sizes", [(2, 4, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (2, 2, 2, 1), (1, 2, 1, 4)])
def test_the_sum_is_that_of_one_device_and_each_keeps_its_shard(sizes, embed, piece, monkeypatch):
    monkeypatch.setattr("sft_jax.models.weight_gradient._PIECE", piece)
    x, dy = inputs()
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        sums = _Sums.of((B, T), (IN, N * H)[embed])
        assert sums is not None
        multiply = partial(_product, num_in=1, num_out=2, compute=None)
        out = jax.jit(partial(scattered, multiply, sums, embed))(x, dy)
    np.testing.assert_allclose(out, np.einsum("btm,btnh->mnh", x, dy).reshape(IN, N * H), rtol=1e-4, atol=1e-4)
    shards = sizes[1] * sizes[2]
    expected = (IN // shards, N * H) if embed == 0 else (IN, N * H // shards)
    assert {shard.data.shape for shard in out.addressable_shards} == {expected}


def test_other_platforms_compute_the_same_by_themselves():
    x, dy = inputs()
    expected = np.einsum("btm,btnh->mnh", x, dy).reshape(IN, N * H)
    np.testing.assert_allclose(weight_gradient(x, dy, 1, 2, 0), expected, rtol=1e-5, atol=1e-5)
    with jax.set_mesh(make_mesh(1, 8, 1, 1)):
        lowered = jax.jit(lambda x, dy: weight_gradient(x, dy, 1, 2, 0)).lower(x, dy)
        assert "reduce_scatter" not in lowered.as_text()
        np.testing.assert_allclose(lowered.compile()(x, dy), expected, rtol=1e-4, atol=1e-4)
        assert _Sums.of((B, T), 21) is None  # a model dimension that no device shards
        assert _Sums.of((3, 5), IN) is None  # positions that all devices share


def test_the_stages_of_the_docstring():
    assert _stages(8) == [[[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]]
    assert _stages(1) == []
    assert [[len(groups[0]) for groups in _stages(num)] for num in (2, 3, 6, 12, 16, 32)] == [
        *([2], [3], [2, 3], [4, 3], [4, 4], [4, 4, 2])
    ]


_FOR_TPU = """
import jax, jax.numpy as jnp
from sft_jax.models.weight_gradient import weight_gradient
from sft_jax.planning.topology import devices_of, parse_topology
from sft_jax.sharding import make_mesh
mesh = make_mesh(devices=devices_of(parse_topology("v5e:4x4")))
batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
shapes = [jax.ShapeDtypeStruct((16, 128, size), jnp.bfloat16, sharding=batch) for size in (512, 1024)]
gradient = lambda x, dy: weight_gradient(x, dy, 1, 1, 0).astype(jnp.bfloat16)
with jax.set_mesh(mesh):
    print(jax.jit(gradient).lower(*shapes).compile().as_text())
"""


def test_a_tpu_scatters_in_float32():
    """Sixteen devices at once would sum whole gradients in bfloat16; see the module."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}  # the TPU compiler does not know our flags
    done = subprocess.run(
        [sys.executable, "-c", _FOR_TPU], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"= (f32\[[\d,]+\])\S* reduce-scatter\(", done.stdout) == ["f32[128,1024]", "f32[32,1024]"]
    assert "all-reduce(" not in done.stdout
