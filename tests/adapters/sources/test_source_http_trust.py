"""What HTTP servers must not get at: other hosts by redirects, other hosts' credentials, connections without trust."""

import ssl
from datetime import UTC, datetime, timedelta

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from lorikeet.adapters.errors import AdapterSourceError, AdapterUnreadableError
from lorikeet.adapters.sources import transfer
from lorikeet.adapters.sources.http_folder import _Origins
from lorikeet.adapters.sources.locate import SourcePolicy, locate
from yarl import URL

from . import servers
from .servers import WEIGHTS, FaultServer


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch):
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.0)


@pytest.fixture
def login(monkeypatch, tmp_path):
    """The environment has a user and a password for 127.0.0.1."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login lory password seeds\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def broken_weights(server, files, route):
    """The folder's URL; its weights are answered by `route`."""
    server.serve("/a", files)
    server.routes[f"/a/{WEIGHTS}"] = route
    return f"{server.url}/a"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("absolute", [True, False])
def test_redirect_on_the_same_server_is_followed(server, fetch, small_files, code, absolute):
    target = f"/stored/{WEIGHTS}?signature=s%2Fecret"
    url = broken_weights(server, small_files, servers.redirect((server.url if absolute else "") + target, code))
    server.serve("/stored", small_files)
    assert fetch(url) == small_files


def test_redirect_to_another_host_is_refused_and_not_asked(server, other_server, fetch, small_files):
    elsewhere = f"{other_server.url}/latest/meta-data?token=secret"
    url = broken_weights(server, small_files, servers.redirect(elsewhere))
    with (
        structlog.testing.capture_logs() as logs,
        pytest.raises(AdapterSourceError, match="--adapter-sources") as error,
    ):
        fetch(url)
    assert other_server.authority in error.value.message
    assert "secret" not in f"{error.value.message} {logs}"
    assert other_server.requests == []


def test_redirect_to_another_host_that_is_allowed_is_followed(server, other_server, fetch, small_files):
    url = broken_weights(server, small_files, servers.redirect(f"{other_server.url}/x/{WEIGHTS}"))
    other_server.serve("/x", small_files)
    assert fetch(url, allowed=[server.url, f"{other_server.url}/elsewhere/"]) == small_files


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "gopher://127.0.0.1/", "http://user:pw@127.0.0.1/", "http://", "http://[::1", ""]
)
def test_redirect_to_something_else_than_http_fails(server, fetch, small_files, target):
    url = broken_weights(server, small_files, servers.redirect(target))
    with pytest.raises((AdapterUnreadableError, AdapterSourceError)) as error:
        fetch(url)
    assert "pw" not in error.value.message


def test_redirects_in_a_circle_end(server, fetch, small_files):
    url = broken_weights(server, small_files, servers.redirect(f"/a/{WEIGHTS}"))
    with pytest.raises(AdapterUnreadableError, match="redirected more than"):
        fetch(url)


def test_credentials_of_one_server_are_not_sent_to_another(server, other_server, fetch, small_files, login):
    other_url = other_server.url.replace("127.0.0.1", "localhost")
    url = broken_weights(server, small_files, servers.redirect(f"{other_url}/{WEIGHTS}"))
    other_server.serve("", small_files)
    assert fetch(url, allowed=[server.url, other_url]) == small_files
    assert "authorization" in server.requests[0].headers
    assert all("authorization" not in request.headers for request in other_server.requests)


def test_credentials_come_from_the_environment(server, fetch, small_files, login):
    server.serve("/a", small_files)
    assert fetch(f"{server.url}/a") == small_files
    assert server.requests[0].headers["authorization"] == "Basic bG9yeTpzZWVkcw=="


def test_proxy_of_the_environment_is_used(server, fetch, small_files, monkeypatch):
    server.serve("/a", small_files)
    monkeypatch.setenv("http_proxy", f"http://lory:seeds@{server.authority}")
    assert fetch("http://adapters.invalid/a") == small_files
    assert server.requests[0].headers["host"] == "adapters.invalid"
    assert server.requests[0].headers["proxy-authorization"] == "Basic bG9yeTpzZWVkcw=="
    monkeypatch.setenv("no_proxy", "adapters.invalid")
    with pytest.raises(AdapterUnreadableError, match="connection failed"):
        fetch("http://adapters.invalid/a")


def test_redirect_from_https_to_http_is_refused_even_to_an_allowed_server():
    source = locate(SourcePolicy([], ["https://host/", "http://host/", "http://host:8080/"]), "a", "https://host/a")
    guide = _Origins(source)
    guide.check_redirect(URL("https://host/a"), URL("https://HOST:443/b"))
    guide.check_redirect(URL("http://host/a"), URL("https://host/b"))
    guide.check_redirect(URL("http://host/a"), URL("http://host:8080/b"))
    for target in (
        "http://host/b",
        "http://host:8080/b",
        "https://host:8443/b",
        "https://sub.host/b",
        "https://host.x/",
    ):
        with pytest.raises(AdapterSourceError):
            guide.check_redirect(URL("https://host/a"), URL(target))


def test_certificate_that_nobody_vouches_for_is_refused(fetch, small_files, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    certificate = builder.sign(key, hashes.SHA256())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
    (tmp_path / "pem").write_bytes(private + certificate.public_bytes(encoding))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "pem")
    with FaultServer(tls) as server:
        server.serve("/a", small_files)
        with pytest.raises(AdapterUnreadableError, match="TLS certificate"):
            fetch(f"{server.url}/a")
        assert server.requests == []
