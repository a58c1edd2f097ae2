"""Experiments on the tiny model: fine-tune it on any examples, generate answers, compute scores.

Uses the library's components (plan, loader, step, scorer, generator) instead of ``sft_jax.train``, so that experiments
can change examples in ways that the command refuses, and many small runs share one compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sft_jax.config import LoraConfig, OptimizerConfig, SourceConfig
from sft_jax.data.batches.loader import Loader
from sft_jax.data.batches.packing import plan_run
from sft_jax.data.chat.encoder import Encoded, Encoder
from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import Examples, encode_sources, join
from sft_jax.evaluation.answers import same_answer
from sft_jax.evaluation.few_shot import exchanges
from sft_jax.evaluation.likelihood import Scorer
from sft_jax.evaluation.questions import Question, questions
from sft_jax.hf.config import read_architecture
from sft_jax.hf.hub import find_model
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.inference.generator import Generator
from sft_jax.sharding import make_mesh
from sft_jax.training.optimizer import labels_of, make_optimizer, make_schedule
from sft_jax.training.state import make_state
from sft_jax.training.step import make_train_step
from sft_jax.training.weights import build, load_weights

LENGTH, BATCH_SIZE, STEPS = 128, 8, 80  # as in configs/quickstart.yaml
LEARNING_RATE = {"lora": 5e-4, "full": 2e-4}
MAX_NEW_TOKENS = 24
NUM_QUESTIONS = 150


@dataclass(frozen=True)
class Tuned:
    """The parameters of a fine-tuned network."""

    kind: str  # "rank 16" or "full"
    trainable: Any
    frozen: Any


class Laboratory:
    """The base model, its data, and the compiled programs of each kind of network."""

    def __init__(self) -> None:
        self.mesh = make_mesh(devices=jax.devices()[:1])
        folder = find_model("builtin:tiny")
        self.arch, self.reader = read_architecture(folder), TensorReader(folder)
        self.tokenizer, _ = load_tokenizer(folder)
        self.train, self.train_rows = self.read("train")
        held_out, rows = self.read("heldout")
        self.asked = questions(held_out, rows, self.tokenizer, NUM_QUESTIONS)
        unknown, rows = self.read("unknown")
        self.unknown, self.unknown_asked = unknown, questions(unknown, rows, self.tokenizer)
        self.documents, _ = self.read("documents")
        self.answer_kinds = self._answer_kinds()
        stop, eos = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        self.stop, self.stops = stop, [stop, eos]
        self._kinds: dict[str, dict[str, Any]] = {}

    def read(self, name: str, train_on: str = "assistant") -> tuple[Examples, list]:
        rows = open_sources([SourceConfig(f"builtin:countries/{name}.jsonl")])
        return encode_sources(rows, Encoder(self.tokenizer, train_on), LENGTH)[0], rows

    def encode(self, pairs: Sequence[tuple[str, str]]) -> Examples:
        """Encodes pairs of question and answer."""
        encoder = Encoder(self.tokenizer)
        rows = [parse("question-answer", {"question": q, "answer": a}) for q, a in pairs]
        encoded = encoder.encode(rows)
        assert not any(isinstance(one, RowError) for one in encoded)
        return join([one[0] for one in encoded], "pairs")  # type: ignore[index]

    def kind(self, name: str) -> dict[str, Any]:
        """Network, step, scorer and generator of ``full`` or ``rank R``, created once."""
        if name not in self._kinds:
            lora = None if name == "full" else LoraConfig(rank=int(name.split()[1]), alpha=2.0 * int(name.split()[1]))
            split = build(self.arch, self.mesh, lora, "float32", "none")
            rate = LEARNING_RATE["full" if lora is None else "lora"]
            options = OptimizerConfig(learning_rate=rate, warmup_ratio=0.05)
            optimizer = make_optimizer(options, labels_of(split.trainable, split.labels))
            self._kinds[name] = {
                "lora": lora,
                "split": split,
                "optimizer": optimizer,
                "step": make_train_step(split, optimizer, make_schedule(options, STEPS)),
                "scorer": Scorer(split, LENGTH, BATCH_SIZE),
                "generator": Generator(split, self.stops),
            }
        return self._kinds[name]

    def base(self, name: str = "rank 16", seed: int = 0) -> Tuned:
        """The base model as a network of a kind; new adapters do not change its output."""
        return Tuned(name, *load_weights(self.kind(name)["split"], self.reader, None, None, seed))

    def tune(self, examples: Examples, seed: int, name: str = "rank 16") -> Tuned:
        """Trains for ``STEPS`` optimizer steps on ``examples``, repeating them as needed."""
        kind, start = self.kind(name), self.base(name, seed)
        plan = plan_run(examples.num_tokens, LENGTH, BATCH_SIZE, 1, STEPS, seed)
        state = make_state(start.trainable, kind["optimizer"], self.mesh)
        with jax.set_mesh(self.mesh):
            for batch in Loader(examples, plan, self.mesh, BATCH_SIZE):
                state, _ = kind["step"](state, start.frozen, batch)
        return Tuned(name, state.params, start.frozen)

    def write(self, tuned: Tuned, prompts: Sequence[Sequence[int]]) -> list[tuple[str, bool, int]]:
        """Generates answers: text, whether it ended with a stop token, and number of tokens of each."""
        generator = self.kind(tuned.kind)["generator"]
        written = generator(tuned.trainable, tuned.frozen, prompts, MAX_NEW_TOKENS, batch_size=256)
        return [
            (self.tokenizer.decode(w.ids, skip_special_tokens=True).strip(), w.stopped, len(w.ids)) for w in written
        ]

    def answers(self, tuned: Tuned, asked: Sequence[Question]) -> dict[str, float]:
        """Computes exact match, stop rate and mean length on questions."""
        written = self.write(tuned, [question.prompt_ids for question in asked])
        right = [
            same_answer(text, question.answer, "text") for (text, _, _), question in zip(written, asked, strict=True)
        ]
        return {
            "exact_match": float(np.mean(right)),
            "stop_rate": float(np.mean([stopped for _, stopped, _ in written])),
            "mean_length": float(np.mean([length for _, _, length in written])),
        }

    def document_perplexity(self, tuned: Tuned) -> float:
        scores = self.kind(tuned.kind)["scorer"].score(tuned.trainable, tuned.frozen, self.documents)
        return math.exp(-scores.log_prob.mean(dtype=np.float64))

    def log_likelihood(self, tuned: Tuned, pairs: Sequence[tuple[str, str]]) -> float:
        """Computes the mean log-likelihood of answers including the stop token."""
        examples = self.encode(pairs)
        scores = self.kind(tuned.kind)["scorer"].score(tuned.trainable, tuned.frozen, examples)
        _, weights = examples.flat()
        mask = np.delete(weights, scores.starts[:-1] + np.arange(len(examples))) > 0
        return float(scores.log_prob[mask].sum(dtype=np.float64) / len(examples))

    def _answer_kinds(self) -> dict[str, set[str]]:
        """Maps a kind of question, recognized by its wording, to all answers of that kind."""
        kinds: dict[str, set[str]] = {}
        for source in ("train", "heldout", "unknown"):
            _, rows = self.read(source)
            for question, answer in exchanges(rows[0]):
                kinds.setdefault(kind_of(question), set()).add(answer.casefold())
        return kinds


def kind_of(question: str) -> str:
    for kind, words in (("capital", ("capital",)), ("landmark", ("known for", "should i see", "landmark", "sight"))):
        if any(word in question.casefold() for word in words):
            return kind
    return "other"


def row_of(examples: Examples, index: int) -> Encoded:
    """Returns one example, to be joined with others."""
    return Encoded(*examples[index])


def sample(examples: Examples, num: int, seed: int) -> Examples:
    """Draws ``num`` examples at random."""
    chosen = np.random.default_rng(seed).choice(len(examples), num, replace=False)
    return join([row_of(examples, i) for i in chosen], "sample")


def without_stop(examples: Examples, stop: int) -> Examples:
    """Removes the stop token from the loss mask."""
    rows = [examples[i] for i in range(len(examples))]
    return join([Encoded(ids, mask * (ids != stop)) for ids, mask in rows], "without stop")
