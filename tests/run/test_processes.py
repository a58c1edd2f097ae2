"""Several processes as one run, really started: the same losses, the same data, and they end together."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from kit import ROOT, Group, child_environment, conversations, losses, make_tokenizer, run_config, sft_jax, write_jsonl
from safetensors.numpy import load_file

from sft_jax.config import SourceConfig
from sft_jax.config_file import to_dict
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.tokenise import tokenise
from sft_jax.distributed import processes
from sft_jax.distributed.preemption import watch_notices
from sft_jax.errors import UserError
from sft_jax.hf.reader import TensorReader
from sft_jax.store.checkpoint import Checkpoints

STEPS = 24


@pytest.fixture(scope="module")
def config(tiny, chats, tmp_path_factory) -> Path:
    """A run with everything that could differ between processes: shuffling, packing, dropout, evaluation, samples."""
    folder = tmp_path_factory.mktemp("processes")
    given = to_dict(
        run_config(
            tiny,
            chats,
            "unset",
            training__max_steps=STEPS,
            training__save_every=8,
            training__eval_every=12,
            lora__dropout=0.1,
        )
    )
    given["data"]["eval"] = [{"path": str(chats), "max_rows": 10}]
    given["evaluation"] |= {"samples": ["river bread"], "samples_every": 12, "max_new_tokens": 8, "num_questions": 3}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = sft_jax("train", config, f"training.output_dir={out}")
    assert done.returncode == 0, done.stderr
    return out


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The same batches, held-out losses and samples, and losses within a relative tolerance."""
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)]
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a.keys() == b.keys()
        for key in ("target_tokens", "real_tokens", "samples"):
            assert a.get(key) == b.get(key)
        for key in a.keys() & {"loss", "grad_norm", "eval_loss"}:
            np.testing.assert_allclose(a[key], b[key], rtol=tolerance)


@pytest.mark.long
def test_resumed_by_other_numbers_of_processes(config, alone, tmp_path):
    """Two save after a SIGTERM to one; four, on another mesh, after a SIGTERM to another; one finishes."""
    run = tmp_path / "run"
    arguments = ("train", config, f"training.output_dir={run}")
    for count, whom, step, mesh in ((2, 1, 3, []), (4, 0, 10, ["mesh.data=2", "mesh.fsdp=1", "mesh.tensor=2"])):
        group = Group(count, *arguments, *mesh)
        group.wait_for(run, step)
        group.processes[whom].send_signal(signal.SIGTERM)
        assert group.wait() == [75] * count, group.said
        assert all(re.search(r"asked to stop; step \d+ is saved", said) for said in group.said)
        assert "devices" in group.said[0]  # one process speaks for all
        assert not any("devices" in said for said in group.said[1:])
    done = sft_jax(*arguments)
    assert done.returncode == 0, done.stderr
    assert_same_run(alone, run)


# What commands share is that they are started together: one start and one meeting for all of them.
_COMMANDS = """
import json, sys
from contextlib import nullcontext
from sft_jax import cli
from sft_jax.distributed import processes
found = sys.argv[-6:]
with processes.joined(found[1], int(found[3]), int(found[5])):
    processes.joined = lambda *_: nullcontext()
    for command in json.loads(sys.argv[1]):
        if code := cli.main([*command, *found]):
            sys.exit(code)
"""


