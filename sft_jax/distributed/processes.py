"""Connects several processes into one run: they exchange values and end together.

All communication uses the coordination service of jax's distributed runtime, which runs in process 0. A thread in each
process writes a heartbeat there and reads those of the others, and their errors, so that no process waits in a
collective operation for a process that has failed.
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
from jax._src import distributed  # the client of the coordination service has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax import progress
from sft_jax.errors import RETRY, Preempted, Unreachable, UserError, exit_code, one_line
from sft_jax.without_tpus import has_tpu

_PREFIX = "sft_jax"
_POLL_SECONDS = 1.0
_LOST_PEER_WORDS = ("gloo", "nccl", "connection", "unavailable", "socket", "aborted", "coordination")
_LAST_READ_SECONDS = 10.0  # process 0, which runs the service, waits this long for the others to read its error
SILENCE_SECONDS = 60.0  # a process without a heartbeat for this long counts as lost
WAIT_SECONDS = 600.0  # how long a process waits for the others, which may be slower
# While hosts download, read or tokenize, because one host may have a cache; lost processes are detected anyway.
LONG_WAIT_SECONDS = 24 * 3600.0

temporary_folders: set[Path] = set()  # folders to remove even if this process must exit at once
_calls: Counter[str] = Counter()  # number of calls of gather by name; the same in all processes


@contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    silence: float = SILENCE_SECONDS,
) -> Iterator[None]:
    """Connect this process to the other processes of a run while the block runs.

    Without arguments, the environment of Cloud TPU, SLURM or Open MPI 4 defines the processes. Without such an
    environment, or if ``num_processes`` is 1, this process runs alone. If a process fails, or sends no heartbeat for
    ``silence`` seconds, all processes end and print the reason.

    Raises:
        UserError: inconsistent arguments.
        Unreachable: other processes could not be reached.
    """
    if not _connect(coordinator, num_processes, process_id, silence):
        yield
        return
    watch = _Watch(silence)
    watch.start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Preempted):  # preempted processes all end in order
            watch.fail(error)
        raise
    finally:
        watch.stop()
        jax.distributed.shutdown()


def gather(name: str, value: str = "", wait: float | None = None) -> list[str]:
    """Gather a value from each process, in process order. Also a barrier: returns when all processes have called it.

    Args:
        name: name of the call, shown in error messages. All processes must make the same calls in the same order.
        wait: seconds to wait for the others; by default :data:`WAIT_SECONDS`.

    Raises:
        Unreachable: a process did not call this in time; the message names it.
    """
    if count() == 1:
        return [value]
    client, wait = _client(), WAIT_SECONDS if wait is None else wait
    _calls[name] += 1
    key = f"{_PREFIX}/gather/{name} {_calls[name]}"
    client.key_value_set(f"{key}/{index()}", value or "-")
    deadline = time.monotonic() + wait
    values, missing = [], []
    for i in range(count()):
        try:
            left = max(0.001, deadline - time.monotonic())
            values.append(client.blocking_key_value_get(f"{key}/{i}", int(left * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            missing.append(i)
    if missing:
        raise Unreachable(f"{_names(missing)} did not reach {name!r} within {wait:.0f} s")
    return ["" if value == "-" else value for value in values]


def count() -> int:
    """The number of processes; unlike ``jax.process_count``, this does not initialize devices."""
    return distributed.global_state.num_processes or 1


def index() -> int:
    """The index of this process, as in ``jax.process_index``."""
    return jax.process_index() if count() > 1 else 0


def exchange(data: bytes) -> list[bytes]:
    """All-gather ``data`` over the network of the devices, in process order. All processes must call this."""
    if count() == 1:
        return [data]
    sizes = _all_gather(np.asarray([len(data)], np.int32))[:, 0]
    if not sizes.max():
        return [b""] * len(sizes)
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few sizes, so that few programs are compiled
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return [row[:size].tobytes() for row, size in zip(_all_gather(padded), sizes, strict=True)]


def _all_gather(row: np.ndarray) -> np.ndarray:
    """All-gather a row ``[N]`` of each process to ``[processes, N]``; processes may differ in their device counts."""
    devices = jax.devices()
    mesh = Mesh(np.asarray(devices), ("all",))
    shape, sharding = (len(devices), *row.shape), NamedSharding(mesh, PartitionSpec("all"))
    sharded = jax.make_array_from_callback(shape, sharding, lambda _: row[None])
    replicated = jax.jit(_identity, out_shardings=NamedSharding(mesh, PartitionSpec()))(sharded)
    owners = [device.process_index for device in devices]
    return np.asarray(replicated.addressable_data(0))[[owners.index(i) for i in range(count())]]


def _identity(x: jax.Array) -> jax.Array:
    return x


def broadcast(name: str, value: str, wait: float | None = None) -> str:
    """Return the ``value`` of process 0 in all processes; see :func:`gather`."""
    return gather(name, value, wait)[0]


def fetch(tree: Any) -> Any:
    """Replicate arrays to every process as numpy arrays. All processes must call this."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return jax.device_get(x)

    return jax.tree.map(one, tree)


