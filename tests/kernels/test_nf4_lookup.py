"""The tables of NF4 values, and the PTX that looks them up, run by an emulator of the instructions that it uses."""

import random
import re

import bitsandbytes.functional as bnb
import pytest
import torch
from lorikeet.kernels.nf4_lookup import (
    NF4_VALUES,
    PERMUTE_CONSTRAINTS,
    TABLE_FACTORS,
    permute_ptx,
    permute_words,
    table_bits,
    value_table,
)

CPU = torch.device("cpu")
WORD = 2**32 - 1


def prmt(a: int, b: int, selector: int) -> int:
    """Default mode: bytes of (b, a); bit 3 of a selector nibble replicates the sign of the byte it names."""
    source = (b << 32 | a).to_bytes(8, "little")
    result = []
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = source[nibble & 7]
        result.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1 for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


def run_ptx(ptx: str, operands: dict[str, int]) -> dict[str, int]:
    registers = dict(operands)
    instructions = {
        "mov.b32": lambda a: a,
        "shr.u32": lambda a, n: a >> n,
        "xor.b32": lambda a, b: a ^ b,
        "add.u32": lambda a, b: a + b & WORD,
        "prmt.b32": prmt,
        "lop3.b32": lop3,
    }
    for line in ptx.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        name, target, *sources = re.findall(r"[^\s,;]+", line)
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = instructions[name](*values)
    return registers


def test_values_are_those_of_bitsandbytes():
    assert torch.equal(value_table(torch.float32, CPU), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.0022), (torch.float16, 0.00026)], ids=str)
def test_tables_are_within_the_stated_error_of_the_values(dtype, tolerance):
    values = torch.tensor(NF4_VALUES, dtype=torch.float64)
    table = value_table(dtype, CPU).double() / TABLE_FACTORS[dtype]
    assert table[7] == 0
    others = values != 0
    assert ((table - values)[others] / values[others]).abs().max() < tolerance
    plain = ((values.to(dtype).double() - values)[others] / values[others]).abs().max()
    assert plain > tolerance  # what rounding the values as they are would give


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_byte_permutes_give_the_table(dtype):
    """Operands as the constraints say: four outputs, a word of codes, five words each for four elements."""
    bits, ptx = table_bits(dtype), permute_ptx(dtype)
    words = permute_words(dtype, CPU)
    assert words.shape == (5, 32) and (words == words[:, :1]).all()
    assert PERMUTE_CONSTRAINTS.split(",") == ["=&r"] * 4 + ["r"] * 21
    constants = {f"${5 + 4 * i}": int(word) & WORD for i, word in enumerate(words[:, 0])}
    generator = random.Random(0)
    # Every code at every place, then random ones.
    nibbles = [[(i + j) % 16 for j in range(8)] for i in range(16)]
    nibbles += [[generator.randrange(16) for _ in range(8)] for _ in range(200)]
    for codes in nibbles:
        packed = bytes(codes[2 * i] << 4 | codes[2 * i + 1] for i in range(4))
        result = run_ptx(ptx, constants | {"$4": int.from_bytes(packed, "little")})
        even = [half for register in ("$0", "$1") for half in (result[register] & 0xFFFF, result[register] >> 16)]
        odd = [half for register in ("$2", "$3") for half in (result[register] & 0xFFFF, result[register] >> 16)]
        assert even == [bits[code] for code in codes[::2]]
        assert odd == [bits[code] for code in codes[1::2]]
