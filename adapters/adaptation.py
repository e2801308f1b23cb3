"""What adapts a request: one adapter version or a weighted sum of several. Imports no torch."""

import hashlib
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from .version import AdapterVersion

MAX_MEMBERS: Final = 8
MAX_WEIGHT: Final = 100.0


class Member(NamedTuple):
    """One adapter of an adaptation, and what its delta is multiplied by (float32 precision is what is applied)."""

    version: AdapterVersion
    weight: float


@dataclass(frozen=True)
class Adaptation:
    """1 to MAX_MEMBERS versions, each once, in an order of their own: the same members make the same adaptation.

    Attributes:
        members: sorted by version, so that neither the prefix cache nor the arithmetic depends on the client's order.
    """

    members: tuple[Member, ...]

    @classmethod
    def of(cls, members: Iterable[tuple[AdapterVersion, float]]) -> "Adaptation":
        """Of checked members: weights are finite, versions distinct."""
        found = tuple(sorted((Member(*member) for member in members), key=_order))
        assert 1 <= len(found) <= MAX_MEMBERS and len({member.version for member in found}) == len(found)
        assert all(math.isfinite(member.weight) for member in found)
        return cls(found)

    @classmethod
    def single(cls, version: AdapterVersion) -> "Adaptation":
        """One adapter as it was trained."""
        return cls((Member(version, 1.0),))

    @property
    def versions(self) -> tuple[AdapterVersion, ...]:
        """Of the members."""
        return tuple(member.version for member in self.members)

    @property
    def is_plain(self) -> bool:
        """Whether it is one adapter as it was trained."""
        return len(self.members) == 1 and self.members[0].weight == 1.0

    @cached_property
    def adapter_id(self) -> str:
        """The ids of the members, joined by "+"; no adapter has such an id."""
        return "+".join(self.adapter_ids)

    @cached_property
    def adapter_ids(self) -> tuple[str, ...]:
        """The ids of the members, sorted, each once: two versions of one adapter may answer together."""
        return tuple(sorted({member.version.adapter_id for member in self.members}))

    @cached_property
    def digest(self) -> str:
        """Key of the prefix cache: the version's own where that is all, else of versions and weights."""
        if self.is_plain:
            return self.members[0].version.digest
        content = hashlib.sha256()
        for version, weight in self.members:
            content.update(bytes.fromhex(version.digest) + struct.pack("<f", weight))
        return content.hexdigest()


def _order(member: Member) -> tuple[str, str, int]:
    return member.version.digest, member.version.adapter_id, member.version.incarnation
