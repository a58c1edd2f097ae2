"""The parts of a plan: chips, topologies, collectives, FLOPs, rooflines, advice, search. All on the CPU."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kit import run_config

from sft_jax.architecture import Architecture, Rope
from sft_jax.config import LoraConfig
from sft_jax.errors import UserError
from sft_jax.hf.config import read_architecture
from sft_jax.planning.advice import Outcome, advise
from sft_jax.planning.changes import as_text, changed
from sft_jax.planning.chips import CHIPS
from sft_jax.planning.collectives import Collective, count_collectives
from sft_jax.planning.flops import Work, model_flops, products, repeated_flops
from sft_jax.planning.roofline import expected_network_bytes, roofline
from sft_jax.planning.search import candidates, choose
from sft_jax.planning.step import Base, Compiled, abstract_step, compile_step
from sft_jax.planning.topology import Topology, parse_topology, usable_bytes
from sft_jax.sharding import make_mesh
from sft_jax.training.compilation import CANDIDATES
from sft_jax.training.cross_entropy import chunk_size
from sft_jax.training.weights import build
from sft_jax.tree import flatten

ARCH = Architecture("llama", 100, 8, 16, 3, 2, 1, 4, 1e-5, Rope(1e4), True)


# -- chips and topologies ---------------------------------------------------------------------------------------------


def test_chips_are_told_completely():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert chip.source
        assert 1e14 < chip.flops < 1e16
        assert 15 * 2**30 < chip.hbm_bytes < 200e9
        assert 100 < chip.flops / chip.hbm_bandwidth < 700  # operations a byte: of all of them the same order
        assert chip.link_bandwidth < chip.hbm_bandwidth
        assert (chip.gpu is None) == (chip.platform == "tpu") == (chip.host_bandwidth is None)


@pytest.mark.parametrize(
    ("text", "shape", "number"),
    [
        ("v5e:4x4", (4, 4), 16),
        ("v5e:16", (4, 4), 16),
        ("v5e:1", (1, 1), 1),
        ("v5p:64", (4, 4, 4), 64),
        ("v5p:2x2x1", (2, 2, 1), 4),
        ("h100:8", (1, 8), 8),
        ("h100:2x8", (2, 8), 16),
    ],
)
def test_topologies_are_read(text, shape, number):
    topology = parse_topology(text)
    assert (topology.shape, topology.num_devices) == (shape, number)
    assert parse_topology(str(topology)) == topology


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v9:4x4", "known are v5e, v5p, v6e, a100-40g"),
        ("v5e", "write v5e:4x4"),
        ("v5e:four", "write v5e:4x4"),
        ("v5e:0x4", "write v5e:4x4"),
        ("v5e:4x4x4", "2 dimensions"),
        ("v5e:17x17", "up to 256 chips"),
        ("v5e:7", "such as 1x1, 2x2, 2x4, 4x4"),
        ("h100:16", "h100:2x8 for two hosts"),
    ],
)
def test_topologies_that_are_none_are_refused(text, said):
    with pytest.raises(UserError, match="--topology") as error:
        parse_topology(text)
    assert said in str(error.value)


def test_the_next_larger_topology():
    assert [str(parse_topology(text).larger()) for text in ("v5e:4x4", "h100:4", "h100:8", "v5e:16x16")] == [
        "v5e:4x8", "h100:8", "h100:2x8", "None",
    ]  # fmt: skip
    assert parse_topology("h100:8").network_bandwidth > parse_topology("h100:2x8").network_bandwidth


def test_a_process_has_three_quarters_of_a_gpu(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert usable_bytes(CHIPS["v5e"]) == CHIPS["v5e"].hbm_bytes
    assert usable_bytes(CHIPS["h100"]) == 60 * 2**30
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert usable_bytes(CHIPS["h100"]) == 72 * 2**30
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(UserError, match="'most' is not a number"):
        usable_bytes(CHIPS["h100"])


# -- collectives ------------------------------------------------------------------------------------------------------


def compiled_text(function, *shapes, in_specs, out_specs):
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, in_specs, strict=True)
    ]
    return mapped.lower(*arguments).compile().as_text()


def by_kind(found: list[Collective]) -> dict[str, tuple[float, float]]:
    return {one.kind: (one.count, one.bytes) for one in found}


def test_each_collective_by_hand():
    """Eight devices as 2 × 4. An array [8, 16] of float32 split over all has 64 bytes on each."""

    def function(a):
        gathered = lax.all_gather(a, "y", tiled=True)  # [4, 16]: 256 bytes, of which 3/4 are others'
        summed = lax.psum(gathered, "x")  # 256 bytes over two: 2 · 1/2 · 256
        scattered = lax.psum_scatter(summed * 2, "y", tiled=True)  # 256 bytes over four: 3/4 · 256
        moved = lax.ppermute(scattered, "x", [(0, 1), (1, 0)])  # 64 bytes
        return moved

    spec = PartitionSpec(("x", "y"))
    text = compiled_text(function, (8, 16), in_specs=(spec,), out_specs=spec)
    assert by_kind(count_collectives(text, 8, unknown_trips=0)) == {
        "all-gather": (1, 192), "all-reduce": (1, 256), "reduce-scatter": (1, 192), "collective-permute": (1, 64),
    }  # fmt: skip


def test_a_loop_counts_as_often_as_it_turns():
    """A scan of five, in it a scan of three; and a loop whose length the data tell."""

    def function(a, n):
        def outer(x, _):
            def inner(y, _):
                return lax.psum(y * 1.5, "y") * 0.1, None  # [1, 16] over four: 2 · 3/4 · 64

            x = lax.scan(inner, x, length=3)[0]
            return lax.all_gather(x, "x", tiled=True)[:1] + 1.0, None  # [2, 16] over two: 1/2 · 128

        x = lax.scan(outer, a, length=5)[0]
        turns = n.reshape(-1)[0].astype(jnp.int32)
        return lax.fori_loop(0, turns, lambda _, x: lax.ppermute(x, "y", [(0, 1), (1, 2), (2, 3), (3, 0)]) + 1.0, x)

    spec = PartitionSpec(("x", "y"))
    text = compiled_text(function, (8, 16), (8, 1), in_specs=(spec, spec), out_specs=spec)
    assert by_kind(count_collectives(text, 8, unknown_trips=7)) == {
        "all-reduce": (15, 15 * 96), "all-gather": (5, 5 * 64), "collective-permute": (7, 7 * 64),
    }  # fmt: skip


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
  %cp = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), pairs={{0,1},{1,0}}
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
    """Started and awaited apart, wrapped, hidden behind a fusion; a reduce-scatter as an all-reduce that is cut."""
    found = by_kind(count_collectives(ASYNCHRONOUS, 8, unknown_trips=0))
    assert found["reduce-scatter"] == (1, 64 * 8 * 4 * 3 / 4)
    assert found["all-gather"] == (3, pytest.approx(16 * 8 * 2 * 3 / 4 + 2 * 128 * 4 * 7 / 8))
    assert found["collective-permute"] == (1, pytest.approx(4 * 8 * 2, abs=8))
    assert set(found) == {"reduce-scatter", "all-gather", "collective-permute"}


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


def test_turns_are_read_from_the_condition_where_there_is_no_note():
    """0, 2, … below 15 are eight turns; the other loop's bound comes from the data."""
    assert by_kind(count_collectives(COUNTED, 2, unknown_trips=3)) == {"collective-permute": (8 + 3, (8 + 3) * 16)}


