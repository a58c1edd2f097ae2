"""Reports a run during training: metrics, progress, callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from sft_jax import config_file as configs
from sft_jax.distributed.preemption import Preemption
from sft_jax.redaction import values_without_secrets
from sft_jax.report.live import write_status
from sft_jax.report.loss import plot_loss
from sft_jax.run.alarms import Alarms
from sft_jax.run.prepare import Inputs
from sft_jax.store.loggers.choose import open_loggers
from sft_jax.store.loggers.jsonl import Jsonl
from sft_jax.store.loggers.logger import LoggedRun
from sft_jax.store.loggers.writer import MetricsWriter
from sft_jax.store.metrics import Progress, read_metrics
from sft_jax.typing import Array

_SECONDS_BETWEEN_DRAWINGS = 60.0

Callback = Callable[[str, int, dict[str, Any]], object]  # kind of event, step, metrics; "stop" ends the run


class Halted(Exception):
    """A loss or gradient is not finite, or a gradient is a spike at which the run stops."""

    def __init__(self, step: int, values: dict[str, Any], reason: str):
        self.step, self.values, self.reason = step, values, reason


class Recorder:
    """Writes metrics one step late, so that the device never waits for them.

    Attributes:
        last: the newest value of each metric.
        stop_requested: whether a callback returned ``"stop"``.
    """

    def __init__(self, inputs: Inputs, first_step: int, preemption: Preemption, callbacks: Sequence[Callback] = ()):
        training, is_main = inputs.config.training, jax.process_index() == 0
        self.last: dict[str, Any] = {"step": first_step}
        self.stop_requested = False
        self._total, self._every = inputs.total_steps, training.log_every
        self._stops_at_spikes = inputs.config.optimizer.spike_guard == "stop"
        self._alarms = Alarms()
        self._groups = inputs.data.examples.groups
        self._callbacks = callbacks if is_main else ()
        self._preemption = preemption
        self._is_main, self._run = is_main, inputs.folder.local
        self._draw_after = time.monotonic() + _SECONDS_BETWEEN_DRAWINGS
        if is_main:
            write_status(self._run, self._total)
        self._progress = Progress(first_step, self._total, enabled=is_main)
        self._writer = _open_writer(inputs, self._progress.say) if is_main else MetricsWriter(None)
        self._device = inputs.mesh.local_devices[0]
        self._pending: tuple[int, dict[str, Array], int] | None = None
        self._since = time.perf_counter()

    def started(self, step: int, metrics: dict[str, Array], num_tokens: int) -> None:
        """Record that a step was dispatched to the device; waits for the previous step.

        Args:
            num_tokens: number of tokens in the batch, including padding.

        Raises:
            Halted: the previous step changed nothing, and no later one will.
        """
        self.flush()
        self._pending = (step, metrics, num_tokens)

    def flush(self) -> None:
        """Wait for the dispatched step and write its metrics.

        Raises:
            Halted: the step changed nothing, and no later one will.
        """
        if self._pending is None:
            return
        (step, metrics, num_tokens), self._pending = self._pending, None
        fetched = jax.device_get(metrics)
        by_source = source_losses(self._groups, fetched)
        values = {key: value.item() for key, value in fetched.items() if value.ndim == 0}
        finite, is_spike, now = values.pop("finite"), values.pop("spike", False), time.perf_counter()
        row = {
            "step": step,
            **{key: int(value) if key.endswith(("_tokens", "_steps")) else value for key, value in values.items()},
            "slot_tokens": num_tokens,
            "real_tokens_per_second": values["real_tokens"] / (now - self._since),
            "step_seconds": now - self._since,
        }
        if by_source:
            row["source_loss"] = by_source
        row |= peak_memory(self._device)
        self.last.update(row)
        if step % self._every == 0 or step == self._total or not finite or is_spike:
            self._writer.write(row)
        self._progress.update(step, row["loss"], row["real_tokens_per_second"])
        self._since = now
        for text in self._alarms.of(row, is_spike):
            self.say(step, text)
        if not finite:
            raise Halted(step, values, "not_finite")
        if is_spike and self._stops_at_spikes:
            raise Halted(step, values, "spike")
        self.notify("step", step, row)

    def evaluated(self, step: int, row: dict[str, Any]) -> None:
        """Record metrics of held-out data."""
        self.last.update(row)
        self._writer.write({"step": step, **row})
        self.say(step, f"held-out loss {row['eval_loss']:.4f}")
        self.notify("evaluation", step, row)

    def sampled(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Record answers that the model generated during training."""
        self._writer.write_samples(step, samples)
        for sample in values_without_secrets(samples):
            self.say(step, f"{sample['prompt']!r} → {sample['text']!r}")
        self.notify("samples", step, {"samples": samples})

    def say(self, step: int, text: str) -> None:
        """Print a line about a step."""
        self._progress.say(f"step {step}/{self._total}  {text}")

    def notify(self, kind: str, step: int, metrics: dict[str, Any]) -> None:
        """Call the callbacks. If one returns ``"stop"``, the run stops after the current step."""
        for callback in self._callbacks:
            if callback(kind, step, metrics) == "stop":
                self.stop_requested = True
                self._preemption.request()

    def flush_to_disk(self) -> None:
        """Write the metrics of all dispatched steps, and wait until they are on the disk."""
        self.flush()
        self._writer.flush()

    def draw(self) -> None:
        """Draw the loss curve so far, at most once a minute, and in at most a hundredth of the time."""
        if not self._is_main or time.monotonic() < self._draw_after:
            return
        began = time.monotonic()
        plot_loss(self._run, read_metrics(self._run / "metrics.jsonl"))
        took = time.monotonic() - began
        self._draw_after = began + max(_SECONDS_BETWEEN_DRAWINGS, 100 * took)

    def restart_clock(self) -> None:
        """Exclude the time since the last step from the time of the next one."""
        self._since = time.perf_counter()

    def compared(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Record metrics of the base and the tuned model at the end, by the model's name."""
        self.last.update({f"tuned_{key}": value for key, value in results["tuned"].items()})
        self._writer.write_results(self._total, results)

    def drawn(self, figure: Path) -> None:
        """Record a PNG file that shows the whole run."""
        self._writer.write_figure(self._total, figure)

    def end_loop(self) -> None:
        """Close the progress bar."""
        self._progress.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close everything, and tell the loggers whether the run ended well."""
        self._progress.close()
        self._writer.close(failed=kind is not None)


def _open_writer(inputs: Inputs, say: Callable[[str], None]) -> MetricsWriter:
    training, folder = inputs.config.training, inputs.folder
    config = values_without_secrets(configs.to_dict(inputs.config))
    name = training.run_name or folder.name.rpartition("/")[2]
    run = LoggedRun(folder.local, name, config, inputs.latest)
    loggers = open_loggers(training, run, say)
    return MetricsWriter(Jsonl(folder.local, keep_until=-1 if inputs.latest is None else inputs.latest), loggers)


def peak_memory(device: Any) -> dict[str, int]:
    """The most memory that a device had in use so far; nothing for devices that do not count it, such as CPUs."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"memory_peak_bytes": peak}


def source_losses(groups: Sequence[str], fetched: dict[str, Any]) -> dict[str, float]:
    """The loss of each source with supervised tokens; removes the losses and weights of sources from ``fetched``."""
    losses, weights = fetched.pop("source_loss"), fetched.pop("source_weight")
    pairs = zip(groups, np.asarray(losses), np.asarray(weights), strict=False)
    return {name: float(loss) for name, loss, weight in pairs if weight > 0}
