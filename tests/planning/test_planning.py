"""Parts of a plan on the CPU: chips, topologies, FLOPs, the abstract step and its roofline."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from kit import architecture, run_config

from sft_jax.config import LoraConfig
from sft_jax.errors import UserError
from sft_jax.hf.config import read_architecture
from sft_jax.models.work import Work
from sft_jax.planning.changes import changed
from sft_jax.planning.chips import CHIPS
from sft_jax.planning.flops import Sizes, eight_bit_flops, model_flops, repeated_flops
from sft_jax.planning.network import Sent, hosts_of
from sft_jax.planning.roofline import expected_sent, roofline
from sft_jax.planning.step import Base, abstract_step, compile_step
from sft_jax.planning.topology import parse_topology, usable_bytes
from sft_jax.sharding import make_mesh
from sft_jax.training.compilation import CANDIDATES, SHARE
from sft_jax.training.cross_entropy import chunk_size
from sft_jax.training.weights import build
from sft_jax.tree import flatten

ARCH = architecture(100, 8, 16, 3, 2, 1, 4, True)


# -- chips and topologies ---------------------------------------------------------------------------------------------


def test_chip_specs_are_complete_and_plausible():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert chip.source
        card = name.startswith("rtx")  # desktop cards have fewer FLOP per byte
        assert (5e13 if card else 1e14) < chip.flops < 1e16
        assert 15 * 2**30 < chip.hbm_bytes < 200e9
        assert (50 if card else 100) < chip.flops / chip.hbm_bandwidth < 700  # FLOP per byte
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
def test_topologies_are_parsed(text, shape, number):
    topology = parse_topology(text)
    assert (topology.shape, topology.num_devices) == (shape, number)
    assert parse_topology(str(topology)) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:4x4", "known are v5e, v5p, v6e, rtx-3090, rtx-4090, l4, l40s, a100-40g"),
        ("v5e", "write v5e:4x4"),
        ("v5e:four", "write v5e:4x4"),
        ("v5e:0x4", "write v5e:4x4"),
        ("v5e:4x4x4", "2 dimensions"),
        ("v5e:17x17", "up to 256 chips"),
        ("v5e:7", "such as 1x1, 2x2, 2x4, 4x4"),
        ("h100:16", "h100:2x8 for two hosts"),
    ],
)
def test_invalid_topologies_raise(text, message):
    with pytest.raises(UserError, match="--topology") as error:
        parse_topology(text)
    assert message in str(error.value)


def test_the_next_larger_topology():
    assert [str(parse_topology(text).larger()) for text in ("v5e:4x4", "h100:4", "h100:6", "h100:8", "v5e:16x16")] == [
        "v5e:4x8", "h100:8", "h100:8", "h100:2x8", "None",
    ]  # fmt: skip


def test_a_process_can_use_three_quarters_of_a_gpu(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert usable_bytes(CHIPS["v5e"]) == CHIPS["v5e"].hbm_bytes
    assert usable_bytes(CHIPS["h100"]) == int(0.75 * 79.1 * 2**30)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert usable_bytes(CHIPS["h100"]) == int(0.9 * 79.1 * 2**30)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(UserError, match="'most' is not a number"):
        usable_bytes(CHIPS["h100"])


# -- FLOPs ------------------------------------------------------------------------------------------------------------


def sizes(lora=None):
    """Sizes of :data:`ARCH`."""
    return Sizes.of(build(ARCH, make_mesh(devices=jax.devices()[:1]), lora, "float32"))


def test_model_flops_by_hand():
    """Counts each product of a forward pass."""
    weights = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 8 * 16 + 8 * 16 + 16 * 8
    ends = (8 + 8) + (8 + 4) + (8 + 4) + (8 + 8) + (8 + 16) + (8 + 16) + (16 + 8)
    work = Work(tokens=10, targets=3, squares=52)
    attention = 3 * 52 * (2 * 2 * 8) / 2 * 3  # layers · len² · (two products of N·H), causal; backward is twice forward
    assert model_flops(sizes(), work) == 6 * (3 * weights * 10 + 100 * 8 * 3) + attention
    assert (
        model_flops(sizes(LoraConfig(rank=2)), work)
        == 10 * 3 * (4 * weights + 6 * 2 * ends) + 4 * 100 * 8 * 3 + attention
    )


def test_model_flops_are_those_of_the_network():
    """Compares with XLA's count for the compiled forward pass of a full sequence in which every token is a target."""
    import jax

    from sft_jax.sharding import make_mesh
    from sft_jax.training.weights import build

    arch = architecture(512, 128, 256, 2, 4, 2, 32, True)
    mesh = make_mesh(devices=jax.devices()[:1])
    split = build(arch, mesh, None, "float32")
    tokens = 64
    whole = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def forward(params, inputs, segments, positions):
        model = split.merge(params, split.frozen)
        return model.head().logits(model(inputs, segments, positions))

    with jax.set_mesh(mesh):
        compiled = jax.jit(forward).lower(split.trainable, whole, whole, whole).compile()
    counted = compiled.cost_analysis()["flops"]  # counts a scan's body once
    weights = arch.vocab_size * arch.hidden_size + sum(
        rows * columns
        for rows, columns in [(128, 128), (128, 64), (128, 64), (128, 128), (128, 256), (128, 256), (256, 128)]
    )
    assert counted == pytest.approx(2 * weights * tokens, rel=0.2)
    forward_only = model_flops(Sizes.of(split), Work(tokens, tokens, 0)) / 3
    layers = forward_only - 2 * arch.vocab_size * arch.hidden_size * tokens
    assert forward_only - layers / 2 == 2 * weights * tokens


