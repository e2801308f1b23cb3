"""Rotary position embedding of queries and keys, and the write of keys and values to the paged cache, as one operator.

The operator is `lorikeet::rope_kv_write_`. A head x of width D with halves (low, high) at a position with angles a
becomes

    low'  = low  * cos(a) - high * sin(a)
    high' = high * cos(a) + low  * sin(a)

which is transformers' `rotate_half` layout (RoFormer, arXiv 2104.09864; 5.23 `apply_rotary_pos_emb`). cos and sin are
transformers' values, computed in fp32 and rounded to the model's dtype. The products are added in fp32 and rounded
once; plain torch, on a CPU without a library of kernels, rounds twice and transformers three times.

Where a family normalizes each head first (Qwen3), `head_norm` has the weights and the norm is that of `norm.rms_norm`.

This file owns schema, contract, the CPU implementation (C++, or plain torch where there is no library) and the
reference; CUDA's is in `rope_triton`. Called on the step thread, once a layer; `rotation_table` once at the start.
"""

import torch
from torch import Tensor

from .attention_cpu import kv_write_
from .contract import refuse
from .native.functions import ADDRESS, COUNT, NUMBER, REAL, TYPE_NUMBERS, function
from .norm import rms_norm_reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Positions that are computed at a time, which bounds the temporary memory of a long table.
_TABLE_PIECE = 1 << 14

_ROTATE = (
    "lorikeet_rope_kv_write",
    NUMBER,
    *(ADDRESS, COUNT),
    *(ADDRESS, ADDRESS, ADDRESS, ADDRESS),
    *(ADDRESS, REAL),
    *(COUNT, COUNT, COUNT, COUNT, COUNT),
    NUMBER,
)
_rotate = function(*_ROTATE)
_rotate_briefly = function(*_ROTATE, brief=True)
# Elements up to which a call takes some 100 us at most.
_BRIEF = 1 << 16

torch.library.define(
    "lorikeet::rope_kv_write_",
    "(Tensor(a!) qkv, Tensor rotations, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor kv_slots,"
    " Tensor? head_norm=None, float eps=0.0) -> ()",
)


def rotation_table(inverse_frequencies: Tensor, scaling: float, length: int, dtype: torch.dtype) -> Tensor:
    """The rotations of positions 0 to length - 1, as `rope_kv_write_` takes them after an `index_select`.

    Args:
        inverse_frequencies: float32 [head_dim / 2], of transformers' rotary embedding.
        scaling: factor on cos and sin.
        length: positions.
        dtype: the model's.

    Returns:
        [length, 3, head_dim / 2] in `dtype` on the device of the frequencies: cos, -sin, sin.
    """
    device = inverse_frequencies.device
    table = torch.empty((length, 3, inverse_frequencies.shape[0]), dtype=dtype, device=device)
    for start in range(0, length, _TABLE_PIECE):
        stop = min(start + _TABLE_PIECE, length)
        positions = torch.arange(start, stop, device=device)
        angles = positions.float()[:, None] * inverse_frequencies.float()
        sin = angles.sin() * scaling
        table[start:stop, 0] = angles.cos() * scaling
        table[start:stop, 1] = -sin
        table[start:stop, 2] = sin
    return table


