"""The Triton kernels compile for an H100 on a machine without one; the interpreter accepts more than the compiler."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_offline.py")
# Compute capability 8.6 and 8.9 give a program 99 KiB; 9.0 more.
MAX_SHARED_BYTES = 99 * 1024
LORA = {"shrink_kernel", "expand_kernel", "affine_kernel"}
ATTENTION = {"_paged_attention_kernel", "_join_splits_kernel", "_kv_write_kernel"}
# Of the lean decoder; rows come in 16 bytes a thread.
FUSED = {"_rms_norm_kernel", "_rope_kv_write_kernel", "_silu_and_mul_kernel"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_compile_for_sm_90(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, str(SCRIPT), "90"], env=env, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    names = {kernel["name"] for kernel in kernels}
    assert names >= FUSED | {"gemm_kernel", "lora_gemm_kernel", "one_slot_lora_gemm_kernel", "dequantize_kernel"}
    assert names >= LORA | ATTENTION
    for kernel in kernels:
        assert kernel["shared"] <= MAX_SHARED_BYTES, kernel
        if kernel["name"] in LORA:
            # Weights whose block is aligned, which only the kernel can find out, come in 16 bytes at a time.
            assert 16 in kernel["copy_widths"] or kernel["widest_load"] == 128, kernel
            assert kernel["stack"] <= 16, kernel  # a register or two, in Triton 3.6
        if kernel["name"] in ATTENTION:
            assert kernel["stack"] == 0, kernel
    dependent = {kernel["name"] for kernel in kernels if kernel["waits"]}
    assert dependent >= {"shrink_kernel", "expand_kernel", "_paged_attention_kernel", "_join_splits_kernel"}
    assert dependent >= FUSED | {"gemm_kernel", "lora_gemm_kernel", "one_slot_lora_gemm_kernel"}
    for kernel in kernels:
        if "gemm_kernel" in kernel["name"]:
            assert 16 in kernel["copy_widths"], kernel  # codes
        if kernel["name"] == "lora_gemm_kernel":
            # Four programs of four warps share a multiprocessor, as the splits are chosen for.
            assert kernel["registers"] <= 128 and 4 * kernel["shared"] <= 227 * 1024 and kernel["stack"] <= 64, kernel
        if kernel["name"] == "one_slot_lora_gemm_kernel":
            # Three of 16 rows, two of 64.
            fitting = min(65536 // (128 * kernel["registers"]), 227 * 1024 // kernel["shared"])
            assert fitting == (3 if kernel["shared"] < 64 * 1024 else 2) and kernel["stack"] <= 64, kernel
        if kernel["name"] in FUSED:
            assert kernel["widest_load"] == 128, kernel
