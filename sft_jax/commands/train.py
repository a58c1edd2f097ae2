"""A training run, from a config to a folder, read from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sft_jax import config as configs
from sft_jax.announce import Announcer
from sft_jax.checkpoint import Checkpoints, check_same_run
from sft_jax.config import Config
from sft_jax.continuation import dated, is_due, last_step
from sft_jax.data.chat import prompt_ids
from sft_jax.data.examples import Examples
from sft_jax.data.loader import Loader
from sft_jax.data.packing import plan_of, plan_run, row_lengths
from sft_jax.data.prepare import prepare_data
from sft_jax.data.streaming import StreamLoader, first_rows, stream
from sft_jax.errors import Preempted, UserError
from sft_jax.evaluation.compare import Networks, compare, prepare
from sft_jax.hf.config import stop_ids
from sft_jax.hf.hub import absolute, commit_of, find_model, weights_of
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.ties import architecture_of
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.hf.untrained import chat_tokens, untrained_rows
from sft_jax.inference.generator import Generator
from sft_jax.metrics import MetricsWriter, Progress, check_wandb, read_metrics
from sft_jax.models.attention.backend import check_backend
from sft_jax.models.split import Split
from sft_jax.preemption import Preemption
from sft_jax.processes import LONG_WAIT_SECONDS, gather
from sft_jax.report import table
from sft_jax.report.loss import plot_loss
from sft_jax.report.write import write_report
from sft_jax.run_folder import RunFolder
from sft_jax.sharding import check_batch, check_heads, check_lengths, make_mesh
from sft_jax.training.assembly import backend_of, network_of, step_of
from sft_jax.training.compilation import Steps, keep_programs
from sft_jax.training.optimizer import check_rates, labels_of, make_optimizer
from sft_jax.training.state import TrainState, abstract_state, make_state, state_shardings
from sft_jax.training.step import TrainStep, make_eval_step
from sft_jax.training.weights import load_weights
from sft_jax.tree import Params
from sft_jax.typing import Array


def train(config: Config, devices: Sequence[Any] | None = None) -> dict[str, Any]:
    """Run, or continue, the training that ``config`` describes; returns the last metrics.

    Args:
        devices: which to use; by default all there are.

    Raises:
        UserError: anything wrong with config, model, data or run folder; nothing is written before these are checked.
    """
    # -- devices and mesh ---------------------------------------------------------------------------------------------
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    is_main = jax.process_index() == 0
    say = Announcer(is_main)
    check_batch(config.training.batch_size, config.training.num_microbatches, mesh)
    check_lengths(row_lengths(config.data), mesh)
    if is_main:
        check_wandb(config.training.wandb_project)
    folder = RunFolder(config.training.output_dir)
    folder.check()
    run = folder.local
    latest = last_step(folder)
    say.mesh(mesh)
    keep_programs(mesh.devices.flat[0])

    # -- data ---------------------------------------------------------------------------------------------------------
    base = find_model(config.model.path, config.model.revision)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=absolute(config.model.path)))
    reader = TensorReader(weights_of(base)) if config.model.init == "pretrained" else None
    arch = architecture_of(base, reader)
    tokenizer, num_added = load_tokenizer(
        base, config.data.chat_template, config.data.added_tokens, config.data.template_kwargs
    )
    config = dated(config, tokenizer, run, latest)
    base_stops = stop_ids(base)
    is_stream = config.data.streaming
    given = first_rows(config.data.train) if is_stream else config.data.train
    data = prepare_data(config.data, given, tokenizer, base_stops, arch.max_positions)
    examples = data.examples
    say.data("stream" if is_stream else "data", data)
    held_out = None
    if config.data.eval:
        held_out = prepare_data(config.data, config.data.eval, tokenizer, base_stops, arch.max_positions)
        say.data("held out", held_out)
    task = None
    if config.evaluation.at_end:
        task = prepare(config, arch, tokenizer, base_stops)
        say.task(task, names=("documents",))
    today, samples = config.data.date, config.evaluation.samples
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}], today) for text in samples]
    plan = None if is_stream else plan_of(config.data, config.training, examples)
    total_steps = config.training.max_steps if plan is None else plan.num_steps
    assert total_steps is not None
    longest = config.data.max_length if plan is None else int(plan.lengths.max(initial=1))
    say.plan(config, examples, plan)
    check_rates(config.optimizer, total_steps)
    if len(tokenizer) > arch.vocab_size and not num_added and config.lora is not None:
        say(
            "",
            f"the tokenizer has {len(tokenizer):,} tokens, the model's table {arch.vocab_size:,} rows: the others' "
            "rows are made up and not trained",
        )

    # -- model --------------------------------------------------------------------------------------------------------
    old_vocab_size = arch.vocab_size
    arch = dataclasses.replace(arch, vocab_size=max(arch.vocab_size, len(tokenizer)))
    check_heads(arch.attention_specs, mesh)
    model, training = config.model, config.training
    backend = backend_of(config, arch, mesh)
    check_backend(backend, mesh, arch.attention_specs)
    embeddings = num_added > 0 or (config.lora is not None and config.lora.train_embeddings)
    network = partial(network_of, config, arch, mesh, backend, embeddings)
    split = network(remat="full")
    say.model(config, split, backend)
    file_dtype = None if reader is None else reader.dtype("model.embed_tokens.weight")
    say.optimizer(config.optimizer, split, file_dtype)
    params, frozen = load_weights(
        split, reader, config.lora, old_vocab_size, training.seed, "all" if latest is None else "frozen"
    )
    stops = list(dict.fromkeys([*examples.stop_ids, *base_stops]))
    if reader is not None and config.lora is not None and not embeddings:
        say.untrained(tokenizer, untrained_rows(reader, chat_tokens(tokenizer, examples.stop_ids)))

    # -- optimizer and steps ------------------------------------------------------------------------------------------
    optimizer = make_optimizer(config.optimizer, labels_of(split.trainable, split.labels), training.seed)
    shardings = state_shardings(split.trainable, optimizer, mesh)

    def step_with(remat: str) -> TrainStep:
        return step_of(config, network(remat=remat), optimizer, total_steps, shardings, num_groups(examples))

    # -- restore ------------------------------------------------------------------------------------------------------
    identity = {
        "config": configs.to_dict(config),
        "data": examples.fingerprint(),
        "base": reader.fingerprint() if reader else "random",
        "commit": commit_of(base),
        "stop_ids": list(examples.stop_ids),
        "vocab_size": arch.vocab_size,
    }
    if is_main:
        folder.begins()
        if latest is None:
            tokenizer.save_pretrained(run / "tokenizer")
            configs.save(config, run / "config.yaml")
        folder.push()
    gather("the run folder", wait=LONG_WAIT_SECONDS)
    if not folder.is_shared():
        raise UserError(f"training.output_dir: {folder} is not the folder that process 0 sees; all need the same one")
    checkpoints = Checkpoints(folder.checkpoints, training.keep_checkpoints, training.keep_best, training.keep_every)
    loader: Loader | StreamLoader
    if plan is None:
        loader = stream(config, data.encoder, examples.groups, mesh, arch.max_positions)
        identity["data"] = f"{examples.fingerprint()}, {loader.sizes}"
    else:
        loader = Loader(examples, plan, mesh, training.batch_size)
    if latest is not None:
        check_same_run(folder, checkpoints.run(latest), identity)
        state, position = checkpoints.restore(latest, abstract_state(split.trainable, optimizer, mesh))
        loader.set_state(position)
        say("resume", f"at step {latest} of {total_steps}")
    else:
        state = make_state(params, optimizer, mesh)
    del params
    first_step = int(state.step)
    positions = {first_step: loader.get_state()}  # in the data, after each of the last few steps

    # -- loop ---------------------------------------------------------------------------------------------------------
    writer = MetricsWriter(
        run,
        keep_until=-1 if latest is None else latest,
        tensorboard=training.tensorboard,
        wandb_project=training.wandb_project,
        config=configs.to_dict(config),
        enabled=is_main,
    )
    progress = Progress(first_step, total_steps, enabled=is_main)
    evaluator = None if held_out is None else _Evaluator(config, held_out.examples, mesh, split)
    last: dict[str, Any] = {"step": first_step}

    def evaluate(step: int, state: TrainState) -> None:
        if evaluator is not None:
            row = evaluator(state.params, frozen)
            last.update(row)
            writer.write({"step": step, **row})
            progress.say(f"step {step}/{total_steps}  held-out loss {row['eval_loss']:.4f}")

    generator = Generator(split, arch.max_positions, stops, mesh)

    def write_samples(step: int, state: TrainState) -> None:
        written = generator(state.params, frozen, prompts, config.evaluation.max_new_tokens)
        samples = [
            {
                "prompt": prompt,
                "text": tokenizer.decode(one.ids, skip_special_tokens=True).strip(),
                "finish_reason": one.finish_reason,
            }
            for prompt, one in zip(config.evaluation.samples, written, strict=True)
        ]
        writer.write_samples(step, samples)
        for sample in samples:
            progress.say(f"step {step}/{total_steps}  {sample['prompt']!r} → {sample['text']!r}")

    def finish_step(step: int, metrics: dict[str, Array], num_slots: int, since: float) -> float:
        """Wait for a step that was started one step ago, so that the device never waits for us; returns the time."""
        fetched = jax.device_get(metrics)
        by_source = source_losses(examples, fetched.pop("by_source"))
        values = {key: value.item() for key, value in fetched.items()}
        now = time.perf_counter()
        row = {
            "step": step,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "token_accuracy": values["token_accuracy"],
            "entropy": values["entropy"],
            "target_tokens": int(values["target_tokens"]),
            "real_tokens": int(values["real_tokens"]),
            "slot_tokens": num_slots,
            "real_tokens_per_second": values["real_tokens"] / (now - since),
            "step_seconds": now - since,
        }
        if by_source:
            row["source_loss"] = by_source
        last.update(row)
        if step % training.log_every == 0 or step == total_steps or not values["finite"]:
            writer.write(row)
        progress.update(step, row["loss"], row["real_tokens_per_second"])
        if not values["finite"]:
            rows = None if plan is None else [examples.describe(int(i)) for row in plan.rows_of(step - 1) for i in row]
            position = loader.whole_state(positions[step - 1])
            _stop_not_finite(folder, step, values, rows, position, checkpoints, state, identity)
        return now

    with jax.set_mesh(mesh), Preemption() as preemption:
        batches = iter(loader)
        try:
            # What is due at the first step, and what a run that was asked to stop left for this one.
            if is_due(run, latest, training.eval_every, "eval_loss"):
                evaluate(first_step, state)
            if prompts and is_due(run, latest, config.evaluation.samples_every, "samples"):
                write_samples(first_step, state)
            if first_step < total_steps:
                batch = next(batches)
                positions[first_step + 1] = loader.get_state()
                train_step = Steps(step_with, model.remat, mesh.local_devices[0], say.compiled)
                train_step.prepare(state, frozen, batch, longest)
                pending: tuple[int, dict[str, Array], int] | None = None
                since = time.perf_counter()
                for step in range(first_step + 1, total_steps + 1):
                    state, metrics = train_step(state, frozen, batch)
                    num_slots = batch.inputs.size
                    if step < total_steps:
                        batch = next(batches)
                        positions[step + 1] = loader.get_state()
                        positions.pop(step - 3, None)
                    if pending is not None:
                        since = finish_step(*pending, since)
                    pending = (step, metrics, num_slots)
                    asked = preemption.reached(step) and step < total_steps
                    ends = step == total_steps
                    evaluates = not asked and (step % training.eval_every == 0 or ends)
                    saves = asked or step % training.save_every == 0 or ends
                    writes = bool(prompts) and not asked and (step % config.evaluation.samples_every == 0 or ends)
                    if evaluates or saves or writes:
                        since = finish_step(*pending, since)
                        pending = None
                        if evaluates:
                            evaluate(step, state)
                        if writes:
                            write_samples(step, state)
                        if saves:
                            position, score = loader.whole_state(positions[step]), last.get("eval_loss")
                            checkpoints.save(step, state, position, identity, score if evaluates else None)
                        if is_main:
                            folder.push()
                        if asked:
                            checkpoints.wait()
                            raise Preempted(f"asked to stop; step {step} is saved; the same command goes on from it")
                        since = time.perf_counter()
            elif latest is None:  # nothing to do: the base model itself is the result
                checkpoints.save(0, state, loader.whole_state(positions[0]), identity)
        finally:
            checkpoints.close()
            writer.close()
            progress.close()
            if is_main:
                folder.push()

    # -- finish -------------------------------------------------------------------------------------------------------
    rows = read_metrics(run / "metrics.jsonl") if is_main else []
    if is_main:
        curve = plot_loss(run, rows).relative_to(run)
        say("done", f"{total_steps} steps; loss curve in {folder}/{curve}")
    if task is not None:
        tuned = state.params
        del state  # the optimizer's memory is the base's now
        before, _ = load_weights(split, reader, None, old_vocab_size, training.seed, "trainable", frozen)
        comparison = compare(config, task, Networks(split, mesh, arch, tokenizer, stops, frozen, before, tuned))
        last.update({f"tuned_{key}": value for key, value in comparison.summary["tuned"].items()})
        if is_main:
            page = write_report(config, run, total_steps, comparison, rows, tokenizer)
            print(table.as_text(comparison), flush=True)
            say("report", f"{folder}/{page.relative_to(run)}")
    if is_main:
        folder.push(last=True)
    say("next", f"sft-jax generate {folder} --chat, or sft-jax export {folder} OUT")
    return last


class _Evaluator:
    """Held-out loss per target token (by weight): sums over all batches, divided once."""

    def __init__(self, config: Config, examples: Examples, mesh: Mesh, split: Split):
        rows = config.training.batch_size // config.training.num_microbatches
        length, packing = config.data.max_length, config.data.packing or config.data.streaming  # as row_lengths says
        plan = plan_run(examples.slots, length, rows, 1, packing=packing, shuffle=False)
        self._examples = examples
        self._make_loader = lambda: Loader(examples, plan, mesh, rows)
        self._step = make_eval_step(split, num_groups(examples))

    def __call__(self, params: Params, frozen: Params) -> dict[str, Any]:
        sums = [jax.device_get(self._step(params, frozen, batch)) for batch in self._make_loader()]
        totals = {key: sum(float(one[key]) for one in sums) for key in ("loss", "weight", "correct", "targets")}
        row: dict[str, Any] = {
            "eval_loss": totals["loss"] / totals["weight"],
            "eval_token_accuracy": totals["correct"] / totals["targets"],
        }
        by_source = source_losses(self._examples, np.sum([one["by_source"] for one in sums], axis=0))
        return row | ({"eval_source_loss": by_source} if by_source else {})


def num_groups(examples: Examples) -> int:
    """How many sources have their losses told apart: none where there is only one."""
    return len(examples.groups) if len(examples.groups) > 1 else 0


def source_losses(examples: Examples, by_source: np.ndarray) -> dict[str, float]:
    """Loss per target of each source that has any; ``by_source`` has summed losses and weights ``[S, 2]``."""
    return {
        name: float(loss / weight)
        for name, (loss, weight) in zip(examples.groups, by_source, strict=False)
        if weight > 0
    }


def _stop_not_finite(
    folder: RunFolder,
    step: int,
    values: dict[str, float],
    rows: list[str] | None,
    position: dict[str, Any],
    checkpoints: Checkpoints,
    state: TrainState,
    identity: dict[str, Any],
) -> None:
    """Save the state before the fault, write down the batch's rows, and end the run."""
    good = dataclasses.replace(state, halted=jnp.zeros_like(state.halted))
    checkpoints.save(step - 1, good, position, identity)
    checkpoints.wait()
    name = f"report/not_finite_step_{step}.json"
    path = folder.local / name
    if jax.process_index() == 0:
        path.parent.mkdir(exist_ok=True)
        found = {key: repr(values[key]) for key in ("loss", "grad_norm")}
        path.write_text(json.dumps({"step": step, **found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    shown = "rows of a stream, which are not kept apart"
    if rows is not None:
        shown = (
            ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "") + f" (all in {folder}/{name})"
        )
    raise UserError(
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; the batch holds {shown}; the state "
        f"before it is saved as step {step - 1}"
    )
