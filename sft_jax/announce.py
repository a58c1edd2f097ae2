"""What a run says before its first step: devices, data, mask, plan, model. Nothing is chosen in silence."""

from __future__ import annotations

import sys
from collections import Counter

from jax.sharding import Mesh

from sft_jax.config import Config
from sft_jax.data.chat import Encoder
from sft_jax.data.examples import Examples, Report
from sft_jax.data.packing import Plan
from sft_jax.evaluation.compare import Task
from sft_jax.models.lora import Split
from sft_jax.tree import Params, flatten


class Announcer:
    """Lines of ``name  text`` on standard error, from one process only."""

    def __init__(self, enabled: bool):
        self._enabled = enabled

    def __call__(self, name: str, text: str) -> None:
        if self._enabled:
            print(f"{name:>9}  {text}", file=sys.stderr, flush=True)

    def mesh(self, mesh: Mesh) -> None:
        """Devices and how they are arranged."""
        shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
        self("devices", f"{mesh.size} × {mesh.devices.flat[0].device_kind}, mesh {shape}")

    def data(self, name: str, report: Report, encoder: Encoder) -> None:
        """Rows kept and left out, how the mask was found, and what ends a turn."""
        share = report.targets / report.tokens
        self(name, f"{report.kept:,} of {report.rows:,} rows, {report.tokens:,} tokens, {share:.0%} of them targets")
        if report.kept < report.rows or report.truncated:
            self(
                "",
                f"too long: {report.dropped:,} dropped, {report.truncated:,} truncated, "
                f"{report.dropped_without_targets:,} left without targets; {report.targets_lost:,} targets lost",
            )
        if report.straddling:
            self("", f"{report.straddling:,} tokens straddle the edge of a trained turn and are not trained")
        stops = ", ".join(f"{token!r} ({count:,} turns)" for token, count in report.stop_tokens.items())
        self("mask", f"train_on {encoder.train_on}, from {encoder.mask_source}; stop token {stops}")

    def task(self, task: Task, names: tuple[str, ...] = ("held out", "documents")) -> None:
        """What became of the rows to evaluate on."""
        for name, report, encoder in task.reports:
            if name in names:
                self.data(name, report, encoder)

    def plan(self, config: Config, examples: Examples, plan: Plan) -> None:
        """Steps, epochs and how full the rows are."""
        if plan.num_steps == 0:
            self("plan", "no steps")
            return
        slots = (len(plan.rows) - 1) * config.data.max_length
        filled = int(examples.slots[plan.items].sum()) / slots
        packing = "packed" if config.data.packing else "one example a row"
        rows = f"{config.training.batch_size} rows × {config.data.max_length} slots"
        self(
            "plan",
            f"{plan.num_steps:,} steps of {rows}, {len(plan.epoch_ends)} epoch(s), {packing}, {filled:.1%} filled",
        )

    def model(self, config: Config, family: str, split: Split) -> None:
        """What is trained, in which dtype, and which kernels compute it."""

        def count(params: Params) -> int:
            return sum(leaf.size for leaf in flatten(params).values())

        lora = config.lora
        kind = "full fine-tuning" if lora is None else f"LoRA rank {lora.rank}, alpha {lora.alpha:g}"
        labels = ", ".join(f"{count} {label}" for label, count in sorted(Counter(split.labels.values()).items()))
        self(
            "model",
            f"{family}, {kind}: {count(split.trainable):,} trained (float32), {count(split.frozen):,} frozen; "
            f"leaves {labels}",
        )
        self("compute", f"{config.model.dtype}, attention xla in query chunks, remat {config.model.remat}")
