"""Whether the Hugging Face Hub can be reached, and what its errors mean."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from sft_jax.errors import one_line
from sft_jax.outside_faults import chain

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_NO_NETWORK = ("ConnectError", "ConnectionError", "Name or service not known", "Temporary failure in name resolution")


def is_offline() -> bool:
    """Whether the host of the Hub has no address here, so that requests need not be tried, and tried again."""
    if any(os.environ.get(name) for name in _PROXIES):
        return False  # the proxy knows the address
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False


def go_offline_without_network() -> None:
    """Keep the packages of Hugging Face, which read this when they are imported, from waiting for the network."""
    if is_offline():
        os.environ["HF_HUB_OFFLINE"] = "1"


def what_is_wrong(kind: str, name: str, error: BaseException) -> str:
    """The reason why something of the Hub was not fetched, with the way out.

    Args:
        kind: ``model`` or ``dataset``.
        name: its id.
    """
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    causes = [*chain(error)]
    names, text = {type(one).__name__ for one in causes}, " ".join(map(str, causes))
    if "GatedRepoError" in names or "gated" in text.lower():
        return f"it is gated: accept its terms at {page}, and log in with hf auth login or HF_TOKEN"
    if "RevisionNotFoundError" in names:
        return "there is no such revision"
    if "RepositoryNotFoundError" in names or "DatasetNotFoundError" in names or "401" in text or "404" in text:
        return f"there is no such {kind} on the Hub, or it is private (log in with hf auth login or HF_TOKEN)"
    if "LocalEntryNotFoundError" in names or "OfflineModeIsEnabled" in names or any(one in text for one in _NO_NETWORK):
        return "it is not in the local cache, and the Hub cannot be reached; check the network, or name a local folder"
    return one_line(str(error))[:200]
