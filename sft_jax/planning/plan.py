"""The ``plan`` command: compiles a config's step ahead of time for a topology and reports memory, speed and advice."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.hf.hub import find_config
from sft_jax.planning.advice import Advice, Outcome, advise
from sft_jax.planning.changes import as_text
from sft_jax.planning.compiled_time import compiled_figures
from sft_jax.planning.network import Sent
from sft_jax.planning.roofline import Roofline, roofline
from sft_jax.planning.search import Candidate, Choice, Prediction, candidates, choose
from sft_jax.planning.step import AbstractStep, Base, Compiled, abstract_step, compile_step, read_base
from sft_jax.planning.text import plan_text
from sft_jax.planning.topology import Topology, devices_of, parse_topology, usable_bytes
from sft_jax.sharding import num_heads

# Of a choice of the search, all None where it does not fit.
_PREDICTED = (
    "predicted_step_seconds",
    "predicted_tokens_per_second",
    "ranked_by",
    "bound",
    "compiled_step_seconds",
    "roofline_step_seconds",
    "roofline_tokens_per_second",
)


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about the data, which ``plan`` does not read."""

    target_share: float = 0.5  # fraction of tokens that carry loss
    document_length: int | None = None  # tokens; None: data.max_length

    def __post_init__(self) -> None:
        if not 0.0 < self.target_share <= 1.0:
            raise UserError(f"--target-share: {self.target_share} is not in (0, 1]")
        if self.document_length is not None and self.document_length < 1:
            raise UserError(f"--document-length: {self.document_length} is not at least 1")

    def length(self, config: Config) -> int:
        """Document length in tokens."""
        return min(self.document_length or config.data.max_length, config.data.max_length)


def plan(
    config: Config,
    topology: str,
    architecture: str | Path | None = None,
    assumed: Assumptions | None = None,
    as_json: bool = False,
    advice: bool = True,
    search: bool = False,
    profile: bool = False,
    quiet: bool = False,
    keep_text: str | Path | None = None,
) -> dict[str, Any]:
    """Compiles the step that ``train`` would run on ``topology``, prints its requirements and returns the figures.

    Reads only the model's ``config.json``, no data and no weights.

    Args:
        topology: such as ``v5e:4x4`` or ``h100:8``.
        architecture: path of a ``config.json`` to use instead of the model's.
        advice: search for changes that make the step fit if it does not.
        search: also search for the fastest mesh, number of microbatches and rematerialization policy.
        profile: also the places of the program that take more cycles than at peak, where the compiler estimates them.
        quiet: print nothing.
        keep_text: file for the program's optimized HLO text, where the compiler writes one.

    Raises:
        UserError: a config that ``train`` would refuse; an unknown topology; a compiler that is not installed.
    """
    log = _Progress(enabled=not quiet)
    where = parse_topology(topology)
    assumed = assumed or Assumptions()
    with _folder_of(config, architecture) as folder:
        base = read_base(config, folder)
    planner = _Planner(base, assumed, log)
    step, compiled = planner.compile(config, where, "the step")
    bounds = planner.bounds(step, compiled, where)
    result = figures(step, compiled, bounds, where, assumed, profile)
    if keep_text is not None and compiled.program is not None:
        Path(keep_text).write_text(compiled.program.text, encoding="utf-8")
    if not compiled.fits and advice:
        result["advice"] = _advice(planner.advise(where, step, compiled))
    if search:
        result["search"] = [_choice(choice) for choice in planner.search(config, where)]
    if not quiet:
        print(json.dumps(result) if as_json else plan_text(result), flush=True)
    return result


