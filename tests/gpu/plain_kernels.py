"""Every operator of Lorikeet computed by its plain reference in its place, whatever thread calls it.

The references loop and read tables back to the host: for small models, and not while a graph is captured.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lorikeet.kernels import activation, attention, lora, lora_nf4, norm, rope  # noqa: F401, they define the operators
from lorikeet.kernels.activation import silu_and_mul_reference
from lorikeet.kernels.attention_reference import kv_write_reference_, paged_attention_reference
from lorikeet.kernels.lora_reference import lora_affine_reference_, lora_expand_reference_, lora_shrink_reference
from lorikeet.kernels.nf4 import nf4_linear_reference
from lorikeet.kernels.nf4_weight import NestedAbsmax, NF4Weight
from lorikeet.kernels.norm import rms_norm_reference
from lorikeet.kernels.rope import rope_reference
from torch import Tensor

NAMESPACE = "lorikeet"


@contextmanager
def plain_kernels(device: torch.device) -> Iterator[Counter[str]]:
    """Meanwhile operators on that device's type are their references; how often each was called."""
    calls: Counter[str] = Counter()

    def counted(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return reference(*args, **kwargs)

        return call

    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library(NAMESPACE, "IMPL"))
        for name, reference in REFERENCES.items():
            library.impl(name, counted(name, reference), device.type.upper(), allow_override=True)
        if device.type == "cpu":
            # Eager calls on a CPU leave the dispatcher out, but for this.
            stack.enter_context(patch("torch.compiler.is_compiling", lambda: True))
        yield calls


def operators() -> set[str]:
    """Names of all operators that there are."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(f"{NAMESPACE}::").split(".")[0] for name in names if name.startswith(f"{NAMESPACE}::")}


def _nf4_weight(
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    in_features: int,
) -> NF4Weight:
    out_features = 2 * codes.numel() // in_features
    if code_map is None or scales is None or offsets is None:
        return NF4Weight(codes, absmax, out_features, in_features)
    nested = NestedAbsmax(absmax, code_map, scales, offsets, one_offset=False)
    return NF4Weight(codes, nested, out_features, in_features)


def _nf4_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    one_offset: bool,
    bias: Tensor | None = None,
) -> Tensor:
    weight = _nf4_weight(codes, absmax, code_map, scales, offsets, x.shape[1])
    return nf4_linear_reference(x, weight, bias).to(x.dtype)


def _nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    in_features: int,
    first_row: int,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = _nf4_weight(codes, absmax, code_map, scales, offsets, in_features)
    return weight.dequantize(dtype)[first_row : first_row + num_rows].clone()


def _lora_shrink(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    seg_weights: Tensor | None = None,
) -> Tensor:
    tables = offsets, ranks, seg_starts, seg_slots
    return lora_shrink_reference(x, arena, *tables, max_rank, seg_weights).unsqueeze(0)


def _lora_expand_(
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
    if affines is not None:
        lora_affine_reference_(y, arena, affines, seg_starts, seg_slots)
    tables = offsets, ranks, seg_starts, seg_slots
    lora_expand_reference_(y, h.sum(dim=0), arena, *tables, slice_widths, in_features)


def _nf4_lora_linear(
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
    tables = slot_offsets, ranks, seg_starts, seg_slots
    y = _nf4_linear(x, codes, absmax, code_map, scales, offsets, sum(slice_widths), one_offset, bias)
    h = lora_shrink_reference(x, arena, *tables, max_rank, seg_weights)
    lora_expand_reference_(y, h, arena, *tables, slice_widths, x.shape[1])
    return y


def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    tables = query_starts, context_lens, block_tables
    return paged_attention_reference(q, k_cache, v_cache, *tables, scale, window, softcap).to(q.dtype)


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    total = x if residual is None else x + residual
    return rms_norm_reference(total if rows is None else total[rows], weight, eps)


def _add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_reference(residual.add_(x), weight, eps)


def _rope_kv_write_(
    qkv: Tensor,
    rotations: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    head_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    num_kv_heads, head_dim = k_cache.shape[0], k_cache.shape[3]
    heads = qkv.unflatten(1, (-1, head_dim))
    norms = [None] * heads.shape[1] if head_norm is None else [*head_norm]
    num_rotated = heads.shape[1] - num_kv_heads
    rotated = [rope_reference(heads[:, i], rotations, norms[i], eps).to(qkv.dtype) for i in range(num_rotated)]
    num_queries = num_rotated - num_kv_heads
    heads[:, :num_queries] = torch.stack(rotated[:num_queries], dim=1)
    kv_write_reference_(torch.stack(rotated[num_queries:], dim=1), heads[:, num_rotated:], k_cache, v_cache, kv_slots)


REFERENCES = {
    "kv_write_": kv_write_reference_,
    "paged_attention": _paged_attention,
    "nf4_linear": _nf4_linear,
    "nf4_dequantize": _nf4_dequantize,
    "lora_shrink": _lora_shrink,
    "lora_expand_": _lora_expand_,
    "lora_affine_": lora_affine_reference_,
    "nf4_lora_linear": _nf4_lora_linear,
    "rms_norm": _rms_norm,
    "add_rms_norm_": _add_rms_norm_,
    "rope_kv_write_": _rope_kv_write_,
    "silu_and_mul": silu_and_mul_reference,
}
