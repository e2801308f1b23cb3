"""Compiles NF4 matmuls for a GPU into Triton's cache, in several processes: what the benchmark then finds there.

A script of its own that needs no device: `nf4_compile.py MAJOR MINOR DEPENDENT`, with a JSON list of GemmTile fields on
stdin; DEPENDENT is 1 for kernels that are launched dependently, else 0.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from lorikeet.kernels.nf4_dispatch import GemmTile
from lorikeet.kernels.overlap import switches


def compile_tiles(tiles: Sequence[GemmTile], capability: tuple[int, int], timeout_s: float) -> None:
    """Compile each tile for bf16 and nested constants, as `overlap.switches` has captured steps launch it now.

    What fails, or is not ready in time, is compiled when it is used.
    """
    workers = max(1, min(os.cpu_count() or 1, 16, len(tiles)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    dependent = switches.dependent_launch and capability >= (9, 0)
    command = [sys.executable, __file__, *map(str, capability), str(int(dependent))]
    end = time.monotonic() + timeout_s
    running = []
    for i in range(workers):
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps(tiles[i::workers]))
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
    from lorikeet.kernels import nf4_triton
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
    nf4_triton.launches_dependently = lambda device: sys.argv[3] == "1"
    n, k = 512, 8192
    weight = (
        torch.empty(n * k // 2, dtype=torch.uint8),
        torch.empty(n * k // 64, dtype=torch.uint8),
        torch.empty(256),
        torch.empty(n * k // 2**14),
        torch.empty(n * k // 2**14),
    )
    for fields in json.load(sys.stdin):
        tile = GemmTile(*fields)
        nf4_triton.nf4_gemm(torch.empty(tile.rows, k, dtype=torch.bfloat16), *weight, n, None, tile)


if __name__ == "__main__":
    main()
