"""Hostile config files, by name."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator

from sft_jax.config import Config, SourceConfig

_WRONG = (
    "[]", "{a: 1}", "{a: [1]}", "[[1]]", "[{a: 1}]", "no word", "-1", "0", "1e300", ".nan", ".inf",
    "1" + "0" * 18, "9" * 400, "''", "null", "2020-01-01", "0x7fffffffffffffff",
)  # fmt: skip
_REQUIRED = """
model: {{path: {model}}}
data: {{train: [{{path: {data}}}], max_length: 128}}
training: {{output_dir: {folder}/run, batch_size: 2, max_steps: 1}}
"""


def keys() -> Iterator[str]:
    """Every key of a config as a dotted path."""
    for section in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[section.name]
        options = [one for one in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(one)]
        yield section.name
        for field in dataclasses.fields(options[0]):
            yield f"{section.name}.{field.name}"


def overrides() -> Iterator[tuple[str, list[str]]]:
    """Every key with every wrong value."""
    for key in keys():
        for wrong in _WRONG:
            yield f"{key} {wrong[:20]}", [f"{key}={wrong}"]
    for field in dataclasses.fields(SourceConfig):
        for wrong in _WRONG:
            yield f"source {field.name} {wrong[:20]}", [f"data.train.0.{field.name}={wrong}"]
    for number in ("1000000000000000000", "9223372036854775807", "18446744073709551616"):
        for key in ("training.max_steps", "training.batch_size", "data.max_length", "training.num_train_epochs",
                    "lora.rank", "evaluation.max_new_tokens", "mesh.data", "training.seed",
                    "data.num_workers"):  # fmt: skip
            yield f"{key} {number}", [f"{key}={number}"]
    for weight in ("1e300", ".nan", ".inf", "-1", "1e-300", "1e12"):
        yield f"weight {weight}", [f"data.train=[{{path: {{data}}, weight: {weight}}}]"]
    yield "both huge", ["data.max_length=1000000000", "training.batch_size=1000000000"]
    yield "epochs", ["training.max_steps=null", "training.num_train_epochs=1e18"]
    yield "rows", ["data.train=[{path: {data}, max_rows: 1000000000000000000000}]"]


def files() -> Iterator[tuple[str, bytes]]:
    """Config files; `{model}`, `{data}` and `{folder}` stand for paths, and `{good}` for a good config."""
    bomb = b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
    )
    merge = b"a0: &a0 {k: v}\n" + b"".join(
        b"a%d: &a%d {<<: [%s]}\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
    )
    yield "empty", b""
    yield "scalar", b"7"
    yield "list", b"[1, 2]"
    yield "nul", b"{good}\nextra: \0"
    yield "not utf-8", b"{good}\nextra: \xff"
    yield "utf-16", "model: {path: a}".encode("utf-16")
    yield "deep list", b"a: " + b"[" * 100_000
    yield "deep object", b"a: " + b"{a: " * 100_000
    yield "deep and closed", b"a: " + b"[" * 3000 + b"]" * 3000
    yield "deep by indents", b"".join(b" " * n + b"a:\n" for n in range(1000))
    yield "long", b"a: " + b"x" * (32 << 20)
    yield "many keys", b"".join(b"k%d: 1\n" % n for n in range(60_000))
    yield "lists without end", bomb + b"{good}"
    yield "lists without end as a key", bomb + b"{good}\nlora: {target_modules: *a11}"
    yield "keys without end", merge + b"{good}"
    yield "an anchor in itself", b"data: &a {train: *a}"
    yield "a list in itself", b"{good}\nlora: {target_modules: &a [*a]}"
    yield "an anchor that is none", b"data: *a"
    yield "python object", b"{good}\nextra: !!python/object/apply:os.system ['echo']"
    yield "python name", b"{good}\nlora: {target_modules: !!python/name:os.system }"
    yield "own tag", b"{good}\nextra: !own {a: 1}"
    yield "binary", b"{good}\nlora: {init_from: !!binary AAAA}"
    yield "set", b"{good}\nlora: {target_modules: !!set {a, b}}"
    yield "two documents", b"{good}\n---\n{good}"
    yield "tabs", b"model:\n\tpath: a"
    yield "same key twice", b"{good}\nmodel: {path: {model}}"
    yield "number as a key", b"{good}\n7: 8"
    yield "null as a key", b"{good}\nnull: 8"
    yield "list as a key", b"{good}\n? [a, b]\n: 8"
    yield "keys of numbers", b"{good}\nlora: {7: 8}"
    yield "reference to nothing", b"{good}\nlora: {init_from: '${nothing}'}"
    yield "reference to itself", b"{good}\nlora: {init_from: '${lora.init_from}'}"
    yield "references without end", b"{good}\nlora: {init_from: '" + b"${" * 3000 + b"}" * 3000 + b"'}"
    yield "environment", b"{good}\nlora: {init_from: '${oc.env:HOME}'}"
    yield "missing", b"{good}\nlora: {rank: '???'}"
    yield "control", b'{good}\nlora: {init_from: "\\x1b[31m\\0"}'
    yield "surrogate", b'{good}\nlora: {init_from: "\\ud800"}'
    yield "huge number", b"{good}\nlora: {rank: " + b"9" * 5000 + b"}"
    yield "sexagesimal", b"{good}\nlora: {rank: 1" + b":59" * 2000 + b"}"


def filled(content: bytes, model: str, data: str, folder: str) -> bytes:
    """A config with its paths."""
    good = _REQUIRED.format(model=model, data=data, folder=folder).encode()
    content = content.replace(b"{good}", good)
    for name, value in {b"{model}": model, b"{data}": data, b"{folder}": folder}.items():
        content = content.replace(name, value.encode())
    return content
