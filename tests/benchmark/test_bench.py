"""The benchmark's counts and summaries, and that each side runs. Asserts no times."""

import json
import os
import sys

import numpy as np
import pytest
from kit import ROOT

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
import bench  # noqa: E402
from benchmark import kit, server, train  # noqa: E402


def test_shapes_are_those_of_the_models():
    depths = {"tiny": 2, "44m": 12, "50m": 12, "135m": 30, "0.6b": 28, "1b": 16, "1.5b": 28, "2b": 24, "8b": 32}
    assert {name: shape[0] for name, shape in kit.SHAPES.items()} == depths
    config = kit.model_config("8b", "bfloat16")
    assert (config["hidden_size"], config["num_key_value_heads"], config["tie_word_embeddings"]) == (4096, 8, False)
    assert (config["model_type"], kit.model_config("0.6b", "bfloat16")["model_type"]) == ("llama", "qwen3")


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
    made = kit.make_kit(tmp_path / "kit", "tiny", rows, "float32")
    options = {
        "kit": str(made.folder), "batch_size": 2, "mode": "lora", "dtype": "float32", "steps": 2, "warmup": 1,
        "row_length": 128, "remat": "auto", "attention": "auto", "quantization": None, "conversations": 4,
        "param_dtype": "float32", "moments": "float32",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(TOOLS / "bench.py")])
    monkeypatch.setenv("XLA_FLAGS", os.environ["SFT_JAX_TEST_XLA_FLAGS"])
    assert train.run_process("ceiling", options, quiet=True)["gflops"] > 0  # in its own process
    one = server.Server("sft_jax", tmp_path)
    try:
        found = one("sft_jax", options)
        failed = one("sft_jax", options | {"kit": str(tmp_path / "nowhere")})
        late = one("sft_jax", options, seconds=0.2)
        after = one("device", {})
    finally:
        one.close()
    assert "error" not in found, found
    assert failed["error"].startswith("UserError: ")
    assert late["error"] == "took longer than 0 s"
    assert after["platform"] == "cpu"  # the next case is answered by a new process
    assert len(found["losses"]) == 4
    assert len(found["step_seconds"]) == 2
    assert all(0 < targets < real <= all_tokens for real, targets, all_tokens in zip(
        found["real_tokens"], found["target_tokens"], found["all_tokens"], strict=True))  # fmt: skip
    assert found["host_peak_bytes"] > 0


def test_attention_of_this_device(monkeypatch, capsys):
    """On a CPU only the XLA backend, in 16 bits against itself in 32."""
    arguments = "attention --tokens 64 --lengths 64 --heads 2 --kv-heads 1 --head-dims 16 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.split(), "--json"])
    bench.main()
    (found,) = json.loads(capsys.readouterr().out)
    assert found["backend"] == "xla"
    assert 0.001 < found["error"] < 0.03
    assert all(seconds > 0 for kind in ("short", "whole") for seconds in found[kind])
