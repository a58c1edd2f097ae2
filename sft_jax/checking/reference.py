"""The reference implementation: transformers, and PEFT for adapters, in float32 on the CPU.

The only file that imports torch, and only when a reference is opened.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.hf.config import read_architecture, read_config
from sft_jax.hf.hub import weights_of
from sft_jax.hf.peft import num_embeddings


class NoReference(Exception):
    """The reason why there is nothing to compare with; one line."""


@dataclass(frozen=True)
class Reference:
    """A model of transformers or PEFT.

    Attributes:
        name: the library and its version.
    """

    name: str
    model: Any

    def logits(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits ``[T, V]`` (float32) of each text."""
        import torch

        with torch.no_grad():
            return [self.model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy() for ids in texts]

    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The greedy continuation of a prompt; no token stops it."""
        import torch
        from transformers import GenerationConfig

        ids = torch.tensor([list(prompt)])
        # That of the checkpoint may sample, or penalize repetitions.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,  # of no use for one prompt, but a warning without it
        )
        with torch.no_grad():
            output = self.model.generate(ids, attention_mask=torch.ones_like(ids))
        return output[0, len(prompt) :].tolist()


def open_reference(base: Path, adapter: Path | None = None) -> Reference:
    """Open a model, or an adapter on its base model; runs no code of the model's folder.

    Raises:
        NoReference: torch or PEFT is not installed, or the library cannot open the model.
    """
    try:
        import torch
    except ImportError as error:
        raise NoReference("torch is not installed") from error
    import transformers

    if weights_of(base) != base:
        raise NoReference("the weights are in a bucket, which transformers cannot open")
    is_multimodal = "text_config" in read_config(base)
    auto: Any = transformers.AutoModelForImageTextToText if is_multimodal else transformers.AutoModelForCausalLM
    try:
        with _without_progress():
            loaded: Any = auto.from_pretrained(
                base,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (ImportError, ValueError, OSError, KeyError, RuntimeError, TypeError) as error:
        raise NoReference(f"transformers cannot open it: {_short(error)}") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise NoReference(f"transformers does not find {missing[0]} in the files, and would use random weights")
    if adapter is None:
        return Reference(f"transformers {transformers.__version__}", model.eval())
    try:
        import peft
    except ImportError as error:
        raise NoReference("peft is not installed") from error
    try:
        size = num_embeddings(adapter, read_architecture(base))
        if size is not None and size != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(size, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing. is deprecated", FutureWarning)  # PEFT's
            model = peft.PeftModel.from_pretrained(model, str(adapter))
    except (ImportError, ValueError, OSError, KeyError, RuntimeError, TypeError) as error:
        raise NoReference(f"PEFT cannot open it: {_short(error)}") from error
    return Reference(f"PEFT {peft.__version__}", model.eval())


@contextmanager
def _without_progress() -> Iterator[None]:
    """Hide the progress bar of transformers."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
