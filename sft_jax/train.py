"""A training run, from a config to a folder, read from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sft_jax import config as configs
from sft_jax.architecture import Architecture
from sft_jax.checkpoint import Checkpoints
from sft_jax.config import Config, SourceConfig
from sft_jax.data.chat import Encoder
from sft_jax.data.examples import Examples, Report, encode_sources
from sft_jax.data.loader import Loader
from sft_jax.data.packing import Plan, plan_run
from sft_jax.data.sources import open_sources
from sft_jax.errors import UserError
from sft_jax.hf.config import read_architecture
from sft_jax.hf.hub import find_model
from sft_jax.hf.load import load_params
from sft_jax.hf.peft import load_adapter
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.metrics import MetricsWriter, Progress
from sft_jax.models.decoder import Decoder
from sft_jax.models.lora import Split, attach_lora, flatten, init_adapter, is_adapter, split_params, unflatten
from sft_jax.report import plot_loss
from sft_jax.sharding import make_mesh, num_batch_shards
from sft_jax.training.optimizer import labels_of, make_optimizer, make_schedule
from sft_jax.training.state import TrainState, abstract_state, make_state, state_shardings
from sft_jax.training.step import EvalStep, make_eval_step, make_train_step
from sft_jax.typing import Array, Params

# A checkpoint is continued only by the same config; these keys do not change what is computed.
_FREE_KEYS = (
    "training.output_dir",
    "training.eval_every",
    "training.save_every",
    "training.log_every",
    "training.keep_checkpoints",
    "training.tensorboard",
    "training.wandb_project",
    "model.remat",
    "mesh.",
)


def train(config: Config, devices: Sequence[jax.Device] | None = None) -> dict[str, Any]:
    """Run, or continue, the training that ``config`` describes; returns the last metrics.

    Args:
        devices: which to use; by default all there are.

    Raises:
        UserError: anything wrong with config, model, data or run folder; nothing is written before these are checked.
    """
    # -- devices and mesh ---------------------------------------------------------------------------------------------
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    is_main = jax.process_index() == 0
    say = _Speaker(is_main)
    _check_batch(config, mesh)
    run = Path(config.training.output_dir)
    _check_run_folder(run)
    say("devices", f"{mesh.size} × {mesh.devices.flat[0].device_kind}, mesh {_shape(mesh)}")

    # -- data ---------------------------------------------------------------------------------------------------------
    folder = find_model(config.model.path, config.model.revision)
    arch = read_architecture(folder)
    tokenizer, num_added = load_tokenizer(folder, config.data.chat_template, config.data.added_tokens)
    encoder = Encoder(tokenizer, config.data.train_on, config.data.stop_token)
    examples, data_report = _encode(config, config.data.train, encoder, arch)
    _say_data(say, "data", data_report, encoder)
    held_out = None
    if config.data.eval:
        encoder = Encoder(tokenizer, config.data.train_on, config.data.stop_token)
        held_out, held_out_report = _encode(config, config.data.eval, encoder, arch)
        _say_data(say, "held out", held_out_report, encoder)
    plan = _plan(config, examples)
    total_steps = plan.num_steps
    say("plan", _describe_plan(config, examples, plan))

    # -- model --------------------------------------------------------------------------------------------------------
    old_vocab_size = arch.vocab_size
    arch = dataclasses.replace(arch, vocab_size=max(arch.vocab_size, len(tokenizer)))
    _check_heads(arch, mesh)
    split = build(config, arch, mesh, train_token_table=num_added > 0)
    reader = TensorReader(folder) if config.model.init == "pretrained" else None
    say("model", _describe_model(config, arch, split))
    resumes = any((run / "checkpoints").glob("[0-9]*"))
    params, frozen = load_weights(config, arch, split, reader, old_vocab_size, only_frozen=resumes)

    # -- optimizer and steps ------------------------------------------------------------------------------------------
    optimizer = make_optimizer(config.optimizer, labels_of(split.trainable, split.labels))
    schedule = make_schedule(config.optimizer, total_steps)
    shardings = state_shardings(split.trainable, optimizer, mesh)
    dropout = config.lora is not None and config.lora.dropout > 0
    train_step = make_train_step(
        split,
        optimizer,
        schedule,
        config.training.gradient_accumulation_steps,
        jax.random.fold_in(jax.random.key(config.training.seed), 1) if dropout else None,
        shardings,
    )
    eval_step = make_eval_step(split)

    # -- restore ------------------------------------------------------------------------------------------------------
    identity = {
        "config": configs.to_dict(config),
        "data": examples.fingerprint(),
        "base": reader.fingerprint() if reader else "random",
        "stop_ids": list(examples.stop_ids),
        "vocab_size": arch.vocab_size,
    }
    run.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(run / "checkpoints", config.training.keep_checkpoints)
    loader = Loader(examples, plan, mesh, config.training.batch_size, config.data.max_length)
    latest = max(checkpoints.steps(), default=None)
    if resumes and latest is None:
        raise UserError(f"{run}: its checkpoints are not complete; name another training.output_dir")
    if latest is not None:
        _check_same_run(run, checkpoints.run(latest), identity)
        state, position = checkpoints.restore(latest, abstract_state(split.trainable, optimizer, mesh))
        loader.set_state(position)
        say("resume", f"at step {latest} of {total_steps}")
    else:
        state = make_state(params, optimizer, mesh)
        if is_main:
            configs.save(config, run / "config.yaml")
            tokenizer.save_pretrained(run / "tokenizer")
    del params
    first_step = int(state.step)

    # -- loop ---------------------------------------------------------------------------------------------------------
    writer = MetricsWriter(
        run,
        first_step,
        config.training.tensorboard,
        config.training.wandb_project,
        configs.to_dict(config),
        enabled=is_main,
    )
    progress = Progress(first_step, total_steps, enabled=is_main)
    evaluator = None if held_out is None else _Evaluator(config, held_out, mesh, eval_step)
    last: dict[str, Any] = {"step": first_step}
    slot_tokens = config.training.batch_size * config.data.max_length

    def evaluate(step: int, state: TrainState) -> None:
        if evaluator is not None:
            loss = evaluator(state.params, frozen)
            last.update(eval_loss=loss)
            writer.write({"step": step, "eval_loss": loss})
            progress.say(f"step {step}/{total_steps}  held-out loss {loss:.4f}")

    def finish_step(step: int, metrics: dict[str, Array], since: float) -> float:
        """Wait for a step that was started one step ago, so that the device never waits for us; returns the time."""
        values = {key: value.item() for key, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        row = {
            "step": step,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "target_tokens": int(values["target_tokens"]),
            "real_tokens": int(values["real_tokens"]),
            "slot_tokens": slot_tokens,
            "real_tokens_per_second": values["real_tokens"] / (now - since),
            "step_seconds": now - since,
        }
        last.update(row)
        if step % config.training.log_every == 0 or step == total_steps or not values["finite"]:
            writer.write(row)
        progress.update(step, row["loss"], row["real_tokens_per_second"])
        if not values["finite"]:
            _stop_not_finite(run, step, values, examples, plan, checkpoints, state, identity)
        return now

    with jax.set_mesh(mesh):
        batches = iter(loader)
        try:
            if first_step == 0:
                evaluate(0, state)
            if first_step < total_steps:
                batch = next(batches)
                began = time.perf_counter()
                compiled = train_step.lower(state, frozen, batch).compile()  # type: ignore[attr-defined]
                say("compiled", f"the step in {time.perf_counter() - began:.1f} s")
                pending: tuple[int, dict[str, Array]] | None = None
                since = time.perf_counter()
                for step in range(first_step + 1, total_steps + 1):
                    state, metrics = compiled(state, frozen, batch)
                    position = {"next_index": step}
                    batch = next(batches) if step < total_steps else batch
                    if pending is not None:
                        since = finish_step(*pending, since)
                    pending = (step, metrics)
                    evaluates = step % config.training.eval_every == 0 or step == total_steps
                    saves = step % config.training.save_every == 0 or step == total_steps
                    if evaluates or saves:
                        since = finish_step(*pending, since)
                        pending = None
                        if evaluates:
                            evaluate(step, state)
                        if saves:
                            checkpoints.save(step, state, position, identity)
                        since = time.perf_counter()
            elif latest is None:  # nothing to do: the base model itself is the result
                checkpoints.save(0, state, {"next_index": 0}, identity)
        finally:
            checkpoints.close()
            writer.close()
            progress.close()

    # -- finish -------------------------------------------------------------------------------------------------------
    if is_main:
        picture = plot_loss(run)
        say("done", f"{total_steps} steps; loss curve in {picture}; next: sft-jax export {run} OUT")
    return last


def build(config: Config, arch: Architecture, mesh: Mesh, train_token_table: bool) -> Split:
    """The network of a config, taken apart into trainable and frozen leaves; nothing is allocated."""
    lora = config.lora

    def network() -> Decoder:
        model = Decoder(arch, jax.random.key(0), jnp.dtype(config.model.dtype), config.model.remat)
        if lora is not None:
            attach_lora(model, lora.rank, lora.alpha, lora.target_modules, lora.dropout)
        return model

    return split_params(nnx.eval_shape(network), mesh, full=lora is None, token_table=train_token_table)


def load_weights(
    config: Config,
    arch: Architecture,
    split: Split,
    reader: TensorReader | None,
    old_vocab_size: int,
    only_frozen: bool = False,
) -> tuple[Params, Params]:
    """Trainable and frozen leaves, in place on the mesh: base weights from files or random, adapters fresh or given.

    With ``only_frozen`` the trainable leaves, which a checkpoint is about to give, are checked but not read.
    """
    trainable, frozen = flatten(split.trainable), flatten(split.frozen)
    adapter = {path: leaf for path, leaf in trainable.items() if is_adapter(path)}
    base = {path: leaf for path, leaf in (trainable | frozen).items() if path not in adapter}
    seed = jax.random.key(config.training.seed)
    if reader is not None:
        wanted = frozen if only_frozen else base
        loaded = load_params(reader, base, wanted, arch.num_layers, arch.tie_word_embeddings, old_vocab_size)
    elif only_frozen:
        loaded = {}
    else:
        loaded = _random_weights(arch, base, seed)
    weights = {path: loaded[path] for path in frozen}
    if only_frozen:
        return {}, unflatten(weights)
    lora = config.lora
    if lora is not None and lora.init_from is not None:
        loaded |= load_adapter(lora.init_from, adapter, arch.num_layers, lora.rank, lora.alpha)
    elif adapter:
        loaded |= init_adapter(adapter, seed)
    return unflatten({path: loaded[path] for path in trainable}), unflatten(weights)


def _random_weights(arch: Architecture, base: dict, seed: Array) -> dict:
    def init() -> dict:
        leaves = dict(nnx.to_flat_state(nnx.state(Decoder(arch, seed))))
        return {path: leaves[path][...].astype(leaf.dtype) for path, leaf in base.items()}

    return jax.jit(init, out_shardings={path: leaf.sharding for path, leaf in base.items()})()


class _Evaluator:
    """Held-out loss per target token: sums over all batches, divided once."""

    def __init__(self, config: Config, examples: Examples, mesh: Mesh, step: EvalStep):
        rows = config.training.batch_size // config.training.gradient_accumulation_steps
        length = config.data.max_length
        self._plan = plan_run(examples.slots, length, rows, 1, packing=config.data.packing, shuffle=False)
        self._make_loader = lambda: Loader(examples, self._plan, mesh, rows, length)
        self._step = step

    def __call__(self, params: Params, frozen: Params) -> float:
        sums = [self._step(params, frozen, batch) for batch in self._make_loader()]
        loss = sum(float(s["loss"]) for s in sums)
        return loss / sum(float(s["target_tokens"]) for s in sums)


class _Speaker:
    """Start-up lines, ``name  text``, from one process only."""

    def __init__(self, enabled: bool):
        self._enabled = enabled

    def __call__(self, name: str, text: str) -> None:
        if self._enabled:
            print(f"{name:>9}  {text}", file=sys.stderr, flush=True)


def _encode(
    config: Config, sources: list[SourceConfig], encoder: Encoder, arch: Architecture
) -> tuple[Examples, Report]:
    opened = open_sources(sources)
    num_rows = sum(len(source.rows) for source in opened)
    from tqdm import tqdm

    with tqdm(total=num_rows, unit="row", desc="tokenising", leave=False, disable=None) as bar:
        examples, report = encode_sources(opened, encoder, config.data.max_length, config.data.overlong, bar.update)
    longest = int(examples.slots.max()) + 1
    if longest > arch.max_positions:
        where = examples.describe(int(examples.slots.argmax()))
        raise UserError(
            f"data.max_length: {where} has {longest} tokens, the model has {arch.max_positions} positions; "
            f"set data.max_length={arch.max_positions}"
        )
    return examples, report


def _plan(config: Config, examples: Examples) -> Plan:
    repeats = None
    if any(weight != 1.0 for weight in examples.weights):
        import numpy as np

        repeats = np.asarray(examples.weights)[examples.source]
    return plan_run(
        examples.slots,
        config.data.max_length,
        config.training.batch_size,
        config.training.num_train_epochs,
        config.training.max_steps,
        config.training.seed,
        config.data.packing,
        config.data.shuffle,
        repeats,
    )


def _check_batch(config: Config, mesh: Mesh) -> None:
    parts = config.training.gradient_accumulation_steps
    rows, shards = config.training.batch_size // parts, num_batch_shards(mesh)
    if rows % shards:
        raise UserError(
            f"training.batch_size: {config.training.batch_size} rows in {parts} part(s) do not divide over the "
            f"{shards} devices of data × fsdp; use a multiple of {shards * parts}"
        )


def _check_heads(arch: Architecture, mesh: Mesh) -> None:
    tensor = mesh.shape["tensor"]
    if arch.num_heads % tensor:
        fits = [n for n in range(1, arch.num_heads + 1) if arch.num_heads % n == 0]
        raise UserError(f"mesh.tensor: {tensor} does not divide the {arch.num_heads} heads; {fits} do")


def _check_run_folder(run: Path) -> None:
    """Only an absent or empty folder, or one that holds a run, may be written to."""
    if run.exists() and not run.is_dir():
        raise UserError(f"training.output_dir: {run} is a file")
    if run.is_dir() and any(run.iterdir()) and not ((run / "config.yaml").is_file() or (run / "checkpoints").is_dir()):
        raise UserError(f"training.output_dir: {run} holds something that is not a run; name another folder")


def _check_same_run(run: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    before, now = configs.flatten(saved["config"]), configs.flatten(current["config"])
    for key in sorted(before.keys() | now.keys()):
        if not key.startswith(_FREE_KEYS) and before.get(key) != now.get(key):
            raise UserError(
                f"{run}: holds a run with {key}={before.get(key)!r}, the config now says {now.get(key)!r}; "
                "restore it, or name another training.output_dir"
            )
    for key, what in (("data", "training data"), ("base", "base model")):
        if saved[key] != current[key]:
            raise UserError(f"{run}: the {what} has changed since this run began; name another training.output_dir")


def _stop_not_finite(
    run: Path,
    step: int,
    values: dict[str, float],
    examples: Examples,
    plan: Plan,
    checkpoints: Checkpoints,
    state: TrainState,
    identity: dict[str, Any],
) -> None:
    """Save the state before the fault, write down the batch's rows, and end the run."""
    good = dataclasses.replace(state, halted=jnp.zeros_like(state.halted))
    checkpoints.save(step - 1, good, {"next_index": step - 1}, identity)
    checkpoints.wait()
    rows = [examples.describe(int(item)) for row in plan.rows_of(step - 1) for item in row]
    path = run / "report" / f"not_finite_step_{step}.json"
    path.parent.mkdir(exist_ok=True)
    found = {key: repr(values[key]) for key in ("loss", "grad_norm")}
    path.write_text(json.dumps({"step": step, **found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
    raise UserError(
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; the batch holds {shown} "
        f"(all in {path}); the state before it is saved as step {step - 1}"
    )


def _say_data(say: _Speaker, name: str, report: Report, encoder: Encoder) -> None:
    share = report.targets / report.tokens
    say(name, f"{report.kept:,} of {report.rows:,} rows, {report.tokens:,} tokens, {share:.0%} of them targets")
    if report.dropped or report.truncated or report.dropped_without_targets:
        say("", f"too long: {report.dropped:,} dropped, {report.truncated:,} truncated, "
            f"{report.dropped_without_targets:,} left without targets; {report.targets_lost:,} targets lost")  # fmt: skip
    if report.straddling:
        say("", f"{report.straddling:,} tokens straddle the edge of a trained turn and are not trained")
    stops = ", ".join(f"{token!r} ({count:,} turns)" for token, count in report.stop_tokens.items())
    say("mask", f"train_on {encoder.train_on}, from {encoder.mask_source}; stop token {stops}")


def _describe_plan(config: Config, examples: Examples, plan: Plan) -> str:
    if plan.num_steps == 0:
        return "no steps"
    slots = (len(plan.rows) - 1) * config.data.max_length
    filled = int(examples.slots[plan.items].sum())
    packing = "packed" if config.data.packing else "one example a row"
    epochs = Counter(int(end) for end in plan.epoch_ends)
    return (
        f"{plan.num_steps:,} steps of {config.training.batch_size} rows × {config.data.max_length} slots, "
        f"{len(epochs)} epoch(s), {packing}, {filled / slots:.1%} of slots filled"
    )


def _describe_model(config: Config, arch: Architecture, split: Split) -> str:
    def count(params: Params) -> int:
        return sum(leaf.size for leaf in flatten(params).values())

    trained, frozen = count(split.trainable), count(split.frozen)
    kind = "full fine-tuning" if config.lora is None else f"LoRA rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    by_label = Counter(label for label in split.labels.values())
    labels = ", ".join(f"{count} {label}" for label, count in sorted(by_label.items()))
    return (
        f"{arch.family}, {kind}: {trained:,} trained (float32), {frozen:,} frozen ({config.model.dtype}); "
        f"leaves {labels}; attention xla (query chunks), remat {config.model.remat}"
    )


def _shape(mesh: Mesh) -> str:
    return " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
