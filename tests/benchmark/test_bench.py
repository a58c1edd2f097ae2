"""The benchmark's counts and summaries, and that each side runs. Asserts no times."""

import json
import os
import re
import sys

import numpy as np
import pytest
from kit import ROOT

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
import bench  # noqa: E402
from benchmark import grid, kit, train  # noqa: E402


def test_shapes_are_those_of_the_models():
    depths = {"50m": 12, "135m": 30, "1b": 16, "2b": 24, "8b": 32}
    assert {name: shape[0] for name, shape in kit.SHAPES.items()} == depths
    config = kit.model_config("8b", "bfloat16")
    assert (config["hidden_size"], config["num_key_value_heads"], config["tie_word_embeddings"]) == (4096, 8, False)


def test_summary_and_text():
    """Ratios are of medians; missing values are shown as not measured."""

    def run(seconds, memory):
        return {
            "real_tokens": [100, 100], "target_tokens": [50, 50], "all_tokens": [125, 125], "losses": [2.0, 1.0],
            "step_seconds": [seconds, seconds], "host_peak_bytes": memory, "device_peak_bytes": None,
            "seconds_to_first_step": 3.0,
        }  # fmt: skip

    side = train.summarize([run(1.0, 4e9), run(2.0, 2e9), run(4.0, 3e9)])
    assert side["tokens_per_second"] == {"median": 50.0, "low": 25.0, "high": 100.0}
    assert side["host_peak_bytes"]["median"] == 3e9
    assert side["filled"]["median"] == pytest.approx(0.8)
    assert side["device_peak_bytes"] is None
    result = {
        "options": {"shape": "50m", "mode": "lora", "dtype": "float32", "rounds": "3"},
        "machine": {"device": "cpu", "cpu": "one", "cores": 2},
        "sides": {"sft_jax": side},
        "ratios": {},
        "model_gflops": 10.0,
        "share_of_ceiling": 0.5,
        "ceiling_gflops": 20.0,
    }
    text = train.as_text(result)
    assert "50 (25–100)" in text
    assert train.NOT_MEASURED in text
    assert "50.0%" in text


def test_a_side_runs(tmp_path, monkeypatch):
    """This library runs in its own process on a small kit and returns tokens, losses, times and memory, or an error."""
    rows = tmp_path / "rows.jsonl"
    rng = np.random.default_rng(0)
    words = [" ".join(str(n) for n in rng.integers(0, 100, 12)) for _ in range(40)]
    rows.write_text("".join(json.dumps({"question": w, "answer": w[::-1]}) + "\n" for w in words))
    kit.SHAPES["tiny"] = (1, 16, 2, 1, 8, 32, 400, True)
    made = kit.make_kit(tmp_path / "kit", "tiny", rows, "float32")
    options = {
        "kit": str(made.folder), "batch_size": 2, "mode": "lora", "dtype": "float32", "steps": 2, "warmup": 1,
        "row_length": 128, "remat": "auto", "attention": "auto", "quantization": None, "conversations": 4,
        "param_dtype": "float32", "moments": "float32",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(TOOLS / "bench.py")])
    monkeypatch.setenv("XLA_FLAGS", os.environ["SFT_JAX_TEST_XLA_FLAGS"])
    assert train.run_process("ceiling", options, quiet=True)["gflops"] > 0  # in its own process
    server = grid.Server("sft_jax", tmp_path)
    try:
        found = server("sft_jax", options)
        failed = server("sft_jax", options | {"kit": str(tmp_path / "nowhere")})
    finally:
        server.close()
    assert "error" not in found, found
    assert failed["error"].startswith("UserError: ")
    assert len(found["losses"]) == 4
    assert len(found["step_seconds"]) == 2
    assert all(0 < targets < real <= all_tokens for real, targets, all_tokens in zip(
        found["real_tokens"], found["target_tokens"], found["all_tokens"], strict=True))  # fmt: skip
    assert found["host_peak_bytes"] > 0


def test_grid_compares_like_with_like():
    """Ratios skip failed cases and cover exactly the pairs with equal shape, method and length."""

    def case(who, how, speed, memory, length=2048):
        run = {"device_peak_bytes": memory, "host_peak_bytes": 1} if memory else {"error": "too large"}
        return {
            "shape": "1b", "mode": "lora", "length": length, "who": who, "how": how, "tokens_per_second": speed,
            "run": run,
        }  # fmt: skip

    lines = grid._ratios(
        [
            case("sft_jax", {"remat": "auto"}, 300.0, 6e9),
            case("trl", {"checkpointing": True}, 100.0, 3e9),
            case("sft_jax", {"remat": "full"}, 200.0, 2e9),
            case("trl", {"checkpointing": False}, 0.0, 0),
            case("trl", {"checkpointing": True}, 50.0, 3e9, length=8192),
        ]
    )
    assert lines == [
        "1b lora 2,048: sft_jax / trl, checkpointing: 3.00 × the real tokens/s, 2.00 × the peak memory",
        "1b lora 2,048: sft_jax, recomputing / trl, checkpointing: 2.00 × the real tokens/s, 0.67 × the peak memory",
    ]


def test_grid_needs_an_accelerator(tmp_path, monkeypatch, capsys):
    """Without one it exits before it writes models of many GB."""
    out, made = tmp_path / "out", tmp_path / "kit"
    arguments = f"grid --rows {tmp_path / 'no.jsonl'} --self-only --out {out} --kit {made}"
    monkeypatch.setattr(sys, "argv", [str(TOOLS / "bench.py"), *arguments.split()])
    with pytest.raises(SystemExit, match="nothing was measured: 1b, 8b need an accelerator"):
        bench.main()
    assert not out.exists()
    assert not made.exists()
    assert capsys.readouterr().out == ""


def test_grid_reports_cases_past_the_time_limit(tmp_path, monkeypatch, capsys):
    """Each case has a line on the screen and in the file; the figures of other cases are kept."""
    answers = {
        "device": {"platform": "gpu"},
        "ceiling": {"gflops": 1000.0, "device": "a card"},
        "sft_jax": {"error": "does not fit"},
    }

    class Server:
        def __init__(self, who, scratch):
            pass

        def __call__(self, what, options):
            return answers[what]

        def close(self):
            pass

    kit.SHAPES["tiny"] = (1, 16, 2, 1, 8, 32, 400, True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i}+{i}", "answer": str(2 * i)}) + "\n" for i in range(40)))
    monkeypatch.setattr(grid, "Server", Server)
    arguments = f"grid --rows {rows} --self-only --out {tmp_path} --shapes tiny --lengths 64 --modes lora"
    for minutes, message in (("10", "does not fit"), ("0", "not measured: past the limit of 0 minutes")):
        monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.split(), "--minutes", minutes])
        bench.main()
        assert re.search(rf"^tiny lora 64  sft_jax +{message}$", capsys.readouterr().out, re.MULTILINE)
    assert [json.loads(line)["run"]["error"] for line in (tmp_path / "grid.jsonl").read_text().splitlines()] == [
        "does not fit", "not measured: past the limit of 0 minutes",
    ]  # fmt: skip


def test_attention_of_this_device(monkeypatch, capsys):
    """On a CPU only the XLA backend, in 16 bits against itself in 32."""
    arguments = "attention --tokens 64 --lengths 64 --heads 2 --kv-heads 1 --head-dims 16 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.split(), "--json"])
    bench.main()
    (found,) = json.loads(capsys.readouterr().out)
    assert found["backend"] == "xla"
    assert 0.001 < found["error"] < 0.03
    assert all(seconds > 0 for kind in ("short", "whole") for seconds in found[kind])
