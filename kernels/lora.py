"""LoRA over a mixed batch: y[t] += B_slot(t) (A_slot(t) x[t]), as two operators, shrink and expand.

What adapters do to y before that (DoRA, biases) is a third, affine: y[t] = y[t] * gain_slot(t) + offset_slot(t).

The rows of a step are ordered so that the rows of one adapter are beside each other. Running example: 3 base rows, then
5 rows of slot 4, then 2 of slot 0 -> `seg_starts` [0, 3, 8, 10], `seg_slots` [-1, 4, 0]. A slot may own several
segments, segments may be empty, and rows from seg_starts[-1] on (padding of a CUDA graph's batch) belong to nobody.

An adapter's matrices at one site are one block of the flat tensor `arena`, which starts at element `offsets[slot]`.
With input width K and slices s of rank r_s = `ranks[slot, s]` (0: not adapted) and width N_s it holds
    A of all slices stacked:  [r_0 + ... + r_{S-1}, K] row-major, then
    B_s^T of each slice:      [r_s, N_s] row-major, with the adapter's scaling folded in.

On a CPU the layers take `lora_site.LoraSite` instead of the first two, which does both for the rows of all segments.

Slot -1 is the base. The operators are registered as `torch.ops.lorikeet.lora_shrink`, `lora_expand_` and
`lora_affine_`; call them by the functions of this module.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import lora_cpu
from .lora_contract import check_affine, check_expand, check_shrink
from .lora_tiles import num_splits

torch.library.define(
    "lorikeet::lora_shrink",
    "(Tensor x, Tensor arena, Tensor offsets, Tensor ranks, Tensor seg_starts, Tensor seg_slots, int max_rank,"
    " Tensor? seg_weights=None) -> Tensor",
)
torch.library.define(
    "lorikeet::lora_expand_",
    "(Tensor(a!) y, Tensor h, Tensor arena, Tensor offsets, Tensor ranks, Tensor seg_starts, Tensor seg_slots,"
    " int[] slice_widths, int in_features, Tensor? affines=None) -> ()",
)
torch.library.define(
    "lorikeet::lora_affine_",
    "(Tensor(a!) y, Tensor arena, Tensor offsets, Tensor seg_starts, Tensor seg_slots) -> ()",
)


def lora_shrink(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    seg_weights: Tensor | None = None,
) -> Tensor:
    """Computes h = weight * A x for the rows of adapted segments.

    Args:
        x: [num_tokens, in_features], rows contiguous.
        arena: [num_elements], dtype of x.
        offsets: [max_slots], int64; of each slot's block at this site, in elements.
        ranks: [max_slots, num_slices], int32.
        seg_starts: [num_segments + 1], int32; starts with 0.
        seg_slots: [num_segments], int32.
        max_rank: at least the largest sum of slice ranks among the batch's slots; where a CUDA graph captures the call,
            among those of all batches that it will replay.
        seg_weights: [num_segments], float32, factor of each segment's h; those of base segments are not read. None: all
            are 1, at no cost.

    Returns:
        [num_splits, num_tokens, max_rank], float32, whose sum over the first dimension is h: columns [0, sum of the
        slot's ranks) of adapted rows, zeros elsewhere. Into how many parts the input width is split depends on the
        device and the shapes; `lora_expand_` adds them up, which saves a launch.

    Raises:
        RuntimeError: a tensor breaks this contract.
    """
    return torch.ops.lorikeet.lora_shrink.default(
        x, arena, offsets, ranks, seg_starts, seg_slots, max_rank, seg_weights
    )


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
) -> None:
    """Adds B h to y in place for the rows of adapted segments; no other row is read or written.

    With `affines` it does before what `lora_affine_` does, in the same launch. Everything is computed in float32; on
    CUDA y is rounded once at the end, on a CPU also between the two.

    Args:
        y: [num_tokens, sum of slice_widths], dtype of arena, rows contiguous.
        h: [num_splits, num_tokens, max_rank], float32, from `lora_shrink`.
        arena: as for `lora_shrink`, and so the next four.
        offsets: [max_slots], int64.
        ranks: [max_slots, num_slices], int32.
        seg_starts: [num_segments + 1], int32.
        seg_slots: [num_segments], int32.
        slice_widths: output width of each slice.
        in_features: input width of the site, which tells where B starts in a block.
        affines: the `offsets` of `lora_affine_`; None: no slot of the batch has gains and offsets at this site.

    Raises:
        RuntimeError: a tensor breaks this contract.
    """
    torch.ops.lorikeet.lora_expand_.default(
        y, h, arena, offsets, ranks, seg_starts, seg_slots, slice_widths, in_features, affines
    )


def lora_affine_(y: Tensor, arena: Tensor, offsets: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    """Scales and shifts y in place for the rows of segments whose slot asks for it; no other row is read or written.

    y[t] = y[t] * gain + offset, computed in float32 and rounded once. Before `lora_expand_` adds to the same rows.

    Args:
        y: [num_tokens, width], dtype of arena, rows contiguous.
        arena: [num_elements].
        offsets: [max_slots], int64; element of the arena where the slot's gains [width] start, with its offsets [width]
            behind them. -1: the slot has none at this site.
        seg_starts: [num_segments + 1], int32; as for `lora_shrink`.
        seg_slots: [num_segments], int32.

    Raises:
        RuntimeError: a tensor breaks this contract.
    """
    # On a CPU the dispatcher would take longer than the affine of a few rows.
    if y.is_cpu and not torch.compiler.is_compiling():
        check_affine(y, arena, offsets, seg_starts, seg_slots)
        lora_cpu.lora_affine_(y, arena, offsets, seg_starts, seg_slots)
        return
    torch.ops.lorikeet.lora_affine_.default(y, arena, offsets, seg_starts, seg_slots)


def _shrink_cpu(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    seg_weights: Tensor | None = None,
) -> Tensor:
    check_shrink(x, arena, offsets, ranks, seg_starts, seg_slots, seg_weights)
    return lora_cpu.lora_shrink(x, arena, offsets, ranks, seg_starts, seg_slots, max_rank, seg_weights).unsqueeze(0)


def _shrink_cuda(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    seg_weights: Tensor | None = None,
) -> Tensor:
    from . import lora_triton  # a CPU-only installation has no Triton

    check_shrink(x, arena, offsets, ranks, seg_starts, seg_slots, seg_weights)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments are on
        return lora_triton.lora_shrink(x, arena, offsets, ranks, seg_starts, seg_slots, max_rank, seg_weights)


def _shrink_fake(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    seg_weights: Tensor | None = None,
) -> Tensor:
    check_shrink(x, arena, offsets, ranks, seg_starts, seg_slots, seg_weights)
    splits = num_splits(x.shape[0], x.shape[1], max_rank, x.element_size()) if x.is_cuda else 1
    return x.new_empty((splits, x.shape[0], max_rank), dtype=torch.float32)


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
    affines: Tensor | None = None,
) -> None:
    check_expand(y, h, arena, offsets, ranks, seg_starts, seg_slots, slice_widths, affines)
    if affines is not None:
        lora_cpu.lora_affine_(y, arena, affines, seg_starts, seg_slots)
    h = h.sum(dim=0)
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
    affines: Tensor | None = None,
) -> None:
    from . import lora_triton

    check_expand(y, h, arena, offsets, ranks, seg_starts, seg_slots, slice_widths, affines)
    tables = (arena, offsets, ranks, seg_starts, seg_slots)
    with torch.cuda.device_of(y):
        lora_triton.lora_expand_(y, h, *tables, slice_widths, in_features, affines)


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
    affines: Tensor | None = None,
) -> None:
    check_expand(y, h, arena, offsets, ranks, seg_starts, seg_slots, slice_widths, affines)


def _affine_cpu_(y: Tensor, arena: Tensor, offsets: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    check_affine(y, arena, offsets, seg_starts, seg_slots)
    lora_cpu.lora_affine_(y, arena, offsets, seg_starts, seg_slots)


def _affine_cuda_(y: Tensor, arena: Tensor, offsets: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    from . import lora_triton

    check_affine(y, arena, offsets, seg_starts, seg_slots)
    with torch.cuda.device_of(y):
        lora_triton.lora_affine_(y, arena, offsets, seg_starts, seg_slots)


torch.library.impl("lorikeet::lora_shrink", "CPU", _shrink_cpu)
torch.library.impl("lorikeet::lora_shrink", "CUDA", _shrink_cuda)
torch.library.register_fake("lorikeet::lora_shrink", _shrink_fake)
torch.library.impl("lorikeet::lora_expand_", "CPU", _expand_cpu_)
torch.library.impl("lorikeet::lora_expand_", "CUDA", _expand_cuda_)
torch.library.register_fake("lorikeet::lora_expand_", _expand_fake_)
torch.library.impl("lorikeet::lora_affine_", "CPU", _affine_cpu_)
torch.library.impl("lorikeet::lora_affine_", "CUDA", _affine_cuda_)
torch.library.register_fake("lorikeet::lora_affine_", check_affine)
