"""Paged attention of decodes with the heads of Llama-3-8B on a CUDA device, against its bytes.

Contexts of 1,024 tokens in scattered blocks, for batches of 1, 16 and 64. Timed as CUDA graphs over caches of several
layers, which together exceed the L2 cache, once with the context as the limit and once with the limit that a captured
step has to assume; with time left in other numbers of splits.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from gpu_timing import Captured, in_turns, measure_bandwidth, rotating
from lorikeet.kernels import attention_triton
from torch import Tensor

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
BLOCK_SIZE = 16
CONTEXT = 1024
MAX_CONTEXT = 8192
BATCHES = (1, 16, 64)
SPLITS = (1, 2, 3, 4, 6, 8, 16, 32)
DTYPE = torch.bfloat16
DEVICE = "cuda"
_CACHE_BYTES = 192 * 2**20  # several times an L2 cache
_REPEATS = 10


@dataclass(frozen=True)
class Case:
    """One decode step, over the caches of several layers.

    Attributes:
        batch: sequences.
        q: [batch, heads, head_dim].
        caches: keys and values of each layer.
        tables: query_starts, context_lens, block_tables.
    """

    batch: int
    q: Tensor
    caches: list[tuple[Tensor, Tensor]]
    tables: tuple[Tensor, Tensor, Tensor]

    @property
    def num_bytes(self) -> int:
        """What one layer must move: the keys and values of all contexts, q and the result."""
        element = self.q.element_size()
        return (2 * self.batch * CONTEXT * NUM_KV_HEADS * HEAD_DIM + 2 * self.q.numel()) * element

    def attend(self, layer: int, max_context: int, num_splits: int | None) -> Tensor:
        """One layer."""
        args = (self.q, *self.caches[layer], *self.tables, 1, max_context, HEAD_DIM**-0.5, 0, 0.0)
        return attention_triton.paged_attention(*args, num_splits=num_splits)


def make_case(batch: int) -> Case:
    """Random values; each sequence's blocks lie anywhere, its table is as wide as the longest context needs."""
    blocks_each = CONTEXT // BLOCK_SIZE
    num_blocks = batch * blocks_each
    shape = (NUM_KV_HEADS, num_blocks, BLOCK_SIZE, HEAD_DIM)
    element = torch.empty(0, dtype=DTYPE).element_size()
    layers = max(1, -(-_CACHE_BYTES // (2 * num_blocks * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM * element)))
    caches = [
        (torch.randn(shape, device=DEVICE, dtype=DTYPE), torch.randn(shape, device=DEVICE, dtype=DTYPE))
        for _ in range(layers)
    ]
    block_tables = torch.zeros(batch, MAX_CONTEXT // BLOCK_SIZE, dtype=torch.int32)
    block_tables[:, :blocks_each] = torch.randperm(num_blocks).view(batch, blocks_each)
    return Case(
        batch,
        torch.randn(batch, NUM_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE),
        caches,
        (
            torch.arange(batch + 1, dtype=torch.int32, device=DEVICE),
            torch.full((batch,), CONTEXT, dtype=torch.int32, device=DEVICE),
            block_tables.to(DEVICE),
        ),
    )


def measure_attention(seconds: float, copy_bytes_per_s: float) -> dict[str, Any]:
    """Measure within a time budget.

    Args:
        seconds: for everything; what does not fit stays unmeasured.
        copy_bytes_per_s: measured copy bandwidth, reads plus writes.

    Returns:
        "rows": for each batch the bytes of a layer, for each way of launching it the microseconds, and the fraction of
        copy bandwidth of "captured", the way that is served.
    """
    end = time.monotonic() + seconds
    rows = []
    for batch in BATCHES:
        if time.monotonic() > end:
            break
        case = make_case(batch)
        ways = {"context": (CONTEXT, None), "captured": (MAX_CONTEXT, None)}
        ways |= {f"{splits} splits": (MAX_CONTEXT, splits) for splits in SPLITS}
        graphs: dict[str, Captured] = {}
        for name, (max_context, splits) in ways.items():
            if graphs.keys() >= {"context", "captured"} and time.monotonic() > end:
                break
            graphs[name] = rotating(
                [partial(case.attend, layer, max_context, splits) for layer in range(len(case.caches))]
            )
            graphs[name].sample(2, flush=None)
        times = in_turns({name: partial(graph.sample, _REPEATS, flush=None) for name, graph in graphs.items()}, 3)
        row: dict[str, Any] = {"batch": batch, "context": CONTEXT, "bytes": case.num_bytes}
        row["ways"] = {name: asdict(timing) for name, timing in times.items()}
        row["of_copy"] = times["captured"].bytes_per_s(case.num_bytes) / copy_bytes_per_s
        rows.append(row)
        sys.stderr.write(f"  {line(row)}\n")
    return {"rows": rows}


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    ways = "  ".join(f"{name} {timing['median_us']:.2f}" for name, timing in row["ways"].items())
    return f"{row['batch']:3} x {row['context']}: {100 * row['of_copy']:3.0f} % of copy bandwidth; us a layer: {ways}"


def main() -> int:
    """Print the table; skips without a CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for everything [60]")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stdout.write("attention_kernels: skipped, torch finds no CUDA device here.\n")
        return 0
    found = measure_attention(options.seconds, measure_bandwidth().copy)
    sys.stdout.write("\n".join(map(line, found["rows"])) + f"\n{json.dumps(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