def test_parameters_counted_by_formula_are_those_of_the_network():
    """Compares weights and adapters of the products with the leaves of the parameter tree."""
    lora = LoraConfig(rank=3, target_modules=["q_proj", "mlp.down_proj"])
    split = build(ARCH, make_mesh(devices=jax.devices()[:1]), lora, "float32")
    leaves = {path: leaf for path, leaf in (flatten(split.trainable) | flatten(split.frozen)).items() if len(path) > 2}
    products = Sizes.of(split).products
    assert len(products) == 7
    for product in products:
        of = {path[-1]: leaf for path, leaf in leaves.items() if ".".join(path[:-1]) == product.name}
        assert of["weight"].size == product.size
        assert of["weight"].shape == (ARCH.num_layers, product.inputs, product.outputs)
        adapters = sum(leaf.size for name, leaf in of.items() if name.startswith("lora"))
        assert adapters == product.count * product.adapter_size


def test_repeated_flops_by_hand():
    """The layers' forward pass without its last product; ``full`` also repeats the two products of attention."""
    work = Work(tokens=10, targets=3, squares=52)
    weights = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 8 * 16 + 8 * 16
    attention = 2 * (52 / 2) * (2 * 8) * 3  # two products of half of the scores, two operations for each of N·H
    assert repeated_flops(sizes(), work, "attention") == 2 * 3 * weights * 10
    assert repeated_flops(sizes(), work, "full") == 2 * 3 * weights * 10 + attention
    assert repeated_flops(sizes(), work, "dots") == repeated_flops(sizes(), work, "none") == 0
    outputs = 8 + 4 + 4 + 8 + 16 + 16  # of lora_b; those of lora_a are saved
    more = repeated_flops(sizes(LoraConfig(rank=2)), work, "full") - repeated_flops(sizes(), work, "full")
    assert more == 2 * 3 * 2 * outputs * 10


def test_eight_bit_flops_by_hand():
    """Products of base weights: forward, for the input, and all but the last again."""
    work = Work(tokens=10, targets=3, squares=52)
    weights = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 8 * 16 + 8 * 16
    all_weights = 3 * (weights + 16 * 8)
    assert eight_bit_flops(sizes(LoraConfig(rank=2)), work, "none") == 4 * all_weights * 10
    assert eight_bit_flops(sizes(LoraConfig(rank=2)), work, "full") == 4 * all_weights * 10 + 2 * 3 * weights * 10
    assert eight_bit_flops(sizes(), work, "dots") == 6 * all_weights * 10


# -- the step and its roofline ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tiny):
    return Base(read_architecture(tiny), embeddings=False)


def config_of(tiny, **changes):
    return run_config(tiny, **{"training__batch_size": 8, "model__remat": "full", "data__max_length": 64} | changes)


def test_the_step_on_eight_devices(tiny, base):
    """Sizes match the compiler's memory analysis; collectives are counted; auto takes the first way that fits."""
    config = config_of(tiny)
    step = abstract_step(config, base, jax.devices())
    assert (step.local_batch_size, step.shards) == (1, 8)
    compiled = compile_step(step, usable_bytes=2**30)
    assert compiled.fits
    sizes = step.sizes()
    resident = sum(sizes[name] for name in ("frozen", "trained", "optimizer", "batch"))
    assert step.resident_bytes() == resident
    assert resident <= compiled.argument_bytes <= resident + 4096
    assert compiled.argument_bytes < compiled.peak_bytes
    assert sum(one.sent.bytes for one in compiled.collectives) > 0
    assert not compile_step(step, usable_bytes=compiled.peak_bytes - 1).fits

    auto = abstract_step(changed(config, {"model.remat": "auto"}), base, jax.devices())
    assert compile_step(auto, usable_bytes=2**30).remat == CANDIDATES[0]
    nothing = compile_step(auto, usable_bytes=compiled.argument_bytes + 1000)
    assert (nothing.fits, nothing.remat) == (False, CANDIDATES[-1])
    assert nothing.spare_bytes == int((1 - SHARE) * 1000)
    assert nothing.room_bytes == 1000 - nothing.spare_bytes - nothing.temp_bytes


