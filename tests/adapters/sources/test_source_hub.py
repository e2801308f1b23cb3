"""Adapters from a Hugging Face hub: a local server that answers like its `resolve` route, and one with large files."""

import hashlib
import random

import pytest
from huggingface_hub import constants
from lorikeet.adapters.errors import AdapterNotFoundError, AdapterSourceError, AdapterUnreadableError
from lorikeet.adapters.sources import transfer

from . import servers
from .servers import CARD, CONFIG, WEIGHTS

COMMIT, LATER_COMMIT = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def hub(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_seeds")
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.0)
    return server


def publish(hub, storage, files, repository="birds/lory", revision="main", commit=COMMIT):
    """Small files come from the hub itself by a relative redirect, weights from the storage, as on the real one."""
    for name, data in files.items():
        about = {"X_Repo_Commit": commit, "X_Linked_Size": len(data)}
        if name == WEIGHTS:
            storage.routes[f"/blob/{commit}"] = servers.content(data)
            about["X_Linked_ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            route = servers.redirect(f"{storage.url}/blob/{commit}?signature=s%2Fecret", **about)
        else:
            cached = f"/api/resolve-cache/models/{repository}/{commit}/{name}"
            hub.routes[cached] = servers.content(data)
            about["X_Linked_ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            route = servers.redirect(cached, 307, **about)
        for version in (revision, commit):
            hub.routes[f"/{repository}/resolve/{version}/{name}"] = route


def test_files_arrive_byte_for_byte(hub, other_server, fetch, files):
    publish(hub, other_server, files)
    assert fetch("hf://birds/lory") == files


def test_revision(hub, other_server, fetch, small_files):
    publish(hub, other_server, small_files, revision="v1.0")
    assert fetch("hf://birds/lory@v1.0") == small_files
    assert fetch(f"hf://birds/lory@{COMMIT}") == small_files
    with pytest.raises(AdapterNotFoundError, match="hf://birds/lory@v2"):
        fetch("hf://birds/lory@v2")


def test_token_goes_to_the_hub_and_nowhere_else(hub, other_server, fetch, small_files, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("default login lory password seeds\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    publish(hub, other_server, small_files)
    fetch("hf://birds/lory")
    assert all(request.headers["authorization"] == "Bearer hf_seeds" for request in hub.requests)
    assert other_server.paths() == [f"/blob/{COMMIT}"]
    assert "authorization" not in other_server.requests[0].headers


def test_branch_that_moves_meanwhile_does_not_mix_versions(hub, other_server, fetch, small_files):
    publish(hub, other_server, small_files)
    old = hub.routes[f"/birds/lory/resolve/main/{CONFIG}"]
    publish(hub, other_server, {CONFIG: b"{}", WEIGHTS: random.randbytes(100)}, commit=LATER_COMMIT)
    hub.routes[f"/birds/lory/resolve/main/{CONFIG}"] = old  # was asked for just before
    assert fetch("hf://birds/lory") == small_files


def test_content_with_another_checksum_is_refused(hub, other_server, fetch, small_files):
    publish(hub, other_server, small_files)
    damaged = bytearray(small_files[WEIGHTS])
    damaged[random.randrange(len(damaged))] ^= 1
    other_server.routes[f"/blob/{COMMIT}"] = servers.content(bytes(damaged))
    with pytest.raises(AdapterUnreadableError, match="SHA-256"):
        fetch("hf://birds/lory")
    assert len(other_server.requests) == transfer.ATTEMPTS


def test_moved_repository_is_refused(hub, other_server, fetch, small_files):
    """It may have moved to an organisation that is not allowed."""
    publish(hub, other_server, small_files, repository="strangers/lory")
    for name in small_files:
        target = f"/strangers/lory/resolve/main/{name}"
        hub.routes[f"/birds/lory/resolve/main/{name}"] = servers.redirect(target, 307)
    with pytest.raises(AdapterSourceError, match="was moved"):
        fetch("hf://birds/lory", allowed=["hf://birds/"])


def test_redirect_from_https_to_http_is_refused(other_server, monkeypatch):
    from lorikeet.adapters.sources.hub_folder import _Hub
    from lorikeet.adapters.sources.locate import SourcePolicy, locate
    from yarl import URL

    endpoint = URL("https://hub.example")
    guide = _Hub(endpoint, locate(SourcePolicy([], ["hf://"]), "a", "hf://birds/lory"))
    guide.check_redirect(endpoint / "birds/lory/resolve/main/x", URL("https://cdn.example/x"))
    with pytest.raises(AdapterSourceError, match="http://"):
        guide.check_redirect(endpoint / "birds/lory/resolve/main/x", URL("http://hub.example/birds/lory/x"))


@pytest.mark.parametrize("code", [401, 403])
def test_private_or_gated_repository(hub, fetch, code):
    hub.routes[f"/birds/lory/resolve/main/{CONFIG}"] = servers.status(code, X_Error_Code="RepoNotFound")
    with pytest.raises(AdapterSourceError, match="server's environment") as error:
        fetch("hf://birds/lory")
    assert "hf_seeds" not in error.value.message


def test_missing_weights(hub, other_server, fetch, small_files):
    publish(hub, other_server, {CONFIG: small_files[CONFIG], CARD: b"# card"})
    with pytest.raises(AdapterNotFoundError, match=f"hf://birds/lory has no file {WEIGHTS}"):
        fetch("hf://birds/lory")


def test_server_that_is_no_hub(hub, fetch, small_files):
    hub.serve("/birds/lory/resolve/main", small_files)
    with pytest.raises(AdapterUnreadableError, match="like a Hugging Face hub"):
        fetch("hf://birds/lory")


def test_offline_server_says_so(hub, fetch, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterSourceError, match="HF_HUB_OFFLINE"):
        fetch("hf://birds/lory")
    assert hub.requests == []


def test_storage_that_never_ends_is_left_at_the_deadline(hub, other_server, fetch, small_files):
    publish(hub, other_server, small_files)
    other_server.routes[f"/blob/{COMMIT}"] = servers.trickle(50_000)
    with pytest.raises(AdapterUnreadableError, match="within"):
        fetch("hf://birds/lory", timeout_s=0.5)
