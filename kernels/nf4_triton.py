"""NF4 matmul and dequantization in Triton, for CUDA.

The matmul decodes weights in registers, in the layout of the matrix instructions, straight out of the asynchronous
copies that bring codes and constants in; nothing 16-bit is written anywhere. With few rows the instructions of the
decoding are what limits it: 4.4 in all for a weight at up to 16 rows (`nf4_lookup` counts them), where an H100 can
issue 4.6 for each weight that its memory delivers. The table of 16 values is rounded to the dtype of x; products of a
block of 64 are added and scaled in fp32. The copies carry no eviction hint, since Triton 3.7 drops it from them.

Graph-safe: grids depend on shapes alone, nothing is read by the host. Deterministic, also where the input width is
split: see `gemm_kernel`. Run the captured shapes once before, so that nothing is compiled, loaded or made during the
capture. Matmuls of one device must not overlap one another: their splits are counted in one place.
"""

from functools import cache
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .nf4_dispatch import GemmTile
from .nf4_lookup import TABLE_FACTORS, permute_ptx, permute_words, value_table
from .nf4_triton_kernels import dequantize_kernel, gemm_kernel
from .nf4_weight import BLOCK
from .overlap import launches_dependently

_STEP: Final = 256  # columns of the matmul's loop
MAX_TILES: Final = 4096  # that splits are counted for; more fill a GPU without being split
_TILE_BLOCKS: Final = 32
# What is dequantized at once, in weights: 64 MiB in 16 bit, about what an H100's L2 cache holds.
_SCRATCH_WEIGHTS: Final = 2**25


def nf4_gemm(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    bias: Tensor | None,
    tile: GemmTile,
) -> Tensor:
    """See `nf4.nf4_linear`; the weight as in `torch.ops.lorikeet.nf4_linear`, the work divided by `tile`."""
    num_rows, in_features = x.shape
    y = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    num_tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(out_features, tile.columns)
    if num_tiles > MAX_TILES:
        tile = tile._replace(splits=1)
    weight = weight_arguments(x, absmax, code_map, tile)
    splits = weight.num_splits
    dependent = launches_dependently(x.device)
    gemm_kernel[(num_tiles, splits)](
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
        arrivals(x.device) if splits > 1 else None,
        num_rows,
        out_features,
        in_features // 2,
        weight.pairs.stride(0),
        **weight.constants,
        DEPENDENT=dependent,
        num_warps=tile.warps,
        launch_pdl=dependent,
    )
    return y


class WeightArguments(NamedTuple):
    """How the matmul kernels take x and a weight.

    Attributes:
        pairs: x, every two columns as one integer.
        absmax: as bytes, or where they can be read so, as words of four.
        table: that codes are looked up in.
        num_splits: programs that share the weight's columns.
        constants: of the kernel.
    """

    pairs: Tensor
    absmax: Tensor
    table: Tensor
    num_splits: int
    constants: dict[str, Any]


def weight_arguments(x: Tensor, absmax: Tensor, code_map: Tensor | None, tile: GemmTile) -> WeightArguments:
    """What the matmul kernels are given of x [rows, in_features] and a weight's constants, for a tile."""
    in_features = x.shape[1]
    splits = min(tile.splits, triton.cdiv(in_features, _STEP))
    even_steps = in_features % _STEP == 0
    words = even_steps and code_map is not None and absmax.storage_offset() % 4 == 0
    permuted = tile.lookup == "prmt"
    constants = {
        "TABLE_FACTOR": TABLE_FACTORS[x.dtype],
        "PTX": permute_ptx(x.dtype) if permuted else "",
        "WORDS": words,
        "EVEN_STEPS": even_steps,
        "TILE_ROWS": tile.rows,
        "TILE_COLUMNS": tile.columns,
        "NUM_SPLITS": splits,
        "NUM_STAGES": tile.stages,
    }
    return WeightArguments(
        _as_pairs(x),
        absmax.view(torch.int32) if words else absmax,
        permute_words(x.dtype, x.device) if permuted else value_table(x.dtype, x.device),
        splits,
        constants,
    )


def nf4_dequantize_(
    out: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    first_row: int,
) -> None:
    """Rows [first_row, first_row + out.shape[0]) of a weight, written to `out` [rows, in_features], contiguous.

    The values are bitsandbytes' own, bit for bit, in float16, bfloat16 or float32.
    """
    num_blocks = out.numel() // BLOCK
    dequantize_kernel[(triton.cdiv(num_blocks, _TILE_BLOCKS),)](
        out,
        codes,
        absmax,
        code_map,
        scales,
        offsets,
        value_table(torch.float32, out.device),
        first_row * out.shape[1] // BLOCK,
        num_blocks,
        TILE_BLOCKS=_TILE_BLOCKS,
        num_warps=4,
        enable_fp_fusion=False,
    )


def nf4_dequantized_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """See `nf4.nf4_linear`: a piece of the weight is dequantized into scratch memory, then multiplied; and so on.

    The scratch memory is one piece of at most `_SCRATCH_WEIGHTS` weights: 64 MiB in 16 bit.
    """
    in_features = x.shape[1]
    num_pieces = triton.cdiv(out_features * in_features, _SCRATCH_WEIGHTS)
    piece = triton.cdiv(out_features, num_pieces)
    scratch = x.new_empty((piece, in_features))
    if num_pieces == 1:
        nf4_dequantize_(scratch, codes, absmax, code_map, scales, offsets, 0)
        return F.linear(x, scratch, bias)
    y = x.new_empty((x.shape[0], out_features))
    for start in range(0, out_features, piece):
        rows = scratch[: min(piece, out_features - start)]
        nf4_dequantize_(rows, codes, absmax, code_map, scales, offsets, start)
        part = y[:, start : start + rows.shape[0]]
        if bias is None:
            torch.mm(x, rows.t(), out=part)
        else:
            torch.addmm(bias[start : start + rows.shape[0]], x, rows.t(), out=part)
    return y


def _as_pairs(x: Tensor) -> Tensor:
    """Every two columns of x as one integer: [rows, in_features / 2]."""
    if x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2:
        x = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)  # contiguous() may return x itself
    return x.view(torch.int32 if x.element_size() == 2 else torch.int64)


@cache
def arrivals(device: torch.device) -> Tensor:
    """Counters of the programs that have added their part to a tile, and one more; zero between launches."""
    return torch.zeros(MAX_TILES + 1, dtype=torch.int32, device=device)
