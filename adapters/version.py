"""What a request holds on to: one immutable version of one adapter. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One load of one adapter.

    Attributes:
        adapter_id: what users name.
        digest: hex SHA-256 of its config and weights; identity of the version, key of the prefix cache.
        incarnation: tells apart lives of the same content: one that was dropped by force, whose requests are being
            failed, is never mistaken for one that was loaded since.
    """

    adapter_id: str
    digest: str
    incarnation: int = 0

    def __str__(self) -> str:
        """`id@digest` with a shortened digest."""
        return f"{self.adapter_id}@{self.digest[:12]}"
