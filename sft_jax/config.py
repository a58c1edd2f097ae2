"""The config: frozen dataclasses that check their values. :mod:`sft_jax.config_file` reads and writes them.

The comment after each field becomes its description in ``configs/README.md``. This module does not import jax, so that
``sft-jax --help`` and config errors are fast.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sft_jax.config_limits import check_limits
from sft_jax.errors import UserError


def _require(condition: bool, key: str, problem: str) -> None:
    if not condition:
        raise UserError(f"{key}: {problem}")


def _one_of(value: str, key: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, f"{value!r} is not one of {', '.join(choices)}")


@dataclass(frozen=True)
class ModelConfig:
    """The base model, its dtypes, and how it is computed."""

    path: str = "???"  # builtin:tiny, a folder with config.json, or a Hugging Face id
    revision: str | None = None  # branch, tag or commit of a Hugging Face id
    dtype: str = "bfloat16"  # dtype of computation and of frozen weights: bfloat16 | float32
    param_dtype: str = "float32"  # dtype of trained base weights: float32 | bfloat16; adapters are always float32
    init: str = "pretrained"  # pretrained | random (pretraining from config.json)
    attention: str = "auto"  # backend: auto (the fastest that supports the mask) | splash | triton | cudnn | xla
    remat: str = "auto"  # rematerialization: auto (the fastest of dots | attention | full that fits) | none
    quantization: str | None = None  # quantization of the frozen base under LoRA: int8 | nf4 (QLoRA)

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
                "only frozen weights can be quantized, and random weights are trained; set model.quantization: null",
            )


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021) with the conventions of PEFT: the update is alpha/rank · B·A, and B starts at zero."""

    method: str = "lora"  # kind of adapter: lora | dora
    rank: int = 16  # LoRA rank r
    alpha: float = 32.0  # lora_alpha: the update is multiplied by alpha / rank
    target_modules: Any = "all-linear"  # or a list of module names as in PEFT, such as [q_proj, v_proj]
    dropout: float = 0.0  # dropout on the input of adapters
    train_embeddings: bool = False  # also train the full embeddings and lm_head; always on if tokens are added
    init_from: str | None = None  # folder of a PEFT adapter to start from

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
    "auto", "messages", "sharegpt", "alpaca", "question-answer", "prompt-completion", "text", "tokens"
)  # fmt: skip


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
        _require(is_name, "data.*.label", f"{self.label!r} is not a name on one line")
        _one_of(self.format, "data.*.format", ROW_FORMATS)
        _require(self.weight > 0 and math.isfinite(self.weight), "data.*.weight", f"{self.weight} is not positive")
        _require(self.max_rows is None or self.max_rows >= 1, "data.*.max_rows", f"{self.max_rows} is not at least 1")


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
    num_workers: int | None = None  # processes that tokenize; null: chosen from the size of the data and the CPU cores
    cache: bool = True  # cache tokenized data for the next start
    streaming: bool = False  # read, tokenize and pack data.train during training; needs training.max_steps
    chat_template: str | None = None  # a Jinja file, or builtin:chatml.jinja; null: the tokenizer's own template
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of the template: {enable_thinking: false}
    added_tokens: list[str] = field(default_factory=list)  # special tokens to add to the tokenizer
    stop_token: str | None = None  # token that ends a completion or a document; null: the tokenizer's EOS token
    date: str | None = None  # date used by strftime_now in templates, YYYY-MM-DD; null: the first day of the run

    def __post_init__(self) -> None:
        _require(self.max_length >= 2, "data.max_length", f"{self.max_length} is not at least 2")
        _one_of(self.overlong, "data.overlong", ("drop", "truncate", "error"))
        _one_of(self.train_on, "data.train_on", ("assistant", "last_assistant", "all"))
        _one_of(self.reasoning, "data.reasoning", ("include", "exclude"))
        _one_of(self.on_bad_row, "data.on_bad_row", ("error", "skip"))
        _require(self.date is None or _is_date(self.date), "data.date", f"{self.date!r} is not a date as YYYY-MM-DD")
        _require(
            self.num_workers is None or self.num_workers >= 1,
            "data.num_workers",
            f"{self.num_workers} is not at least 1 (null: chosen automatically)",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and its schedule. Norms and biases have no weight decay."""

    name: str = "adamw"  # optimizer: adamw
    learning_rate: float = 2.0e-4  # peak learning rate
    schedule: str = "cosine"  # learning rate schedule: constant | linear | cosine | wsd (warmup, stable, decay)
    warmup_ratio: float = 0.03  # fraction of all steps that are warmup
    weight_decay: float = 0.0  # decoupled weight decay; not applied to norms and biases
    max_grad_norm: float | None = 1.0  # gradient clipping by the global norm; null: no clipping
    b1: float = 0.9  # Adam's beta1
    b2: float = 0.999  # Adam's beta2
    eps: float = 1.0e-8  # Adam's epsilon
    moments: str = "float32"  # Adam's moments: float32 | bfloat16 | factored (second moment by rows and columns)
    spike_guard: str | None = None  # at a spike of the gradient norm: skip the update, or stop the run; null: neither
    spike_factor: float = 10.0  # a spike: a gradient norm of more than this times its running average

    def __post_init__(self) -> None:
        _one_of(self.name, "optimizer.name", ("adamw",))
        _one_of(self.moments, "optimizer.moments", ("float32", "bfloat16", "factored"))
        _require(
            self.spike_guard in (None, "skip", "stop"),
            "optimizer.spike_guard",
            f"{self.spike_guard!r} is not one of skip, stop, null",
        )
        _require(self.spike_factor > 1, "optimizer.spike_factor", f"{self.spike_factor} is not above 1")
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
    """Number of steps, batch size, evaluation, checkpoints and logging."""

    output_dir: str = "???"  # the run directory; training resumes if it holds a run
    num_train_epochs: float = 3.0  # number of epochs; may be fractional
    max_steps: int | None = None  # number of steps; overrides num_train_epochs
    batch_size: int = 16  # global batch: sequences per optimizer step, over all devices
    num_microbatches: Any = 1  # microbatches that batch_size is split into; auto: the fewest that fit in memory
    eval_every: int = 100  # steps between evaluations of the held-out loss
    save_every: int = 200  # steps between checkpoints
    log_every: int = 1  # steps between rows of metrics.jsonl
    keep_checkpoints: int = 2  # keeps the newest N checkpoints
    keep_best: int = 0  # also keeps the N checkpoints with the lowest held-out loss
    keep_every: int | None = None  # also keeps a checkpoint every N steps
    label_smoothing: float = 0.0  # probability mass of each target that is spread over the vocabulary
    z_loss: float = 0.0  # weight of the squared log of the softmax denominator; 1e-4 keeps logits from drifting
    router_aux_loss: float = 0.0  # weight of the load-balancing loss of mixtures of experts, 0.001 to 0.01
    seed: int = 0  # random seed of shuffling, dropout and new adapters
    deterministic: bool = False  # GPUs compute the same bits each time, more slowly; TPUs and CPUs always do
    tensorboard: bool = True  # write TensorBoard event files
    wandb_project: str | None = None  # project of Weights & Biases

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_every", "save_every", "log_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"training.{name}", f"{getattr(self, name)} is not at least 1")
        _require(self.keep_best >= 0, "training.keep_best", f"{self.keep_best} is negative")
        _require(
            self.keep_every is None or self.keep_every >= 1,
            "training.keep_every",
            f"{self.keep_every} is not at least 1 (null: keep only the newest and the best)",
        )
        _require(self.num_train_epochs > 0, "training.num_train_epochs", f"{self.num_train_epochs} is not positive")
        _require(0 <= self.label_smoothing < 1, "training.label_smoothing", f"{self.label_smoothing} is not in [0, 1)")
        _require(self.z_loss >= 0, "training.z_loss", f"{self.z_loss} is negative")
        _require(self.router_aux_loss >= 0, "training.router_aux_loss", f"{self.router_aux_loss} is negative")
        _require(self.max_steps is None or self.max_steps >= 0, "training.max_steps", f"{self.max_steps} is negative")
        parts = self.num_microbatches
        _require(
            parts == "auto" or (isinstance(parts, int) and not isinstance(parts, bool) and parts >= 1),
            "training.num_microbatches",
            f"{parts!r} is neither auto nor a positive number",
        )
        _require(
            parts == "auto" or self.batch_size % parts == 0,
            "training.num_microbatches",
            f"{parts} does not divide batch_size {self.batch_size}; use a divisor of it, or auto",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """What ``evaluate`` measures on ``data.eval``, and the samples generated during training."""

    at_end: bool = False  # evaluate when training ends
    documents: list[SourceConfig] = field(default_factory=list)  # plain text to measure forgetting on
    answer: str = "text"  # how answers are compared: exact | text | number | gsm8k | choice | json
    max_new_tokens: int = 256  # maximum length of an answer
    num_questions: int | None = 200  # held-out conversations to answer, as many of each set; null: all
    batch_size: int = 32  # prompts generated at a time
    shots: int = 0  # examples in the prompt when the base model is measured with few-shot prompting; 0: not measured
    hardest: int = 0  # training examples with the highest loss to list, where wrong labels hide; 0: not measured
    samples: list[str] = field(default_factory=list)  # prompts to answer during training
    samples_every: int = 100  # steps between samples

    def __post_init__(self) -> None:
        _one_of(self.answer, "evaluation.answer", ("exact", "text", "number", "gsm8k", "choice", "json"))
        for name in ("max_new_tokens", "batch_size", "samples_every"):
            _require(getattr(self, name) >= 1, f"evaluation.{name}", f"{getattr(self, name)} is not at least 1")
        _require(
            self.num_questions is None or self.num_questions >= 1,
            "evaluation.num_questions",
            f"{self.num_questions} is not at least 1 (null: all)",
        )
        _require(self.shots >= 0, "evaluation.shots", f"{self.shots} is negative")
        _require(0 <= self.hardest <= 1000, "evaluation.hardest", f"{self.hardest} is not between 0 and 1000")


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; -1 takes all remaining devices."""

    data: int = 1  # number of model replicas
    fsdp: int = -1  # shards of the weights and the batch
    sequence: int = 1  # shards of each sequence, for long contexts
    tensor: int = 1  # shards of attention heads, MLP channels and vocabulary

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size == -1 or size >= 1, f"mesh.{name}", f"{size} is neither -1 nor a positive number")
        _require(list(sizes.values()).count(-1) <= 1, "mesh", f"only one axis may be -1, not {sizes}")


