"""Compiles Triton kernels for a GPU that is not there, with the arguments that their launchers give them.

A script, because Triton decides between compiler and interpreter for good when it is imported:
`compile_offline.py CAPABILITY`, for example 90, prints one JSON object for each kernel: its name, its shared memory in
bytes, the widths in bytes of its asynchronous copies from global to shared memory, the bits of its widest load from
global memory, registers of a thread, bytes of its stack (spilled registers), and how often it waits for the kernels
before it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from lorikeet.kernels import (
    activation_triton,
    attention_triton,
    kv_write_triton,
    lora_nf4_triton,
    lora_triton,
    nf4_triton,
    norm_triton,
    overlap,
    rope_triton,
)
from lorikeet.kernels.nf4_dispatch import GemmTile
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    triton.runtime.driver.set_active(driver)
    compile_only = JITFunction.run

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        kernel = compile_only(self, *args, **{**kwargs, "warmup": True})
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*, 0x([0-9a-f]+), ", kernel.asm["ptx"])
        loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
        registers, stack = resources(kernel.asm["cubin"])
        report = {
            "name": self.fn.__name__,
            "shared": kernel.metadata.shared,
            "copy_widths": sorted({int(width, 16) for width in copies}),
            "widest_load": max((int(count or 1) * int(bits) for count, bits in loads), default=0),
            "registers": registers,
            "stack": stack,
            "waits": kernel.asm["ptx"].count("griddepcontrol.wait"),
        }
        print(json.dumps(report), flush=True)

    JITFunction.run = run
    lora(512, torch.bfloat16)
    # What differs from a kernel further down in waiting only is compiled there.
    lora(64, torch.float32)
    fused(torch.float32)
    # Decodes, long chunks, and chunks so short that their contexts are split.
    for max_query_len in (1, 100, 16):
        attention(max_query_len)
    nf4_matmul((GemmTile(16, 128, 2, 4, 3), GemmTile(64, 64, 1, 4, 3)))
    nf4_triton.nf4_dequantize_(torch.empty(512, 4096, dtype=torch.bfloat16), *nf4_weight(512, 4096), 0)
    # As in a graph whose kernels start before those in front of them have ended.
    overlap.switches.lora_side_stream = False
    fused_modules = (norm_triton, rope_triton, activation_triton)
    for module in (lora_triton, attention_triton, nf4_triton, lora_nf4_triton, *fused_modules):
        module.launches_dependently = lambda device: True
    fused(torch.bfloat16)
    lora(64, torch.bfloat16)
    attention(1)
    nf4_matmul((GemmTile(8, 64, 4, 4, 4), GemmTile(32, 128, 1, 4, 3)))
    nf4_lora(1, GemmTile(8, 64, 4, 4, 4), None)
    nf4_lora(4, GemmTile(8, 64, 1, 4, 4), torch.ones(4))
    nf4_lora(16, GemmTile(16, 128, 2, 4, 3), torch.ones(16), one_slot=True)
    nf4_lora(64, GemmTile(64, 64, 1, 4, 3), None, one_slot=True)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def lora(num_tokens: int, dtype: torch.dtype) -> None:
    in_features, slice_widths = 4096, [4096, 1024, 1024]
    arena = torch.empty(1 << 20, dtype=dtype)
    tables = (
        torch.zeros(64, dtype=torch.int64),
        torch.full((64, 3), 16, dtype=torch.int32),
        torch.zeros(65, dtype=torch.int32),
        torch.zeros(64, dtype=torch.int32),
    )
    x = torch.empty(num_tokens, in_features, dtype=dtype)
    h = lora_triton.lora_shrink(x, arena, *tables, 48)
    y = torch.empty(num_tokens, sum(slice_widths), dtype=dtype)
    lora_triton.lora_expand_(y, h, arena, *tables, slice_widths, in_features)
    if dtype == torch.bfloat16:  # in fp32 alike
        lora_triton.lora_shrink(x, arena, *tables, 48, torch.ones(64))
        lora_triton.lora_expand_(y, h, arena, *tables, slice_widths, in_features, tables[0])
    offsets, _, seg_starts, seg_slots = tables
    lora_triton.lora_affine_(y, arena, offsets, seg_starts, seg_slots)


def fused(dtype: torch.dtype) -> None:
    num_tokens, hidden = 64, 4096
    x, weight = torch.empty(num_tokens, hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
    norm_triton.rms_norm(x, weight, 1e-5, x, torch.zeros(num_tokens, dtype=torch.int64))
    norm_triton.add_rms_norm_(x, x, weight, 1e-5)
    qkv, rotations = torch.empty(num_tokens, 6144, dtype=dtype), torch.empty(num_tokens, 3, 64, dtype=dtype)
    cache, slots = torch.empty(8, 64, 16, 128, dtype=dtype), torch.zeros(num_tokens, dtype=torch.int64)
    for head_norm in (None, torch.empty(40, 128, dtype=dtype)):
        rope_triton.rope_kv_write_(qkv, rotations, cache, cache, slots, head_norm, 1e-6)
    activation_triton.silu_and_mul(torch.empty(num_tokens, 28672, dtype=dtype))


def attention(max_query_len: int) -> None:
    num_seqs, context_len, block_size = 8, 2048, 16
    q = torch.empty(num_seqs * max_query_len, 32, 128, dtype=torch.bfloat16)
    cache = torch.empty(8, num_seqs * context_len // block_size, block_size, 128, dtype=torch.bfloat16)
    attention_triton.paged_attention(
        q,
        cache,
        cache,
        torch.zeros(num_seqs + 1, dtype=torch.int32),
        torch.zeros(num_seqs, dtype=torch.int32),
        torch.zeros(num_seqs, context_len // block_size, dtype=torch.int32),
        max_query_len,
        context_len,
        128**-0.5,
        0,
        0.0,
    )
    key = torch.empty(num_seqs, 8, 128, dtype=torch.bfloat16)
    kv_write_triton.kv_write_(key, key, cache, cache, torch.zeros(num_seqs, dtype=torch.int64))


def nf4_weight(n: int, k: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.empty(n * k // 2, dtype=torch.uint8),
        torch.empty(n * k // 64, dtype=torch.uint8),
        torch.empty(256),
        torch.empty(n * k // 2**14),
        torch.empty(n * k // 2**14),
    )


def nf4_matmul(tiles: Sequence[GemmTile]) -> None:
    n, k = 512, 4096
    for tile in tiles:
        nf4_triton.nf4_gemm(torch.empty(tile.rows, k, dtype=torch.bfloat16), *nf4_weight(n, k), n, None, tile)


def nf4_lora(num_rows: int, tile: GemmTile, weights: torch.Tensor | None, *, one_slot: bool = False) -> None:
    n, k, widths = 768, 4096, [512, 128, 128]
    lora_nf4_triton.nf4_lora_gemm(
        torch.empty(num_rows, k, dtype=torch.bfloat16),
        *nf4_weight(n, k),
        None,
        tile,
        torch.empty(1 << 20, dtype=torch.bfloat16),
        torch.zeros(64, dtype=torch.int64),
        torch.full((64, 3), 16, dtype=torch.int32),
        torch.zeros(num_rows + 1, dtype=torch.int32),
        torch.zeros(num_rows, dtype=torch.int32),
        48,
        widths,
        weights,
        one_slot,
    )


if __name__ == "__main__":
    main()
