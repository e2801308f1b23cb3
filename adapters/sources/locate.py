"""From what a client names to a place that the operator allows. Quick: no request leaves the machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterSourceError
from ..paths import adapter_directory, check_adapter_id
from .uri import MalformedUriError, SourceUri, is_uri, parse_prefix, parse_uri


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A folder inside a configured root; `directory` is its real path."""

    directory: Path


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """An allowed folder elsewhere.

    Attributes:
        location: of the folder.
        redirects: (scheme, authority) of the HTTP servers that a redirect may lead to.
    """

    location: SourceUri
    redirects: frozenset[tuple[str, str]] = frozenset()

    @property
    def uri(self) -> str:
        """Normalised; holds no credentials."""
        return str(self.location)


class SourcePolicy:
    """Where adapters may come from.

    Args:
        roots: of local folders, in order of preference.
        allowed: prefixes of URIs: `hf://`, `hf://my-org/`, `s3://bucket/adapters/`, `https://host/`. Segments are
            compared as a whole, with or without a slash at the end.

    Raises:
        ValueError: a prefix is malformed.
    """

    def __init__(self, roots: Sequence[Path], allowed: Sequence[str] = ()) -> None:
        self.roots = tuple(roots)
        prefixes: list[SourceUri] = []
        for position, text in enumerate(allowed, 1):
            try:
                prefixes.append(parse_prefix(text))
            except MalformedUriError as error:
                raise ValueError(f"Prefix {position} of --adapter-sources {error}.") from None
        self.prefixes = tuple(prefixes)


def locate(policy: SourcePolicy, adapter_id: str, source: str | Path | None) -> LocalSource | RemoteSource:
    """Find where an adapter is to be read from.

    Args:
        policy: what is allowed.
        adapter_id: what users name; checked here.
        source: a folder, absolute or relative to a root; a URI; None or empty: the folder of that name.

    Raises:
        AdapterIdError: malformed id, or a folder outside every root.
        AdapterNotFoundError: no such folder in a root.
        AdapterSourceError: a malformed URI, or one that is not allowed.
    """
    check_adapter_id(adapter_id)
    if isinstance(source, str) and is_uri(source):
        return _remote(policy, source)
    return LocalSource(adapter_directory(policy.roots, adapter_id, Path(source) if source else None))


def _remote(policy: SourcePolicy, text: str) -> RemoteSource:
    try:
        location = parse_uri(text)
    except MalformedUriError as error:
        raise AdapterSourceError(f"The source URI {error}.") from None
    if not policy.prefixes:
        raise AdapterSourceError(
            f"The server loads adapters from local folders only, not from {location.scheme}://. Its operator can allow "
            "URIs with --adapter-sources."
        )
    if not any(location.is_within(prefix) for prefix in policy.prefixes):
        raise AdapterSourceError(
            f"{location} lies outside what this server may load adapters from; its operator can allow it with "
            "--adapter-sources."
        )
    servers = (prefix for prefix in policy.prefixes if prefix.scheme in ("http", "https"))
    return RemoteSource(location, frozenset((prefix.scheme, prefix.authority) for prefix in servers))
