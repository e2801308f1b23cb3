"""Compiles Triton kernels for a GPU that is not there, with the arguments that their launchers give them.

A script, because Triton decides between compiler and interpreter for good when it is imported:
`compile_offline.py CAPABILITY`, for example 90, prints one JSON object for each kernel: its name, its shared memory in
bytes, the widths in bytes of its asynchronous copies from global to shared memory, and the bits of its widest load from
global memory.
"""

import json
import os
import re
import sys
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from lorikeet.kernels import attention_triton, lora_triton
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
        loads = re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
        report = {
            "name": self.fn.__name__,
            "shared": kernel.metadata.shared,
            "copy_widths": sorted({int(width, 16) for width in copies}),
            "widest_load": max((int(count or 1) * int(bits) for count, bits in loads), default=0),
        }
        print(json.dumps(report), flush=True)

    JITFunction.run = run
    for dtype in (torch.bfloat16, torch.float32):
        for num_tokens in (64, 512):
            lora(num_tokens, dtype)
    for max_query_len in (1, 100):
        attention(max_query_len)


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
    h = lora_triton.lora_shrink(x, arena, *tables, 48, num_splits=1)
    lora_triton.lora_shrink(x, arena, *tables, 48, torch.ones(64), num_splits=1)
    y = torch.empty(num_tokens, sum(slice_widths), dtype=dtype)
    lora_triton.lora_expand_(y, h, arena, *tables, slice_widths, in_features)
    offsets, _, seg_starts, seg_slots = tables
    lora_triton.lora_affine_(y, arena, offsets, seg_starts, seg_slots)


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
    attention_triton.kv_write_(key, key, cache, cache, torch.zeros(num_seqs, dtype=torch.int64))


if __name__ == "__main__":
    main()
