"""Chat templates are programs that come with a model: they end in time, and do not fill the memory."""

import pytest

from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.chat.template_limits import check_source, enforce_limits
from sft_jax.data.read.rows import RowError
from sft_jax.errors import UserError

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
DOUBLES = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"


def render(source):
    with enforce_limits():
        return ChatTemplate(source).render(MESSAGES)[0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 9 ** 9 ** 9 ** 9 }}", r"computes powers \(\*\*\)"),
        ("{% if 0 %}{% generation %}{{ 9 ** 9 ** 9 }}{% endgeneration %}{% endif %}", "computes powers"),
        ("{{ 'x' * 1000000000 }}", "repeats texts or lists more than"),
        ("{{ 'x'|center(1000000000) }}", "has the number 1000000000, and at most 1,000,000 is allowed"),
        ("{{ '%1000000000d' % 1 }}", "has the number %1000000000d"),
        ("{{ '{:>1000000000}'.format(1) }}", "has the number {:>1000000000}"),
        ("{{ (['x' * 999999] * 999999)|join }}", "repeats texts or lists more than 1,000,000 times"),
        ("{{ 'x' * 9999 }}{{ 'x' * 9999 }}", "repeats texts"),
        ("{{ 1" + " + 1" * 900 + " }}", "nests more than 300 expressions"),
        ("{% for i in [1] %}" * 40 + "{% endfor %}" * 40, "nests more than 300 expressions, or 30 loops"),
        ("x" * (2**20 + 1), "has 1,048,577 characters"),
        (3, "is no text but '3'"),
    ],
)
def test_sources_that_nothing_compiles(source, words):
    template = ChatTemplate(source)
    for use in (lambda: template.render(MESSAGES), lambda: template.reads):
        with pytest.raises(UserError, match=rf"^the chat template {words}.*; set data.chat_template to another one$"):
            use()


def test_numbers_that_templates_have():
    check_source("{{ '=' * 80 }}{{ ' ' * loop.index * 4 }}{% for i in range(1000) %}{{ x[:4096] * 1 }}{% endfor %}")
    check_source("{{ '1234567890' }}{{ '%d of %5.2f' % (1, 2) }}")


@pytest.mark.parametrize("source", [DOUBLES, "{{ ('x' * ('400000000'|int))|length }}"])
def test_memory(source):
    with pytest.raises(UserError, match=r"needs more than 256 MiB of memory for a conversation of 2 messages"):
        render(source + "{% for i in range(9999) %}{% for i in range(9999) %}{% endfor %}{% endfor %}")


def test_time(monkeypatch):
    monkeypatch.setattr("sft_jax.data.chat.template_limits.SECONDS", 0.2)
    with pytest.raises(UserError, match=r"does not finish within 0.2 seconds for a conversation of 2 messages"):
        render("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in [1] %}" * 24 + "{% endfor %}" * 24, "nested"),
        ("{{ " + "(" * 3000, "recursion"),
        ("{% set x = 'x' * 100000 %}{% for i in range(20) %}{{ x }}{% endfor %}", "writes 2,000,000 characters for a"),
        ("{% for i in range('1000000000'|int) %}{% endfor %}", "Range too big"),
    ],
)
def test_rows(source, words):
    with pytest.raises(RowError, match=words):
        render(source)


def test_a_long_conversation_is_no_absurd_output():
    long = [MESSAGES[0] | {"content": "a" * 1_500_000}, MESSAGES[1]]
    text, _ = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render(long)
    assert len(text) == 1_500_001
