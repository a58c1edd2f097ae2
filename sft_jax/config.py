"""The configuration: frozen dataclasses, read from YAML with dotted overrides.

OmegaConf is used inside :func:`load` only; everything else receives plain frozen dataclasses or the values themselves.
No jax import, so that ``sft-jax --help`` and a mistyped key answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError


def _require(condition: bool, key: str, problem: str) -> None:
    if not condition:
        raise UserError(f"{key}: {problem}")


def _one_of(value: str, key: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, f"{value!r} is not one of {', '.join(choices)}")


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, in which dtype, and how it is computed."""

    path: str = "???"
    revision: str | None = None  # branch, tag or commit of a Hugging Face id
    dtype: str = "bfloat16"  # compute and frozen weights
    param_dtype: str = "float32"  # base weights that are trained; adapters are always float32
    init: str = "pretrained"  # random: pretraining from config.json
    attention: str = "auto"  # the fastest backend that can compute the mask, or splash | triton | cudnn | xla
    remat: str = "auto"  # what is kept for the backward pass: the fastest of dots | attention | full that fits, or none
    quantization: str | None = None  # of the frozen base under LoRA: int8 | nf4 (QLoRA)

    def __post_init__(self) -> None:
        _one_of(self.dtype, "model.dtype", ("bfloat16", "float32"))
        _one_of(self.param_dtype, "model.param_dtype", ("float32", "bfloat16"))
        _one_of(self.init, "model.init", ("pretrained", "random"))
        _one_of(self.attention, "model.attention", ("auto", "splash", "triton", "cudnn", "xla"))
        _one_of(self.remat, "model.remat", ("auto", "full", "attention", "dots", "none"))
        if self.quantization is not None:
            _one_of(self.quantization, "model.quantization", ("int8", "nf4"))
            _require(
                self.init == "pretrained",
                "model.quantization",
                "random weights are trained, and only frozen ones can be quantised; set model.quantization: null",
            )


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021) with the conventions of PEFT: the update is alpha/rank · B·A, B starts at zero."""

    method: str = "lora"  # or dora
    rank: int = 16
    alpha: float = 32.0
    target_modules: Any = "all-linear"  # or a list of PEFT-style names
    dropout: float = 0.0
    train_embeddings: bool = False  # also train the embeddings and lm_head, whole, as is done where tokens are added
    init_from: str | None = None  # a PEFT adapter folder to continue from

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", f"{self.rank} is not a positive number")
        _require(self.alpha > 0, "lora.alpha", f"{self.alpha} is not a positive number")
        _require(0.0 <= self.dropout < 1.0, "lora.dropout", f"{self.dropout} is not in [0, 1)")
        names = self.target_modules
        _require(
            names == "all-linear"
            or (isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names)),
            "lora.target_modules",
            f"{names!r} is neither 'all-linear' nor a list of module names such as [q_proj, v_proj]",
        )


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


# Arguments of chat templates that are not for a config or a row to give.
SET_BY_RENDERING = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows: a file, a folder, a glob, or a Hugging Face dataset id."""

    path: str = "???"
    format: str = "auto"
    weight: float = 1.0  # how often an epoch sees each of its rows; a fraction takes a new random share each epoch
    max_rows: int | None = None  # of each file, the first so many
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column to the file's: {question: problem}
    ignore_columns: list[str] = field(default_factory=list)  # and keys of messages: left out on purpose
    name: str | None = None  # of a Hugging Face dataset id, which of its configurations
    split: str = "train"
    revision: str | None = None

    def __post_init__(self) -> None:
        _one_of(self.format, "data.*.format", ROW_FORMATS)
        _require(self.weight > 0 and math.isfinite(self.weight), "data.*.weight", f"{self.weight} is not positive")
        _require(self.max_rows is None or self.max_rows >= 1, "data.*.max_rows", f"{self.max_rows} is not at least 1")


