"""A model directory as transformers loads it: plain, or quantized in any way that it has a package for.

Of AWQ's and GPTQ's layouts, and on a CPU of AutoRound's, the values are unpacked (packed_layouts.py).
"""

import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..golden_reference import compute_in_float32
from .errors import EvaluationError
from .packed_layouts import layout_of, load_unpacked

# What a quantization method of transformers needs, by the name in config.json: package -> what to install.
_PACKAGES: Final = {"auto-round": "auto-round", "bitsandbytes": "bitsandbytes"}


class TransformersModel:
    """A causal LM of transformers, evaluated as it would be used.

    Args:
        directory: a model that `from_pretrained` loads; no code from it is run.
        device: where it runs.
        compute_dtype: of activations. In float32 a 16-bit model computes with exactly the values that it stores.

    Attributes:
        disk_bytes: of its directory.
        resident_bytes: of its weights, as they are stored.
        is_timed: a step takes as long as in use; false where weights were unpacked.

    Raises:
        EvaluationError: it cannot be loaded; names the package where one is missing.
    """

    def __init__(self, directory: Path, *, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.disk_bytes = disk_bytes(directory)
        self.resident_bytes = tensor_bytes(directory)
        settings = _quantization(directory)
        self.is_timed = not layout_of(settings, device)
        self._device = device
        self._model = _load(directory, settings, device, compute_dtype)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], first: int) -> Tensor:
        """Logits that predict the tokens from `first` on.

        Args:
            token_ids: one window.
            first: at least 1.

        Returns:
            float [len(token_ids) - first, vocab] on the device.
        """
        ids = torch.tensor([token_ids[:-1]], device=self._device)
        found: Tensor = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(token_ids) - first).logits
        return found[0]

    @torch.inference_mode()
    def decode_step_s(self, prompt: Sequence[int], steps: int) -> float:
        """Median seconds of a greedy decode step of one sequence, of `steps` after the prompt."""
        out = self._model(input_ids=torch.tensor([prompt], device=self._device), use_cache=True)
        times: list[float] = []
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            out = self._model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - started)
        return median(times)


def disk_bytes(directory: Path) -> int:
    """Bytes of a directory's files, links followed (a hub snapshot is made of them)."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def tensor_bytes(directory: Path) -> int:
    """Bytes of the tensors in a directory's safetensors files: what the weights take in memory as they are stored.

    Raises:
        EvaluationError: there is none, or one is damaged.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise EvaluationError(f"{directory} has no safetensors file; give a model directory.", {"field": "model"})
    total = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    piece = opened.get_slice(name)
                    elements = 1
                    for size in piece.get_shape():
                        elements *= size
                    total += elements * _bits(piece.get_dtype()) // 8
        except SafetensorError:
            raise EvaluationError(f"{file.name} in {directory} is damaged.", {"field": "model"}) from None
    return total


def _bits(dtype: str) -> int:
    """Of one element, from safetensors' name of a type, such as BF16, U8 or F8_E4M3."""
    digits = dtype.partition("_")[0].lstrip("BFIU")
    return int(digits) if digits.isdigit() else 8  # BOOL is a byte


def _quantization(directory: Path) -> dict[str, Any]:
    """What config.json says of a quantization; nothing where there is none."""
    try:
        found: object = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        raise EvaluationError(f"{directory} has no readable config.json.", {"field": "model"}) from None
    return found if isinstance(found, dict) else {}


def _load(directory: Path, settings: dict[str, Any], device: torch.device, compute_dtype: torch.dtype) -> Any:
    method, layout = str(settings.get("quant_method", "")), layout_of(settings, device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if layout:
                model = load_unpacked(directory, settings, layout, compute_dtype).to(device).eval()
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    directory,
                    dtype=compute_dtype,
                    device_map={"": str(device)},
                    local_files_only=True,
                    use_safetensors=True,
                ).eval()
    except ImportError as error:
        package = _PACKAGES.get(method, method)
        raise EvaluationError(
            f"{directory.name} is quantized with {method or 'a method'} that this environment cannot load; install the "
            f"Python package {package}.",
            {"field": "model", "package": package},
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        kind = f" ({method})" if method else ""
        raise EvaluationError(
            f"transformers cannot load the model in {directory.name}{kind}: {type(error).__name__}.", {"field": "model"}
        ) from error
    if compute_dtype is torch.float32 and (layout or method in ("", "bitsandbytes")):
        compute_in_float32(model)
    return model