@pytest.mark.long
def test_two_processes_from_the_start_to_the_export(config, tmp_path):
    """The evaluation at the end, the report and both exports, as one process has them."""
    found = {}
    for count in (1, 2):
        run = tmp_path / f"run{count}"
        keys = ["training.max_steps=3", "evaluation.at_end=true", "training.eval_every=100", "lora.dropout=0"]
        keys += ["optimizer.eps=1.0", "optimizer.learning_rate=0.1"]  # else small gradients' rounding counts
        commands = [("train", config, f"training.output_dir={run}", *keys)]
        commands += [("export", run, tmp_path / f"{form}{count}", "--format", form) for form in ("adapter", "merged")]
        if count == 1:
            for command in commands:
                done = sft_jax(*command)
                assert done.returncode == 0, done.stderr
        else:
            group = Group(count, json.dumps(commands, default=str), python=_COMMANDS)
            assert group.wait() == [0] * count, group.said
        found[count] = json.loads((run / "report" / "summary.json").read_text())
    for name, metrics in found[1].items():
        for key, value in metrics.items():
            np.testing.assert_allclose(found[2][name][key], value, rtol=1e-4, atol=1e-7, err_msg=key)
    adapters = [load_file(tmp_path / f"adapter{count}" / "adapter_model.safetensors") for count in (1, 2)]
    merged = [TensorReader(tmp_path / f"merged{count}") for count in (1, 2)]
    assert len(list((tmp_path / "merged2").glob("*.safetensors"))) >= 2  # files for each process
    for name, tensor in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], tensor, atol=1e-6)
        assert "lora_B" not in name or np.abs(tensor).max() > 1e-4  # from zero, a hundred times what may differ
    for name in merged[0].names:
        np.testing.assert_allclose(merged[1].read(name), merged[0].read(name), atol=1e-6)
    assert {file.name for file in (tmp_path / "merged1").iterdir()} - {"model.safetensors"} <= {
        file.name for file in (tmp_path / "merged2").iterdir()
    }


