"""Prepares the data of a config in the same way for training, evaluation and inspection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_jax.config import DataConfig, SourceConfig
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.sources import Source, open_sources
from sft_jax.data.tokens.examples import Examples, Report, encode_sources, refuse_bad, refuse_empty
from sft_jax.errors import UserError
from sft_jax.progress import Work


@dataclass(frozen=True)
class Prepared:
    """Sources, their encoded examples, a report, and the encoder."""

    sources: list[Source]
    examples: Examples
    report: Report
    encoder: Encoder


def encoder_of(
    config: DataConfig, tokenizer: Any, stop_ids: Sequence[int] = (), train_on: str | None = None
) -> Encoder:
    """Create the encoder of a config; ``train_on`` overrides that of the config."""
    return Encoder(
        tokenizer,
        train_on or config.train_on,
        config.stop_token,
        tuple(stop_ids),
        keep_reasoning=config.reasoning == "include",
        today=config.date,
    )


def prepare_data(
    config: DataConfig,
    source_configs: Sequence[SourceConfig],
    tokenizer: Any,
    stop_ids: Sequence[int],
    max_positions: int,
    train_on: str | None = None,
    is_held_out: bool = False,
) -> Prepared:
    """Read, encode and check sources, with a progress bar on a terminal.

    Args:
        stop_ids: stop token ids of the model's generation config.
        max_positions: maximum number of positions of the model.
        train_on: overrides that of the config.
        is_held_out: whether rows may have several accepted answers.

    Raises:
        UserError: the data cannot be used.
    """
    prepared = read_data(config, source_configs, tokenizer, stop_ids, train_on, refuse=True, is_held_out=is_held_out)
    check_data(config, prepared, max_positions)
    return prepared


def read_data(
    config: DataConfig,
    source_configs: Sequence[SourceConfig],
    tokenizer: Any,
    stop_ids: Sequence[int],
    train_on: str | None = None,
    refuse: bool = False,
    is_held_out: bool = False,
) -> Prepared:
    """Read and encode sources; without ``refuse``, bad rows are only reported, and :func:`check_data` refuses them.

    Raises:
        UserError: a source cannot be read.
    """
    with Work("reading", of=", ".join(one.path for one in source_configs)[:80]):
        sources = open_sources(source_configs, is_held_out)
    encoder = encoder_of(config, tokenizer, stop_ids, train_on)
    num_rows = sum(map(len, sources))
    with Work("tokenizing", num_rows, "rows") as work:
        examples, report = encode_sources(
            sources,
            encoder,
            config.max_length,
            config.overlong,
            work.update,
            on_bad_row=config.on_bad_row,
            num_workers=config.num_workers,
            cache=config.cache,
            refuse=refuse,
        )
    return Prepared(sources, examples, report, encoder)


def check_data(config: DataConfig, prepared: Prepared, max_positions: int) -> None:
    """Check that data can be used for training.

    Raises:
        UserError: there is a bad row and ``on_bad_row`` is ``error``, no example is left, or an example is longer than
            the model's context.
    """
    refuse_bad(prepared.report, config.on_bad_row)
    refuse_empty(prepared.report, config.max_length)
    examples = prepared.examples
    longest = int(examples.lengths.max())
    if longest > max_positions:
        where = examples.describe(int(examples.lengths.argmax()))
        raise UserError(
            f"data.max_length: {where} has {longest} tokens, but the model has {max_positions} positions; "
            f"set data.max_length={max_positions}"
        )
