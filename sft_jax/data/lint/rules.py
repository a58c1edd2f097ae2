"""The rules of the lint: each gives one finding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sft_jax.data.lint import answers, outliers
from sft_jax.data.lint.findings import DEFECT, FACT, GUESS, Finding
from sft_jax.data.lint.minhash import THRESHOLD
from sft_jax.data.lint.reading import Reading
from sft_jax.data.lint.scripts import table


def find(read: Reading, names: Sequence[str] | None = None) -> list[Finding]:
    """Apply all rules, or some; rules that find nothing give no finding."""
    chosen = [rule for name, rule in RULES.items() if names is None or name in names]
    return [finding for rule in chosen if (finding := rule(read)) is not None and finding.count]


def _exact_duplicates(read: Reading) -> Finding:
    exact, _, _ = read.duplicates(np.zeros(len(read.data.examples), bool), with_near=False)
    return Finding(
        "exact_duplicates",
        DEFECT,
        exact,
        "the same tokens and loss mask as an earlier example",
        "leave them out; the first stays",
        lambda example: f"as {read.data.examples.describe(int(read.first[example]))}",
    )


def _near_duplicates(read: Reading) -> Finding:
    _, near, at = read.duplicates(np.zeros(len(read.data.examples), bool))
    place = dict(zip(near.tolist(), at.tolist(), strict=True))

    def note(example: int) -> str:
        pair = place[example]
        earlier = read.data.examples.describe(int(read.near.i[pair]))
        return f"as {earlier}, similarity {read.near.similarity[pair]:.2f}"

    return Finding(
        "near_duplicates",
        DEFECT,
        near,
        f"Jaccard similarity of at least {THRESHOLD} with an earlier example, without exact duplicates",
        "compare them; leave them out, with the exact ones, if they teach nothing new",
        note,
    )


def _leaks(read: Reading) -> Finding | None:
    found = read.leaks
    if found is None:
        return None
    place = {example: at for at, example in enumerate(found.held_out.tolist())}
    num = len(found.training)

    def note(example: int) -> str:
        at = place[example]
        return f"{found.how[at]} as {read.data.examples.describe(int(found.first[at]))}"

    return Finding(
        "leaks",
        DEFECT,
        found.held_out,
        f"held-out examples that are also in the training data, in {num:,} example{'s' if num > 1 else ''}",
        "leave out the training examples, or the held-out loss and accuracy are too good",
        note,
        is_held_out=True,
    )


def _empty_answers(read: Reading) -> Finding:
    found = np.flatnonzero(read.texts.is_blank & (read.columns.ends > read.columns.begins))
    what = "the answer has no token but the stop token, or only white space"
    return Finding("empty_answers", DEFECT, found, what, "leave them out: they teach to answer nothing")


def _cut_off_answers(read: Reading) -> Finding:
    found = answers.cut_off(read.data.examples, read.columns)
    what = "the answer does not end with a stop token, as most answers of the source do"
    return Finding("cut_off_answers", DEFECT, found, what, "increase data.max_length, or leave them out")


def _unfinished_answers(read: Reading) -> Finding:
    found = answers.unfinished(read.data.examples, read.columns, read.texts)
    what = "the answer ends in the middle of a sentence, and nearly all others of the source end with punctuation"
    return Finding("unfinished_answers", GUESS, found, what, "look at them: a limit of length may have cut them")


def _copied_questions(read: Reading) -> Finding:
    found = np.asarray(read.texts.copied, np.int64)
    return Finding("copied_questions", DEFECT, found, "the answer is the question", "leave them out")


def _script_outliers(read: Reading) -> Finding:
    found, usual = outliers.script_outliers(read.data.examples, read.texts.script)
    names = table()[1]
    most = dict(zip(found.tolist(), usual.tolist(), strict=True))
    return Finding(
        "script_outliers",
        GUESS,
        found,
        "the answer is in another script than nearly all others of the source",
        "look at them: they may be of another language",
        lambda example: f"{_title(names[read.texts.script[example]])}, others {_title(names[most[example]])}",
    )


def _length_outliers(read: Reading) -> Finding:
    found, medians = outliers.length_outliers(read.data.examples, read.columns)
    median = dict(zip(found.tolist(), medians.tolist(), strict=True))
    lengths = read.columns.ends - read.columns.begins
    return Finding(
        "length_outliers",
        GUESS,
        found,
        "the answer is far longer or shorter than nearly all others of the source",
        "look at them: several rows may be in one, or a part may be missing",
        lambda example: f"{lengths[example]:,} tokens, median {median[example]:,}",
    )


def _secrets(read: Reading) -> Finding:
    found = np.asarray(sorted(read.texts.secrets), np.int64)
    return Finding(
        "secrets",
        DEFECT,
        found,
        "texts that look like keys or passwords; only the first four characters are shown",
        "leave them out, and revoke the keys: a model can repeat them",
        lambda example: ", ".join(dict.fromkeys(read.texts.secrets[example])),
    )


def _repeated_answers(read: Reading) -> Finding:
    found, num_questions, num_answers = answers.repeated(read.data.examples, read.columns)
    asked = dict(zip(found.tolist(), num_questions.tolist(), strict=True))
    least = min(asked.values(), default=0)
    return Finding(
        "repeated_answers",
        FACT,
        found,
        f"{num_answers:,} answer{'s' if num_answers > 1 else ''}, each to {least:,} or more different questions",
        "as it should be if answers are labels; otherwise, the model may learn to give them to any question",
        lambda example: f"after {asked[example]:,} different questions",
    )


def _conflicting_answers(read: Reading) -> Finding:
    found, num_answers = answers.conflicting(read.columns)
    given = dict(zip(found.tolist(), num_answers.tolist(), strict=True))
    num = len(np.unique(read.columns.question[found]))
    return Finding(
        "conflicting_answers",
        FACT,
        found,
        f"{num:,} question{'s' if num > 1 else ''} with different answers",
        "as it should be if several answers are right; otherwise, correct them",
        lambda example: f"{given[example]:,} different answers",
    )


def _title(name: str) -> str:
    return name if name == "CJK" else name.title()


RULES: dict[str, Callable[[Reading], Finding | None]] = {
    "exact_duplicates": _exact_duplicates,
    "near_duplicates": _near_duplicates,
    "leaks": _leaks,
    "empty_answers": _empty_answers,
    "cut_off_answers": _cut_off_answers,
    "unfinished_answers": _unfinished_answers,
    "copied_questions": _copied_questions,
    "script_outliers": _script_outliers,
    "length_outliers": _length_outliers,
    "secrets": _secrets,
    "repeated_answers": _repeated_answers,
    "conflicting_answers": _conflicting_answers,
}
