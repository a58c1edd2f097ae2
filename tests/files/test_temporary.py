"""Temporary folders of killed processes are removed; processes end with the one that started them."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from kit import child_environment, write_chats

from sft_jax.files.lock import FolderLock
from sft_jax.files.temporary import temporary_folder

_HOLD = """
import sys, time
from pathlib import Path
from sft_jax.files.temporary import temporary_folder
folder, lock = temporary_folder(Path(sys.argv[1]), "work-")
(folder / "rows").write_text("a")
print(folder, flush=True)
time.sleep(100)
"""
_TABLES = """
import sys, time
from pathlib import Path
from sft_jax.data.read.tables import open_file
table = open_file(Path(sys.argv[1]), "a")
print(len(list(table.read(0, 1))), flush=True)
time.sleep(100)
"""


def started(program, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
        start_new_session=True,
    )
    return process, process.stdout.readline().strip()


def kill(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_folders_of_the_dead_are_removed(tmp_path):
    process, name = started(_HOLD, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "work-without-lock").mkdir()
    first, lock = temporary_folder(tmp_path, "work-")
    assert {one.name for one in tmp_path.iterdir()} >= {"other", "work-without-lock", first.name}
    assert os.path.exists(os.path.join(name, "rows"))
    kill(process)
    os.utime(tmp_path / "work-without-lock", (1, 1))
    second, other = temporary_folder(tmp_path, "work-")
    assert {one.name for one in tmp_path.iterdir()} == {"other", first.name, second.name}
    lock.release()
    other.release()


def test_another_process_removes_the_new_folder(tmp_path, monkeypatch):
    """A process that looks for dead folders can find one between its creation and its lock."""
    create, created, others = tempfile.mkdtemp, [], []

    def interrupted(**arguments):
        folder = Path(create(**arguments))
        created.append(folder)
        if len(created) == 1:
            shutil.rmtree(folder)
        elif len(created) == 2:
            others.append(FolderLock(folder))
            assert others[0].take() is None
        return str(folder)

    monkeypatch.setattr(tempfile, "mkdtemp", interrupted)
    folder, lock = temporary_folder(tmp_path, "work-")
    assert folder == created[2]
    assert FolderLock(folder).holder() is not None
    lock.release()
    others[0].release()


def members(group):
    """The processes of a group that run; those that ended and were not waited for do not."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, _, of_group = file.read().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of_group) == group and state not in "ZX":
            found.append(int(pid))
    return found


def gone(group):
    deadline = time.monotonic() + 20
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not members(group)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_the_reader_ends_with_its_parent(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    process, line = started(_TABLES, tmp_path / "a.parquet")
    assert line == "1"
    assert len(members(process.pid)) == 2
    kill(process)
    assert gone(process.pid)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_busy_process_ends_with_its_parent():
    """Also one that neither reads nor writes, such as one that tokenizes a large batch."""
    busy = "import sft_jax.files.orphans as o; o.end_with_parent(); print('on', flush=True)\nwhile True: pass"
    program = (
        "import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "print(p.stdout.readline().decode(), flush=True)\np.wait()"
    )
    process, line = started(program, busy)
    assert line == "on"
    assert len(members(process.pid)) == 2
    kill(process)
    assert gone(process.pid)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_workers_end_with_a_killed_run(tiny, tmp_path):
    """Two processes tokenize; their run is killed while they do."""
    from kit import run_config

    from sft_jax import config_file

    write_chats(tmp_path / "a.jsonl", 60_000)
    config = run_config(tiny, tmp_path / "a.jsonl", tmp_path / "run", data__num_workers=2, data__cache=False)
    config_file.save(config, tmp_path / "a.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_jax", "inspect", str(tmp_path / "a.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=child_environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    while len(members(process.pid)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(members(process.pid)) == 3
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert gone(process.pid)
