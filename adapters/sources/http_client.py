"""GET and HEAD with aiohttp, for adapters on HTTP servers and on the hub.

fsspec's own HTTP file system, which is aiohttp too, is not used: it follows redirects before anyone can look at them,
and its asynchronous interface does not tell what the servers on the way said. Here each redirect is judged before it
is followed, and nothing is decompressed: what is counted and kept are the bytes of the file.
"""

import hashlib
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NamedTuple, Protocol, Self

import aiohttp
from yarl import URL

from ... import __version__
from .failures import AccessError, MissingFileError, TransferError, storage_failure
from .meter import Meter
from .transfer import CONNECT_S, STALL_S

MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
_READ_BYTES: Final = 2**20


class Guide(Protocol):
    """What a kind of server is sent, and where it may lead."""

    def headers(self, url: URL) -> Mapping[str, str]:
        """Headers for one request; credentials only for the server that they are meant for."""

    def check_redirect(self, origin: URL, target: URL) -> None:
        """Raise AdapterSourceError unless `origin` may lead to `target`."""


class Answer(NamedTuple):
    """A response of status 200.

    Attributes:
        response: its body is not read yet.
        said: headers of all responses on the way to it; of several the first counts.
    """

    response: aiohttp.ClientResponse
    said: Mapping[str, str]


class HttpClient:
    """A session; an asynchronous context manager.

    Proxies come from the environment (HTTPS_PROXY, NO_PROXY, …); credentials only from the guide.

    Args:
        guide: of this kind of server.
    """

    def __init__(self, guide: Guide) -> None:
        self._guide = guide

    async def __aenter__(self) -> Self:
        """Open the session."""
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S),
            headers={"User-Agent": f"lorikeet/{__version__}", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=_READ_BYTES,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session and its connections."""
        await self._session.close()

    @asynccontextmanager
    async def request(self, method: Literal["GET", "HEAD"], url: URL) -> AsyncIterator[Answer]:
        """Ask for a URL, following the redirects that the guide permits.

        Raises:
            MissingFileError, AccessError, TransferError: no response of status 200; or the connection failed, also
                while the caller reads.
            AdapterSourceError: a redirect that is not permitted.
        """
        said: dict[str, str] = {}
        try:
            for _ in range(MAX_REDIRECTS + 1):
                proxy, for_proxy = _proxy(url)
                is_tunnel = url.scheme == "https"  # of which the proxy sees only the beginning
                async with self._session.request(
                    method,
                    url,
                    headers={**self._guide.headers(url), **({} if is_tunnel else for_proxy)},
                    proxy=proxy,
                    proxy_headers=for_proxy if is_tunnel else None,
                    allow_redirects=False,
                ) as response:
                    said = {name.lower(): value for name, value in response.headers.items()} | said
                    if response.status not in _REDIRECTS:
                        _check_status(response.status)
                        yield Answer(response, said)
                        return
                    target = _target(url, response)
                self._guide.check_redirect(url, target)
                url = target
        except aiohttp.ClientSSLError:
            raise TransferError("its TLS certificate or protocol was not accepted") from None
        except TimeoutError:
            raise TransferError("the server did not answer, or stopped in the middle") from None
        except aiohttp.ClientPayloadError:
            raise TransferError("the connection ended before the file did") from None
        except (aiohttp.ClientError, OSError):
            raise TransferError("the connection failed, or the answer was not HTTP") from None
        raise TransferError(f"it was redirected more than {MAX_REDIRECTS} times")

    async def download(self, answer: Answer, target: Path, meter: Meter, sha256: str | None = None) -> None:
        """Write the body of a response to a file.

        Args:
            answer: within `request`.
            target: overwritten.
            meter: counts.
            sha256: hex digest that the content must have; None: not known.

        Raises:
            TransferError: no length is known, another one came, the body is encoded, or its digest is another.
            AdapterMemoryError: too long.
            AdapterUnreadableError: the local disk failed.
        """
        response = answer.response
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise TransferError("the server sent it compressed, although it was asked not to")
        # Otherwise the end of the connection would pass for the end of the file.
        if response.content_length is None and "chunked" not in response.headers.get("Transfer-Encoding", "").lower():
            raise TransferError("the server does not tell how long it is")
        meter.begin(response.content_length)
        digest = hashlib.sha256() if sha256 is not None else None
        with _Output(target) as output:
            async for chunk in response.content.iter_any():
                meter.add(len(chunk))
                if digest is not None:
                    digest.update(chunk)
                output.write(chunk)
        meter.finish()
        if digest is not None and digest.hexdigest() != sha256:
            raise TransferError("its SHA-256 is not the one that the server names")


class _Output:
    """A local file whose failures are not taken for the network's."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        try:
            self._file = open(self._path, "wb", buffering=0)
        except OSError:
            raise storage_failure() from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, chunk: bytes) -> None:
        try:
            view = memoryview(chunk)
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            raise storage_failure() from None


def _proxy(url: URL) -> tuple[URL | None, Mapping[str, str]]:
    """The proxy that the environment names for a URL, and headers for it. aiohttp's own way sends NETRC's along."""
    address = urllib.request.getproxies().get(url.scheme)
    if not address or (url.host and urllib.request.proxy_bypass(url.host)):
        return None, {}
    proxy = URL(address)
    if proxy.user is None:
        return proxy, {}
    return proxy.with_user(None), {"Proxy-Authorization": aiohttp.encode_basic_auth(proxy.user, proxy.password or "")}


def _check_status(status: int) -> None:
    if status == 200:
        return
    if status in (404, 410):
        raise MissingFileError
    if status in (401, 403, 407):
        raise AccessError
    raise TransferError(f"the server answered with HTTP status {status}")


def _target(url: URL, response: aiohttp.ClientResponse) -> URL:
    location = response.headers.get("Location", "")
    try:
        target = url.join(URL(location, encoded=True))  # as the server wrote it: it may be signed
        is_usable = bool(location and target.host) and target.scheme in ("http", "https") and target.user is None
    except ValueError:
        is_usable = False
    if not is_usable:
        raise TransferError("it was redirected to something that is not an HTTP address")
    return target