# -- FLOPs ------------------------------------------------------------------------------------------------------------


def test_model_flops_by_hand():
    """Every product of a forward pass, counted one by one."""
    kernels = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 8 * 16 + 8 * 16 + 16 * 8
    ends = (8 + 8) + (8 + 4) + (8 + 4) + (8 + 8) + (8 + 16) + (8 + 16) + (16 + 8)
    work = Work(tokens=10, targets=3, squares=52)
    attention = 3 * 52 * (2 * 2 * 8) / 2 * 3  # layers · len² · (two products of N·H), causal; backward is twice forward
    assert model_flops(ARCH, work, None) == 6 * (3 * kernels * 10 + 100 * 8 * 3) + attention
    assert (
        model_flops(ARCH, work, LoraConfig(rank=2))
        == 10 * 3 * (4 * kernels + 6 * 2 * ends) + 4 * 100 * 8 * 3 + attention
    )


def test_model_flops_are_those_of_the_network():
    """The compiled forward pass of whole rows, every token a target: what XLA counts, less what is no product."""
    import jax
    import jax.numpy as jnp

    from sft_jax.sharding import make_mesh
    from sft_jax.training.weights import build

    arch = Architecture("llama", 512, 128, 256, 2, 4, 2, 32, 1e-5, Rope(1e4), True)
    mesh = make_mesh(devices=jax.devices()[:1])
    split = build(arch, mesh, None, "float32")
    tokens = 64
    whole = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def forward(params, inputs, segments, positions):
        model = split.merge(params, split.frozen)
        return model.head().logits(model(inputs, segments, positions))

    with jax.set_mesh(mesh):
        compiled = jax.jit(forward).lower(split.trainable, whole, whole, whole).compile()
    counted = compiled.cost_analysis()["flops"]  # a scan's body once
    weights = arch.vocab_size * arch.hidden_size + sum(
        rows * columns
        for rows, columns in [(128, 128), (128, 64), (128, 64), (128, 128), (128, 256), (128, 256), (256, 128)]
    )
    assert counted == pytest.approx(2 * weights * tokens, rel=0.2)
    forward_only = model_flops(arch, Work(tokens, tokens, 0), None) / 3
    layers = forward_only - 2 * arch.vocab_size * arch.hidden_size * tokens
    assert forward_only - layers / 2 == 2 * weights * tokens


