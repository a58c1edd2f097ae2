"""Computes log-likelihoods of given responses, such as the chosen and rejected ones of preference data."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_jax.assembly import Model
from sft_jax.data.chat.encoder import STRADDLING, Encoded, Encoder
from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError
from sft_jax.data.tokens.examples import join
from sft_jax.errors import UserError
from sft_jax.evaluation.likelihood import Scorer
from sft_jax.progress import Work

_BATCH_TOKENS = 8192
_KEYS = ("responses", "chosen", "rejected", "completion")


@dataclass(frozen=True)
class Score:
    """The score of one response to one prompt."""

    row: int
    candidate: int
    log_likelihood: float  # in nats, summed over the response's tokens including its stop token
    num_tokens: int
    response: str

    @property
    def per_token(self) -> float:
        """Mean log-likelihood per token."""
        return self.log_likelihood / self.num_tokens


def score(
    model: Model, rows: list[dict[str, Any]], raw: bool = False, name: str = "rows", stop_token: str | None = None
) -> list[Score]:
    """Scores every candidate response of every row.

    Args:
        rows: each has ``prompt`` (text or messages) and either ``responses`` (a list), ``completion``, or ``chosen``
            and ``rejected``; a response is text, or a list of messages where the prompt is one.
        raw: whether a text prompt is plain text, whose trailing spaces count as part of the responses, or a user
            message in the model's chat template.
        name: file name for error messages.
        stop_token: ends a plain response; default: the tokenizer's EOS token.

    Raises:
        UserError: a row without these keys, or one that is longer than the context; logits are not finite.
    """
    chat = Encoder(model.tokenizer, "last_assistant", stop_token)
    scores, encoded = [], []
    for i, row in enumerate(rows):
        for j, (response, one) in enumerate(_candidates(row, chat, raw, f"{name} row {i}")):
            if len(one.ids) > model.arch.max_positions:
                raise UserError(
                    f"{name} row {i}: prompt and response {j} have {len(one.ids)} tokens, the model's context has "
                    f"{model.arch.max_positions}"
                )
            scores.append((i, j, response))
            encoded.append(one)
    examples = join(encoded, name)
    longest = max(16, 1 << (int(examples.num_tokens.max()) - 1).bit_length())
    shards = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    batch_size = shards * max(1, _BATCH_TOKENS // longest // shards)
    scorer = Scorer(model.split, longest, batch_size)
    with Work("scoring", len(examples), "responses") as work:
        tokens = scorer.score(model.params, model.frozen, examples, work.update)
    result = []
    for number, (i, j, response) in enumerate(scores):
        supervised = examples[number][1][1:] > 0
        log_probs = tokens.log_prob[tokens.starts[number] : tokens.starts[number + 1]][supervised]
        if np.isnan(log_probs).any():
            raise UserError(
                f"{name} row {i}, response {j}: the model's logits are not finite (NaN or infinite), so there is no "
                "score; its weights are damaged, or too large for their dtype (try --dtype float32)"
            )
        result.append(Score(i, j, float(log_probs.sum(dtype=np.float64)), len(log_probs), response))
    return result


def _candidates(row: dict[str, Any], encoder: Encoder, raw: bool, where: str) -> list[tuple[str, Encoded]]:
    prompt = row.get("prompt")
    if isinstance(row.get("responses"), list) and row["responses"]:
        responses = row["responses"]
    elif "chosen" in row and "rejected" in row:
        responses = [row["chosen"], row["rejected"]]
    elif "completion" in row:
        responses = [row["completion"]]
    else:
        close = [one for name in row for one in difflib.get_close_matches(name, _KEYS, n=1)]
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"{where}: has neither 'responses' (a list), nor 'chosen' and 'rejected', nor 'completion'{meant}"
        )
    if isinstance(prompt, str) and not raw:
        prompt = [{"role": "user", "content": prompt}]
    space = ""
    if isinstance(prompt, str):  # " word" is one token in most vocabularies: the space belongs to the response
        prompt, space = prompt.rstrip(), prompt[len(prompt.rstrip()) :]
    encoded = []
    for j, response in enumerate(responses):
        text = response[-1].get("content", "") if isinstance(response, list) and response else response
        if isinstance(prompt, list) and isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        elif isinstance(response, str):
            response = space + response
        straddling = encoder.tally.notes[STRADDLING]
        try:
            result = encoder.encode([parse("prompt-completion", {"prompt": prompt, "completion": response})])[0]
            if isinstance(result, RowError):
                raise result
        except RowError as error:
            raise UserError(f"{where}, response {j}: {error}") from error
        if encoder.tally.notes[STRADDLING] > straddling:
            raise UserError(f"{where}, response {j}: a token spans prompt and response; end the prompt with a word")
        encoded.append((str(text), result[-1]))
    return encoded
