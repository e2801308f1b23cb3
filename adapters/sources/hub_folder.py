"""`hf://org/name@revision`: a repository of the Hugging Face hub, or of the server that HF_ENDPOINT names.

Files are taken from the hub's `resolve` route with the same client as other HTTP files, because the hub library's file
system has no deadline and cannot be broken off. The library tells the endpoint, the token and whether the server is
offline. The first answer names the commit, and all further files are asked for at that commit: a branch that moves
meanwhile cannot mix two states of the repository. Large files come with their SHA-256, which is checked.
"""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from huggingface_hub import constants, get_token
from yarl import URL

from ..errors import AdapterSourceError
from .failures import TransferError
from .http_client import HttpClient
from .locate import RemoteSource
from .meter import Meter

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class HubFolder:
    """An opened repository; see transfer.RemoteFolder."""

    def __init__(self, endpoint: URL, source: RemoteSource, client: HttpClient) -> None:
        location = source.location
        self._repository = endpoint / location.authority / location.path[0]
        self._revision = location.revision or constants.DEFAULT_REVISION
        self._client = client

    async def fetch(self, name: str, target: Path, meter: Meter) -> str | None:
        """GET one file, at the commit that the first one was of."""
        async with self._client.request("GET", self._repository / "resolve" / self._revision / name) as answer:
            commit = answer.said.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT.lower(), "")
            if not _COMMIT.fullmatch(commit):
                raise TransferError("the server does not answer like a Hugging Face hub")
            self._revision = commit
            tag = answer.said.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG.lower(), "").strip('"')
            await self._client.download(answer, target, meter, tag if _SHA256.fullmatch(tag) else None)
        return None

    async def mark(self, name: str) -> str | None:
        """None: files of one commit never change."""
        return None


class _Hub:
    """The guide for the hub (see http_client.Guide): it is trusted to name the servers that hold its large files."""

    def __init__(self, endpoint: URL, source: RemoteSource) -> None:
        self._endpoint = endpoint
        self._source = source
        self._token = get_token()

    def headers(self, url: URL) -> Mapping[str, str]:
        is_hub = url.origin() == self._endpoint.origin()
        return {"Authorization": f"Bearer {self._token}"} if self._token and is_hub else {}

    def check_redirect(self, origin: URL, target: URL) -> None:
        if self._endpoint.scheme == "https" and target.scheme != "https":
            raise AdapterSourceError(f"{self._source.uri} leads from https:// to http://, which is not followed.")
        location = self._source.location
        # The hub leads from the old name of a repository to its new one, which may not be allowed.
        if target.origin() == self._endpoint.origin() and (
            f"/{location.authority}/{location.path[0]}/".lower() not in target.raw_path.lower()
        ):
            raise AdapterSourceError(f"{self._source.uri} was moved on the hub; give the repository's new name.")


@asynccontextmanager
async def open_hub_folder(source: RemoteSource) -> AsyncIterator[HubFolder]:
    """Open a repository of the hub.

    Raises:
        AdapterSourceError: the server runs with HF_HUB_OFFLINE.
    """
    if constants.is_offline_mode():
        raise AdapterSourceError(f"{source.uri} cannot be fetched: the server runs with HF_HUB_OFFLINE.")
    endpoint = URL(constants.ENDPOINT)
    async with HttpClient(_Hub(endpoint, source)) as client:
        yield HubFolder(endpoint, source, client)
