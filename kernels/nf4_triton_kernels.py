"""The Triton kernels over NF4 weights: the matmul and the dequantization; `nf4_triton` launches them.

Weights lie as bitsandbytes packs them: row-major, two codes a byte, the even column in the high nibble; a constant for
each 64 columns. The constants are read in place, in the form they have (see `nf4_weight.NestedAbsmax`).
"""
# ruff: noqa: ANN001, ANN201, ANN202 -- triton.jit reads annotations, and has none for pointers
# mypy: ignore-errors

import triton
import triton.language as tl

from .nf4_lookup import PERMUTE_CONSTRAINTS
from .overlap_triton import begin, wait

_CONSTRAINTS = tl.constexpr(PERMUTE_CONSTRAINTS)
# Columns of an NF4 block, bytes that they take, and constants that share a second-level scale and offset.
_BLOCK = tl.constexpr(64)
_BYTES = tl.constexpr(32)
_GROUP = tl.constexpr(256)
# NF4 blocks that one step of the matmul's loop takes: 128 bytes of each row, and a word of nested constants.
_STEP = tl.constexpr(4)


@triton.jit
def _load_absmax(absmax_ptr, map_ptr, scales_ptr, offsets_ptr, blocks):
    """Constants of the blocks with these numbers: float32, computed as bitsandbytes does."""
    absmax = tl.load(absmax_ptr + blocks)
    if map_ptr is not None:
        group = blocks // _GROUP
        absmax = tl.load(map_ptr + absmax.to(tl.int32)) * tl.load(scales_ptr + group) + tl.load(offsets_ptr + group)
    return absmax


