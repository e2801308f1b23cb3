"""Tables that turn NF4 codes into weights, and the PTX that looks eight of them up with byte permutes.

The sixteen NF4 values are held times a constant c, and the product is divided by c once, in fp32. c is free, so it was
scanned (in steps of 1/8192, over [1, 4)) for the table whose rounded values are best: for bfloat16 the largest relative
error is 0.0021, where rounding the values as they are (c = 1) gives 0.0031; for float16 0.00025 instead of 0.00033.

`prmt` d, a, b, s picks for each nibble of s[15:0] one of the eight bytes of (b, a) by the nibble's low three bits;
where its bit 3 is set, all bits of the result are the picked byte's bit 7 instead. A 16-bit value needs two bytes, high
and low, of sixteen entries each, so of a nibble's eight-entry halves one always gives such a replica. With P from the
entries 0 to 7 by nibbles n, and Q from the entries 8 to 15 by n ^ 8:

- m = prmt of bytes 0x7F, doubled: 0xFE where n < 8, 0x00 where n >= 8.
- high = P ^ Q ^ m. Entries 0 to 7 (all negative) are stored xor 0xFE, so that no table byte has its bit 7 set and the
  replicas are zero; m puts the sign back.
- low = m ? P : Q by bits. Bit 0 of an entry below 8 thus comes from a replica: it is bit 7 of the low byte of the entry
  8 above. Tables are rounded under that condition, which the errors above include.

Instructions for a weight, counted in SASS for sm_90 (Triton 3.7.1): `prmt` 7/4 PRMT + 2/4 LOP3 + 1/4 add, and for
eight codes one LOP3 and two shifts to get the selectors: 2.9. `gather` is one load from shared memory, where Triton
puts the table, an address for it, and what it takes to unpack codes and carry weights to the layout of the matrix
product, through shared memory too: 5.6. The whole matmul comes to 4.4 and 7.1 at 8 rows.

All of this file is plain Python: Triton sees only its results.
"""

from functools import cache
from typing import Final

import torch
from torch import Tensor

# As in bitsandbytes' `get_4bit_type("nf4")`, to the bit in fp32.
NF4_VALUES: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# c for each dtype of activations. fp32 is exact as it is, and has no byte permutes.
TABLE_FACTORS: Final = {torch.bfloat16: 2.654052734375, torch.float16: 2.6663818359375, torch.float32: 1.0}


@cache
def table_bits(dtype: torch.dtype) -> tuple[int, ...]:
    """The table of a 16-bit dtype as bit patterns, rounded under the condition of the byte permutes."""
    scaled = torch.tensor(NF4_VALUES, dtype=torch.float64) * TABLE_FACTORS[dtype]
    nearest = [int(v) & 0xFFFF for v in scaled.to(dtype).view(torch.int16)]
    for code in range(8):
        wanted = nearest[code + 8] >> 7 & 1
        if nearest[code] & 1 != wanted:
            around = (nearest[code] - 1, nearest[code] + 1)
            nearest[code] = min(around, key=lambda bits: abs(_value(bits, dtype) - float(scaled[code])))
    nearest[7] |= 0x8000  # minus zero: the entries below 8 share their sign
    return tuple(nearest)


@cache
def value_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table itself, [16] in `dtype`, on the device. Made by the first call, which must not be inside a capture."""
    if dtype == torch.float32:
        return torch.tensor(NF4_VALUES, dtype=dtype, device=device)
    signed = [bits - (bits >> 15 << 16) for bits in table_bits(dtype)]
    return torch.tensor(signed, dtype=torch.int16).view(dtype).to(device)


@cache
def permute_words(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The words that `permute_ptx` takes as operands, each 32 times over: int32 [5, 32], on the device.

    `prmt` takes one constant, the other must be in a register; constants that the assembler knows it moves there anew
    for every use, so they are loaded instead.
    """
    words = [0x7F7F7F7F, *(low for low, _ in _halves(dtype))]
    signed = torch.tensor([w - (w >> 31 << 32) for w in words], dtype=torch.int32)
    return signed[:, None].expand(-1, 32).contiguous().to(device)


@cache
def permute_ptx(dtype: torch.dtype) -> str:
    """PTX for `tl.inline_asm_elementwise` with `pack=4`.

    Operands: $0, $1 the weights of four high nibbles and $2, $3 of four low nibbles, two a register; $4 four bytes of
    codes; the words of `permute_words`, each four times, since operands are those of four elements: $5, $9 to $21.
    """
    high_below, high_above, low_below, low_above = (f"0x{high:08x}" for _, high in _halves(dtype))
    lines = ["{", ".reg .b32 s, t, m, p, q, h, l;"]
    for half in range(2):
        # s: the selectors of entries 0 to 7, t: of entries 8 to 15.
        lines += [
            "shr.u32 s, $4, 16;" if half else "mov.b32 s, $4;",
            "shr.u32 t, t, 16;" if half else "xor.b32 t, s, 0x88888888;",
            "prmt.b32 m, $5, 0x7f7f7f7f, s;",
            "add.u32 m, m, m;",
            f"prmt.b32 p, $9, {high_below}, s;",
            f"prmt.b32 q, $13, {high_above}, t;",
            "lop3.b32 h, p, q, m, 0x96;",  # p ^ q ^ m
            f"prmt.b32 p, $17, {low_below}, s;",
            f"prmt.b32 q, $21, {low_above}, t;",
            "lop3.b32 l, m, p, q, 0xca;",  # m ? p : q
            # Of the four nibbles, 1 and 3 are the high ones of their bytes.
            f"prmt.b32 ${half}, l, h, 0x7351;",
            f"prmt.b32 ${2 + half}, l, h, 0x6240;",
        ]
    return "\n".join([*lines, "}"])


# Four outputs (written before all inputs are read: &), the codes, and five words for each of the four elements.
PERMUTE_CONSTRAINTS: Final = ",".join(["=&r"] * 4 + ["r"] * (1 + 5 * 4))


@cache
def _halves(dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """(first four, last four) bytes of the four tables: high bytes of entries 0-7 and 8-15, then low bytes."""
    bits = table_bits(dtype)
    high, low = [b >> 8 for b in bits], [b & 0xFF for b in bits]
    tables = ([b ^ 0xFE for b in high[:8]], high[8:], low[:8], low[8:])
    return tuple((int.from_bytes(t[:4], "little"), int.from_bytes(t[4:], "little")) for t in tables)


def _value(bits: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(bits - (bits >> 15 << 16), dtype=torch.int16).view(dtype))
