"""An adapter as PEFT saves it, local servers to fetch it from, and a fetcher."""

import json
import random

import pytest
from lorikeet.adapters.sources.fetch import Fetcher
from lorikeet.adapters.sources.locate import SourcePolicy, locate

from .servers import CARD, CONFIG, GOLDEN, WEIGHTS, FaultServer


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No proxy, no credentials and no hub settings of whoever runs the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty-netrc").touch()
    monkeypatch.setenv("NETRC", str(tmp_path / "empty-netrc"))


@pytest.fixture
def files(plain_adapter) -> dict[str, bytes]:
    """Name -> content of an adapter that PEFT saved, with a card and something random for a golden file."""
    saved = {path.name: path.read_bytes() for path in plain_adapter.iterdir()}
    return {CONFIG: saved[CONFIG], WEIGHTS: saved[WEIGHTS], CARD: b"# card\n", GOLDEN: random.randbytes(1000)}


@pytest.fixture
def small_files() -> dict[str, bytes]:
    """The two required files, random and quick to send."""
    return {CONFIG: json.dumps({"r": random.randrange(64)}).encode(), WEIGHTS: random.randbytes(50_000)}


@pytest.fixture
def server():
    with FaultServer() as running:
        yield running


@pytest.fixture
def other_server():
    with FaultServer() as running:
        yield running


@pytest.fixture
def make_fetcher(tmp_path):
    """make_fetcher(**overrides): closed at the end; by then nothing of a download may be left."""
    fetchers = []

    def make(**overrides):
        arguments = {"max_bytes": 2**24, "timeout_s": 60.0} | overrides
        fetchers.append(Fetcher(tmp_path / "incoming", **arguments))
        return fetchers[-1]

    yield make
    for fetcher in fetchers:
        fetcher.close()
    assert not (tmp_path / "incoming").exists() or list((tmp_path / "incoming").iterdir()) == []


@pytest.fixture
def fetch(make_fetcher):
    """fetch(uri, allowed=None, **overrides): name -> content of what a new fetcher brings from a URI."""

    def fetch_files(uri, allowed=None, **overrides):
        source = locate(SourcePolicy([], allowed or [uri]), "a", uri)
        with make_fetcher(**overrides).fetch(source) as directory:
            return {path.name: path.read_bytes() for path in directory.iterdir()}

    return fetch_files