def test_memory_is_sharded_over_the_mesh(tiny, base):
    whole = abstract_step(config_of(tiny), base, jax.devices()[:1]).sizes()
    halves = abstract_step(config_of(tiny, mesh__fsdp=2), base, jax.devices()[:2]).sizes()
    assert whole["optimizer"] > 2 * whole["trained"] * 0.99  # two moments and a counter
    assert whole["gradients"] == whole["trained"]
    assert halves["batch"] == whole["batch"] / 2
    assert whole["frozen"] / 2 <= halves["frozen"] < whole["frozen"] * 0.6  # norms are replicated


def test_a_mesh_that_train_refuses_is_refused(tiny, base):
    with pytest.raises(UserError, match=r"training\.batch_size"):
        abstract_step(config_of(tiny, training__batch_size=4), base, jax.devices())
    with pytest.raises(UserError, match=r"mesh\.tensor"):
        abstract_step(config_of(tiny, mesh__tensor=8), base, jax.devices())


def test_chunks_of_the_loss(tiny, base):
    """64 tokens per device, half of them targets, in chunks of the loss's own size."""
    step = abstract_step(config_of(tiny), base, jax.devices())
    chunk = chunk_size(64, 384 // 8 * 8)
    assert step.loss_chunks(0.5) == -(-32 // chunk)
    trips = step.loop_trips(0.25)
    assert trips("training/losses.py:73 > cross_entropy.py:220") == trips("") == -(-16 // chunk)
    assert trips("models/moe/dispatch.py:70 > rows.py:158") == 1  # a model without experts


def test_roofline_by_hand(tiny, base):
    """Compute and network by definition; memory of full fine-tuning on one device by product."""
    chip = dataclasses.replace(CHIPS["v5e"], flops=1e9, hbm_bandwidth=1e9, link_bandwidth=1e6)
    step = abstract_step(config_of(tiny, lora=None), base, jax.devices()[:1])
    bounds = roofline(step, "full", chip, Sent(5e5), target_share=0.5, document_length=16)
    work = Work(8 * 64, 8 * 32, 8 * 64 * 16)
    assert step.work(0.5, 16) == work
    flops = model_flops(step.network, work) + repeated_flops(step.network, work, "full")
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
    assert roofline(step, "full", chip, Sent(1e9), 0.5, 16).bound == "network"
    assert roofline(step, "full", dataclasses.replace(chip, flops=1.0), None, 0.5, 16).bound == "compute"

    eight = abstract_step(config_of(tiny, lora=None, model__compute="fp8"), base, jax.devices()[:1])
    rounded = roofline(eight, "full", chip, Sent(5e5), target_share=0.5, document_length=16)
    saved = eight_bit_flops(eight.network, work, "full") / 2
    assert rounded.compute_seconds == pytest.approx((flops - saved) / 1e9)
    one_byte = 3 * sum(3 * i * o + 4 * i * o + (i + o) * 512 * 4 for i, o in shapes)  # gradients are float32
    assert rounded.memory_bytes == pytest.approx(one_byte + head + state)


def test_expected_bytes_are_close_to_the_compiled_program(tiny, base):
    """The formula is within a factor of three of the bytes that the compiled program sends, for each mesh axis."""
    for mesh in ({"mesh__fsdp": 8}, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, {"mesh__sequence": 4}):
        step = abstract_step(config_of(tiny, lora=None, **mesh), base, jax.devices())
        counted = sum(one.sent.bytes for one in compile_step(step, 2**30, 0.5).collectives)
        expected = expected_sent(step, "full", step.work(0.5, 64), hosts_of(step.mesh))
        assert 1 / 3 < expected.bytes / counted < 3
        assert expected.bytes_between_hosts == 0


def test_bytes_between_hosts_are_part_of_the_bytes_sent(tiny, base):
    """Two hosts of four: with ``data`` between them only gradients cross, with ``fsdp`` across both weights do too."""
    hosts, crossing = [0] * 4 + [1] * 4, {}
    for name, mesh in {"data": {"mesh__data": 2, "mesh__fsdp": 4}, "fsdp": {"mesh__fsdp": 8}}.items():
        step = abstract_step(config_of(tiny, lora=None, **mesh), base, jax.devices())
        expected = expected_sent(step, "full", step.work(0.5, 64), hosts)
        assert 0 < expected.bytes_between_hosts < expected.bytes
        crossing[name] = expected.bytes_between_hosts / expected.bytes
    assert crossing["data"] < crossing["fsdp"] < 1 / 4  # all-gather on eight chips of two hosts: 1/7
