"""SFT teaches a small pretrained model to answer and to stop, on real instruction data.

``pytest -n0 -s -m drill tests/drills/test_real.py`` prints the figures.
"""

import json

import numpy as np
import pytest
import torch
from kit import ROOT, process, run_config, write_jsonl
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_jax import config_file as configs
from sft_jax.config import LoraConfig, SourceConfig

NUM_BOUNDARIES, NUM_GENERATIONS, CONTEXT = 150, 40, 512


def gsm8k(path):
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]


@pytest.fixture(scope="module")
def material(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    write_jsonl(folder / "train.jsonl", gsm8k(data_dir / "gsm8k" / "train.jsonl"))
    write_jsonl(folder / "test.jsonl", gsm8k(data_dir / "gsm8k" / "test.jsonl"))
    return folder


def run(material, data_dir, name, **changes):
    config = run_config(
        data_dir / "models" / "stories260K",
        material / "train.jsonl",
        material / name,
        data__eval=[SourceConfig(path=str(material / "held_out.jsonl"))],
        model__remat="none",
        data__max_length=256,
        data__chat_template=str(ROOT / "configs" / "chatml.jinja"),
        data__added_tokens=["<|im_start|>", "<|im_end|>"],
        training__batch_size=8,
        training__eval_every=1000,
        **changes,
    )
    write_jsonl(material / "held_out.jsonl", gsm8k(data_dir / "gsm8k" / "test.jsonl")[:200])
    configs.save(config, material / f"{name}.yaml")
    done = process("train", material / f"{name}.yaml", timeout=900, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    return material / name


def held_out_behaviour(model, folder, material) -> tuple[float, float]:
    """Median probability of the stop token at the end of held-out answers; share of greedy answers that stop."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = [json.loads(line)["messages"] for line in (material / "test.jsonl").read_text().splitlines()]
    quiet = {"tokenizer_kwargs": {"verbose": False}}
    probabilities = []
    with torch.no_grad():
        for messages in rows:
            encoded = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, **quiet
            )
            if len(encoded["input_ids"]) <= 256 and len(probabilities) < NUM_BOUNDARIES:
                end = max(i for i, trained in enumerate(encoded["assistant_masks"]) if trained)
                assert encoded["input_ids"][end] == stop
                logits = model(torch.tensor([encoded["input_ids"]])).logits[0, end - 1]
                probabilities.append(logits.softmax(-1)[stop].item())
    assert len(probabilities) == NUM_BOUNDARIES
    tokenizer.padding_side, tokenizer.pad_token = "left", "<unk>"
    prompts = tokenizer.apply_chat_template(
        [messages[:1] for messages in rows[:NUM_GENERATIONS]],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    answers = model.generate(**prompts, max_length=CONTEXT, do_sample=False, eos_token_id=stop, pad_token_id=0)
    stopped = (answers[:, prompts["input_ids"].shape[1] :] == stop).any(dim=1)
    return float(np.median(probabilities)), float(stopped.float().mean())


@pytest.mark.drill("sft_jax")
def test_base_lora_full(material, data_dir):
    full = {"lora": None, "optimizer__schedule": "cosine", "optimizer__learning_rate": 5e-3}
    lora = {"lora": LoraConfig(rank=16, alpha=32.0), "optimizer__schedule": "cosine", "optimizer__learning_rate": 5e-3}
    figures = {}
    for name, steps, settings in (("base", 0, full), ("lora", 300, lora), ("full", 300, full)):
        folder = run(material, data_dir, name, training__max_steps=steps, **settings)
        out = material / f"{name}-export"
        exported = process("export", folder, out)
        assert exported.returncode == 0, exported.stderr
        load = AutoPeftModelForCausalLM if name == "lora" else AutoModelForCausalLM
        stop_probability, stop_share = held_out_behaviour(load.from_pretrained(out).eval(), out, material)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
        figures[name] = {"held_out_loss": held_out[-1], "stop_probability": stop_probability, "stop_share": stop_share}
        print(name, json.dumps(figures[name]))
        if name != "base":
            training = [row["loss"] for row in rows if "loss" in row]
            assert np.mean(training[-20:]) < np.mean(training[:20]) - 1
            assert held_out[-1] < held_out[0] - 1
    assert figures["base"]["stop_probability"] < 0.02
    assert figures["full"]["stop_probability"] >= 0.5
    assert figures["full"]["stop_share"] > figures["base"]["stop_share"]
    assert figures["lora"]["stop_probability"] > figures["base"]["stop_probability"]
