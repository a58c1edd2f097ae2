"""The Python API: the commands as functions, and the classes ``Model`` and ``Run``; all are available in ``sft_jax``.

>>> import sft_jax
>>> run = sft_jax.train(sft_jax.load_config("configs/quickstart.yaml"))  # doctest: +SKIP
>>> run.model.chat([{"role": "user", "content": "What is the capital of Kyrgyzstan?"}])  # doctest: +SKIP
'Bishkek'
"""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sft_jax import assembly
from sft_jax import config_file as configs
from sft_jax.config import Config
from sft_jax.data.read.memory import write_source
from sft_jax.errors import CheckFailed as CheckFailed
from sft_jax.errors import Stopped
from sft_jax.errors import UserError as UserError
from sft_jax.evaluation import score as _score
from sft_jax.inference.sampling import Sampling
from sft_jax.models.architecture import Architecture
from sft_jax.planning import plan as _plan
from sft_jax.run import check as _check
from sft_jax.run import evaluate as _evaluate
from sft_jax.run import export as _export
from sft_jax.run import generate as _generate
from sft_jax.run import inspect as _inspect
from sft_jax.run import push as _push
from sft_jax.run import train as _train
from sft_jax.store.folder import RunDirectory
from sft_jax.store.metrics import read_metrics
from sft_jax.store.steps import Step
from sft_jax.tree import Params

Rows = Iterable[Mapping[str, Any]]  # such as a list of dicts or a Hugging Face dataset


class Model:
    """A model with its weights and tokenizer, ready to generate and score; see :func:`load`.

    Attributes:
        tokenizer: a tokenizer of transformers.
        architecture: the sizes of the model.
    """

    def __init__(self, model: assembly.Model):
        self._model = model
        self.tokenizer = model.tokenizer
        self.architecture: Architecture = model.arch

    def __repr__(self) -> str:
        return f"Model({self._model.description!r})"

    @property
    def params(self) -> dict[str, Params]:
        """Parameters as nested dicts of ``jax.Array``: ``adapter`` (float32) and ``frozen``."""
        return {"adapter": self._model.params, "frozen": self._model.frozen}

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        raw: bool = False,
        batch_size: int = 16,
    ) -> list[str]:
        """Generate an answer to each prompt, rendered as a user message with the model's chat template.

        Args:
            temperature: 0 decodes greedily.
            top_k, top_p: sample from the most likely tokens only; 0 and 1 disable the limits.
            system: a system message before each prompt.
            raw: continue the prompt as plain text, without the chat template.
            batch_size: prompts generated at a time.

        Raises:
            UserError: no chat template, or a prompt that fills the context.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        answers = _generate.generate(self._model, [*prompts], max_new_tokens, sampling, raw, system, batch_size)
        return [text for _, text in answers]

    def chat(self, messages: Sequence[Mapping[str, Any]], max_new_tokens: int = 256, temperature: float = 0.0) -> str:
        """Generate the next answer in a conversation.

        Raises:
            UserError: as :meth:`generate`.
        """
        ids = _generate.chat(self._model, messages, max_new_tokens, Sampling(temperature))
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def score(self, prompt: str | list[dict[str, Any]], responses: Sequence[str], raw: bool = False) -> list[float]:
        """Log-likelihoods of responses: natural logarithms, summed over their tokens and the stop token.

        Raises:
            UserError: a response that is too long, or that cannot be separated from its prompt.
        """
        rows = [{"prompt": prompt, "responses": [*responses]}]
        return [one.log_likelihood for one in _score.score(self._model, rows, raw, "the prompt")]

    def logits(self, ids: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Logits ``[B, T, V]`` (float32) of token sequences ``[B, T]`` of equal length."""
        tokens = jnp.asarray(np.asarray(ids, np.int32))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        network = self._model.network()
        return np.asarray(network.logits(network(tokens, jnp.ones_like(tokens), positions)), np.float32)


