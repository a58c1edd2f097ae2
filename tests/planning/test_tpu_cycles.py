"""Estimates of programs that the real TPU compiler makes, with FLOPs and loops known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.models.attention.splash import splash_attention
from sft_jax.planning.chips import CHIPS
from sft_jax.planning.cycles import Estimate, estimate
from sft_jax.planning.hlo import Program, parse
from sft_jax.planning.program_text import compile_with_text
from sft_jax.planning.topology import devices_of, parse_topology

DIM, LENGTH, LAYERS = 512, 1024, 6


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    """The TPU compiler refuses flags of the CPU's."""
    jax.devices()  # reads the flags for the CPU
    monkeypatch.setenv("XLA_FLAGS", "")


def program_of(function, *shapes, topology="v5e:1", specs=None) -> Program:
    mesh = Mesh(np.asarray(devices_of(parse_topology(topology))), ("x",))
    specs = specs or [PartitionSpec()] * len(shapes)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, specs, strict=True)
    ]
    with jax.default_matmul_precision("default"):  # as in training
        _, text = compile_with_text(jax.jit(function).lower(*arguments), "tpu")
    assert text is not None
    return parse(text)


def estimate_of(program: Program, chip: str = "v5e", trips: float = 1.0) -> Estimate:
    found = estimate(program, CHIPS[chip], lambda _: trips)
    assert found is not None, "no estimates in the text"
    return found


def layers(weights, x):
    """A product and an activation in each layer."""
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].astype(jnp.float32).sum()


WEIGHTS = ((LAYERS, DIM, DIM), jnp.bfloat16)
INPUTS = ((LENGTH, DIM), jnp.bfloat16)


@pytest.mark.parametrize("topology", ["v5e:1", "v5p:2x2x1", "v6e:2x2"])
def test_products_of_a_scan(topology):
    """Forward and two products backward for each layer; v6e too, whose text ``as_text`` does not always give."""
    chip = topology.split(":")[0]
    found = estimate_of(program_of(jax.grad(layers, argnums=(0, 1)), WEIGHTS, INPUTS, topology=topology), chip)
    flops = 3 * LAYERS * 2 * LENGTH * DIM * DIM
    at_peak = flops / CHIPS[chip].flops_per_cycle
    assert found.at_peak("products") == pytest.approx(at_peak, rel=1e-6)
    assert at_peak < found.of_kind("products") < found.cycles < 20 * at_peak
    assert found.trips == {}
    products = [place for place in found.places if place.kind == "products"]
    assert {place.times for place in products} <= {1, LAYERS, LAYERS - 1}
    assert {place.part for place in products} == {"forward", "backward"}
    assert all("test_tpu_cycles.py:" in place.source for place in products)


def test_products_on_several_chips_are_those_of_one():
    """Weights sharded over four chips are all-gathered; each chip multiplies its own tokens."""
    specs = [PartitionSpec(None, None, "x"), PartitionSpec("x")]
    found = estimate_of(program_of(layers, WEIGHTS, INPUTS, topology="v5e:2x2", specs=specs))
    flops = LAYERS * 2 * LENGTH / 4 * DIM * DIM
    assert found.at_peak("products") == pytest.approx(flops / CHIPS["v5e"].flops_per_cycle, rel=1e-6)


def test_a_loop_that_depends_on_data_turns_as_often_as_assumed():
    def function(w, x, n):
        return lax.fori_loop(0, n[0], lambda _, x: x @ w, x)

    shapes = ((DIM, DIM), jnp.bfloat16), INPUTS, ((1,), jnp.int32)
    program = program_of(function, *shapes)
    one, five = (estimate_of(program, trips=trips) for trips in (1, 5))
    turn = 2 * LENGTH * DIM * DIM / CHIPS["v5e"].flops_per_cycle
    assert one.at_peak("products") == pytest.approx(turn)
    assert five.at_peak("products") == pytest.approx(5 * turn)
    assert five.cycles > 3 * one.cycles
    assert list(five.trips.values()) == [5]


@pytest.mark.parametrize(("window", "blocks"), [(None, 1 + 2 + 3 + 4), (257, 1 + 2 + 2 + 2)])
def test_flops_of_splash_attention_in_a_program(window, blocks):
    """Two products forward, seven backward, in the blocks that the mask does not hide: a query sees 256 before it."""
    batch, heads, dim, block = 2, 4, 128, 256

    def function(q, k, v, segments):
        return splash_attention(q, k, v, segments, window=window, block=block).astype(jnp.float32).sum()

    queries = ((batch, LENGTH, heads, dim), jnp.bfloat16)
    keys = ((batch, LENGTH, 2, dim), jnp.bfloat16)
    segments = ((batch, LENGTH), jnp.int32)
    found = estimate_of(program_of(jax.grad(function, argnums=(0, 1, 2)), queries, keys, keys, segments))
    flops = (2 + 7) * 2 * batch * heads * blocks * block * block * dim
    assert found.of_kind("attention") == pytest.approx(flops / CHIPS["v5e"].flops_per_cycle)
    assert found.of_kind("attention") == found.at_peak("attention")
    assert set(found.kernels.values()) == {blocks / 16}
    assert found.uncounted == []
