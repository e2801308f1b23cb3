"""Says which field of a request is to blame for an error of code that knows no requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ..adapters.errors import AdapterDigestError, AdapterIdError, AdapterSourceError

_OF_A_FIELD: Final = (AdapterIdError, AdapterDigestError, AdapterSourceError)


@contextmanager
def blaming(field: str) -> Iterator[None]:
    """Add `field` to what a malformed id, digest or source raises inside the block, unless it names one itself."""
    try:
        yield
    except _OF_A_FIELD as error:
        error.metadata.setdefault("field", field)
        raise
