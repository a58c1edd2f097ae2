"""Where the time of a test run goes: ``pytest --phases`` prints a table, ``--phases-to FILE.json`` keeps it by test.

The wall time of each test is divided into what it was spent on. Where intervals overlap (a compilation inside a trace),
each moment counts once, for the phase that stands first in ``PHASES``.
"""

import builtins
import json
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest

PHASES = ("importing", "compiling", "lowering", "tracing", "processes")
_EVENTS = {
    "/jax/core/compile/backend_compile_duration": "compiling",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
}


class Phases:
    """A pytest plugin that measures in each worker and adds up in the controlling process."""

    def __init__(self, target: str | None):
        self.target = target
        self.intervals: list[tuple[str, float, float]] = []
        self.tests: dict[str, dict[str, float]] = {}
        self._importing = False

    def measure(self) -> None:
        """Starts to listen: to jax's compiler events, to imports, and to child processes."""
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(self._jax_event)
        import_module = builtins.__import__

        def timed_import(*args, **kwargs):
            if self._importing:
                return import_module(*args, **kwargs)
            self._importing, start = True, time.perf_counter()
            try:
                return import_module(*args, **kwargs)
            finally:
                self._importing = False
                self._add("importing", start, smallest=1e-3)

        builtins.__import__ = timed_import
        init, wait = subprocess.Popen.__init__, subprocess.Popen.wait
        started: dict[int, float] = {}

        def timed_init(process, *args, **kwargs):
            started[id(process)] = time.perf_counter()
            init(process, *args, **kwargs)

        def timed_wait(process, timeout=None):
            code = wait(process, timeout)
            if id(process) in started:
                self._add("processes", started.pop(id(process)))
            return code

        subprocess.Popen.__init__, subprocess.Popen.wait = timed_init, timed_wait

    def _jax_event(self, event: str, seconds: float, **_) -> None:
        if event in _EVENTS:
            self._add(_EVENTS[event], time.perf_counter() - seconds)

    def _add(self, phase: str, start: float, smallest: float = 0.0) -> None:
        end = time.perf_counter()
        if end - start >= smallest:
            self.intervals.append((phase, start, end))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        spent, self.intervals = divide(self.intervals), []
        report.phases = spent | {"rest": max(0.0, call.duration - sum(spent.values()))}
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, defaultdict(float))
        for phase, seconds in getattr(report, "phases", {}).items():
            test[phase] += seconds

    def pytest_terminal_summary(self, terminalreporter) -> None:
        files: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for name, spent in self.tests.items():
            for file in (name.split("::")[0], "all"):
                files[file]["tests"] += 1
                for phase, seconds in spent.items():
                    files[file][phase] += seconds
                    files[file]["seconds"] += seconds
        columns = ["tests", "seconds", *PHASES, "rest"]
        terminalreporter.write_line(" ".join(f"{c:>9}" for c in columns) + "  file (seconds of worker time)")
        for file, row in sorted(files.items(), key=lambda item: -item[1]["seconds"]):
            terminalreporter.write_line(" ".join(f"{row[c]:9,.0f}" for c in columns) + f"  {file}")
        if self.target:
            Path(self.target).write_text(json.dumps({"tests": self.tests, "files": files}, indent=1))


def divide(intervals: list[tuple[str, float, float]]) -> dict[str, float]:
    """Seconds by phase of intervals ``(phase, start, end)`` that may overlap; each moment counts once."""
    seconds: dict[str, float] = {}
    taken: list[tuple[float, float]] = []
    for phase in PHASES:
        taken = _union(taken + [(start, end) for name, start, end in intervals if name == phase])
        seconds[phase] = sum(end - start for start, end in taken) - sum(seconds.values())
    return seconds


def _union(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
