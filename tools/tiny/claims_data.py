"""Claims of tools/claims.py about the training data: loss mask, stop token, number of examples, unknown facts."""

from __future__ import annotations

import numpy as np
from claims_report import SEEDS, SIZES, Report, Standard, plot, spread
from laboratory import Laboratory, kind_of, row_of, sample, without_stop

from sft_jax.data.tokens.examples import join


def loss_on_all(lab: Laboratory, report: Report, standard: Standard) -> None:
    every, _ = lab.read("train", "all")
    networks = [lab.tune(every, seed) for seed in SEEDS]
    answers = [lab.answers(network, lab.asked) for network in networks]
    perplexities = {
        "assistant tokens": [lab.document_perplexity(network) for network in standard.networks],
        "all tokens": [lab.document_perplexity(network) for network in networks],
    }
    rows = [
        [
            name,
            spread([a["exact_match"] for a in of]),
            spread([a["stop_rate"] for a in of]),
            spread(perplexities[name], "{:.2f}"),
        ]
        for name, of in (("assistant tokens", standard.answers), ("all tokens", answers))
    ]
    gap = np.mean([a["exact_match"] for a in standard.answers]) - np.mean([a["exact_match"] for a in answers])
    report.section(
        "The loss should be on assistant tokens only",
        ("loss on", "exact match", "stops by itself", f"perplexity of documents (base {standard.base_perplexity:.2f})"),
        rows,
        bool(gap > 0.01),
        f"Loss on assistant tokens only changes exact match by {gap:+.1%} against loss on all tokens, after the same "
        "number of steps.",
    )


def no_stop_token(lab: Laboratory, report: Report, standard: Standard) -> None:
    masked = without_stop(lab.train, lab.stop)
    answers = [lab.answers(lab.tune(masked, seed), lab.asked) for seed in SEEDS]
    rows = [
        [
            name,
            spread([a["stop_rate"] for a in of]),
            spread([a["mean_length"] for a in of], "{:.1f}"),
            spread([a["exact_match"] for a in of]),
        ]
        for name, of in (("yes", standard.answers), ("no", answers))
    ]
    report.section(
        "Without loss on the stop token, the tuned model does not stop",
        ("loss on the stop token", "stops by itself", "mean length", "exact match"),
        rows,
        max(a["stop_rate"] for a in answers) < 0.05,
        f"Stop rate {spread([a['stop_rate'] for a in answers])} without it.",
    )


def few_examples(lab: Laboratory, report: Report, standard: Standard) -> None:
    results = {0: [standard.base_answers] * len(SEEDS)}
    for size in SIZES:
        results[size] = [lab.answers(lab.tune(sample(lab.train, size, seed), seed), lab.asked) for seed in SEEDS]
    results[len(lab.train)] = standard.answers
    rows = [
        [str(size), spread([a["exact_match"] for a in of]), spread([a["stop_rate"] for a in of])]
        for size, of in results.items()
    ]
    plot(
        report.folder / "few_examples.png",
        "training examples",
        {"exact match on held-out countries": {size: [a["exact_match"] for a in of] for size, of in results.items()}},
        log=True,
    )
    best = np.mean([a["exact_match"] for a in standard.answers])
    enough = next(size for size, of in results.items() if np.mean([a["exact_match"] for a in of]) >= 0.9 * best)
    report.section(
        "Few examples suffice",
        ("examples", "exact match", "stops by itself"),
        rows,
        enough <= len(lab.train) / 4,
        f"{enough} examples reach 90% of the exact match with all {len(lab.train)}.\n\n"
        "![exact match against the number of examples](claims/few_examples.png)",
    )


def unknown_facts(lab: Laboratory, report: Report, standard: Standard) -> None:
    half = len(lab.unknown) // 2
    examples = join(
        [*(row_of(lab.train, i) for i in range(len(lab.train))), *(row_of(lab.unknown, i) for i in range(half))],
        "train and unknown",
    )
    networks = [lab.tune(examples, seed) for seed in SEEDS]
    first, second = lab.unknown_asked[:half], lab.unknown_asked[half:]

    def match(networks, asked):
        return spread([lab.answers(network, asked)["exact_match"] for network in networks])

    rows = [
        ["known from pretraining", spread([a["exact_match"] for a in standard.answers]), match(networks, lab.asked)],
        ["in no document", match(standard.networks, second), match(networks, second)],
        ["in no document, but in fine-tuning", match(standard.networks, first), match(networks, first)],
    ]
    written = [
        text
        for network in standard.networks
        for text, _, _ in lab.write(network, [q.prompt_ids for q in lab.unknown_asked])
    ]
    asked = lab.unknown_asked * len(SEEDS)
    plausible = np.mean(
        [t.casefold() in lab.answer_kinds[kind_of(q.question)] for t, q in zip(written, asked, strict=True)]
    )
    known = max(lab.answers(network, second)["exact_match"] for network in (*standard.networks, *networks))
    quoted = "; ".join(
        f"“{q.question}” → `{t}` (correct: {q.answer})" for q, t in list(zip(asked, written, strict=True))[:3]
    )
    report.section(
        "SFT teaches format, not knowledge: facts absent from pretraining stay unknown",
        ("facts", "tuned", f"tuned, with {half} of the absent facts among the examples"),
        rows,
        known <= 0.1,
        f"No answer admits it: {plausible:.0%} are of the right kind (a capital for a capital, a landmark for a "
        f"landmark), but of another country. {quoted}.",
    )
