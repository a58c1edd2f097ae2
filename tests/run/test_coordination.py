"""Processes exchange values, agree on decisions, and stop together; each test starts real processes."""

import itertools
import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from kit import ROOT, Group, conversations, make_tokenizer, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.tokenise import tokenise
from sft_jax.distributed import processes
from sft_jax.distributed.preemption import watch_notices
from sft_jax.errors import UserError

_TOKENIZE = """
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
        tokens, origin = tokenise(source, Encoder(make_tokenizer()), 1, True, progress=done.append)
        report = [len(read), sum(done), tokens.digest, tokens.num_rows, tokens.num_refused, origin.cached]
        print(*processes.gather("reports", json.dumps(report)), sep=";", file=sys.stderr)
"""


def test_each_process_tokenizes_part_of_the_rows(tmp_path, monkeypatch):
    """All processes get the tokens of all rows, and cached rows are not read again."""
    rows = conversations(250)
    rows[7]["messages"][-1]["weight"], rows[9]["messages"][-1]["weight"] = 0.75, 0.25
    rows[240]["messages"] = []
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    (source,) = open_sources([SourceConfig(path=str(path))])
    alone, _ = tokenise(source, Encoder(make_tokenizer()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    monkeypatch.setenv("SFT_JAX_CACHE", str(tmp_path / "cache"))
    group = Group(3, path, python=_TOKENIZE)
    assert group.wait(120) == [0] * 3, group.stderr
    first, second = ([json.loads(one) for one in line.split(";")] for line in group.stderr[0].splitlines()[-2:])
    for report, num_rows in zip(first, (83, 83, 84), strict=True):
        assert report == [num_rows, 250, alone.digest, 250, 1, False]
    assert second == [[num_rows, 500, alone.digest, 250, 1, True] for num_rows in (83, 83, 84)]


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
    assert group.wait(90) == [0] * 3, group.stderr
    expected = f"{[[], list(range(5)), list(range(10))]}\n{[[], [], []]}\n"
    assert all(stderr.endswith(expected) for stderr in group.stderr), group.stderr


def test_rows_that_differ_between_hosts(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    for i in range(2):
        write_jsonl(tmp_path / f"{i}.jsonl", conversations(20, seed=i))
    group = Group(2, tmp_path / "PROCESS.jsonl", python=_TOKENIZE)
    assert group.wait(60) == [2, 2]
    assert "jsonl: process 1 does not have the rows, tokenizer and package versions of process 0" in group.stderr[0]


def test_process_0_decides_which_metrics_are_missing(tmp_path):
    """If hosts have copies of the run directory, other copies may have rows that the one of process 0 lacks."""
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
    assert group.wait(60) == [0, 0], group.stderr
    assert all(stderr.endswith("True False True False\n") for stderr in group.stderr), group.stderr


def test_a_missing_process_is_named():
    """One process never calls the second gather."""
    python = (
        "import sys, threading, jax; from sft_jax.distributed import processes\n"
        "with processes.joined(sys.argv[2], int(sys.argv[4]), int(sys.argv[6])):\n"
        "    processes.gather('the first', str(jax.process_index()))\n"
        "    if jax.process_index() == 2: threading.Event().wait()\n"
        "    processes.gather('the second', wait=2)\n"
    )
    group = Group(3, python=python)
    assert set(group.wait(60)) == {75}, group.stderr
    assert any("process 2 did not reach 'the second' within 2 s" in stderr for stderr in group.stderr)


def test_an_unsupported_launcher(monkeypatch):
    """Each process of Open MPI 5's mpirun would run alone."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="set --coordinator, --num-processes and --process-id"), processes.joined():
        pass
    with processes.joined(num_processes=1):
        assert processes.count() == 1


def test_notices_of_the_metadata_server():
    """This process gets SIGTERM when a maintenance event is announced, and not before."""
    values = {"maintenance-event": "NONE", "preempted": "FALSE"}
    requests, polled_often = itertools.count(1), threading.Event()

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            if next(requests) > 8:
                polled_often.set()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(values[self.path.rpartition("/")[2]].encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    signaled, stop = threading.Event(), threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: signaled.set())
    try:
        watch = threading.Thread(target=watch_notices, args=(f"127.0.0.1:{server.server_port}", stop, 0.05))
        watch.start()
        assert polled_often.wait(60)
        assert not signaled.is_set()
        values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        watch.join(60)
        assert not watch.is_alive()
        # Python runs the handler in the main thread, which a signal that another thread received does not wake.
        assert any(signaled.wait(0.1) for _ in range(100))
    finally:
        stop.set()
        signal.signal(signal.SIGTERM, previous)
        server.shutdown()
        server.server_close()
