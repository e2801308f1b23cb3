"""Peak host memory of merging an adapter into a 16-bit model; it may be 1.5 x the largest shard.

`python benchmarks/merge_memory.py` writes a random sharded model and an adapter for every linear of it (2 GB of
temporary disk with what is merged) and merges in a process of its own. The peak is the kernel's high-water mark of
resident memory (mapped pages of the model's files included) above what the process held before the merge was planned.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ALLOWED_SHARDS = 1.5
SHARD_BYTES = 250 * 10**6
RANK = 16


def main() -> int:
    """Measure and print.

    Returns:
        The exit status: 1 when the peak is above the allowed one.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)  # the child's part
    parser.add_argument("--onto", default="nf4", choices=["nf4", "original"], help="as for lorikeet merge [nf4]")
    parser.add_argument("--to", default="bf16", choices=["bf16", "nf4"], help="as for lorikeet merge [bf16]")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="size of a shard [250000000]")
    options = parser.parse_args()
    if options.merge is not None:
        sys.stdout.write(json.dumps(merge(options.merge, options.onto, options.to)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        from synthetic_model import llama_half_billion, write_random_llama

        folder = Path(scratch)
        config = llama_half_billion()
        shard = write_random_llama(folder / "model", config, shard_bytes=options.shard_bytes, seed=0)
        _write_adapter(folder / "adapter", config)
        checkpoint = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        child = subprocess.run(
            [sys.executable, __file__, "--merge", scratch, "--onto", options.onto, "--to", options.to],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    measured = json.loads(child.stdout)
    peak, allowed = measured["peak_bytes"], ALLOWED_SHARDS * shard
    sys.stdout.write(
        f"16-bit checkpoint       {_mb(checkpoint)}, largest shard {_mb(shard)}\n"
        f"merged onto {options.onto} to {options.to}, in {measured['seconds']:.1f} s: {_mb(measured['weight_bytes'])}\n"
        f"adapter in memory       {_mb(measured['adapter_bytes'])} (packed in float32, and its files)\n"
        f"peak while merging      {_mb(peak)} = {peak / shard:.2f} x largest shard\n"
        f"allowed                 {_mb(allowed)} = {ALLOWED_SHARDS} x largest shard\n"
        f"peak / allowed          {peak / allowed:.2f}\n"
    )
    return int(peak > allowed)


def merge(folder: Path, onto: str, to: str) -> dict[str, Any]:
    """Merge, and tell the peak above what was resident before."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from lorikeet.adapters.merge.targets import Onto, Target
    from lorikeet.server import merge_job, merge_plan
    from lorikeet.server.base.loader import outline_base

    # What the first quantization sets up, and transformers' code of the family, are no part of the merge.
    quantize_4bit(torch.zeros(64, 64), quant_type="nf4", compress_statistics=True)
    outline_base(str(folder / "model"), folder / "model")
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    request = merge_plan.MergeRequest(
        str(folder / "model"), (folder / "adapter",), Target(to), folder / "out", onto=Onto(onto)
    )
    plan = merge_plan.plan_merge(request)
    result = merge_job.merge(plan, lambda *_: None, lambda: False)
    return {
        "peak_bytes": _status_bytes("VmHWM") - before,
        "adapter_bytes": sum(
            member.packed.nbytes + sum(len(part) for parts in member.loaded.files.values() for part in parts)
            for member in plan.members
        ),
        "weight_bytes": result.weight_bytes,
        "seconds": result.seconds,
    }


def _write_adapter(folder: Path, config: Any) -> None:
    """A random adapter of every linear, as PEFT saves it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = config.num_key_value_heads * hidden // config.num_attention_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (out_features, in_features) in shapes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (RANK, in_features)), ("B", (out_features, RANK))):
                values = torch.randn(shape, generator=generator) * 0.02
                tensors[f"{path}.lora_{part}.weight"] = values.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _mb(size: float) -> str:
    return f"{size / 1e6:8.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
