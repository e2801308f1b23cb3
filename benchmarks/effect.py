"""Whether llama.cpp applies adapters as PEFT does: what each adds to the logits, on the one side and on the other.

A peer that applied the wrong adapter, or none, or applied it wrongly, would be no peer. The adapters are ten times as
strong as those that are timed: llama.cpp multiplies with activations in 8 bits, and what that changes in the logits is
as much as weak adapters add. PEFT runs on the base as it is, not in NF4: of the demo base, those are the weights of the
GGUF file. A constant added to all logits means nothing, so it is taken out.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from gguf_lora import write_gguf_lora
from llama_side import LlamaSide
from measurement import Spread
from transformers import AutoModelForCausalLM
from workload import LORA_B_STD, write_random_adapters

ADAPTERS = 3
STRONG_B_STD = 10 * LORA_B_STD


@dataclass(frozen=True, slots=True)
class Effect:
    """Cosines between what adapters add to the logits on one side and on the other.

    Attributes:
        same: of the same adapter, over the adapters.
        others: of two different ones, over all pairs.
    """

    same: Spread
    others: Spread

    @classmethod
    def of(cls, one: torch.Tensor, other: torch.Tensor) -> "Effect":
        """Compare what was added.

        Args:
            one: by the first side, [adapters, ...], two adapters or more.
            other: by the second, likewise.

        Raises:
            RuntimeError: some adapter is nearer to another one than to itself, so they are not the same adapters.
        """
        flat = [added.flatten(1).double() for added in (one, other)]
        normed = [added / added.norm(dim=1, keepdim=True) for added in flat]
        cosines = normed[0] @ normed[1].T
        alike = torch.eye(len(cosines), dtype=torch.bool)
        effect = cls(Spread.of(cosines[alike].tolist()), Spread.of(cosines[~alike].tolist()))
        if not effect.same.low > effect.others.high:
            raise RuntimeError(f"llama.cpp does not apply the adapters that PEFT applies: {effect.as_line()}")
        return effect

    def as_line(self) -> str:
        """For a report."""
        return (
            f"what an adapter adds to the logits, cosine between llama.cpp and PEFT: {self.same:.3f}; "
            f"of two different adapters: {self.others:.3f}"
        )


def measure_effect(
    base: Path, gguf_file: Path, folder: Path, prompts: list[list[int]], *, rank: int, threads: int
) -> Effect:
    """Compare a few strong adapters. Needs llama-cpp-python and PEFT.

    Args:
        base: the base model's directory.
        gguf_file: the same model for llama.cpp.
        folder: where adapters are written.
        prompts: of one length.
        rank: of the adapters.
        threads: CPU threads of llama.cpp.

    Raises:
        RuntimeError: see Effect.of.
    """
    ids = write_random_adapters(base, folder, count=ADAPTERS, rank=rank, seed=1, b_std=STRONG_B_STD)
    files = {name: folder / f"{name}.gguf" for name in ids}
    for name, file in files.items():
        write_gguf_lora(folder / name, base, file, gguf.GGMLQuantizationType.F32)
    llama = LlamaSide(gguf_file, files, threads=threads, streams=1, tokens=len(prompts[0]), flash=True)
    try:
        logits = [torch.stack([llama.last_logits(prompt, name) for prompt in prompts]) for name in (None, *ids)]
    finally:
        llama.close()
    return Effect.of(_added(torch.stack(logits)), _added(_in_peft(base, folder, ids, prompts)))


@torch.inference_mode()
def _in_peft(base: Path, folder: Path, ids: list[str], prompts: list[list[int]]) -> torch.Tensor:
    """The logits after each prompt of the base and with each adapter, float32 [1 + adapters, prompts, vocabulary]."""
    from peft import PeftModel  # may not be installed

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.tensor(prompts)
    logits = [model(tokens, logits_to_keep=1).logits[:, -1]]
    first, *rest = ids
    adapted = PeftModel.from_pretrained(model, folder / first, adapter_name=first)
    for name in rest:
        adapted.load_adapter(folder / name, adapter_name=name)
    for name in ids:
        adapted.set_adapter(name)
        logits.append(adapted(tokens, logits_to_keep=1).logits[:, -1])
    return torch.stack(logits)


def _added(logits: torch.Tensor) -> torch.Tensor:
    """What each adapter adds to the first row, the base, but for a constant."""
    added = logits[1:] - logits[:1]
    return added - added.mean(-1, keepdim=True)