@triton.jit
def _look_up(codes, table, w0, w1, w2, w3, w4, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of the high and of the low nibbles of `codes` [rows, 32], each in DTYPE and of its shape.

    By `table` [16], or where there is PTX by that and its operands `w0` to `w4`, [1, 32] with a word in all places.
    """
    if PTX == "":
        high = tl.gather(table, tl.reshape((codes >> 4).to(tl.int32), [codes.numel]), 0)
        low = tl.gather(table, tl.reshape((codes & 0xF).to(tl.int32), [codes.numel]), 0)
        high, low = tl.reshape(high, codes.shape), tl.reshape(low, codes.shape)
    else:
        high, low = tl.inline_asm_elementwise(
            PTX, _CONSTRAINTS, [codes, w0, w1, w2, w3, w4], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
        )
        high, low = high.to(DTYPE, bitcast=True), low.to(DTYPE, bitcast=True)
    return high, low


@triton.jit
def multiply_tile(
    pairs_ptr,
    codes_ptr,
    absmax_ptr,
    map_ptr,
    scales_ptr,
    offsets_ptr,
    table_ptr,
    rows,
    columns,
    split,
    num_rows,
    out_features,
    row_bytes,
    pairs_stride,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN_STEPS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Returns x[rows] @ w[columns]^T over the split's columns of w, times TABLE_FACTOR: fp32 [TILE_ROWS, TILE_COLUMNS].

    Every value of x arrives with its neighbour as one integer of twice the size (`pairs`), so that the columns of high
    and of low nibbles come apart without a strided load; each half is a product of its own. The product of an NF4 block
    is scaled as a whole, in fp32. `map_ptr` is None where constants are not nested.
    """
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    HALF: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    row_mask = rows < num_rows
    # Past the end the last row of w is read again and nothing is stored.
    w_rows = tl.minimum(columns, out_features - 1)
    num_blocks = row_bytes // _BYTES

    num_steps = tl.cdiv(num_blocks, _STEP)
    steps_per_split = tl.cdiv(num_steps, NUM_SPLITS)
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, num_steps)

    # Words in every column, not as scalars: the compiler carries them to the layout of the codes as it does those, and
    # the assembler keeps them in registers instead of moving them there for every use.
    table, w0, w1, w2, w3, w4 = 0, 0, 0, 0, 0, 0
    if PTX == "":
        table = tl.load(table_ptr + tl.arange(0, 16))
    else:
        lane_ptr = table_ptr + tl.arange(0, _BYTES)[None, :]
        w0, w1, w2 = tl.load(lane_ptr), tl.load(lane_ptr + 32), tl.load(lane_ptr + 64)
        w3, w4 = tl.load(lane_ptr + 96), tl.load(lane_ptr + 128)

    byte = tl.arange(0, _BYTES)
    codes_ptrs = codes_ptr + w_rows.to(tl.int64)[:, None] * row_bytes + byte[None, :]
    pairs_ptrs = pairs_ptr + rows.to(tl.int64)[:, None] * pairs_stride + byte[None, :]
    block_rows = w_rows * num_blocks
    # y^T = w x^T for 8 rows, since the second operand of a matrix instruction may have 8 columns and the first has 16
    # rows or more; and for 64, where Hopper's own instructions are worth it, which take only their first operand, w,
    # from registers. Between them y = x w^T keeps clear of those: x would go through shared memory and barriers.
    WEIGHT_FIRST: tl.constexpr = TILE_ROWS < 16 or TILE_ROWS > 32
    if WEIGHT_FIRST:
        acc = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
    else:
        acc = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)

    wait(DEPENDENT)
    for step in tl.range(first, last, num_stages=NUM_STAGES):
        if WORDS:
            word = tl.load(absmax_ptr + block_rows // _STEP + step)
            group = (block_rows + step * _STEP) // _GROUP
            scale = tl.load(scales_ptr + group)
            offset = tl.load(offsets_ptr + group)
        for b in tl.static_range(_STEP):
            block = step * _STEP + b
            x_mask = row_mask[:, None]
            if not EVEN_STEPS:
                # Past the end, x is zero and the last block of w is read again.
                x_mask = x_mask & (block < num_blocks)
                block = tl.minimum(block, num_blocks - 1)
            pairs = tl.load(pairs_ptrs + block * _BYTES, mask=x_mask, other=0)
            codes = tl.load(codes_ptrs + block * _BYTES)
            if WORDS:
                absmax = tl.load(map_ptr + ((word >> (8 * b)) & 0xFF)) * scale + offset
            else:
                absmax = _load_absmax(absmax_ptr, map_ptr, scales_ptr, offsets_ptr, block_rows + block)
            w_even, w_odd = _look_up(codes, table, w0, w1, w2, w3, w4, PTX, DTYPE)
            x_even = pairs.to(HALF).to(DTYPE, bitcast=True)
            x_odd = (pairs >> BITS).to(HALF).to(DTYPE, bitcast=True)
            if WEIGHT_FIRST:
                part = tl.dot(w_even, tl.trans(x_even), input_precision="ieee")
                part = tl.dot(w_odd, tl.trans(x_odd), part, input_precision="ieee")
                acc += part * absmax[:, None]
            else:
                part = tl.dot(x_even, tl.trans(w_even), input_precision="ieee")
                part = tl.dot(x_odd, tl.trans(w_odd), part, input_precision="ieee")
                acc += part * absmax[None, :]

    if WEIGHT_FIRST:
        acc = tl.trans(acc)
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def gemm_kernel(
    y_ptr,
    pairs_ptr,
    codes_ptr,
    absmax_ptr,
    map_ptr,
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    table_ptr,
    partials_ptr,
    arrivals_ptr,
    num_rows,
    out_features,
    row_bytes,
    pairs_stride,
    TABLE_FACTOR: tl.constexpr,
    PTX: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN_STEPS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] w[n, k], + bias[n].

    Grid: (row tiles x column tiles, splits of the columns of w); programs that share a tile of w are beside each other.
    Where splits are added, each program writes its part, and the last one of a tile to arrive adds them in the order of
    the splits: which program that is does not change a bit of the result. It leaves the tile's counter at zero for the
    next launch.

    `map_ptr` is None where constants are not nested, `bias_ptr` where there is none.
    """
    begin(DEPENDENT)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    num_row_tiles = tl.cdiv(num_rows, TILE_ROWS)
    tile = tl.program_id(0)
    rows = (tile % num_row_tiles) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = (tile // num_row_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    split = tl.program_id(1)
    acc = multiply_tile(
        pairs_ptr, codes_ptr, absmax_ptr, map_ptr, scales_ptr, offsets_ptr, table_ptr, rows, columns, split, num_rows,
        out_features, row_bytes, pairs_stride, DTYPE, PTX, WORDS, EVEN_STEPS, TILE_ROWS, TILE_COLUMNS, NUM_SPLITS,
        NUM_STAGES, DEPENDENT,
    )  # fmt: skip
    if NUM_SPLITS > 1:
        parts_ptrs = store_part(partials_ptr, acc, tile, split, TILE_ROWS, TILE_COLUMNS, NUM_SPLITS)
        arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived < NUM_SPLITS - 1:
            return
        tl.store(arrivals_ptr + tile, 0)
        acc = add_parts(parts_ptrs, TILE_ROWS, TILE_COLUMNS, NUM_SPLITS)
    acc *= 1.0 / TABLE_FACTOR
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + tl.minimum(columns, out_features - 1)).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    tl.store(y_ptrs, acc.to(DTYPE), mask=(rows < num_rows)[:, None] & (columns < out_features)[None, :])


@triton.jit
def store_part(
    partials_ptr,
    acc,
    tile,
    split,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """Write a split's part of a tile where all threads have done so when it returns; pointers to the first part."""
    inner = tl.arange(0, TILE_ROWS)[:, None] * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    parts_ptrs = partials_ptr + tile.to(tl.int64) * (NUM_SPLITS * TILE_ROWS * TILE_COLUMNS) + inner
    tl.store(parts_ptrs + split * (TILE_ROWS * TILE_COLUMNS), acc)
    tl.debug_barrier()  # all threads have stored before one of them tells it
    return parts_ptrs


@triton.jit
def add_parts(parts_ptrs, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """The sum of all parts of a tile."""
    acc = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for s in tl.static_range(NUM_SPLITS):
        # From L2, where the other programs' parts are; this multiprocessor's own cache knows nothing of them.
        acc += tl.load(parts_ptrs + s * (TILE_ROWS * TILE_COLUMNS), cache_modifier=".cg")
    return acc


@triton.jit(do_not_specialize=["first_block", "num_blocks"])
def dequantize_kernel(
    out_ptr,
    codes_ptr,
    absmax_ptr,
    map_ptr,
    scales_ptr,
    offsets_ptr,
    table_ptr,
    first_block,
    num_blocks,
    TILE_BLOCKS: tl.constexpr,
):
    """out[i] = table[code i] * absmax of its block, in fp32 and rounded once: bitsandbytes' values, bit for bit.

    Grid: tiles of the `num_blocks` blocks of the weight from `first_block` on. `out` holds 64 values for each, `table`
    is float32 [16]. Must be compiled without fused multiply-adds, which would round constants once instead of twice.
    """
    blocks = tl.program_id(0).to(tl.int64) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    mask = blocks < num_blocks
    w_blocks = first_block + tl.minimum(blocks, num_blocks - 1)
    absmax = _load_absmax(absmax_ptr, map_ptr, scales_ptr, offsets_ptr, w_blocks)
    byte = tl.arange(0, _BYTES)
    codes = tl.load(codes_ptr + w_blocks[:, None] * _BYTES + byte[None, :], eviction_policy="evict_first")
    table = tl.load(table_ptr + tl.arange(0, 16))
    even, odd = _look_up(codes, table, 0, 0, 0, 0, 0, "", tl.float32)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    even = (even * absmax[:, None]).to(DTYPE)
    odd = (odd * absmax[:, None]).to(DTYPE)
    values = tl.reshape(tl.join(even, odd), [TILE_BLOCKS, _BLOCK])
    column = tl.arange(0, _BLOCK)
    tl.store(out_ptr + blocks[:, None] * _BLOCK + column[None, :], values, mask=mask[:, None])
