"""LoRA's shrink and expand at the sites of Llama-3-8B on a CUDA device, against their bytes.

For decodes of 1, 16 and 64 rows, of one adapter or as many as rows, with tables padded as in a captured step: the two
kernels alone, and what they add to the base's NF4 matmul when they run after it, start early (dependent launch) or run
beside it (side stream). Timed as CUDA graphs over as many copies of the weights as exceed the L2 cache. With time left,
other tiles than the chosen ones are tried; the best are printed as `kernels/lora_tiles.py` has them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from gpu_timing import Captured, Timing, in_turns, measure_bandwidth, rotating
from lorikeet.kernels import lora_triton
from lorikeet.kernels.lora_tiles import ExpandTiles, ShrinkTiles, expand_tiles, shrink_tiles
from lorikeet.kernels.nf4 import nf4_linear
from lorikeet.kernels.nf4_quantize import quantize_nf4
from lorikeet.kernels.nf4_weight import NF4Weight
from lorikeet.kernels.overlap import SideStream, switches
from torch import Tensor

SITES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
BATCHES = (1, 16, 64)
RANK = 16
LAYERS = 32
DTYPE = torch.bfloat16
DEVICE = "cuda"
_COPIES_BYTES = 128 * 2**20  # more than an L2 cache
_MAX_COPIES = 256
_REPEATS = 10


@dataclass(frozen=True)
class Case:
    """One site in one batch, several times in memory.

    Attributes:
        name: of the site.
        rows: of the batch.
        adapters: different ones, 1 or `rows`.
        x: [rows, in_features].
        y: [rows, out_features].
        arena: blocks of all copies.
        offsets: of each copy.
        tables: ranks, seg_starts, seg_slots; as many segments as rows.
    """

    name: str
    rows: int
    adapters: int
    x: Tensor
    y: Tensor
    arena: Tensor
    offsets: list[Tensor]
    tables: tuple[Tensor, Tensor, Tensor]

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the slices."""
        return SITES[self.name][1]

    @property
    def max_rank(self) -> int:
        """Of the site, as a captured step has it."""
        return RANK * len(self.widths)

    @property
    def shrink_bytes(self) -> int:
        """What shrink must move: A and x."""
        return (self.adapters * self.max_rank + self.rows) * self.x.shape[1] * self.x.element_size()

    @property
    def expand_bytes(self) -> int:
        """What expand must move: B, y in and out."""
        return (self.adapters * RANK + 2 * self.rows) * self.y.shape[1] * self.y.element_size()

    def shrink(self, copy: int, tiles: ShrinkTiles | None = None) -> Tensor:
        """What `expand` takes, of one copy."""
        args = (self.x, self.arena, self.offsets[copy], *self.tables, self.max_rank)
        return lora_triton.lora_shrink(*args, tiles=tiles)

    def expand(self, copy: int, h: Tensor, y: Tensor | None = None, tiles: ExpandTiles | None = None) -> None:
        """The delta of one copy added to y."""
        y = self.y if y is None else y
        tables = (self.offsets[copy % len(self.offsets)], *self.tables)
        lora_triton.lora_expand_(y, h, self.arena, *tables, self.widths, self.x.shape[1], tiles=tiles)


