"""The command line. Each command imports what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys

from sft_jax import outside_faults
from sft_jax.errors import (
    USER_MISTAKE,
    Preempted,
    Unreachable,
    UserError,
    exit_code,
    one_line,
)
from sft_jax.version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 on a mistake of the user's, told in one line, 75 where it goes on if run again."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no more of key=value once an option has come between, and that is where people append them.
    given = hasattr(options, "overrides")
    if unknown := [one for one in rest if not given or one.startswith("-") or "=" not in one]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    try:
        return options.command(options)
    except (UserError, Preempted, Unreachable, KeyboardInterrupt) as error:
        print(f"sft-jax: {str(error) or 'interrupted'}", file=sys.stderr)
        return exit_code(error)
    except Exception as error:
        if (line := outside_faults.told(error, options.name)) is None:
            raise
        print(f"sft-jax: {one_line(line)}", file=sys.stderr)
        return USER_MISTAKE


def _train(options: argparse.Namespace) -> int:
    from sft_jax.config import load

    config = load(options.config, options.overrides)
    _quiet_imports()
    from sft_jax.processes import joined

    with joined(options.coordinator, options.num_processes, options.process_id, options.timeout):
        from sft_jax.commands.train import train

        train(config)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from sft_jax.config import load

    config = load(options.config, options.overrides)
    if options.rows is not None and options.rows < 0:
        raise UserError(f"--rows: {options.rows} is negative")
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed, and no accelerator taken from a run beside it
    _quiet_imports()
    from sft_jax.commands.inspect import inspect

    inspect(config, options.rows, options.json, options.html)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from sft_jax.config import load

    config = load(options.config, options.overrides)
    os.environ["JAX_PLATFORMS"] = "cpu"  # programs are compiled for other machines, and nothing is computed here
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # compilers' warnings about programs that are too large
    _quiet_imports()
    from sft_jax.commands.plan import Assumed, plan

    plan(
        config,
        options.topology,
        options.architecture,
        Assumed(options.target_share, options.document_length),
        options.json,
        options.advice,
        options.search,
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from sft_jax.config import load

    config = load(options.config, options.overrides)
    _quiet_imports()
    from sft_jax.commands.evaluate import evaluate

    evaluate(config, options.step, options.json, base=options.base)
    return 0


def _generate(options: argparse.Namespace) -> int:
    if options.chat and (options.prompt or options.file or options.raw or options.json):
        raise UserError("--chat reads what you type; leave out --prompt, --file, --raw and --json")
    if not options.chat and not options.prompt and not options.file:
        raise UserError("nothing to answer; give --prompt TEXT, --file FILE, or --chat")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {options.max_new_tokens} is not at least 1")
    if options.batch_size < 1:
        raise UserError(f"--batch-size: {options.batch_size} is not at least 1")
    _quiet_imports()
    from sft_jax.commands.generate import read_prompts, run_chat, run_generate
    from sft_jax.inference.sampling import Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    limit = options.max_new_tokens
    where = {"base": options.base, "step": options.step, "dtype": options.dtype}
    if options.chat:
        run_chat(options.model, limit, sampling, options.system, **where)
        return 0
    prompts = [*options.prompt, *(read_prompts(options.file) if options.file else [])]
    run_generate(
        options.model,
        prompts,
        limit,
        sampling,
        options.raw,
        options.system,
        options.batch_size,
        as_json=options.json,
        **where,
    )
    return 0


def _score(options: argparse.Namespace) -> int:
    _quiet_imports()
    from sft_jax.commands.score import run_score

    run_score(options.model, options.file, options.raw, options.base, options.step, options.dtype, options.json)
    return 0


def _export(options: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # an export needs no accelerator and takes none from a run beside it
    _quiet_imports()
    from sft_jax.processes import joined

    with joined(options.coordinator, options.num_processes, options.process_id, options.timeout):
        from sft_jax.commands.export import export

        export(options.run, options.out, options.format, options.step, options.base)
    return 0


def _quiet_imports() -> None:
    """Hints of transformers about optional packages are not ours to print."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft-jax", description="Supervised fine-tuning of language models in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"sft-jax {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train; continues where a run of the same config left off")
    train.add_argument("config", metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.learning_rate=2e-5")
    _add_processes(train)
    train.set_defaults(command=_train)

    inspect = commands.add_parser(
        "inspect", help="show what will be trained: rows with their mask, counts, what is refused"
    )
    inspect.add_argument("config", metavar="CONFIG.yaml")
    inspect.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.max_length=4096")
    inspect.add_argument("--rows", type=int, metavar="N", help="examples to show; default 3, with --json all")
    inspect.add_argument(
        "--json", action="store_true", help="one JSON object a line: the summary, then an example each"
    )
    inspect.add_argument("--html", metavar="FILE", help="also write a page")
    inspect.set_defaults(command=_inspect)

    plan = commands.add_parser("plan", help="compile the step for hardware that need not be there: does it fit?")
    plan.add_argument("config", metavar="CONFIG.yaml")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.batch_size=32")
    plan.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:4x4, v5p:64, h100:8, h100:2x8"
    )
    plan.add_argument("--architecture", metavar="FILE", help="a config.json to use instead of the model's")
    plan.add_argument("--target-share", type=float, default=0.5, metavar="X", help="of tokens with loss; default 0.5")
    plan.add_argument(
        "--document-length", type=int, metavar="N", help="tokens of a conversation; default: it fills its row"
    )
    plan.add_argument(
        "--no-advice", dest="advice", action="store_false", help="if it does not fit, look for nothing else"
    )
    plan.add_argument(
        "--search", action="store_true", help="look for the fastest mesh, rows at a time and remat that fit"
    )
    plan.add_argument("--json", action="store_true", help="print the figures as JSON")
    plan.set_defaults(command=_plan)

    evaluate = commands.add_parser("evaluate", help="measure a run on held-out data: base beside tuned")
    evaluate.add_argument("config", metavar="CONFIG.yaml", help="its training.output_dir is the run")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluation.shots=4")
    evaluate.add_argument("--step", type=int, help="default: the last checkpoint")
    evaluate.add_argument("--base", help="the base model, where it has moved")
    evaluate.add_argument("--json", action="store_true", help="print the figures as JSON")
    evaluate.set_defaults(command=_evaluate)

    generate = commands.add_parser("generate", help="answer prompts, or talk")
    _add_model(generate)
    generate.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    generate.add_argument("--file", help="prompts: one a line, or the 'prompt' of each row of a .jsonl")
    generate.add_argument("--chat", action="store_true", help="a conversation at the terminal")
    generate.add_argument("--raw", action="store_true", help="continue plain text, without the chat template")
    generate.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0: the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; default 0: all")
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that make up P"
    )
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts answered at a time")
    generate.add_argument("--json", action="store_true", help="one JSON object a prompt")
    generate.set_defaults(command=_generate)

    score = commands.add_parser("score", help="log-likelihood of given responses")
    _add_model(score)
    score.add_argument("file", metavar="FILE.jsonl", help="rows with 'prompt' and 'responses' (or chosen and rejected)")
    score.add_argument("--raw", action="store_true", help="plain text, without the chat template")
    score.add_argument("--json", action="store_true", help="one JSON object a response")
    score.set_defaults(command=_score)

    export = commands.add_parser("export", help="write a run as a PEFT adapter or a Hugging Face model")
    export.add_argument("run", metavar="RUN", help="the run folder (training.output_dir)")
    export.add_argument("out", metavar="OUT", help="a folder that does not exist yet or is empty, or gs://…")
    export.add_argument(
        "--format", choices=("adapter", "merged"), help="default: adapter for LoRA, merged for full fine-tuning"
    )
    export.add_argument("--step", type=int, help="default: the last checkpoint")
    export.add_argument("--base", help="the base model, where it has moved")
    _add_processes(export)
    export.set_defaults(command=_export)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL_OR_RUN", help="builtin:tiny, a Hugging Face folder or id, a run folder, or an adapter"
    )
    parser.add_argument("--base", help="the base model of a run or an adapter, where it has moved")
    parser.add_argument("--step", type=int, help="of a run; default: the last checkpoint")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the run's, or that of the files")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes", "found by themselves on Cloud TPU, SLURM and Open MPI 4")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, with a port that is free there")
    group.add_argument("--num-processes", type=int, metavar="N", help="1: this one alone, whatever is around it")
    group.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0")
    group.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="of silence after which one is taken to be gone",
    )
