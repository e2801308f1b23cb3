"""`lorikeet serve` as a real process on free ports, with its metrics and its log at hand."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from lorikeet.server.client import LorikeetClient
from lorikeet.server.status import RemoteError
from prometheus_client.parser import text_string_to_metric_families

READY = re.compile(
    r"lorikeet ready: grpc (?P<address>\S+), metrics (?P<metrics>\S+), device (?P<device>\S+) \((?P<dtype>\w+)\), "
    r"NF4 weights (?P<nf4>[\d.]+) MiB, (?P<adapters>\d+) adapters?"
)
START_S = 120


def lorikeet(*arguments: str) -> list[str]:
    """The command line of the installed program; of this checkout, where an environment is used as it is."""
    program = Path(sys.executable).parent / "lorikeet"
    if program.exists():
        return [str(program), *arguments]
    return [sys.executable, "-P", "-c", "from lorikeet.server.cli import main; raise SystemExit(main())", *arguments]


class ServerProcess:
    """One server.

    Args:
        arguments: settings beside the ports, as flags.
        log: file for its standard error.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LORIKEET_")}
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                lorikeet("serve", "--port", "0", "--metrics-port", "0", *arguments),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = self._wait_until_ready()
        self.address = self.ready["address"]
        self.command = self._lines.get(timeout=60)
        with LorikeetClient(self.address, timeout_s=60) as client:
            assert client.is_serving()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put("")

    def _wait_until_ready(self) -> dict[str, str]:
        try:
            line = self._lines.get(timeout=START_S)
        except queue.Empty:
            line = ""
        match = READY.fullmatch(line)
        if match is None:
            self.kill()
            raise AssertionError(f"no ready line but {line!r}; the log ends with\n{self.log.read_text()[-4000:]}")
        return match.groupdict()

    def scrape(self) -> str:
        """The text of /metrics."""
        with urllib.request.urlopen(self.ready["metrics"], timeout=60) as response:
            return response.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the samples of a name whose labels include these; 0 if there is none."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.scrape())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def is_idle(self) -> bool:
        """Whether no request runs or waits, and none holds a KV block."""
        return not (
            self.metric("lorikeet_requests_running")
            or self.metric("lorikeet_requests_waiting")
            or self.metric("lorikeet_kv_blocks", state="used")
        )

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 60) -> int:
        """The exit status."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End it, however."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running_server(log: Path, *arguments: str) -> Iterator[ServerProcess]:
    """A server that is ended at the end, in order, with status 0 unless the test has ended it already."""
    server = ServerProcess(list(arguments), log)
    try:
        yield server
        if server.process.poll() is None:
            server.terminate()
            assert server.wait() == 0, log.read_text()[-4000:]
    finally:
        server.kill()


def eventually(condition, timeout_s: float = 90):
    """Poll until the condition holds; a RemoteError or a refused connection counts as not yet.

    Returns:
        What the condition returned.
    """
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = condition()
            if last:
                return last
        except (RemoteError, grpc.RpcError, OSError) as error:
            last = error
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s; last: {last!r}")
