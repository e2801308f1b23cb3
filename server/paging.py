"""Pages of a list that changes meanwhile: a page begins after a key, so what comes or goes before it shifts nothing."""

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from .errors import BadRequestError

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000

# What orders and identifies an item; the keys of one list have the same length and the same types.
Key = tuple[str | bool, ...]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """One page.

    Attributes:
        items: in the order of their keys.
        next_token: gets the next page; empty: this is the last one.
    """

    items: list[Item]
    next_token: str


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A checked request for a page.

    Attributes:
        size: most items.
        after: key of the last item of the page before; empty: the first page.
    """

    size: int
    after: Key

    def of(self, items: Iterable[Item], key: Callable[[Item], Key]) -> Page[Item]:
        """The page of these items, which may come in any order.

        Args:
            items: the whole list, as it is now.
            key: of an item; shaped like the example that `read_page_request` was given.
        """
        rest = sorted((item for item in items if key(item) > self.after), key=key)
        page = rest[: self.size]
        return Page(page, _token(key(page[-1])) if len(rest) > self.size else "")


def read_page_request(page_size: int, page_token: str, example: Key) -> PageRequest:
    """Check the two fields that every list request has.

    Args:
        page_size: 0 for the default.
        page_token: empty, or as a page had it.
        example: a key, whose length and types tell tokens of this list from others.

    Raises:
        BadRequestError: names the field.
    """
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise BadRequestError(
            f"page_size is {page_size}; allowed: 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}.",
            {"field": "page_size"},
        )
    return PageRequest(page_size or DEFAULT_PAGE_SIZE, _read_token(page_token, example))


def _token(last: Key) -> str:
    return base64.urlsafe_b64encode(json.dumps(last).encode()).decode()


def _read_token(token: str, example: Key) -> Key:
    if not token:
        return ()
    try:
        parts = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
    except (ValueError, RecursionError):
        parts = None
    if not isinstance(parts, list) or [type(part) for part in parts] != [type(part) for part in example]:
        raise BadRequestError(
            "page_token is not one of ours; give next_page_token of the page before, or none.", {"field": "page_token"}
        )
    return tuple(parts)
