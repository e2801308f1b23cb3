"""A real server process at its limits and at its end: queue full, SIGTERM under load, a port in use, bad models."""

import itertools
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest
from lorikeet.server.client import LorikeetClient
from lorikeet.server.status import RemoteError

from ..tiny import TEXT
from .process import eventually, lorikeet, running_server

LONG = {"prompt": TEXT[0], "temperature": 0.0, "ignore_eos": True}


def outcome(address, max_tokens, started=None):
    """Number of tokens, or the error, of one stream."""
    tokens = 0
    try:
        with LorikeetClient(address, timeout_s=60) as client:
            for event in client.stream(**LONG, max_tokens=max_tokens):
                tokens += len(event.delta.token_ids)
                if started is not None and tokens:
                    started.release()
                    started = None
    except RemoteError as error:
        return error
    return tokens


def test_full_queue_then_drain_timeout(server_arguments, tmp_path):
    """One server for both, since starting one takes ten seconds. It runs one request at a time and lets two wait."""
    arguments = ["--max-running", "1", "--max-waiting", "2", "--kv-cache-bytes", "32MiB", "--drain-timeout-s", "0.2"]
    with running_server(tmp_path / "log", *server_arguments, *arguments) as server, ThreadPoolExecutor(12) as pool:
        with LorikeetClient(server.address, timeout_s=60) as client:
            holding = client.stream(**LONG, max_tokens=15_000)
            assert next(holding).HasField("started")
            eventually(lambda: server.metric("lorikeet_requests_running") == 1)
            calls = [pool.submit(outcome, server.address, 100) for _ in range(12)]
            refused = [call.result() for call in itertools.islice(as_completed(calls), 10)]
            assert {(error.code, error.reason) for error in refused} == {("RESOURCE_EXHAUSTED", "QUEUE_FULL")}
            holding.close()
        # Nothing that was accepted is lost, and the server serves on.
        assert [each for each in (call.result() for call in calls) if each not in refused] == [100] * 2
        eventually(server.is_idle)
        assert outcome(server.address, 3) == 3

        started = threading.Semaphore(0)
        streams = [pool.submit(outcome, server.address, 15_000, started)]
        assert started.acquire(timeout=90)
        streams.append(pool.submit(outcome, server.address, 15_000))
        eventually(lambda: server.metric("lorikeet_requests_waiting") == 1)
        server.terminate()
        errors = [stream.result(timeout=60) for stream in streams]
        assert {(error.code, error.reason) for error in errors} == {("UNAVAILABLE", "DRAINING")}
        assert server.wait() == 0


def test_sigterm_under_load_finishes_what_runs_and_refuses_what_comes(server_arguments, tmp_path):
    with running_server(tmp_path / "log", *server_arguments, "--kv-cache-bytes", "16MiB") as server:
        # Connected before the signal, so that they still reach the server after it.
        with LorikeetClient(server.address, timeout_s=60) as late, ThreadPoolExecutor(4) as pool:
            assert late.is_serving()
            # Runs until the other has been refused; without it the server could have ended by then.
            holding = late.stream(**LONG, max_tokens=12_000)
            assert next(holding).HasField("started")
            started = threading.Semaphore(0)
            streams = [pool.submit(outcome, server.address, 300, started) for _ in range(4)]
            for _ in streams:
                assert started.acquire(timeout=90)
            server.terminate()
            eventually(lambda: not late.is_serving())
            with pytest.raises(RemoteError) as refused:
                late.generate(prompt="x", max_tokens=1)
            assert (refused.value.code, refused.value.reason) == ("UNAVAILABLE", "DRAINING")
            holding.close()
            assert [stream.result(timeout=60) for stream in streams] == [300] * 4
        assert server.wait() == 0


@pytest.mark.parametrize(("flag", "which"), [("--port", "address"), ("--metrics-port", "metrics")])
def test_port_in_use_is_one_line_and_status_2(server, server_arguments, flag, which):
    port = server.ready[which].removesuffix("/metrics").rpartition(":")[2]
    ports = {"--port": "0", "--metrics-port": "0"} | {flag: port}
    result = subprocess.run(
        lorikeet("serve", *server_arguments, *(word for item in ports.items() for word in item)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert f"127.0.0.1:{port}" in line
    assert flag in line


def test_missing_adapter_directory_is_one_line_and_status_2(server_arguments, tmp_path):
    result = subprocess.run(
        lorikeet("serve", *server_arguments, "--port", "0", "--metrics", "--adapters", str(tmp_path / "gone")),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "--adapters" in line
    assert "gone" in line


def test_model_that_cannot_be_served_is_one_line_and_status_2(tmp_path):
    (tmp_path / "model").mkdir()
    result = subprocess.run(
        lorikeet("serve", "--port", "0", "--metrics-port", "0", "--model", str(tmp_path / "model")),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("lorikeet: ")
