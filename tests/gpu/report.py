"""What `make test-gpu` prints last and, with $OUT, writes: tests by file, and the machine that they ran on."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "peft", "pytest", "pytest-xdist")
OUTCOMES = ("passed", "failed", "skipped")
WRITE_EVERY_S = 20.0


@dataclass
class Area:
    """The tests of one file.

    Attributes:
        outcomes: how many ended how; a test that failed in its set-up or tear-down has failed.
        seconds: sum over its tests, which run beside others.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class GpuReport:
    """A pytest plugin; with pytest-xdist, of the process that the others report to."""

    def __init__(self) -> None:
        self._started = self._written = time.monotonic()
        self._machine: dict[str, Any] | None = None
        self._seconds: Counter[str] = Counter()
        self._areas: dict[str, Area] = {}
        self._failures: dict[str, str] = {}
        self._skips: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one phase of one test."""
        area = self._areas.setdefault(_area_of(report.nodeid), Area())
        area.seconds += report.duration
        self._seconds[report.nodeid] += report.duration
        if report.failed and report.nodeid not in self._failures:
            area.outcomes["failed"] += 1
            self._failures[report.nodeid] = _last_line(report)
        elif report.skipped:
            area.outcomes["skipped"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._skips[reason.removeprefix("Skipped: ")] += 1
        elif report.when == "call" and report.passed:
            area.outcomes["passed"] += 1
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self._write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported has failed; with pytest-xdist every process says so."""
        if report.failed and report.nodeid not in self._failures:
            self._areas.setdefault(_area_of(report.nodeid), Area()).outcomes["failed"] += 1
            self._failures[report.nodeid] = _last_line(report)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """Once pytest has said what it has to say."""
        yield
        self._print(session.config.pluginmanager.get_plugin("terminalreporter"))

    def _print(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table, and with $OUT its file."""
        self._write()
        terminalreporter.write_line("")
        terminalreporter.write_line(_one_line(self._describe_machine()))
        terminalreporter.write_line(f"{'':44}{''.join(f'{outcome:>9}' for outcome in OUTCOMES)}  seconds")
        for name, area in [*sorted(self._areas.items()), ("all", self._total())]:
            counts = "".join(f"{area.outcomes[outcome]:>9}" for outcome in OUTCOMES)
            terminalreporter.write_line(f"{name:44}{counts}{area.seconds:>9.1f}")
        for reason, count in self._skips.most_common():
            terminalreporter.write_line(f"skipped {count}: {reason}")

    def _write(self) -> None:
        """Also now and then before the end, which a run that is cut off does not see."""
        self._written = time.monotonic()
        if out := os.environ.get("OUT"):
            path = Path(out) / "test-gpu.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._as_json(), indent=1) + "\n")

    def _total(self) -> Area:
        outcomes = sum((area.outcomes for area in self._areas.values()), Counter[str]())
        return Area(outcomes, time.monotonic() - self._started)

    def _describe_machine(self) -> dict[str, Any]:
        if self._machine is None:
            self._machine = describe_machine()
        return self._machine

    def _as_json(self) -> dict[str, Any]:
        areas = {
            name: {outcome: area.outcomes[outcome] for outcome in OUTCOMES} | {"seconds": round(area.seconds, 2)}
            for name, area in sorted(self._areas.items())
        }
        total = self._total()
        return {
            "machine": self._describe_machine(),
            "seconds": round(total.seconds, 1),
            "total": {outcome: total.outcomes[outcome] for outcome in OUTCOMES},
            "areas": areas,
            "failures": self._failures,
            "skips": dict(self._skips),
            "slowest": {name: round(seconds, 1) for name, seconds in self._seconds.most_common(20)},
        }


def describe_machine() -> dict[str, Any]:
    """Card, driver, versions and commit; names neither the host nor a path."""
    has_cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"),
        "gpu": torch.cuda.get_device_name() if has_cuda else None,
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if has_cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if has_cuda else None,
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _one_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    card = f"{machine['gpu']}, driver {machine['driver']}" if machine["gpu"] else "no CUDA device"
    return f"{card}; {versions}; commit {machine['commit'] or 'unknown'}; {machine['date'][:10]}"


def _area_of(nodeid: str) -> str:
    """`kernels/test_nf4` of `tests/kernels/test_nf4.py::test_it[case]`."""
    return nodeid.split("::")[0].removeprefix("tests/").removesuffix(".py")


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return (lines[0] if lines else report.longreprtext[-200:]).removeprefix("E").strip()[:300]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
