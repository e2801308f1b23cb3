"""Adapters from an HTTP server that is honest, and from many that are not."""

import random

import pytest
import structlog
from lorikeet.adapters.carried_text import CARRIED_FILE
from lorikeet.adapters.errors import (
    AdapterInvalidError,
    AdapterMemoryError,
    AdapterNotFoundError,
    AdapterSourceError,
    AdapterUnreadableError,
)
from lorikeet.adapters.sources import meter as meter_module
from lorikeet.adapters.sources import transfer
from lorikeet.adapters.tokenizer_files import TOKENIZER_FILES
from lorikeet.adapters.weights_file import read_header

from . import servers
from .servers import CARD, CONFIG, GOLDEN, WEIGHTS


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch):
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.0)


def broken_weights(server, files, route):
    """The folder's URL; its weights are answered by `route`."""
    server.serve("/a", files)
    server.routes[f"/a/{WEIGHTS}"] = route
    return f"{server.url}/a"


def test_files_arrive_byte_for_byte(server, fetch, files):
    files |= {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    server.serve("/team/a", files | {"optimizer.pt": b"never asked for"})
    assert fetch(f"{server.url}/team/a/") == files
    names = (CONFIG, WEIGHTS, GOLDEN, CARD, *TOKENIZER_FILES, CARRIED_FILE)
    assert server.paths("GET") == [f"/team/a/{name}" for name in names]
    assert set(server.paths("HEAD")) <= set(server.paths("GET"))


def test_optional_files_may_be_missing(server, fetch, small_files):
    server.serve("/a", small_files)
    assert fetch(f"{server.url}/a") == small_files


def test_optional_file_that_may_not_be_read_is_left_out(server, fetch, small_files):
    server.serve("/a", small_files)
    server.routes[f"/a/{GOLDEN}"] = servers.status(403)
    assert fetch(f"{server.url}/a") == small_files


def test_calibration_text_comes_along_unless_it_is_too_large_or_cannot_be_fetched(server, fetch, small_files):
    server.serve("/a", small_files | {CARRIED_FILE: b"text"})
    assert fetch(f"{server.url}/a") == small_files | {CARRIED_FILE: b"text"}
    for route in (servers.endless(), servers.status(503)):
        server.routes[f"/a/{CARRIED_FILE}"] = route
        assert fetch(f"{server.url}/a", max_bytes=2**40) == small_files


def test_chunked_body_without_a_length(server, fetch, small_files):
    url = broken_weights(server, small_files, servers.chunked(small_files[WEIGHTS]))
    assert fetch(url) == small_files


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("code", [404, 410])
def test_missing_file_is_named(server, fetch, small_files, missing, code):
    server.serve("/a", small_files)
    server.routes[f"/a/{missing}"] = servers.status(code)
    with pytest.raises(AdapterNotFoundError) as error:
        fetch(f"{server.url}/a")
    assert f"{server.url}/a" in error.value.message
    assert missing in error.value.message


@pytest.mark.parametrize("code", [401, 403])
def test_refused_access_names_the_servers_environment(server, fetch, small_files, code):
    url = broken_weights(server, small_files, servers.status(code))
    with pytest.raises(AdapterSourceError, match="server's environment"):
        fetch(url)


@pytest.mark.parametrize(
    "failure",
    [
        servers.status(500),
        servers.status(503),
        servers.status(429),
        servers.hang_up(),
        servers.raw(b"hello there, this is not HTTP\r\n\r\n"),
        servers.cut_off(b"short", 50_000),
        servers.chunked(b"short", complete=False),
    ],
)
def test_passing_failure_is_tried_again(server, fetch, small_files, failure):
    url = broken_weights(server, small_files, servers.in_turn(failure, servers.content(small_files[WEIGHTS])))
    assert fetch(url) == small_files


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (servers.status(500), "HTTP status 500"),
        (servers.status(302), "not an HTTP address"),
        (servers.hang_up(), "connection failed"),
        (servers.raw(b"hello there, this is not HTTP\r\n\r\n"), "not HTTP"),
        (servers.raw(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello"), "not HTTP"),
        (servers.raw(b"HTTP/1.1 200 OK\r\n" + b"X-Many: 1\r\n" * 10_000 + b"\r\n"), "not HTTP"),
        (servers.cut_off(b"short", 50_000), "ended before"),
        (servers.chunked(b"short", complete=False), "ended before"),
        (servers.without_length(b"until I hang up"), "how long"),
        (servers.content(b"\x1f\x8b...", Content_Encoding="gzip"), "compressed"),
    ],
)
def test_lasting_failure_is_unreadable_and_leaves_nothing(server, fetch, small_files, failure, message):
    url = broken_weights(server, small_files, failure)
    with pytest.raises(AdapterUnreadableError, match=message):
        fetch(url)
    assert server.paths().count(f"/a/{WEIGHTS}") >= transfer.ATTEMPTS


def test_nobody_listens(fetch):
    with servers.FaultServer() as gone:
        url = f"{gone.url}/a"
    with pytest.raises(AdapterUnreadableError, match="connection failed"):
        fetch(url)


def test_file_that_is_shorter_than_its_own_header_says_is_noticed_by_the_reader(server, fetch, files, tmp_path):
    """HTTP cannot tell: as much came as was announced."""
    short = files[WEIGHTS][:-100]
    got = fetch(broken_weights(server, files, servers.content(short)))[WEIGHTS]
    assert got == short
    (tmp_path / WEIGHTS).write_bytes(got)
    with open(tmp_path / WEIGHTS, "rb", buffering=0) as file, pytest.raises(AdapterInvalidError, match="complete"):
        read_header(file)


def test_more_than_was_announced_is_never_kept(server, fetch, small_files):
    """It looks like the beginning of another answer; whether that is noticed depends on when it comes."""
    weights = small_files[WEIGHTS]
    url = broken_weights(server, small_files, servers.cut_off(weights, len(weights) - 100))
    try:
        assert fetch(url)[WEIGHTS] == weights[:-100]
    except AdapterUnreadableError as error:
        assert "not HTTP" in error.message


def test_announced_size_is_refused_before_anything_is_read(server, fetch, small_files):
    url = broken_weights(server, small_files, servers.cut_off(b"", 2**50))
    with pytest.raises(AdapterMemoryError, match=str(2**50)):
        fetch(url)
    assert server.paths().count(f"/a/{WEIGHTS}") == 1


def test_endless_body_ends_at_the_limit(server, fetch, small_files):
    url = broken_weights(server, small_files, servers.endless())
    with pytest.raises(AdapterMemoryError, match="more than"):
        fetch(url, max_bytes=10 * 2**20)


def test_config_has_a_limit_of_its_own(server, fetch, small_files):
    server.serve("/a", small_files)
    server.routes[f"/a/{CONFIG}"] = servers.endless()
    with pytest.raises(AdapterMemoryError, match=CONFIG):
        fetch(f"{server.url}/a", max_bytes=2**40)


def test_limit_is_for_all_files_together(server, fetch, small_files):
    server.serve("/a", small_files | {CARD: random.randbytes(1000)})
    size = sum(map(len, small_files.values())) + 1000
    assert len(fetch(f"{server.url}/a", max_bytes=size)) == 3
    with pytest.raises(AdapterMemoryError, match=CARD):
        fetch(f"{server.url}/a", max_bytes=size - 1)


@pytest.mark.parametrize("replaced", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("header", ["ETag", "Last_Modified"])
def test_file_replaced_while_others_are_fetched_is_noticed(server, fetch, small_files, replaced, header):
    server.serve("/a", small_files)
    server.routes[f"/a/{replaced}"] = servers.in_turn(
        servers.content(small_files[replaced], **{header: "one"}), servers.content(b"new", **{header: "two"})
    )
    with pytest.raises(AdapterUnreadableError, match="changed while"):
        fetch(f"{server.url}/a")


def test_file_removed_while_others_are_fetched_is_noticed(server, fetch, small_files):
    server.serve("/a", small_files)
    route = servers.content(small_files[CONFIG], ETag="one")
    server.routes[f"/a/{CONFIG}"] = servers.in_turn(route, servers.status(404))
    with pytest.raises(AdapterUnreadableError, match="changed while"):
        fetch(f"{server.url}/a")


def test_files_without_marks_or_with_others_than_before_are_not_taken_for_changed(server, fetch, small_files):
    config, weights = small_files[CONFIG], small_files[WEIGHTS]
    tagged, dated = servers.content(config, ETag='"x"'), servers.content(config, Last_Modified="today")
    server.routes[f"/a/{CONFIG}"] = servers.in_turn(tagged, dated)
    server.routes[f"/a/{WEIGHTS}"] = servers.chunked(weights)
    assert fetch(f"{server.url}/a") == small_files
    assert server.paths("HEAD") == [f"/a/{CONFIG}"]


def test_server_without_head_requests_is_served(server, fetch, small_files):
    server.serve("/a", small_files)
    for name, data in small_files.items():
        route = servers.content(data, ETag='"x"')
        server.routes[f"/a/{name}"] = servers.in_turn(route, servers.status(405))
    assert fetch(f"{server.url}/a") == small_files
    assert len(server.paths("HEAD")) == 2


def test_progress_is_logged(server, fetch, small_files, monkeypatch):
    monkeypatch.setattr(meter_module, "PROGRESS_AFTER_S", 0.0)
    server.serve("/a", small_files | {WEIGHTS: random.randbytes(8 * 2**20)})
    with structlog.testing.capture_logs() as logs:
        fetch(f"{server.url}/a")
    events = [log for log in logs if log["event"] == "adapter_fetch_progress" and log["file"] == WEIGHTS]
    percents = [log["percent"] for log in events]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100
    assert len(percents) <= 10
    assert events[-1]["received_bytes"] == events[-1]["total_bytes"] == 8 * 2**20
