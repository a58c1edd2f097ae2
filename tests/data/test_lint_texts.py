"""What the lint says about single texts: how they end, their script, and secrets in them."""

import numpy as np
import pytest

from sft_jax.data.lint.endings import EMPTY, FINISHED, OPEN, OTHER, ending
from sft_jax.data.lint.scripts import NONE, main_scripts, table
from sft_jax.data.lint.secrets import find_secrets
from sft_jax.redaction import without_secrets

KEY = "aB3dE6gH9jK2mN5pQ8sT1uV4xY7z"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" \n", EMPTY),
        ("It is a river.", FINISHED),
        ("Is it? (It is)", FINISHED),
        ("```python\nprint(1)\n```", FINISHED),
        ("这是一条河。", FINISHED),
        ("What a river 🌊", FINISHED),
        ("It is a river. It flows through the old", OPEN),
        ("It is a river. It flows through the old town,", OPEN),
        ("It is a river. It flows through the to", OPEN),
        ("这是一条河。它流过", OPEN),
        ("It is a river.\n\nIt flows", OTHER),
        ("a river which flows through the old town", OTHER),
        ("Rivers flow. They are:\n- the Rhine and the Elbe rivers", OTHER),
        ("Rivers flow. They are the ones of\n2. the old and the new town", OTHER),
        ("Love them all like no other. #PuppyLove", OTHER),
        ("Here is the list. Amanda, James, John, Maria", OTHER),
        ("The sum is easy. It is about 3 + 4 = 7", OTHER),
        ("#### 72", OTHER),
        ("return a + b", OTHER),
    ],
)
def test_endings(text, expected):
    assert ending(text) == expected


def test_scripts():
    texts = [
        "The answer is written in letters of the Latin alphabet.",
        "Это ответ, написанный кириллицей.",
        "これは日本語のテキストです。漢字とかなが混ざっています。",
        "这是一个很长的中文答案，里面有很多汉字，应该足够了。",
        "12 + 30 = 42",
        "Ω ≈ 3 α",
        "",
        "Half of it is English, а половина написана на русском языке, и это довольно много.",
    ]
    names = [table()[1][index] for index in main_scripts(texts)]
    assert names == ["LATIN", "CYRILLIC", "CJK", "CJK", "", "", "", "CYRILLIC"]
    assert (main_scripts([""]) == [NONE]).all()
    assert len(main_scripts([])) == 0
    assert main_scripts(texts).dtype == np.uint8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"use hf_{KEY} now", "Hugging Face token hf_a…"),
        (f"ghp_{KEY}", "GitHub token ghp_…"),
        (f"glpat-{KEY}", "GitLab token glpa…"),
        ("AKIAQ7ZT3XW5LD2HB6MJ", "AWS key AKIA…"),
        (f"AIza{KEY}_k3", "Google key AIza…"),
        (f"sk-proj-{KEY}", "API key sk-p…"),
        (f"sk_live_{KEY}", "API key sk_l…"),
        (f"xoxb-{KEY}", "Slack token xoxb…"),
        (f"pypi-AgE{KEY}{KEY}", "PyPI token pypi…"),
        (f"npm_{KEY}12345abc", "npm token npm_…"),
        (f"-----BEGIN RSA PRIVATE KEY-----\n{KEY}{KEY}{KEY}", "private key ----…"),
        (f"eyJhbGciOiJIUzI1NiJ9.eyJ{KEY}.{KEY}", "JSON web token eyJh…"),
        ("postgres://admin:hunter22@db.corp.net/x", "password in a URL admi…"),
        (f"Authorization: Bearer {KEY}", "bearer token aB3d…"),
        (f"https://h/a?sig={KEY}", "signature in a URL sig=…"),
    ],
)
def test_secrets_are_named_by_kind_and_four_characters(text, expected):
    assert find_secrets(f"Before {text} after.") == [expected]
    assert KEY not in without_secrets(text)
    assert "hunter22" not in without_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "hf_xxxxxxxxxxxxxxxxxxxxxxxx",
        "hf_YOUR_TOKEN_GOES_HERE_PLEASE",
        "AKIAIOSFODNN7EXAMPLE",
        "sk-1234567890abcdef1234567890abcdef",
        "sk-learn-compatible-estimators-for-everyone",
        "https://user:password@localhost/db",
        "postgres://user:password@db/x",
        "https://me:${TOKEN}@host/x",
        "ftp://me:pass123@files.net/x",
        "see ://a, b: 'c1d2e3'@home",
        "Authorization: Bearer YOUR_ACCESS_TOKEN",
        "https://h/a?token=abc",
        "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
        "the sky is blue; mail a@b.org; see https://host:443/a@b",
    ],
)
def test_placeholders_are_no_secrets(text):
    assert find_secrets(text) == []
