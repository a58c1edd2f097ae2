"""What is said of supervised fine-tuning, measured on the built-in tiny world. Writes configs/CLAIMS.md and its plots.

    python tools/claims.py

Every figure is a mean over three seeds with its spread (half of maximum minus minimum). A seed sets the adapter's
start, the order of the data, which examples are drawn, and which answered questions a prompt is given.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS / "tiny")]

import jax
import numpy as np
from laboratory import (
    LEARNING_RATE,
    LENGTH,
    MAX_NEW_TOKENS,
    NUM_QUESTIONS,
    ROWS,
    STEPS,
    Laboratory,
    Tuned,
    drawn,
    kind_of,
    row_of,
    without_stop,
)

from sft_jax.data.tokens.examples import join
from sft_jax.evaluation.answers import same_answer
from sft_jax.evaluation.questions import cut_at_blank_line, exchanges, few_shot_prompts
from sft_jax.tree import flatten

SEEDS = (0, 1, 2)
SIZES = (4, 8, 16, 32, 64, 128, 256)
SHOTS = (0, 1, 2, 4, 8)
RANKS = (1, 4, 16, 64)
OUT = TOOLS.parent / "configs"


@dataclass(frozen=True)
class Standard:
    """What everything is compared with: the base, and its tuning as in configs/quickstart.yaml, once a seed."""

    base: Tuned
    base_answers: dict[str, float]
    base_perplexity: float  # of documents
    networks: list[Tuned]
    answers: list[dict[str, float]]


def spread(values: Sequence[float], form: str = "{:.1%}") -> str:
    """Mean and half the range."""
    values = list(values)
    text = form.format(np.mean(values))
    return f"{text} ± {form.format((max(values) - min(values)) / 2)}" if max(values) > min(values) else text


class Report:
    """Sections of Markdown: a claim, its table, and whether the figures bear it out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of plots
        self.lines: list[str] = []

    def section(
        self, claim: str, header: Sequence[str], rows: Sequence[Sequence[str]], holds: bool, reading: str
    ) -> None:
        self.lines += [f"## {claim}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        self.lines += ["| " + " | ".join(row) + " |" for row in rows]
        self.lines += ["", f"**{'Borne out' if holds else 'Not borne out'}.** {reading}", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of CLAIMS.md and claims/; default configs")
    out: Path = parser.parse_args().out
    (out / "claims").mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    cache = tempfile.TemporaryDirectory(prefix="sft-jax-claims-")
    jax.config.update("jax_compilation_cache_dir", cache.name)
    lab, report = Laboratory(), Report(out / "claims")

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {text}", flush=True)

    say("the base, and tuned with three seeds")
    base = lab.base()
    networks = [lab.tune(lab.train, seed) for seed in SEEDS]
    answers = [lab.answers(network, lab.asked) for network in networks]
    standard = Standard(base, lab.answers(base, lab.asked), lab.document_perplexity(base), networks, answers)
    for claim in (stops, loss_on_all, no_stop_token, few_examples, unknown_facts, few_shot, lora_or_full, preference):
        say(claim.__name__.replace("_", " "))
        claim(lab, report, standard)
    minutes = (time.perf_counter() - began) / 60
    settings = (
        f"LoRA of rank 16 (learning rate {LEARNING_RATE['lora']:g}) unless said otherwise, full fine-tuning at "
        f"{LEARNING_RATE['full']:g}; {STEPS} steps of {ROWS} × {LENGTH} tokens; {NUM_QUESTIONS} questions about "
        f"held-out countries, greedy answers of at most {MAX_NEW_TOKENS} tokens; seeds {', '.join(map(str, SEEDS))}."
    )
    head = [
        "# What is said of supervised fine-tuning, measured",
        "",
        "On the built-in tiny model and its world of 194 countries, by `python tools/claims.py`; nothing here is "
        "written by hand. What holds for a model of a million parameters need not hold for a large one.",
        "",
        settings + " ± is half of the range over the seeds.",
        "",
    ]
    (out / "CLAIMS.md").write_text("\n".join([*head, *report.lines]).rstrip() + "\n", encoding="utf-8")
    say(f"{out / 'CLAIMS.md'} in {minutes:.1f} minutes")


def stops(lab: Laboratory, report: Report, standard: Standard) -> None:
    columns = ("exact_match", "stop_rate", "mean_length")
    forms = ("{:.1%}", "{:.1%}", "{:.1f}")
    rows = [["base", *(form.format(standard.base_answers[c]) for c, form in zip(columns, forms, strict=True))]]
    rows.append(
        ["tuned", *(spread([a[c] for a in standard.answers], form) for c, form in zip(columns, forms, strict=True))]
    )
    example = lab.asked[0]
    texts = [lab.write(network, [example.prompt_ids])[0][0] for network in (standard.base, standard.networks[0])]
    holds = standard.base_answers["stop_rate"] < 0.05 and min(a["stop_rate"] for a in standard.answers) > 0.95
    reading = f"To “{example.question}” the base writes `{texts[0]!r}`, the tuned model `{texts[1]!r}`."
    report.section(
        "The base continues documents and does not stop; the tuned model answers and stops",
        ("", "exact match", "stops by itself", "mean length"),
        rows,
        holds,
        reading,
    )


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
        "The loss should count assistant tokens only",
        ("loss on", "exact match", "stops by itself", f"perplexity of documents (base {standard.base_perplexity:.2f})"),
        rows,
        bool(gap > 0.01),
        f"Loss on assistant tokens only gives {gap:+.1%} exact match against loss on all tokens, after as many steps.",
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
        "Without the stop token among the targets the tuned model does not stop",
        ("stop token is a target", "stops by itself", "mean length", "exact match"),
        rows,
        max(a["stop_rate"] for a in answers) < 0.05,
        f"Stop rate {spread([a['stop_rate'] for a in answers])} without it.",
    )


def few_examples(lab: Laboratory, report: Report, standard: Standard) -> None:
    found = {0: [standard.base_answers] * len(SEEDS)}
    for size in SIZES:
        found[size] = [lab.answers(lab.tune(drawn(lab.train, size, seed), seed), lab.asked) for seed in SEEDS]
    found[len(lab.train)] = standard.answers
    rows = [
        [str(size), spread([a["exact_match"] for a in of]), spread([a["stop_rate"] for a in of])]
        for size, of in found.items()
    ]
    plot(
        report.folder / "few_examples.png",
        "training examples",
        {"exact match on held-out countries": {size: [a["exact_match"] for a in of] for size, of in found.items()}},
        log=True,
    )
    most = np.mean([a["exact_match"] for a in standard.answers])
    enough = next(size for size, of in found.items() if np.mean([a["exact_match"] for a in of]) >= 0.9 * most)
    report.section(
        "Few examples suffice",
        ("examples", "exact match", "stops by itself"),
        rows,
        enough <= len(lab.train) / 4,
        f"Nine tenths of what all {len(lab.train)} examples give is reached with {enough}.\n\n"
        "![exact match against the number of examples](claims/few_examples.png)",
    )


def unknown_facts(lab: Laboratory, report: Report, standard: Standard) -> None:
    half = len(lab.unknown) // 2
    told = join(
        [*(row_of(lab.train, i) for i in range(len(lab.train))), *(row_of(lab.unknown, i) for i in range(half))],
        "train and unknown",
    )
    networks = [lab.tune(told, seed) for seed in SEEDS]
    first, second = lab.unknown_asked[:half], lab.unknown_asked[half:]

    def match(networks, asked):
        return spread([lab.answers(network, asked)["exact_match"] for network in networks])

    rows = [
        ["known from pretraining", spread([a["exact_match"] for a in standard.answers]), match(networks, lab.asked)],
        ["in no document", match(standard.networks, second), match(networks, second)],
        ["in no document, told in fine-tuning", match(standard.networks, first), match(networks, first)],
    ]
    written = [
        text
        for network in standard.networks
        for text, _, _ in lab.write(network, [q.prompt_ids for q in lab.unknown_asked])
    ]
    asked = lab.unknown_asked * len(SEEDS)
    fitting = np.mean(
        [t.casefold() in lab.answer_kinds[kind_of(q.question)] for t, q in zip(written, asked, strict=True)]
    )
    stay = max(lab.answers(network, second)["exact_match"] for network in (*standard.networks, *networks))
    examples = "; ".join(
        f"“{q.question}” → `{t}` (right: {q.answer})" for q, t in list(zip(asked, written, strict=True))[:3]
    )
    report.section(
        "SFT gives format, not knowledge: facts absent from pretraining stay unknown",
        ("facts", "tuned", f"tuned, with {half} of the absent facts among the examples"),
        rows,
        stay <= 0.1,
        f"None of the answers says so: {fitting:.0%} are of the right kind (a capital where a capital is asked for, a "
        f"landmark where a landmark is), of some other country. {examples}.",
    )


def few_shot(lab: Laboratory, report: Report, standard: Standard) -> None:
    shots = list(exchanges(lab.train_rows[0]))
    found: dict[int, list[float]] = {}
    for num in SHOTS:
        found[num] = []
        for seed in SEEDS:
            prompts = few_shot_prompts(lab.asked, shots, num, seed)
            written = lab.write(standard.base, [lab.tokenizer(prompt)["input_ids"] for prompt in prompts])
            right = [
                same_answer(cut_at_blank_line(text)[0], question.answer, "text")
                for (text, _, _), question in zip(written, lab.asked, strict=True)
            ]
            found[num].append(float(np.mean(right)))
    tuned = [a["exact_match"] for a in standard.answers]
    rows = [[f"base, {num} shots", spread(values)] for num, values in found.items()] + [
        ["tuned, no shots", spread(tuned)]
    ]
    plot(
        report.folder / "few_shot.png",
        "answered questions in the prompt",
        {
            "base": dict(found.items()),
            "tuned, none in the prompt": dict.fromkeys(SHOTS, tuned),
        },
    )
    best = max(found, key=lambda num: np.mean(found[num]))
    report.section(
        "Few-shot prompting of the base against the tuned model without shots",
        ("", "exact match"),
        rows,
        bool(np.mean(tuned) >= np.mean(found[best])),
        f"Prompting changes no weight and reaches {spread(found[best])} at its best (k = {best}), tuning "
        f"{spread(tuned)}. The prompts have a form that the base has read in quizzes (`Question: … Answer: …`, about "
        f"the other half of the countries), which is why it needs no shots; with {SHOTS[-1]} shots they are longer "
        "than anything it has read (128 tokens).\n\n![exact match against shots](claims/few_shot.png)",
    )


def lora_or_full(lab: Laboratory, report: Report, standard: Standard) -> None:
    networks = {f"rank {rank}": standard.networks if rank == 16 else None for rank in RANKS} | {"full": None}
    rows, matches, perplexities, sizes = [], {}, {}, {}
    for name, tuned in networks.items():
        tuned = tuned or [lab.tune(lab.train, seed, name) for seed in SEEDS]
        matches[name] = [lab.answers(network, lab.asked)["exact_match"] for network in tuned]
        perplexities[name] = [lab.document_perplexity(network) for network in tuned]
        num = sizes[name] = sum(leaf.size for leaf in flatten(tuned[0].trainable).values())
        rows.append(
            [
                name if name == "full" else f"LoRA, {name}",
                f"{num:,}",
                f"{8 * num / 1e6:.2f} MB",
                spread(matches[name]),
                spread(perplexities[name], "{:.2f}"),
            ]
        )
    labels = list(networks)
    plot(
        report.folder / "lora_or_full.png",
        "",
        {"exact match": {i: matches[name] for i, name in enumerate(labels)}},
        labels=labels,
    )
    gap = float(np.mean(matches["full"]) - np.mean(matches["rank 16"]))
    forgets = float(np.mean(perplexities["rank 16"]) - np.mean(perplexities["full"]))
    share = sizes["rank 16"] / sizes["full"]
    report.section(
        "LoRA reaches what full fine-tuning reaches, with a fraction of the optimizer memory, and forgets less",
        (
            "",
            "trained parameters",
            "optimizer moments",
            "exact match",
            f"perplexity of documents (base {standard.base_perplexity:.2f})",
        ),
        rows,
        gap <= 0.02 and share < 0.5 and forgets < 0,
        f"Rank 16 against full: {-gap:+.1%} exact match, {share:.0%} of the optimizer moments (two float32 numbers a "
        f"trained parameter), perplexity of documents {forgets:+.2f}. All ranks have one learning rate and full "
        "fine-tuning another; how much is forgotten depends on the rate, the steps and the rank more than on the "
        "method.\n\n![exact match by rank](claims/lora_or_full.png)",
    )


def preference(lab: Laboratory, report: Report, standard: Standard) -> None:
    """Better: the bare answer. Acceptable: the same and a full stop. Wrong: the bare answer to another question."""
    source = lab.train_rows[0]
    pairs = list(exchanges(source))
    dotted = [(question, f"{answer}.") for question, answer in pairs]
    asked = [(question.question, question.answer) for question in lab.asked]
    others = [asked[(i + 1) % len(asked)][1] for i in range(len(asked))]
    kinds = {
        "better": asked,
        "acceptable": [(question, f"{answer}.") for question, answer in asked],
        "wrong": [(question, other) for (question, _), other in zip(asked, others, strict=True)],
    }
    settings: dict[str, Callable[[int], Tuned]] = {
        "base": lambda seed: standard.base,
        "SFT on the better ones": lambda seed: standard.networks[SEEDS.index(seed)],
        "SFT on the acceptable ones": lambda seed: lab.tune(lab.encode(dotted), seed),
        "SFT on both": lambda seed: lab.tune(lab.encode(pairs + dotted), seed),
    }
    means: dict[str, dict[str, list[float]]] = {}
    for name, make in settings.items():
        networks = [make(seed) for seed in SEEDS]
        means[name] = {kind: [lab.log_likelihood(n, of) for n in networks] for kind, of in kinds.items()}
    rows = [[name, *(spread(values, "{:.1f}") for values in of.values())] for name, of in means.items()]
    margins = {name: float(np.mean(of["better"]) - np.mean(of["acceptable"])) for name, of in means.items()}
    report.section(
        "SFT cannot say that one good answer is slightly better than another",
        ("mean log-likelihood of", "the better answer", "the acceptable answer", "a wrong answer"),
        rows,
        abs(margins["SFT on both"]) < 1 and margins["SFT on the acceptable ones"] < 0,
        "Better is the bare answer, acceptable the same with a full stop, wrong the bare answer to another question. "
        f"Better minus acceptable is {margins['SFT on the better ones']:+.1f} nats after tuning on the better ones, "
        f"{margins['SFT on the acceptable ones']:+.1f} after tuning on the acceptable ones and "
        f"{margins['SFT on both']:+.1f} after tuning on both: what was shown is likely, in the proportion in which it "
        "was shown. That both are good and one slightly better has no place in such data; it needs a loss that sees "
        "both answers at once, as preference methods have.",
    )


def plot(path: Path, xlabel: str, lines: dict, log: bool = False, labels: Sequence[str] | None = None) -> None:
    """Means with their range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for name, points in lines.items():
        x = list(points)
        mean = [np.mean(points[i]) for i in x]
        axes.plot(x, mean, marker="o", label=name)
        axes.fill_between(x, [min(points[i]) for i in x], [max(points[i]) for i in x], alpha=0.2)
    if log:
        axes.set_xscale("symlog", base=2, linthresh=4)
        axes.set_xticks(list(next(iter(lines.values()))), map(str, next(iter(lines.values()))))
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel=xlabel, ylim=(-0.02, 1.02))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
