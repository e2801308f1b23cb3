"""NF4 linear with LoRA as one operator: y = x . dequant(W)^T + bias, then y[t] += B_slot(t) (A_slot(t) x[t]).

On CUDA decodes of few rows, or of more that share an adapter, take one launch where the matmul allows it
(`lora_nf4_triton`); everything else is
`nf4.nf4_linear`, `lora.lora_shrink` and `lora.lora_expand_` one after the other. Registered as
`torch.ops.lorikeet.nf4_lora_linear`; call it by `nf4_lora_linear`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import lora
from .contract import check
from .lora_contract import check_shrink
from .nf4 import has_one_offset, tensors_of, way_of
from .nf4_contract import check_linear
from .nf4_dispatch import GemmTile
from .nf4_weight import NF4Weight

torch.library.define(
    "lorikeet::nf4_lora_linear",
    "(Tensor x, Tensor codes, Tensor absmax, Tensor? code_map, Tensor? scales, Tensor? offsets, bool one_offset,"
    " Tensor? bias, Tensor arena, Tensor slot_offsets, Tensor ranks, Tensor seg_starts, Tensor seg_slots, int max_rank,"
    " int[] slice_widths, Tensor? seg_weights=None, bool one_slot=False) -> Tensor",
)


def nf4_lora_linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
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
    """Compute x . W^T + bias, and the deltas of the rows that have an adapter.

    Args:
        x: [T, in_features], compute dtype, on the device of all the others.
        weight: out_features x in_features, as checkpoints have it.
        bias: [out_features] in x's dtype, or None.
        arena, slot_offsets, ranks, seg_starts, seg_slots, max_rank, seg_weights: as of `lora.lora_shrink`.
        slice_widths: output width of each slice; together out_features.
        one_slot: all segments have the same slot or -1, which then may be computed faster.

    Returns:
        [T, out_features] in x's dtype: of the matmul's result, rounded, plus the delta, rounded again. Rows without an
        adapter are the matmul's own.

    Raises:
        RuntimeError: a tensor breaks this contract.
    """
    return torch.ops.lorikeet.nf4_lora_linear.default(
        x, *tensors_of(weight), has_one_offset(weight), bias, arena, slot_offsets, ranks, seg_starts, seg_slots,
        max_rank, slice_widths, seg_weights, one_slot,
    )  # fmt: skip


def is_one_launch(x: Tensor, weight: NF4Weight, slice_widths: Sequence[int]) -> bool:
    """Whether `nf4_lora_linear` launches one kernel for this; arguments as there. On a CPU there is nothing to launch.

    If not, whoever calls the parts one by one may run them beside each other.
    """
    return not x.is_cuda or _fused_way(x, slice_widths, has_one_offset(weight)) is not None


def _fused_way(x: Tensor, slice_widths: Sequence[int], one_offset: bool) -> GemmTile | None:
    """How a matmul that does LoRA, too, divides its work; None: it can't."""
    from . import lora_nf4_triton  # a CPU-only installation has no Triton

    way = way_of(x, sum(slice_widths), one_offset)
    fits = isinstance(way, GemmTile) and lora_nf4_triton.can_fuse(x.shape[0], way, slice_widths)
    return way if isinstance(way, GemmTile) and fits else None


def _check(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    one_offset: bool,
    bias: Tensor | None,
    arena: Tensor,
    slot_offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    slice_widths: Sequence[int],
    seg_weights: Tensor | None = None,
) -> None:
    check_linear(x, codes, absmax, code_map, scales, offsets, sum(slice_widths), bias)
    check_shrink(x, arena, slot_offsets, ranks, seg_starts, seg_slots, seg_weights)
    check(
        len(slice_widths) == ranks.shape[1],
        lambda: f"slice_widths must be {ranks.shape[1]} widths, got {list(slice_widths)}",
    )


def _one_by_one(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    one_offset: bool,
    bias: Tensor | None,
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
    weight = (codes, absmax, code_map, scales, offsets)
    y: Tensor = torch.ops.lorikeet.nf4_linear.default(x, *weight, sum(slice_widths), one_offset, bias)
    tables = (arena, slot_offsets, ranks, seg_starts, seg_slots)
    h = lora.lora_shrink(x, *tables, max_rank, seg_weights)
    lora.lora_expand_(y, h, *tables, slice_widths, x.shape[1])
    return y


def _cuda(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    one_offset: bool,
    bias: Tensor | None,
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
    from . import lora_nf4_triton  # a CPU-only installation has no Triton

    way = _fused_way(x, slice_widths, one_offset)
    weight = (codes, absmax, code_map, scales, offsets)
    if way is None or not max_rank:
        return _one_by_one(
            x, *weight, one_offset, bias, arena, slot_offsets, ranks, seg_starts, seg_slots, max_rank, slice_widths,
            seg_weights,
        )  # fmt: skip
    _check(
        x, *weight, one_offset, bias, arena, slot_offsets, ranks, seg_starts, seg_slots, max_rank, slice_widths,
        seg_weights,
    )  # fmt: skip
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments are on
        return lora_nf4_triton.nf4_lora_gemm(
            x, *weight, bias, way, arena, slot_offsets, ranks, seg_starts, seg_slots, max_rank, slice_widths,
            seg_weights, one_slot,
        )  # fmt: skip


def _fake(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    one_offset: bool,
    bias: Tensor | None,
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
    weight = (codes, absmax, code_map, scales, offsets)
    _check(
        x, *weight, one_offset, bias, arena, slot_offsets, ranks, seg_starts, seg_slots, max_rank, slice_widths,
        seg_weights,
    )  # fmt: skip
    return x.new_empty((x.shape[0], sum(slice_widths)))


torch.library.impl("lorikeet::nf4_lora_linear", "CPU", _one_by_one)
torch.library.impl("lorikeet::nf4_lora_linear", "CUDA", _cuda)
torch.library.register_fake("lorikeet::nf4_lora_linear", _fake)