class Run:
    """A run directory. Notebooks display its loss curve.

    Attributes:
        folder: its path or URL.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder if "://" in str(folder) else Path(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """The loss curve and the newest metrics as HTML."""
        folder = self._directory.local
        curve = folder / "report" / "loss.png"
        image = ""
        if curve.is_file():
            data = base64.b64encode(curve.read_bytes()).decode()
            image = f'<img alt="loss by step" style="max-width:100%" src="data:image/png;base64,{data}">'
        newest: dict[str, Any] = {}
        for row in read_metrics(folder / "metrics.jsonl"):
            newest |= {key: value for key, value in row.items() if isinstance(value, int | float)}
        values = ", ".join(f"{key} {newest[key]:.4g}" for key in ("step", "loss", "eval_loss") if key in newest)
        return f"<div><code>{html.escape(str(self.folder))}</code> {values}<br>{image}</div>"

    @property
    def _directory(self) -> RunDirectory:
        return RunDirectory(str(self.folder))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        return read_metrics(self._directory.local / "metrics.jsonl")

    @cached_property
    def model(self) -> Model:
        """The tuned model, from the last checkpoint."""
        return load(str(self.folder))

    def evaluate(self, step: Step = None) -> dict[str, dict[str, Any]]:
        """Evaluate the base and the tuned model with the config of the run; see :func:`evaluate`."""
        return evaluate(configs.load(self._directory.local / "config.yaml"), step)

    def export(self, out: str | Path, format: str | None = None, step: Step = None, **options: Any) -> Path:
        """Write an adapter or a merged model; see :func:`export`, which also has the other options."""
        return export(self.folder, out, format, step, **options)


@dataclass(frozen=True)
class Event:
    """The argument of a callback.

    Attributes:
        kind: ``step``, ``evaluation``, ``samples``, ``save`` or ``end``.
        step: number of completed steps.
        metrics: metrics of the event, as in ``metrics.jsonl``.
        run: the run directory.
    """

    kind: str
    step: int
    metrics: dict[str, Any]
    run: Run


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Load a config from a YAML file, from nested dicts with the same keys, or from another config.

    Args:
        overrides: dotted keys with values, such as ``optimizer.learning_rate=1e-4``.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range, or a missing key.
    """
    if isinstance(source, Config):
        if not overrides:
            return source
        source = configs.to_dict(source)
    if isinstance(source, Mapping):
        return configs.from_dict(source, [*overrides])
    return configs.load(source, [*overrides])


def train(
    config: Config | Mapping[str, Any],
    train_data: Rows | None = None,
    eval_data: Rows | None = None,
    callbacks: Sequence[Callable[[Event], object]] = (),
) -> Run:
    """Train the model that a config describes, or resume its run.

    Args:
        train_data, eval_data: rows that replace the files of ``data.train`` and ``data.eval``.
        callbacks: process 0 calls them with each :class:`Event`. If one returns ``"stop"``, the run saves its state
            and stops after the current step.

    Raises:
        UserError: anything wrong with config, model, data or run directory; raised before the first step.
        Preempted: the machine is being preempted; the state is saved.
    """
    config = _with_rows(config, train_data, eval_data)
    run = Run(config.training.output_dir)

    def with_event(callback: Callable[[Event], object]) -> Callable[[str, int, dict[str, Any]], object]:
        return lambda kind, step, metrics: callback(Event(kind, step, metrics, run))

    with suppress(Stopped):  # a callback returned "stop"
        _train.train(config, callbacks=[with_event(callback) for callback in callbacks])
    return run


def evaluate(config: Config | Mapping[str, Any], step: Step = None) -> dict[str, dict[str, Any]]:
    """Evaluate the run in ``training.output_dir`` on held-out data: metrics of ``base``, ``tuned`` and ``few_shot``.

    Raises:
        UserError: no such run, or nothing to evaluate on.
    """
    return _evaluate.evaluate(load_config(config), step).summary


def inspect(config: Config | Mapping[str, Any], rows: int | None = None, lint: bool = False) -> dict[str, Any]:
    """Print examples of the training data with their loss mask; returns counts and lengths.

    Args:
        rows: number of examples to print.
        lint: also look for duplicates, leaks, broken answers, outliers and secrets; returned as ``lint``.

    Raises:
        UserError: the errors that :func:`train` raises for these data.
    """
    return _inspect.inspect(load_config(config), rows, lint=lint)


