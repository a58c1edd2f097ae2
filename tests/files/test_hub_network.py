"""What the Hub's errors mean, and that nothing waits for a network that is not there."""

import socket
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from sft_jax.files.hub_network import is_offline, what_is_wrong

ANSWER = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("403", response=ANSWER), "it is gated: accept its terms at https://huggingface.co/a/b"),
        (errors.RepositoryNotFoundError("404", response=ANSWER), "there is no such model on the Hub, or it is private"),
        (errors.RevisionNotFoundError("404", response=ANSWER), "there is no such revision"),
        (errors.LocalEntryNotFoundError("no"), "not in the local cache, and the Hub cannot be reached"),
        (OSError("Name or service not known"), "the Hub cannot be reached"),
        (ValueError("one\ntwo"), "one\\ntwo"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_wrong(error, words):
    assert words in what_is_wrong("model", "a/b", error)


def test_a_cause_is_what_is_wrong():
    error = RuntimeError("failed")
    error.__cause__ = OSError("Temporary failure in name resolution")
    assert "cannot be reached" in what_is_wrong("dataset", "a/b", error)


def test_offline(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def resolve(host, port):
        asked.append(host)
        if host == "huggingface.co":
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert is_offline()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:8080")
    assert not is_offline()
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert not is_offline()
    assert asked == ["huggingface.co", "127.0.0.1"]
