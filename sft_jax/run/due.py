"""Periodic tasks of a run: evaluation, samples, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from sft_jax.assembly import Model
from sft_jax.config import Config
from sft_jax.data.batches.loader import Loader
from sft_jax.data.batches.packing import plan_run
from sft_jax.data.chat.encoder import prompt_ids
from sft_jax.data.tokens.examples import Examples
from sft_jax.evaluation.compare import eval_batch_size
from sft_jax.progress import Work
from sft_jax.run.early_stopping import EarlyStopping
from sft_jax.run.prepare import Inputs
from sft_jax.run.recorder import Recorder, source_losses
from sft_jax.run.resume import is_due
from sft_jax.run.start import Session, num_groups
from sft_jax.training.losses import cross_entropy_loss
from sft_jax.training.step import make_eval_step
from sft_jax.tree import Params


@dataclass(frozen=True)
class Task:
    """A task that runs every ``every`` steps and after the last step.

    Attributes:
        key: key of the metrics that it writes; None if it writes none.
        every: number of steps between two executions.
        do: performs the task; called with the step.
        when_stopping: whether the task runs when the run is asked to stop, even if it is not due.
    """

    key: str | None
    every: int
    do: Callable[[int], None]
    when_stopping: bool = False

    def is_due(self, step: int, total_steps: int, stopping: bool) -> bool:
        """Whether the task runs after ``step``."""
        return self.when_stopping if stopping else step % self.every == 0 or step == total_steps

    def is_due_at_start(self, inputs: Inputs) -> bool:
        """Whether the task runs before the first step; after a resume, only if it was due there and did not run."""
        return self.key is not None and is_due(inputs.folder.local, inputs.latest, self.every, self.key)


def tasks_of(
    inputs: Inputs,
    session: Session,
    recorder: Recorder,
    stopping: EarlyStopping,
    is_asked_to_stop: Callable[[int], bool],
) -> list[Task]:
    """The tasks of a run in order. Checkpoints follow the evaluation, whose loss decides which checkpoint is best.

    Args:
        is_asked_to_stop: whether an evaluation after this step is to be left, because the run stops there.
    """
    config, tasks = inputs.config, []
    if inputs.held_out is not None:
        evaluator = Evaluator(config, inputs.held_out.examples, session.model)

        def evaluate(step: int) -> None:
            row = evaluator(session.state.params, lambda: is_asked_to_stop(step))
            if row is not None:
                stopping.measured(step, row["eval_loss"])
                recorder.evaluated(step, row)

        tasks.append(Task("eval_loss", config.training.eval_every, evaluate))
    if config.evaluation.samples:
        sampler = Sampler(config, session.model)
        every = config.evaluation.samples_every
        tasks.append(Task("samples", every, lambda step: recorder.sampled(step, sampler(session.state.params))))

    def save(step: int) -> None:
        session.save(step, stopping.loss(step))
        recorder.notify("save", step, {})

    return [*tasks, Task(None, config.training.save_every, save, when_stopping=True)]


class Evaluator:
    """Computes the held-out loss: the sum over all batches, divided once by the total weight of supervised tokens."""

    def __init__(self, config: Config, examples: Examples, model: Model):
        batch_size = eval_batch_size(config, model.mesh)
        length, packing = config.data.max_length, config.data.packing or config.data.streaming  # as in sequence_lengths
        plan = plan_run(examples.num_tokens, length, batch_size, 1, packing=packing, shuffle=False)
        self._groups, self._frozen = examples.groups, model.frozen
        self._loss = cross_entropy_loss(num_groups(examples))
        self._num_batches = plan.num_steps
        self._make_loader = lambda: Loader(examples, plan, model.mesh, batch_size)
        self._step = make_eval_step(model.split, self._loss)

    def __call__(self, params: Params, is_stopping: Callable[[], bool]) -> dict[str, Any] | None:
        """Returns the metrics; None if the run was asked to stop before all batches were done."""
        sums = []
        with Work("evaluating", self._num_batches, "batches") as work:
            for batch in self._make_loader():
                if is_stopping():
                    return None
                sums.append(jax.device_get(self._step(params, self._frozen, batch)))
                work.update()
        totals = {key: sum(one[key].astype(float) for one in sums) for key in self._loss.zeros}
        metrics = jax.device_get(self._loss.metrics(totals)) | {"source_weight": totals["source_weight"]}
        by_source = source_losses(self._groups, metrics)
        row: dict[str, Any] = {f"eval_{key}": float(value) for key, value in metrics.items()}
        return row | ({"eval_source_loss": by_source} if by_source else {})


class Sampler:
    """Generates answers to the prompts of ``evaluation.samples``."""

    def __init__(self, config: Config, model: Model):
        self._config, self._model = config.evaluation, model
        date = config.data.date
        self._prompts: Sequence[list[int]] = [
            prompt_ids(model.tokenizer, [{"role": "user", "content": text}], date) for text in self._config.samples
        ]

    def __call__(self, params: Params) -> list[dict[str, Any]]:
        model = self._model
        with Work("answering", len(self._prompts), "samples") as work:
            answers = model.generator(
                params, model.frozen, self._prompts, self._config.max_new_tokens, progress=work.update
            )
        return [
            {
                "prompt": prompt,
                "text": model.tokenizer.decode(answer.ids, skip_special_tokens=True).strip(),
                "finish_reason": answer.finish_reason,
            }
            for prompt, answer in zip(self._config.samples, answers, strict=True)
        ]
