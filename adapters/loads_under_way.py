"""Which loads of which ids are under way, and whose results can still be used. Imports no torch, has no lock.

Every load has a ticket, in the order in which loads begin. What ends later is not what was asked for later: a ticket
decides whether an unload, or another load, has come in between.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class _Loading:
    """Loads of one id."""

    count: int = 0
    barrier: int = 0  # results of loads that began up to this ticket are outdated
    call_barrier: int = 0  # those that began up to this ticket were outdated by a call, not by a later load
    folder_barrier: int = 0  # what those that began up to this one read in the id's folder is not what it holds now


class LoadsUnderWay:
    """See the module. Iterates over the ids that are being loaded."""

    def __init__(self) -> None:
        self._tickets = 0
        self._by_id: dict[str, _Loading] = {}

    def __contains__(self, adapter_id: object) -> bool:
        return adapter_id in self._by_id

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def begin(self, adapter_id: str) -> int:
        """A load of an id starts; returns the ticket to end it with."""
        self._tickets += 1
        self._by_id.setdefault(adapter_id, _Loading()).count += 1
        return self._tickets

    def is_outdated(self, adapter_id: str, ticket: int) -> bool:
        """Whether the id was unloaded, or a later load of it finished, since this load began."""
        return ticket <= self._by_id[adapter_id].barrier

    def was_called_off(self, adapter_id: str, ticket: int) -> bool:
        """Whether an unload or a rollback has come since this load began."""
        return ticket <= self._by_id[adapter_id].call_barrier

    def end(self, adapter_id: str, ticket: int) -> bool:
        """A load ended; whether its result can still be used. Those of loads that began before it no longer can."""
        loading = self._by_id[adapter_id]
        valid = ticket > loading.barrier
        if valid:
            loading.barrier = ticket
        loading.count -= 1
        if loading.count == 0:
            del self._by_id[adapter_id]
        return valid

    def outdate(self, adapter_id: str) -> bool:
        """Loads of the id that are under way shall have no effect; whether there are any."""
        loading = self._by_id.get(adapter_id)
        if loading is None:
            return False
        self._tickets += 1
        loading.barrier = loading.call_barrier = self._tickets
        return True

    def note_folder(self, adapter_id: str, ticket: int) -> bool:
        """A load has read the id's folder; whether no later load has done so, nor has the folder gone since."""
        loading = self._by_id[adapter_id]
        is_newest = ticket > loading.folder_barrier
        if is_newest:
            loading.folder_barrier = ticket
        return is_newest

    def forget_folder(self, adapter_id: str) -> None:
        """The id's folder is gone: what loads under way read in it says nothing about a later one."""
        if adapter_id in self._by_id:
            self._by_id[adapter_id].folder_barrier = self._tickets
