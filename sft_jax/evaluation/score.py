"""Log-likelihoods of given responses: what a preference method would compare, and what SFT alone cannot rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from sft_jax.assembly import Model
from sft_jax.data.chat.encoder import STRADDLING, Encoded, Encoder
from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError
from sft_jax.data.tokens.examples import join
from sft_jax.errors import UserError
from sft_jax.evaluation.likelihood import Scorer

_SLOTS = 8192  # of a batch


@dataclass(frozen=True)
class Score:
    """One response to one prompt."""

    row: int
    candidate: int
    log_likelihood: float  # natural logarithm, summed over the response's tokens, its stop token included
    num_tokens: int
    response: str

    @property
    def per_token(self) -> float:
        """Mean log-likelihood of a token."""
        return self.log_likelihood / self.num_tokens


def score(
    model: Model, rows: list[dict[str, Any]], raw: bool = False, name: str = "rows", stop_token: str | None = None
) -> list[Score]:
    """Score every candidate response of every row.

    Args:
        rows: each has ``prompt`` (text or messages) and either ``responses`` (a list), ``completion``, or ``chosen``
            and ``rejected``; a response is text, or a list of messages where the prompt is one.
        raw: a text prompt is plain text, blanks at its end being the responses'; otherwise it is a user's message in
            the model's chat template.
        name: of the file, for error messages.
        stop_token: ends a plain response; default the tokenizer's eos token.

    Raises:
        UserError: a row that is not such a row, or is longer than the context.
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
    longest = max(16, 1 << (int(examples.slots.max()) - 1).bit_length())
    shards = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    num_rows = shards * max(1, _SLOTS // longest // shards)
    scorer = Scorer(model.split, longest, num_rows)
    with tqdm(total=len(examples), unit="response", leave=False, disable=None) as bar:
        tokens = scorer.score(model.params, model.frozen, examples, bar.update)
    found = []
    for number, (i, j, response) in enumerate(scores):
        trained = examples[number][1][1:] > 0
        log_probs = tokens.log_prob[tokens.starts[number] : tokens.starts[number + 1]][trained]
        found.append(Score(i, j, float(log_probs.sum(dtype=np.float64)), len(log_probs), response))
    return found


def _candidates(row: dict[str, Any], encoder: Encoder, raw: bool, where: str) -> list[tuple[str, Encoded]]:
    prompt = row.get("prompt")
    if isinstance(row.get("responses"), list) and row["responses"]:
        responses = row["responses"]
    elif "chosen" in row and "rejected" in row:
        responses = [row["chosen"], row["rejected"]]
    elif "completion" in row:
        responses = [row["completion"]]
    else:
        raise UserError(f"{where}: has neither 'responses' (a list), nor 'chosen' and 'rejected', nor 'completion'")
    if isinstance(prompt, str) and not raw:
        prompt = [{"role": "user", "content": prompt}]
    space = ""
    if isinstance(prompt, str):  # " word" is one token in most vocabularies: the blank is the response's
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
            found = encoder.encode([parse("prompt-completion", {"prompt": prompt, "completion": response})])[0]
            if isinstance(found, RowError):
                raise found
        except RowError as error:
            raise UserError(f"{where}, response {j}: {error}") from error
        if encoder.tally.notes[STRADDLING] > straddling:
            raise UserError(f"{where}, response {j}: a token spans prompt and response; end the prompt with a word")
        encoded.append((str(text), found[-1]))
    return encoded