@dataclass(frozen=True)
class Config:
    """The config of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = field(default_factory=LoraConfig)  # null: full fine-tuning
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check_limits(self)
        _require(
            len(self.data.train) > 0, "data.train", "names no source; give at least one, such as [{path: a.jsonl}]"
        )
        _require(
            not self.data.streaming or self.training.max_steps is not None,
            "training.max_steps",
            "has to be set with data.streaming, because the length of an epoch is unknown",
        )
        _require(
            self.model.init == "pretrained" or self.lora is None,
            "model.init",
            "random weights cannot be the frozen base of a LoRA adapter; set lora: null",
        )
        _require(
            self.model.quantization is None or self.lora is not None,
            "model.quantization",
            "only a frozen base can be quantized, and full fine-tuning freezes none; set lora, or set this to null",
        )
        _require(
            self.training.keep_best == 0 or len(self.data.eval) > 0,
            "training.keep_best",
            "needs a held-out loss to compare checkpoints; set data.eval",
        )
        _require(
            self.training.keep_best == 0 or self.training.save_every % self.training.eval_every == 0,
            "training.keep_best",
            f"every saved step needs a held-out loss, but save_every {self.training.save_every} is not a "
            f"multiple of eval_every {self.training.eval_every}",
        )
        _require(
            not self.evaluation.at_end or len(self.data.eval) > 0,
            "evaluation.at_end",
            "there is nothing to evaluate on; set data.eval to held-out conversations",
        )
