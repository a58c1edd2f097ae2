"""Creates the inputs of a training benchmark: a random model of a given shape, a tokenizer and conversations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.documents import conversations, lengths_of, messages_of, texts_for_a_tokenizer

GENERATED_TOKENS = 300_000  # of each file of documents; steps repeat them
# layers, D, N, K, H, F, V, tied
SHAPES = {
    "tiny": (2, 64, 4, 2, 16, 128, 512, True),
    "44m": (12, 448, 7, 7, 64, 1216, 32_000, True),  # no width a power of two, K = N
    "50m": (12, 512, 8, 4, 64, 1408, 32_000, True),
    "135m": (30, 576, 9, 3, 64, 1536, 49_152, True),  # SmolLM2-135M
    "0.6b": (28, 1024, 16, 8, 128, 3072, 151_936, True),  # Qwen3-0.6B
    "1b": (16, 2048, 32, 8, 64, 8192, 128_256, True),  # Llama-3.2-1B
    "1.5b": (28, 1536, 12, 2, 128, 8960, 151_936, True),  # Qwen2.5-1.5B
    "2b": (24, 2560, 20, 5, 128, 8192, 32_000, False),
    "8b": (32, 4096, 32, 8, 128, 14_336, 128_256, False),  # Llama-3.1-8B
}
FAMILIES = {"0.6b": "Qwen3", "1.5b": "Qwen2"}  # others are Llama
_DRAWN = 2**24 - 3  # random numbers, which the weights repeat: drawing eight billion takes minutes
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Kit:
    """A folder with a model and its tokenizer, a file of conversations in it, and their token counts."""

    folder: Path
    lengths: np.ndarray  # tokens of each conversation
    targets: np.ndarray  # supervised tokens of each conversation
    rows: str = "train.jsonl"


def make_kit(
    folder: Path, shape: str, rows: Path | None, dtype: str, kind: str = "short", sequence_length: int = 0
) -> Kit:
    """Returns the kit of a shape, created once.

    Switches this process to the CPU: only the measured processes use the accelerator.

    Args:
        rows: a file of questions and answers, the short documents; None to generate those too.
        kind: the documents, of :data:`benchmark.documents.KINDS`.
        sequence_length: length of sequences in tokens, for generated documents.
    """
    import jax
    from transformers import PreTrainedTokenizerFast

    jax.config.update("jax_platforms", "cpu")
    folder = folder / f"{shape}-{dtype}"
    pairs = None
    if rows is not None:
        pairs = [json.loads(line) for line in rows.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not (folder / "complete").is_file():
        texts = [f"{one['question']} {one['answer']}" for one in pairs] if pairs else texts_for_a_tokenizer()
        make_model(folder, shape, dtype, texts)
        (folder / "complete").touch()
    is_read = pairs is not None and kind == "short"
    name = "train" if is_read else f"{kind}-{sequence_length}"
    if not (folder / f"{name}.npz").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if is_read:
            made = [messages_of(pair["question"], pair["answer"]) for pair in pairs or ()]
        else:
            number = GENERATED_TOKENS // (sequence_length if kind == "long" else 150) + 1
            made = conversations(lengths_of(kind, sequence_length, number).tolist(), tokenizer)
        _write_rows(folder, name, made, tokenizer)
    with np.load(folder / f"{name}.npz") as counts:
        return Kit(folder, counts["lengths"], counts["targets"], f"{name}.jsonl")


def rows_of(options: dict[str, Any]) -> str:
    """Path of the conversations that the options of a run name."""
    return f"{options['kit']}/{options.get('rows', 'train.jsonl')}"


def _write_rows(folder: Path, name: str, made: list[list[dict[str, str]]], tokenizer: Any) -> None:
    """Writes conversations and their token counts."""
    lengths, targets = [], []
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for messages in made:
            print(json.dumps({"messages": messages}), file=file)
            encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            lengths.append(len(encoded["input_ids"]))
            targets.append(sum(encoded["assistant_masks"]))
    np.savez(folder / f"{name}.npz", lengths=lengths, targets=targets)


def _train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 32_000),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


def model_config(shape: str, dtype: str) -> dict[str, Any]:
    """Returns the ``config.json`` of a shape."""
    layers, d, n, k, h, f, v, tied = SHAPES[shape]
    family = FAMILIES.get(shape, "Llama")
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "vocab_size": v,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": n,
        "num_key_value_heads": k,
        "head_dim": h,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "torch_dtype": dtype,
    }


def make_model(folder: Path, shape: str, dtype: str, texts: list[str], shard_bytes: int = 5 * 10**9) -> Any:
    """Writes random weights, one tensor at a time, and a tokenizer trained on ``texts``; returns the tokenizer."""
    import jax.numpy as jnp

    from sft_jax.hf.config import read_architecture
    from sft_jax.hf.load import expected_shapes
    from sft_jax.hf.save import Tensor, save_tensors
    from sft_jax.sharding import make_mesh
    from sft_jax.training.weights import build

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(texts, SHAPES[shape][6])
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(model_config(shape, dtype)))
    split = build(read_architecture(folder), make_mesh(), None, dtype)
    shapes = expected_shapes(split.base(), split.stored)
    weight_dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(0)
    drawn = (0.02 * rng.standard_normal(_DRAWN, dtype=np.float32)).astype(weight_dtype)

    def weight(name: str) -> np.ndarray:
        size = shapes[name]
        return np.ones(size, weight_dtype) if len(size) == 1 else np.resize(np.roll(drawn, rng.integers(_DRAWN)), size)

    save_tensors(folder, {name: Tensor(shape, weight_dtype) for name, shape in shapes.items()}, weight, shard_bytes)
    return tokenizer