def _is_day(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).date().isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and which of its tokens carry loss."""

    train: list[SourceConfig] = field(default_factory=list)
    eval: list[SourceConfig] = field(default_factory=list)
    max_length: int = 2048
    overlong: str = "drop"
    packing: bool = True
    shuffle: bool = True
    train_on: str = "assistant"
    reasoning: str = "include"  # what an assistant thought before it answered; exclude takes it out of the data
    on_bad_row: str = "error"  # skip: leave out and count rows that cannot be proven right
    num_workers: int | None = None  # processes that tokenise; null: as many as the data and this machine allow
    cache: bool = True  # keep what was tokenised, for the next start
    streaming: bool = False  # read, tokenise and pack data.train while training; needs training.max_steps
    chat_template: str | None = None  # a Jinja file; default the tokenizer's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of it, such as {enable_thinking: false}
    added_tokens: list[str] = field(default_factory=list)  # special tokens the tokenizer does not have yet
    stop_token: str | None = None  # ends a completion or a document; default the tokenizer's eos token
    date: str | None = None  # the day that templates tell which tell one, YYYY-MM-DD; null: on which the run began

    def __post_init__(self) -> None:
        _require(self.max_length >= 2, "data.max_length", f"{self.max_length} is not at least 2")
        _one_of(self.overlong, "data.overlong", ("drop", "truncate", "error"))
        _one_of(self.train_on, "data.train_on", ("assistant", "last_assistant", "all"))
        _one_of(self.reasoning, "data.reasoning", ("include", "exclude"))
        _one_of(self.on_bad_row, "data.on_bad_row", ("error", "skip"))
        _require(self.date is None or _is_day(self.date), "data.date", f"{self.date!r} is not a day as YYYY-MM-DD")
        _require(
            self.num_workers is None or self.num_workers >= 1,
            "data.num_workers",
            f"{self.num_workers} is not at least 1 (null: chosen by itself)",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and its schedule; weight decay spares norms and biases."""

    name: str = "adamw"
    learning_rate: float = 2.0e-4
    schedule: str = "cosine"
    warmup_ratio: float = 0.03  # share of all steps
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1.0e-8
    moments: str = "float32"  # how Adam's two are kept: float32 | bfloat16 | factored (the second by rows and columns)

    def __post_init__(self) -> None:
        _one_of(self.name, "optimizer.name", ("adamw",))
        _one_of(self.moments, "optimizer.moments", ("float32", "bfloat16", "factored"))
        _one_of(self.schedule, "optimizer.schedule", ("constant", "linear", "cosine", "wsd"))
        _require(self.learning_rate >= 0, "optimizer.learning_rate", f"{self.learning_rate} is negative")
        _require(0 <= self.warmup_ratio < 1, "optimizer.warmup_ratio", f"{self.warmup_ratio} is not in [0, 1)")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", f"{self.weight_decay} is negative")
        _require(0 <= self.b1 < 1, "optimizer.b1", f"{self.b1} is not in [0, 1)")
        _require(0 <= self.b2 < 1, "optimizer.b2", f"{self.b2} is not in [0, 1)")
        _require(self.eps > 0, "optimizer.eps", f"{self.eps} is not positive")
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "optimizer.max_grad_norm",
            f"{self.max_grad_norm} is not positive (null turns clipping off)",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """How long, in which batches, and where the run is kept."""

    output_dir: str = "???"
    num_train_epochs: float = 3.0
    max_steps: int | None = None  # counts instead of epochs
    batch_size: int = 16  # rows of max_length per optimizer step, over all devices
    num_microbatches: int = 1  # batch_size is computed in this many parts
    eval_every: int = 100
    save_every: int = 200
    log_every: int = 1
    keep_checkpoints: int = 2  # the last so many
    keep_best: int = 0  # besides, so many with the lowest held-out loss
    keep_every: int | None = None  # besides, those of every so many steps
    label_smoothing: float = 0.0  # this share of a target is spread over the vocabulary
    z_loss: float = (
        0.0  # this times the squared log of the softmax's denominator is added; 1e-4 keeps logits from drifting
    )
    seed: int = 0
    tensorboard: bool = True
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "num_microbatches",
            "eval_every",
            "save_every",
            "log_every",
            "keep_checkpoints",
        ):
            _require(getattr(self, name) >= 1, f"training.{name}", f"{getattr(self, name)} is not at least 1")
        _require(self.keep_best >= 0, "training.keep_best", f"{self.keep_best} is negative")
        _require(
            self.keep_every is None or self.keep_every >= 1,
            "training.keep_every",
            f"{self.keep_every} is not at least 1 (null: only the last and the best)",
        )
        _require(self.num_train_epochs > 0, "training.num_train_epochs", f"{self.num_train_epochs} is not positive")
        _require(0 <= self.label_smoothing < 1, "training.label_smoothing", f"{self.label_smoothing} is not in [0, 1)")
        _require(self.z_loss >= 0, "training.z_loss", f"{self.z_loss} is negative")
        _require(self.max_steps is None or self.max_steps >= 0, "training.max_steps", f"{self.max_steps} is negative")
        _require(
            self.batch_size % self.num_microbatches == 0,
            "training.num_microbatches",
            f"{self.num_microbatches} does not divide batch_size {self.batch_size}",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """What ``evaluate`` measures on ``data.eval``, and what is written while training."""

    at_end: bool = False  # evaluate when training ends
    documents: list[SourceConfig] = field(default_factory=list)  # plain text on which forgetting is measured
    answer: str = "text"  # how answers are compared
    max_new_tokens: int = 256
    num_questions: int | None = 200  # held-out conversations that are answered; null: all
    batch_size: int = 32  # prompts answered at a time
    shots: int = 0  # answered questions before each one, for the base model with few-shot prompting; 0: none
    samples: list[str] = field(default_factory=list)  # prompts answered while training
    samples_every: int = 100  # steps

    def __post_init__(self) -> None:
        _one_of(self.answer, "evaluation.answer", ("exact", "text", "number", "gsm8k", "choice"))
        for name in ("max_new_tokens", "batch_size", "samples_every"):
            _require(getattr(self, name) >= 1, f"evaluation.{name}", f"{getattr(self, name)} is not at least 1")
        _require(
            self.num_questions is None or self.num_questions >= 1,
            "evaluation.num_questions",
            f"{self.num_questions} is not at least 1 (null: all)",
        )
        _require(self.shots >= 0, "evaluation.shots", f"{self.shots} is negative")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis; -1 takes all that remain."""

    data: int = 1
    fsdp: int = -1
    sequence: int = 1  # splits the slots of rows, for long context
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size == -1 or size >= 1, f"mesh.{name}", f"{size} is neither -1 nor a positive number")
        _require(list(sizes.values()).count(-1) <= 1, "mesh", f"only one axis may be -1, not {sizes}")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = field(default_factory=LoraConfig)  # null: full fine-tuning
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        _require(
            len(self.data.train) > 0, "data.train", "names no source; give at least one, such as [{path: a.jsonl}]"
        )
        _require(
            not self.data.streaming or self.training.max_steps is not None,
            "training.max_steps",
            "has to be set with data.streaming, because the length of an epoch is not known",
        )
        _require(
            self.model.init == "pretrained" or self.lora is None,
            "model.init",
            "random weights cannot be the frozen base of an adapter; set lora: null",
        )
        _require(
            self.model.quantization is None or self.lora is not None,
            "model.quantization",
            "only a frozen base can be quantised, and without lora all weights are trained; set lora, or null here",
        )
        _require(
            self.training.keep_best == 0 or len(self.data.eval) > 0,
            "training.keep_best",
            "no checkpoint is better than another without a held-out loss; name held-out data in data.eval",
        )
        _require(
            self.training.keep_best == 0 or self.training.save_every % self.training.eval_every == 0,
            "training.keep_best",
            f"only a step that is evaluated has a held-out loss, and save_every {self.training.save_every} is not a "
            f"multiple of eval_every {self.training.eval_every}",
        )
        _require(
            not self.evaluation.at_end or len(self.data.eval) > 0,
            "evaluation.at_end",
            "there is nothing to evaluate on; name held-out conversations in data.eval",
        )


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply dotted overrides such as ``optimizer.learning_rate=2e-5``, check everything.

    Relative paths inside the file stay as they are: they are relative to the folder the command is started in.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, value out of range, missing mandatory key.
    """
    import yaml
    from omegaconf import OmegaConf

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        given = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(given):
        raise UserError(
            f"{path}: a config is a mapping with the keys {', '.join(f.name for f in dataclasses.fields(Config))}"
        )
    return _merged(given, overrides or [], str(path))


def from_dict(given: Mapping[str, Any], overrides: list[str] | None = None) -> Config:
    """A config from nested dicts with the keys of a file; see :func:`load`.

    Raises:
        UserError: as :func:`load`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return _merged(OmegaConf.create(_escaped(dict(given))), overrides or [], "config")
    except OmegaConfBaseException as error:
        raise UserError(f"config: {_explain(error)}") from error


def _merged(given: Any, overrides: list[str], name: str) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise UserError(f"override {override!r}: write key=value, such as optimizer.learning_rate=2e-5")
            OmegaConf.update(given, key, _parse_value(override, value), merge=True)
        merged = OmegaConf.merge(OmegaConf.structured(Config), given)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{name}: {missing[0]} is required and not set")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{name}: {_explain(error)}") from error


def _parse_value(override: str, text: str) -> Any:
    """The right side of an override, read as the YAML the config file itself is written in."""
    import yaml
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[index,call-overload]
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: not valid YAML: {_one_line(error)}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested dicts, the way it is written into a run folder."""
    return dataclasses.asdict(config)


def save(config: Config, path: Path) -> None:
    """Write the resolved config as YAML; :func:`load` reads it back to an equal object."""
    from omegaconf import OmegaConf

    written = OmegaConf.create(_escaped(to_dict(config)))  # its YAML quotes what it would read as a number
    path.write_text(OmegaConf.to_yaml(written), encoding="utf-8")


def _escaped(value: Any) -> Any:
    """With ``${`` written so that it is read as these characters and not as a reference to another key."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escaped(one) for one in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _explain(error: Any) -> str:
    """One line for an OmegaConf error: the full key, what is wrong, and the nearest key that exists."""
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    key = getattr(error, "full_key", None) or ""
    section = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(section):
        known = [f.name for f in dataclasses.fields(section)]
        close = difflib.get_close_matches(str(error.key), known, n=1)
        way_out = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {key!r}; {way_out}"
    if isinstance(error, IndexError) or not isinstance(error, OmegaConfBaseException):  # data.eval.0.path=x
        at = f"{key}: " if key else ""
        return f"{at}no such entry of a list; give the list as a whole, such as 'data.eval=[{{path: heldout.jsonl}}]'"
    message = _one_line(getattr(error, "msg", None) or error)
    message = message.split(" full_key:")[0]
    return f"{key}: {message}" if key else message
