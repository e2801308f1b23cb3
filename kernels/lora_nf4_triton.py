"""An NF4 matmul and LoRA in one launch, in Triton, for CUDA: for decodes of few rows, or of one shared adapter.

At batch 1 an adapter of rank 16 is 0.2 us of bytes at a site of Llama-3-8B, and what costs are its launches: shrink and
expand, one after the other behind the matmul, are two waits of about 0.7 us each even where they are launched
dependently. Here they are none. Programs in front of the matmul's own compute h = A x while those read W; B is loaded
before the matmul and held; whoever finishes a tile of y adds B h to it, after the one look at the tile's counter that
adding up splits takes anyway.

Estimated for a step at batch 1, not measured: 0.1 us a site for programs and bytes beside the matmul's, 0.2 us for h,
where splits are added beside their loads, and 0.3 us for the counter where there are no splits (gate_up): about 50 us
in 128 sites, 3.5 % of a step at its limit of 1.43 ms and 2 % of one of 2.5 ms, instead of 10 % and 7 % (`lora_triton`).

Few rows, because each reads its A and B for itself, as distinct adapters do anyway, and B is held in registers: 4 for
each row of a thread. Rows that have the same adapter, or none, are multiplied with A and B together, by matrix
instructions (`lora_nf4_triton_one_slot`), as many as are a tile of the matmul: up to 64. By the same estimate 0.4 us a
site at 16 rows and 0.6 at 64, where more of h is read: 2.5 % of a step of 16 rows at its limit of 2.03 ms and 2 % of
one of 64 (3.95 ms), where shrink and expand, launched dependently, are 9 % and 4.5 %. What that costs the matmul are
registers: 168 instead of 136 at 16 rows, still three programs on a multiprocessor, and 255 instead of 179 at 64, still
two (compiled for sm_90).

Graph-safe and deterministic as `nf4_triton` and `lora_triton` are. Base rows are those of the
matmul alone, bit for bit; adapted ones differ from those of three launches by the order in which h is added up.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import torch
import triton
from torch import Tensor

from .lora_nf4_triton_kernel import lora_gemm_kernel
from .lora_nf4_triton_one_slot import one_slot_lora_gemm_kernel
from .nf4_dispatch import GemmTile
from .nf4_triton import MAX_TILES, arrivals, weight_arguments
from .overlap import launches_dependently

# Rows up to which each reads its A and B for itself, whether or not they have the same.
_MOST_APART: Final = 4
# Rows of B that are held, and of A that a program takes.
_TILE_RANKS: Final = 16
# Columns of A at a time, 16 KiB of it, and where they meet all rows; and into how many parts they are split at most.
_TILE_K: Final = 512
_ONE_SLOT_TILE_K: Final = 64
_MAX_SPLITS: Final = 14
# Of a thread, by the rows of a tile: four programs of 128 threads share a multiprocessor, or three, as many as the
# matmul's splits are chosen for.
_MAX_REGISTERS: Final = {8: 128, 16: 168}


def can_fuse(num_rows: int, tile: GemmTile, slice_widths: Sequence[int]) -> bool:
    """Whether `nf4_lora_gemm` knows a matmul's work divided by `tile`: one tile of rows, tiles within slices."""
    return (
        0 < num_rows <= tile.rows
        and sum(slice_widths) <= tile.columns * MAX_TILES
        and all(width % tile.columns == 0 for width in slice_widths)
    )


def nf4_lora_gemm(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    tile: GemmTile,
    arena: Tensor,
    slot_offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    slice_widths: Sequence[int],
    seg_weights: Tensor | None = None,
    one_slot: bool = False,
) -> Tensor:
    """See `lora_nf4.nf4_lora_linear`; the matmul's work divided by `tile`, which `can_fuse` has accepted."""
    num_rows, in_features = x.shape
    out_features = sum(slice_widths)
    y = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    num_tiles = out_features // tile.columns
    weight = weight_arguments(x, absmax, code_map, tile)
    splits = weight.num_splits
    share = _TILE_K if tile.rows <= 16 else 2 * _TILE_K  # of more rows, more is read of h for each split
    shares = triton.cdiv(in_features, share)
    split_k = triton.cdiv(shares, min(shares, _MAX_SPLITS)) * share
    h_splits = triton.cdiv(in_features, split_k)
    one_slot = one_slot and num_rows > _MOST_APART
    num_shrinks = h_splits * (1 if one_slot else num_rows) * triton.cdiv(max_rank, _TILE_RANKS)
    kernel = one_slot_lora_gemm_kernel if one_slot else lora_gemm_kernel
    counters = arrivals(x.device)
    dependent = launches_dependently(x.device)
    kernel[(num_shrinks + num_tiles * splits,)](
        y,
        weight.pairs,
        codes,
        weight.absmax,
        code_map,
        scales,
        offsets,
        bias,
        weight.table,
        y.new_empty(num_tiles * splits * tile.rows * tile.columns, dtype=torch.float32) if splits > 1 else None,
        counters,
        counters[MAX_TILES:],
        y.new_empty((h_splits, num_rows, max_rank), dtype=torch.float32),
        x,
        arena,
        slot_offsets,
        ranks,
        seg_starts,
        seg_slots,
        seg_weights,
        num_rows,
        num_shrinks,
        seg_slots.shape[0],
        max_rank,
        out_features,
        in_features // 2,
        weight.pairs.stride(0),
        x.stride(0),
        ranks.stride(0),
        ranks.stride(1),
        **weight.constants,
        NUM_TILES=num_tiles,
        PADDED_TILES=triton.next_power_of_2(num_tiles),
        SLICE_WIDTHS=tuple(slice_widths),
        SLICE_COLUMNS=(0, *accumulate(slice_widths)),
        NUM_SLICES=len(slice_widths),
        LORA_ROWS=max(16, tile.rows) if one_slot else triton.next_power_of_2(num_rows),
        TILE_RANKS=_TILE_RANKS,
        TILE_K=_ONE_SLOT_TILE_K if one_slot else _TILE_K,
        SPLIT_K=split_k,
        H_SPLITS=h_splits,
        PADDED_SEGMENTS=max(16, triton.next_power_of_2(seg_slots.shape[0] + 1)),
        DEPENDENT=dependent,
        num_warps=tile.warps,
        maxnreg=_MAX_REGISTERS.get(tile.rows),
        launch_pdl=dependent,
    )
    return y
