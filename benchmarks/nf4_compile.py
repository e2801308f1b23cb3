"""Compiles NF4 matmuls for a GPU into Triton's cache, in several processes: what the benchmark then finds there.

A script of its own that needs no device: `nf4_compile.py MAJOR MINOR DEPENDENT`, with a JSON list of jobs on stdin,
each the fields of a GemmTile, and null or those of a LoraJob; DEPENDENT is 1 for kernels that are launched dependently,
else 0.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lorikeet.kernels.nf4_dispatch import GemmTile
from lorikeet.kernels.overlap import switches


class LoraJob(NamedTuple):
    """A matmul that does LoRA, too.

    Attributes:
        rows: of x.
        in_features: of the site.
        widths: of its slices.
        rank: of each.
        max_slices: of the sites, which tables of ranks are as wide as.
        one_slot: rows share an adapter.
    """

    rows: int
    in_features: int
    widths: tuple[int, ...]
    rank: int
    max_slices: int
    one_slot: bool


def compile_tiles(
    tiles: Sequence[GemmTile],
    capability: tuple[int, int],
    timeout_s: float,
    lora: Sequence[tuple[GemmTile, LoraJob]] = (),
) -> None:
    """Compile each tile for bf16 and nested constants, as `overlap.switches` has captured steps launch it now.

    What fails, or is not ready in time, is compiled when it is used.

    Args:
        tiles: of the matmul alone.
        capability: of the device.
        timeout_s: for everything.
        lora: of matmuls that do LoRA, too.
    """
    jobs: list[tuple[GemmTile, LoraJob | None]] = [*lora, *((tile, None) for tile in tiles)]
    workers = max(1, min(os.cpu_count() or 1, 16, len(jobs)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    dependent = switches.dependent_launch and capability >= (9, 0)
    command = [sys.executable, __file__, *map(str, capability), str(int(dependent))]
    end = time.monotonic() + timeout_s
    running = []
    for i in range(workers):
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps(jobs[i::workers]))
        process.stdin.close()
        running.append(process)
    for process in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """Compile the tiles on stdin."""
    import triton
    from lorikeet.kernels import lora_nf4_triton, nf4_triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    major, minor = map(int, sys.argv[1:3])
    target = GPUTarget("cuda", 10 * major + minor, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    launch = JITFunction.run

    def only_compile(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        launch(self, *args, **{**kwargs, "warmup": True})

    JITFunction.run = only_compile
    for module in (nf4_triton, lora_nf4_triton):
        module.launches_dependently = lambda device: sys.argv[3] == "1"
    for fields, lora in json.load(sys.stdin):
        tile = GemmTile(*fields)
        if lora is None:
            x = torch.empty(tile.rows, 8192, dtype=torch.bfloat16)
            nf4_triton.nf4_gemm(x, *_weight(512, 8192), 512, None, tile)
        else:
            _compile_lora(tile, LoraJob(*lora))


def _weight(n: int, k: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.empty(n * k // 2, dtype=torch.uint8),
        torch.empty(n * k // 64, dtype=torch.uint8),
        torch.empty(256),
        torch.empty(n * k // 2**14),
        torch.empty(n * k // 2**14),
    )


def _compile_lora(tile: GemmTile, job: LoraJob) -> None:
    from lorikeet.kernels import lora_nf4_triton

    num_slices = len(job.widths)
    lora_nf4_triton.nf4_lora_gemm(
        torch.empty(job.rows, job.in_features, dtype=torch.bfloat16),
        *_weight(sum(job.widths), job.in_features),
        None,
        tile,
        torch.empty(1024, dtype=torch.bfloat16),
        torch.zeros(64, dtype=torch.int64),
        torch.zeros((64, job.max_slices), dtype=torch.int32)[:, :num_slices],
        torch.zeros(job.rows + 1, dtype=torch.int32),
        torch.zeros(job.rows, dtype=torch.int32),
        job.rank * num_slices,
        job.widths,
        one_slot=job.one_slot,
    )


if __name__ == "__main__":
    main()
