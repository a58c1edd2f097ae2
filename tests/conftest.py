"""Strict mode for every test: eight CPU devices, strict dtype promotion, exact matmuls, no network."""

import atexit
import gc
import os
import shutil
import socket
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Compile quickly instead of for speed: LLVM's optimizations took half of the time of the tests.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # later versions abort on this unknown flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["SFT_JAX_TEST_XLA_FLAGS"] = os.environ.get("XLA_FLAGS", QUICK)
os.environ["XLA_FLAGS"] = os.environ["SFT_JAX_TEST_XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" not in os.environ:  # caches for all workers and child processes, removed at the end
    caches = tempfile.mkdtemp(prefix="sft-jax-tests-")
    atexit.register(shutil.rmtree, caches)
    os.environ["SFT_JAX_CACHE"] = f"{caches}/sft-jax"
    os.environ["HF_DATASETS_CACHE"] = f"{caches}/datasets"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{caches}/jax"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
sys.path.insert(0, str(Path(__file__).parent))

import jax  # noqa: E402
import pytest  # noqa: E402

MAX_MAPPINGS = 25_000

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuse connections to other machines."""
    connect = socket.socket.connect

    def to_loopback(self, address):
        host = address[0] if isinstance(address, tuple) else ""
        assert host in ("", "127.0.0.1", "localhost", "::1"), f"a test connects to {address}"
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", to_loopback)
        yield


@pytest.fixture(autouse=True)
def few_mappings():
    """Drop compiled programs before their memory mappings reach Linux's limit of 65,530, where the compiler crashes."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """A folder of real data, set by SFT_JAX_TEST_DATA."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SFT_JAX_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set SFT_JAX_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random tiny Llama with a tokenizer and a ChatML template, as a Hugging Face folder."""
    from kit import make_model

    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """Forty small conversations."""
    from kit import write_chats

    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether drills run at full size."""
    return request.config.getoption("--full")


def packages_of(item: pytest.Item) -> list[str]:
    """The packages that a drill needs beside the test requirements."""
    return [name for mark in item.iter_markers("package") for name in mark.args]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--phases", action="store_true", help="print where the time goes, by file")
    parser.addoption("--phases-to", metavar="FILE.json", help="write where the time goes, by test, to a new file")
    parser.addoption("--full", action="store_true", help="run drills at full size: 500 kills instead of 20")
    parser.addoption("--touched", metavar="COMMIT", help="run only drills of packages that changed since this commit")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """1.5 workers per core, because some tests wait for child processes; at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(8, 3 * cores // 2))


def pytest_configure(config: pytest.Config) -> None:
    target = config.getoption("--phases-to")
    if target and Path(target).exists():
        raise pytest.UsageError(f"--phases-to: {target} already exists")
    if target or config.getoption("--phases"):
        from phases import Phases

        phases = Phases(target)
        config.pluginmanager.register(phases)
        if hasattr(config, "workerinput") or not config.getoption("numprocesses"):
            phases.measure()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect drills of missing packages, and with ``--touched`` of unchanged ones; run long tests first."""
    missing = [item for item in items if any(find_spec(name) is None for name in packages_of(item))]
    config.hook.pytest_deselected(items=missing)
    items[:] = [item for item in items if item not in missing]
    if base := config.getoption("--touched"):
        from touched import untouched

        left_out = untouched(items, base)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("long") is None and item.get_closest_marker("drill") is None)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail if more tests are skipped than SFT_JAX_MAX_SKIPS allows."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    allowed = os.environ.get("SFT_JAX_MAX_SKIPS")
    if allowed is None or reporter is None or hasattr(session.config, "workerinput"):
        return
    skipped = len(reporter.stats.get("skipped", []))
    if skipped > int(allowed):
        reporter.write_line(f"{skipped} tests skipped, {allowed} allowed", red=True)
        session.exitstatus = 1
