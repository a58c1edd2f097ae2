"""The ``plan`` command: output, user errors, all recipes, and a step compiled for TPUs."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from kit import ROOT, process, run_config, sft_jax

from sft_jax.builtin import architecture
from sft_jax.builtin.recipes import recipes
from sft_jax.cli import main
from sft_jax.config_file import load
from sft_jax.errors import UserError
from sft_jax.planning.chips import CHIPS
from sft_jax.planning.plan import Assumptions, plan
from sft_jax.planning.text import plan_text
from sft_jax.planning.topology import parse_topology

RECIPES = recipes()
sys.path.insert(0, str(ROOT / "tools"))
import plan_recipes  # noqa: E402

KEYS = {
    "topology", "num_devices", "fits", "peak_bytes", "argument_bytes", "temp_bytes", "hbm_bytes",
    "model_flops_per_step", "roofline_step_seconds", "bound", "compile_seconds",
}  # fmt: skip


def write_config(tmp_path, tiny) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{path: {tiny}, dtype: bfloat16}}\n"
        "data: {train: [{path: none.jsonl}], max_length: 128}\n"
        "training: {output_dir: run, batch_size: 8}\n"
    )
    return path


def test_a_step_is_compiled_for_tpus(tiny, tmp_path):
    """Compiles ahead of time with the real compiler: splash attention, collectives, memory, all keys."""
    config = write_config(tmp_path, tiny)
    done = process(
        "plan", config, "mesh.tensor=2", "--topology", "v5e:2x2", "--profile", "--json", timeout=600, XLA_FLAGS=""
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) >= KEYS
    assert (found["topology"], found["num_devices"], found["fits"]) == ("v5e:2x2", 4, True)
    assert (found["mesh"]["fsdp"], found["mesh"]["tensor"]) == (2, 2)
    assert found["attention"].startswith("splash")
    assert found["remat"] == "dots"  # the first of auto
    assert 0 < found["argument_bytes"] < found["peak_bytes"] < found["hbm_bytes"]
    assert found["temp_bytes"] > 0
    kinds = {one["kind"] for one in found["collectives"]}
    assert kinds & {"all-gather", "all-reduce"}
    assert all(one["count"] >= 1 and one["bytes"] > 0 for one in found["collectives"])
    assert found["roofline_step_seconds"] == max(found[f"{name}_seconds"] for name in ("compute", "memory", "network"))
    assert "compiling the step for v5e:2x2" in done.stderr
    time = found["compiled"]
    assert set(time["kinds"]) >= {"products", "attention", "elementwise", "copies"}
    assert sum(one["cycles"] for one in time["kinds"].values()) == pytest.approx(time["cycles"])
    assert time["seconds"] == pytest.approx(time["cycles"] / 1.503e9, rel=1e-3)
    assert time["mfu_bound"] == pytest.approx(found["model_flops_per_step"] / 4 / (time["seconds"] * 197e12))
    assert list(time["assumed_trips"].values()) == [4]  # 256 supervised tokens on a chip, 64 at a time
    assert time["uncounted_kernels"] == []
    assert sum(group["cycles"] for group in time["profile"]) == pytest.approx(time["cycles"])
    assert {"forward", "backward", "optimizer"} <= {group["pass"] for group in time["profile"]}
    assert any(re.search(r"mlp\.py:\d+", group["source"]) for group in time["profile"])
    assert not any("planning/" in group["source"] for group in time["profile"])
    text = plan_text(found)
    for words in (
        "frozen weights",
        "trained weights",
        "optimizer",
        "gradients",
        "peak",
        "room left",
        "tokens/s",
        "compiler estimate",
        "largest places above their peak",
        "fits",
    ):
        assert words in text


@pytest.mark.parametrize("full", [False, True])
def test_sharded_weights_are_all_gathered(tmp_path, full):
    """The compiler does not replace all-gathers of weights by permutations; gradients are scattered in float32."""
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "vocab_size": 1024}
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False} | size))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{path: none/none, remat: full, param_dtype: {'bfloat16' if full else 'float32'}}}\n"
        f"lora: {'null' if full else '{}'}\n"
        "data: {train: [{path: none.jsonl}], max_length: 1024}\n"
        "training: {output_dir: run, batch_size: 16}\n"
    )
    options = ["--topology", "v5e:4x4", "--architecture", path, "--no-advice", "--json"]
    done = process("plan", config, *options, timeout=600, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sent = {one["kind"]: one["bytes"] for one in found["collectives"]}
    weights = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    assert sent["all-gather"] > 2 * 2 * weights * 15 / 16  # bfloat16, for the forward and for the backward pass
    assert "collective-permute" not in sent
    if full:  # a stage of a small gradient may be an all-reduce
        scattered = sent["reduce-scatter"] + sent["all-reduce"] / 2
        assert sent["reduce-scatter"] > 0.8 * weights * 4
        assert weights * 4 * 15 / 16 <= scattered < 1.2 * weights * 4


def test_the_size_of_a_step_that_does_not_fit_is_reported(tiny, tmp_path):
    """The batch is too large for a chip: the compiler raises, and the command reports the peak."""
    config = write_config(tmp_path, tiny)
    big = ["data.max_length=512", "training.batch_size=262144", "model.remat=full"]
    done = process("plan", config, *big, "--topology", "v5e:1", "--json", "--no-advice", timeout=600, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["fits"]
    assert found["peak_bytes"] > found["hbm_bytes"]
    assert "does not fit" in plan_text(found)


PLAN = {
    "topology": "v5e:4x4", "num_devices": 16, "mesh": {"data": 1, "fsdp": 16}, "fits": False, "peak_bytes": 20 * 2**30,
    "argument_bytes": 12 * 2**30, "temp_bytes": 8 * 2**30, "spare_bytes": 2**30, "room_bytes": -5 * 2**30,
    "hbm_bytes": 16 * 2**30, "usable_bytes": 16 * 2**30,
    "part_bytes": {"frozen": 10 * 2**30, "trained": 2**30, "optimizer": 2**29, "batch": 0, "gradients": 2**30},
    "remat": "dots", "attention": "splash", "rows_at_a_time": 2, "tokens_per_step": 65536, "target_share": 0.5,
    "document_length": 2048, "collectives": None, "model_flops_per_step": 1e15, "flops_per_step": 1.25e15,
    "compute_seconds": 0.5, "memory_seconds": 0.25, "network_seconds": None, "roofline_step_seconds": 0.5,
    "roofline_tokens_per_second": 131072.0, "bound": "compute", "compile_seconds": 60.0, "compile_cpu_seconds": 70.0,
    "compiled": {"cycles": None, "reason": "none"},
}  # fmt: skip


def test_plan_text_has_all_figures():
    """Memory by subtraction, advice, unknown figures, and the table of the search."""
    tried = [{"changes": "model.remat=full", "topology": "v5e:4x4", "fits": False, "peak_bytes": 17 * 2**30}]
    advice = {"changes": "model.remat=full", "topology": "v5e:4x8", "peak_bytes": 15 * 2**30, "tried": tried}
    found = [
        {
            "changes": "mesh.fsdp=16", "fits": True, "peak_bytes": 2**30,
            "predicted_tokens_per_second": 163840.0, "bound": "network", "ranked_by": "cycles",
        },
        {"changes": "mesh.data=2", "fits": False},
    ]  # fmt: skip
    lines = plan_text(PLAN | {"advice": advice, "search": found}).splitlines()
    shown = {" ".join(line.split()) for line in lines}
    assert {
        "padding of the above 512",
        "gradients 1,024",
        "activations, temporaries 7,168",
        "room left -5,120",
    } <= shown
    assert any("1,024 MiB kept as headroom" in line for line in lines)
    assert "does not fit; fits with model.remat=full --topology v5e:4x8; peak 15,360 MiB" in shown
    assert any("163,840 tokens/s" in line and line.endswith("mesh.fsdp=16") for line in lines)
    assert any("network not counted" in line for line in lines)
    assert "compiler's estimate of cycles: none, none" in shown
    assert any(line.startswith("search: ") and "by the compiler's estimate of cycles" in line for line in lines)
    by_formula = plan_text(PLAN | {"search": [found[0] | {"ranked_by": "roofline"}]})
    assert "by their rooflines, since the compiler estimates no cycles" in by_formula
    assert any("25% more" in line for line in lines)
    sent = {"kind": "all-gather", "count": 3.0, "bytes": 8 * 2**20, "bytes_between_hosts": 0.0}
    within, across = (plan_text(PLAN | {"collectives": [sent | more]}) for more in ({}, {"bytes_between_hosts": 2**20}))
    assert "to other hosts" not in within
    assert any(line.split() == ["all-gather", "3", "8", "1"] for line in across.splitlines())
    nothing = plan_text(PLAN | {"advice": advice | {"changes": None}})
    assert nothing.endswith("no change that was tried makes it fit: model.remat=full on v5e:4x4")
    assert "too large" in plan_text(
        PLAN | {"peak_bytes": None, "argument_bytes": None, "temp_bytes": None, "spare_bytes": None, "room_bytes": None}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v9:4x4"], "known are v5e, v5p"),
        (["--topology", "v5e:2x2", "--target-share", "0"], "--target-share"),
        (["--topology", "v5e:2x2", "--document-length", "0"], "--document-length"),
        (["--topology", "v5e:2x2", "--architecture", "none.json"], "no such file none.json"),
        (["model.path=some/where", "--topology", "v5e:2x2"], "--architecture FILE"),
    ],
)
def test_a_user_error_is_one_line(tiny, tmp_path, capsys, options, message):
    assert main(["plan", str(write_config(tmp_path, tiny)), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sft-jax: ")
    assert message in line


def test_plan_refuses_what_train_refuses(tiny, tmp_path):
    done = sft_jax("plan", write_config(tmp_path, tiny), "training.batch_size=6", "--topology", "v5e:2x2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("sft-jax: training.batch_size: 6 sequences")


def test_the_error_for_a_missing_compiler_names_the_package(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = run_config(tiny)
    with pytest.raises(UserError, match="pip install libtpu"):
        plan(config, "v5e:2x2", quiet=True)
    with pytest.raises(UserError, match="pip install 'sft-jax"):
        plan(config, "h100:1", quiet=True)


def test_documents_are_no_longer_than_sequences(tiny):
    assert Assumptions().length(run_config(tiny)) == 128
    assert Assumptions(document_length=64).length(run_config(tiny)) == 64
    assert Assumptions(document_length=4096).length(run_config(tiny)) == 128


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_loads(recipe):
    """It is a valid config of a known model, its batch divides over its chips, and its header may have a plan."""
    config = load(f"builtin:{recipe.name}")
    result, where = recipe.plan, parse_topology(recipe.topology)
    assert architecture(config.model.path).is_file()
    assert recipe.model == config.model.path
    assert config.training.output_dir == f"runs/{recipe.name}"
    text = recipe.path.read_text()
    assert f"sft-jax train builtin:{recipe.name} data.train=train.jsonl" in text
    assert f"sft-jax plan builtin:{recipe.name}\n" in text
    rows = config.training.batch_size // config.training.num_microbatches
    assert rows % (where.num_devices // config.mesh.tensor) == 0
    assert result == plan_recipes.NOT_MEASURED or result.startswith("fits, peak "), result


def test_the_table_of_plans_is_updated_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_recipes, "PLANS", tmp_path / "PLANS.md")
    empty = plan_recipes.read_table()
    assert len(empty) == 25
    assert all(row[2] == "not measured" for row in empty.values())
    found = {
        "fits": True, "peak_bytes": 3 * 2**30, "usable_bytes": CHIPS["v5e"].hbm_bytes, "remat": "full",
        "roofline_step_seconds": 0.5, "roofline_tokens_per_second": 1e5, "bound": "compute",
        "compile_cpu_seconds": 12.3, "compiled": {"cycles": 6e8, "seconds": 0.625, "waiting_seconds": 0.01},
    }  # fmt: skip
    key = ("Llama-3.1-8B LoRA", "v5e:4x4")
    plan_recipes.write_tables(empty | {key: plan_recipes.as_row(*key, found)})
    again = plan_recipes.read_table()
    assert again[key][:4] == (*key, "yes", "3,072")
    assert sum(row[2] == "not measured" for row in again.values()) == 24
    assert again[key][-2:] == ("635 ms", "12 s")
    assert plan_recipes.as_line(found).startswith("fits, peak 3,072 of ")
    assert "the compiler estimates 635 ms;" in plan_recipes.as_line(found)
    assert plan_recipes.as_row(*key, found | {"compiled": {"cycles": None, "reason": "…"}})[-2:] == ("none", "12 s")
    listed = re.findall(r"^\| \[([\w.-]+)\]", plan_recipes.PLANS.read_text(), re.MULTILINE)
    assert listed == [recipe.name for recipe in RECIPES]
