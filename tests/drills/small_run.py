"""A small run that can be copied: its config names everything by paths from its folder."""

from __future__ import annotations

from pathlib import Path

from kit import config_of, make_model, write_chats
from warm import Warm

from sft_jax import config_file as configs

STEPS = 6


def make_run(warm: Warm, folder: Path, *more: list[str]) -> Path:
    """Make a base model, data and a run with checkpoints of the steps 4 and 6, all in one folder with a token cache.

    Args:
        more: further commands to run there.
    """
    make_model(folder / "base")
    write_chats(folder / "chats.jsonl")
    keys = {"training__max_steps": STEPS, "training__save_every": 2}
    configs.save(config_of("base", "chats.jsonl", "run", **keys), folder / "config.yaml")
    for command in (["train", "config.yaml"], *more):
        ended = warm.run(*command, cwd=folder, environment={"SFT_JAX_CACHE": "cache"})
        assert ended.code == 0, ended.err
    return folder
