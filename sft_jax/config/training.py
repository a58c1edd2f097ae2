"""The section ``training``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft_jax.config.checks import require


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
    early_stopping: int | None = None  # stops after N evaluations without a lower held-out loss; null: never
    continue_from: str | None = None  # a run whose trained weights this one begins with: RUN, RUN@best or RUN@STEP
    continue_optimizer: bool = False  # also begin with the optimizer state of that run
    label_smoothing: float = 0.0  # probability mass of each target that is spread over the vocabulary
    z_loss: float = 0.0  # weight of the squared log of the softmax denominator; 1e-4 keeps logits from drifting
    router_aux_loss: float = 0.0  # weight of the load-balancing loss of mixtures of experts, 0.001 to 0.01
    seed: int = 0  # random seed of shuffling, dropout and new adapters
    deterministic: bool = False  # GPUs compute the same bits each time, more slowly; TPUs and CPUs always do
    tensorboard: bool = True  # write TensorBoard event files
    wandb_project: str | None = None  # project of Weights & Biases
    mlflow_experiment: str | None = None  # experiment of MLflow
    trackio_project: str | None = None  # project of Trackio
    run_name: str | None = None  # name of the run in these; null: that of the run directory

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "eval_every",
            "save_every",
            "log_every",
            "keep_checkpoints",
        ):
            require(getattr(self, name) >= 1, f"training.{name}", f"{getattr(self, name)} is not at least 1")
        require(self.keep_best >= 0, "training.keep_best", f"{self.keep_best} is negative")
        require(
            self.keep_every is None or self.keep_every >= 1,
            "training.keep_every",
            f"{self.keep_every} is not at least 1 (null: keep only the newest and the best)",
        )
        require(
            self.early_stopping is None or self.early_stopping >= 1,
            "training.early_stopping",
            f"{self.early_stopping} is not at least 1 (null: train all steps)",
        )
        require(
            self.early_stopping is None or self.keep_best >= 1,
            "training.early_stopping",
            "the best checkpoint has to be kept; set training.keep_best=1",
        )
        require(
            self.continue_from is not None or not self.continue_optimizer,
            "training.continue_optimizer",
            "there is no run to take it from; set training.continue_from",
        )
        require(self.num_train_epochs > 0, "training.num_train_epochs", f"{self.num_train_epochs} is not positive")
        require(0 <= self.label_smoothing < 1, "training.label_smoothing", f"{self.label_smoothing} is not in [0, 1)")
        require(self.z_loss >= 0, "training.z_loss", f"{self.z_loss} is negative")
        require(self.router_aux_loss >= 0, "training.router_aux_loss", f"{self.router_aux_loss} is negative")
        require(self.max_steps is None or self.max_steps >= 0, "training.max_steps", f"{self.max_steps} is negative")
        for name in ("wandb_project", "mlflow_experiment", "trackio_project", "run_name"):
            require(getattr(self, name) != "", f"training.{name}", "is empty; name it, or set it to null")
        parts = self.num_microbatches
        require(
            parts == "auto" or (isinstance(parts, int) and not isinstance(parts, bool) and parts >= 1),
            "training.num_microbatches",
            f"{parts!r} is neither auto nor a positive number",
        )
        require(
            parts == "auto" or self.batch_size % parts == 0,
            "training.num_microbatches",
            f"{parts} does not divide batch_size {self.batch_size}; use a divisor of it, or auto",
        )
