"""The tokenizer of the tiny model: byte-level BPE trained on its documents, and its chat template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

VOCAB_SIZE = 2048
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# What stands between the generation marks is what the model has to write. The answer follows a blank, so that its words
# are the tokens they are inside a sentence: at the start of a line they are other tokens, seldom seen.
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
    """Train on ``texts`` and write ``tokenizer.json`` and its companions into ``folder``."""
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


def draw_turn_rows(folder: Path, texts: Iterable[str], seed: int) -> None:
    """Give the tokens of the chat template rows of the token table that are like those of tokens that were trained.

    No document has these tokens, and softmax pushes the rows of all absent tokens to the same far place, from where
    an adapter cannot bring them back. So they are drawn from the normal distribution of the trained rows, as
    transformers does for tokens that are added later (Hewitt 2021).
    """
    from safetensors.numpy import load_file, save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    present = np.unique(np.concatenate([np.asarray(ids) for ids in tokenizer(list(texts))["input_ids"]]))
    absent = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    assert not np.isin(absent, present).any()
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    rows = table[present].astype(np.float64)
    drawn = np.random.default_rng(seed).multivariate_normal(rows.mean(axis=0), np.cov(rows.T), len(absent))
    table[absent] = drawn.astype(table.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
