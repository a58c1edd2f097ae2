"""The section ``model``."""

from __future__ import annotations

from dataclasses import dataclass

from sft_jax.config.checks import one_of, require


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
    compute: str | None = None  # products of linear layers in eight bits: int8 (TPU, under LoRA) | fp8 (H100, newer)

    def __post_init__(self) -> None:
        one_of(self.dtype, "model.dtype", ("bfloat16", "float32"))
        one_of(self.param_dtype, "model.param_dtype", ("float32", "bfloat16"))
        one_of(self.init, "model.init", ("pretrained", "random"))
        one_of(self.attention, "model.attention", ("auto", "splash", "triton", "cudnn", "xla"))
        one_of(self.remat, "model.remat", ("auto", "full", "attention", "dots", "none"))
        if self.compute is not None:
            one_of(self.compute, "model.compute", ("int8", "fp8"))
            require(
                self.quantization is None,
                "model.compute",
                f"stores the frozen base in {self.compute} already; set model.quantization: null",
            )
        if self.quantization is not None:
            one_of(self.quantization, "model.quantization", ("int8", "nf4"))
            require(
                self.init == "pretrained",
                "model.quantization",
                "only frozen weights can be quantized, and random weights are trained; set model.quantization: null",
            )
