"""NF4 matmuls at the stacked shapes of Llama-3-8B on a CUDA device: ours in every tile, bitsandbytes', and bf16.

For each shape and number of rows the best of our tiles is looked for (tiles of the rows' size first, then their stages
and lookups), then compared with `bitsandbytes::gemm_4bit`, with dequantization and `F.linear`, and with `F.linear` on a
bf16 weight. Timed as CUDA graphs over as many copies of the weight as exceed the L2 cache, each kernel after the end of
the one before, as bitsandbytes' are launched (in a step ours may start before). Prints the table that
kernels/nf4_dispatch.py takes, and what each way reaches.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import Captured, Timing, in_turns, measure_bandwidth, rotating
from lorikeet.kernels import nf4_triton
from lorikeet.kernels.nf4 import bitsandbytes_gemm
from lorikeet.kernels.nf4_dispatch import ROW_BUCKETS, GemmTile, Way, choose_way
from lorikeet.kernels.nf4_quantize import quantize_nf4
from lorikeet.kernels.nf4_weight import NF4Weight, plain_absmax
from lorikeet.kernels.overlap import switches
from nf4_compile import compile_tiles
from torch import Tensor

DEVICE = "cuda"
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
STACKED = ("qkv", "gate_up")  # several offsets: bitsandbytes cannot run them, and is timed as if they had one
ROWS = (1, 2, 4, 8, 16, 17, 32, 64, 128, 256)
# Buckets in the order in which they are tuned: what decodes most comes first.
TUNED = (16, 1, 64, 8, 32, 128, 256)
# (columns, warps) of our programs for each number of rows they take.
TILES = {
    8: ((64, 4), (32, 2), (128, 4)),
    16: ((128, 4), (64, 2), (64, 4)),
    32: ((128, 4), (64, 2), (64, 4)),
    64: ((64, 4), (128, 8)),
}
STAGES = {8: 4, 16: 3, 32: 3, 64: 3}
OTHER_STAGES = {8: (3, 6), 16: (2, 4), 32: (2, 4), 64: (2,)}
MAX_ERROR = 0.01  # ||y - fp32|| / ||fp32|| of bf16 results
_COPIES_BYTES = 192 * 2**20  # several times an L2 cache
_COMPILE_S = 90.0


@dataclass(frozen=True)
class Copies:
    """One weight, several times in memory.

    Attributes:
        name: of the shape.
        shape: (out_features, in_features).
        weights: codes, absmax, code_map, scales, offsets of each copy.
        dense: bf16 copies.
    """

    name: str
    shape: tuple[int, int]
    weights: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    dense: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Of one copy."""
        return sum(t.nbytes for t in self.weights[0])

    def useful_bytes(self, num_rows: int) -> int:
        """What a matmul must move: weight, x and y once."""
        n, k = self.shape
        return self.nbytes + 2 * num_rows * (n + k)


