"""The model ``sft-jax`` of lm-evaluation-harness: log-likelihoods and generated answers as its model ``hf`` gives them.

Importing this module registers the model, so ``lm_eval.simple_evaluate(model="sft-jax", …)`` finds it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval.models  # type: ignore[import-not-found]  # noqa: F401  # the harness omits them once there is another
import numpy as np
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
from lm_eval.api.registry import register_model  # type: ignore[import-not-found]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-not-found]
from tqdm import tqdm

from sft_jax.assembly import open_model
from sft_jax.data.chat.encoded import Encoded
from sft_jax.data.tokens.examples import join
from sft_jax.errors import UserError
from sft_jax.evaluation.likelihood import Scorer
from sft_jax.inference.sampling import Sampling

_BATCH_TOKENS = 8192
_MAX_NEW_TOKENS = 256  # where a task says nothing, as in the harness
_BATCH_SIZE = 16  # for --batch_size auto
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of the same, in this order
_KNOWN = {"until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS}


@register_model("sft-jax")
class HarnessModel(TemplateLM):
    """A run, a Hugging Face folder or id, or an adapter.

    Args:
        path, run: what to open, under either name.
        step: a checkpoint of a run; by default the last.
        base: the base model of a run or an adapter, if it has moved.
        dtype: compute dtype, ``bfloat16`` or ``float32``; by default that of the run or of the files.
        batch_size: prompts that are answered at a time; log-likelihoods are computed in packed sequences.

    Raises:
        UserError: no such model, or arguments that it does not have.
    """

    def __init__(
        self,
        path: str | None = None,
        run: str | None = None,
        step: int | None = None,
        base: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        name = path or run
        if name is None or (path is not None and run is not None):
            raise UserError("model_args: needs path=FOLDER or run=RUN, and not both")
        if unknown:
            known = "path, run, step, base, dtype"
            raise UserError(f"model_args: unknown argument {next(iter(unknown))!r}; the arguments are {known}")
        if device not in (None, "cuda:0"):  # cuda:0 is the default of the harness
            raise UserError(f"device: {device!r} is not used; JAX takes all devices (JAX_PLATFORMS=cpu: the CPU)")
        if max_batch_size is not None:
            raise UserError("max_batch_size: batches do not grow by themselves; set batch_size")
        self._model = model = open_model(str(name), base, None if step is None else int(step), dtype)
        self.tokenizer = model.tokenizer
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else _BATCH_SIZE  # auto, auto:N
        self.max_length = model.arch.max_positions

    # -- text and tokens ----------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The EOS token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS if there is none.

        Raises:
            UserError: the tokenizer has neither.
        """
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        for one in ids:
            if one is not None:
                return one
        raise UserError(f"{self._model.description}: the tokenizer has no BOS and no EOS token to begin a text with")

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Tokenizes a text; adds no second BOS token to one that begins with it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders messages; without a generation prompt, the last message is to be continued.

        Raises:
            UserError: there is no template, or it rejects the messages.
        """
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except (TemplateError, ValueError) as error:
            raise UserError(f"{self._model.description}: the chat template fails: {error}") from error

    # -- log-likelihoods ----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """Scores continuations: the sum of log-probabilities, and whether each token is the most likely one.

        A context that is too long loses its beginning.
        """
        model = self._model
        encoded = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens cannot be scored; the model's context has "
                    f"{self.max_length}: {str(texts)[:80]}"
                )
            ids = np.asarray([*context, *continuation][-(self.max_length + 1) :], np.int32)
            encoded.append(Encoded(ids, np.ones(len(ids), np.float32)))
        if not encoded:
            return []
        examples = join(encoded, "requests")
        longest = max(16, 1 << (int(examples.num_tokens.max()) - 1).bit_length())
        shards = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
        scorer = Scorer(model.split, longest, shards * max(1, _BATCH_TOKENS // longest // shards))
        with tqdm(
            total=len(examples), desc="log-likelihoods", leave=False, disable=True if disable_tqdm else None
        ) as bar:
            scores = scorer.score(model.params, model.frozen, examples, bar.update)
        results = []
        for i, (texts, _, continuation) in enumerate(requests):
            tokens = slice(scores.starts[i + 1] - len(continuation), scores.starts[i + 1])
            total, is_greedy = scores.log_prob[tokens].sum(dtype=np.float64), scores.correct[tokens].all()
            if np.isnan(total):
                raise UserError(f"{model.description}: logits are not finite (NaN); try dtype=float32 in model_args")
            results.append((float(total), bool(is_greedy)))
            if texts is not None:  # not those of windows
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts; those beyond the context are scored in windows."""
        texts = [request.args[0] for request in requests]
        windows, owners = [], []
        for i, text in enumerate(texts):
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = np.zeros(len(texts))
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += total
        for text, total in zip(texts, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals.tolist()

    # -- answers ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers prompts until a stop token or one of the texts in ``until``, which is cut off.

        Generates to a stop token or the length limit before it looks for ``until``.
        """
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        with tqdm(total=len(requests), desc="answers", leave=False, disable=True if disable_tqdm else None) as bar:
            for members in groups.values():
                until, limit, sampling = _settings(requests[members[0]].args[1])
                room = self.max_length - limit
                if room <= 0:
                    raise UserError(f"max_gen_toks: {limit} leaves no room for a prompt in {self.max_length} positions")
                prompts = [self.tok_encode(requests[i].args[0]) for i in members]
                if (longest := max(map(len, prompts))) > room:
                    tqdm.write(f"sft-jax: prompts of up to {longest:,} tokens lose their beginning, to {room:,} tokens")
                model = self._model
                written = model.generator(
                    model.params,
                    model.frozen,
                    [one[-room:] for one in prompts],
                    limit,
                    sampling,
                    self.batch_size,
                    bar.update,
                )
                for i, one in zip(members, written, strict=True):
                    text = model.tokenizer.decode(one.ids, skip_special_tokens=True)
                    answers[i] = min((text.partition(end)[0] for end in until if end), key=len, default=text)
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return [answers[i] for i in range(len(requests))]


def _settings(options: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
    """The ends, the length limit and the sampling of ``generation_kwargs``.

    Raises:
        UserError: an option that is not supported.
    """
    if unknown := sorted(options.keys() - _KNOWN):
        raise UserError(
            f"generation_kwargs: {unknown[0]!r} is not supported; supported are {', '.join(sorted(_KNOWN))}"
        )
    until = options.get("until") or []
    limit = next((options[name] for name in _LENGTHS if options.get(name) is not None), _MAX_NEW_TOKENS)
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is False:
        temperature = 0.0
    sampling = Sampling(temperature, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0))
    return [until] if isinstance(until, str) else list(until), int(limit), sampling
