"""Which ranges of the device arena are taken. Imports no torch and touches no device.

The arena is one flat range [0, capacity) of elements; an adapter owns one extent of it, [start, start + size). Freed
extents coalesce with free neighbours; what is still scattered is removed by compaction, which slides every used extent
towards 0:

    before   [ A ][  free  ][ B ][ free ][ C ]
    after    [ A ][ B ][ C ][      free      ]
"""

from bisect import bisect_left, insort
from typing import Final, NamedTuple

# Extents start at multiples of this many elements: 128 bytes in 16 bit, so that rows of A and B can be read in vectors
# (and the regions inside that packing aligns stay so, wherever compaction moves them).
ALIGNMENT: Final = 64


class Move(NamedTuple):
    """One extent's way down: [source, source + size) -> [target, target + size), target < source; they may overlap."""

    source: int
    target: int
    size: int


def aligned(size: int) -> int:
    """Elements that an extent of `size` elements takes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class ExtentAllocator:
    """First fit over a sorted list of free extents.

    Args:
        capacity: elements of the arena; rounded down to ALIGNMENT.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self._used: dict[int, int] = {}  # start -> size
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []  # (start, size), sorted

    @property
    def used_elements(self) -> int:
        """Elements in used extents."""
        return sum(self._used.values())

    @property
    def largest_free(self) -> int:
        """Size of the largest free extent."""
        return max((size for _, size in self._free), default=0)

    def alloc(self, size: int) -> int | None:
        """Take an extent of at least `size` (>= 1) elements: its start, or None when no free extent is large enough."""
        assert size >= 1
        size = aligned(size)
        for i, (start, free) in enumerate(self._free):
            if free >= size:
                self._free[i : i + 1] = [(start + size, free - size)] if free > size else []
                self._used[start] = size
                return start
        return None

    def free(self, start: int) -> None:
        """Give an extent back.

        Raises:
            KeyError: no extent starts there (freed twice).
        """
        size = self._used.pop(start)
        i = bisect_left(self._free, (start, 0))
        if i < len(self._free) and self._free[i][0] == start + size:
            size += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == start:
            i -= 1
            start, before = self._free.pop(i)
            size += before
        insort(self._free, (start, size))

    def compact(self) -> list[Move]:
        """Slide every used extent towards 0; the new layout holds at once.

        Returns:
            The moves the owner of the memory has to make, in this order: each target lies below its source and above
            every extent already moved, so executing them one by one overwrites nothing that is still to be moved.
        """
        moves = []
        end = 0
        used: dict[int, int] = {}
        for start in sorted(self._used):
            size = self._used[start]
            if start != end:
                moves.append(Move(start, end, size))
            used[end] = size
            end += size
        self._used = used
        self._free = [(end, self.capacity - end)] if end < self.capacity else []
        return moves

    def check_integrity(self) -> None:
        """Assert that used and free extents tile the arena exactly and that no two free extents touch."""
        extents = sorted(
            [(start, size, True) for start, size in self._used.items()] + [(*f, False) for f in self._free]
        )
        end = 0
        was_used = True
        for start, size, used in extents:
            assert start == end and size > 0, f"hole or overlap at {end}: {extents}"
            assert used or was_used, f"free extents not coalesced at {start}"
            end, was_used = start + size, used
        assert end == self.capacity, f"extents end at {end} of {self.capacity}"