def test_weights_counted_by_formula_are_those_of_the_network():
    """Kernels and adapters on named modules, against the leaves."""
    lora = LoraConfig(rank=3, target_modules=["q_proj", "mlp.down_proj"])
    split = build(ARCH, make_mesh(devices=jax.devices()[:1]), lora, "float32")
    leaves = {path: leaf for path, leaf in (flatten(split.trainable) | flatten(split.frozen)).items() if len(path) > 2}
    for product in products(ARCH, lora):
        of = {path[-1]: leaf for path, leaf in leaves.items() if ".".join(path[:-1]) == product.name}
        assert of["kernel"].size == ARCH.num_layers * product.size
        assert of["kernel"].shape[1:] == (product.inputs, product.outputs)
        adapters = sum(leaf.size for name, leaf in of.items() if name.startswith("lora"))
        assert adapters == ARCH.num_layers * product.adapter_size


def test_repeated_flops_by_hand():
    """The layers' forward pass without its last product; attention's two products as well with full."""
    work = Work(tokens=10, targets=3, squares=52)
    kernels = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 8 * 16 + 8 * 16
    attention = 2 * (52 / 2) * (2 * 8) * 3  # two products of half of the scores, two operations for each of N·H
    assert repeated_flops(ARCH, work, None, "attention") == 2 * 3 * kernels * 10
    assert repeated_flops(ARCH, work, None, "full") == 2 * 3 * kernels * 10 + attention
    assert repeated_flops(ARCH, work, None, "dots") == repeated_flops(ARCH, work, None, "none") == 0
    ends = (8 + 8) + (8 + 4) + (8 + 4) + (8 + 8) + (8 + 16) + (8 + 16)
    more = repeated_flops(ARCH, work, LoraConfig(rank=2), "full") - repeated_flops(ARCH, work, None, "full")
    assert more == 2 * 3 * 2 * ends * 10


# -- the step and its roofline ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tiny):
    return Base(read_architecture(tiny), token_table=False)


def config_of(tiny, **changes):
    return run_config(tiny, **{"training__batch_size": 8, "model__remat": "full", "data__max_length": 64} | changes)


def test_the_step_on_eight_devices(tiny, base):
    """What it says of memory is what the compiler says; collectives are counted; auto takes the first that fits."""
    config = config_of(tiny)
    step = abstract_step(config, base, jax.devices())
    assert (step.rows, step.shards) == (1, 8)
    compiled = compile_step(step, usable_bytes=2**30)
    assert compiled.fits
    sizes = step.sizes()
    resident = sum(sizes[name] for name in ("frozen", "trained", "optimizer", "batch"))
    assert step.resident_bytes() == resident
    assert resident <= compiled.argument_bytes <= resident + 4096
    assert compiled.argument_bytes < compiled.peak_bytes
    assert sum(one.bytes for one in compiled.collectives) > 0
    assert not compile_step(step, usable_bytes=compiled.peak_bytes - 1).fits

    auto = dataclasses.replace(step, config=changed(config, {"model.remat": "auto"}))
    assert compile_step(auto, usable_bytes=2**30).remat == CANDIDATES[0]
    nothing = compile_step(auto, usable_bytes=compiled.argument_bytes + 1000)
    assert (nothing.fits, nothing.remat) == (False, CANDIDATES[-1])