def test_one_process_stops_and_goes_on(config, alone, tmp_path):
    """SIGTERM to a run of one process; what follows is the same to the bit."""
    run = tmp_path / "run"
    environment = child_environment(PYTHONUNBUFFERED="1")
    command = [sys.executable, "-m", "sft_jax", "train", str(config), f"training.output_dir={run}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + 240
    while time.monotonic() < until and len(losses(run) if (run / "metrics.jsonl").is_file() else []) < 11:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert sft_jax("train", config, f"training.output_dir={run}").returncode == 0
    assert_same_run(alone, run, tolerance=0)


@pytest.mark.parametrize("whom", [0, 1])
def test_a_killed_process_ends_all(config, tmp_path, whom):
    """The others end by themselves and say which one is gone."""
    run = tmp_path / "run"
    group = Group(2, "train", config, f"training.output_dir={run}", "training.max_steps=100000", "--timeout", 4)
    group.wait_for(run, 2)
    group.processes[whom].kill()
    began = time.monotonic()
    codes = group.wait(90)
    assert codes[whom] == -signal.SIGKILL
    assert codes[1 - whom] != 0
    assert time.monotonic() - began < 60
    if whom == 1:
        assert codes[0] == 75
        assert "process 0: nothing was heard of process 1 for 4 s" in group.said[0], group.said[0]
    else:
        assert "process 0, which holds the run together, is gone" in group.said[1] or "leader task" in group.said[1]


def test_an_error_of_one_process_ends_all(config, tmp_path):
    """The other prints the reason too, and ends with the same code."""
    python = (
        "import sys, jax; from sft_jax import cli; from sft_jax.run import start\n"
        "from sft_jax.errors import UserError\n"
        "def bad(*_):\n"
        "    if jax.process_index() == 1: raise UserError('data.train: no such file on this host')\n"
        "start.check_backend = bad\n"
        "sys.exit(cli.main())"
    )
    group = Group(2, "train", config, f"training.output_dir={tmp_path / 'run'}", python=python)
    assert group.wait(120) == [2, 2], group.said
    assert "process 1: data.train: no such file on this host" in group.said[1]
    assert "process 0: process 1 failed: data.train: no such file on this host" in group.said[0]
    assert not (tmp_path / "run").exists()


_TOKENISE = """
import json, sys
from pathlib import Path
from sft_jax.distributed import processes
from sft_jax.config import SourceConfig
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.sources import Source, open_sources
from sft_jax.data.tokens.tokenise import tokenise
from kit import make_tokenizer
read, original = [], Source.read
def counting(self, start, stop, *rest):
    for row in original(self, start, stop, *rest):
        read.append(row)
        yield row
Source.read = counting
with processes.joined(sys.argv[-5], int(sys.argv[-3]), int(sys.argv[-1])):
    me = processes.index()
    path = Path(sys.argv[1].replace("PROCESS", str(me)))
    (source,), done = open_sources([SourceConfig(path=str(path))]), []
    for _ in range(2):
        found, origin = tokenise(source, Encoder(make_tokenizer()), 1, True, progress=done.append)
        said = [len(read), sum(done), found.digest, found.num_rows, found.num_refused, origin.cached]
        print(*processes.gather("found", json.dumps(said)), sep=";", file=sys.stderr)
"""


def test_each_process_tokenises_its_share(tmp_path, monkeypatch):
    """All have what one alone would have, and nobody reads twice what is kept."""
    rows = conversations(250)
    rows[7]["messages"][-1]["weight"], rows[9]["messages"][-1]["weight"] = 0.75, 0.25
    rows[240]["messages"] = []
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    (source,) = open_sources([SourceConfig(path=str(path))])
    alone, _ = tokenise(source, Encoder(make_tokenizer()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    monkeypatch.setenv("SFT_JAX_CACHE", str(tmp_path / "cache"))
    group = Group(3, path, python=_TOKENISE)
    assert group.wait(120) == [0] * 3, group.said
    first, second = ([json.loads(one) for one in line.split(";")] for line in group.said[0].splitlines()[-2:])
    for said, share in zip(first, (83, 83, 84), strict=True):
        assert said == [share, 250, alone.digest, 250, 1, False]
    assert second == [[share, 500, alone.digest, 250, 1, True] for share in (83, 83, 84)]


@pytest.mark.long
def test_a_stream_of_two_processes_goes_on_in_one(config, tmp_path):
    """The batches and losses of one process, whose position each of the two had a half of."""
    keys = ["data.streaming=true", "training.max_steps=8", "training.save_every=4", "training.eval_every=100"]
    alone, run = tmp_path / "alone", tmp_path / "run"
    done = sft_jax("train", config, *keys, f"training.output_dir={alone}")
    assert done.returncode == 0, done.stderr
    group = Group(2, "train", config, *keys, f"training.output_dir={run}")
    assert group.wait() == [0, 0], group.said
    assert_same_run(alone, run)
    shutil.rmtree(run / "checkpoints" / "8")
    done = sft_jax("train", config, *keys, f"training.output_dir={run}")
    assert done.returncode == 0, done.stderr
    assert_same_run(alone, run)


def test_exchange_between_processes_with_other_numbers_of_devices():
    python = (
        "import os, sys; me = int(sys.argv[-1])\n"
        "os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={me + 1}'\n"
        "from sft_jax.distributed import processes\n"
        "with processes.joined(sys.argv[2], 3, me):\n"
        "    for data in (bytes(range(5 * me)), b''):\n"
        "        print([list(one) for one in processes.exchange(data)], file=sys.stderr)\n"
    )
    group = Group(3, python=python)
    assert group.wait(90) == [0] * 3, group.said
    expected = f"{[[], list(range(5)), list(range(10))]}\n{[[], [], []]}\n"
    assert all(said.endswith(expected) for said in group.said), group.said


def test_rows_that_differ_between_hosts(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    for i in range(2):
        write_jsonl(tmp_path / f"{i}.jsonl", conversations(20, seed=i))
    group = Group(2, tmp_path / "PROCESS.jsonl", python=_TOKENISE)
    assert group.wait(60) == [2, 2]
    assert "jsonl: process 1 does not have the rows, tokenizer and package versions of process 0" in group.said[0]


def test_process_0_says_what_a_run_that_goes_on_lacks(tmp_path):
    """Where hosts hold copies of the run folder, those of the others may have rows that its own no longer has."""
    for i, row in enumerate(({"step": 8, "loss": 1.0}, {"step": 8, "samples": []})):
        (tmp_path / str(i)).mkdir()
        write_jsonl(tmp_path / str(i) / "metrics.jsonl", [row])
    python = (
        "import sys; from pathlib import Path\n"
        "from sft_jax.distributed import processes; from sft_jax.run.resume import is_due\n"
        "with processes.joined(sys.argv[3], 2, int(sys.argv[7])):\n"
        "    run = Path(sys.argv[1].replace('PROCESS', sys.argv[7]))\n"
        "    print(is_due(run, 8, 4, 'samples'), is_due(run, 8, 3, 'samples'), is_due(run, None, 3, 'samples'),"
        " is_due(run, 8, 4, 'loss'), file=sys.stderr)\n"
    )
    group = Group(2, tmp_path / "PROCESS", python=python)
    assert group.wait(60) == [0, 0], group.said
    assert all(said.endswith("True False True False\n") for said in group.said), group.said


def test_one_that_does_not_come_is_named():
    """A meeting that one process misses."""
    python = (
        "import sys, threading, jax; from sft_jax.distributed import processes\n"
        "with processes.joined(sys.argv[2], int(sys.argv[4]), int(sys.argv[6])):\n"
        "    processes.gather('the first', str(jax.process_index()))\n"
        "    if jax.process_index() == 2: threading.Event().wait()\n"
        "    processes.gather('the second', wait=2)\n"
    )
    group = Group(3, python=python)
    assert set(group.wait(60)) == {75}, group.said
    assert any("process 2 did not come to 'the second' within 2 s" in said for said in group.said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-processes", "2"], "--coordinator: is missing"),
        (
            ["--coordinator", "here", "--num-processes", "2", "--process-id", "0"],
            "--coordinator: 'here' is not HOST:PORT",
        ),
        (
            ["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id: 2 is not between 0 and 1",
        ),
    ],
)
def test_bad_arguments(config, arguments, said):
    done = sft_jax("train", config, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_launcher_that_jax_does_not_know(monkeypatch):
    """Open MPI 5's mpirun: each of its processes would take itself for the only one."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="give --coordinator, --num-processes and --process-id"), processes.joined():
        pass
    with processes.joined(num_processes=1):
        assert processes.count() == 1


def test_kept_checkpoints(config, tmp_path):
    """The last, the best by held-out loss, and every twelfth."""
    run = tmp_path / "run"
    keys = ["save_every=4", "eval_every=4", "keep_checkpoints=1", "keep_best=1", "keep_every=12", f"output_dir={run}"]
    done = sft_jax("train", config, *(f"training.{key}" for key in keys), "optimizer.learning_rate=0.2")
    assert done.returncode == 0, done.stderr
    found = {row["step"]: row["eval_loss"] for row in rows(run) if "eval_loss" in row and row["step"] > 0}
    best = min(found, key=lambda step: found[step])
    checkpoints = Checkpoints(run / "checkpoints")
    assert set(checkpoints.steps()) == {best, 12, 24}
    checkpoints.close()


def test_notices_of_the_metadata_server():
    """Nothing happens until a maintenance is announced; then this process gets SIGTERM."""
    says = {"maintenance-event": "NONE", "preempted": "FALSE"}
    questions, asked_often = itertools.count(1), threading.Event()

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            if next(questions) > 8:
                asked_often.set()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(says[self.path.rpartition("/")[2]].encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked, over = threading.Event(), threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        watch = threading.Thread(target=watch_notices, args=(f"127.0.0.1:{server.server_port}", over, 0.05))
        watch.start()
        assert asked_often.wait(10)
        assert not asked.is_set()
        says["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        assert asked.wait(10)
        watch.join(10)
        assert not watch.is_alive()
    finally:
        over.set()
        signal.signal(signal.SIGTERM, previous)
        server.shutdown()
        server.server_close()
