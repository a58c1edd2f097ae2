"""The tokenizer of the tiny model: byte-level BPE trained on its documents, and its chat template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

VOCAB_SIZE = 2048
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# The text inside {% generation %} is what the model generates. The answer follows a space, so that its words have the
# same tokens as inside a sentence; at the start of a line they would have other, rare tokens.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
<|im_start|>assistant:{% generation %} {{ message.content }}<|im_end|>{% endgeneration %}{{ "\\n" }}
{%- else -%}
<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>{{ "\\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant:
{%- endif -%}
"""


def write_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Trains a tokenizer on ``texts`` and writes its files to ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


def initialize_turn_embeddings(folder: Path, texts: Iterable[str], seed: int) -> None:
    """Initializes the embeddings of the chat template's tokens like trained embeddings.

    No document has these tokens, and softmax pushes the embeddings of all absent tokens to the same distant point,
    which an adapter cannot undo. They are drawn from a normal distribution with the mean and covariance of the trained
    embeddings, as transformers does for added tokens (Hewitt 2021).
    """
    from safetensors.numpy import load_file, save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    present = np.unique(np.concatenate([np.asarray(ids) for ids in tokenizer(list(texts))["input_ids"]]))
    absent = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    assert not np.isin(absent, present).any()
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    trained = embeddings[present].astype(np.float64)
    drawn = np.random.default_rng(seed).multivariate_normal(trained.mean(axis=0), np.cov(trained.T), len(absent))
    embeddings[absent] = drawn.astype(embeddings.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
