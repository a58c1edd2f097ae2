"""Exports are uploaded to a Hub on this machine with the real client, over broken connections, and downloaded again."""

import json
import subprocess
import sys

import pytest
from fake_hub import Hub, Repo
from huggingface_hub import ModelCard
from kit import Child, child_environment, one_device, run_config, sft_jax

from sft_jax import config_file as configs
from sft_jax.run.train import train

TOKEN = "hf_" + "cD4" * 11
NAME = "someone/tuned"


@pytest.fixture(scope="module")
def run(tiny, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "run"
    train(run_config(tiny, chats, folder, training__max_steps=4, training__save_every=2), one_device())
    return folder


def environment(hub: Hub, home) -> dict[str, str]:
    return {
        "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token,
        "HF_HOME": str(home / "hf"), "HOME": str(home),
        "PYTHONWARNINGS": "ignore::DeprecationWarning",  # of httpx2, as huggingface_hub 2.4 calls it
    }  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A Hub, and a process whose commands use it."""
    with Hub(TOKEN) as hub:
        child = Child(**environment(hub, tmp_path_factory.mktemp("home")))
        yield hub, child
        child.close()


@pytest.fixture
def hub(served):
    hub, _ = served
    hub.repos.clear()
    hub.blobs.clear()
    hub.cuts.clear()
    hub.requests.clear()
    hub.read_only = False
    return hub


@pytest.fixture
def command(served, hub):
    return served[1]


def contents(folder):
    return {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def test_a_push_that_breaks_off_is_resumed_by_the_same_command(run, hub, command, tmp_path):
    out = tmp_path / "out"
    arguments = ("export", run, out, "--format", "merged", "--push", NAME)
    hub.cuts.update(lfs=1, commit=1)  # the client tries the first again by itself
    first = command(*arguments)
    assert first.returncode == 2
    last = first.stderr.splitlines()[-1]  # the client says before that it tries again
    assert last.startswith(f"sft-jax: --push: {NAME}: the upload failed: ")
    assert "the same command uploads what is missing" in last
    assert hub.requests["lfs"] == 2
    assert hub.repos[NAME].private
    assert set(hub.repos[NAME].branches["main"]) == {".gitattributes"}  # nobody sees half of a model
    before = contents(out)
    second = command(*arguments)
    assert second.returncode == 0, second.stderr
    assert "already holds the merged of step 4, and is not written again" in second.stdout
    assert second.stdout.endswith(f"pushed to {hub.url}/{NAME}\n")
    assert hub.requests["lfs"] == 2  # the weights are there already
    assert contents(out) == before
    assert {**hub.repos[NAME].branches["main"]} == before | {".gitattributes": b""}
    assert [one["summary"] for one in hub.repos[NAME].commits] == ["merged of step 4"]
    for text in (first.stdout, first.stderr, second.stdout, second.stderr, *map(str, before.values())):
        assert TOKEN not in text
    for file in (*run.rglob("*"), *out.rglob("*")):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()

    third = command(*arguments)
    assert third.returncode == 0, third.stderr
    assert len(hub.repos[NAME].commits) == 1

    program = f"from huggingface_hub import snapshot_download; print(snapshot_download({NAME!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=child_environment(**environment(hub, tmp_path)),
    )  # fmt: skip
    downloaded = contents(tmp_path / done.stdout.strip())
    assert {name: body for name, body in downloaded.items() if name != ".gitattributes"} == before


def test_an_update_says_what_it_replaces(run, hub, command, tmp_path):
    done = command("export", run, tmp_path / "merged", "--format", "merged", "--push", NAME, "--public")
    assert done.returncode == 0, done.stderr
    assert f"{NAME}: created, public" in done.stdout
    assert not hub.repos[NAME].private
    repo = hub.repos[NAME]
    repo.branches["main"]["notes.txt"] = b"of a person"
    before = repo.sha("main")
    done = command("export", run, tmp_path / "adapter", "--push", NAME)
    assert done.returncode == 0, done.stderr
    assert "which others do not have; use --format merged, or set base_model_name_or_path" in done.stdout
    assert f"{NAME}: exists and is public" in done.stdout
    assert "deletes config.json, model.safetensors; as it is now, it stays at revision " + before in done.stdout
    files = repo.branches["main"]
    assert {"adapter_model.safetensors", "adapter_config.json", "notes.txt"} <= files.keys()
    assert not {"model.safetensors", "config.json"} & files.keys()
    assert "model.safetensors" in repo.revisions[before]


def test_a_branch(run, hub, command, tmp_path):
    done = command("export", run, tmp_path / "out", "--step", 2, "--push", f"{NAME}@step-2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"pushed to {hub.url}/{NAME}/tree/step-2\n")
    assert set(hub.repos[NAME].branches["main"]) == {".gitattributes"}
    assert json.loads(hub.repos[NAME].branches["step-2"]["sft_jax.json"])["step"] == 2


def test_an_export_of_something_else_is_not_pushed(run, hub, command, tmp_path):
    out = tmp_path / "out"
    assert command("export", run, out).returncode == 0
    for other in (("--step", 2), ("--format", "merged"), ("--format", "merged", "--dtype", "bfloat16")):
        done = command("export", run, out, *other, "--push", NAME)
        assert (done.returncode, "exists and is not an empty folder" in done.stderr) == (2, True)
    weights = out / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = command("export", run, out, "--push", NAME)
    assert (done.returncode, "exists and is not an empty folder" in done.stderr) == (2, True)
    assert hub.repos[NAME].commits == []


def test_the_card_is_renamed_unless_a_person_has_changed_it(run, hub, command, tmp_path):
    out = tmp_path / "out"
    assert command("export", run, out).returncode == 0
    assert '\nname = "out"\n' in (out / "README.md").read_text()
    for name in (NAME, "someone/other"):
        assert command("export", run, out, "--push", name).returncode == 0
        assert f'\nname = "{name}"\n' in hub.repos[name].branches["main"]["README.md"].decode()
    (out / "README.md").write_text("# Mine\n")
    assert command("export", run, out, "--push", NAME).returncode == 0
    assert hub.repos[NAME].branches["main"]["README.md"] == b"# Mine\n"


def test_what_is_refused_before_anything_is_exported(run, hub, command, tmp_path):
    out = tmp_path / "out"

    def refused(*arguments):
        done = command("export", run, out, *arguments)
        assert done.returncode == 2
        assert not out.exists()
        assert TOKEN not in done.stderr
        return done.stderr

    assert "--push: 'tuned' is not USER/REPO or USER/REPO@BRANCH" in refused("--push", "tuned")
    assert "--public: says how --push creates a repository" in refused("--public")
    wrong = command("export", run.parent, out, "--push", NAME)
    assert (wrong.returncode, "not a run directory" in wrong.stderr) == (2, True)
    assert not hub.repos
    hub.read_only = True
    assert "You don't have the rights to create a model" in refused("--push", NAME)
    hub.token = "another"
    assert "the token needs write access" in refused("--push", NAME)
    hub.token = TOKEN
    done = command("export", run, "gs://bucket/out", "--push", NAME)
    assert "gs://bucket/out is in a bucket; use another OUT" in done.stderr


def test_no_token_and_no_network(run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    def refused():
        done = sft_jax("export", run, tmp_path / "out", "--push", NAME)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        return done.stderr

    assert "switched off by HF_HUB_OFFLINE" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "no token; run `hf auth login`, or set HF_TOKEN, and run the same command again" in refused()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "Connection refused" in refused()


def test_a_base_of_the_hub(tiny, chats, hub, command, tmp_path):
    """Its id and the license in its card are in the metadata, and PEFT finds it by its id."""
    files = {one.name: one.read_bytes() for one in tiny.iterdir()} | {"README.md": b"---\nlicense: mit\n---\n"}
    hub.repos["org/base"] = Repo(private=False, branches={"main": files})
    config = run_config("org/base", chats, tmp_path / "run", training__max_steps=1)
    (tmp_path / "config.yaml").write_text(configs.to_yaml(config))
    assert command("train", tmp_path / "config.yaml").returncode == 0
    done = command("export", tmp_path / "run", tmp_path / "out", "--push", NAME)
    assert done.returncode == 0, done.stderr
    assert "which others do not have" not in done.stdout
    pushed = hub.repos[NAME].branches["main"]
    (tmp_path / "README.md").write_bytes(pushed["README.md"])
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/base", "adapter", "mit")
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "org/base"