class _Planner:
    """Compiles steps of one model."""

    def __init__(self, base: Base, assumed: Assumptions, log: _Progress):
        self._base, self._assumed, self._log = base, assumed, log

    def compile(self, config: Config, where: Topology, name: str) -> tuple[AbstractStep, Compiled]:
        step = abstract_step(config, self._base, devices_of(where))
        compiled = self._compiled(step, where, name)
        return step.with_microbatches(compiled.num_microbatches), compiled

    def bounds(self, step: AbstractStep, compiled: Compiled, where: Topology) -> Roofline:
        sent = None if compiled.collectives is None else sum((one.sent for one in compiled.collectives), Sent())
        if step.mesh.size == 1:
            sent = Sent()
        return self._roofline(step, compiled.remat, where, sent)

    def advise(self, where: Topology, step: AbstractStep, compiled: Compiled) -> Advice:
        """Searches for changes that make the step fit."""

        def compile_with(changed: Config, topology: Topology) -> Outcome:
            return _outcome(*self.compile(changed, topology, f"with {_difference(step.config, changed)}"))

        heads, usable = num_heads(self._base.arch.attention_specs), usable_bytes(where.chip)
        return advise(step.config, where, heads, usable, _outcome(step, compiled), compile_with)

    def search(self, config: Config, where: Topology) -> list[Choice]:
        """Returns the compiled combinations, fastest prediction first."""
        devices = devices_of(where)
        ranked = candidates(
            config,
            lambda changed: abstract_step(changed, self._base, devices),
            where.num_devices,
            where.chip,
            self._assumed.target_share,
            self._assumed.length(config),
        )
        self._log(f"{len(ranked)} combinations of mesh, microbatches and remat; compiling the fastest by formula")

        def compile_with(candidate: Candidate) -> Compiled:
            return self._compiled(candidate.step, where, f"with {as_text(candidate.changes)}")

        def predict(candidate: Candidate, compiled: Compiled) -> Prediction:
            if compiled.collectives is None:
                return Prediction(candidate.expected, None)
            bounds = self.bounds(candidate.step, compiled, where)
            time = _compiled_time(candidate.step, compiled, bounds, where, self._assumed)
            return Prediction(bounds, None if time["cycles"] is None else time["seconds"] + time["waiting_seconds"])

        return choose(ranked, usable_bytes(where.chip), compile_with, predict)

    def _compiled(self, step: AbstractStep, where: Topology, name: str) -> Compiled:
        self._log(f"compiling {name} for {where} …")
        compiled = compile_step(step, usable_bytes(where.chip), self._assumed.target_share)
        size = "" if compiled.peak_bytes is None else f", {compiled.peak_bytes / 2**30:.2f} GiB"
        verdict = "fits" if compiled.fits else "does not fit"
        self._log(f"{verdict}: remat {compiled.remat}{size}, {compiled.seconds:.1f} s")
        return compiled

    def _roofline(self, step: AbstractStep, remat: str, where: Topology, sent: Sent | None) -> Roofline:
        length = self._assumed.length(step.config)
        return roofline(step, remat, where.chip, sent, self._assumed.target_share, length)


def figures(
    step: AbstractStep,
    compiled: Compiled,
    bounds: Roofline,
    where: Topology,
    assumed: Assumptions,
    profile: bool = False,
) -> dict[str, Any]:
    """Returns all figures as JSON values, the input of :func:`sft_jax.planning.text.plan_text`; bytes are per chip."""
    config = step.config
    sizes = step.sizes()
    tokens = config.training.batch_size * config.data.max_length
    collectives = None
    if compiled.collectives is not None:
        collectives = [
            {"kind": one.kind, "count": one.count} | dataclasses.asdict(one.sent) | {"bytes_alone": one.alone.bytes}
            for one in compiled.collectives
        ]
    return {
        "topology": str(where),
        "num_devices": where.num_devices,
        "mesh": dict(step.mesh.shape),
        "fits": compiled.fits,
        "peak_bytes": compiled.peak_bytes,
        "argument_bytes": compiled.argument_bytes,
        "temp_bytes": compiled.temp_bytes,
        "spare_bytes": compiled.spare_bytes,
        "room_bytes": compiled.room_bytes,
        "hbm_bytes": where.chip.hbm_bytes,
        "usable_bytes": usable_bytes(where.chip),
        "part_bytes": sizes,
        "remat": compiled.remat,
        "attention": str(step.split.backend),
        "experts": step.experts,
        "num_microbatches": compiled.num_microbatches,
        "rows_at_a_time": step.local_batch_size,
        "tokens_per_step": tokens,
        "target_share": assumed.target_share,
        "document_length": assumed.length(config),
        "collectives": collectives,
        "model_flops_per_step": bounds.model_flops,
        "flops_per_step": bounds.flops,
        "compute_seconds": bounds.compute_seconds,
        "memory_seconds": bounds.memory_seconds,
        "network_seconds": bounds.network_seconds,
        "roofline_step_seconds": bounds.seconds,
        "roofline_tokens_per_second": tokens / bounds.seconds,
        "bound": bounds.bound,
        "compiled": _compiled_time(step, compiled, bounds, where, assumed, profile),
        "compile_seconds": compiled.seconds,
        "compile_cpu_seconds": compiled.cpu_seconds,
    }


