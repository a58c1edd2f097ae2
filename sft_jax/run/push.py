"""Uploads an export to the Hugging Face Hub."""

from __future__ import annotations

import jax

from sft_jax.errors import UserError
from sft_jax.hf.publish import Repository, open_repository, push
from sft_jax.run.export import Written
from sft_jax.store.folder import RunDirectory


def prepare(target: str | None, public: bool, run: str, out: str) -> Repository | None:
    """Find or create a repository before anything is exported; see :func:`sft_jax.hf.publish.open_repository`.

    Raises:
        UserError: it cannot be written, or there are several processes.
    """
    if target is None:
        if public:
            raise UserError("--public: says how --push creates a repository; name one with --push USER/REPO")
        return None
    if jax.process_count() > 1:
        raise UserError("--push: works in one process; export with several, and push with one, by the same command")
    if not (folder := RunDirectory(run)).is_run():  # no repository is created for a wrong name
        raise UserError(f"{folder}: not a run directory; it has no config.yaml or no checkpoints")
    return open_repository(target, public, out)


def upload(repository: Repository, out: str, written: Written) -> None:
    """Upload an export, and print its page.

    Raises:
        UserError: the upload failed; the same command resumes it.
    """
    print(f"pushed to {push(repository, out, f'{written.form} of step {written.step}')}")
