"""What a request holds on to: one immutable version of one adapter. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One load of one adapter.

    Attributes:
        adapter_id: what users name.
        digest: hex SHA-256 of its config and weights; identity of the version, key of the prefix cache.
    """

    adapter_id: str
    digest: str

    def __str__(self) -> str:
        """`id@digest` with a shortened digest."""
        return f"{self.adapter_id}@{self.digest[:12]}"