def _compiled_time(
    step: AbstractStep,
    compiled: Compiled,
    bounds: Roofline,
    where: Topology,
    assumed: Assumptions,
    profile: bool = False,
) -> dict[str, Any]:
    trips, model_flops = step.loop_trips(assumed.target_share), bounds.model_flops / where.num_devices
    time = compiled_figures(compiled.program, where.chip, trips, model_flops, profile)
    alone = sum((one.alone for one in compiled.collectives or ()), Sent())
    return time if time["cycles"] is None else time | {"waiting_seconds": alone.seconds(where.chip)}


def _advice(advice: Advice) -> dict[str, Any]:
    return {
        "changes": None if advice.changes is None else as_text(advice.changes),
        "topology": str(advice.topology),
        "peak_bytes": advice.outcome.peak_bytes,
        "tried": [
            {
                "changes": as_text(changes),
                "topology": str(where),
                "fits": outcome.fits,
                "peak_bytes": outcome.peak_bytes,
            }
            for changes, where, outcome in advice.tried
        ],
    }


def _choice(choice: Choice) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "changes": as_text(choice.candidate.changes),
        "fits": choice.compiled.fits,
        "peak_bytes": choice.compiled.peak_bytes,
    }
    predicted = choice.predicted
    if predicted is None:
        return figures | dict.fromkeys(_PREDICTED)
    tokens = choice.tokens_per_second * predicted.seconds
    values = (
        predicted.seconds,
        choice.tokens_per_second,
        predicted.ranked_by,
        predicted.bound,
        predicted.compiled_seconds,
        predicted.roofline.seconds,
        tokens / predicted.roofline.seconds,
    )
    return figures | dict(zip(_PREDICTED, values, strict=True))


def _outcome(step: AbstractStep, compiled: Compiled) -> Outcome:
    return Outcome(compiled.fits, compiled.peak_bytes, step.resident_bytes())


def _difference(old: Config, new: Config) -> str:
    """Formats the changed keys as command-line overrides."""
    changes = {
        f"{section.name}.{key.name}": getattr(value, key.name)
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(value := getattr(new, section.name))
        for key in dataclasses.fields(value)
        if getattr(value, key.name) != getattr(getattr(old, section.name), key.name)
    }
    return as_text(changes) or "more chips"


@contextmanager
def _folder_of(config: Config, architecture: str | Path | None) -> Iterator[Path]:
    """Yields a folder with the model's ``config.json``."""
    if architecture is None:
        yield find_config(config.model.path, config.model.revision)
        return
    path = Path(architecture)
    if not path.is_file():
        raise UserError(f"--architecture: no such file {path}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(path.read_bytes())
        yield Path(folder)


class _Progress:
    """Prints lines to standard error with the seconds since the start."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._began = time.perf_counter()

    def __call__(self, text: str) -> None:
        if self._enabled:
            print(f"{time.perf_counter() - self._began:7.1f} s  {text}", file=sys.stderr, flush=True)
