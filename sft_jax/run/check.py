"""Checks an imported model or an exported run against its files and against transformers or PEFT."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sft_jax.assembly import Found, find
from sft_jax.checking.chat import check_chat
from sft_jax.checking.files import (
    check_adapter_bytes,
    check_architecture,
    check_bytes,
    check_names,
    num_params,
    too_large,
)
from sft_jax.checking.logits import (
    NEW_TOKENS,
    check_greedy,
    check_packed,
    difference,
    logits,
    measure,
    needed_bytes,
    sample_ids,
    untested,
)
from sft_jax.checking.reference import NoReference, Reference, open_reference
from sft_jax.checking.result import FAILED, NOT_CHECKED, Result, failures, verdict
from sft_jax.checking.written import IsKept, merged, rounded
from sft_jax.errors import CheckFailed, UserError
from sft_jax.files.buckets import is_url
from sft_jax.hf.peft import ADAPTER_FILE, names_in_adapter
from sft_jax.hf.reader import TensorReader
from sft_jax.models.split import is_adapter
from sft_jax.run.export import write_adapter
from sft_jax.store.steps import Step
from sft_jax.training.compilation import free_bytes

Logits = list[Any]


def check(name: str, base: str | None = None, step: Step = None, as_json: bool = False) -> dict[str, Any]:
    """Prove that a model is imported right, in float32 on the CPU; prints a line per check.

    Checks names, shapes and bytes of all tensors; logits of a few texts and 16 greedy tokens against transformers, or
    PEFT for an adapter or a LoRA run; packing and the cache against neither; and the stop token of the chat template.
    What cannot be checked is printed with the reason, and is no failure. When logits agree is defined by
    :class:`sft_jax.checking.logits.Difference`. The base model of a QLoRA run is used as in its files.

    Args:
        name: as for :func:`sft_jax.assembly.find`.
        as_json: print one JSON object instead.

    Returns:
        ``model``, ``passed`` and ``checks``, each with ``name``, ``status`` (``ok``, ``FAILED`` or ``not checked``),
        ``details`` and its numbers.

    Raises:
        UserError: no model of that name, or one that cannot be opened at all.
    """
    device = jax.devices("cpu")[0]
    results: list[Result] = []

    def add(result: Result) -> Result:
        results.append(result)
        if not as_json:
            print(result, flush=True)
        return result

    with jax.default_device(device):
        found = find(name, base, step, "float32", [device], quantized=False)
        if not as_json:
            print(_described(found))
        add(check_architecture(found.base, found.split))
        names = add(check_names(found.base, found.split))
        if names.status == FAILED:
            for one in ("round trip", "logits", "packed", "greedy text"):
                add(Result(one, NOT_CHECKED, "the tensors do not match"))
        else:
            add(check_bytes(found.base))
            for result in _computed(found):
                add(result)
        is_tuned = found.run is not None or found.adapter is not None
        add(check_chat(found.tokenizer, found.stop_ids, is_tuned))
    report = {"model": _described(found), "passed": not failures(results), "checks": [r.as_dict() for r in results]}
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    return report


def check_export(run: str | Path, out: str, form: str, step: Step = None, base: str | None = None) -> None:
    """Check that an export computes what its run computes; prints a line per check.

    Loads the export again, here and in transformers or PEFT, and compares logits of a few texts with those of the run.
    For files in lower precision, the run's weights are rounded in memory first, and how far this moves logits is
    printed. Merging in memory has to leave the run's logits as they are.

    Args:
        form: ``adapter`` or ``merged``.

    Raises:
        CheckFailed: the export computes something else; it stays where it is.
    """
    device = jax.devices("cpu")[0]
    results: list[Result] = []
    with jax.default_device(device):
        found = find(str(run), base, step, "float32", [device], quantized=False)
        for result in _exported(found, out, form):
            results.append(result)
            print(result, flush=True)
    if failed := failures(results):
        raise CheckFailed(f"{out}: is not what {run} computes, but stays there: {failed[0].name}: {failed[0].details}")


def refuse_check(out: str) -> None:
    """Refuse ``--check`` where an export cannot be loaded again, before it is written.

    Raises:
        UserError: several processes, or an export to a bucket.
    """
    if jax.process_count() > 1:
        raise UserError("--check: works in one process; leave it out, and run sft-jax check OUT afterwards")
    if is_url(out):
        raise UserError("--check: needs a local folder; leave it out, copy the export, and run sft-jax check COPY")


def _described(found: Found) -> str:
    config = None if found.run is None else found.run.config
    is_quantized = config is not None and (config.model.quantization or (config.lora and config.model.compute))
    return found.description + (", base not quantized" if is_quantized else "")


def _computed(found: Found) -> list[Result]:
    """What needs the weights: ours first, then the reference, so that only one of them is in memory at a time."""
    names = ("logits", "packed", "greedy text")
    texts, reason = _texts(found, copies=1)
    if reason is not None:
        return [Result(one, reason.status, reason.details) for one in names]
    results = []
    try:
        model = found.load()
    except UserError as error:
        return [Result("logits", FAILED, str(error))] + [
            Result(one, NOT_CHECKED, "the weights cannot be loaded") for one in names[1:]
        ]
    if found.adapter is not None:
        results.append(check_adapter_bytes(found.adapter, model))
    ours = measure(model, texts)
    del model
    theirs, greedy = None, None
    try:
        with tempfile.TemporaryDirectory(prefix="sft-jax-check-") as folder:
            reference = _reference(found, Path(folder))
            theirs, greedy = reference.logits(texts), reference.greedy(texts[0], NEW_TOKENS)
        other = reference.name
    except NoReference as error:
        other = str(error)
    results.append(_compared(found, texts, ours.logits, theirs, other))
    return [*results, check_packed(ours), check_greedy(ours, greedy, other)]


def _exported(found: Found, out: str, form: str) -> list[Result]:
    """The export loaded again, here and in the reference, beside the run as its files can hold it."""
    is_merged = form == "merged"
    texts, reason = _texts(found, copies=3 if is_merged else 2)
    if reason is not None:
        return [Result("written", reason.status, reason.details)]
    folder = Path(out)
    reader = TensorReader(folder, "model.safetensors" if is_merged else ADAPTER_FILE)
    run = found.load()
    kinds = {reader.dtype(name) for name in reader.names}
    is_rounded = any(kind.itemsize < 4 for kind in kinds)
    exact = expected = logits(run, texts)
    if is_merged:
        run = merged(run)
        expected = logits(run, texts)
    merging = difference(expected, exact)
    if is_rounded:
        split = run.split
        names = partial(names_in_adapter, split)
        run = rounded(run, reader, (lambda path: split.stored[path].names) if is_merged else names, _kept(found))
        expected = logits(run, texts)
    del run
    device = jax.devices("cpu")[0]
    base = None if is_merged else str(found.base.folder)
    try:
        written = find(out, base, None, "float32", [device])
        ours = difference(logits(written.load(), texts), expected)
    except UserError as error:
        return [Result("written", FAILED, str(error))]
    details = f"{form} in {', '.join(sorted(map(str, kinds)))}, loaded again, beside {_described(found)}: {ours}"
    if is_rounded:
        details += f"; rounding moved logits by {difference(exact, expected).largest:.2g}"
    if not merging.agrees:
        details += f"; merged in memory, the run is another: {merging}"
    results = [Result("written", verdict(ours.agrees and merging.agrees), details, ours.numbers)]
    try:
        reference = open_reference(folder) if is_merged else open_reference(found.base.folder, folder)
        theirs, other = reference.logits(texts), reference.name
    except NoReference as error:
        theirs, other = None, str(error)
    results.append(_compared(found, texts, expected, theirs, other))
    return [*results, check_chat(written.tokenizer, written.stop_ids, is_tuned=True)]


def _kept(found: Found) -> IsKept:
    """Whether a tensor is that of the base model's files, though these have another dtype than the export."""
    assert found.run is not None
    trained = {path for path in found.run.trained if not is_adapter(found.split.labels[path])}
    trained_names = {name for path in trained for name in found.split.stored[path].names}
    reader = found.run.reader

    def is_kept(name: str, tensor: np.ndarray, dtype: np.dtype) -> bool:
        if reader is None or name in trained_names or name not in reader.names or reader.dtype(name) == dtype:
            return False
        return np.array_equal(reader.read(name).astype(tensor.dtype), tensor)

    return is_kept


