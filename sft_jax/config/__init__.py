"""The config: frozen dataclasses that check their values. :mod:`sft_jax.config_file` reads and writes them.

A file per section. The comment after each field becomes its description in ``configs/README.md``. This package does not
import jax, so that ``sft-jax --help`` and config errors are fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sft_jax.config.checks import require
from sft_jax.config.data import DataConfig
from sft_jax.config.data import SourceConfig as SourceConfig
from sft_jax.config.evaluation import EvaluationConfig
from sft_jax.config.lora import LoraConfig
from sft_jax.config.mesh import MeshConfig
from sft_jax.config.model import ModelConfig
from sft_jax.config.optimizer import OptimizerConfig
from sft_jax.config.training import TrainingConfig
from sft_jax.config_limits import check_limits


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
        require(len(self.data.train) > 0, "data.train", "names no source; give at least one, such as [{path: a.jsonl}]")
        require(
            self.lora is None or self.lora.init_from is None or self.training.continue_from is None,
            "training.continue_from",
            "lora.init_from names other weights to begin with; leave one of the two out",
        )
        require(
            not self.data.streaming or self.training.max_steps is not None,
            "training.max_steps",
            "has to be set with data.streaming, because the length of an epoch is unknown",
        )
        require(
            self.model.init == "pretrained" or self.lora is None,
            "model.init",
            "random weights cannot be the frozen base of a LoRA adapter; set lora: null",
        )
        require(
            self.model.quantization is None or self.lora is not None,
            "model.quantization",
            "only a frozen base can be quantized, and full fine-tuning freezes none; set lora, or set this to null",
        )
        require(
            self.model.compute != "int8" or self.lora is not None,
            "model.compute",
            "int8 is for a frozen base; set lora, or model.compute: fp8",
        )
        require(
            self.training.keep_best == 0 or len(self.data.eval) > 0,
            "training.keep_best",
            "needs a held-out loss to compare checkpoints; set data.eval",
        )
        require(
            self.training.keep_best == 0 or self.training.save_every % self.training.eval_every == 0,
            "training.keep_best",
            f"every saved step needs a held-out loss, but save_every {self.training.save_every} is not a "
            f"multiple of eval_every {self.training.eval_every}",
        )
        require(
            not self.evaluation.at_end or len(self.data.eval) > 0,
            "evaluation.at_end",
            "there is nothing to evaluate on; set data.eval to held-out conversations",
        )
