"""Names that lead to versions: which target of an alias answers a request. Imports no torch.

Pure: the registry owns a table and calls it under the manager's lock.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Final

from .info import AliasInfo, AliasTarget

MAX_TARGETS: Final = 8

_Content = tuple[str, str]  # adapter id, digest


class AliasTable:
    """Aliases by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, AliasInfo] = {}
        self._names: dict[_Content, set[str]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def get(self, name: str) -> AliasInfo | None:
        """The alias of that name, if there is one."""
        return self._by_name.get(name)

    def all(self) -> list[AliasInfo]:
        """Every alias, by name."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def names_of(self, adapter_id: str, digest: str) -> set[str]:
        """The aliases that lead to a version; a copy."""
        return set(self._names.get((adapter_id, digest), ()))

    def names_of_adapter(self, adapter_id: str) -> list[str]:
        """The aliases that lead to any version of an adapter, sorted."""
        return sorted({name for (owner, _), names in self._names.items() if owner == adapter_id for name in names})

    def set(self, alias: AliasInfo) -> None:
        """Create an alias, or move it."""
        self.delete(alias.name)
        self._by_name[alias.name] = alias
        for content in _contents(alias.targets):
            self._names.setdefault(content, set()).add(alias.name)

    def delete(self, name: str) -> AliasInfo | None:
        """Remove an alias; what it was, or None."""
        alias = self._by_name.pop(name, None)
        for content in _contents(alias.targets if alias else ()):
            self._names[content].discard(name)
            if not self._names[content]:
                del self._names[content]
        return alias


def choose_target(alias: AliasInfo, routing_key: str) -> AliasTarget:
    """The target that answers a request with this key; shares follow the weights.

    Weighted rendezvous hashing (Thaler and Ravishankar 1998; with weights: draft-ietf-bess-weighted-hrw): every target
    draws from an exponential distribution of its weight's rate, by a hash of key and target, and the smallest wins.
    So a key stays where it is when another target comes, goes or changes its weight, unless that very target wins it.
    """

    def draw(target: AliasTarget) -> float:
        text = f"{alias.name}\0{target.adapter_id}@{target.digest}\0{routing_key}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return -math.log((number + 1) / 2**64) / target.weight

    return min(alias.targets, key=draw)


def _contents(targets: Iterable[AliasTarget]) -> set[_Content]:
    return {(target.adapter_id, target.digest) for target in targets}
