"""Several processes as one run: they find each other, agree, and end together.

Everything goes through the coordination service of jax's distributed runtime, which process 0 holds. What one process
says there (that it lives, that it failed and why) a thread in each other process reads, so that none waits in a
collective operation for one that will not come.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the service's client has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.errors import AGAIN, Preempted, Unreachable, UserError, exit_code, one_line

_PREFIX = "sft_jax"
_POLL_SECONDS = 1.0
_BROKEN = ("gloo", "nccl", "connection", "unavailable", "socket", "aborted", "coordination")  # words of a lost peer
_LAST_WORDS_SECONDS = 10.0  # that process 0, which holds the service, waits for the others to read why it ends
SILENCE_SECONDS = 60.0  # after which a process that says nothing is taken to be gone
WAIT_SECONDS = 600.0  # for the others, where they differ in how long they take
# Where they download, read or tokenise: one host may have it all already. Who dies meanwhile is found out anyway.
LONG_WAIT_SECONDS = 24 * 3600.0

passing: set[Path] = set()  # folders that are removed even if this process has to end at once
_calls: Counter[str] = Counter()  # how often each meeting took place; the same everywhere


@contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    silence: float = SILENCE_SECONDS,
) -> Iterator[None]:
    """Be one of the processes of a run while the block runs.

    Without arguments the others are found by what Cloud TPU, SLURM and Open MPI 4 tell; with nothing of these,
    or ``num_processes`` is 1, this process is alone. A process that fails ends all, its own error first; so does one
    that is not heard of for ``silence`` seconds.

    Raises:
        UserError: arguments that do not fit together.
        Unreachable: others did not come.
    """
    if not _connect(coordinator, num_processes, process_id, silence):
        yield
        return
    watch = _Watch(silence)
    watch.start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Preempted):  # all of them leave, in order
            watch.fail(error)
        raise
    finally:
        watch.stop()
        jax.distributed.shutdown()


def gather(meeting: str, value: str = "", wait: float | None = None) -> list[str]:
    """What each process says, in their order; all have come when this returns.

    Args:
        meeting: its name, for people too. All processes hold the same meetings in the same order.
        wait: seconds; by default :data:`WAIT_SECONDS`.

    Raises:
        Unreachable: a process did not come; named.
    """
    if count() == 1:
        return [value]
    client, wait = _client(), WAIT_SECONDS if wait is None else wait
    _calls[meeting] += 1
    place = f"{_PREFIX}/meeting/{meeting} {_calls[meeting]}"
    client.key_value_set(f"{place}/{index()}", value or "-")
    until = time.monotonic() + wait
    said, missing = [], []
    for i in range(count()):
        try:
            left = max(0.001, until - time.monotonic())
            said.append(client.blocking_key_value_get(f"{place}/{i}", int(left * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            missing.append(i)
    if missing:
        raise Unreachable(f"{_names(missing)} did not come to {meeting!r} within {wait:.0f} s")
    return ["" if one == "-" else one for one in said]


def count() -> int:
    """How many processes this run has; unlike jax's, this asks for no devices."""
    return distributed.global_state.num_processes or 1


def index() -> int:
    """Which of them this one is, counted as the devices' runtime counts them."""
    return jax.process_index() if count() > 1 else 0


def exchange(data: bytes) -> list[bytes]:
    """What each process gives, in their order, over the devices' network; all have to give something."""
    if count() == 1:
        return [data]
    sizes = _rows_of_all(np.asarray([len(data)], np.int32))[:, 0]
    if not sizes.max():
        return [b""] * len(sizes)
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few sizes, so that few programs are compiled
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return [row[:size].tobytes() for row, size in zip(_rows_of_all(padded), sizes, strict=True)]


def _rows_of_all(row: np.ndarray) -> np.ndarray:
    """A row ``[N]`` of each process, as ``[processes, N]``; they may differ in how many devices they have."""
    devices = jax.devices()
    mesh = Mesh(np.asarray(devices), ("all",))
    shape, split = (len(devices), *row.shape), NamedSharding(mesh, PartitionSpec("all"))
    mine = jax.make_array_from_callback(shape, split, lambda _: row[None])
    whole = jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(mine)
    of = [device.process_index for device in devices]
    return np.asarray(whole.addressable_data(0))[[of.index(i) for i in range(count())]]


def _same(x: jax.Array) -> jax.Array:
    return x


def of_first(meeting: str, value: str, wait: float | None = None) -> str:
    """What process 0 says; the others' ``value`` is not looked at."""
    return gather(meeting, value, wait)[0]


