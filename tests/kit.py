"""Test helpers: tiny models, a tokenizer trained in the process, conversations, configs."""

import dataclasses
import io
import json
import re
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kit_processes import Child as Child
from kit_processes import Group as Group
from kit_processes import child_environment as child_environment
from kit_processes import losses as losses
from kit_processes import process as process

from sft_jax.cli import main
from sft_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainingConfig,
)
from sft_jax.models.architecture import Architecture, Norm, Rope
from sft_jax.models.attention.module import SelfAttentionSpec
from sft_jax.models.families.standard import PRE_NORM
from sft_jax.models.mlp import MLPSpec

ROOT = Path(__file__).parent.parent

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")

_WORDS = ["river", "mountain", "harbour", "bread", "copper", "lantern", "winter", "orchard", "violin", "market"]
_WORDS += ["island", "garden", "bridge", "letter", "captain", "silver", "window", "forest", "candle", "journey"]
_WORDS += ["seven", "twelve", "north", "quiet", "yellow"]


def sentence(rng: np.random.Generator, low: int, high: int) -> str:
    """A few random words."""
    return " ".join(rng.choice(_WORDS, rng.integers(low, high)))


def conversations(num: int, seed: int = 0) -> list[dict]:
    """Rows of ``messages`` with one or two turns, some with a system message; answer lengths vary a lot."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        messages = [{"role": "system", "content": sentence(rng, 2, 5)}] if i % 5 == 0 else []
        for _ in range(1 + i % 2):
            messages.append({"role": "user", "content": sentence(rng, 2, 9)})
            messages.append({"role": "assistant", "content": sentence(rng, 1, 14)})
        rows.append({"messages": messages})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_chats(path: Path, num: int = 40, seed: int = 0) -> Path:
    return write_jsonl(path, conversations(num, seed))


@cache
def make_tokenizer():
    """Train a byte-level BPE tokenizer with 384 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    tokenizer.train_from_iterator((sentence(rng, 5, 20) for _ in range(200)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        pad_token="<pad>",
        chat_template=CHATML,
    )


def architecture(
    vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, tied, **changes
) -> Architecture:
    """A Llama architecture; ``windows`` has one entry per layer, other ``changes`` are fields of its attention."""
    windows = changes.pop("windows", None) or [None] * num_layers
    norm = Norm(1e-5)
    spec = SelfAttentionSpec(num_heads, num_kv_heads, head_dim, rope=Rope(1e4), **changes)
    mlp = MLPSpec(intermediate_size)
    layers = tuple(PRE_NORM.layer(dataclasses.replace(spec, window=window), mlp, norm) for window in windows)
    return Architecture("llama", vocab_size, hidden_size, layers, norm, tied)


SIZES = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}


def make_model(folder: Path, **changes) -> Path:
    """Write a random Llama with unusual sizes to a Hugging Face folder, without torch."""
    from safetensors.numpy import save_file

    from sft_jax.hf.config import read_architecture
    from sft_jax.hf.load import expected_shapes
    from sft_jax.sharding import make_mesh
    from sft_jax.training.weights import build

    tokenizer = make_tokenizer()
    config = {
        **SIZES,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    } | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    split = build(read_architecture(folder), make_mesh(devices=one_device()), None, "float32")
    rng = np.random.default_rng(1)
    tensors = {
        name: (np.ones(shape) + 0.1 * rng.normal(size=shape) if len(shape) == 1 else 0.08 * rng.normal(size=shape))
        for name, shape in expected_shapes(split.base(), split.stored).items()
    }
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


def run_config(model: Path, data: Path | str = "chats.jsonl", out: Path | str = "run", **changes) -> Config:
    """The config of a small float32 run on one device; ``changes`` are dotted keys with ``__`` for the dot."""
    config = Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        lora=LoraConfig(rank=4, alpha=8.0),
        data=DataConfig(train=[SourceConfig(path=str(data))], max_length=128),
        optimizer=OptimizerConfig(learning_rate=5e-3, schedule="constant", warmup_ratio=0.0),
        training=TrainingConfig(output_dir=str(out), max_steps=6, batch_size=4, tensorboard=False),
        mesh=MeshConfig(),
    )
    for key, value in changes.items():
        if "__" in key:
            section, name = key.split("__")
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
            )
        else:
            config = dataclasses.replace(config, **{key: value})
    return config


def config_of(tiny, data, out, **changes):
    """A config with dropout, shuffling, packing and several epochs, so that resuming depends on all of the state."""
    settings = {
        "training__max_steps": 160,
        "training__save_every": 20,
        "training__batch_size": 2,
        "lora__dropout": 0.1,
        "optimizer__schedule": "cosine",
        **changes,
    }
    return run_config(tiny, data, out, **settings)


def one_device() -> list:
    return jax.devices()[:1]


def trained_leaves(run: Path, step: int | None = None) -> dict:
    """The trained weights of a run, by path."""
    from sft_jax.run.export import restore_replicated
    from sft_jax.store.opened import open_run

    opened = open_run(run, step)
    return restore_replicated(opened, opened.trained)


def sft_jax(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command line in this process on one device; returns the exit code and the output."""
    devices, out, err = one_device(), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        try:
            code = main([*map(str, arguments)])
        except SystemExit as raised:  # raised by argparse
            code = raised.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def load_model(folder: Path, dtype=jnp.float32):
    """Load a Hugging Face folder; returns the network, its split and the trainable parameters."""
    from sft_jax.hf.reader import TensorReader
    from sft_jax.hf.ties import architecture_of
    from sft_jax.sharding import make_mesh
    from sft_jax.training.weights import build, load_weights

    reader = TensorReader(folder)
    arch = architecture_of(folder, reader)
    split = build(arch, make_mesh(devices=one_device()), None, jnp.dtype(dtype).name)
    trainable, frozen = load_weights(split, reader)
    return split.merge(trainable, frozen), split, trainable


def logits(model, ids: np.ndarray) -> np.ndarray:
    """Logits of unpacked sequences ``[B, T]``."""
    ids = jnp.asarray(ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return np.asarray(model.logits(model(ids, jnp.ones_like(ids), positions)))


def run_model(run: Path):
    """The network of a run at its last checkpoint."""
    from sft_jax.assembly import open_model

    opened = open_model(str(run), devices=one_device())
    return opened.network()


def exchanged(program: str, *kinds: str) -> set[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of the results of collectives (all, or those in ``kinds``) in the text of a compiled program."""
    names = "|".join(kinds or ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"))
    return {
        (dtype, tuple(map(int, shape.split(","))))
        for results in re.findall(rf"= ([^=\n]*?) (?:{names})(?:-start)?\(", program)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", results)
    }
