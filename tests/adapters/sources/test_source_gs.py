"""Adapters from Google Cloud Storage: a local server that answers the two routes of its JSON API that are asked for."""

import json

import pytest
from lorikeet.adapters.errors import (
    AdapterMemoryError,
    AdapterNotFoundError,
    AdapterSourceError,
    AdapterUnreadableError,
)

from . import servers
from .servers import CONFIG, WEIGHTS


@pytest.fixture
def storage(server, monkeypatch):
    """The local server as Google's, without credentials."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    return server


def put(storage, bucket, folder, files, generation="1"):
    for name, data in files.items():
        route = f"/storage/v1/b/{bucket}/o/{folder}{name}"
        about = {"name": f"{folder}{name}", "size": str(len(data)), "generation": generation, "etag": "x"}
        storage.routes[route] = servers.content(json.dumps(about).encode(), Content_Type="application/json")
        storage.routes[f"/download{route}"] = servers.content(data)


def route_of(name):
    return f"/storage/v1/b/bucket/o/a/{name}"


@pytest.mark.parametrize("folder", ["", "a/", "team/x=1/a@b,c+d~/"])
def test_files_arrive_byte_for_byte(storage, fetch, files, folder):
    put(storage, "bucket", folder, files)
    assert fetch(f"gs://bucket/{folder}") == files


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_missing_file_is_named(storage, fetch, small_files, missing):
    del small_files[missing]
    put(storage, "bucket", "a/", small_files)
    with pytest.raises(AdapterNotFoundError, match=f"gs://bucket/a has no file {missing}"):
        fetch("gs://bucket/a")


@pytest.mark.parametrize("code", [401, 403])
def test_refused_access(storage, fetch, small_files, code):
    put(storage, "bucket", "a/", small_files)
    for route in (route_of(WEIGHTS), "/storage/v1/b/bucket/o"):
        storage.routes[route] = servers.status(code)
    with pytest.raises(AdapterSourceError, match="server's environment"):
        fetch("gs://bucket/a")


def test_size_limit(storage, fetch, small_files):
    put(storage, "bucket", "a/", small_files)
    with pytest.raises(AdapterMemoryError, match=WEIGHTS):
        fetch("gs://bucket/a", max_bytes=sum(map(len, small_files.values())) - 1)
    assert not any(path.startswith(f"/download{route_of(WEIGHTS)}") for path in storage.paths())


def test_passing_failure_is_tried_again(storage, fetch, small_files):
    put(storage, "bucket", "a/", small_files)
    route = f"/download{route_of(WEIGHTS)}"
    storage.routes[route] = servers.in_turn(
        servers.cut_off(b"half of it", len(small_files[WEIGHTS])), servers.status(503), storage.routes[route]
    )
    assert fetch("gs://bucket/a") == small_files


def test_object_replaced_while_others_are_fetched_is_noticed(storage, fetch, small_files):
    put(storage, "bucket", "a/", small_files)
    first = storage.routes[route_of(CONFIG)]
    put(storage, "bucket", "a/", small_files, generation="2")
    storage.routes[route_of(CONFIG)] = servers.in_turn(first, storage.routes[route_of(CONFIG)])
    with pytest.raises(AdapterUnreadableError, match="changed while"):
        fetch("gs://bucket/a")


@pytest.mark.parametrize("prefix", ["", "/download"])
def test_store_that_never_ends_is_left_at_the_deadline(storage, fetch, small_files, prefix):
    put(storage, "bucket", "a/", small_files)
    storage.routes[f"{prefix}{route_of(WEIGHTS)}"] = servers.trickle()
    with pytest.raises(AdapterUnreadableError, match="within"):
        fetch("gs://bucket/a", timeout_s=1.0)