def make_copies(name: str) -> Copies:
    """Random values, quantized on the device."""
    n, k = SHAPES[name]
    values = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) / k**0.5
    codes, absmax = quantize_nf4(values)
    tensors = (codes, absmax.codes, absmax.code_map, absmax.scales, absmax.offsets)
    nbytes = sum(t.nbytes for t in tensors)
    weights = [tensors] + [tuple(t.clone() for t in tensors) for _ in range(_COPIES_BYTES // nbytes)]
    dense = NF4Weight(codes, plain_absmax(absmax), n, k).dequantize(torch.bfloat16)
    return Copies(name, (n, k), weights, [dense] + [dense.clone() for _ in range(_COPIES_BYTES // dense.nbytes + 1)])


def ours(x: Tensor, weight: Sequence[Tensor], out_features: int, tile: GemmTile) -> Tensor:
    """Our matmul in one tile."""
    return nf4_triton.nf4_gemm(x, *weight, out_features, None, tile)


def runs_of(copies: Copies, x: Tensor, way: Way | str) -> list[Callable[[], Tensor]]:
    """One call for each copy."""
    n = copies.shape[0]
    if isinstance(way, GemmTile):
        return [partial(ours, x, weight, n, way) for weight in copies.weights]
    if way == "bitsandbytes":
        return [partial(bitsandbytes_gemm, x, *weight, n, None) for weight in copies.weights]
    if way == "dequantize":
        return [partial(nf4_triton.nf4_dequantized_linear, x, *weight, n, None) for weight in copies.weights]
    return [partial(F.linear, x, weight) for weight in copies.dense]


class Bench:
    """Times ways and keeps what went wrong.

    Args:
        seconds: for everything.
        copy_bytes_per_s: of this card, reads and writes.
    """

    def __init__(self, seconds: float, copy_bytes_per_s: float) -> None:
        self._end = time.monotonic() + seconds
        self._copy = copy_bytes_per_s
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.capability = (properties.major, properties.minor)
        self.num_multiprocessors = properties.multi_processor_count
        self.failed: dict[str, str] = {}

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def capture(self, copies: Copies, x: Tensor, way: Way | str) -> Captured | None:
        """Check a way's result and capture it; None (and a note) where it is wrong, cannot run or comes too late."""
        if self.left() < 0:  # one that was not compiled before takes seconds
            self.failed[f"{copies.name} {x.shape[0]} {way}"] = "no time left"
            return None
        runs = runs_of(copies, x, way)
        try:
            error = self._error(runs[0](), x, copies)
            if not error < MAX_ERROR:
                self.failed[f"{copies.name} {x.shape[0]} {way}"] = f"wrong by {error:.2g}"
                return None
            return rotating(runs)
        except Exception as problem:  # Triton's own, such as: more shared memory than there is
            self.failed[f"{copies.name} {x.shape[0]} {way}"] = f"{type(problem).__name__}: {str(problem)[:200]}"
            torch.cuda.synchronize()
            return None

    @staticmethod
    def _error(y: Tensor, x: Tensor, copies: Copies) -> float:
        want = torch.mm(x, copies.dense[0].t()).float()
        return float(torch.linalg.vector_norm(y.float() - want) / torch.linalg.vector_norm(want))

    def compare(
        self, copies: Copies, x: Tensor, ways: Sequence[Way | str], rounds: int, repeats: int
    ) -> dict[Way | str, Timing]:
        """Time of each way that runs, in turns."""
        captured = {way: graph for way in ways if (graph := self.capture(copies, x, way)) is not None}
        for graph in captured.values():
            graph.sample(2, flush=None)
        samplers = {str(way): partial(graph.sample, repeats, flush=None) for way, graph in captured.items()}
        times = in_turns(samplers, rounds) if samplers else {}
        return {way: times[str(way)] for way in captured}

    def first_tiles(self, shape: tuple[int, int], num_rows: int) -> list[GemmTile]:
        """Tiles with splits that give each multiprocessor at least one program and at most eight."""
        rows = next((size for size in TILES if size >= num_rows), 64)
        row_tiles = -(-num_rows // rows)
        tiles = [self.reasoned(shape, num_rows)]
        for columns, warps in TILES[rows]:
            programs = row_tiles * -(-shape[0] // columns)
            for splits in (1, 2, 4, 7, 8, 14, 16):
                steps = shape[1] // 256
                fits = splits == 1 or (steps % splits == 0 and 2 * splits <= steps)
                fills = self.num_multiprocessors <= programs * splits <= 8 * self.num_multiprocessors
                if fits and (fills or (splits == 1 and programs > 8 * self.num_multiprocessors)):
                    tiles.append(GemmTile(rows, columns, splits, warps, STAGES[rows]))
        return list(dict.fromkeys(tile for tile in tiles if isinstance(tile, GemmTile)))

    def reasoned(self, shape: tuple[int, int], num_rows: int) -> Way:
        """What would run today."""
        return choose_way(self.capability, self.num_multiprocessors, num_rows, *shape, False, True)

    def fraction(self, copies: Copies, num_rows: int, timing: Timing) -> float:
        """Useful bytes a second over the copy bandwidth."""
        return timing.bytes_per_s(copies.useful_bytes(num_rows)) / self._copy


def refine(best: GemmTile) -> list[GemmTile]:
    """The neighbours of a good tile."""
    stages = [best._replace(stages=stages) for stages in OTHER_STAGES[best.rows]]
    return [best, *stages, best._replace(lookup="gather")]


def measure_nf4(seconds: float, copy_bytes_per_s: float) -> dict[str, Any]:
    """Tune and compare within a time budget.

    Args:
        seconds: for everything; what does not fit stays unmeasured, and the table has None there.
        copy_bytes_per_s: measured copy bandwidth, reads plus writes.

    Returns:
        "table": the lines of `nf4_dispatch.MEASURED`; "rows": one entry for each shape and number of rows, with the
        microseconds of each way, the bytes and the fraction of copy bandwidth; "failed": candidates that do not run, or
        whose result is wrong, and why.
    """
    with launched_one_by_one():
        return _measure(Bench(seconds, copy_bytes_per_s), seconds)


@contextmanager
def launched_one_by_one() -> Iterator[None]:
    """Without dependent launch."""
    before, switches.dependent_launch = switches.dependent_launch, False
    try:
        yield
    finally:
        switches.dependent_launch = before


def _measure(bench: Bench, seconds: float) -> dict[str, Any]:
    tune_until = 0.35 * seconds
    first = {(name, m): bench.first_tiles(SHAPES[name], m) for m in TUNED for name in SHAPES}
    candidates = list(dict.fromkeys(tile for tiles in first.values() for tile in tiles))
    compile_tiles(candidates, bench.capability, min(_COMPILE_S, 0.25 * seconds))
    best: dict[tuple[str, int], GemmTile] = {}
    for name in SHAPES:
        copies = make_copies(name)
        share = (bench.left() - tune_until) / (len(SHAPES) - list(SHAPES).index(name))
        end = time.monotonic() + share
        for m in TUNED:
            if time.monotonic() > end:
                break
            x = torch.randn(m, SHAPES[name][1], device=DEVICE, dtype=torch.bfloat16)
            times = bench.compare(copies, x, first[name, m], rounds=2, repeats=4)
            if times:
                best[name, m] = min(times, key=lambda way: times[way].median_us)  # type: ignore[assignment]
    candidates = list(dict.fromkeys(near for tile in best.values() for near in refine(tile)))
    compile_tiles(candidates, bench.capability, min(_COMPILE_S, 0.5 * max(bench.left(), 0.0)))
    table: dict[tuple[int, int], list[Way | None]] = {}
    rows: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        copies = make_copies(name)
        ways: dict[int, Way] = {}
        for m in sorted(ROWS, key=lambda m: (m not in ROW_BUCKETS, m)):  # the ends of the buckets decide
            if bench.left() < 2:
                break
            x = torch.randn(m, shape[1], device=DEVICE, dtype=torch.bfloat16)
            bucket = next(most for most in ROW_BUCKETS if m <= most)
            others: list[Way | str] = ["bitsandbytes", "dequantize", "bf16"]
            if m in ROW_BUCKETS:
                candidates = [*(refine(best[name, m]) if (name, m) in best else [bench.reasoned(shape, m)]), *others]
            else:
                candidates = [ways.get(bucket, bench.reasoned(shape, m)), *others]
            times = bench.compare(copies, x, list(dict.fromkeys(candidates)), rounds=3, repeats=6)
            usable = {w: t for w, t in times.items() if w != "bf16" and not (w == "bitsandbytes" and name in STACKED)}
            if not usable:
                continue
            chosen: Any = min(usable, key=lambda way: usable[way].median_us)
            if m in ROW_BUCKETS:
                ways[m] = chosen
            else:
                chosen = candidates[0] if candidates[0] in usable else chosen
            rows.append(
                {
                    "site": name,
                    "shape": shape,
                    "rows": m,
                    "way": str(chosen),
                    "us": asdict(usable[chosen]),
                    "bytes": copies.useful_bytes(m),
                    "fraction_of_copy": bench.fraction(copies, m, usable[chosen]),
                    "each": {str(way): asdict(timing) for way, timing in times.items()},
                }
            )
        table[shape] = [ways.get(most) for most in ROW_BUCKETS]
        del copies
    rows.sort(key=lambda row: (list(SHAPES).index(row["site"]), row["rows"]))
    return {"table": as_source(bench.capability, table), "rows": rows, "failed": bench.failed}


def as_source(capability: tuple[int, int], table: dict[tuple[int, int], list[Way | None]]) -> list[str]:
    """The lines to put into kernels/nf4_dispatch.py."""

    def way(value: Way | None) -> str:
        return f"GemmTile{tuple(value)!r}" if isinstance(value, GemmTile) else repr(value).replace("'", '"')

    lines = ["MEASURED = {", f"    {capability}: {{"]
    for shape, ways in table.items():
        lines += [f"        {shape}: (", *(f"            {way(value)}," for value in ways), "        ),"]
    return [line.replace("'", '"') for line in [*lines, "    },", "}"]]


def as_text(found: dict[str, Any]) -> str:
    """A short table: microseconds of each way, and the fraction of copy bandwidth of ours."""
    lines = ["site      rows    ours us   % copy  bitsandbytes  x faster  dequantize     bf16   way"]
    for row in found["rows"]:
        each = row["each"]

        def us(name: str, each: dict[str, dict[str, float]] = each) -> float:
            return each[name]["median_us"] if name in each else float("nan")

        mine = row["us"]["median_us"]
        theirs = us("bitsandbytes")
        lines.append(
            f"{row['site']:8} {row['rows']:5} {mine:10.1f} {100 * row['fraction_of_copy']:8.0f} {theirs:13.1f} "
            f"{theirs / mine:9.2f} {us('dequantize'):11.1f} {us('bf16'):8.1f}   {row['way'].removeprefix('GemmTile')}"
        )
    lines += [f"failed: {name}: {why}" for name, why in found["failed"].items()]
    return "\n".join([*lines, *found["table"]])


def main() -> int:
    """Measure and print.

    Returns:
        The exit status, 0 also without measuring where there is no CUDA device.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything [300]")
    parser.add_argument("--json", help="file that gets everything that was measured")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stdout.write("nf4_kernels: skipped, torch finds no CUDA device here.\n")
        return 0
    found = measure_nf4(options.seconds, measure_bandwidth().copy)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    sys.stdout.write(as_text(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
