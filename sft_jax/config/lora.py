"""The section ``lora``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft_jax.config.checks import require


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
        require(self.rank >= 1, "lora.rank", f"{self.rank} is not a positive number")
        require(self.alpha > 0, "lora.alpha", f"{self.alpha} is not a positive number")
        require(0.0 <= self.dropout < 1.0, "lora.dropout", f"{self.dropout} is not in [0, 1)")
        names = self.target_modules
        require(
            names == "all-linear"
            or (isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names)),
            "lora.target_modules",
            f"{names!r} is neither 'all-linear' nor a list of module names such as [q_proj, v_proj]",
        )
