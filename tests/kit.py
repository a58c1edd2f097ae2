"""What tests are made of: tiny models, a tokenizer trained on the spot, conversations, configs."""

import dataclasses
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from sft_jax.models.architecture import Architecture, Layer, Norm, Rope
from sft_jax.models.attention.module import SelfAttentionSpec
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
    """Some words, at random."""
    return " ".join(rng.choice(_WORDS, rng.integers(low, high)))


def conversations(num: int, seed: int = 0) -> list[dict]:
    """Rows of ``messages`` with one or two exchanges, some with a system message; answers of very unequal length."""
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
    """A byte-level BPE of 384 entries, trained here and now."""
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
    """Of a Llama; ``windows`` are those of its layers, other ``changes`` fields of its attention."""
    windows = changes.pop("windows", None) or [None] * num_layers
    norm = Norm(1e-5)
    spec = SelfAttentionSpec(num_heads, num_kv_heads, head_dim, rope=Rope(1e4), **changes)
    mlp = MLPSpec(intermediate_size)
    layers = tuple(Layer(dataclasses.replace(spec, window=window), mlp, norm) for window in windows)
    return Architecture("llama", vocab_size, hidden_size, layers, norm, tied)


def make_model(folder: Path, **changes) -> Path:
    """A random Llama of odd shape in a Hugging Face folder, written without torch."""
    from safetensors.numpy import save_file

    from sft_jax.hf.config import read_architecture
    from sft_jax.hf.load import expected_shapes
    from sft_jax.sharding import make_mesh
    from sft_jax.training.weights import build

    tokenizer = make_tokenizer()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
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
    """A small float32 run on one device; ``changes`` are dotted keys with ``__`` for the dot."""
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
    """Dropout on, shuffled and packed, several epochs: everything that could go astray on the way."""
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


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def trained_leaves(run: Path, step: int | None = None) -> dict:
    """What a run has trained, by path."""
    from sft_jax.run.export import whole
    from sft_jax.store.opened import open_run

    opened = open_run(run, step)
    return whole(opened, opened.trained)


def sft_jax(*arguments: object) -> subprocess.CompletedProcess:
    """The command line in this process, on one of its devices: exit code and what is printed."""
    one, out, err = one_device(), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        try:
            code = main([*map(str, arguments)])
        except SystemExit as done:  # argparse's
            code = done.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def child_environment(**changes: str) -> dict[str, str]:
    """Of a process of its own: one CPU device, compiled as quickly as here."""
    flags = os.environ["SFT_JAX_TEST_XLA_FLAGS"]
    return os.environ | {"XLA_FLAGS": flags, "PYTHONWARNINGS": "default"} | changes


def process(*arguments: object, timeout: float = 300, **changes: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own; ``changes`` are of its environment."""
    return subprocess.run(
        [sys.executable, "-m", "sft_jax", *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=child_environment(**changes), check=False,
    )  # fmt: skip


class Child:
    """A process with an environment of its own that runs one command after another, started once for all of them."""

    _SECONDS = 300  # that a command may take
    _PROGRAM = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from sft_jax.without_torch import leave_out_torch
leave_out_torch()
from sft_jax.cli import main
for line in sys.stdin:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""

    def __init__(self, **changes: str):
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment(**changes),
        )  # fmt: skip

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps([*map(str, arguments)]), file=stdin, flush=True)
        limit = threading.Timer(self._SECONDS, self._process.kill)
        limit.start()
        try:
            answer = stdout.readline()
        finally:
            limit.cancel()
        assert answer, f"the process ended with {self._process.wait()} during {arguments}"
        return subprocess.CompletedProcess(arguments, *json.loads(answer))

    def close(self) -> None:
        self._process.communicate(timeout=60)


def load_model(folder: Path, dtype=jnp.float32):
    """A Hugging Face folder as our decoder with all weights in place, and the split it was made from."""
    from sft_jax.hf.config import read_architecture
    from sft_jax.hf.reader import TensorReader
    from sft_jax.sharding import make_mesh
    from sft_jax.training.weights import build, load_weights

    arch = read_architecture(folder)
    split = build(arch, make_mesh(devices=one_device()), None, jnp.dtype(dtype).name)
    trainable, frozen = load_weights(split, TensorReader(folder))
    return split.merge(trainable, frozen), split, trainable


def logits(model, ids: np.ndarray) -> np.ndarray:
    """All logits of unpacked rows ``[B, T]``."""
    ids = jnp.asarray(ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return np.asarray(model.logits(model(ids, jnp.ones_like(ids), positions)))


def run_model(run: Path):
    """The network of a run as its last checkpoint has it: frozen base from the files, trained leaves restored."""
    from sft_jax.assembly import open_model

    opened = open_model(str(run), devices=one_device())
    return opened.network()


class Group:
    """Processes of one run, all on this machine."""

    def __init__(self, count: int, *arguments: object, python: str | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = child_environment(PYTHONUNBUFFERED="1")
        start = ["-m", "sft_jax"] if python is None else ["-c", python]
        self.processes = [
            subprocess.Popen(
                [sys.executable, *start, *map(str, arguments), "--coordinator", f"127.0.0.1:{port}",
                 "--num-processes", str(count), "--process-id", str(i)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
            for i in range(count)
        ]  # fmt: skip
        self.said = [""] * count
        self._readers = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(count)]
        for reader in self._readers:
            reader.start()

    def _read(self, i: int) -> None:
        stream = self.processes[i].stderr
        assert stream is not None
        for line in stream:
            self.said[i] += line

    def wait(self, timeout: float = 240) -> list[int]:
        """Exit codes; all are ended if they do not end in time."""
        until = time.monotonic() + timeout
        try:
            codes = [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        for reader in self._readers:
            reader.join()
        for process in self.processes:
            process.communicate()
        return codes

    def wait_for(self, run: Path, step: int, timeout: float = 240) -> None:
        """Until a step is written down."""
        until = time.monotonic() + timeout
        while time.monotonic() < until and all(process.poll() is None for process in self.processes):
            if len(losses(run) if (run / "metrics.jsonl").is_file() else []) >= step:
                return
            time.sleep(0.05)
        self.wait(1)
        pytest.fail(f"step {step} never came: {self.said}")


def exchanged(program: str, *kinds: str) -> set[tuple[str, tuple[int, ...]]]:
    """dtype and shape of all that devices trade in a compiled program's text, by ``kinds`` of collectives or by any."""
    names = "|".join(kinds or ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"))
    return {
        (dtype, tuple(map(int, shape.split(","))))
        for results in re.findall(rf"= ([^=\n]*?) (?:{names})(?:-start)?\(", program)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", results)
    }
