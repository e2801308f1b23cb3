"""Peak host memory of loading a 16-bit model into NF4; it may be 1.3 x the largest shard + the loaded size.

`python benchmarks/load_memory.py` writes a random sharded model (1 GB of temporary disk) and loads it in a process of
its own. The peak is the kernel's high-water mark of resident memory (mapped file pages included) above what the process
held when the load began.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ALLOWED_SHARDS = 1.3
SHARD_BYTES = 250 * 10**6


def main() -> int:
    """Measure and print.

    Returns:
        The exit status: 1 when the peak is above the allowed one.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the child's part
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="size of a shard [250000000]")
    options = parser.parse_args()
    if options.load is not None:
        sys.stdout.write(json.dumps(load(options.load)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        from synthetic_model import llama_half_billion, write_random_llama

        folder = Path(scratch)
        shard = write_random_llama(folder, llama_half_billion(), shard_bytes=options.shard_bytes, seed=0)
        checkpoint = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        child = subprocess.run(
            [sys.executable, __file__, "--load", scratch], stdout=subprocess.PIPE, text=True, check=True
        )
    measured = json.loads(child.stdout)
    allowed = ALLOWED_SHARDS * shard + measured["loaded_bytes"]
    sys.stdout.write(
        f"16-bit checkpoint       {_mb(checkpoint)}, largest shard {_mb(shard)}\n"
        f"loaded                  {_mb(measured['loaded_bytes'])}, of which NF4 {_mb(measured['nf4_bytes'])}\n"
        f"peak while loading      {_mb(measured['peak_bytes'])}\n"
        f"allowed                 {_mb(allowed)} = {ALLOWED_SHARDS} x largest shard + loaded\n"
        f"peak / allowed          {measured['peak_bytes'] / allowed:.2f}\n"
        f"above the loaded size   {_mb(measured['peak_bytes'] - measured['loaded_bytes'])} "
        f"= {(measured['peak_bytes'] - measured['loaded_bytes']) / shard:.2f} x largest shard\n"
    )
    return int(measured["peak_bytes"] > allowed)


def load(folder: Path) -> dict[str, Any]:
    """Load a model and tell its size and the peak above what was resident before."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from lorikeet.server.base.loader import load_base

    # What the first quantization sets up once is no part of the model.
    quantize_4bit(torch.zeros(64, 64), quant_type="nf4", compress_statistics=True)
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    base = load_base(str(folder), device=torch.device("cpu"), compute_dtype=torch.bfloat16, progress=False)
    return {
        "peak_bytes": _status_bytes("VmHWM") - before,
        "loaded_bytes": base.nf4_bytes + base.dense_bytes,
        "nf4_bytes": base.nf4_bytes,
    }


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _mb(size: float) -> str:
    return f"{size / 1e6:8.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
