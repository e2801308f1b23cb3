"""LoRA over a mixed batch: y[t] += B_slot(t) (A_slot(t) x[t]), as two operators, shrink and expand.

The rows of a step are ordered so that the rows of one adapter are beside each other. Running example: 3 base rows, then
5 rows of slot 4, then 2 of slot 0 -> `seg_starts` [0, 3, 8, 10], `seg_slots` [-1, 4, 0]. A slot may own several
segments, segments may be empty, and rows from seg_starts[-1] on (padding of a CUDA graph's batch) belong to nobody.

An adapter's matrices at one site are one block of the flat tensor `arena`, which starts at element `offsets[slot]`.
With input width K and slices s of rank r_s = `ranks[slot, s]` (0: not adapted) and width N_s it holds
    A of all slices stacked:  [r_0 + ... + r_{S-1}, K] row-major, then
    B_s^T of each slice:      [r_s, N_s] row-major, with the adapter's scaling folded in.

Slot -1 is the base. The operators are registered as `torch.ops.lorikeet.lora_shrink` and `lora_expand_`; call them by
the functions of this module.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import lora_cpu
from .contract import check

torch.library.define(
    "lorikeet::lora_shrink",
    "(Tensor x, Tensor arena, Tensor offsets, Tensor ranks, Tensor seg_starts, Tensor seg_slots, int max_rank)"
    " -> Tensor",
)
torch.library.define(
    "lorikeet::lora_expand_",
    "(Tensor(a!) y, Tensor h, Tensor arena, Tensor offsets, Tensor ranks, Tensor seg_starts, Tensor seg_slots,"
    " int[] slice_widths, int in_features) -> ()",
)


def lora_shrink(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
) -> Tensor:
    """Computes h = A x for the rows of adapted segments.

    Args:
        x: [num_tokens, in_features], rows contiguous.
        arena: [num_elements], dtype of x.
        offsets: [max_slots], int64; of each slot's block at this site, in elements.
        ranks: [max_slots, num_slices], int32.
        seg_starts: [num_segments + 1], int32; starts with 0.
        seg_slots: [num_segments], int32.
        max_rank: at least the largest sum of slice ranks among the batch's slots; where a CUDA graph captures the call,
            among those of all batches that it will replay.

    Returns:
        [num_tokens, max_rank], float32: columns [0, sum of the slot's ranks) of adapted rows, zeros elsewhere.

    Raises:
        RuntimeError: a tensor breaks this contract.
    """
    # On a CPU the dispatcher and the checks would take 15 us of a call of 40, and plain torch can't corrupt memory.
    if x.is_cpu and not torch.compiler.is_compiling():
        return lora_cpu.lora_shrink(x, arena, offsets, ranks, seg_starts, seg_slots, max_rank)
    return torch.ops.lorikeet.lora_shrink.default(x, arena, offsets, ranks, seg_starts, seg_slots, max_rank)


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
) -> None:
    """Adds B h to y in place for the rows of adapted segments; no other row is read or written.

    Args:
        y: [num_tokens, sum of slice_widths], dtype of arena, rows contiguous.
        h: [num_tokens, max_rank], float32, from `lora_shrink`.
        arena: as for `lora_shrink`, and so the next four.
        offsets: [max_slots], int64.
        ranks: [max_slots, num_slices], int32.
        seg_starts: [num_segments + 1], int32.
        seg_slots: [num_segments], int32.
        slice_widths: output width of each slice.
        in_features: input width of the site, which tells where B starts in a block.

    Raises:
        RuntimeError: a tensor breaks this contract.
    """
    if y.is_cpu and not torch.compiler.is_compiling():
        lora_cpu.lora_expand_(y, h, arena, offsets, ranks, seg_starts, seg_slots, slice_widths, in_features)
        return
    torch.ops.lorikeet.lora_expand_.default(
        y, h, arena, offsets, ranks, seg_starts, seg_slots, slice_widths, in_features
    )


def _check_tables(arena: Tensor, offsets: Tensor, ranks: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    check(
        arena.dim() == 1 and arena.is_contiguous(),
        lambda: f"arena must be flat and contiguous, got {list(arena.shape)} with strides {list(arena.stride())}",
    )
    check(
        offsets.dtype == torch.int64 and offsets.dim() == 1,
        lambda: f"offsets must be int64 [max_slots], got {offsets.dtype} {list(offsets.shape)}",
    )
    check(
        ranks.dtype == torch.int32 and ranks.dim() == 2 and ranks.shape[0] == offsets.shape[0],
        lambda: f"ranks must be int32 [{offsets.shape[0]}, num_slices], got {ranks.dtype} {list(ranks.shape)}",
    )
    check(
        seg_slots.dtype == torch.int32 and seg_slots.dim() == 1,
        lambda: f"seg_slots must be int32 [num_segments], got {seg_slots.dtype} {list(seg_slots.shape)}",
    )
    check(
        seg_starts.dtype == torch.int32 and seg_starts.dim() == 1 and seg_starts.shape[0] == seg_slots.shape[0] + 1,
        lambda: f"seg_starts must be int32 [{seg_slots.shape[0] + 1}], got {seg_starts.dtype} {list(seg_starts.shape)}",
    )


def _check_rows(name: str, rows: Tensor, arena: Tensor) -> None:
    check(rows.dim() == 2, lambda: f"{name} must have two dimensions, got {list(rows.shape)}")
    check(rows.dtype == arena.dtype, lambda: f"{name} must be {arena.dtype} like arena, got {rows.dtype}")
    check(rows.stride(1) == 1, lambda: f"{name} must have contiguous rows, got strides {list(rows.stride())}")


def _check_expand(y: Tensor, h: Tensor, arena: Tensor, ranks: Tensor, slice_widths: Sequence[int]) -> None:
    _check_rows("y", y, arena)
    check(
        len(slice_widths) == ranks.shape[1] and sum(slice_widths) == y.shape[1],
        lambda: (
            f"slice_widths must be {ranks.shape[1]} widths that add up to {y.shape[1]} columns of y,"
            f" got {list(slice_widths)}"
        ),
    )
    check(
        h.dtype == torch.float32 and h.dim() == 2 and h.shape[0] == y.shape[0] and h.stride(1) == 1,
        lambda: f"h must be float32 [{y.shape[0]}, max_rank] with contiguous rows, got {h.dtype} {list(h.shape)}",
    )


def _shrink_cpu(
    x: Tensor, arena: Tensor, offsets: Tensor, ranks: Tensor, seg_starts: Tensor, seg_slots: Tensor, max_rank: int
) -> Tensor:
    _check_tables(arena, offsets, ranks, seg_starts, seg_slots)
    _check_rows("x", x, arena)
    return lora_cpu.lora_shrink(x, arena, offsets, ranks, seg_starts, seg_slots, max_rank)


def _shrink_cuda(
    x: Tensor, arena: Tensor, offsets: Tensor, ranks: Tensor, seg_starts: Tensor, seg_slots: Tensor, max_rank: int
) -> Tensor:
    from . import lora_triton  # a CPU-only installation has no Triton

    _check_tables(arena, offsets, ranks, seg_starts, seg_slots)
    _check_rows("x", x, arena)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments are on
        return lora_triton.lora_shrink(x, arena, offsets, ranks, seg_starts, seg_slots, max_rank)


def _shrink_fake(
    x: Tensor, arena: Tensor, offsets: Tensor, ranks: Tensor, seg_starts: Tensor, seg_slots: Tensor, max_rank: int
) -> Tensor:
    _check_tables(arena, offsets, ranks, seg_starts, seg_slots)
    _check_rows("x", x, arena)
    return x.new_empty((x.shape[0], max_rank), dtype=torch.float32)


def _expand_cpu_(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    slice_widths: Sequence[int],
    in_features: int,
) -> None:
    _check_tables(arena, offsets, ranks, seg_starts, seg_slots)
    _check_expand(y, h, arena, ranks, slice_widths)
    lora_cpu.lora_expand_(y, h, arena, offsets, ranks, seg_starts, seg_slots, slice_widths, in_features)


def _expand_cuda_(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    slice_widths: Sequence[int],
    in_features: int,
) -> None:
    from . import lora_triton

    _check_tables(arena, offsets, ranks, seg_starts, seg_slots)
    _check_expand(y, h, arena, ranks, slice_widths)
    with torch.cuda.device_of(y):
        lora_triton.lora_expand_(y, h, arena, offsets, ranks, seg_starts, seg_slots, slice_widths, in_features)


def _expand_fake_(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    slice_widths: Sequence[int],
    in_features: int,
) -> None:
    _check_tables(arena, offsets, ranks, seg_starts, seg_slots)
    _check_expand(y, h, arena, ranks, slice_widths)


torch.library.impl("lorikeet::lora_shrink", "CPU", _shrink_cpu)
torch.library.impl("lorikeet::lora_shrink", "CUDA", _shrink_cuda)
torch.library.register_fake("lorikeet::lora_shrink", _shrink_fake)
torch.library.impl("lorikeet::lora_expand_", "CPU", _expand_cpu_)
torch.library.impl("lorikeet::lora_expand_", "CUDA", _expand_cuda_)
torch.library.register_fake("lorikeet::lora_expand_", _expand_fake_)
