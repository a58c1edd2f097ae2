"""The grid of the benchmark: its cases and their order, what it skips, resumes and compares. Asserts no times."""

import json
import os
import sys

import pytest
from kit import ROOT

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
import bench  # noqa: E402
from benchmark import grid, kit, room, table  # noqa: E402
from benchmark.cases import COMPARED_LOAD, LOADS, PUBLISHED_LOAD, SHAPES, Case, Load, cases  # noqa: E402


def test_generated_documents_have_the_lengths_asked_for(tmp_path):
    """Long ones fill the sequence exactly, short ones have the lengths of GSM8K; both are the same in each run."""
    made = [kit.make_kit(tmp_path / name, "tiny", None, "float32", "long", 96) for name in ("one", "other")]
    assert set(made[0].lengths) == {96}
    assert (made[0].targets > 40).all()
    assert (made[0].targets < 80).all()
    texts = [(one.folder / one.rows).read_bytes() for one in made]
    assert texts[0] == texts[1]
    short = kit.make_kit(tmp_path / "one", "tiny", None, "float32", "short", 2048)
    assert 140 < short.lengths.mean() < 160
    assert short.lengths.max() <= 500


def test_the_most_important_cases_come_first():
    """The published figures, then the ten pairs with TRL, and all loads of all shapes after them."""
    listed = cases(SHAPES, ["lora", "qlora", "full"], ["bfloat16", "fp8"])
    assert len(listed) == len(set(listed))
    assert [one.name() for one in listed[:6]] == [
        f"{shape} {mode} {precision} long:4096x4"
        for shape, mode in (("8b", "lora"), ("8b", "full"), ("1.5b", "full"))
        for precision in ("bfloat16", "fp8")
    ]
    sides = ["sft_jax", "trl, checkpointing", "sft_jax, recomputing", "trl"]
    pairs = [("8b", "lora"), ("8b", "full"), ("1b", "lora"), ("1b", "full")]
    assert listed[6:22] == [
        Case(shape, mode, "bfloat16", COMPARED_LOAD, side) for shape, mode in pairs for side in sides
    ]
    assert {one.load for one in listed} == set(LOADS)
    assert {one.load.sequences for one in listed} >= {1, 16}
    assert not [one for one in listed if one.side != "sft_jax" and one.precision == "fp8"]


def test_sides_that_are_asked_for():
    given = ([("tiny")], ["lora"], ["bfloat16"], [PUBLISHED_LOAD])
    assert [one.side for one in cases(*given)] == ["sft_jax"]
    assert [one.side for one in cases(*given, [PUBLISHED_LOAD], sparing="no")] == ["sft_jax", "trl, checkpointing"]
    assert [one.side for one in cases(*given, [PUBLISHED_LOAD], sparing="only")] == ["sft_jax, recomputing", "trl"]
    both = cases(*given, [PUBLISHED_LOAD], with_trl=False)
    assert [one.side for one in both] == ["sft_jax", "sft_jax, recomputing"]
    with pytest.raises(ValueError, match="'medium:2048x8' is not such as short:2048x8"):
        Load.parse("medium:2048x8")


def _record(side, speed, memory, precision="bfloat16", load="short:2048x8", shape="1b", mode="lora"):
    run = {"device_peak_bytes": memory, "host_peak_bytes": 1} if memory else {"error": "too large"}
    return {
        "shape": shape, "mode": mode, "precision": precision, "load": load, "side": side, "tokens_per_second": speed,
        "run": run,
    }  # fmt: skip


def test_like_is_compared_with_like():
    """Ratios skip failed cases and cover exactly the pairs with equal shape, method and load."""
    found = table.ratios(
        [
            _record("sft_jax", 300.0, 6e9),
            _record("trl, checkpointing", 100.0, 3e9),
            _record("sft_jax, recomputing", 200.0, 2e9),
            _record("sft_jax", 400.0, 6e9, precision="fp8"),
            _record("trl", 0.0, 0),
            _record("trl, checkpointing", 50.0, 3e9, load="short:8192x2"),
        ]
    )
    assert [table.ratio_line(one) for one in found] == [
        "1b lora bfloat16 short:2048x8: sft_jax / trl, checkpointing: 3.00 × the real tokens/s, 2.00 × the peak memory",
        "1b lora bfloat16 short:2048x8: sft_jax, recomputing / trl, checkpointing: 2.00 × the real tokens/s, "
        "0.67 × the peak memory",
        "1b lora fp8 short:2048x8: sft_jax / trl, checkpointing (bfloat16): 4.00 × the real tokens/s, "
        "2.00 × the peak memory",
    ]


