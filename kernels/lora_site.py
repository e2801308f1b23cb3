"""LoRA at one linear of a CPU: y[t] += weight * B_slot (A_slot x[t]) for all adapted rows of a step in one call.

`native/lora.cpp` computes it, or where there is no library `lora_cpu.lora_add_`.

Microseconds of CPU time for the four sites of a layer of the demo base (576 -> 576 + 192 + 192, 576 -> 576,
576 -> 1536 + 1536, 1536 -> 576) at rank 16 in fp32, against batched matmuls in plain torch (commit 8bb4ad2), and the
median ratio with its spread. Least of five rounds in which both took turns over six layers, one thread on 2 cores of an
AMD EPYC (Zen 3, AVX2) that were overloaded (load 10 to 18), torch 2.13, 2026-11-23; expect +-30 % of the times:

    one adapter, 1 row                                                  75   against  463   0.16 (0.11 to 0.23)
    8 adapters, 8 rows, evenly spaced                                  447   against 1246   0.37 (0.34 to 0.47)
    8 adapters, 32 rows, evenly spaced                                 516   against 1763   0.30 (0.22 to 0.33)
    8 of 12 adapters, 8 rows                                           407   against 2185   0.22 (0.15 to 0.24)
    8 of 12 adapters, 32 rows                                          505   against 3084   0.18 (0.16 to 0.19)
    8 of 32 adapters, 8 rows                                           479   against 2474   0.19 (0.18 to 0.22)
    8 of 32 adapters, 32 rows                                          630   against 3188   0.21 (0.17 to 0.24)
    8 adapters with 11, 6, 4, 3, 3, 2, 2, 1 rows                       555   against 2078   0.28 (0.25 to 0.31)
    32 adapters, 32 rows                                              1977   against 3373   0.53 (0.50 to 0.60)
    sums of two: random pairs of 8 adapters, 8 rows                    512   against 3008   0.18 (0.16 to 0.19)
    sums of two: random pairs of 8 adapters, 32 rows                   693   against 3675   0.21 (0.18 to 0.23)
    sums of two: random pairs of 8 of 32 adapters, 32 rows             750   against 3654   0.18 (0.15 to 0.21)
    sums of two: neighbours of 4 adapters, 6 rows                      281   against 1384   0.17 (0.13 to 0.23)
    sums of two: neighbours of 4 adapters, 26 rows                     498   against 2471   0.21 (0.17 to 0.25)
    the first of those neighbours only, 6 rows                         149   against  841   0.25 (0.15 to 0.29)
    the first of those neighbours only, 26 rows                        369   against 2081   0.18 (0.16 to 0.20)
    one adapter, 512 rows                                             3768   against 4581   0.79 (0.71 to 0.88)

The same layer in bfloat16 by products of pairs, against the way that CPUs without AVX512-BF16 take in bfloat16: fp32,
after everything was converted. Least of 120 sweeps over 6 layers, or 30 of one adapter, that no cache held any more, in
which both took turns; the ratio of these, and the medians of three runs. One thread on 2 cores of an AMD EPYC (Zen 5,
AVX512-BF16) with load 2, which reads 33 GB/s; 2026-11-23; expect +-20 % of the times:

    one adapter, 1 row                                                  12   against   38   0.32 (0.33 to 0.34)
    one adapter, 4 rows                                                 15   against   43   0.35 (0.35 to 0.39)
    one adapter, 32 rows                                                52   against  180   0.29 (0.29 to 0.29)
    one adapter, 512 rows                                              752   against 2720   0.28 (0.27 to 0.28)
    8 adapters, 8 rows, evenly spaced                                   83   against  295   0.28 (0.29 to 0.29)
    8 adapters, 32 rows, evenly spaced                                  87   against  349   0.25 (0.25 to 0.26)
    32 adapters, 32 rows                                               374   against 1241   0.30 (0.30 to 0.32)
    sums of two: random pairs of 8 adapters, 8 rows                     80   against  280   0.29 (0.30 to 0.31)
    sums of two: random pairs of 8 adapters, 32 rows                   139   against  498   0.28 (0.27 to 0.30)
    sums of two: random pairs of 32 adapters, 32 rows                  361   against 1222   0.30 (0.31 to 0.32)
"""

import ctypes
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from . import lora_cpu
from .contract import check, refuse
from .lora_rows import AdaptedRows
from .native.functions import ADDRESS, COUNT, NUMBER, TYPE_NUMBERS, function, multiplies_bf16

