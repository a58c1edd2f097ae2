"""The SkyPilot task and the Dockerfile: they parse, and what they run and copy is right."""

import os
import re
import subprocess

import pytest
import yaml
from kit import ROOT

TASK = yaml.safe_load((ROOT / "tools" / "cloud" / "skypilot.yaml").read_text())
DOCKERFILE = (ROOT / "tools" / "cloud" / "Dockerfile").read_text()


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_task_starts_the_command(nodes, tmp_path):
    """On several nodes, the first is the coordinator, and each names itself."""
    stub = tmp_path / "sft-jax"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{i}" for i in range(nodes)),
        "SKYPILOT_NODE_RANK": str(nodes - 1),
        **{key: value for key, value in TASK["envs"].items() if value is not None},
        "RUN": "gs://bucket/a run",
        "OVERRIDES": "optimizer.learning_rate=1e-4 training.max_steps=3",
    }
    script = "set -eu\n" + TASK["run"]
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    expected = ["train", "builtin:quickstart", "training.output_dir=gs://bucket/a run"]
    expected += ["optimizer.learning_rate=1e-4", "training.max_steps=3"]
    if nodes > 1:
        expected += ["--coordinator", "10.0.0.0:8476", "--num-processes", "4", "--process-id", "3"]
    assert done.stdout.splitlines() == expected


def test_the_task_resumes_what_was_preempted_only():
    recovery = TASK["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}


def test_the_image_has_what_the_package_is_built_from():
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()]
    assert all((ROOT / one).exists() for one in copied)
    pyproject = (ROOT / "pyproject.toml").read_text()
    included = re.findall(r'^"([\w./]+)" = "sft_jax/', pyproject, re.MULTILINE)
    assert included
    for needed in [*included, "sft_jax", "README.md", "LICENSE", "pyproject.toml"]:
        assert any(needed == one or needed.startswith(f"{one}/") for one in copied), needed
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{one}" for one in copied} <= set(ignored)