def test_parts_of_the_memory_are_split_as_the_mesh_says(tiny, base):
    whole = abstract_step(config_of(tiny), base, jax.devices()[:1]).sizes()
    halves = abstract_step(config_of(tiny, mesh__fsdp=2), base, jax.devices()[:2]).sizes()
    assert whole["optimizer"] > 2 * whole["trained"] * 0.99  # two moments and a counter
    assert whole["gradients"] == whole["trained"]
    assert halves["batch"] == whole["batch"] / 2
    assert whole["frozen"] / 2 <= halves["frozen"] < whole["frozen"] * 0.6  # norms are whole everywhere


def test_a_mesh_that_train_refuses_is_refused(tiny, base):
    with pytest.raises(UserError, match=r"training\.batch_size"):
        abstract_step(config_of(tiny, training__batch_size=4), base, jax.devices())
    with pytest.raises(UserError, match=r"mesh\.tensor"):
        abstract_step(config_of(tiny, mesh__tensor=8), base, jax.devices())


def test_chunks_of_the_loss(tiny, base):
    """64 positions a device, half of them targets, in chunks as the loss itself cuts them."""
    step = abstract_step(config_of(tiny), base, jax.devices())
    chunk = chunk_size(64, 384 // 8 * 8)
    assert step.loss_chunks(0.5) == -(-32 // chunk)


def test_roofline_by_hand(tiny, base):
    """Compute and network by definition; memory of full fine-tuning on one device, product by product."""
    chip = dataclasses.replace(CHIPS["v5e"], flops=1e9, hbm_bandwidth=1e9)
    step = abstract_step(config_of(tiny, lora=None), base, jax.devices()[:1])
    bounds = roofline(step, "full", chip, 1e6, 5e5, target_share=0.5, document_length=16)
    work = Work(8 * 64, 8 * 32, 8 * 64 * 16)
    assert step.work(0.5, 16) == work
    flops = model_flops(base.arch, work, None) + repeated_flops(base.arch, work, None, "full")
    assert bounds.compute_seconds == pytest.approx(flops / 1e9)
    assert bounds.network_seconds == pytest.approx(0.5)
    d, f, q, kv = 48, 112, 48, 24
    shapes = [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]
    layers = 3 * sum(4 * (3 * i * o + i * o + (i + o) * 512 * 4) for i, o in shapes)  # float32, three passes and dW
    chunks = step.loss_chunks(0.5)
    head = chunks * 2 * 384 * d * 4 + 2 * 256 * 384 * 4
    sizes = step.sizes()
    state = 2 * (sizes["trained"] + sizes["optimizer"]) + sizes["gradients"]
    assert bounds.memory_bytes == pytest.approx(layers + head + state)
    assert bounds.seconds == max(bounds.compute_seconds, bounds.memory_seconds, 0.5)
    assert roofline(step, "full", chip, 1e6, 1e9, 0.5, 16).bound == "network"
    assert roofline(step, "full", dataclasses.replace(chip, flops=1.0), 1e6, None, 0.5, 16).bound == "compute"


def test_what_is_expected_to_be_sent(tiny, base):
    """By formula within a factor of three of what the compiled program sends, on meshes of each kind."""
    for mesh in ({"mesh__fsdp": 8}, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}):
        step = abstract_step(config_of(tiny, lora=None, **mesh), base, jax.devices())
        counted = sum(one.bytes for one in compile_step(step, 2**30, 0.5).collectives)
        assert 1 / 3 < expected_network_bytes(step, "full", step.work(0.5, 64)) / counted < 3


# -- advice and search ------------------------------------------------------------------------------------------------


def fake_compiler(limit, calls):
    """Memory by a made-up formula, in bytes: weights by how they are kept, activations by rows and remat."""

    def compile_with(config, where):
        calls.append((config, str(where)))
        tensor = config.mesh.tensor
        shards = where.num_devices // tensor
        rows, left = divmod(config.training.batch_size // config.training.gradient_accumulation_steps, shards)
        if left or not rows:
            raise UserError("training.batch_size: does not divide")
        weights = {None: 1600, "int8": 800, "nf4": 400}[config.model.quantization]
        if config.lora is None:
            weights = 3200 if config.model.weights == "float32" else 1600
            weights += {"float32": 6400, "bfloat16": 3200, "factored": 1600}[config.optimizer.moments]
        resident = weights // (where.num_devices // config.mesh.data)
        peak = resident + rows * {"dots": 100, "attention": 50, "full": 20, "auto": 20}[config.model.remat]
        return Outcome(peak <= limit, peak, resident)

    return compile_with


def advice_for(tiny, limit, topology="v5e:4x4", **changes):
    changes = {"training__batch_size": 64, "model__remat": "dots"} | changes
    config = run_config(tiny, mesh__data=1, **changes)
    calls = []
    compile_with = fake_compiler(limit, calls)
    where = parse_topology(topology)
    found = compile_with(config, where)
    assert not found.fits
    return advise(config, where, 64, limit, found, compile_with), calls


@pytest.mark.parametrize(
    ("limit", "changes", "advised"),
    [
        (190, {}, "model.remat=full"),
        (150, {"model__remat": "auto"}, "training.gradient_accumulation_steps=2"),
        (125, {"model__remat": "auto"}, "training.gradient_accumulation_steps=4"),
        (125, {}, "model.remat=full training.gradient_accumulation_steps=4"),
        (75, {}, "model.remat=full training.gradient_accumulation_steps=4 model.quantization=int8"),
        (50, {}, "model.remat=full training.gradient_accumulation_steps=4 model.quantization=nf4"),
        (90, {}, "model.remat=full training.gradient_accumulation_steps=2 model.quantization=int8"),
    ],
)
def test_advice_is_the_first_that_fits(tiny, limit, changes, advised):
    advice, calls = advice_for(tiny, limit, **changes)
    assert advice.outcome.fits
    assert advice.outcome.peak_bytes <= limit
    assert sorted(as_text(advice.changes).split()) == sorted(advised.split()), advice.tried
    assert len(calls) == len(advice.tried) + 1
    assert str(advice.topology) == "v5e:4x4"
    assert all(fits == (outcome.peak_bytes <= limit) for _, _, outcome in advice.tried for fits in [outcome.fits])


def test_advice_for_full_fine_tuning(tiny):
    advice, _ = advice_for(tiny, 450, lora=None)
    assert "model.weights=bfloat16" in as_text(advice.changes)
    assert "optimizer.moments" in as_text(advice.changes)


def test_advice_is_more_chips_at_last(tiny):
    advice, calls = advice_for(tiny, 33, model__quantization="nf4")
    assert str(advice.topology) == "v5e:4x8"
    assert advice.outcome.fits
    assert [where for _, where in calls][-1] == "v5e:4x8"


def test_advice_may_be_none(tiny):
    advice, _ = advice_for(tiny, 1)
    assert advice.changes is None
    assert not advice.outcome.fits
    assert advice.tried


def test_changes_are_checked(tiny):
    config = run_config(tiny)
    assert changed(config, {"model.remat": "full", "mesh.tensor": 2}).mesh.tensor == 2
    assert changed(config, {}) == config
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        changed(config, {"training.gradient_accumulation_steps": 3})


def test_search_takes_the_fastest_that_fits(tiny, base):
    """Ranked by formula; what keeps more than what did not fit is not compiled; the fastest that fits comes first."""
    config = config_of(tiny, training__batch_size=12)
    build_step = partial(abstract_step, base=base, devices=jax.devices())
    ranked = candidates(config, lambda c: build_step(c), 8, CHIPS["v5e"], 200e9, 0.5, 64)
    speeds = [one.tokens_per_second for one in ranked]
    assert speeds == sorted(speeds, reverse=True)
    assert {one.step.mesh.shape["tensor"] for one in ranked} == {1, 2, 4}  # four heads
    assert all(one.step.config.training.batch_size in (12, 16) for one in ranked)
    compiled = []

    def compile_with(candidate):
        compiled.append(candidate)
        fits = candidate.remat == "full"
        return Compiled(candidate.remat, fits, 1, 1, 1, 0.0, 0.0, None)

    choices = choose(ranked, 2**40, compile_with, lambda candidate, _: candidate.expected)
    assert choices[0].predicted is not None
    assert choices[0].candidate.remat == "full"
    fastest = max(one.tokens_per_second for one in compiled if one.remat == "full")
    assert choices[0].tokens_per_second == fastest
    assert len(compiled) == len(choices) <= 12


def test_topologies_are_compared_by_what_they_are():
    assert Topology(CHIPS["v5e"], (4, 4)) == parse_topology("v5e:16")
