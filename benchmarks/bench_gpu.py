"""`make bench-gpu`: decode at Llama-3-8B shapes on a CUDA device, beside the least time that its bytes allow.

Random weights, made on the device (no network, no disk). Runs its sections in order of importance within --seconds and
writes what each found at once; prints progress on stderr and the tables last. docs/performance.md says how each number
is taken, and what limits it.
"""

import argparse
import faulthandler
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from bar_panels import draw
from gpu_decode import (
    Measured,
    run_capture,
    run_chunks,
    run_decode,
    run_engine,
    run_launches,
    run_prefill,
    run_switches,
)
from gpu_limits import ModelShapes
from gpu_model import Room, Served, llama_3_8b, serve_random
from gpu_report import as_text, goals, panels
from gpu_sections import Budget, Results, Section, run_sections
from gpu_timing import measure_bandwidth
from lorikeet.server.logs import configure_logs
from machine import describe_machine, one_line
from options import RESULTS

SEED = 7
BLOCK_SIZE = 16
STEP_TOKENS = 8192
SPARE_TOKENS = 64  # of each stream: what the engine generates beyond the context that steps are timed at
SPARE_BLOCKS = 512  # of prompts that come in beside decodes
# Weights, adapters and KV are 23 GB; copies that bandwidth is measured with, and what kernels are compared with.
GPU_BYTES = 40 * 10**9
# After the budget a section that hangs is ended, with the stack that it hangs in.
GRACE_S = 25.0
COMPILE_SECONDS = 60.0
# At most; with more time more tiles would be tried.
NF4_SECONDS, LORA_SECONDS, ATTENTION_SECONDS = 150.0, 60.0, 25.0


def main() -> int:
    """Run the benchmark.

    Returns:
        The exit status: 0, also without measuring where there is no CUDA device; 1 if a section failed.
    """
    options = parse()
    if not torch.cuda.is_available():
        sys.stdout.write("bench-gpu: skipped, torch finds no CUDA device here.\n")
        return 0
    free, _ = torch.cuda.mem_get_info()
    if free < GPU_BYTES:
        sys.stdout.write(
            f"bench-gpu: skipped, it needs {GPU_BYTES // 10**9} GB of free GPU memory and {free / 1e9:.0f} GB are.\n"
        )
        return 0
    budget = Budget(options.seconds)
    faulthandler.dump_traceback_later(options.seconds + GRACE_S, exit=True)
    configure_logs("warning", "console")
    transformers.utils.logging.set_verbosity_error()
    machine = describe_machine()
    if options.commit:
        machine["commit"] = options.commit
    settings = {
        "command": "make bench-gpu",
        "base": "Llama-3-8B shapes, random weights, NF4, bfloat16",
        "adapters": f"rank {options.rank} on all linears",
        "batches": options.batches,
        "context": options.context,
        "rounds": options.rounds,
        "repeats": options.repeats,
    }
    results = Results(options.out / f"{file_name(machine)}.json", {"machine": machine, "settings": settings})
    sections = _wanted(plan(options, results), options.only)

    def plot(_: float) -> str:
        path = results.path.with_suffix(".png")
        what = f"{settings['base']}, {settings['adapters']}, context {options.context}"
        draw(path, panels(results.content["sections"]), f"{what}\n{one_line(machine)}")
        return path.name

    is_well = run_sections([*sections, Section("plot", 0, plot)], budget, results)
    found = goals(results.content["sections"])
    results.content["goals"] = [{**asdict(goal), "reached": goal.reached} for goal in found]
    results.save()
    faulthandler.cancel_dump_traceback_later()
    text = f"{one_line(machine)}\n\n{as_text(results.content)}\n"
    results.path.with_suffix(".txt").write_text(text)
    sys.stdout.write(f"wrote {results.path}\n{text}")
    return 0 if is_well else 1


def _wanted(sections: list[Section], only: list[str] | None) -> list[Section]:
    """Those of the given names, and the bandwidth that everything is compared with; None: all."""
    names = [section.name for section in sections]
    unknown = set(only or ()) - set(names)
    if unknown:
        sys.exit(f"bench-gpu: there is no section {', '.join(sorted(unknown))}; there are {', '.join(names)}.")
    return [section for section in sections if not only or section.name in ("bandwidth", *only)]


def plan(options: argparse.Namespace, results: Results) -> list[Section]:
    """The sections in order of importance."""
    model: list[Served] = []

    def bandwidth(_: float) -> dict[str, float]:
        found = measure_bandwidth()
        sys.stderr.write(f"  copy {found.copy / 1e12:.2f} TB/s, read {found.read / 1e12:.2f} TB/s\n")
        return asdict(found)

    def copy_bandwidth() -> float:
        copy: float = results.content["sections"]["bandwidth"]["copy"]
        return copy

    def served() -> Served:
        if not model:
            model.append(build_model(options))
        return model[0]

    def build(_: float) -> dict[str, Any]:
        base = served().base
        shapes = ModelShapes.of(base.config)
        return {"nf4_bytes": base.nf4_bytes, "dense_bytes": base.dense_bytes, "shapes": asdict(shapes)}

    def measured() -> Measured:
        return Measured(served(), copy_bandwidth(), options.batches, options.context, options.rounds, options.repeats)

    return [
        Section("bandwidth", 5, bandwidth),
        Section("build", 30, build),
        Section("compile", 30, lambda _: compile_nf4(build_room(options).requests, options.rank)),
        Section("capture", 45, lambda _: run_capture(measured())),
        Section("decode", 30, lambda _: run_decode(measured())),
        Section("engine", 60, lambda left: run_engine(measured(), left / 6)),
        Section("prefill", 15, lambda _: run_prefill(measured())),
        Section("chunks", 30, lambda _: run_chunks(measured())),
        Section("nf4", 60, lambda left: nf4(min(NF4_SECONDS, 0.4 * left), copy_bandwidth())),
        Section("lora", 30, lambda left: lora(min(LORA_SECONDS, 0.3 * left), copy_bandwidth())),
        Section("attention", 15, lambda left: attention(min(ATTENTION_SECONDS, 0.2 * left), copy_bandwidth())),
        Section("switches", 30, lambda _: run_switches(measured())),
        Section("launches", 15, lambda _: run_launches(measured())),
    ]