def _texts(found: Found, copies: int) -> tuple[list[list[int]], Result | None]:
    """The token ids of the texts, and why nothing can be computed for them, if so."""
    arch = found.split.arch
    try:
        texts = sample_ids(found.tokenizer, arch)
    except UserError as error:
        return [], Result("logits", FAILED, str(error))
    needed = needed_bytes(num_params(found.split), arch, texts, copies)
    reason = too_large(needed, free_bytes(jax.devices("cpu")[0]))
    return texts, None if reason is None else Result("logits", NOT_CHECKED, reason)


def _reference(found: Found, folder: Path) -> Reference:
    """The same model in transformers or PEFT.

    Args:
        folder: a temporary folder, for the adapter of a run.
    """
    if found.run is None:
        return open_reference(found.base.folder, found.adapter)
    if found.run.config.lora is None:
        raise NoReference("a fully fine-tuned run has no adapter; sft-jax export --check compares what it writes")
    write_adapter(found.run, folder)
    return open_reference(found.base.folder, folder)


def _compared(found: Found, texts: Sequence[Sequence[int]], ours: Logits, theirs: Logits | None, other: str) -> Result:
    """Compare logits with those of the reference; without one, ``other`` says why."""
    if theirs is None:
        return Result("logits", NOT_CHECKED, other)
    measured = difference(ours, theirs)
    details = f"{len(texts)} texts, {sum(map(len, texts))} tokens, beside {other}: {measured}"
    return Result("logits", verdict(measured.agrees), details + untested(found.split.arch, texts), measured.numbers)