def plan(config: Config | Mapping[str, Any], topology: str, advice: bool = True) -> dict[str, Any]:
    """Compile the train step ahead of time for a TPU slice or GPUs; print and return its memory and time.

    Args:
        topology: such as ``v5e:4x4`` or ``h100:8``.
        advice: if the step does not fit, search for changes that make it fit.

    Raises:
        UserError: unknown hardware, or a config that cannot be compiled.
    """
    return _plan.plan(load_config(config), topology, advice=advice)


def load(name: str | Path, base: str | None = None, dtype: str | None = None, step: Step = None) -> Model:
    """Load a model: a Hugging Face folder or id, a run, an adapter, or ``builtin:tiny``.

    Args:
        base: the base model of a run or an adapter, if it has moved.
        dtype: compute dtype, ``bfloat16`` or ``float32``; by default that of the run or of the files.
        step: a checkpoint of a run, ``best`` or ``last``; by default the last.

    Raises:
        UserError: no model of that name, or a base model that does not match.
    """
    return Model(assembly.open_model(str(name), base, step, dtype))


def check(name: str | Path, base: str | None = None, step: Step = None) -> dict[str, Any]:
    """Prove that a model is imported right: tensors, bytes, logits, greedy text, chat template.

    Compares with transformers, or with PEFT for an adapter or a LoRA run, where they and torch are installed. Prints a
    line per check, also for what could not be checked.

    Args:
        name, base, step: as for :func:`load`.

    Returns:
        ``passed``, and ``checks`` with the ``status`` of each: ``ok``, ``FAILED`` or ``not checked``.

    Raises:
        UserError: no model of that name, or one that cannot be opened at all.
    """
    return _check.check(str(name), base, step)


def export(
    run: str | Path,
    out: str | Path,
    format: str | None = None,
    step: Step = None,
    base: str | None = None,
    check: bool = False,
    dtype: str | None = None,
    push: str | None = None,
    public: bool = False,
) -> Path:
    """Export a run as a Hugging Face folder; returns its path.

    Args:
        format: ``adapter`` or ``merged``; by default ``adapter`` for LoRA and ``merged`` for full fine-tuning.
        check: load the export again and compare its logits with those of the run.
        dtype: ``bfloat16``, ``float16`` or ``float32`` for a merged model; by default that of the base model's files.
        push: ``USER/REPO`` or ``USER/REPO@BRANCH`` of the Hugging Face Hub to upload to. ``out`` may then be a finished
            export of the same run, step, format and dtype, which is only uploaded.
        public: whether a repository that ``push`` creates is public; otherwise it is private.

    Raises:
        UserError: no such run, a folder that is not empty, ``adapter`` for a fully fine-tuned run, no token for the
            Hub, or an upload that failed; the same command resumes it.
        CheckFailed: the export computes something else than the run; it stays where it is, and is not uploaded.
    """
    if check:
        _check.refuse_check(str(out))
    target = _push.prepare(push, public, str(run), str(out))
    published_as = None if target is None else target.name
    written = _export.export(run, str(out), format, step, base, dtype, published_as)
    if check:
        _check.check_export(run, str(out), written.form, step, base)
    if target is not None:
        _push.upload(target, str(out), written)
    return Path(out)


def _with_rows(config: Config | Mapping[str, Any], train_data: Rows | None, eval_data: Rows | None) -> Config:
    datasets = {"train": train_data, "eval": eval_data}
    sources = {key: [write_source(rows, f"{key}_data")] for key, rows in datasets.items() if rows is not None}
    if isinstance(config, Mapping) and sources:  # the dicts may lack data.train
        as_dicts = {key: [dataclasses.asdict(source) for source in value] for key, value in sources.items()}
        return load_config({**config, "data": {**config.get("data", {}), **as_dicts}})
    config = load_config(config)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **sources)) if sources else config