# Imported when they run: they need Triton, which installations without CUDA need not have.


def compile_nf4(requests: int, rank: int) -> dict[str, int]:
    """Compile the NF4 matmuls of captured steps on all cores; capturing them one by one would take minutes more."""
    from lora_kernels import SITES
    from lorikeet.kernels.lora_nf4_triton import can_fuse
    from lorikeet.kernels.nf4_dispatch import GemmTile, choose_way
    from lorikeet.kernels.overlap import lora_runs_in_matmul
    from lorikeet.server.engine.graph_sizes import GraphSizes
    from nf4_compile import LoraJob, compile_tiles
    from nf4_kernels import SHAPES

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (properties.major, properties.minor)
    most = max(len(widths) for _, widths in SITES.values())
    tiles: list[GemmTile] = []
    lora: list[tuple[GemmTile, LoraJob]] = []
    for name, shape in SHAPES.items():
        in_features, widths = SITES[name]
        for rows in sorted({size.tokens for size in GraphSizes(STEP_TOKENS, requests).all()}):
            for one_offset in (False, True):
                way = choose_way(capability, properties.multi_processor_count, rows, *shape, one_offset, True)
                if isinstance(way, GemmTile):
                    tiles.append(way)
                    one_slot = not lora_runs_in_matmul(rows, one_adapter=False)
                    if lora_runs_in_matmul(rows, one_adapter=True) and can_fuse(rows, way, widths):
                        lora.append((way, LoraJob(rows, in_features, widths, rank, most, one_slot)))
    tiles, lora = list(dict.fromkeys(tiles)), list(dict.fromkeys(lora))
    compile_tiles(tiles, capability, COMPILE_SECONDS, lora)
    return {"tiles": len(tiles), "with LoRA": len(lora)}


def nf4(seconds: float, copy_bandwidth: float) -> dict[str, Any]:
    """The NF4 matmul."""
    from nf4_kernels import as_text, measure_nf4

    found = measure_nf4(seconds, copy_bandwidth)
    shown = {**found, "failed": dict(list(found["failed"].items())[:5])}  # a kernel that fails does so in many tiles
    return {**found, "text": as_text(shown).splitlines()}


def lora(seconds: float, copy_bandwidth: float) -> dict[str, Any]:
    """LoRA's shrink and expand."""
    from lora_kernels import line, measure_lora

    found = measure_lora(seconds, copy_bandwidth)
    return {**found, "text": [line(row) for row in found["rows"]]}


def attention(seconds: float, copy_bandwidth: float) -> dict[str, Any]:
    """Paged attention of decodes."""
    from attention_kernels import line, measure_attention

    found = measure_attention(seconds, copy_bandwidth)
    return {**found, "text": [line(row) for row in found["rows"]]}


def build_model(options: argparse.Namespace) -> Served:
    """The model, with as many adapters as the largest batch has streams."""
    device = torch.device("cuda", torch.cuda.current_device())
    return serve_random(llama_3_8b(), build_room(options), device, torch.bfloat16, SEED)


def build_room(options: argparse.Namespace) -> Room:
    """What the largest batch needs, and prompts beside it."""
    largest = max(*options.batches, 16)
    width = -(-(options.context + SPARE_TOKENS) // BLOCK_SIZE)
    return Room(
        adapters=largest,
        rank=options.rank,
        step_tokens=STEP_TOKENS,
        requests=largest + 16,
        blocks=largest * width + SPARE_BLOCKS,
        block_size=BLOCK_SIZE,
        context=llama_3_8b().max_position_embeddings,
    )


def file_name(machine: dict[str, Any]) -> str:
    """`h100-80gb-hbm3-2026-11-22-bench`: card, date, what."""
    card = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower().removeprefix("nvidia")).strip("-")
    return f"{card}-{machine['date'][:10]}-bench"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=float, default=540.0, help="for everything; what does not fit is skipped [540]")
    add("--only", nargs="+", metavar="SECTION", help="run these, and what they need [all]")
    add("--batches", type=int, nargs="+", default=[1, 16, 64], help="streams at the same time [1 16 64]")
    add("--context", type=int, default=1024, help="tokens of each stream [1024]")
    add("--rank", type=int, default=16, help="of each adapter [16]")
    add("--rounds", type=int, default=5, help="in which the sides take turns [5]")
    add("--repeats", type=int, default=10, help="timed steps of a side in a round [10]")
    add("--commit", help="what the code is, where it is no git checkout")
    add("--out", type=Path, default=RESULTS, help="folder for JSON, tables and plot [benchmarks/results]")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
