"""`http://` and `https://`: a folder's URL, and the files right under it."""

import netrc
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import structlog
from yarl import URL

from ..errors import AdapterSourceError
from .http_client import HttpClient
from .locate import RemoteSource
from .meter import Meter

_log = structlog.get_logger(__name__)


class HttpFolder:
    """An opened folder; see transfer.RemoteFolder."""

    def __init__(self, uri: str, client: HttpClient) -> None:
        self._uri = uri
        self._client = client
        self._marks: dict[str, str | None] = {}  # file -> the header that marks its content

    async def fetch(self, name: str, target: Path, meter: Meter) -> str | None:
        """GET one file."""
        async with self._client.request("GET", self._url(name)) as answer:
            await self._client.download(answer, target, meter)
            headers = answer.response.headers
            self._marks[name] = next((header for header in ("ETag", "Last-Modified") if header in headers), None)
            return headers.get(self._marks[name] or "")

    async def mark(self, name: str) -> str | None:
        """HEAD one file."""
        header = self._marks.get(name)
        if header is None:
            return None
        async with self._client.request("HEAD", self._url(name)) as answer:
            return answer.response.headers.get(header)

    def _url(self, name: str) -> URL:
        return URL(f"{self._uri}/{name}", encoded=True)


class _Origins:
    """The guide for HTTP servers (see http_client.Guide): redirects stay on those that the operator names.

    User and password come from the file that NETRC names, or ~/.netrc: those of the server that is asked, no others.
    """

    def __init__(self, source: RemoteSource) -> None:
        self._source = source

    def headers(self, url: URL) -> Mapping[str, str]:
        path = os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")
        try:
            login = netrc.netrc(path).hosts.get(url.host or "")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, netrc.NetrcParseError):
            _log.warning("adapter_fetch_netrc_unreadable")
            return {}
        return {} if login is None else {"Authorization": aiohttp.encode_basic_auth(login[0], login[2] or "")}

    def check_redirect(self, origin: URL, target: URL) -> None:
        is_default = target.explicit_port is None or target.port == {"http": 80, "https": 443}[target.scheme]
        authority = f"{target.raw_host or ''}{'' if is_default else f':{target.port}'}".lower()
        if origin.scheme == "https" and target.scheme != "https":
            raise AdapterSourceError(f"{self._source.uri} leads from https:// to http://, which is not followed.")
        if (target.scheme, authority) not in self._source.redirects:
            raise AdapterSourceError(
                f"{self._source.uri} leads to {f'{target.scheme}://{authority}'[:200]!r}; redirects are followed only "
                "to servers that --adapter-sources names."
            )


@asynccontextmanager
async def open_http_folder(source: RemoteSource) -> AsyncIterator[HttpFolder]:
    """Open a folder on an HTTP server."""
    async with HttpClient(_Origins(source)) as client:
        yield HttpFolder(source.uri, client)
