"""The deadline holds whatever a server does, and `close` ends what is under way. The proof is that these tests end."""

import asyncio
import io
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from lorikeet.adapters.errors import AdapterUnreadableError, ServingError
from lorikeet.adapters.sources import bounded, http_client
from lorikeet.adapters.sources.bounded import BoundedRun, StoppedError
from lorikeet.adapters.sources.locate import SourcePolicy, locate

from . import servers
from .servers import CONFIG, WEIGHTS

DEADLINE_S = 0.5
FOR_EVER_S = 3600.0
NEVER_ENDING = {
    "trickled body": servers.trickle(),
    "trickled headers": servers.trickle_headers(),
    "no answer": servers.stall(),
    "half a header": servers.stall(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "half a body": servers.stall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"),
    "half a chunk": servers.stall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nabc"),
    "endless interim answers": servers.stall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
}


@pytest.fixture(params=NEVER_ENDING)
def never_ending(request):
    return NEVER_ENDING[request.param]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_server_that_never_ends_is_left_at_the_deadline(server, fetch, small_files, never_ending, name):
    server.serve("/a", small_files)
    server.routes[f"/a/{name}"] = never_ending
    with pytest.raises(AdapterUnreadableError, match=r"within 0\.5 s \(--adapter-fetch-timeout-s\)"):
        fetch(f"{server.url}/a", timeout_s=DEADLINE_S)


def in_time(attempt, first_s=1.0 + DEADLINE_S):
    """Call attempt(timeout_s) until it says that what happens before the deadline has; more time for a slow machine."""
    assert any(attempt(factor * first_s) for factor in (1, 4, 16, 64))


def test_deadline_is_one_for_all_files_and_attempts(server, fetch, small_files):
    """Each file comes quickly enough after a few failures; an endless sequence of redirects and retries would not."""
    server.serve("/a", small_files)

    def attempt(timeout_s):
        server.routes[f"/a/{WEIGHTS}"] = servers.in_turn(servers.status(500), servers.hang_up(), servers.trickle())
        server.requests.clear()
        with pytest.raises(AdapterUnreadableError, match="within"):
            fetch(f"{server.url}/a", timeout_s=timeout_s)
        return server.paths().count(f"/a/{WEIGHTS}") == 3

    in_time(attempt)


def test_server_that_does_not_accept_is_left_at_the_deadline(fetch):
    """A listening socket whose queue is full: connecting gets no answer at all."""
    import socket

    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(AdapterUnreadableError, match="within"):
            fetch(f"http://127.0.0.1:{full.getsockname()[1]}/a", timeout_s=DEADLINE_S)


def test_connections_are_closed_at_the_deadline(server, fetch, small_files):
    closed = threading.Event()

    def watch(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        assert handler.rfile.read(1) == b""  # returns when the other side hangs up
        closed.set()
        handler.close_connection = True

    server.serve("/a", small_files)
    server.routes[f"/a/{WEIGHTS}"] = watch

    def attempt(timeout_s):
        with pytest.raises(AdapterUnreadableError):
            fetch(f"{server.url}/a", timeout_s=timeout_s)
        return f"/a/{WEIGHTS}" in server.paths()

    in_time(attempt)
    assert closed.wait(30)


def test_close_ends_running_downloads_and_refuses_new_ones(server, make_fetcher, small_files):
    asked = threading.Semaphore(0)

    def hold(handler):
        asked.release()
        servers.trickle()(handler)

    server.serve("/a", small_files)
    server.routes[f"/a/{WEIGHTS}"] = hold
    fetcher = make_fetcher(timeout_s=FOR_EVER_S)
    source = locate(SourcePolicy([], [server.url]), "a", f"{server.url}/a")
    errors = []

    def load():
        with pytest.raises(AdapterUnreadableError) as error, fetcher.fetch(source):
            pass
        errors.append(error.value.message)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert asked.acquire(timeout=30)
    fetcher.close()
    for thread in threads:
        thread.join(30)
    load()
    assert len(errors) == 4
    assert all("shutting down" in message for message in errors)


def test_directory_goes_also_when_its_user_fails(server, make_fetcher, small_files):
    server.serve("/a", small_files)
    source = locate(SourcePolicy([], [server.url]), "a", f"{server.url}/a")
    with pytest.raises(ZeroDivisionError), make_fetcher().fetch(source) as directory:
        assert sorted(path.name for path in directory.iterdir()) == sorted(small_files)
        assert directory.stat().st_mode & 0o077 == 0
        raise ZeroDivisionError
    assert not directory.exists()


def test_nothing_is_left_of_many_downloads_that_fail_in_many_ways(server, make_fetcher, small_files):
    routes = [*NEVER_ENDING.values(), servers.endless(), servers.hang_up(), servers.redirect("/"), servers.status(404)]
    for number, route in enumerate(routes):
        server.serve(f"/{number}", small_files)
        server.routes[f"/{number}/{WEIGHTS}"] = route
    policy = SourcePolicy([], [server.url])
    fetcher = make_fetcher(timeout_s=DEADLINE_S, max_bytes=2**20)

    def load(number):
        source = locate(policy, "a", f"{server.url}/{number % len(routes)}")
        with pytest.raises(ServingError), fetcher.fetch(source):
            pass

    def count_loops():
        return sum(os.readlink(entry.path) == "anon_inode:[eventpoll]" for entry in os.scandir("/proc/self/fd"))

    def join_threads():
        for thread in threading.enumerate():
            if thread.name == "adapter-fetch":
                thread.join(30)  # it closes its loop just after the caller goes on
                assert not thread.is_alive()

    join_threads()  # of other tests
    before = count_loops()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, range(2 * len(routes))))
    join_threads()
    connections = psutil.Process().net_connections("tcp4")
    assert [c for c in connections if c.raddr and c.raddr.port == int(server.authority.split(":")[1])] == []
    assert count_loops() == before


