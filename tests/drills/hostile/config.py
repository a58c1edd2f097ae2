"""config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Iterator

from hostile.variant import Variant, edit, keys, text

CONFIG, GENERATION = "config.json", "generation_config.json"
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings")
_OTHER = ("model_type", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act")
_OTHER += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "torch_dtype", "dtype", "architectures")
_OTHER += ("layer_types", "sliding_window", "quantization_config", "text_config", "attention_bias")
_OTHER += ("initializer_range", "attention_dropout", "mlp_bias", "transformers_version", "auto_map", "pad_token_id")
_VALUES = {
    "null": None,
    "string": "seven",
    "list": [1, 2],
    "dict": {"a": 1},
    "bool": True,
    "nan": float("nan"),
    "infinity": float("inf"),
    "negative": -3,
    "zero": 0,
    "1e9": 10**9,
    "1e18": 10**18,
    "1e400": 10**400,
    "float": 2.5,
}
_SOME = ("string", "list", "nan", "negative", "1e400")  # of which one is wrong for any key


def variants() -> Iterator[Variant]:
    """All of them."""
    for key in (*_SIZES, *_OTHER):
        for what, value in _VALUES.items():
            if key in _SIZES or what in _SOME:
                yield Variant(f"config {key} {what}", keys(CONFIG, **{key: value}))
    yield from _configs()
    yield from _ropes()
    yield from _generation()


def _configs() -> Iterator[Variant]:
    bad = (CONFIG,)
    deep = "[" * 100_000 + "]" * 100_000
    yield Variant("config empty", text(CONFIG, ""), words=bad)
    yield Variant("config a list", text(CONFIG, "[]"), words=bad)
    yield Variant("config null", text(CONFIG, "null"), words=bad)
    yield Variant("config deep", text(CONFIG, f'{{"model_type": "llama", "a": {deep}}}'), words=bad)
    yield Variant("config deep objects", text(CONFIG, '{"a":' * 100_000 + "1" + "}" * 100_000), words=bad)
    yield Variant("config not UTF-8", text(CONFIG, b'{"model_type": "\xff\xfe"}'), words=bad)
    yield Variant("config with a byte order mark", text(CONFIG, b"\xef\xbb\xbf{}"), words=bad)
    yield Variant("config with NUL", text(CONFIG, b"\x00" * 100), words=bad)
    yield Variant("config lone surrogate", keys(CONFIG, model_type="\ud800"), words=bad)
    yield Variant("config huge", text(CONFIG, '{"model_type": "llama", "a": "' + "x" * 200_000_000 + '"}'), words=bad)
    yield Variant("config many keys", keys(CONFIG, **{f"key{i}": i for i in range(100_000)}))
    yield Variant("config digits", text(CONFIG, '{"vocab_size": ' + "9" * 5000 + "}"), words=bad)
    twice = edit(CONFIG, lambda old: old)

    def duplicate(folder):
        twice(folder)
        content = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(content[:-1] + ', "hidden_size": 64, "hidden_size": 48}')

    yield Variant("config duplicate keys", duplicate)
    yield Variant("config heads do not divide", keys(CONFIG, num_attention_heads=5, head_dim=None))
    yield Variant("config kv heads do not divide", keys(CONFIG, num_key_value_heads=3), words=bad)
    yield Variant("config kv heads more than heads", keys(CONFIG, num_key_value_heads=8), words=bad)
    yield Variant("config odd head_dim", keys(CONFIG, head_dim=11), words=bad)
    yield Variant("config other sizes", keys(CONFIG, hidden_size=64), words=("shape", "config.json"))
    yield Variant("config generates", keys(CONFIG, num_hidden_layers=10**9), "generate", bad)
    yield Variant("config exports", keys(CONFIG, num_hidden_layers=10**9), "export", bad)
    yield Variant("config checks", keys(CONFIG, num_hidden_layers=10**9), "check", bad)
    yield Variant("config code", keys(CONFIG, auto_map={"AutoConfig": "evil.Evil"}, model_type="evil"), words=bad)
    yield Variant("config itself inside", edit(CONFIG, lambda old: old | {"text_config": old}))
    for kind in ("mixtral", "gemma3", "gemma4", "qwen3_next", "gpt_oss", "deepseek_v3", "falcon_h1", "llama4"):
        yield Variant(f"config of {kind}", keys(CONFIG, model_type=kind))
    lists = {"layer_types": ["full_attention"] * 2}, {"layer_types": ["sliding_attention"] * 10**6}
    lists += ({"layer_types": ["new_attention"] * 3}, {"layer_types": [["full_attention"]] * 3})
    for one in lists:
        yield Variant(f"config layer_types {str(one)[:40]}", keys(CONFIG, **one), words=bad)


def _ropes() -> Iterator[Variant]:
    shared = {"factor": 2.0, "original_max_position_embeddings": 64}
    longrope = shared | {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    llama3 = shared | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    kinds = {"longrope": longrope, "llama3": llama3, "yarn": shared | {"rope_type": "yarn"}}
    kinds["linear"] = {"rope_type": "linear", "factor": 2.0}
    for kind, good in kinds.items():
        for key in good:
            for what in ("string", "nan", "negative"):
                yield Variant(f"rope {kind} {key} {what}", keys(CONFIG, rope_scaling=good | {key: _VALUES[what]}))
            less = {name: value for name, value in good.items() if name != key}
            yield Variant(f"rope {kind} without {key}", keys(CONFIG, rope_scaling=less))
    yield Variant("rope equal frequencies", keys(CONFIG, rope_scaling=llama3 | {"high_freq_factor": 1.0}))


def _generation() -> Iterator[Variant]:
    for what, value in _VALUES.items():
        yield Variant(f"generation eos_token_id {what}", keys_of_new(eos_token_id=value), "generate")
    for what, value in {"strings": ["a", "b"], "nested": [[1]], "bools": [True], "far": [2, 10**12]}.items():
        yield Variant(f"generation eos_token_id {what}", keys_of_new(eos_token_id=value), words=(GENERATION,))
    yield Variant("generation many", keys_of_new(eos_token_id=list(range(10**6))), words=(GENERATION,))
    yield Variant("generation beyond", keys_of_new(eos_token_id=5000))
    for what, content in {"empty": "", "list": "[]", "deep": "[" * 100_000, "bytes": b'{"a": "\xff"}'}.items():
        for command in ("train", "generate", "export"):
            yield Variant(f"generation {what} {command}", text(GENERATION, content), command, (GENERATION,))
    yield Variant("generation other keys", keys_of_new(eos_token_id=2, temperature="hot", top_k=-1))


def keys_of_new(**values):
    """A generation_config.json with these keys."""
    import json

    return text(GENERATION, json.dumps(values))