def _connect(coordinator: str | None, num_processes: int | None, process_id: int | None, silence: float) -> bool:
    """Connect to the other processes; returns False if there are none."""
    options = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in options.items() if value is None]
    if num_processes == 1 and coordinator is None:
        return False
    if len(missing) == 3:
        if not _is_cluster():
            return False
    elif missing:
        raise UserError(
            f"{missing[0]}: is missing; several processes need {', '.join(options)}, with the same values except the id"
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
            heartbeat_timeout_seconds=int(silence) + 30,  # a fallback: jax ends processes without our message
        )
    except (RuntimeError, ValueError) as error:
        raise Unreachable(
            f"the processes of this run could not connect: {str(error).splitlines()[0]}; set --coordinator, "
            "--num-processes and --process-id, or use --num-processes 1"
        ) from error
    if count() > 1 and index() > 0:
        progress.silence()
    return count() > 1


def _is_cluster() -> bool:
    """Whether a launcher that jax supports has started several processes, or this is a Cloud TPU VM.

    Raises:
        UserError: an unsupported launcher has started several processes, and each of them would run alone.
    """
    for size, required in (
        ("SLURM_NTASKS", ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")),
        ("OMPI_COMM_WORLD_SIZE", ("OMPI_MCA_orte_hnp_uri",)),
    ):
        if int(os.environ.get(size, "1")) > 1 and all(name in os.environ for name in required):
            return True
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise UserError(
            "mpirun has started several processes, but jax detects only those of Open MPI 4; set --coordinator, "
            "--num-processes and --process-id (or --num-processes 1 for separate runs)"
        )
    if importlib.util.find_spec("libtpu") is None or os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return has_tpu()


def _local_devices() -> list[int] | None:
    """The GPUs of this process: all GPUs of the node if SLURM started one process per node, otherwise None.

    With None, jax assigns each SLURM process the GPU of its local rank.
    """
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    one_per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    return list(range(int(gpus))) if gpus.isdigit() and one_per_node else None


def _client() -> Any:
    return distributed.global_state.client


class _Watch:
    """A thread that sends heartbeats, and ends this process if another process failed or was lost."""

    def __init__(self, silence: float):
        self._silence = silence
        self._client, self._me, self._count = _client(), index(), count()
        self._stopped = threading.Event()
        self._ending = threading.Lock()  # only one thread reports the error
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wait for the other processes at the end of the run, and stop the thread."""
        if not self._stopped.is_set():
            gather("the end")
            self._stopped.set()
            self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Report the error of this process here and to the others, and end it."""
        if isinstance(error, jax.errors.JaxRuntimeError) and any(w in str(error).lower() for w in _LOST_PEER_WORDS):
            # If the error is a lost connection to a failed process, the thread detects that and ends this process.
            time.sleep(self._silence + 3 * _POLL_SECONDS)
        with self._ending:
            code, text = exit_code(error), f"{type(error).__name__}: {error}"
            if isinstance(error, (UserError, Unreachable, KeyboardInterrupt)):
                text = str(error) or "interrupted"
                print(f"sft-jax: process {self._me}: {text}", file=sys.stderr)
            else:
                traceback.print_exception(error)
            report = json.dumps({"code": code, "error": one_line(text)[:2000]})
            with suppress(jax.errors.JaxRuntimeError):  # the service may be gone; then the others detect that
                self._client.key_value_set(f"{_PREFIX}/failed/{self._me}", report)
                self._wait_for_readers()
            _exit_now(code)

    def _run(self) -> None:
        beat = 0
        last_beats = {i: (time.monotonic(), "") for i in range(self._count) if i != self._me}
        while not self._stopped.wait(max(_POLL_SECONDS, self._count / 64)):
            beat += 1
            try:
                self._client.key_value_set(f"{_PREFIX}/alive/{self._me}", str(beat), allow_overwrite=True)
                alive, failed = self._read("alive"), self._read("failed")
            except jax.errors.JaxRuntimeError as error:
                self._end(f"process 0, which coordinates the run, is gone ({str(error).splitlines()[0]})", RETRY)
            if failed:
                first = min(failed)
                report = json.loads(failed[first])
                self._end(f"process {first} failed: {report['error']}", report["code"])
            now = time.monotonic()
            for i, (_, last) in list(last_beats.items()):
                if alive.get(i, "") != last:
                    last_beats[i] = (now, alive[i])
            lost = [i for i, (since, _) in last_beats.items() if now - since > self._silence]
            if lost:
                self._end(f"no heartbeat from {_names(lost)} for {self._silence:.0f} s", RETRY, lost)

    def _read(self, kind: str) -> dict[int, str]:
        folder = f"{_PREFIX}/{kind}/"
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(folder)}

    def _end(self, reason: str, code: int, lost: Sequence[int] = ()) -> NoReturn:
        with self._ending:
            if self._stopped.is_set():
                sys.exit()  # ends this thread only
            print(f"sft-jax: process {self._me}: {reason}", file=sys.stderr, flush=True)
            with suppress(jax.errors.JaxRuntimeError):  # the service may be gone; then no process waits for this
                self._client.key_value_set(f"{_PREFIX}/ended/{self._me}", "1", allow_overwrite=True)
                self._wait_for_readers(lost)
            _exit_now(code)

    def _wait_for_readers(self, lost: Sequence[int] = ()) -> None:
        """Process 0 runs the service, so it waits until all other processes that are not lost have read the error."""
        deadline = time.monotonic() + _LAST_READ_SECONDS
        while self._me == 0 and time.monotonic() < deadline:
            if len({0, *lost} | self._read("ended").keys() | self._read("failed").keys()) == self._count:
                return
            time.sleep(_POLL_SECONDS / 4)


def _exit_now(code: int) -> NoReturn:
    """Exit at once: an orderly exit would wait for processes that wait for this one."""
    for folder in temporary_folders:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _names(processes: list[int]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"
