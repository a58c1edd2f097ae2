"""Each file of a model as something that is no file, and an adapter's files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from hostile.variant import Make, Variant, keys, text
from hostile.weights import _headers, _link, _pipe, header, value

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OF_MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
OF_MODEL += ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
OF_MODEL += ("model.safetensors.index.json", "processor_config.json", "preprocessor_config.json")
LORA = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


def _folder(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def variants() -> Iterator[Variant]:
    """All of them."""
    for name in OF_MODEL:
        for what in ("a pipe", "a folder", "a loop", "zeros without an end", "not UTF-8", "a list"):
            yield Variant(f"{name} is {what}", _kinds(name)[what])
        yield Variant(f"{name} is a pipe, generate", _pipe(name), "generate")
    for name in (ADAPTER, ADAPTER_CONFIG):
        for what, make in _kinds(name).items():
            yield Variant(f"{name} is {what}", make, "init", ("adapter",))
    yield Variant("an empty folder", lambda folder: shutil.rmtree(folder) or folder.mkdir(), words=("config.json",))
    yield from _headers(ADAPTER, LORA, "init")
    for number in (float("nan"), float("inf")):
        yield Variant(f"adapter {number}", value(number, name=LORA, file=ADAPTER), "init", (LORA, "not finite"))
    prints = {"text": "a", "colons": "a:b:c", "hex": "00:00:00", "list": [1], "null": None}
    for what, one in prints.items():
        metadata = {"__metadata__": {"base_fingerprint": one}}
        yield Variant(f"adapter fingerprint {what}", header(lambda old, m=metadata: old | m, ADAPTER), "init", None)
    yield from _adapter_configs()


def _kinds(name: str) -> dict[str, Make]:
    return {
        "a pipe": _pipe(name),
        "a folder": _folder(name),
        "a loop": _link(name, name),
        "nowhere": _link(name, "absent"),
        "zeros without an end": _link(name, "/dev/zero"),
        "a terminal": _link(name, "/dev/tty"),
        "empty": text(name, b""),
        "NUL": text(name, bytes(1000)),
        "not UTF-8": text(name, b'{"a": "\xff\xfe"}'),
        "a list": text(name, b"[]"),
        "a page": text(name, b"<!DOCTYPE html><html><body>Not found</body></html>"),
    }


def _adapter_configs() -> Iterator[Variant]:
    bad = (ADAPTER_CONFIG,)
    values = {"null": None, "text": "seven", "list": [1, 2], "dict": {"a": 1}, "bool": True, "nan": float("nan")}
    values |= {"zero": 0, "negative": -4, "1e18": 10**18, "1e400": 10**400, "float": 2.5, "infinity": float("inf")}
    used = ("r", "lora_alpha", "target_modules", "peft_type")
    for key in used:
        for what, one in values.items():
            words = () if (key, what) == ("lora_alpha", "float") else bad
            if (key, what) != ("lora_alpha", "bool") and (key, what) != ("r", "bool"):
                yield Variant(f"adapter {key} {what}", keys(ADAPTER_CONFIG, **{key: one}), "init", words or ())
    others = ("base_model_name_or_path", "revision", "use_dora", "use_rslora", "target_parameters", "bias")
    others += ("init_lora_weights", "rank_pattern", "modules_to_save", "fan_in_fan_out", "exclude_modules")
    for key in others:
        for what in ("text", "dict", "1e400"):
            yield Variant(f"adapter {key} {what}", keys(ADAPTER_CONFIG, **{key: values[what]}), "init")
    contents = {"empty": "", "list": "[]", "deep": "[" * 100_000, "digits": '{"r": ' + "9" * 5000 + "}", "null": "null"}
    for what, content in contents.items():
        yield Variant(f"adapter config {what}", text(ADAPTER_CONFIG, content), "init", bad)
    modules = ["q_proj"] * 100_000, [""], ["."], ["*"], ["(a+)+$"], ["lm_head"], [None], ["\ud800"], []
    for i, names in enumerate(modules):
        yield Variant(f"adapter modules {i}", keys(ADAPTER_CONFIG, target_modules=names), "init")
