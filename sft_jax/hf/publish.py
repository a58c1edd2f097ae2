"""Uploads an export to the Hugging Face Hub, as one commit: readers see the model before it or all of it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError, one_line
from sft_jax.files.buckets import is_url
from sft_jax.version import __version__

# Files that would make a repository another model than the export, if they stayed from an earlier one.
_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub that can be written.

    Attributes:
        name: ``USER/REPO``.
        branch: None for the default branch.
        files: what it holds.
        commit: what it is at; None if it was empty or is new.
    """

    name: str
    branch: str | None
    files: frozenset[str]
    commit: str | None

    def __str__(self) -> str:
        return self.name if self.branch is None else f"{self.name}@{self.branch}"

    @property
    def url(self) -> str:
        """Its page."""
        from huggingface_hub import HfApi

        page = f"{HfApi().endpoint}/{self.name}"
        return page if self.branch is None else f"{page}/tree/{self.branch}"


def open_repository(target: str, public: bool, out: str) -> Repository:
    """Find or create a repository, before anything is exported for it.

    Args:
        target: ``USER/REPO`` or ``USER/REPO@BRANCH``.
        public: whether a new repository is public.
        out: the folder of the export.

    Raises:
        UserError: no such name, no token, no permission, no connection.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    name, _, branch = target.partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or (branch and not re.fullmatch(r"[\w][\w./-]*", branch)):
        raise UserError(f"--push: {target!r} is not USER/REPO or USER/REPO@BRANCH")
    if is_url(out):
        raise UserError(f"--push: uploads a folder of this machine, and {out} is in a bucket; use another OUT")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push: the Hub is switched off by HF_HUB_OFFLINE; unset it")
    if get_token() is None:
        raise UserError("--push: no token; run `hf auth login`, or set HF_TOKEN, and run the same command again")
    api = HfApi()
    try:
        try:
            info = api.model_info(name)
            kind = "private" if info.private else "public"
            print(
                f"{name}: exists and is {kind}"
                + (", which --public leaves as it is" if public and info.private else "")
            )
        except RepositoryNotFoundError:
            api.create_repo(name, private=not public, exist_ok=True)
            print(f"{name}: created, {'public' if public else 'private'}")
        if branch:
            api.create_branch(name, branch=branch, exist_ok=True)
        info = api.model_info(name, revision=branch or None)
    except failures() as error:
        raise UserError(
            f"--push: {name}: {_reason(error)}; the token needs write access, and USER must be yours"
        ) from error
    files = frozenset(one.rfilename for one in info.siblings or [])
    return Repository(name, branch or None, files, info.sha)


def push(repository: Repository, out: str, message: str) -> str:
    """Upload a folder; returns the page of the repository. What is there already is not uploaded again.

    Model files of an earlier export that this one does not have are deleted: they would be loaded with it, or instead
    of it. Other files stay, and everything stays in the history.

    Raises:
        UserError: the upload failed; the same command resumes it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    files = {path.relative_to(out).as_posix(): path for path in sorted(Path(out).rglob("*")) if path.is_file()}
    stale = sorted(
        name for name in repository.files - files.keys() if any(fnmatch(name, pattern) for pattern in _MODEL_FILES)
    )
    replaced = sorted(files.keys() & repository.files - {".gitattributes"})
    if replaced or stale:
        deleted = f", deletes {', '.join(stale)}" if stale else ""
        print(
            f"{repository}: the upload replaces {len(replaced)} of its {len(repository.files)} files{deleted}; as it "
            f"is now, it stays at revision {repository.commit}"
        )
    operations: list[Any] = [CommitOperationDelete(name) for name in stale]
    operations += [CommitOperationAdd(name, path) for name, path in files.items()]
    hides_progress = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hides_progress:
        disable_progress_bars()
    try:
        HfApi().create_commit(
            repository.name,
            operations,
            commit_message=message,
            commit_description=f"sft-jax {__version__}",
            revision=repository.branch,
        )
    except failures() as error:
        raise UserError(
            f"--push: {repository}: the upload failed: {_reason(error)}; {out} is complete, and the same command "
            "uploads what is missing"
        ) from error
    finally:
        if hides_progress:
            enable_progress_bars()
    return repository.url


def failures() -> tuple[type[BaseException], ...]:
    """The exceptions of the Hub's client and its connections."""
    from huggingface_hub.errors import HfHubHTTPError

    of_connections = HfHubHTTPError.__bases__  # HTTPError of httpx or httpx2, by the version of the client
    return (*of_connections, OSError, RuntimeError, ValueError)


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    return one_line(text[:300])
