"""What the LoRA operators ask of their tensors; `lora` says what each one means."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import check


def check_shrink(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    seg_weights: Tensor | None,
) -> None:
    """Raises RuntimeError where arguments of `lora.lora_shrink` break its contract."""
    _check_tables(arena, offsets, seg_starts, seg_slots)
    _check_ranks(ranks, offsets)
    _check_rows("x", x, arena)
    if seg_weights is not None:
        check(
            seg_weights.dtype == torch.float32 and seg_weights.shape == seg_slots.shape,
            lambda: (
                f"seg_weights must be float32 [{seg_slots.shape[0]}], got {seg_weights.dtype} {list(seg_weights.shape)}"
            ),
        )


def check_expand(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    slice_widths: Sequence[int],
    affines: Tensor | None,
) -> None:
    """Raises RuntimeError where arguments of `lora.lora_expand_` break its contract."""
    _check_tables(arena, offsets, seg_starts, seg_slots)
    _check_ranks(ranks, offsets)
    _check_rows("y", y, arena)
    check(
        len(slice_widths) == ranks.shape[1] and sum(slice_widths) == y.shape[1],
        lambda: (
            f"slice_widths must be {ranks.shape[1]} widths that add up to {y.shape[1]} columns of y,"
            f" got {list(slice_widths)}"
        ),
    )
    check(
        h.dtype == torch.float32 and h.dim() == 3 and h.shape[1] == y.shape[0] and h.stride(2) == 1,
        lambda: (
            f"h must be float32 [num_splits, {y.shape[0]}, max_rank] with contiguous rows, got {h.dtype}"
            f" {list(h.shape)}"
        ),
    )
    if affines is not None:
        check(
            affines.dtype == torch.int64 and affines.shape == offsets.shape,
            lambda: f"affines must be int64 {list(offsets.shape)}, got {affines.dtype} {list(affines.shape)}",
        )


def check_affine(y: Tensor, arena: Tensor, offsets: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    """Raises RuntimeError where arguments of `lora.lora_affine_` break its contract."""
    _check_tables(arena, offsets, seg_starts, seg_slots)
    _check_rows("y", y, arena)


def _check_tables(arena: Tensor, offsets: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    check(
        arena.dim() == 1 and arena.is_contiguous(),
        lambda: f"arena must be flat and contiguous, got {list(arena.shape)} with strides {list(arena.stride())}",
    )
    check(
        offsets.dtype == torch.int64 and offsets.dim() == 1,
        lambda: f"offsets must be int64 [max_slots], got {offsets.dtype} {list(offsets.shape)}",
    )
    check(
        seg_slots.dtype == torch.int32 and seg_slots.dim() == 1,
        lambda: f"seg_slots must be int32 [num_segments], got {seg_slots.dtype} {list(seg_slots.shape)}",
    )
    check(
        seg_starts.dtype == torch.int32 and seg_starts.dim() == 1 and seg_starts.shape[0] == seg_slots.shape[0] + 1,
        lambda: f"seg_starts must be int32 [{seg_slots.shape[0] + 1}], got {seg_starts.dtype} {list(seg_starts.shape)}",
    )


def _check_ranks(ranks: Tensor, offsets: Tensor) -> None:
    check(
        ranks.dtype == torch.int32 and ranks.dim() == 2 and ranks.shape[0] == offsets.shape[0],
        lambda: f"ranks must be int32 [{offsets.shape[0]}, num_slices], got {ranks.dtype} {list(ranks.shape)}",
    )


def _check_rows(name: str, rows: Tensor, arena: Tensor) -> None:
    check(rows.dim() == 2, lambda: f"{name} must have two dimensions, got {list(rows.shape)}")
    check(rows.dtype == arena.dtype, lambda: f"{name} must be {arena.dtype} like arena, got {rows.dtype}")
    check(rows.stride(1) == 1, lambda: f"{name} must have contiguous rows, got strides {list(rows.stride())}")