_ADD: Final = ("lorikeet_lora_add", ADDRESS, ADDRESS, ADDRESS, COUNT, ADDRESS, COUNT, NUMBER)
_add = function(*_ADD)
_add_briefly = function(*_ADD, brief=True)
# Rows times input and output width up to which a call takes some 100 us at most, at rank 16.
_BRIEF: Final = 1 << 17


class _SiteTables(ctypes.Structure):
    """`Site` in native/lora.cpp."""

    _fields_ = (
        ("arena", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("widths", ctypes.c_void_p),
        ("ranks_stride", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("num_slices", ctypes.c_int64),
        ("type", ctypes.c_int64),
        ("in_pairs", ctypes.c_int64),
    )


class LoraSite:
    """One linear and where its adapters lie.

    Args:
        arena: [num_elements], float32, bfloat16 or float16; this and the next two as for `lora.lora_shrink`, kept and
            not copied: what is written to them later counts.
        offsets: [max_slots], int64, contiguous.
        ranks: [max_slots, num_slices], int32, rows contiguous.
        slice_widths: output width of each slice.
        in_features: input width.

    Attributes:
        arena: as given.
        num_slots: that the tables have.
        address: of the site for native/lora.cpp; valid as long as this object.

    Raises:
        RuntimeError: a tensor breaks this contract.
    """

    def __init__(
        self, arena: Tensor, offsets: Tensor, ranks: Tensor, slice_widths: Sequence[int], in_features: int
    ) -> None:
        check(
            arena.dtype in TYPE_NUMBERS and arena.dim() == 1 and arena.is_contiguous(),
            lambda: f"arena must be flat and contiguous, of a float type, got {arena.dtype} {list(arena.shape)}",
        )
        check(
            offsets.dtype == torch.int64 and offsets.dim() == 1 and offsets.is_contiguous(),
            lambda: f"offsets must be int64 [max_slots], contiguous, got {offsets.dtype} {list(offsets.shape)}",
        )
        check(
            ranks.dtype == torch.int32 and ranks.shape == (len(offsets), len(slice_widths)) and ranks.stride(1) == 1,
            lambda: (
                f"ranks must be int32 {[len(offsets), len(slice_widths)]} with contiguous rows,"
                f" got {ranks.dtype} {list(ranks.shape)}, strides {list(ranks.stride())}"
            ),
        )
        self.arena, self._offsets, self._ranks = arena, offsets, ranks
        self._slice_widths = list(slice_widths)
        self._dtype = arena.dtype
        self._in_features, self._out_features = in_features, sum(slice_widths)
        self._width = in_features + self._out_features
        self.num_slots = len(offsets)
        self._widths = (ctypes.c_int64 * len(slice_widths))(*slice_widths)
        self._tables = _SiteTables(
            arena.data_ptr(),
            offsets.data_ptr(),
            ranks.data_ptr(),
            ctypes.addressof(self._widths),
            ranks.stride(0),
            in_features,
            len(slice_widths),
            TYPE_NUMBERS[arena.dtype],
            arena.dtype is torch.bfloat16 and multiplies_bf16(),
        )
        self.address = ctypes.addressof(self._tables)

    def add_(self, y: Tensor, x: Tensor, rows: AdaptedRows) -> None:
        """Adds weight * B A x to y in place for all entries of `rows`; no other row is read or written.

        Args:
            y: [num_tokens, sum of slice_widths], dtype of the arena, rows contiguous.
            x: [num_tokens, in_features], likewise.
            rows: of the step; its slots have valid entries in the tables.

        Raises:
            RuntimeError: a tensor breaks this contract.
        """
        self._check("y", y, self._out_features, rows)
        self._check("x", x, self._in_features, rows)
        if _add is None or _add_briefly is None:
            lora_cpu.lora_add_(y, x, self.arena, self._offsets, self._ranks, rows, self._slice_widths)
            return
        add = _add_briefly if len(rows.rows) * self._width <= _BRIEF else _add
        threads = torch.get_num_threads()
        add(self.address, rows.address, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), threads)

    def _check(self, name: str, matrix: Tensor, width: int, rows: AdaptedRows) -> None:
        shape, strides = matrix.shape, matrix.stride()
        if not (
            matrix.dtype is self._dtype
            and len(shape) == 2
            and shape[1] == width
            and strides[1] == 1
            and shape[0] >= rows.num_rows
            and rows.num_slots <= self.num_slots
        ):
            refuse(
                f"{name} must be {self._dtype} [{rows.num_rows} or more, {width}] with contiguous rows, and slots below"
                f" {self.num_slots}, got {matrix.dtype} {list(shape)}, strides {list(strides)}, {rows.num_slots} slots"
            )
