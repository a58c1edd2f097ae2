"""Collectives of compiled programs, counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.planning.chips import CHIPS
from sft_jax.planning.collectives import Collective, count_collectives
from sft_jax.planning.hlo import parse
from sft_jax.planning.network import Sent


def compiled_text(function, *shapes, in_specs, out_specs):
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, in_specs, strict=True)
    ]
    return mapped.lower(*arguments).compile().as_text()


def by_kind(found: list[Collective]) -> dict[str, tuple[float, float]]:
    return {one.kind: (one.count, one.sent.bytes) for one in found}


def test_each_collective_by_hand():
    """Eight devices as 2 × 4. An array [8, 16] of float32 split over all has 64 bytes on each."""

    def function(a):
        gathered = lax.all_gather(a, "y", tiled=True)  # [4, 16]: 256 bytes, 3/4 of them from other devices
        summed = lax.psum(gathered, "x")  # 256 bytes over two: 2 · 1/2 · 256
        scattered = lax.psum_scatter(summed * 2, "y", tiled=True)  # 256 bytes over four: 3/4 · 256
        moved = lax.ppermute(scattered, "x", [(0, 1), (1, 0)])  # 64 bytes
        return moved

    spec = PartitionSpec(("x", "y"))
    text = compiled_text(function, (8, 16), in_specs=(spec,), out_specs=spec)
    assert by_kind(count_collectives(parse(text), [0] * 8, unknown_trips=0)) == {
        "all-gather": (1, 192), "all-reduce": (1, 256), "reduce-scatter": (1, 192), "collective-permute": (1, 64),
    }  # fmt: skip
    found = count_collectives(parse(text), [0] * 8, unknown_trips=0)
    assert all(one.alone == one.sent for one in found), "a CPU overlaps none"


def test_a_collective_in_a_loop_counts_once_per_iteration():
    """A scan of length three in a scan of length five, and a loop with a data-dependent trip count."""

    def function(a, n):
        def outer(x, _):
            def inner(y, _):
                return lax.psum(y * 1.5, "y") * 0.1, None  # [1, 16] over four: 2 · 3/4 · 64

            x = lax.scan(inner, x, length=3)[0]
            return lax.all_gather(x, "x", tiled=True)[:1] + 1.0, None  # [2, 16] over two: 1/2 · 128

        x = lax.scan(outer, a, length=5)[0]
        trips = n.reshape(-1)[0].astype(jnp.int32)
        return lax.fori_loop(0, trips, lambda _, x: lax.ppermute(x, "y", [(0, 1), (1, 2), (2, 3), (3, 0)]) + 1.0, x)

    spec = PartitionSpec(("x", "y"))
    text = compiled_text(function, (8, 16), (8, 1), in_specs=(spec, spec), out_specs=spec)
    assert by_kind(count_collectives(parse(text), [0] * 8, unknown_trips=7)) == {
        "all-reduce": (15, 15 * 96), "all-gather": (5, 5 * 64), "collective-permute": (7, 7 * 64),
    }  # fmt: skip


def test_bytes_between_hosts_by_hand():
    """Eight devices as 2 × 4, on two hosts (``y`` within a host, ``x`` between them) and on four hosts."""

    def function(a):
        gathered = lax.all_gather(a, ("x", "y"), tiled=True)  # [8, 16]: 512 bytes
        summed = lax.psum(gathered, "x")  # 512 bytes over two
        scattered = lax.psum_scatter(summed * 2, "y", tiled=True)  # [2, 16] of 512 bytes over four
        exchanged = lax.all_to_all(scattered[:1].reshape(4, 4), "y", 0, 0, tiled=True).reshape(1, 16)  # 64 bytes
        return lax.ppermute(exchanged, ("x", "y"), [(i, (i + 1) % 8) for i in range(8)])  # 64 bytes, ring of eight

    spec = PartitionSpec(("x", "y"))
    text = compiled_text(function, (8, 16), in_specs=(spec,), out_specs=spec)
    fours = {one.kind: one.sent for one in count_collectives(parse(text), [0] * 4 + [1] * 4, unknown_trips=0)}
    assert fours == {
        "all-gather": Sent(512 * 7 / 8, 512 / 8), "all-reduce": Sent(512, 512), "reduce-scatter": Sent(384, 0),
        "all-to-all": Sent(48, 0), "collective-permute": Sent(64, 64 / 4),
    }  # fmt: skip
    twos = {one.kind: one.sent for one in count_collectives(parse(text), [0, 0, 1, 1, 2, 2, 3, 3], unknown_trips=0)}
    assert twos == {
        "all-gather": Sent(512 * 7 / 8, 512 * 3 / 8), "all-reduce": Sent(512, 512),
        "reduce-scatter": Sent(384, 512 / 4), "all-to-all": Sent(48, 32), "collective-permute": Sent(64, 64 / 2),
    }  # fmt: skip


def test_seconds_are_those_of_the_slower_network():
    chip = dataclasses.replace(CHIPS["h100"], link_bandwidth=100.0, host_bandwidth=10.0)
    assert Sent(1000.0).seconds(chip) == 10
    assert Sent(1000.0, 50.0).seconds(chip) == 9.5
    assert Sent(1000.0, 500.0).seconds(chip) == 50
    assert Sent(1000.0).seconds(dataclasses.replace(chip, host_bandwidth=None)) == 10


ASYNCHRONOUS = """HloModule step, is_scheduled=true

