"""The Python face: what the commands do, as functions and two objects; ``import sft_jax`` gives it and loads no jax.

>>> import sft_jax
>>> run = sft_jax.train(sft_jax.load_config("configs/quickstart.yaml"))  # doctest: +SKIP
>>> run.model.chat([{"role": "user", "content": "What is the capital of Kyrgyzstan?"}])  # doctest: +SKIP
'Bishkek'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sft_jax import config as configs
from sft_jax.commands import evaluate as _evaluate
from sft_jax.commands import export as _export
from sft_jax.commands import generate as _generate
from sft_jax.commands import inspect as _inspect
from sft_jax.commands import plan as _plan
from sft_jax.commands import score as _score
from sft_jax.commands import train as _train
from sft_jax.config import Config
from sft_jax.data.chat import prompt_ids
from sft_jax.errors import UserError as UserError
from sft_jax.inference.generator import Generator
from sft_jax.inference.sampling import Sampling
from sft_jax.metrics import read_metrics
from sft_jax.models.architecture import Architecture
from sft_jax.opening import Opened, open_model
from sft_jax.run_folder import RunFolder
from sft_jax.tree import Params


class Model:
    """A model that is ready to be used; see :func:`load`.

    Attributes:
        tokenizer: of transformers.
        architecture: sizes, as a dataclass.
    """

    def __init__(self, opened: Opened):
        self._opened = opened
        self.tokenizer = opened.tokenizer
        self.architecture: Architecture = opened.arch

    def __repr__(self) -> str:
        return f"Model({self._opened.description!r})"

    @property
    def params(self) -> dict[str, Params]:
        """Weights as nested dicts of ``jax.Array``: ``adapter`` (float32) and ``frozen``."""
        return {"adapter": self._opened.adapter, "frozen": self._opened.frozen}

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
        """Answers to prompts, each a user's message in the model's chat template.

        Args:
            temperature: 0 takes the likeliest token.
            top_k, top_p: draw from the likeliest tokens only; 0 and 1 from all.
            system: a system message before each prompt.
            raw: continue plain text, without the chat template.
            batch_size: prompts that are answered at a time.

        Raises:
            UserError: no chat template, or a prompt that fills the context.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        found = _generate.generate(self._opened, [*prompts], max_new_tokens, sampling, raw, system, batch_size)
        return [text for _, text in found]

    def chat(self, messages: Sequence[Mapping[str, Any]], max_new_tokens: int = 256, temperature: float = 0.0) -> str:
        """The answer that comes next in a conversation.

        Raises:
            UserError: as :meth:`generate`.
        """
        ids = prompt_ids(self.tokenizer, [dict(message) for message in messages])
        opened, sampling = self._opened, Sampling(temperature)
        (written,) = self._generator(opened.adapter, opened.frozen, [ids], max_new_tokens, sampling)
        return self.tokenizer.decode(written.ids, skip_special_tokens=True).strip()

    def score(self, prompt: str | list[dict[str, Any]], responses: Sequence[str], raw: bool = False) -> list[float]:
        """Log-likelihoods of responses: natural logarithms, summed over their tokens and the stop token.

        Raises:
            UserError: a response that is too long, or cannot be told apart from its prompt.
        """
        rows = [{"prompt": prompt, "responses": [*responses]}]
        return [one.log_likelihood for one in _score.score(self._opened, rows, raw, "the prompt")]

    def logits(self, ids: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """All logits ``[B, T, V]`` (float32) of rows of tokens ``[B, T]`` that have one length."""
        tokens = jnp.asarray(np.asarray(ids, np.int32))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        model = self._opened.split.merge(self._opened.adapter, self._opened.frozen)
        return np.asarray(model.logits(model(tokens, jnp.ones_like(tokens), positions)), np.float32)

    @cached_property
    def _generator(self) -> Generator:
        return self._opened.generator()


class Run:
    """A run folder.

    Attributes:
        folder: where it is.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder if "://" in str(folder) else Path(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        return read_metrics(RunFolder(str(self.folder)).local / "metrics.jsonl")

    @cached_property
    def model(self) -> Model:
        """The tuned model, of the last checkpoint."""
        return load(str(self.folder))

    def evaluate(self, step: int | None = None) -> dict[str, dict[str, float | int]]:
        """Measure base beside tuned on ``data.eval``, as the config of the run says; see :func:`evaluate`."""
        config = configs.load(RunFolder(str(self.folder)).local / "config.yaml")
        return evaluate(config, step)

    def export(self, out: str | Path, format: str | None = None, step: int | None = None) -> Path:
        """Write an adapter or a merged model; see :func:`export`."""
        return export(self.folder, out, format, step)


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """A config from a YAML file, from nested dicts with the same keys, or from another config.

    Args:
        overrides: such as ``optimizer.learning_rate=1e-4``.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range, or a key that is missing.
    """
    if isinstance(source, Config):
        if not overrides:
            return source
        source = configs.to_dict(source)
    if isinstance(source, Mapping):
        return configs.from_dict(source, [*overrides])
    return configs.load(source, [*overrides])


def train(config: Config | Mapping[str, Any]) -> Run:
    """Train, or continue, what a config describes.

    Raises:
        UserError: anything wrong with config, model, data or run folder; told before the first step.
        Preempted: the machine is taken away; the state is saved.
    """
    config = load_config(config)
    _train.train(config)
    return Run(config.training.output_dir)


def evaluate(config: Config | Mapping[str, Any], step: int | None = None) -> dict[str, dict[str, float | int]]:
    """Measure the run in ``training.output_dir`` on held-out data: metrics of ``base``, ``tuned`` and ``few_shot``.

    Raises:
        UserError: no such run, or nothing to evaluate on.
    """
    config = load_config(config)
    return _evaluate.evaluate(config, step).summary


def inspect(config: Config | Mapping[str, Any], rows: int | None = None) -> dict[str, Any]:
    """Print what would be trained, and return the figures.

    Raises:
        UserError: whatever :func:`train` would say of the data.
    """
    return _inspect.inspect(load_config(config), rows)


def plan(config: Config | Mapping[str, Any], topology: str, advice: bool = True) -> dict[str, Any]:
    """Compile the train step for hardware that need not be there; print and return what it takes.

    Args:
        topology: such as ``v5e:4x4`` or ``h100:8``.
        advice: where it does not fit, look for changes with which it does.

    Raises:
        UserError: hardware that is not known, or a config that cannot be compiled.
    """
    config = load_config(config)
    return _plan.plan(config, topology, advice=advice)


def load(name: str | Path, base: str | None = None, dtype: str | None = None, step: int | None = None) -> Model:
    """A model by what people call it: a Hugging Face folder or id, a run, an adapter, or ``builtin:tiny``.

    Args:
        base: the base model of a run or an adapter, where it has moved.
        dtype: of computing, ``bfloat16`` or ``float32``; by default the run's, or that of the files.
        step: a checkpoint of a run; by default the last.

    Raises:
        UserError: nothing of that name, or a base that does not fit.
    """
    return Model(open_model(str(name), base, step, dtype))


def export(
    run: str | Path, out: str | Path, format: str | None = None, step: int | None = None, base: str | None = None
) -> Path:
    """Write a run's result as a Hugging Face folder, and return it.

    Args:
        format: ``adapter`` or ``merged``; by default what was trained.

    Raises:
        UserError: no such run, a folder that is not empty, or an adapter of full fine-tuning.
    """
    _export.export(run, str(out), format, step, base)
    return Path(out)
