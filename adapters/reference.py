"""What a request or a call names an adapter by: an id, an alias, or `id@digest-prefix`. Imports no torch."""

import re
from typing import Final, NamedTuple

from .errors import AdapterDigestError
from .paths import check_adapter_id

MIN_PREFIX: Final = 4
_PREFIX: Final = re.compile(r"[0-9a-f]{4,64}")


class Reference(NamedTuple):
    """A parsed reference.

    Attributes:
        name: an adapter id or an alias.
        digest_prefix: lower-case hex; empty: no version was named.
    """

    name: str
    digest_prefix: str


def parse_reference(text: str) -> Reference:
    """Parse `name` or `name@digest-prefix`.

    Raises:
        AdapterIdError: the name is malformed.
        AdapterDigestError: the prefix is not 4 to 64 hex digits.
    """
    name, at, prefix = text.partition("@")
    check_adapter_id(name)
    prefix = prefix.lower()
    if at and not _PREFIX.fullmatch(prefix):
        raise AdapterDigestError(
            f"{prefix[:80]!r} is no digest prefix; after the `@` come {MIN_PREFIX} to 64 hex digits of a version."
        )
    return Reference(name, prefix)
