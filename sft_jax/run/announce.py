"""Lines that a run prints before its first step: devices, data, mask, plan, model. No choice is silent."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sft_jax.config import Config, ModelConfig, OptimizerConfig
from sft_jax.data.batches.packing import Plan
from sft_jax.data.tokens.examples import Examples, Report
from sft_jax.data.tokens.prepare import Prepared
from sft_jax.evaluation.task import Task
from sft_jax.models.architecture import Architecture
from sft_jax.models.moe.describe import describe_experts
from sft_jax.models.split import Split
from sft_jax.sharding import bytes_per_device
from sft_jax.training.compilation import Compiled
from sft_jax.tree import Params, flatten


class Announcer:
    """Prints lines of ``name  text`` on standard error, on one process only."""

    def __init__(self, enabled: bool):
        self._enabled = enabled

    def __call__(self, name: str, text: str) -> None:
        if self._enabled:
            print(f"{name:>9}  {text}", file=sys.stderr, flush=True)

    def mesh(self, mesh: Mesh) -> None:
        """Devices and how they are arranged."""
        shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
        self("devices", f"{mesh.size} × {mesh.devices.flat[0].device_kind}, mesh {shape}")

    def data(self, name: str, data: Prepared) -> None:
        """Counts of rows and tokens, the source of the loss mask, and the stop token."""
        report, encoder = data.report, data.encoder
        rows, examples, kept = (report.total(key) for key in ("rows", "examples", "kept"))
        tokens, targets = report.total("tokens"), report.total("targets")
        of = f"{rows:,} rows" if examples == rows else f"{examples:,} examples from {rows:,} rows"
        self(name, f"{kept:,} of {of}, {tokens:,} tokens, {targets / tokens:.0%} of them supervised")
        if len(report.sources) > 1:
            for source in report.sources:
                self("", f"{source.shown}: {source.format}, {source.kept:,} kept, {source.tokens:,} tokens")
        else:
            label = f"{report.sources[0].label}: " if report.sources[0].label else ""
            self("", f"{label}format {report.sources[0].format}, {_origin(report)}")
        if report.total("refused"):
            first = next(source for source in report.sources if source.reasons)
            self("", f"{report.total('refused'):,} rows skipped; the first: {first.reasons[0].at(first.name)}")
        if kept + sum(report.left_out.values()) < examples or report.total("truncated"):
            self(
                "",
                f"too long: {report.total('dropped'):,} dropped, {report.total('truncated'):,} truncated, "
                f"{report.total('dropped_without_targets'):,} left without supervised tokens; "
                f"{report.total('targets_lost'):,} supervised tokens ({report.fraction_lost:.1%}) lost",
            )
        if report.left_out:
            counts = (f"{count:,} {name.replace('_', ' ')}" for name, count in report.left_out.items())
            self("left out", ", ".join(counts))
        for line in report.not_read:
            self("not read", line)
        for note, count in sorted(report.tally.notes.items()):
            if count:
                self("", f"{count:,} {note}")
        stops = ", ".join(f"{token!r} ({count:,} turns)" for token, count in report.stop_tokens.items())
        self("mask", f"train_on {encoder.train_on}, from {encoder.mask_source}; stop token {stops}")

    def task(self, task: Task, names: tuple[str, ...] = ("held out", "documents")) -> None:
        """The same for data to evaluate on."""
        for name, data in task.data:
            if name in names:
                self.data(name, data)
        for name, text in task.notes:
            self(name, text)

    def plan(self, config: Config, examples: Examples, plan: Plan | None) -> None:
        """Steps, epochs, sequences, and the share of padding."""
        if plan is None:
            self(
                "plan", f"{config.training.max_steps:,} steps of a stream; the counts above are those of its first rows"
            )
            return
        if plan.num_steps == 0:
            self("plan", "no steps")
            return
        batch_size = config.training.batch_size
        filled = int(examples.num_tokens[plan.items].sum()) / (batch_size * int(plan.lengths.sum()))
        packing = "packed" if config.data.packing else "one example a sequence, similar lengths together"
        lengths = " or ".join(str(length) for length in sorted(set(plan.lengths.tolist())))
        sequences = f"{batch_size} sequences × {lengths} tokens"
        epochs = f"{len(plan.epoch_ends)} epoch(s)"
        if all(source.weight == 1 for source in config.data.train):
            epochs = f"{len(plan.items) / len(examples):.3g} epoch(s)"
        self(
            "plan",
            f"{plan.num_steps:,} steps of {sequences}, {epochs}, {packing}, {filled:.1%} filled",
        )
        most = int(np.diff(plan.steps).max())
        if most < batch_size:
            self(
                "",
                f"no batch has more than {most:,} of {batch_size:,} sequences, the others are padding; set "
                f"training.batch_size={most} or a smaller data.max_length",
            )

    def new_embeddings(self, num_tokens: int, num_embeddings: int) -> None:
        """Tokens beyond the embeddings."""
        self(
            "",
            f"the tokenizer has {num_tokens:,} tokens, the model {num_embeddings:,} embeddings; the remaining "
            "tokens get new embeddings that are not trained",
        )

    def untrained(self, tokenizer: Any, ids: Sequence[int]) -> None:
        """Special tokens that the base model was never trained with, and that LoRA does not train."""
        if ids:
            tokens = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
            self(
                "untrained",
                f"{tokens}: their embeddings were never trained (zero, tiny or alike), and LoRA does not train them; "
                "the model can hardly distinguish these tokens; set lora.train_embeddings=true to train them",
            )

    def outside(self, arch: Architecture, names: Sequence[str]) -> None:
        """Tensors in the files that are not part of the decoder."""
        if names:
            parts = dict.fromkeys(
                start.removeprefix("model.").strip(".")
                for start in arch.outside
                if any(name.startswith(start) for name in names)
            )
            self("kept", f"{', '.join(parts)}: {len(names):,} tensors are not trained and are exported as they are")

    def compiled(self, step: Compiled) -> None:
        """Compile time, rematerialization policy, microbatches, and memory of a step."""
        memory = "" if step.temp_bytes is None else f", {step.temp_bytes / 2**20:,.0f} MiB of temporary memory"
        parts = f", {step.num_microbatches} microbatch{'es' if step.num_microbatches > 1 else ''}"
        self("compiled", f"sequences of {step.length} in {step.seconds:.1f} s; remat {step.remat}{parts}{memory}")

    def optimizer(self, config: OptimizerConfig, split: Split, file_dtype: np.dtype | None) -> None:
        """Dtype of the moments, and what is rounded; ``file_dtype`` is the dtype of the base model's files."""
        moments = f"moments {config.moments}"
        if config.moments == "factored":
            moments += " (the first bfloat16, the second by rows and columns)"
        rounded = config.moments != "float32"
        if any(leaf.dtype == jnp.bfloat16 for leaf in flatten(split.trainable).values()):
            rounded = True
            if file_dtype is not None and file_dtype != jnp.bfloat16:
                self("", f"the files are {file_dtype}; trained weights are rounded to bfloat16 while loading")
        self("optimizer", f"{config.name}, {moments}" + (", updates rounded stochastically" if rounded else ""))

    def model(self, config: Config, split: Split) -> None:
        """Trained and frozen parameters, their dtypes, and the attention backend."""

        def count(params: Params) -> int:
            return sum(leaf.size for leaf in flatten(params).values())

        frozen = {path: leaf for path, leaf in split.base().items() if path not in flatten(split.trainable)}
        num_frozen = sum(leaf.size for leaf in frozen.values())
        lora = config.lora
        method = type(split.variant).__name__
        kind = "full fine-tuning" if lora is None else f"{method} rank {lora.rank}, alpha {lora.alpha:g}"
        labels = ", ".join(f"{count} {label}" for label, count in sorted(Counter(split.labels.values()).items()))
        self(
            "model",
            f"{split.arch.family}, {kind}: {count(split.trainable):,} trained ({_dtypes(split)}), {num_frozen:,} "
            f"frozen; leaves {labels}",
        )
        if split.quantized:
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in flatten(split.frozen).values())
            self("base", f"{_stored(config.model, split)}: {_bytes(size)}, {size / (2 * num_frozen):.2f} of bfloat16")
        weights = jax.tree.leaves((split.trainable, split.frozen))
        mesh = weights[0].sharding.mesh
        held, whole = bytes_per_device(weights), sum(leaf.size * leaf.dtype.itemsize for leaf in weights)
        share = whole // (mesh.shape["fsdp"] * mesh.shape["tensor"])
        if held > 1.5 * share:
            self(
                "",
                f"each device holds {_bytes(held)} of weights, and an even split would be {_bytes(share)}: mesh.fsdp "
                "or mesh.tensor does not divide the dimensions; use sizes that do, and mesh.data for the remaining "
                "devices",
            )
        self("compute", f"{config.model.dtype}, attention {split.backend}")
        if config.model.compute is not None:
            emulated = ", emulated on a CPU" if mesh.devices.flat[0].platform == "cpu" else ""
            others = "attention, experts, embeddings and lm_head" if split.arch.has_routers else "attention and lm_head"
            self("", f"products of linear layers in {config.model.compute}{emulated}; {others} in {config.model.dtype}")
        num = config.training.num_microbatches
        tokens = (config.training.batch_size // (1 if num == "auto" else num), config.data.max_length)
        shape, itemsize = (*tokens, split.arch.hidden_size), jnp.dtype(config.model.dtype).itemsize
        if experts := describe_experts(split.abstract(), mesh, shape, itemsize):
            self("experts", experts)
        precision: str | None = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        if config.model.dtype == "float32" and jax.default_backend() != "cpu" and precision is None:
            self(
                "", "this device multiplies float32 in lower precision; JAX_DEFAULT_MATMUL_PRECISION=highest avoids it"
            )


def _stored(config: ModelConfig, split: Split) -> str:
    """How the frozen base is quantized."""
    if config.compute is not None:
        return f"{config.compute}, one scale per {'output channel' if config.compute == 'int8' else 'matrix'}"
    of_vocab = [name for name in ("embed_tokens", "lm_head") if (name, "weight") in split.quantized]
    kept = f"{' and '.join(of_vocab)} int8" if of_vocab else "embeddings not quantized because they are trained"
    blocks = sorted({leaf.fmt.block[0] for path, leaf in split.quantized.items() if path[0] == "layers"})
    return f"{config.quantization} in blocks of {' and '.join(map(str, blocks))} inputs, {kept}"


def _dtypes(split: Split) -> str:
    """Dtypes of the trained parameters, with a count for each where there are several."""
    sizes: Counter[str] = Counter()
    for leaf in flatten(split.trainable).values():
        sizes[str(leaf.dtype)] += leaf.size
    return ", ".join(f"{size:,} {dtype}" if len(sizes) > 1 else dtype for dtype, size in sorted(sizes.items()))


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _origin(report: Report) -> str:
    origins = [source.origin for source in report.sources]
    if all(origin.cached for origin in origins):
        return "tokens from the cache"
    workers = max(origin.num_workers for origin in origins)
    seconds = sum(origin.seconds for origin in origins)
    return f"tokenized in {seconds:.1f} s" + (f" by {workers} processes" if workers > 1 else "")
