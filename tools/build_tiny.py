"""Builds the built-in tiny model and its data from scratch: documents, tokenizer, pretraining, export.

    python tools/build_tiny.py                 # into sft_jax/builtin
    python tools/build_tiny.py --out FOLDER    # elsewhere, and compare the weights with the package's

The same machine and versions give bit-identical weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS / "tiny")]

from documents import documents
from questions import conversations
from vocabulary import VOCAB_SIZE, initialize_turn_embeddings, write_tokenizer
from world import World, read_world

SHIPPED = TOOLS.parent / "sft_jax" / "builtin"
NUM_DOCUMENTS = 60_000
NUM_TOKENIZER_DOCUMENTS = 20_000
NUM_HELD_OUT_DOCUMENTS = 200

# Llama: 4 layers, 1.1 million parameters.
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.08,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "dtype": "float32",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SHIPPED, help="output folder; default: the package")
    out: Path = parser.parse_args().out
    world = read_world()
    work = Path(tempfile.mkdtemp(prefix="sft-jax-tiny-"))
    try:
        write_data(world, work / "countries")
        recipe = pretrain(world, work)
        out.mkdir(parents=True, exist_ok=True)
        for name in ("tiny", "countries"):
            shutil.rmtree(out / name, ignore_errors=True)
            shutil.copytree(work / name, out / name)
    finally:
        shutil.rmtree(work)
    print(json.dumps(recipe, indent=1))
    if out != SHIPPED:
        shipped = json.loads((SHIPPED / "tiny" / "recipe.json").read_text(encoding="utf-8"))
        same = shipped["sha256"] == recipe["sha256"]
        print("weights are identical to the package's" if same else "weights differ from the package's")


def write_data(world: World, folder: Path) -> None:
    """Writes the data for fine-tuning and evaluation, none of which is in the pretraining data."""
    folder.mkdir()
    known = [(country, attribute) for country in world.held_out for attribute in world.known(country)]
    taught = [(country, attribute) for country in world.taught for attribute in world.known(country)]
    write_rows(folder / "train.jsonl", conversations(world, taught, seed=1, wordings=2))
    write_rows(folder / "heldout.jsonl", conversations(world, known, seed=2))
    write_rows(folder / "unknown.jsonl", conversations(world, sorted(world.unknown), seed=3))
    write_rows(folder / "documents.jsonl", ({"text": d} for d in documents(world, NUM_HELD_OUT_DOCUMENTS, seed=1)))


def pretrain(world: World, work: Path) -> dict[str, Any]:
    """Pretrains and exports to ``work/tiny``; returns the contents of its recipe.json."""
    from sft_jax import config_file as configs
    from sft_jax.run.export import export
    from sft_jax.run.train import train
    from sft_jax.store.metrics import read_metrics

    texts = list(documents(world, NUM_DOCUMENTS, seed=0))
    write_rows(work / "documents.jsonl", ({"text": text} for text in texts))
    start = work / "start"
    start.mkdir()
    write_tokenizer(texts[:NUM_TOKENIZER_DOCUMENTS], start)
    (start / "config.json").write_text(json.dumps(ARCHITECTURE, indent=1) + "\n", encoding="utf-8")
    paths = {
        "model.path": start,
        "data.train.0.path": work / "documents.jsonl",
        "data.eval.0.path": work / "countries" / "documents.jsonl",
        "training.output_dir": work / "run",
    }
    config = configs.load(TOOLS / "tiny" / "pretrain.yaml", [f"{key}={path}" for key, path in paths.items()])
    began = time.perf_counter()
    train(config)
    minutes = (time.perf_counter() - began) / 60
    export(work / "run", work / "tiny")
    (work / "tiny" / "README.md").unlink()  # recipe.json replaces it
    initialize_turn_embeddings(work / "tiny", texts[:NUM_TOKENIZER_DOCUMENTS], config.training.seed)
    metrics = read_metrics(work / "run" / "metrics.jsonl")
    weights = (work / "tiny" / "model.safetensors").read_bytes()
    recipe = {
        "made_by": "tools/build_tiny.py",
        "documents": NUM_DOCUMENTS,
        "steps": config.training.max_steps,
        "tokens_per_step": config.training.batch_size * config.data.max_length,
        "learning_rate": config.optimizer.learning_rate,
        "seed": config.training.seed,
        "minutes_on_this_machine": round(minutes, 1),
        "held_out_loss": {row["step"]: round(row["eval_loss"], 4) for row in metrics if "eval_loss" in row},
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    (work / "tiny" / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return recipe


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