def test_published_figures_stand_beside_the_same_load():
    def lines(load):
        record = _record("sft_jax", 18_900.0, 1e9, load=load, shape="8b")
        groups = {one["case"]: one for one in table.published([record])}
        return "\n".join(table.published_lines(groups["8b lora bfloat16 long:4096x4"]))

    assert "not measured" in lines("short:2048x8")
    beside = lines(str(PUBLISHED_LOAD))
    assert "8b lora bfloat16 long:4096x4: 18,900 tokens/s" in beside
    assert "goal on one H200: 18,000, reached (1.05 ×)" in beside
    assert "NVIDIA NeMo: 17,809 (Llama-3-8B, 8 × H100, a GPU's share, sequences of 4,096), 1.06 ×" in beside
    facts = json.loads(table.PUBLISHED.read_text())["published"]
    assert all(fact["source"] and fact["hardware"] and fact["precision"] for fact in facts)


def _bench(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", [str(TOOLS / "bench.py"), *arguments.split()])
    bench.main()


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch, capsys):
    """By plan's arithmetic: full fine-tuning of 1B takes over 8 bytes a weight, and a base in nf4 about half of one."""
    loads = "--precisions bfloat16 --loads short:2048x8"
    _bench(monkeypatch, f"grid --list rtx-4090 --self-only --sparing no --shapes 8b --modes full qlora {loads}")
    full, qlora = capsys.readouterr().out.splitlines()[::-1]
    assert "skipped: needs at least" in full + qlora
    for line in (full, qlora):
        assert ("skipped: needs at least" in line) == (" full " in line), line


def test_an_accelerator_is_needed_for_large_shapes(tmp_path, monkeypatch, capsys):
    """Without one it exits before it writes models of many GB."""
    out, made = tmp_path / "out", tmp_path / "kit"
    with pytest.raises(SystemExit, match=r"nothing was measured: 8b, 1b, 0\.6b, 1\.5b need an accelerator"):
        _bench(monkeypatch, f"grid --self-only --out {out} --kit {made}")
    assert not out.exists()
    assert not made.exists()
    assert capsys.readouterr().out == ""


def test_a_second_run_measures_the_rest(tmp_path, monkeypatch, capsys):
    """Nothing is measured past the limit, and no case twice; a failed one is repeated on request."""
    asked = []
    run = {
        "step_seconds": [1.0, 1.0], "real_tokens": [100, 100], "target_tokens": [50, 50], "device_peak_bytes": 10**9,
    }  # fmt: skip

    class Server:
        def __init__(self, who, scratch):
            pass

        def __call__(self, what, options, seconds=0.0):
            if what == "device":
                return {"platform": "gpu", "device": "a card", "usable_bytes": 10**10}
            if what == "ceiling":
                return {"gflops": 1000.0, "device": "a card"}
            asked.append(options["mode"])
            return run if options["mode"] == "lora" else {"error": "does not fit"}

        def close(self):
            pass

    monkeypatch.setattr(grid, "Server", Server)
    arguments = (
        f"grid --self-only --sparing no --out {tmp_path / 'out'} --kit {tmp_path} --shapes tiny --modes lora full "
        "--precisions float32 --loads long:96x1"
    )
    for extra, expected in (("--minutes 0", []), ("", ["lora", "full"]), ("", []), ("--retry", ["full"])):
        asked.clear()
        _bench(monkeypatch, f"{arguments} {extra}")
        assert asked == expected
        lines = capsys.readouterr().out
        if extra == "--minutes 0":
            assert "2 cases not measured: past the limit of 0 minutes; the same command measures them" in lines
        else:
            assert "tiny full float32 long:96x1  sft_jax".ljust(56) + "  does not fit\n" in lines
            assert "tiny lora float32 long:96x1  sft_jax".ljust(56) + f"{100:15,}" in lines
    written = [json.loads(line) for line in (tmp_path / "out" / "grid.jsonl").read_text().splitlines()]
    assert [one["mode"] for one in written] == ["lora", "full", "full"]
    whole = json.loads((tmp_path / "out" / "grid.json").read_text())
    assert [one["mode"] for one in whole["cases"]] == ["lora", "full"]


def test_it_runs_to_the_end_on_a_cpu(tmp_path, monkeypatch, capsys):
    """Both sides, really; precisions that this version or TRL does not have are named with the reason."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["SFT_JAX_TEST_XLA_FLAGS"])
    monkeypatch.setattr(room, "unavailable", lambda options: "no such thing" if options["compute"] else None)
    _bench(
        monkeypatch,
        f"grid --tiny --sparing no --modes lora --loads short:128x2 --compare short:128x2 --out {tmp_path / 'out'}",
    )
    text = capsys.readouterr().out
    whole = json.loads((tmp_path / "out" / "grid.json").read_text())
    ours, theirs, eight = whole["cases"]
    assert (ours["side"], theirs["side"]) == ("sft_jax", "trl, checkpointing")
    for one in (ours, theirs):
        assert one["tokens_per_second"] > 0, one
        assert len(one["run"]["step_seconds"]) == 2
    assert eight["run"]["error"] == "not available: no such thing"
    assert len(whole["ratios"]) == 1
    assert "tiny lora bfloat16 short:128x2: sft_jax / trl, checkpointing: " in text
    assert "goal on one H200: 18,000" in text
