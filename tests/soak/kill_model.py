"""What a server was told by one client, and must still know after it was killed: a model, changed call by call."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from lorikeet.protos.v1 import adapters_pb2
from lorikeet.server.client import LorikeetClient

_TIERS: dict[int, str] = {
    adapters_pb2.ADAPTER_TIER_UNSPECIFIED: "",
    adapters_pb2.ADAPTER_TIER_HOST: "host",
    adapters_pb2.ADAPTER_TIER_DEVICE: "device",
}


class Target(NamedTuple):
    """Where an alias leads to."""

    adapter_id: str
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Known:
    """One id.

    Attributes:
        current: digest, or "": it is not served.
        pinned: "host", "device" or "".
        previous: what a rollback brings back, or "". Cannot be seen from outside.
    """

    current: str = ""
    pinned: str = ""
    previous: str = ""

    def with_current(self, digest: str) -> "Known":
        """Loaded, or rolled back."""
        previous = self.current if self.current not in ("", digest) else self.previous
        return replace(self, current=digest, previous=previous)

    def unloaded(self, *, has_folder: bool) -> "Known":
        """Of one whose watched folder is still there it is remembered that it is not wanted, and what it was."""
        return Known(previous=self.current or self.previous) if has_folder else Known()


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Everything that one client has made of its names. Values are replaced, never changed.

    Attributes:
        ids: by adapter id, unloaded ones included.
        aliases: by name.
    """

    ids: dict[str, Known]
    aliases: dict[str, tuple[Target, ...]]

    def with_id(self, adapter_id: str, known: Known) -> "Knowledge":
        """One id is different."""
        return replace(self, ids={**self.ids, adapter_id: known})

    def with_alias(self, name: str, targets: tuple[Target, ...] | None) -> "Knowledge":
        """One alias is different; None: there is none of that name."""
        aliases = {key: value for key, value in self.aliases.items() if key != name}
        return replace(self, aliases=aliases if targets is None else {**aliases, name: targets})

    def is_aliased(self, adapter_id: str) -> bool:
        """Whether an alias leads to any version of the id."""
        return any(target.adapter_id == adapter_id for targets in self.aliases.values() for target in targets)

    def visible(self) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[Target, ...]]]:
        """What a client can see of it: current and pin by id, and the aliases."""
        return {i: (k.current, k.pinned) for i, k in self.ids.items()}, self.aliases


def observe(
    client: LorikeetClient, ids: list[str], aliases: list[str]
) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[Target, ...]]]:
    """What a server says of these names, in the form of `Knowledge.visible`."""
    served = {a.adapter_id: (a.version, _TIERS[a.pinned_tier]) for a in client.list_adapters() if a.current}
    found = {
        alias.name: tuple(Target(t.adapter_id, t.version, t.weight) for t in alias.targets)
        for alias in client.list_aliases()
        if alias.name in aliases
    }
    return {adapter_id: served.get(adapter_id, ("", "")) for adapter_id in ids}, found
