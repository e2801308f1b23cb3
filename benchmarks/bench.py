"""`make bench`: Lorikeet beside PEFT's mixed batch on this CPU, and what each adapter format costs; sides take turns.

The base is the demo base, in NF4 with double quantization on all sides, with random adapters over all linears. Beside
PEFT, each side computes in the type that is fastest for it here. Prints ratios first and writes JSON and plots.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from comparison import Side, compare
from format_cost import measure_formats
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.config import ServerConfig
from lorikeet_side import LorikeetSide
from machine import describe_machine, one_line
from measurement import Run
from peft_side import PeftSide
from report import Ratio, agreement_line, as_json, as_text, write
from workload import Size, Workload, in_turn, write_random_adapters

MIXED, BASE, PEFT = "Lorikeet mixed", "Lorikeet base", "PEFT mixed"
RATIOS = (Ratio(MIXED, PEFT), Ratio(MIXED, BASE, of_step_time=True))
RESULTS = Path(__file__).resolve().parent / "results"
SEED = 7
CALIBRATION_PROMPT = 8
BESIDE_PEFT, FORMATS = "peft", "formats"
DEFAULT_SIZES = {
    BESIDE_PEFT: Size(streams=(1, 8, 32), prompt=64, tokens=64, adapters=8, rounds=3),
    # Only decode steps count, so prompts are short; differences are small, so there are more rounds.
    FORMATS: Size(streams=(8, 32), prompt=16, tokens=16, adapters=4, rounds=5),
}


def main() -> int:
    """Run both, or the one asked for.

    Returns:
        The exit status.
    """
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    machine = describe_machine()
    if machine["load_average"] > 0.5:
        sys.stderr.write(
            f"The machine is busy (load {machine['load_average']}); the numbers will be worse than it is.\n"
        )
    base = options.model or prepare_demo_base(ServerConfig().cache_dir)
    if options.only in (None, BESIDE_PEFT):
        measure_beside_peft(base, size_of(BESIDE_PEFT, options), options, machine)
    if options.only in (None, FORMATS):
        measure_formats(
            base,
            size_of(FORMATS, options),
            rank=options.rank,
            threads=options.threads,
            seed=SEED,
            machine=machine,
            out=options.out,
        )
    return 0


def measure_beside_peft(base: Path, size: Size, options: argparse.Namespace, machine: dict[str, Any]) -> None:
    """Lorikeet and PEFT on the same work: prints the table, writes JSON and plot."""
    vocab_size = transformers.AutoConfig.from_pretrained(base).vocab_size
    workloads = [Workload(n, size.prompt, size.tokens) for n in size.streams]
    with tempfile.TemporaryDirectory() as scratch:
        adapters = Path(scratch)
        ids = write_random_adapters(base, adapters, count=size.adapters, rank=options.rank, seed=SEED)
        lorikeet = LorikeetSide(base, adapters, ids, threads=options.threads)
        peft = fastest_peft(base, adapters, ids, workloads[-1], vocab_size)
        try:
            series = compare(
                [
                    Side(MIXED, lambda prompts, n: lorikeet.run(prompts, in_turn(ids, len(prompts)), n)),
                    Side(BASE, lambda prompts, n: lorikeet.run(prompts, None, n)),
                    Side(PEFT, lambda prompts, n: peft.run(prompts, in_turn(ids, len(prompts)), n)),
                ],
                workloads,
                rounds=size.rounds,
                vocab_size=vocab_size,
            )
        finally:
            lorikeet.close()
    settings = {
        "command": "make bench",
        "base": "demo (SmolLM2-135M-Instruct), NF4, double quantization" if options.model is None else "--model",
        "adapters": f"{size.adapters} adapters of rank {options.rank} on all linears",
        "prompt_tokens": size.prompt,
        "new_tokens": size.tokens,
        "rounds": size.rounds,
        "compute_dtype": {"Lorikeet": type_name(lorikeet.dtype), "PEFT": type_name(peft.dtype)},
    }
    dtypes = "Lorikeet in {Lorikeet}, PEFT in {PEFT}".format(**settings["compute_dtype"])
    sys.stdout.write(f"\n{as_text(series, RATIOS)}\n\n{agreement_line(series, MIXED, PEFT)}; {dtypes}\n")
    sys.stdout.write(f"{one_line(machine)}\n")
    title = f"{settings['adapters']}, prompt {size.prompt}, {size.tokens} new tokens; {dtypes}\n{one_line(machine)}"
    for path in write(options.out, "bench_cpu", as_json(series, RATIOS, machine, settings), series, title):
        sys.stdout.write(f"wrote {path}\n")


def parse() -> argparse.Namespace:
    """The command line; the defaults are what the README's numbers were made with, those of --only formats second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=DEFAULT_SIZES, help="Lorikeet beside PEFT, or the cost of each format [both]")
    add("--streams", type=int, nargs="+", help="requests at the same time [1 8 32; 8 32]")
    add("--prompt", type=int, help="tokens in each prompt [64; 16]")
    add("--tokens", type=int, help="tokens to generate for each [64; 16]")
    add("--adapters", type=int, help="random adapters, or of each format [8; 4]")
    add("--rank", type=int, default=16, help="of each adapter [16]")
    add("--rounds", type=int, help="times that every side runs [3; 5]")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads [one for each core]")
    add("--model", type=Path, help="another base model's directory [the demo base]")
    add("--out", type=Path, default=RESULTS, help="folder for JSON and plot [benchmarks/results]")
    return parser.parse_args()


def size_of(part: str, options: argparse.Namespace) -> Size:
    """The part's default size with what the command line says instead."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Size)}
    return dataclasses.replace(DEFAULT_SIZES[part], **{name: value for name, value in given.items() if value})


def fastest_peft(base: Path, adapters: Path, ids: list[str], workload: Workload, vocab_size: int) -> PeftSide:
    """PEFT in fp32 or bf16, whichever decodes the largest batch faster here."""
    # A short prompt: only decoding is timed, and prefill in bf16 takes long where it is emulated.
    prompts = [prompt[:CALIBRATION_PROMPT] for prompt in workload.prompts(vocab_size, seed=SEED)]
    sides: list[tuple[float, PeftSide]] = []
    for dtype in (torch.float32, torch.bfloat16):
        side = PeftSide(base, adapters, ids, dtype, "cpu")
        run: Run = side.run(prompts, in_turn(ids, len(prompts)), 4)
        sys.stderr.write(f"  PEFT in {type_name(dtype)}: {run.step_ms:.1f} ms/step at {workload.streams} streams\n")
        sides.append((run.step_ms, side))
    return min(sides, key=lambda timed: timed[0])[1]


def type_name(dtype: torch.dtype) -> str:
    """`float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