%all-reduce-scatter.3 (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice.1 = f32[16,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,8}
}

%wrapped (p: f32[16]) -> f32[128] {
  %p = f32[16]{0} parameter(0)
  ROOT %gathered = f32[128]{0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%fused.1 (p: f32[16]) -> (f32[16], f32[128]) {
  %p.1 = f32[16]{0} parameter(0)
  %gathered.1 = f32[128]{0} all-gather(%p.1), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %both.1 = (f32[16]{0}, f32[128]{0}) tuple(%p.1, %gathered.1)
}

%async_collective_fusion.2 (p: f32[16]) -> (f32[16], f32[128]) {
  %p.2 = f32[16]{0} parameter(0)
  %gathered.2 = f32[128]{0} all-gather(%p.2), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %both.2 = (f32[16]{0}, f32[128]{0}) tuple(%p.2, %gathered.2)
}

%fused.3 (p: f32[16]) -> f32[128] {
  %p.3 = f32[16]{0} parameter(0)
  ROOT %gathered.3 = f32[128]{0} all-gather(%p.3), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

ENTRY %main (a: bf16[4,8], b: f32[64,8]) -> f32[16,8] {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[64,8]{1,0:T(8,128)S(1)} parameter(1)
  %ag = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)}) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %agd = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather-done(%ag)
  %cp = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %cpd = bf16[4,8]{1,0} collective-permute-done(%cp)
  %as = ((f32[16]{0}), f32[128]{0}, u32[]) async-start(%c), calls=%wrapped
  %ad = f32[128]{0} async-done(%as), calls=%wrapped
  %async-collective-start.1 = (f32[16]{0}, f32[128]{0}) fusion(%c), kind=kCustom, calls=%fused.1
  %fusion.2 = (f32[16]{0}, f32[128]{0}) fusion(%d), kind=kOutput, calls=%async_collective_fusion.2
  %async-collective-done.1 = f32[128]{0} fusion(%e), kind=kCustom, calls=%fused.3
  ROOT %rs = f32[16,8]{1,0:T(8,128)} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_forms_that_only_accelerators_have():
    """Asynchronous, wrapped and fused collectives; a reduce-scatter written as an all-reduce and a slice."""
    found = by_kind(count_collectives(parse(ASYNCHRONOUS), [0] * 8, unknown_trips=0))
    assert found["reduce-scatter"] == (1, 64 * 8 * 4 * 3 / 4)
    assert found["all-gather"] == (3, pytest.approx(16 * 8 * 2 * 3 / 4 + 2 * 128 * 4 * 7 / 8))
    assert found["collective-permute"] == (1, pytest.approx(4 * 8 * 2, abs=8))
    assert set(found) == {"reduce-scatter", "all-gather", "collective-permute"}
    alone = {one.kind: one.alone.bytes for one in count_collectives(parse(ASYNCHRONOUS), [0] * 8, unknown_trips=0)}
    assert alone == {"reduce-scatter": found["reduce-scatter"][1], "all-gather": 0, "collective-permute": 0}


COUNTED = """HloModule step

%body (state: (bf16[8], u32[], s32[])) -> (bf16[8], u32[], s32[]) {
  %two = u32[]{:T(128)} constant(2)
  %state = (bf16[8]{0:T(128)}, u32[]{:T(128)}, s32[]) parameter(0)
  %x = bf16[8]{0:T(128)} get-tuple-element(%state), index=0
  %i = u32[]{:T(128)} get-tuple-element(%state), index=1
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="a/b(c)"}
  %n = s32[] get-tuple-element(%state), index=2
  %moved = bf16[8]{0:T(128)} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %all = (bf16[8]{0:T(128)}, u32[]{:T(128)}, s32[]) tuple(%moved, /*index=1*/%next, %n)
}

%condition (state: (bf16[8], u32[], s32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(15)
  %state.1 = (bf16[8]{0:T(128)}, u32[]{:T(128)}, s32[]) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=1
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT, metadata={op_name="x"}
}

%condition.data (state: (bf16[8], u32[], s32[])) -> pred[] {
  %state.2 = (bf16[8]{0:T(128)}, u32[]{:T(128)}, s32[]) parameter(0)
  %i.2 = u32[]{:T(128)} get-tuple-element(%state.2), index=1
  %n.2 = u32[]{:T(128)} get-tuple-element(%state.2), index=2
  ROOT %less.2 = pred[]{:T(512)} compare(%i.2, %n.2), direction=LT
}

ENTRY %main (a: bf16[8]) -> bf16[8] {
  %start = (bf16[8]{0:T(128)}, u32[]{:T(128)}, s32[]) tuple(%a, %zero, %zero)
  %while.1 = (bf16[8]{0:T(128)}, u32[]{:T(128)}, s32[]) while(%start), condition=%condition, body=%body
  %while.2 = (bf16[8]{0:T(128)}, u32[]{:T(128)}, s32[]) while(%while.1), condition=%condition.data, body=%body
  ROOT %result = bf16[8]{0:T(128)} get-tuple-element(%while.2), index=0
}
"""


def test_the_trip_count_is_read_from_the_condition_where_it_is_not_annotated():
    """0, 2, … below 15 are eight iterations; the other loop's bound depends on data."""
    assert by_kind(count_collectives(parse(COUNTED), [0] * 2, unknown_trips=3)) == {
        "collective-permute": (8 + 3, (8 + 3) * 16)
    }
