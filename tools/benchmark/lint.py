"""Benchmarks the lint on random examples in memory-mapped files: time and memory of each part."""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, help="a folder; its tokens are drawn by Zipf's law")
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=100, help="median length of an example")
    parser.set_defaults(run=bench_lint)


def bench_lint(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from sft_jax.data.lint.reading import Reading
    from sft_jax.data.lint.rules import find

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), tokenizer, options.examples, options.tokens)
        held_out = data._replace(examples=data.examples.take(slice(0, None, max(1, options.examples // 2000))))
        print(f"{len(data.examples):,} examples of {data.examples.lengths.mean():.0f} tokens on average")
        peak = Peak()
        read = Reading(data, held_out)  # type: ignore[arg-type]
        wall, cpu = time.perf_counter(), time.process_time()
        for part in ("columns", "first", "common", "near", "texts", "leaks"):
            began, of_cpu = time.perf_counter(), time.process_time()
            getattr(read, part)
            print(
                f"{part:>10}  {time.perf_counter() - began:6.1f} s, {time.process_time() - of_cpu:6.1f} s of CPU",
                flush=True,
            )
        counts = {one.name: one.count for one in find(read)}
        print(
            f"{'all':>10}  {time.perf_counter() - wall:6.1f} s, {time.process_time() - cpu:6.1f} s of CPU; "
            f"{peak.more_bytes() / 1e9:.2f} GB more than before, without mapped files; found {counts}"
        )


def make_data(folder: Path, tokenizer: Any, num: int, median: int) -> Any:
    """Random questions and answers; each thousandth is the one before it, and half of these have one other token."""
    from collections import namedtuple

    import numpy as np

    from sft_jax.data.chat.encoded import Tally
    from sft_jax.data.tokens.examples import Examples
    from sft_jax.data.tokens.tokenised import Tokenized

    rng = np.random.default_rng(0)
    vocabulary = np.flatnonzero([token.isascii() for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    frame = tokenizer.encode("Question: ", add_special_tokens=False)
    lengths = np.clip(rng.lognormal(np.log(median), 0.4, num), 20, 10 * median).astype(np.int32)
    lengths[1000::1000] = lengths[999:-1:1000][: len(lengths[1000::1000])]
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    total = int(lengths.sum())
    ids = np.memmap(folder / "ids", np.int32, "w+", shape=(total,))
    codes = np.memmap(folder / "codes", np.uint8, "w+", shape=(total,))
    for first in range(0, total, 1 << 22):
        rank = (30 * rng.pareto(0.7, min(1 << 22, total - first))).astype(np.int64)
        ids[first : first + (1 << 22)] = vocabulary[np.minimum(rank, len(vocabulary) - 1)]
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if i and i % 1000 == 0:
            ids[start : start + length] = ids[start - length : start]
            ids[start + length // 2] += i // 1000 % 2
        ids[start : start + len(frame)] = frame
        ids[start + length - 1] = tokenizer.eos_token_id
        codes[start + length // 3 : start + length] = 1
    rows, targets = np.arange(num), lengths - lengths // 3
    weights = np.asarray([0, 1], np.float32)
    part = Tokenized(ids, codes, lengths, rows, targets, weights, num, 0, [], Tally())
    source = np.zeros(num, np.int32)
    examples = Examples((part,), source, starts, lengths, rows, ("random",), (1.0,), (tokenizer.eos_token_id,))
    kind = namedtuple("kind", ("examples", "encoder", "sources"))
    encoder = namedtuple("encoder", ("tokenizer", "keep_reasoning"))(tokenizer, True)
    return kind(examples, encoder, [])


class Peak:
    """Watches the anonymous memory of this process; the pages of mapped files are not counted."""

    def __init__(self) -> None:
        self._first = self._most = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    def more_bytes(self) -> int:
        """The highest memory since the start, above that of the start."""
        return self._most - self._first

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, self._now())
            time.sleep(0.02)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
