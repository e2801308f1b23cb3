"""The other side: transformers and PEFT on the same NF4 base, with PEFT's mixed batch (`adapter_names`).

Given every advantage that its own `generate` has or could have: the adapter hooks are entered once for a whole run,
only the last position's logits are computed in prefill, adapters are in the compute dtype, and the loop does nothing
but pick the likeliest token.
"""

import contextlib
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measurement import Run
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache
from workload import in_turn

CALIBRATION_PROMPT = 8
CALIBRATION_TOKENS = 4


class PeftSide:
    """A base with adapters, ready to run.

    Args:
        base: the base model's directory, in 16 bit or already in NF4.
        adapters: folder with one subfolder for each adapter.
        adapter_ids: the subfolders to load.
        dtype: compute dtype.
        device: `cpu` or `cuda`.
    """

    def __init__(self, base: Path, adapters: Path, adapter_ids: list[str], dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self._device = device
        as_nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        quantized = hasattr(AutoConfig.from_pretrained(base), "quantization_config")
        # Even None would replace the quantization that a checkpoint brings along.
        extra: dict[str, Any] = {} if quantized else {"quantization_config": as_nf4}
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map={"": device}, **extra)
        first, *rest = adapter_ids
        # Without the cast to fp32 that PEFT makes for training: it would only slow PEFT down.
        peft = PeftModel.from_pretrained(model, adapters / first, adapter_name=first, autocast_adapter_dtype=False)
        for name in rest:
            peft.load_adapter(adapters / name, adapter_name=name, autocast_adapter_dtype=False)
        self._peft: Any = peft.to(dtype).eval() if dtype == torch.float32 else peft.eval()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], adapter_ids: list[str] | None, new_tokens: int) -> Run:
        """Generate greedily for all prompts at once.

        Args:
            prompts: of one length.
            adapter_ids: one for each prompt; None runs the base with every adapter switched off.
            new_tokens: for each prompt.
        """
        if adapter_ids is None:
            adapted = self._peft.disable_adapter()
        else:
            adapted = self._peft._enable_peft_forward_hooks(adapter_names=adapter_ids)
        ids = torch.tensor(prompts, device=self._device)
        cache = DynamicCache(config=self._peft.config)
        chosen: list[torch.Tensor] = []
        cpu = time.process_time()
        marks = [time.perf_counter()]
        with adapted if adapted is not None else contextlib.nullcontext():
            for _ in range(new_tokens):
                out = self._peft.base_model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
                chosen.append(ids)
                if self._device != "cpu":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())
        cpu_s = time.process_time() - cpu
        tokens: list[list[int]] = torch.cat(chosen, dim=1).tolist()
        return Run(
            wall_s=marks[-1] - marks[0],
            cpu_s=cpu_s,
            output_tokens=len(prompts) * new_tokens,
            # The first interval is the prefill.
            steps_s=[b - a for a, b in itertools.pairwise(marks[1:])],
            tokens=tokens,
        )


def fastest_peft(base: Path, adapters: Path, ids: list[str], prompts: list[list[int]]) -> PeftSide:
    """PEFT in fp32 or bf16, whichever decodes a batch of these prompts faster on this CPU."""
    # A short prompt: only decoding is timed, and prefill in bf16 takes long where it is emulated.
    short = [prompt[:CALIBRATION_PROMPT] for prompt in prompts]
    sides: list[tuple[float, PeftSide]] = []
    for dtype in (torch.float32, torch.bfloat16):
        side = PeftSide(base, adapters, ids, dtype, "cpu")
        step_ms = side.run(short, in_turn(ids, len(prompts)), CALIBRATION_TOKENS).step_ms
        sys.stderr.write(f"  PEFT in {dtype}: {step_ms:.1f} ms/step at {len(prompts)} streams\n")
        sides.append((step_ms, side))
    return min(sides, key=lambda timed: timed[0])[1]