def rope_kv_write_(
    qkv: Tensor,
    rotations: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    head_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotates the queries in place, and writes rotated keys and the values of a step's tokens into the cache.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], float32, bfloat16 or float16, rows contiguous:
            queries, keys and values as the stacked projection gives them. Mutated: the queries are rotated, what the
            columns of the keys hold afterwards is undefined.
        rotations: [num_tokens, 3, head_dim / 2], dtype of `qkv`, contiguous: rows of `rotation_table`.
        k_cache: [num_kv_heads, num_blocks, block_size, head_dim], contiguous, dtype of `qkv`. Mutated.
        v_cache: as `k_cache`. Mutated.
        kv_slots: int64 [num_tokens], block * block_size + offset in the block, all different; -1: nothing is written.
        head_norm: [num_heads + num_kv_heads, head_dim], dtype of `qkv`, contiguous: weights of the RMS norm of each
            query and key head before it is rotated; None: there is none.
        eps: of that norm.

    Raises:
        RuntimeError: a shape, dtype or layout is not as above.
    """
    # On a CPU the dispatcher is left out, as in `norm.rms_norm`.
    if qkv.is_cpu and not torch.compiler.is_compiling():
        _rope_kv_write_cpu_(qkv, rotations, k_cache, v_cache, kv_slots, head_norm, eps)
    else:
        torch.ops.lorikeet.rope_kv_write_.default(qkv, rotations, k_cache, v_cache, kv_slots, head_norm, eps)


def rope_reference(x: Tensor, rotations: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Norm, where there is a weight, and rotation of one head, as transformers writes them; the oracle of the tests.

    Args:
        x: [num_tokens, head_dim].
        rotations: [num_tokens, 3, head_dim / 2].
        weight: [head_dim].
        eps: of the norm.

    Returns:
        [num_tokens, head_dim], float32: not rounded after the rotation.
    """
    x = (x if weight is None else rms_norm_reference(x, weight, eps)).float()
    cos, sin = rotations[:, 0].repeat(1, 2).float(), rotations[:, 2].repeat(1, 2).float()
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _rope_kv_write_plainly_(
    qkv: Tensor,
    rotations: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    head_norm: Tensor | None,
    eps: float,
) -> None:
    num_kv_heads, head_dim = k_cache.shape[0], k_cache.shape[3]
    num_tokens, num_all_heads = qkv.shape[0], qkv.shape[1] // head_dim
    heads = qkv.view(num_tokens, num_all_heads, head_dim)
    rotated = heads[:, :-num_kv_heads]
    if head_norm is not None:
        rotated.copy_(rms_norm_reference(rotated, head_norm, eps))
    # Queries and keys at once: (low, high) * (cos, cos) + (high, low) * (-sin, sin).
    halves = rotated.view(num_tokens, num_all_heads - num_kv_heads, 2, head_dim // 2)
    swapped = halves.roll(1, 2)
    halves.mul_(rotations[:, None, :1]).addcmul_(swapped, rotations[:, None, 1:])
    kv_write_(heads[:, -2 * num_kv_heads : -num_kv_heads], heads[:, -num_kv_heads:], k_cache, v_cache, kv_slots)


def check_rotation(
    qkv: Tensor,
    rotations: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    head_norm: Tensor | None,
) -> None:
    """Raises RuntimeError where arguments of `rope_kv_write_` break its contract."""
    dtype, cache_shape = qkv.dtype, k_cache.shape
    if dtype not in _FLOATS:
        refuse(f"expected float32, bfloat16 or float16, got {dtype}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if len(cache_shape) != 4 or cache.shape != cache_shape or cache.dtype != dtype or not cache.is_contiguous():
            refuse(
                f"{name} must be {dtype} [num_kv_heads, num_blocks, block_size, head_dim], contiguous,"
                f" got {cache.dtype} {list(cache.shape)}, strides {list(cache.stride())}"
            )
    num_kv_heads, _, _, head_dim = cache_shape
    if head_dim % 2 != 0:
        refuse(f"head_dim must be even, got {head_dim}")
    if (
        qkv.dim() != 2
        or qkv.stride(1) != 1
        or qkv.shape[1] % head_dim != 0
        or qkv.shape[1] // head_dim <= 2 * num_kv_heads
    ):
        refuse(
            f"qkv must be [num_tokens, (num_heads + {2 * num_kv_heads}) * {head_dim}] with contiguous rows,"
            f" got {list(qkv.shape)}, strides {list(qkv.stride())}"
        )
    num_tokens, width = qkv.shape
    if rotations.shape != (num_tokens, 3, head_dim // 2) or rotations.dtype != dtype or not rotations.is_contiguous():
        refuse(
            f"rotations must be {dtype} {[num_tokens, 3, head_dim // 2]}, contiguous,"
            f" got {rotations.dtype} {list(rotations.shape)}"
        )
    if kv_slots.dtype != torch.int64 or kv_slots.shape != (num_tokens,) or not kv_slots.is_contiguous():
        refuse(f"kv_slots must be int64 [{num_tokens}], got {kv_slots.dtype} {list(kv_slots.shape)}")
    if head_norm is not None:
        shape = (width // head_dim - num_kv_heads, head_dim)
        if head_norm.shape != shape or head_norm.dtype != dtype or not head_norm.is_contiguous():
            refuse(
                f"head_norm must be {dtype} {list(shape)}, contiguous, got {head_norm.dtype} {list(head_norm.shape)}"
            )


def _rope_kv_write_cpu_(
    qkv: Tensor,
    rotations: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    head_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    check_rotation(qkv, rotations, k_cache, v_cache, kv_slots, head_norm)
    rotate = _rotate_briefly if qkv.numel() <= _BRIEF else _rotate
    if rotate is None:
        _rope_kv_write_plainly_(qkv, rotations, k_cache, v_cache, kv_slots, head_norm, eps)
        return
    num_tokens, width = qkv.shape
    num_kv_heads, num_blocks, block_size, head_dim = k_cache.shape
    rotate(
        TYPE_NUMBERS[qkv.dtype],
        qkv.data_ptr(),
        qkv.stride(0),
        rotations.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        kv_slots.data_ptr(),
        None if head_norm is None else head_norm.data_ptr(),
        eps,
        num_tokens,
        width // head_dim - 2 * num_kv_heads,
        num_kv_heads,
        head_dim,
        num_blocks * block_size,
        torch.get_num_threads(),
    )


def _rope_kv_write_cuda_(
    qkv: Tensor,
    rotations: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    head_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    from . import rope_triton  # CPU-only installs have no Triton

    check_rotation(qkv, rotations, k_cache, v_cache, kv_slots, head_norm)
    with torch.cuda.device_of(qkv):  # Triton launches on the current device, whatever its arguments are on
        rope_triton.rope_kv_write_(qkv, rotations, k_cache, v_cache, kv_slots, head_norm, eps)


def _rope_kv_write_fake_(
    qkv: Tensor,
    rotations: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    head_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    check_rotation(qkv, rotations, k_cache, v_cache, kv_slots, head_norm)


torch.library.impl("lorikeet::rope_kv_write_", "CPU", _rope_kv_write_cpu_)
torch.library.impl("lorikeet::rope_kv_write_", "CUDA", _rope_kv_write_cuda_)
torch.library.register_fake("lorikeet::rope_kv_write_", _rope_kv_write_fake_)