def make_case(name: str, rows: int, adapters: int) -> Case:
    """Random values."""
    in_features, widths = SITES[name]
    size = RANK * (len(widths) * in_features + sum(widths))
    element = torch.empty(0, dtype=DTYPE).element_size()
    copies = min(_MAX_COPIES, -(-_COPIES_BYTES // (adapters * size * element)))
    arena = torch.randn(copies * adapters * size, device=DEVICE, dtype=DTYPE) / 64
    starts = torch.arange(rows + 1) if adapters == rows else torch.tensor([0] + [rows] * rows)
    slots = torch.full((rows,), -1)
    slots[:adapters] = torch.randperm(adapters)
    tables = (torch.full((adapters, len(widths)), RANK), starts, slots)
    slot_offsets = torch.arange(copies * adapters, device=DEVICE).view(copies, adapters) * size
    return Case(
        name,
        rows,
        adapters,
        torch.randn(rows, in_features, device=DEVICE, dtype=DTYPE),
        torch.randn(rows, sum(widths), device=DEVICE, dtype=DTYPE),
        arena,
        list(slot_offsets.unbind()),
        tuple(table.to(DEVICE, torch.int32) for table in tables),  # type: ignore[arg-type]
    )


def make_weights(name: str) -> list[NF4Weight]:
    """Copies of the base's weight at a site."""
    in_features, widths = SITES[name]
    codes, absmax = quantize_nf4(torch.randn(sum(widths), in_features, device=DEVICE, dtype=DTYPE) / in_features**0.5)
    copies = -(-_COPIES_BYTES // codes.nbytes)
    return [NF4Weight(codes.clone(), absmax, sum(widths), in_features) for _ in range(copies)]


@contextmanager
def launched(*, side_stream: bool, dependent: bool) -> Iterator[None]:
    """Sets how captured kernels overlap."""
    before = replace(switches)
    switches.lora_side_stream, switches.side_stream_rows, switches.dependent_launch = side_stream, 1, dependent
    try:
        yield
    finally:
        vars(switches).update(vars(before))


def compare(graphs: Mapping[str, Captured], rounds: int = 3) -> dict[str, Timing]:
    """Takes samples in turns."""
    for graph in graphs.values():
        graph.sample(2, flush=None)
    return in_turns({name: partial(graph.sample, _REPEATS, flush=None) for name, graph in graphs.items()}, rounds)


def measure_kernels(case: Case, copy_bytes_per_s: float) -> dict[str, Any]:
    """Shrink and expand alone."""
    h = case.shrink(0)
    copies = range(len(case.offsets))
    runs: dict[str, list[Callable[[], object]]] = {
        "shrink": [partial(case.shrink, copy) for copy in copies],
        "expand": [partial(case.expand, copy, h) for copy in copies],
    }
    row: dict[str, Any] = {"site": case.name, "rows": case.rows, "adapters": case.adapters}
    for name, timing in compare({name: rotating(calls) for name, calls in runs.items()}).items():
        num_bytes = case.shrink_bytes if name == "shrink" else case.expand_bytes
        row[name] = asdict(timing)
        row[f"{name}_bytes"] = num_bytes
        row[f"{name}_of_copy"] = timing.bytes_per_s(num_bytes) / copy_bytes_per_s
    return row


def measure_beside(case: Case, weights: Sequence[NF4Weight]) -> dict[str, Any]:
    """The base's matmul alone and with LoRA, in each of the ways."""
    side = SideStream(torch.device(DEVICE, torch.cuda.current_device()))
    count = max(len(weights), min(64, len(case.offsets)))  # the weights alone exceed the cache

    def base(number: int) -> Tensor:
        return nf4_linear(case.x, weights[number % len(weights)])

    def after(number: int) -> None:
        y = base(number)
        case.expand(number, case.shrink(number % len(case.offsets)), y)

    def beside(number: int) -> None:
        with side.beside():
            h = case.shrink(number % len(case.offsets))
        y = base(number)
        side.join()
        case.expand(number, h, y)

    graphs = {"base": rotating([partial(base, number) for number in range(count)])}
    for name, side_stream, dependent in (("after", False, False), ("dependent", False, True), ("beside", True, True)):
        with launched(side_stream=side_stream, dependent=dependent):
            run = beside if side_stream else after
            graphs[name] = rotating([partial(run, number) for number in range(count)])
    times = compare(graphs)
    return {name: asdict(timing) for name, timing in times.items()}


def other_tiles(case: Case) -> tuple[list[ShrinkTiles], list[ExpandTiles]]:
    """What is worth a try beside what is chosen, the chosen ones first."""
    itemsize, in_features = case.x.element_size(), case.x.shape[1]
    chosen = shrink_tiles(case.rows, in_features, case.max_rank, itemsize)
    shrinks = [chosen]
    for row_k, num_warps in ((256, 2), (256, 4), (512, 4), (1024, 4), (1024, 8)):
        splits = -(-in_features // row_k)
        share = row_k * -(-splits // 16)  # as few splits as expand adds up
        shrinks.append(
            chosen._replace(
                row_k=row_k, split_k=share, num_splits=-(-in_features // share), num_warps=num_warps, num_stages=4
            )
        )
    wide = expand_tiles(case.rows, itemsize)
    expands = [wide] + [
        wide._replace(columns=columns, num_warps=num_warps)
        for columns, num_warps in ((128, 2), (128, 4), (256, 2), (256, 8), (512, 4), (512, 8))
    ]
    return list(dict.fromkeys(shrinks)), list(dict.fromkeys(expands))


def tune(case: Case, until: float) -> dict[str, Any]:
    """Times other tiles, as long as there is time: the fastest first."""
    copies = range(min(64, len(case.offsets)))
    h = case.shrink(0)
    shrinks, expands = other_tiles(case)
    runs: dict[str, list[Callable[[], object]]] = {}
    runs |= {str(tiles): [partial(case.shrink, copy, tiles) for copy in copies] for tiles in shrinks}
    runs |= {str(tiles): [partial(case.expand, copy, h, None, tiles) for copy in copies] for tiles in expands}
    graphs: dict[str, Captured] = {}
    failed: dict[str, str] = {}
    for name, calls in runs.items():
        if time.monotonic() > until:
            break
        try:
            graphs[name] = rotating(calls)
        except Exception as problem:  # Triton has its own; such as: more shared memory than there is
            failed[name] = f"{type(problem).__name__}: {str(problem)[:200]}"
            torch.cuda.synchronize()
    times = sorted(compare(graphs, rounds=2).items(), key=lambda item: item[1].median_us) if graphs else []
    found = {kind: [[name, t.median_us] for name, t in times if name.startswith(kind)] for kind in ("Shrink", "Expand")}
    return {"site": case.name, "rows": case.rows, "adapters": case.adapters, **found, "failed": failed}


def measure_lora(seconds: float, copy_bytes_per_s: float) -> dict[str, Any]:
    """Measure, and tune with the time that is left.

    Args:
        seconds: for everything; what does not fit stays unmeasured.
        copy_bytes_per_s: measured copy bandwidth, reads plus writes.

    Returns:
        "rows": for each site, batch and number of adapters the microseconds of `shrink` and `expand`, their bytes, the
        fraction of copy bandwidth, and as "with_base" those of the base's matmul alone and with both in each way;
        "layers": for each batch the sums over a step's sites in milliseconds; "tiles": what tuning found.
    """
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    plan = [(batch, adapters) for batch in BATCHES for adapters in dict.fromkeys((1, batch))]
    weights = {name: make_weights(name) for name in SITES}
    for batch, adapters in plan:  # batch by batch: only all sites together say what a step takes
        for name in SITES:
            if time.monotonic() > end:
                break
            case = make_case(name, batch, adapters)
            row = measure_kernels(case, copy_bytes_per_s)
            row["with_base"] = measure_beside(case, weights[name])
            rows.append(row)
            sys.stderr.write(f"  {line(row)}\n")
            del case
    del weights
    tiles = []
    for name, (batch, adapters) in (("gate_up", (64, 64)), ("qkv", (16, 16)), ("down", (64, 64)), ("gate_up", (1, 1))):
        if time.monotonic() > end - 10:
            break
        tiles.append(tune(make_case(name, batch, adapters), end))
    return {"rows": rows, "layers": [total(rows, *each) for each in plan], "tiles": tiles}


def total(rows: Sequence[dict[str, Any]], batch: int, adapters: int) -> dict[str, Any]:
    """The four sites of all layers together, in milliseconds; nothing where one was not measured."""
    own = [row for row in rows if (row["rows"], row["adapters"]) == (batch, adapters)]
    found: dict[str, Any] = {"rows": batch, "adapters": adapters}
    if len(own) == len(SITES):
        for way in own[0]["with_base"]:
            found[f"{way}_ms"] = LAYERS * sum(row["with_base"][way]["median_us"] for row in own) / 1000
    return found


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    base = row["with_base"]["base"]["median_us"]
    ways = "  ".join(
        f"{way} +{row['with_base'][way]['median_us'] - base:6.2f}" for way in ("after", "dependent", "beside")
    )
    kernels = "  ".join(
        f"{kind} {row[kind]['median_us']:6.2f} us {100 * row[f'{kind}_of_copy']:3.0f} %"
        for kind in ("shrink", "expand")
    )
    return f"{row['site']:8}{row['rows']:3} rows {row['adapters']:3} adapters  {kernels}  base {base:6.2f} us  {ways}"


def main() -> int:
    """Print the table; skips without a CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="for everything [120]")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stdout.write("lora_kernels: skipped, torch finds no CUDA device here.\n")
        return 0
    found = measure_lora(options.seconds, measure_bandwidth().copy)
    sys.stdout.write("\n".join(line(row) for row in found["rows"]) + "\n")
    sys.stdout.write("\n".join(json.dumps(each) for each in (*found["layers"], *found["tiles"])) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
