"""The section ``evaluation``."""

from __future__ import annotations

from dataclasses import dataclass, field

from sft_jax.config.checks import one_of, require
from sft_jax.config.data import SourceConfig


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
        one_of(self.answer, "evaluation.answer", ("exact", "text", "number", "gsm8k", "choice", "json"))
        for name in ("max_new_tokens", "batch_size", "samples_every"):
            require(getattr(self, name) >= 1, f"evaluation.{name}", f"{getattr(self, name)} is not at least 1")
        require(
            self.num_questions is None or self.num_questions >= 1,
            "evaluation.num_questions",
            f"{self.num_questions} is not at least 1 (null: all)",
        )
        require(self.shots >= 0, "evaluation.shots", f"{self.shots} is negative")
        require(0 <= self.hardest <= 1000, "evaluation.hardest", f"{self.hardest} is not between 0 and 1000")
