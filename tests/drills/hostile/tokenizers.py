"""tokenizer.json, tokenizer_config.json and chat templates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hostile.variant import Make, Variant, edit, keys, text
from hostile.weights import raw

FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_WRONG = {"null": None, "text": "a", "list": [1], "dict": {"a": 1}, "negative": -1, "huge": 10**18, "float": 0.5}
_LOOP = "{% for i in range(99999) %}"
_END = "{% endfor %}"


def model(change: Callable[[dict], object]) -> Make:
    """Changes the model of the tokenizer."""
    return edit(FILE, lambda old: old | {"model": change(old["model"])})


def vocab(**tokens: object) -> Make:
    """Adds tokens to the vocabulary."""
    return model(lambda old: old | {"vocab": old["vocab"] | tokens})


def token(**values: object) -> Make:
    """Changes the first added token."""
    return edit(FILE, lambda old: old | {"added_tokens": [old["added_tokens"][0] | values, *old["added_tokens"][1:]]})


def variants() -> Iterator[Variant]:
    """All of them."""
    yield from _tokenizers()
    yield from _parts()
    yield from _configs()
    yield from _templates()


def _tokenizers() -> Iterator[Variant]:
    for what, content in {
        "empty": "",
        "list": "[]",
        "null": "null",
        "deep": "[" * 100_000,
        "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "not UTF-8": b'{"a": "\xff"}',
        "no keys": "{}",
        "pointer": "version https://git-lfs.github.com/spec/v1\n",
    }.items():
        yield Variant(f"tokenizer {what}", text(FILE, content), words=("tokenizer",))
        yield Variant(f"tokenizer {what}, generate", text(FILE, content), "generate", ("tokenizer",))
    for part in (1, 100, 5000):
        yield Variant(f"tokenizer truncated by {part}", raw(lambda data, n=part: data[:-n], FILE), words=("tokenizer",))
    missing = {"first": ["qqq", "zzz"], "result": ["r", "Z"], "one": ["r"], "three": ["r", "i", "v"], "none": []}
    missing |= {"numbers": [1, 2], "text": "r i v", "lone": "r"}
    for what, merge in missing.items():
        yield Variant(f"merges {what}", model(lambda old, m=merge: old | {"merges": [m, *old["merges"]]}))
    yield Variant("merges twice", model(lambda old: old | {"merges": old["merges"] * 2}))
    yield Variant("merges backwards", model(lambda old: old | {"merges": old["merges"][::-1]}))
    yield Variant("merges huge", model(lambda old: old | {"merges": old["merges"] * 2000}))
    yield Variant("tokenizer lost", lambda folder: (folder / FILE).unlink(), words=("tokenizer",))


def _parts() -> Iterator[Variant]:
    ids = {
        "negative": -1,
        "float": 1.5,
        "text": "a",
        "null": None,
        "bool": True,
        "2**31": 2**31,
        "2**32 - 1": 2**32 - 1,
    }
    ids |= {"2**32": 2**32, "2**64": 2**64, "million": 10**6, "taken": 5, "400": 400}
    for what, value in ids.items():
        yield Variant(f"vocab id {what}", vocab(zzz=value))
        yield Variant(f"added id {what}", token(id=value))
    yield Variant("vocab river id million", vocab(r=10**6))
    yield Variant("vocab river id 2**31", vocab(r=2**31))
    yield Variant("vocab empty", model(lambda old: old | {"vocab": {}}))
    yield Variant("vocab one", model(lambda old: old | {"vocab": {"a": 0}, "merges": []}))
    for kind in ("WordLevel", "WordPiece", "Unigram", "BPE", "Evil"):
        yield Variant(f"model {kind}", model(lambda old, kind=kind: old | {"type": kind}))
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}
    yield Variant("model without unknown", model(lambda _: words))
    for unk in (0, 7, None, -1, 10**12):
        unigram = {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]], "unk_id": unk, "byte_fallback": False}
        yield Variant(f"model Unigram {unk}", model(lambda _, one=unigram: one))
    scores = {"nan": float("nan"), "text": "a", "infinity": float("-inf"), "huge": 1e300}
    for what, score in scores.items():
        unigram = {"type": "Unigram", "vocab": [["a", score], ["b", 1.0]], "unk_id": 0, "byte_fallback": False}
        yield Variant(f"model Unigram {what}", model(lambda _, one=unigram: one))
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding", "added_tokens"):
        for what, value in (_WRONG | {"type": {"type": "Evil"}, "sequence": {"type": "Sequence"}}).items():
            yield Variant(f"tokenizer {key} {what}", keys(FILE, **{key: value}))
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$("}, "behavior": "Isolated", "invert": False}
    yield Variant("pattern open", keys(FILE, pre_tokenizer=pattern))
    slow = pattern | {"pattern": {"Regex": "^(([a-z])+.)+[A-Z]([a-z])+$"}}
    yield Variant("pattern slow", keys(FILE, pre_tokenizer=slow))
    nested: dict = {"type": "Lowercase"}
    for _ in range(100):
        nested = {"type": "Sequence", "normalizers": [nested]}
    yield Variant("normalizer nested", keys(FILE, normalizer=nested))
    grows = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1000}
    yield Variant("normalizer grows", keys(FILE, normalizer={"type": "Sequence", "normalizers": [grows] * 3}))
    yield Variant("normalizer charsmap", keys(FILE, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}))
    yield Variant(
        "truncation", keys(FILE, truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst"})
    )
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    yield Variant("padding", keys(FILE, padding=padding | {"pad_to_multiple_of": None}))
    for what, content in {"empty": "", "long": "x" * 10**6, "space": " ", "NUL": "\0", "e": "e"}.items():
        yield Variant(f"added token {what}", token(content=content))


def _configs() -> Iterator[Variant]:
    yield from (
        Variant(f"tokenizer config {what}", text(CONFIG, content))
        for what, content in {"empty": "", "list": "[]", "deep": "[" * 100_000, "bytes": b'{"a": "\xff"}'}.items()
    )
    for key in (
        "eos_token",
        "bos_token",
        "pad_token",
        "unk_token",
        "chat_template",
        "tokenizer_class",
        "added_tokens_decoder",
    ):
        for what, value in _WRONG.items():
            yield Variant(f"tokenizer config {key} {what}", keys(CONFIG, **{key: value}))
    for key in ("model_max_length", "extra_special_tokens", "additional_special_tokens", "auto_map", "padding_side"):
        for what in ("list", "dict"):
            yield Variant(f"tokenizer config {key} {what}", keys(CONFIG, **{key: _WRONG[what]}))
    yield Variant("eos_token that is new", keys(CONFIG, eos_token="<|never|>"))
    decoders = {
        "id": {"x": {"content": "a"}},
        "negative": {"-1": {"content": "a"}},
        "far": {"1000000": {"content": "Q"}},
    }
    for what, value in (decoders | {"long": {str(10**30): {"content": "a"}}, "no content": {"0": {}}}).items():
        yield Variant(f"added_tokens_decoder {what}", keys(CONFIG, added_tokens_decoder=value))
    many = {str(1000 + i): {"content": f"<{i}>", "special": True} for i in range(20_000)}
    yield Variant("added_tokens_decoder many", keys(CONFIG, added_tokens_decoder=many))


def _templates() -> Iterator[Variant]:
    one = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    big = "{% set x = 'x' * 1000000 %}"
    double = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}"
    macro = "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}"
    sources = {
        "endless": _LOOP * 3 + _END * 3,
        "range": "{% for i in range(10**9) %}{% endfor %}",
        "range of a number": "{% for i in range(1000000000) %}{% endfor %}",
        "range as text": "{% for i in range('1000000000'|int) %}{% endfor %}",
        "characters": "{{ 'x' * 1000000000 }}",
        "characters as text": "{{ 'x' * ('1000000000'|int) }}",
        "too many characters": "{{ 'x' * ('1000000000000000'|int) }}",
        "lists": "{{ ([1] * 9999999)|length }}{{ ([[1] * 9999999] * 9999999)|length }}",
        "center": "{{ 'x'|center(1000000000) }}",
        "format": "{{ '%1000000000d' % 1 }}{{ '%2000000000d' % 1 }}",
        "formatted": "{{ '{:>1000000000}'.format(1) }}",
        "power": "{{ 9 ** 9 ** 9 ** 9 }}",
        "power in a branch": one + "{% if messages|length > 999 %}{{ 9 ** 9 ** 9 }}{% endif %}",
        "squares": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "doubles": double,
        "recursion": macro,
        "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "output": big + _LOOP + "{{ x }}" + _END,
        "output 100 MB": big + "{% for i in range(100) %}{{ x }}{% endfor %}" + one,
        "append": "{% set ns = namespace(l=[]) %}" + _LOOP * 2 + "{% set ns.l = ns.l + ['x' * 999] %}" + _END * 2,
        "deep": "(" * 100_000,
        "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "deep lists": "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
        "deep loops": "{% for i in [1] %}" * 200 + _END * 200,
        "long sum": "{{ 1" + " + 1" * 50_000 + " }}",
        "long not": "{{ " + "not " * 50_000 + "1 }}",
        "open": "{% for",
        "unknown filter": "{{ messages|evil }}",
        "include": "{% include '/etc/passwd' %}",
        "extends": "{% extends '/etc/passwd' %}",
        "import": "{% import 'os' as os %}",
        "pries": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "lipsum": "{{ lipsum(n=999999, min=1000, max=1001) }}",
        "cycler": "{{ cycler.__init__.__globals__.os.system('false') }}",
        "wordwrap": "{{ ('x ' * 9999999)|wordwrap(1) }}",
        "replace": "{{ ('x' * 999999)|replace('x', 'x' * 999999) }}",
        "join": "{{ (['x' * 999999] * 999999)|join }}",
        "indent": "{{ ('x\\n' * 999999)|indent('x' * 999999) }}",
        "huge": one + "{# " + "x" * 5_000_000 + " #}",
        "empty": "",
        "space": "   \n",
        "no messages": "hello",
        "surrogate": "{{ '\\ud800' }}",
        "raises": "{{ raise_exception('a\\nb' * 1000) }}",
        "undefined": "{{ a.b.c }}",
        "divides": "{{ 1 / 0 }}",
        "sorts": "{{ [1, 'a']|sort }}",
        "date": "{{ strftime_now('%' * 99999) }}",
    }
    for what, source in sources.items():
        yield Variant(f"template {what}", text(TEMPLATE, source))
    for what in ("endless", "characters as text", "power", "recursion", "doubles", "deep lists", "squares"):
        yield Variant(f"template {what}, generate", text(TEMPLATE, sources[what]), "generate", ("template",))
    yield Variant("template not UTF-8", text(TEMPLATE, b"{{ '\xff' }}"), words=())
    named = [{"name": "default", "template": sources["endless"]}, {"name": "a"}, {"template": 3}, "b", None]
    for i in range(len(named)):
        yield Variant(f"templates {i}", _named(named[i]))


def _named(one: object) -> Make:
    def make(folder):
        (folder / TEMPLATE).unlink()
        keys(CONFIG, chat_template=[one])(folder)

    return make
