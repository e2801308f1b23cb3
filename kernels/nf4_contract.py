"""What the NF4 operators ask of their tensors; `nf4` says what each one means."""

import torch
from torch import Tensor

from .contract import check
from .nf4_weight import BLOCK, GROUP


def check_weight(
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    in_features: int,
) -> None:
    """Raises RuntimeError where the tensors of a weight break the contract of the operators of `nf4`."""
    check(in_features % BLOCK == 0, lambda: f"in_features must be a multiple of {BLOCK}, got {in_features}")
    check(
        codes.dtype == torch.uint8 and codes.dim() == 1 and codes.is_contiguous(),
        lambda: f"codes must be flat and contiguous uint8, got {codes.dtype} {list(codes.shape)}",
    )
    nested = code_map is not None and scales is not None and offsets is not None
    check(
        nested or (code_map is None and scales is None and offsets is None),
        lambda: "code_map, scales and offsets go together",
    )
    dtype = torch.uint8 if nested else torch.float32
    num_blocks = 2 * codes.shape[0] // BLOCK
    check(
        absmax.dtype == dtype and absmax.shape == (num_blocks,) and absmax.is_contiguous(),
        lambda: f"absmax must be {dtype} [{num_blocks}], contiguous, got {absmax.dtype} {list(absmax.shape)}",
    )
    num_groups = -(-num_blocks // GROUP)
    _check_table("code_map", code_map, GROUP)
    _check_table("scales", scales, num_groups)
    _check_table("offsets", offsets, num_groups)


def _check_table(name: str, table: Tensor | None, size: int) -> None:
    if table is not None:
        check(
            table.dtype == torch.float32 and table.shape == (size,) and table.is_contiguous(),
            lambda: f"{name} must be float32 [{size}], contiguous, got {table.dtype} {list(table.shape)}",
        )


def check_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    bias: Tensor | None,
) -> None:
    """Raises RuntimeError where arguments of `torch.ops.lorikeet.nf4_linear` break its contract."""
    check(x.dim() == 2 and x.dtype.is_floating_point, lambda: f"x must be floating [T, in], got {list(x.shape)}")
    check_weight(codes, absmax, code_map, scales, offsets, x.shape[1])
    check(
        2 * codes.shape[0] == out_features * x.shape[1],
        lambda: (
            f"codes of {out_features} x {x.shape[1]} weights must be {out_features * x.shape[1] // 2} bytes,"
            f" got {codes.shape[0]}"
        ),
    )
    check(
        bias is None or (bias.shape == (out_features,) and bias.dtype == x.dtype),
        lambda: f"bias must be {x.dtype} [{out_features}]",
    )
