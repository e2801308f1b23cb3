"""Adapters from S3: moto's real server, and a server that breaks S3's promises."""

import io
import json
import random

import boto3
import pytest
import s3fs
from lorikeet.adapters.errors import (
    AdapterInvalidError,
    AdapterMemoryError,
    AdapterNotFoundError,
    AdapterSourceError,
    AdapterUnreadableError,
)
from lorikeet.adapters.sources import transfer
from moto.server import ThreadedMotoServer

from . import servers
from .servers import CARD, CONFIG, GOLDEN, WEIGHTS


@pytest.fixture(autouse=True)
def credentials(monkeypatch, tmp_path):
    """Some, and none of whoever runs the tests."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "lory")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "seeds")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.0)


@pytest.fixture(scope="module")
def moto_url():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto_url, monkeypatch):
    """A new bucket, reached as operators would say it: by AWS_ENDPOINT_URL."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_url)
    name = f"adapters-{random.randrange(2**40)}"
    made = boto3.resource("s3").Bucket(name)
    made.create()
    return made


@pytest.fixture
def broken_s3(server, monkeypatch):
    """The local HTTP server as S3, with path-style addresses: routes are /bucket/key."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return server


def put(bucket, folder, files):
    for name, data in files.items():
        bucket.put_object(Key=f"{folder}{name}", Body=data)


@pytest.mark.parametrize("folder", ["", "a/", "team/x=1/a@b,c+d~/"])
def test_files_arrive_byte_for_byte(bucket, fetch, files, folder):
    put(bucket, folder, files | {"optimizer.pt": b"never asked for"})
    assert fetch(f"s3://{bucket.name}/{folder}") == files


def test_file_of_many_reads(bucket, fetch, small_files):
    small_files[WEIGHTS] = random.randbytes(9 * 2**20 + 1)
    put(bucket, "a/", small_files)
    assert fetch(f"s3://{bucket.name}/a") == small_files


def sharded(files: dict[str, bytes], index: str) -> dict[str, bytes]:
    """The same with its weights in two shards and an index."""
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    content = json.dumps({"metadata": {}, "weight_map": {f"tensor-{i}": name for i, name in enumerate(names)}})
    return {CONFIG: files[CONFIG], index: content.encode()} | {name: random.randbytes(5000) for name in names}


@pytest.mark.parametrize("index", ["adapter_model.safetensors.index.json", "model.safetensors.index.json"])
def test_shards_come_by_their_index(bucket, fetch, small_files, index):
    files = sharded(small_files, index)
    put(bucket, "a/", files)
    assert fetch(f"s3://{bucket.name}/a") == files


def test_missing_shard_is_named(bucket, fetch, small_files):
    files = sharded(small_files, "adapter_model.safetensors.index.json")
    put(bucket, "a/", {name: data for name, data in files.items() if "00002-of" not in name})
    with pytest.raises(AdapterNotFoundError, match="has no file adapter_model-00002-of-00002"):
        fetch(f"s3://{bucket.name}/a")


def test_index_that_names_other_files_is_refused(bucket, fetch, small_files):
    index = json.dumps({"weight_map": {"tensor": "../../secrets"}}).encode()
    put(bucket, "a/", {CONFIG: small_files[CONFIG], "adapter_model.safetensors.index.json": index})
    with pytest.raises(AdapterInvalidError, match="adapter_model-00001-of"):
        fetch(f"s3://{bucket.name}/a")


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_missing_file_is_named(bucket, fetch, small_files, missing):
    del small_files[missing]
    put(bucket, "a/", small_files)
    with pytest.raises(AdapterNotFoundError, match=f"s3://{bucket.name}/a has no file {missing}"):
        fetch(f"s3://{bucket.name}/a")


def test_missing_bucket(bucket, fetch):
    with pytest.raises(AdapterNotFoundError, match=CONFIG):
        fetch("s3://no-such-bucket/a")


def test_folder_of_a_files_name_is_no_file(bucket, fetch, small_files):
    put(bucket, "a/", {f"{CONFIG}/x": b"", WEIGHTS: small_files[WEIGHTS]})
    with pytest.raises(AdapterNotFoundError, match=CONFIG):
        fetch(f"s3://{bucket.name}/a")


def test_size_limit(bucket, fetch, small_files):
    put(bucket, "a/", small_files)
    size = sum(map(len, small_files.values()))
    assert fetch(f"s3://{bucket.name}/a", max_bytes=size) == small_files
    with pytest.raises(AdapterMemoryError, match=WEIGHTS):
        fetch(f"s3://{bucket.name}/a", max_bytes=size - 1)


def test_no_credentials(broken_s3, fetch, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AdapterSourceError, match="server's environment"):
        fetch("s3://bucket/a")
    assert broken_s3.requests == []


def test_refused_access(broken_s3, fetch):
    broken_s3.routes[f"/bucket/a/{CONFIG}"] = servers.status(403)
    with pytest.raises(AdapterSourceError, match="server's environment") as error:
        fetch("s3://bucket/a")
    assert "seeds" not in error.value.message


def test_optional_files_in_a_bucket_that_may_not_be_listed(broken_s3, fetch, small_files):
    """S3 answers 403 for a missing key to those who may not list the bucket."""
    broken_s3.serve("/bucket/a", small_files)
    for name in (GOLDEN, CARD):
        broken_s3.routes[f"/bucket/a/{name}"] = servers.status(403)
    assert fetch("s3://bucket/a") == small_files


@pytest.mark.parametrize(
    "failure", [servers.status(500), servers.status(503), servers.hang_up(), servers.cut_off(b"short", 50_000)]
)
def test_passing_failure_is_tried_again(broken_s3, fetch, small_files, failure):
    good = servers.content(small_files[WEIGHTS])
    broken_s3.serve("/bucket/a", small_files)
    broken_s3.routes[f"/bucket/a/{WEIGHTS}"] = servers.in_turn(good, failure, good)  # HEAD, GET, and again
    assert fetch("s3://bucket/a") == small_files


@pytest.mark.parametrize("failure", [servers.status(500), servers.hang_up(), servers.raw(b"not HTTP\r\n\r\n")])
def test_lasting_failure_is_unreadable(broken_s3, fetch, small_files, failure):
    broken_s3.serve("/bucket/a", small_files)
    broken_s3.routes[f"/bucket/a/{WEIGHTS}"] = failure
    with pytest.raises(AdapterUnreadableError, match=f"{WEIGHTS} of s3://bucket/a"):
        fetch("s3://bucket/a")


def test_object_replaced_while_others_are_fetched_is_noticed(broken_s3, fetch, small_files):
    broken_s3.serve("/bucket/a", small_files)
    old, new = (servers.content(small_files[CONFIG], ETag=f'"{tag}"') for tag in ("one", "two"))
    broken_s3.routes[f"/bucket/a/{CONFIG}"] = servers.in_turn(old, old, new)
    with pytest.raises(AdapterUnreadableError, match="changed while"):
        fetch("s3://bucket/a")


def test_another_size_than_described(broken_s3, fetch, small_files):
    weights = small_files[WEIGHTS]
    broken_s3.serve("/bucket/a", small_files)
    large = servers.content(weights * 2, ETag='"two"')
    described = servers.content(weights, ETag='"one"')
    broken_s3.routes[f"/bucket/a/{WEIGHTS}"] = servers.in_turn(described, large, large)
    with pytest.raises(AdapterUnreadableError, match="changed while"):
        fetch("s3://bucket/a")
    broken_s3.routes[f"/bucket/a/{WEIGHTS}"] = servers.in_turn(described, large, large)
    with pytest.raises(AdapterMemoryError):
        fetch("s3://bucket/a", max_bytes=len(weights) + 1000)


def test_full_local_disk_is_not_taken_for_the_network(broken_s3, fetch, small_files, monkeypatch):
    broken_s3.serve("/bucket/a", small_files)
    monkeypatch.setattr(s3fs.core, "open", lambda *_: io.FileIO("/dev/full", "wb"), raising=False)
    with pytest.raises(AdapterUnreadableError, match="disk"):
        fetch("s3://bucket/a")
    assert broken_s3.paths() == [f"/bucket/a/{CONFIG}"]


@pytest.mark.parametrize(
    "never_ending",
    [servers.trickle(), servers.stall(), servers.stall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nabc")],
)
def test_object_that_never_ends_is_left_at_the_deadline(broken_s3, fetch, small_files, never_ending):
    broken_s3.serve("/bucket/a", small_files)
    described = servers.content(small_files[WEIGHTS])
    broken_s3.routes[f"/bucket/a/{WEIGHTS}"] = servers.in_turn(described, never_ending)
    with pytest.raises(AdapterUnreadableError, match="within"):
        fetch("s3://bucket/a", timeout_s=1.0)


@pytest.mark.parametrize("never_ending", [servers.trickle_headers(), servers.stall()])
def test_description_that_never_ends_is_left_at_the_deadline(broken_s3, fetch, never_ending):
    broken_s3.routes[f"/bucket/a/{CONFIG}"] = never_ending
    with pytest.raises(AdapterUnreadableError, match="within"):
        fetch("s3://bucket/a", timeout_s=1.0)