def fetch(tree: Any) -> Any:
    """Arrays as numpy arrays, whole, in every process; all processes have to ask for them."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return jax.device_get(x)

    return jax.tree.map(one, tree)


def _connect(coordinator: str | None, num_processes: int | None, process_id: int | None, silence: float) -> bool:
    """Join the others; False where there are none."""
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if num_processes == 1 and coordinator is None:
        return False
    if len(missing) == 3:
        if not _is_cluster():
            return False
    elif missing:
        raise UserError(
            f"{missing[0]}: is missing; several processes need {', '.join(given)}, each the same but the id"
        )
    else:
        assert coordinator is not None
        assert num_processes is not None
        assert process_id is not None
        host, colon, port = coordinator.rpartition(":")
        if not (colon and host and port.isdigit()):
            raise UserError(f"--coordinator: {coordinator!r} is not HOST:PORT, such as 10.0.0.2:1234")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process-id: {process_id} is not between 0 and {num_processes - 1}")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=_local_devices(),
            cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=int(silence) + 30,  # the second line: it ends processes without a word of ours
        )
    except (RuntimeError, ValueError) as error:
        raise Unreachable(
            f"the processes of this run did not find each other: {str(error).splitlines()[0]}; name them with "
            "--coordinator, --num-processes and --process-id, or use --num-processes 1"
        ) from error
    return count() > 1


def _is_cluster() -> bool:
    """Whether a launcher that jax knows has started several processes, or this is a Cloud TPU VM.

    Raises:
        UserError: one that it does not know has; each would take itself for the only one.
    """
    for tasks, others in (
        ("SLURM_NTASKS", ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")),
        ("OMPI_COMM_WORLD_SIZE", ("OMPI_MCA_orte_hnp_uri",)),
    ):
        if int(os.environ.get(tasks, "1")) > 1 and all(name in os.environ for name in others):
            return True
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise UserError(
            "mpirun has started several processes, but jax finds the first only by what Open MPI 4 tells; give "
            "--coordinator, --num-processes and --process-id (or --num-processes 1 for runs of their own)"
        )
    if importlib.util.find_spec("libtpu") is None or os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _local_devices() -> list[int] | None:
    """Which GPUs are this process's; None leaves it to jax, which gives a process of SLURM the one of its number.

    One process on a node drives all that the node has for it.
    """
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    return list(range(int(gpus))) if gpus.isdigit() and alone else None


def _client() -> Any:
    return distributed.global_state.client


class _Watch:
    """Says that this process lives, and ends it when another failed or fell silent."""

    def __init__(self, silence: float):
        self._silence = silence
        self._client, self._me, self._count = _client(), index(), count()
        self._stopped = threading.Event()
        self._ending = threading.Lock()  # one says why
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The run is over: wait for the others, and no longer mind their silence."""
        if not self._stopped.is_set():
            gather("the end")
            self._stopped.set()
            self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Say why this process ends, here and to the others, and end it."""
        if isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error).lower() for word in _BROKEN):
            # What broke may be the connection to one that failed: then the thread finds out, and ends this process.
            time.sleep(self._silence + 3 * _POLL_SECONDS)
        with self._ending:
            code, text = exit_code(error), f"{type(error).__name__}: {error}"
            if isinstance(error, (UserError, Unreachable)):
                text = str(error)
                print(f"sft-jax: process {self._me}: {error}", file=sys.stderr)
            else:
                traceback.print_exception(error)
            said = json.dumps({"code": code, "error": one_line(text)[:2000]})
            with suppress(jax.errors.JaxRuntimeError):  # the service may be gone; the others know by its silence
                self._client.key_value_set(f"{_PREFIX}/failed/{self._me}", said)
                self._outlast()
            _leave(code)

    def _run(self) -> None:
        beat = 0
        heard = {i: (time.monotonic(), "") for i in range(self._count) if i != self._me}
        while not self._stopped.wait(max(_POLL_SECONDS, self._count / 64)):
            beat += 1
            try:
                self._client.key_value_set(f"{_PREFIX}/alive/{self._me}", str(beat), allow_overwrite=True)
                alive, failed = self._read("alive"), self._read("failed")
            except jax.errors.JaxRuntimeError as error:
                self._end(f"process 0, which holds the run together, is gone ({str(error).splitlines()[0]})", AGAIN)
            if failed:
                first = min(failed)
                found = json.loads(failed[first])
                self._end(f"process {first} failed: {found['error']}", found["code"])
            now = time.monotonic()
            for i, (_, last) in list(heard.items()):
                if alive.get(i, "") != last:
                    heard[i] = (now, alive[i])
            silent = [i for i, (since, _) in heard.items() if now - since > self._silence]
            if silent:
                self._end(f"nothing was heard of {_names(silent)} for {self._silence:.0f} s", AGAIN, silent)

    def _read(self, what: str) -> dict[int, str]:
        folder = f"{_PREFIX}/{what}/"
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(folder)}

    def _end(self, why: str, code: int, gone: Sequence[int] = ()) -> NoReturn:
        with self._ending:
            if self._stopped.is_set():
                sys.exit()  # of this thread
            print(f"sft-jax: process {self._me}: {why}", file=sys.stderr, flush=True)
            with suppress(jax.errors.JaxRuntimeError):  # the service may be gone; then nobody waits for this
                self._client.key_value_set(f"{_PREFIX}/ended/{self._me}", "1", allow_overwrite=True)
                self._outlast(gone)
            _leave(code)

    def _outlast(self, gone: Sequence[int] = ()) -> None:
        """Process 0 holds the service: it waits until the others, but those that are gone, know why the run ends."""
        until = time.monotonic() + _LAST_WORDS_SECONDS
        while self._me == 0 and time.monotonic() < until:
            if len({0, *gone} | self._read("ended").keys() | self._read("failed").keys()) == self._count:
                return
            time.sleep(_POLL_SECONDS / 4)


def _leave(code: int) -> NoReturn:
    """End at once: an orderly end would wait for those that are waiting for this process."""
    for folder in passing:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _names(processes: list[int]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"
