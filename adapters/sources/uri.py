"""URIs of adapter folders, parsed strictly: what is compared with an allowed prefix is exactly what is fetched.

    hf://org/name[@revision]   s3://bucket[/prefix]   gs://bucket[/prefix]   http[s]://host[:port][/path]

General URI parsers forgive, and each does so in its own way; a string that two of them read differently is how a check
is got around. So whatever could be read in two ways is refused: percent-encoding, `.` and `..` segments, empty
segments, backslashes, credentials, query strings and fragments. A revision has no slashes, because `refs/pr/7` is what
a stranger proposed to a repository, not what its owners published.

No message repeats a URI that was refused here: it may hold a password or a signature.
"""

import re
from dataclasses import dataclass
from typing import Final

MAX_URI_CHARS: Final = 1024
SCHEMES: Final = ("hf", "s3", "gs", "http", "https")

_SCHEME: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
_HOST: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*")
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")
_BUCKETS: Final = {
    "s3": re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"),
    "gs": re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"),
}
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._~+=,@:-]{1,255}")
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# What is refused whatever the scheme, and why.
_REFUSED: Final = (
    (re.compile(r"[^\x21-\x7e]"), "has spaces, control characters or letters outside ASCII"),
    (re.compile("%"), "has percent-encoded characters; write names that need none"),
    (re.compile(r"\?"), "has a query string; credentials are taken from the server's environment"),
    (re.compile("#"), "has a fragment (#)"),
    (re.compile(r"\\"), "has a backslash"),
)


class MalformedUriError(ValueError):
    """The text is not a URI of an adapter folder. The message completes the sentence "The URI …"."""


@dataclass(frozen=True, slots=True)
class SourceUri:
    """A folder, or a prefix of folders, in the one form that is compared and fetched.

    Attributes:
        scheme: one of SCHEMES.
        authority: organisation, bucket, or host with a port that is not the scheme's own. Empty in a prefix: any.
        path: segments; on the hub the repository's name alone.
        revision: of a hub repository: branch, tag or commit; empty: its default branch, and in a prefix: any.
    """

    scheme: str
    authority: str
    path: tuple[str, ...]
    revision: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}://{'/'.join(part for part in (self.authority, *self.path) if part)}{revision}"

    def is_within(self, prefix: "SourceUri") -> bool:
        """Whether this folder is the prefix itself or lies under it, whole segments compared."""
        return (
            self.scheme == prefix.scheme
            and prefix.authority in ("", self.authority)
            and self.path[: len(prefix.path)] == prefix.path
            and prefix.revision in ("", self.revision)
        )


def is_uri(text: str) -> bool:
    """Whether a source names a URI, well-formed or not, rather than a local path."""
    return "://" in text


def parse_uri(text: str) -> SourceUri:
    """Parse the URI of one adapter folder.

    Raises:
        MalformedUriError: with a reason that repeats nothing of the text.
    """
    uri = _parse(text)
    if not uri.authority or (uri.scheme == "hf" and not uri.path):
        raise MalformedUriError("must read hf://org/name" if uri.scheme == "hf" else "names no host or bucket")
    return uri


def parse_prefix(text: str) -> SourceUri:
    """Parse what an operator allows: a URI, or its first whole segments; `hf://`, `s3://`, `gs://` allow all of theirs.

    Raises:
        MalformedUriError: with a reason that repeats nothing of the text.
    """
    prefix = _parse(text)
    if prefix.scheme in _DEFAULT_PORTS and not prefix.authority:
        # Any host would include those that only this server can reach.
        raise MalformedUriError("names no host; http:// and https:// must name one")
    return prefix


def _parse(text: str) -> SourceUri:
    if len(text) > MAX_URI_CHARS:
        raise MalformedUriError(f"has {len(text)} characters; at most {MAX_URI_CHARS} are read")
    match = _SCHEME.fullmatch(text)
    scheme = match["scheme"].lower() if match is not None else ""
    if match is None or scheme not in SCHEMES:
        raise MalformedUriError(f"has an unknown scheme; known: {', '.join(f'{name}://' for name in SCHEMES)}")
    for pattern, reason in _REFUSED:
        if pattern.search(match["rest"]):
            raise MalformedUriError(reason)
    if scheme == "hf":
        return _parse_hub(match["rest"])
    authority, slash, rest = match["rest"].partition("/")
    if not authority:
        if slash:
            raise MalformedUriError("names no host or bucket")
        return SourceUri(scheme, "", ())
    authority = _host(scheme, authority) if scheme in _DEFAULT_PORTS else _bucket(scheme, authority)
    rest = rest.removesuffix("/")
    path = tuple(rest.split("/")) if rest else ()
    for segment in path:
        if segment in ("", ".", ".."):
            raise MalformedUriError("has an empty, '.' or '..' segment")
        if not _SEGMENT.fullmatch(segment):
            raise MalformedUriError("has a segment with other characters than letters, digits and ._~+=,@:-")
    return SourceUri(scheme, authority, path)


def _parse_hub(rest: str) -> SourceUri:
    repository, at, revision = rest.partition("@")
    repository = repository if at else repository.removesuffix("/")
    names = repository.split("/") if repository else []
    if len(names) > 2 or not all(_HUB_NAME.fullmatch(n) and "--" not in n and ".." not in n for n in names):
        raise MalformedUriError("must read hf://org/name or hf://org/name@revision")
    if at and (len(names) != 2 or not _REVISION.fullmatch(revision) or ".." in revision):
        raise MalformedUriError("has a revision that is not a branch, tag or commit without slashes")
    return SourceUri("hf", names[0] if names else "", tuple(names[1:]), revision)


def _host(scheme: str, authority: str) -> str:
    if "@" in authority:
        raise MalformedUriError("has credentials in it; they are taken from the server's environment")
    host, colon, port = authority.lower().partition(":")
    if not _HOST.fullmatch(host) or (colon and not (_PORT.fullmatch(port) and int(port) < 2**16)):
        raise MalformedUriError("has a malformed host or port; allowed: a name or IPv4 address, and :port")
    return f"{host}:{port}" if port and port != _DEFAULT_PORTS[scheme] else host


def _bucket(scheme: str, authority: str) -> str:
    if "@" in authority:
        raise MalformedUriError("has credentials in it; they are taken from the server's environment")
    if not _BUCKETS[scheme].fullmatch(authority):
        raise MalformedUriError("has a malformed bucket name")
    return authority
