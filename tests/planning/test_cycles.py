"""Sums of the compiler's estimates over hand-made programs."""

import json

import pytest

from sft_jax.planning.chips import CHIPS
from sft_jax.planning.compiled_time import compiled_figures, compiled_text
from sft_jax.planning.cycles import PASSES, estimate
from sft_jax.planning.hlo import parse
from sft_jax.planning.profile import profile, profile_text

V5E = CHIPS["v5e"]
PEAK = 4 * 128 * 128 * 2  # FLOP per cycle
LAYER = 'metadata={op_name="jit(step)/transpose(jvp())/while/body/dot_general" stack_frame_id=4}'


def cost(cycles: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'


PROGRAM = f"""HloModule step, is_scheduled=true

FileNames
1 "/home/me/sft_jax/sft_jax/models/mlp.py"
2 "/home/me/sft_jax/sft_jax/models/projection.py"
3 "/env/site-packages/jax/_src/lax/lax.py"
4 "/home/me/sft_jax/sft_jax/planning/step.py"

FunctionNames
1 "f"

FileLocations
1 {{file_name_id=4 function_name_id=1 line=99 end_line=99 column=1 end_column=2}}
2 {{file_name_id=1 function_name_id=1 line=87 end_line=87 column=1 end_column=2}}
3 {{file_name_id=2 function_name_id=1 line=79 end_line=79 column=1 end_column=2}}
4 {{file_name_id=3 function_name_id=1 line=11 end_line=11 column=1 end_column=2}}
5 {{file_name_id=2 function_name_id=1 line=12 end_line=12 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}
3 {{file_location_id=3 parent_frame_id=3}}
4 {{file_location_id=4 parent_frame_id=4}}
5 {{file_location_id=5 parent_frame_id=3}}

%product (x: bf16[128,256], w: bf16[256,512]) -> bf16[128,512] {{
  %x = bf16[128,256]{{1,0}} parameter(0)
  %w = bf16[256,512]{{1,0}} parameter(1)
  %inner = bf16[256,512]{{1,0}} fusion(%w), kind=kLoop, calls=%sum, {cost(9999)}
  ROOT %c = bf16[128,512]{{1,0}} convolution(%x, %inner), dim_labels=bf_io->bf
}}

%sum (a: bf16[256,512]) -> bf16[256,512] {{
  %a = bf16[256,512]{{1,0}} parameter(0)
  %part = bf16[256,512]{{1,0}} slice(%a), slice={{[0:256], [0:512]}}
  ROOT %s = bf16[256,512]{{1,0}} add(%part, %part)
}}

%cut (a: bf16[8,512], i: s32[]) -> bf16[1,512] {{
  %a.1 = bf16[8,512]{{1,0}} parameter(0)
  %i.1 = s32[] parameter(1)
  %next = s32[] add(%i.1, %i.1)
  ROOT %d = bf16[1,512]{{1,0}} dynamic-slice(%a.1, %next, %i.1), dynamic_slice_sizes={{1,512}}
}}

%turn (a: bf16[8,512]) -> bf16[512,8] {{
  %a.2 = bf16[8,512]{{1,0}} parameter(0)
  %wide = f32[8,512]{{1,0}} convert(%a.2)
  ROOT %t = f32[512,8]{{1,0}} transpose(%wide), dimensions={{1,0}}
}}

%gathered (a: bf16[8]) -> bf16[64] {{
  %a.3 = bf16[8]{{0}} parameter(0)
  ROOT %g = bf16[64]{{0}} all-gather(%a.3), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}
}}

%added (a: f32[512,8], i: s32[4], u: f32[4,8]) -> f32[512,8] {{
  %a.6 = f32[512,8]{{1,0}} parameter(0)
  %i.6 = s32[4]{{0}} parameter(1)
  %u.6 = f32[4,8]{{1,0}} parameter(2)
  ROOT %scatter.1 = f32[512,8]{{1,0}} scatter(%a.6, %i.6, %u.6), to_apply=%sum
}}

%body (s: (s32[], bf16[8])) -> (s32[], bf16[8]) {{
  %s.1 = (s32[], bf16[8]{{0}}) parameter(0)
  %fusion.1 = bf16[128,512]{{1,0}} fusion(%s.1), kind=kOutput, calls=%product, {LAYER}, {cost(1000)}
  %copy.1 = bf16[8,512]{{0,1}} copy(%s.1), {cost(10)}
  ROOT %out = (s32[], bf16[8]{{0}}) tuple(%s.1, %s.1)
}}

%condition (s: (s32[], bf16[8])) -> pred[] {{
  %s.2 = (s32[], bf16[8]{{0}}) parameter(0)
  ROOT %unknown = pred[] get-tuple-element(%s.2), index=0
}}

%small (a: bf16[8]) -> bf16[8] {{
  %a.4 = bf16[8]{{0}} parameter(0)
  ROOT %fusion.small = bf16[8]{{0}} fusion(%a.4), kind=kLoop, calls=%sum, {cost(70)}
}}

%large (a: bf16[8]) -> bf16[8] {{
  %a.5 = bf16[8]{{0}} parameter(0)
  %fusion.l1 = bf16[8]{{0}} fusion(%a.5), kind=kLoop, calls=%sum, {cost(50)}
  ROOT %fusion.l2 = bf16[8]{{0}} fusion(%fusion.l1), kind=kLoop, calls=%sum, {cost(30)}
}}

ENTRY %main (x: bf16[8]) -> bf16[8] {{
  %x.1 = bf16[8]{{0}} parameter(0)
  %known = (s32[], bf16[8]{{0}}) while(%x.1), condition=%condition, body=%body, \
metadata={{op_name="jit(step)/transpose(jvp())/while" stack_frame_id=2}}, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
  %data = (s32[], bf16[8]{{0}}) while(%known), condition=%condition, body=%body, \
metadata={{op_name="jit(step)/jvp()/while" stack_frame_id=5}}
  %branch = bf16[8]{{0}} conditional(%p, %x.1, %x.1), true_computation=%small, false_computation=%large, \
metadata={{op_name="jit(step)/add"}}
  %many = bf16[8]{{0}} conditional(%i, %x.1, %x.1, %x.1), branch_computations={{%large, %small, %large}}
  %called = bf16[8]{{0}} call(%x.1), to_apply=%small, metadata={{op_name="jit(step)/rematted_computation/x"}}
  %cut.1 = bf16[1,512]{{1,0}} fusion(%x.1), kind=kLoop, calls=%cut, {cost(7)}
  %turn.1 = f32[512,8]{{1,0}} fusion(%x.1), kind=kLoop, calls=%turn, {cost(5)}
  %gather.1 = bf16[64]{{0}} fusion(%x.1), kind=kCustom, calls=%gathered, {cost(3)}
  %free = bf16[8]{{0}} copy-start(%x.1)
  %dot.1 = bf16[128,512]{{1,0}} convolution(%l, %r), dim_labels=bf_io->bf, {cost(600)}
  %l = bf16[128,256]{{1,0}} parameter(1)
  %r = bf16[256,512]{{1,0}} parameter(2)
  %unknown.3 = bf16[8]{{0}} custom-call(%x.1), custom_call_target="tpu_custom_call", backend_config={{}}
  %buffer = bf16[8]{{0}} custom-call(%x.1), custom_call_target="AllocateBuffer"
  %far = bf16[16]{{0:T(128)}} concatenate(%x.1, %chip), dimensions={{0}}, metadata={{op_name="jit(step)/add"}}
  %chip = bf16[8]{{0:T(128)S(1)}} bitcast(%many)
  %placed = bf16[512,8]{{1,0}} dynamic-update-slice(%turn.1, %x.1, %i), metadata={{op_name="jit(step)/add"}}
  %added.1 = f32[512,8]{{1,0}} fusion(%turn.1, %i, %x.1), kind=kCustom, calls=%added, \
metadata={{op_name="jit(step)/add"}}
  %table = bf16[64]{{0}} all-gather(%x.1), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}
  ROOT %done = bf16[8]{{0}} copy(%many), metadata={{op_name="jit(step)/add"}}
}}
"""
TURNS = 3 + 4  # of the loops: annotated, and assumed
AT_PEAK = 2 * 128 * 256 * 512 / PEAK
BYTES = 819e9 / (197e12 / PEAK)  # per cycle
# Of what has no estimate: a concatenation of 8 values in the HBM and 8 on the chip, 8 values that are written into an
# array in place, a copy of 8, and 32 in float32 that are added to an array in place.
MOVED = {
    "far": 2 * (16 + 8) / BYTES, "placed": 2 * (8 + 8) / BYTES, "done": 2 * (8 + 8) / BYTES,
    "added": 4 * 3 * 32 / BYTES,
}  # fmt: skip


def test_cycles_are_summed_by_kind():
    """Loops by their turns, the largest branch, fusions by their own number, calls; what overlaps counts nothing."""
    found = estimate(parse(PROGRAM), V5E, unknown_trips=lambda _: 4)
    assert found is not None
    assert {kind: found.of_kind(kind) for kind in ("products", "elementwise", "copies", "slices", "collectives")} == {
        "products": TURNS * 1000 + 600, "elementwise": 80 + 80 + 70, "copies": TURNS * 10 + 5 + MOVED["done"],
        "slices": 7 + MOVED["far"] + MOVED["placed"] + MOVED["added"], "collectives": 3,
    }  # fmt: skip
    assert found.cycles == pytest.approx(TURNS * 1010 + 600 + 80 + 80 + 70 + 5 + 7 + 3 + sum(MOVED.values()))
    assert found.unestimated == pytest.approx(MOVED)
    assert found.at_peak("products") == (TURNS + 1) * AT_PEAK
    assert found.at_peak("elementwise", "copies") == 0
    assert found.trips == {"models/mlp.py:87 > projection.py:12": 4}
    assert (found.kernels, found.uncounted) == ({}, ["unknown"])


def test_passes_are_those_of_the_operation_or_of_the_loop_around_it():
    found = estimate(parse(PROGRAM), V5E, unknown_trips=lambda _: 4)
    assert found is not None
    parts = {part: sum(place.total for place in found.places if place.part == part) for part in PASSES}
    assert parts == {
        "backward": TURNS * 1000 + 3 * 10,  # the copies of the compiler have no operation
        "forward": 4 * 10,
        "optimizer": pytest.approx(80 + sum(MOVED.values())), "recomputed": 70, "other": 600 + 80 + 5 + 7 + 3,
    }  # fmt: skip


def test_a_text_without_estimates_has_none():
    assert estimate(parse(PROGRAM.replace("estimated_cycles", "cycles")), V5E, lambda _: 1) is None
    with pytest.raises(ValueError, match="no entry computation"):
        parse("HloModule step")


def test_what_the_compiler_could_not_estimate_counts_as_its_products_at_peak_or_its_bytes():
    figures = compiled_figures(parse(PROGRAM.replace('"1000"', f'"{2**63 - 1}"')), V5E, lambda _: 4, model_flops=None)
    written = 2 * 128 * 512 / BYTES  # its only operand is not in memory
    assert figures["kinds"]["products"]["cycles"] == pytest.approx(TURNS * max(AT_PEAK, written) + 600)
    assert figures["unestimated"] == pytest.approx({"fusion": TURNS * max(AT_PEAK, written), **MOVED})
    (note,) = [line for line in compiled_text(figures) if "without an estimate" in line]
    assert note.endswith("0.0 million cycles by bytes at HBM bandwidth, or products at peak (fusion 0.0)")


def test_the_profile_groups_by_kind_pass_and_source():
    found = estimate(parse(PROGRAM), V5E, unknown_trips=lambda _: 4)
    assert found is not None
    groups = profile(found)
    first, second = groups[:2]
    above = TURNS * (1000 - AT_PEAK)
    assert (first["kind"], first["pass"], first["source"]) == (
        "products", "backward", "models/mlp.py:87 > projection.py:79",
    )  # fmt: skip
    assert (first["cycles"], first["at_peak_cycles"]) == (TURNS * 1000, TURNS * AT_PEAK)
    assert first["above_peak_cycles"] == pytest.approx(above)
    assert [(one["name"], one["shape"], one["times"]) for one in first["instructions"]] == [
        ("fusion.1", "bf16[128,512]", 4), ("fusion.1", "bf16[128,512]", 3),
    ]  # fmt: skip
    assert (second["kind"], second["pass"], second["cycles"]) == ("products", "other", 600)
    assert sum(group["cycles"] for group in groups) == pytest.approx(found.cycles)
    assert groups == sorted(groups, key=lambda group: -group["above_peak_cycles"])
    json.dumps(groups)


def test_the_text_of_a_profile_names_figures_places_and_instructions():
    found = estimate(parse(PROGRAM.replace('"1000"', '"1000000000"')), V5E, unknown_trips=lambda _: 4)
    assert found is not None
    lines = profile_text(profile(found))
    assert lines[2].split() == [
        "7,000.0", "7,000.0", "0.0", "products", "backward", "models/mlp.py:87", ">", "projection.py:79",
    ]  # fmt: skip
    assert lines[3].strip() == "fusion.1 bf16[128,512], fusion.1 bf16[128,512]"
    assert lines[4].endswith("other       unknown")


def test_figures_of_a_program():
    figures = compiled_figures(parse(PROGRAM), V5E, unknown_trips=lambda _: 4, model_flops=PEAK * 2000.0)
    cycles = figures["cycles"]
    assert figures["clock_hz"] == pytest.approx(1.503e9, rel=1e-3)
    assert figures["seconds"] == pytest.approx(cycles / figures["clock_hz"])
    assert figures["mfu_bound"] == pytest.approx(2000 / cycles)
    assert figures["at_peak_share"] == pytest.approx((TURNS + 1) * AT_PEAK / cycles)
    assert figures["kinds"]["products"] == {"cycles": 7600, "at_peak_cycles": (TURNS + 1) * AT_PEAK}
    assert sum(one["cycles"] for one in figures["kinds"].values()) == pytest.approx(cycles)
    assert "attention" not in figures["kinds"]
    assert "profile" not in figures
    assert figures["uncounted_kernels"] == ["unknown"]
    json.dumps(figures)


def test_text_of_the_figures():
    figures = compiled_figures(parse(PROGRAM), V5E, unknown_trips=lambda _: 4, model_flops=PEAK * 2000.0, places=True)
    lines = [" ".join(line.split()) for line in compiled_text(figures | {"cycles": 2 * figures["cycles"]})]
    assert lines[0].startswith("compiler estimate")
    assert lines[1].startswith("products 0.0 48.0% 0.0")  # of twice the cycles
    assert any("GHz; at most 25% MFU; without waiting for the network" in line for line in lines)
    assert "not counted, FLOPs unknown: unknown" in lines
    assert "assumed 4 iterations of the loop at models/mlp.py:87 > projection.py:12, which depend on the data" in lines
    assert any(line.startswith("largest places above their peak") for line in lines)
    shares = figures | {"kernel_score_shares": {"a": 0.625, "b": 1.0}, "mfu_bound": None}
    (note,) = [line for line in compiled_text(shares) if "Pallas" in line]
    assert note.endswith("their FLOPs at peak, 62% of the scores (causal, by blocks)")
    assert not any("MFU" in line for line in compiled_text(shares))
    waiting = compiled_text(figures | {"waiting_seconds": 0.25})
    assert any("without 250.0 ms of collectives that nothing overlaps" in line for line in waiting)


@pytest.mark.parametrize(
    ("text", "chip", "reason"),
    [
        (PROGRAM, "h100", "the compiler for h100 writes none, only that of TPUs does"),
        (None, "v5e", "the compiler wrote no HLO text"),
        (PROGRAM.replace("estimated_cycles", "cycles"), "v6e", "the HLO text has none"),
    ],
)
def test_the_reason_is_told_where_there_is_no_estimate(text, chip, reason):
    program = None if text is None else parse(text)
    figures = compiled_figures(program, CHIPS[chip], unknown_trips=lambda _: 1, model_flops=1.0)
    assert figures == {"cycles": None, "reason": reason}
    assert compiled_text(figures) == [f"compiler's estimate of cycles: none, {reason}"]


def test_clocks_are_those_of_published_rates():
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items() if chip.clock is not None}
    assert clocks == {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75}
    assert all((chip.flops_per_cycle is None) == (chip.platform != "tpu") for chip in CHIPS.values())
