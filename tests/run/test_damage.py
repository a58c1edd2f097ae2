"""Checkpoints whose files were changed on the disk: named, set aside, never used."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kit import config_of, one_device, trained_leaves

from sft_jax import config_file as configs
from sft_jax.errors import Unreachable, UserError
from sft_jax.files.digests import array_digests
from sft_jax.run.export import export
from sft_jax.run.train import train
from sft_jax.sharding import make_mesh
from sft_jax.store.checkpoint import DamagedError, reading
from sft_jax.store.metrics import read_metrics


@pytest.fixture(scope="module")
def whole(tiny, chats, tmp_path_factory):
    """A run of six steps with checkpoints of the steps 4 and 6."""
    run = tmp_path_factory.mktemp("damage") / "run"
    train(config_of(tiny, chats, run, training__max_steps=6, training__save_every=2), one_device())
    return run


def flip(folder, part):
    """Flips a bit in the middle of the largest file with values of a part of a checkpoint."""
    about = ("commit_success.txt", "_METADATA", "_sharding")
    files = [one for one in (folder / part).rglob("*") if one.is_file() and one.name not in about]
    file = max(files, key=lambda one: one.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("part", ["params", "optimizer", "data", "run"])
def test_a_run_resumes_from_the_newest_checkpoint_that_is_whole(part, whole, tiny, chats, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flip(run / "checkpoints" / "6", part)
    train(config_of(tiny, chats, run, training__max_steps=6, training__save_every=2), one_device())
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 is damaged" in said
    assert "/damaged/6, and the run resumes at step 4" in said
    assert (run / "damaged" / "6").is_dir()
    expected, found = trained_leaves(whole), trained_leaves(run)
    assert all(np.array_equal(expected[path], found[path]) for path in expected)


def test_a_run_without_a_whole_checkpoint_begins_anew(whole, tiny, chats, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flip(run / "checkpoints" / "4", "params")
    shutil.rmtree(run / "checkpoints" / "6" / "optimizer")
    train(config_of(tiny, chats, run, training__max_steps=6, training__save_every=2), one_device())
    assert "and the run begins anew" in capsys.readouterr().err
    expected, found = trained_leaves(whole), trained_leaves(run)
    assert all(np.array_equal(expected[path], found[path]) for path in expected)


def test_an_export_needs_only_the_weights(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flip(run / "checkpoints" / "6", "optimizer")
    export(str(run), str(tmp_path / "adapter"))
    flip(run / "checkpoints" / "6", "params")
    with pytest.raises(UserError, match=r"the checkpoint of step 6 is damaged: .*; use --step 4"):
        export(str(run), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_changed_config_is_refused(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = configs.to_dict(configs.load(run / "config.yaml"))
    config["lora"]["alpha"] = 99.0
    configs.save(configs.from_dict(config), run / "config.yaml")
    with pytest.raises(UserError, match=r"config.yaml: has lora.alpha=99.0, but the run was trained with 8.0"):
        export(str(run), str(tmp_path / "adapter"))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8", "int32", "bool"])
def test_digests(dtype):
    """They do not depend on shardings, and differ for any flipped bit and for values in other places."""
    values = jax.random.normal(jax.random.key(0), (8, 12)) * 20
    array = (values > 0) if dtype == "bool" else values.astype(dtype)
    (digest,) = array_digests({"x": array}).values()
    mesh = make_mesh()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    assert array_digests({"x": jax.device_put(array, sharding)}) == {"x": digest}
    others = [jnp.roll(array, 1, axis=1)]
    for bit in range(1 if dtype == "bool" else array.dtype.itemsize * 8):
        flipped = np.array(array)
        if dtype == "bool":
            flipped[3, 5] = ~flipped[3, 5]
        else:
            flipped.view(f"uint{array.dtype.itemsize * 8}")[3, 5] ^= 1 << bit
        others.append(jnp.asarray(flipped))
    digests = {next(iter(array_digests({"x": one}).values())) for one in others}
    assert len(digests) == len(others)
    assert digest not in digests


def test_a_damaged_line_of_metrics_costs_that_line(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\x00s\n\xff\xfe\n[3]\n{"step": "4"}\n{"step": 5}\n{"step": 6')
    assert read_metrics(path) == [{"step": 1}, {"step": 5}]
    assert "damaged line(s) left out: 2, 3, 4, 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Exception("Encountered error while reading array index"), DamagedError),
        (ValueError("NOT_FOUND: no such key"), DamagedError),
        (FileNotFoundError(2, "No such file or directory"), DamagedError),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), RuntimeError),
        (MemoryError(), MemoryError),
        (OSError(24, "Too many open files"), OSError),
        (ValueError("Error opening file: Permission denied"), ValueError),
        (ValueError("UNAVAILABLE: CURL error: connection reset"), Unreachable),
    ],
    ids=str,
)
def test_only_what_is_damaged_is_set_aside(error, expected):
    """The checkpoint library raises anything for damaged files; a machine or network in trouble damages none."""
    with pytest.raises(expected) as raised, reading(3):
        raise error
    assert isinstance(raised.value, DamagedError) == (expected is DamagedError)