@pytest.mark.parametrize("is_there", [True, False])
def test_local_disk_that_fails_is_not_taken_for_the_network(
    server, fetch, small_files, monkeypatch, tmp_path, is_there
):
    server.serve("/a", small_files)
    if is_there:
        monkeypatch.setattr(http_client, "open", lambda *_, **__: io.FileIO("/dev/full", "wb"), raising=False)
    else:
        (tmp_path / "incoming").mkdir()
        monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: str(tmp_path / "gone"))
    with pytest.raises(AdapterUnreadableError, match="disk"):
        fetch(f"{server.url}/a")
    assert server.paths() == [f"/a/{CONFIG}"]  # another attempt would not help


def test_directory_that_cannot_be_made(fetch, tmp_path):
    (tmp_path / "incoming").write_text("a file where the directory should be")
    with pytest.raises(AdapterUnreadableError, match="directory"):
        fetch("http://127.0.0.1/a")
    (tmp_path / "incoming").unlink()


def test_run_returns_although_its_thread_is_blocked(monkeypatch):
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    async def main():
        try:
            begun.set()
            release.wait()  # as a look-up of credentials may
            await asyncio.sleep(FOR_EVER_S)
        finally:
            ended.set()

    def attempt(timeout_s):
        monkeypatch.setattr(bounded, "GRACE_S", timeout_s)
        with pytest.raises(TimeoutError):
            BoundedRun(main, 0.05).run()
        return begun.is_set()

    in_time(attempt, first_s=0.05)
    assert not ended.is_set()
    release.set()
    assert ended.wait(30)  # and the thread ends at its next await


def test_thread_that_begins_after_its_run_was_given_up_does_nothing(monkeypatch):
    threads, called = [], []

    class LateThread(threading.Thread):
        def start(self):
            threads.append(self)

    async def main():
        called.append(True)

    monkeypatch.setattr(bounded, "GRACE_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(bounded.threading, "Thread", LateThread)
        with pytest.raises(TimeoutError):
            BoundedRun(main, 0.05).run()
    [thread] = threads
    thread.run()
    assert not called


def test_run_returns_although_a_name_look_up_is_stuck():
    release = threading.Event()

    async def main():
        await asyncio.get_running_loop().run_in_executor(None, release.wait)

    with pytest.raises(TimeoutError):
        BoundedRun(main, 0.05).run()
    release.set()


def test_run_stopped_while_blocked_or_before_it_began(monkeypatch):
    monkeypatch.setattr(bounded, "GRACE_S", 0.05)
    blocked, release = threading.Event(), threading.Event()

    async def main():
        blocked.set()
        release.wait()

    run = BoundedRun(main, FOR_EVER_S)
    stopper = threading.Thread(target=lambda: (blocked.wait(), run.stop()))
    stopper.start()
    with pytest.raises(StoppedError):
        run.run()
    stopper.join()
    release.set()
    blocked.clear()
    early = BoundedRun(main, FOR_EVER_S)
    early.stop()
    with pytest.raises(StoppedError):
        early.run()
    assert not blocked.is_set()


def test_run_passes_errors_on_and_may_be_stopped_when_over():
    async def main():
        raise KeyError("x")

    run = BoundedRun(main, FOR_EVER_S)
    with pytest.raises(KeyError):
        run.run()
    run.stop()
