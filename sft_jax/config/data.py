"""The section ``data`` and its sources."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sft_jax.config.checks import one_of, require

ROW_FORMATS = (
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "question-answer",
    "prompt-completion",
    "text",
    "tokens",
)


# Rules of the lint that can leave out single rows; sft_jax/data/lint/rules.py has all.
LEAVE_OUT = (
    "exact_duplicates",
    "near_duplicates",
    "leaks",
    "empty_answers",
    "cut_off_answers",
    "unfinished_answers",
    "copied_questions",
    "script_outliers",
    "length_outliers",
    "secrets",
)

# Arguments of chat templates that a config or a row must not set.
RESERVED_TEMPLATE_KWARGS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows: a file, a folder, a glob, or a Hugging Face dataset id."""

    path: str = "???"  # a file, a folder, a glob, a URL such as gs://…, or a Hugging Face dataset id
    format: str = "auto"  # messages | sharegpt | alpaca | question-answer | prompt-completion | text | tokens
    weight: float = 1.0  # repetitions of each row per epoch; a fraction draws a new random subset each epoch
    max_rows: int | None = None  # read only the first N rows of each file
    columns: dict[str, str] = field(default_factory=dict)  # column mapping, expected name to name in the file
    ignore_columns: list[str] = field(default_factory=list)  # columns and message keys to ignore
    name: str | None = None  # configuration of a Hugging Face dataset
    split: str = "train"  # split of a Hugging Face dataset
    revision: str | None = None  # branch, tag or commit of a Hugging Face dataset
    label: str | None = None  # name of this source in metrics and reports; null: its path

    def __post_init__(self) -> None:
        is_name = self.label is None or (self.label.strip() != "" and self.label.isprintable())
        require(is_name, "data.*.label", f"{self.label!r} is not a name on one line")
        one_of(self.format, "data.*.format", ROW_FORMATS)
        require(self.weight > 0 and math.isfinite(self.weight), "data.*.weight", f"{self.weight} is not positive")
        require(self.max_rows is None or self.max_rows >= 1, "data.*.max_rows", f"{self.max_rows} is not at least 1")


def _is_date(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).date().isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True)
class DataConfig:
    """The training and held-out data, and the tokens that carry loss."""

    train: list[SourceConfig] = field(default_factory=list)  # sources of training data, each with a path
    eval: list[SourceConfig] = field(default_factory=list)  # sources of held-out data
    max_length: int = 2048  # sequence length in tokens, and the length of the longest example
    overlong: str = "drop"  # what to do with longer examples: drop | truncate | error; counted and reported
    packing: bool = True  # pack several examples into a sequence; attention never crosses their boundaries
    shuffle: bool = True  # reshuffle every epoch
    train_on: str = "assistant"  # which messages carry loss: assistant | last_assistant | all
    reasoning: str = "include"  # the assistant's reasoning: include | exclude (remove it from the data)
    on_bad_row: str = "error"  # rows that fail a check: error | skip (leave them out and count them)
    leave_out: list[str] = field(default_factory=list)  # findings of inspect --lint to leave out: [exact_duplicates]
    num_workers: int | None = None  # processes that tokenize; null: chosen from the size of the data and the CPU cores
    cache: bool = True  # cache tokenized data for the next start
    streaming: bool = False  # read, tokenize and pack data.train during training; needs training.max_steps
    chat_template: str | None = None  # a Jinja file, or builtin:chatml.jinja; null: the tokenizer's own template
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of the template: {enable_thinking: false}
    added_tokens: list[str] = field(default_factory=list)  # special tokens to add to the tokenizer
    stop_token: str | None = None  # token that ends a completion or a document; null: the tokenizer's EOS token
    date: str | None = None  # date used by strftime_now in templates, YYYY-MM-DD; null: the first day of the run

    def __post_init__(self) -> None:
        require(self.max_length >= 2, "data.max_length", f"{self.max_length} is not at least 2")
        one_of(self.overlong, "data.overlong", ("drop", "truncate", "error"))
        one_of(self.train_on, "data.train_on", ("assistant", "last_assistant", "all"))
        one_of(self.reasoning, "data.reasoning", ("include", "exclude"))
        one_of(self.on_bad_row, "data.on_bad_row", ("error", "skip"))
        for name in self.leave_out:
            one_of(name, "data.leave_out", LEAVE_OUT)
        require(
            not (self.streaming and self.leave_out),
            "data.leave_out",
            "a stream cannot compare its rows; set data.streaming: false, or leave out rows in the files",
        )
        require(self.date is None or _is_date(self.date), "data.date", f"{self.date!r} is not a date as YYYY-MM-DD")
        require(
            self.num_workers is None or self.num_workers >= 1,
            "data.num_workers",
            f"{self.num_workers} is not at least 1 (null: chosen automatically)",
        )
