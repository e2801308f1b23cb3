"""LoRA shrink, expand and affine in Triton, for CUDA.

A program owns a tile of rows of one segment, so that an adapter's weights are read once a tile and rows of different
adapters never meet; the segment-wise scheme is Punica's SGMV (arXiv 2310.18547). What differs: ranks are exact (a
program reads its slot's ranks and masks or leaves), all slices of a site share a launch, weights lie in one flat arena
instead of padded stacks, and the input width is split without a launch that adds the parts up: expand does.

Graph-safe: grids depend on shapes and Python ints alone, everything else is read on the device, nothing waits for it. A
graph captured with one adapter replays right with others as long as `max_rank` was large enough for all of them. Run
the captured shapes once before, so that no kernel is compiled and loaded during the capture.
Deterministic: the parts of a split input width are added in a fixed order, without atomics.

**Where the time of a decode goes** (estimated from bytes and launches, not measured). Llama-3-8B has 128 sites. At
batch 1 an adapter of rank 16 is 84 MB a step, 28 us at 3 TB/s: 1 % of a base step of 2.5 ms. Its 256 launches are what
costs: a kernel in a graph takes about 1 us to start and, as small as these, 1.5 us to run, nearly all of it a chain of
dependent loads (tables; ranks and offset; weights). Run one after the other that is 20 %. Against that:
- With few rows the base's matmul does all of it (`lora_nf4_triton`), and these kernels run for what that can't: gains
  and offsets, sites that are not NF4, slices that don't fill its tiles.
- No third launch: the parts of a split shrink are added by expand (each of its programs reads at most 16 x 16 floats a
  row), gains and offsets are applied by expand too. A chain of three loads, tables loaded before they are needed.
- Shrink does not need y: on a side stream it runs beside the base's matmul (`overlap`), which leaves half of the
  bandwidth unused, so that its bytes are free too. What remains is expand, and the join of the streams.
- Or, in one stream, dependent launches: both kernels start early and have their weights in registers when what they
  wait for ends. That leaves two waits of about 0.7 us for each site, 0.2 ms a step.
Which of the two is faster from how many rows on is to be measured.
At batch 16 and 64 with as many adapters the bytes dominate, 42 and 168 MB for each layer. Tiles of one row
are 16 KiB a program, loaded at once, 4 to 8 programs on a multiprocessor: more than the 18 KB in flight that 3 TB/s at
800 ns take.
Prefill is bound by y, which expand reads and writes: 0.7 GB a layer for 4,096 rows, 0.24 ms at 3 TB/s beside about 3 ms
of the base's matmuls.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
from torch import Tensor

from .lora_tiles import MAX_DECODE_ROWS, ExpandTiles, ShrinkTiles, expand_tiles, shrink_tiles
from .lora_triton_affine import affine_kernel
from .lora_triton_expand import expand_kernel
from .lora_triton_shrink import shrink_kernel
from .overlap import launches_dependently, lora_runs_beside

# Affine needs no tl.dot: few rows, since segments are short, and more where they share the loads of gains and offsets.
_AFFINE_DECODE_ROWS = 4
_AFFINE_PREFILL_ROWS = 8
_AFFINE_BYTES = 2048  # of a row of y that a program owns


def lora_shrink(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    seg_weights: Tensor | None = None,
    tiles: ShrinkTiles | None = None,
) -> Tensor:
    """See `lora.lora_shrink`.

    `tiles` overrides how the work is divided.
    """
    num_tokens, in_features = x.shape
    num_segments = seg_slots.shape[0]
    if tiles is None:
        tiles = shrink_tiles(num_tokens, in_features, max_rank, x.element_size())
    out = torch.empty((tiles.num_splits, num_tokens, max_rank), dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return out
    dependent = _dependent(x)
    # One segment more than there are: the rows behind the last one, whose h is zero like that of base rows.
    grid = triton.cdiv(max_rank, tiles.ranks) * tiles.num_splits, num_tokens // tiles.rows + num_segments + 1
    shrink_kernel[grid](
        out,
        x,
        arena,
        offsets,
        ranks,
        seg_starts,
        seg_slots,
        seg_weights,
        num_tokens,
        num_segments,
        in_features,
        max_rank,
        x.stride(0),
        ranks.stride(0),
        ranks.stride(1),
        NUM_SLICES=ranks.shape[1],
        NUM_SPLITS=tiles.num_splits,
        TILE_ROWS=tiles.rows,
        TILE_RANKS=tiles.ranks,
        ROW_K=tiles.row_k,
        DOT_K=tiles.dot_k,
        SPLIT_K=tiles.split_k,
        PADDED_SEGMENTS=_padded(num_segments + 1),
        DEPENDENT=dependent,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        launch_pdl=dependent,
    )
    return out


def lora_expand_(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    slice_widths: Sequence[int],
    in_features: int,
    affines: Tensor | None = None,
    tiles: ExpandTiles | None = None,
) -> None:
    """See `lora.lora_expand_`. h is rounded to the arena's dtype, as PEFT's lora_A does, y once at the end.

    `tiles` overrides how the work is divided.
    """
    num_tokens = y.shape[0]
    num_segments = seg_slots.shape[0]
    if num_tokens == 0 or num_segments == 0:
        return
    if tiles is None:
        tiles = expand_tiles(num_tokens, y.element_size())
    dependent = _dependent(y)
    tile_ends = list(accumulate(triton.cdiv(width, tiles.columns) for width in slice_widths))
    expand_kernel[(tile_ends[-1], num_tokens // tiles.rows + num_segments)](
        y,
        h,
        arena,
        offsets,
        ranks,
        affines,
        seg_starts,
        seg_slots,
        num_tokens,
        num_segments,
        in_features,
        y.stride(0),
        h.stride(1),
        h.stride(0),
        ranks.stride(0),
        ranks.stride(1),
        SLICE_WIDTHS=tuple(slice_widths),
        SLICE_COLUMNS=(0, *accumulate(slice_widths)),
        SLICE_TILES=(0, *tile_ends),
        NUM_SLICES=len(slice_widths),
        NUM_SPLITS=h.shape[0],
        PADDED_SPLITS=triton.next_power_of_2(h.shape[0]),
        ROWS_APART=tiles.rows_apart,
        TILE_ROWS=tiles.rows,
        TILE_COLUMNS=tiles.columns,
        TILE_RANKS=tiles.ranks,
        PADDED_SEGMENTS=_padded(num_segments + 1),
        DEPENDENT=dependent,
        num_warps=tiles.num_warps,
        num_stages=1,  # ranks are few: a pipeline would take registers and shared memory, and have nothing to do
        launch_pdl=dependent,
    )


def lora_affine_(y: Tensor, arena: Tensor, offsets: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    """See `lora.lora_affine_`."""
    num_tokens, width = y.shape
    num_segments = seg_slots.shape[0]
    if num_tokens == 0 or num_segments == 0:
        return
    tile_rows = _AFFINE_DECODE_ROWS if num_tokens <= MAX_DECODE_ROWS else _AFFINE_PREFILL_ROWS
    tile_columns = _AFFINE_BYTES // y.element_size()
    affine_kernel[(num_tokens // tile_rows + num_segments, triton.cdiv(width, tile_columns))](
        y,
        arena,
        offsets,
        seg_starts,
        seg_slots,
        num_tokens,
        num_segments,
        width,
        y.stride(0),
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        PADDED_SEGMENTS=_padded(num_segments + 1),
        num_warps=4,
    )


def _dependent(x: Tensor) -> bool:
    return launches_dependently(x.device) and not lora_runs_beside(x.shape[0])


def _padded(num_segments: int) -> int:
    """Few different values, since each compiles a kernel of its own; 128 are one for each thread."""
    return max(128, triton.next_power_of_2(num_segments))
