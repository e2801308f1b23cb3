"""`lorikeet serve` as a process of its own, started as a user would, with its metrics and processor time at hand."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

READY = re.compile(r"lorikeet ready: grpc (?P<address>\S+), metrics (?P<metrics>\S+), .*")
START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Scrape:
    """Every sample of /metrics at one moment: (name, labels) -> value."""

    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float]

    def sum(self, name: str, **labels: str) -> float:
        """Of the samples of that name whose labels include these; 0 if there is none."""
        return sum(value for (n, of), value in self.samples.items() if n == name and labels.items() <= set(of))

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums of the samples of that name, by the value of one label."""
        sums: dict[str, float] = {}
        for (n, of), value in self.samples.items():
            if n == name:
                key = dict(of)[label]
                sums[key] = sums.get(key, 0.0) + value
        return sums

    def __sub__(self, before: "Scrape") -> "Scrape":
        """What counters and histograms gained since."""
        return Scrape({key: value - before.samples.get(key, 0.0) for key, value in self.samples.items()})


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers calls.

    Attributes:
        address: of gRPC.
        start_s: wall seconds from the start of the process to its ready line.
        start_cpu_s: processor seconds of it and its children by then.
    """

    address: str
    start_s: float
    start_cpu_s: float
    _metrics: str
    _process: psutil.Process

    def scrape(self) -> Scrape:
        """Its metrics now."""
        with urllib.request.urlopen(self._metrics, timeout=60) as response:  # noqa: S310  # our own server's
            text = response.read().decode()
        return Scrape(
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        )

    def cpu_s(self) -> float:
        """Processor seconds of it and its children so far."""
        return cpu_of(self._process)

    @property
    def resident_bytes(self) -> int:
        """Of it and its children."""
        return sum(p.memory_info().rss for p in (self._process, *self._process.children(recursive=True)))


def cpu_of(process: psutil.Process) -> float:
    """Processor seconds of a process and the children that it has, user and system."""
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


@contextmanager
def running_server(arguments: Sequence[str], log: Path) -> Iterator[Server]:
    """Start `lorikeet serve` on free ports, and end it in order.

    Args:
        arguments: further flags.
        log: file for its standard error.

    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    # What the environment sets for servers is not what is measured.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LORIKEET_") and name != "PYTHONDONTWRITEBYTECODE"
    }
    program = Path(sys.executable).parent / "lorikeet"
    begin = time.perf_counter()
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [str(program), "serve", "--port", "0", "--metrics-port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )
    try:
        match = READY.fullmatch(_first_line(process))
        seen = psutil.Process(process.pid)
        if match is None:
            raise RuntimeError(f"the server was not ready; its log ends with\n{log.read_text()[-2000:]}")
        yield Server(match["address"], time.perf_counter() - begin, cpu_of(seen), match["metrics"], seen)
        process.send_signal(signal.SIGTERM)
        if process.wait(STOP_TIMEOUT_S):
            raise RuntimeError(f"the server ended with status {process.returncode}")
    finally:
        process.kill()
        process.wait()


def _first_line(process: "subprocess.Popen[str]") -> str:
    """The first line of its standard output; "" if it ends or does not come in time."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:  # to the end, or the pipe would fill
            lines.put(line.rstrip("\n"))
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    try:
        return lines.get(timeout=START_TIMEOUT_S)
    except queue.Empty:
        return ""
