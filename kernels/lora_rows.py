"""The adapted rows of a step by adapter, as the CPU's LoRA takes them: found once a step, shared by all sites.

Rows of all passes are put together by slot, so that each adapter is read once. Running example: row 3 has 0.7 of slot 4
and 0.3 of slot 1, rows 5 and 6 have slot 4 ->

    slots [1, 4]   starts [0, 1, 4]   rows [3, 3, 5, 6]   weights [0.3, 0.7, 1, 1]
"""

import ctypes
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Rows [start, end), to which a slot's adapter is applied with a factor."""

    slot: int
    start: int
    end: int
    weight: float


class _RowTables(ctypes.Structure):
    """Addresses of the arrays of `AdaptedRows`; `Rows` in native/lora.cpp."""

    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("distinct", ctypes.c_void_p),
        ("num_slots", ctypes.c_int64),
        ("num_distinct", ctypes.c_int64),
    )


class AdaptedRows:
    """The rows that adapters change in one step.

    An entry is one row of one piece. Entries are sorted by slot, those of a slot by row.

    Args:
        pieces: none empty, of any slots in any order; pieces of different slots may overlap.

    Attributes:
        slots: int32 [S], ascending.
        starts: int32 [S + 1]; the slot's entries are [starts[i], starts[i + 1]).
        rows: int32 [entries].
        weights: float32 [entries].
        distinct: int32 [D], the rows of all entries, ascending, each once.
        places: int32 [entries], of the entry's row in `distinct`.
        num_slots: the largest slot + 1; 0: there are no pieces.
        num_rows: the largest row + 1.
        address: of the same for native/lora.cpp; valid as long as this object.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        ordered = sorted(pieces)
        slots = np.array([piece.slot for piece in ordered], dtype=np.int32)
        first = np.array([piece.start for piece in ordered], dtype=np.int32)
        lengths = np.array([piece.end for piece in ordered], dtype=np.int32) - first
        ends = np.cumsum(lengths, dtype=np.int32)
        self.rows = np.arange(lengths.sum(), dtype=np.int32) + np.repeat(first - (ends - lengths), lengths)
        self.weights = np.repeat(np.array([piece.weight for piece in ordered], dtype=np.float32), lengths)
        self.slots, first_pieces = np.unique(slots, return_index=True)
        self.starts = np.append((ends - lengths)[first_pieces], len(self.rows)).astype(np.int32)
        self.distinct, places = np.unique(self.rows, return_inverse=True)
        self.places = places.astype(np.int32)
        self.num_slots = int(self.slots[-1]) + 1 if ordered else 0
        self.num_rows = int(self.distinct[-1]) + 1 if ordered else 0
        self._tables = _RowTables(
            self.slots.ctypes.data,
            self.starts.ctypes.data,
            self.rows.ctypes.data,
            self.weights.ctypes.data,
            self.places.ctypes.data,
            self.distinct.ctypes.data,
            len(self.slots),
            len(self.distinct),
        )
        self.address = ctypes.addressof(self._tables)
