"""`make bench-gpu`: the comparison of bench.py on a CUDA device, with Llama-3-8B shapes and random NF4 weights.

Both sides load the same checkpoint, written here (6.6 GB of temporary disk, no network), and compute in bfloat16. Meant
to end within ten minutes. Prints progress, then the table last; writes JSON and a plot.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from comparison import Side, compare
from lorikeet_side import LorikeetSide
from machine import describe_machine, one_line
from peft_side import PeftSide
from report import Ratio, agreement_line, as_json, as_text, write
from synthetic_model import llama_3_8b, write_random_llama
from workload import Workload, in_turn, write_random_adapters

MIXED, BASE, PEFT = "Lorikeet mixed", "Lorikeet base", "PEFT mixed"
RATIOS = (Ratio(MIXED, PEFT), Ratio(MIXED, BASE, of_step_time=True))
RESULTS = Path(__file__).resolve().parent / "results"
SEED = 7
SHARD_BYTES = 2**30
DISK_BYTES = 9 * 10**9  # model and adapters, rounded up
# KV of 64 streams at 1024 tokens is 8.6 GB a side; weights and adapters are 7.5 GB a side.
GPU_BYTES = 40 * 10**9


def main() -> int:
    """Run the comparison.

    Returns:
        The exit status; 0 without measuring where there is no CUDA device.
    """
    options = parse()
    if not torch.cuda.is_available():
        sys.stdout.write("bench-gpu: skipped, torch finds no CUDA device here.\n")
        return 0
    free, _ = torch.cuda.mem_get_info()
    if free < GPU_BYTES or shutil.disk_usage(tempfile.gettempdir()).free < DISK_BYTES:
        sys.stdout.write(
            f"bench-gpu: skipped, it needs {GPU_BYTES // 10**9} GB of free GPU memory and {DISK_BYTES // 10**9} GB of "
            "free temporary disk ($TMPDIR chooses which).\n"
        )
        return 0
    transformers.utils.logging.disable_progress_bar()
    machine = describe_machine()
    workloads = [Workload(n, options.prompt, options.tokens) for n in options.streams]
    config = llama_3_8b()
    with tempfile.TemporaryDirectory() as scratch:
        base, adapters = Path(scratch) / "base", Path(scratch) / "adapters"
        sys.stderr.write("  writing a random NF4 checkpoint and adapters\n")
        write_random_llama(base, config, shard_bytes=SHARD_BYTES, nf4=True, device="cuda", seed=SEED)
        ids = write_random_adapters(base, adapters, count=options.adapters, rank=options.rank, seed=SEED)
        sys.stderr.write("  loading both sides\n")
        lorikeet = LorikeetSide(
            base,
            adapters,
            ids,
            device="cuda",
            compute_dtype="bfloat16",
            # Room for the other side, too.
            kv_cache_bytes="12GiB",
            adapter_device_bytes="4GiB",
            adapter_host_bytes="8GiB",
            step_tokens=8192,
        )
        peft = PeftSide(base, adapters, ids, torch.bfloat16, "cuda")
        try:
            series = compare(
                [
                    Side(MIXED, lambda prompts, n: lorikeet.run(prompts, in_turn(ids, len(prompts)), n)),
                    Side(BASE, lambda prompts, n: lorikeet.run(prompts, None, n)),
                    Side(PEFT, lambda prompts, n: peft.run(prompts, in_turn(ids, len(prompts)), n)),
                ],
                workloads,
                rounds=options.rounds,
                vocab_size=config.vocab_size,
            )
        finally:
            lorikeet.close()
    settings = {
        "command": "make bench-gpu",
        "base": "Llama-3-8B shapes, random weights, NF4, double quantization",
        "adapters": f"{options.adapters} adapters of rank {options.rank} on all linears",
        "prompt_tokens": options.prompt,
        "new_tokens": options.tokens,
        "rounds": options.rounds,
        "compute_dtype": "bfloat16",
        "nf4_bytes": lorikeet.nf4_bytes,
    }
    what = f"{settings['base']}; {settings['adapters']}, prompt {options.prompt}, {options.tokens} new tokens"
    result = as_json(series, RATIOS, machine, settings)
    for path in write(options.out, "bench_gpu", result, series, f"{what}\n{one_line(machine)}"):
        sys.stdout.write(f"wrote {path}\n")
    sys.stdout.write(f"{agreement_line(series, MIXED, PEFT)}\n{what}\n{one_line(machine)}\n\n")
    sys.stdout.write(as_text(series, RATIOS) + "\n")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--streams", type=int, nargs="+", default=[1, 16, 64], help="requests at the same time [1 16 64]")
    add("--prompt", type=int, default=960, help="tokens in each prompt [960]")
    add("--tokens", type=int, default=64, help="tokens to generate for each [64]")
    add("--adapters", type=int, default=8, help="random adapters [8]")
    add("--rank", type=int, default=16, help="of each adapter [16]")
    add("--rounds", type=int, default=3, help="times that every side runs [3]")
    add("--out", type=Path, default=RESULTS, help="folder for JSON and plot [benchmarks/results]")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
