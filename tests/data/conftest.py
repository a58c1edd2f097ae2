"""What the tests of data share."""

import pytest
from kit import CHATML, make_tokenizer


@pytest.fixture
def tokenizer():
    """The one of all tests, whose template a test may change."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    yield tokenizer
    tokenizer.chat_template = CHATML
