"""4-bit weights in the layouts of AWQ and GPTQ, as the values that they stand for, to be evaluated without kernels.

transformers reads these layouts by a package of GPU kernels (gptqmodel), which asks for versions of torch and others of
its own. What a model answers depends on the values alone, so they are unpacked here; how fast it would answer cannot be
said then. AutoRound's layout is GPTQ's; auto-round reads it itself, but computes in float16, which takes a CPU minutes
where float32 takes seconds, so on a CPU it is unpacked too. Both layouts hold eight values in an int32, in groups of
rows that share a scale and a zero point: weight = (q - zero) * scale.

AWQ (github.com/casper-hansen/AutoAWQ, version GEMM): qweight [in, out / 8] and qzeros [in / group, out / 8] pack
columns, those of an int32 in the order 0 2 4 6 1 3 5 7 from the lowest bits. GPTQ (github.com/AutoGPTQ/AutoGPTQ):
qweight [in / 8, out] packs rows and qzeros [in / group, out / 8] columns, in their order; zero points are stored less
one, but for its format gptq_v2. Scales are float16 [in / group, out] in both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from .errors import EvaluationError

_BITS: Final = 4
_PER_WORD: Final = 32 // _BITS
# Of the bits of an AWQ int32 from the lowest, the column that each four belong to; and where a column's four are.
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACES: Final = tuple(_AWQ_ORDER.index(column) for column in range(_PER_WORD))


def layout_of(settings: Mapping[str, Any], device: torch.device) -> str:
    """Which layout a model's weights are unpacked from: `awq`, `gptq`, or nothing where a package reads them.

    Args:
        settings: the quantization's, from its config.json; empty where there is none.
        device: that evaluates the model.
    """
    method = str(settings.get("quant_method", ""))
    if method == "auto-round" and device.type == "cpu" and settings.get("packing_format") == "auto_round:auto_gptq":
        return "gptq"
    return method if method in ("awq", "gptq") else ""


def unpack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """One weight.

    Args:
        qweight: int32 [in, out / 8].
        qzeros: int32 [in / group, out / 8].
        scales: float16 [in / group, out].

    Returns:
        float32 [out, in].
    """
    places = torch.tensor(_AWQ_PLACES)
    values, zeros = (_nibbles(packed)[..., places].flatten(1) for packed in (qweight, qzeros))
    return _weight(values, zeros, scales)


def unpack_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, less_one: bool) -> Tensor:
    """One weight, whose rows are in their order (no `desc_act`).

    Args:
        qweight: int32 [in / 8, out].
        qzeros: int32 [in / group, out / 8].
        scales: float16 [in / group, out].
        less_one: zero points are stored less one.

    Returns:
        float32 [out, in].
    """
    values = _nibbles(qweight).transpose(1, 2).flatten(0, 1)
    return _weight(values, _nibbles(qzeros).flatten(1) + int(less_one), scales)


def load_unpacked(directory: Path, settings: Mapping[str, Any], layout: str, dtype: torch.dtype) -> Any:
    """A causal LM of transformers with unpacked weights, on the CPU.

    Args:
        directory: of the model.
        settings: the quantization's, from its config.json.
        layout: of its weights, `awq` or `gptq`.
        dtype: of the weights, and of what it computes in.

    Raises:
        EvaluationError: weights of another number of bits, or sorted rows.
        OSError, ValueError, KeyError, RuntimeError: the files are not what the config says.
    """
    if settings.get("bits") != _BITS or settings.get("desc_act") or settings.get("version", "gemm") != "gemm":
        raise EvaluationError(
            f"{directory.name} is quantized with {settings.get('quant_method')} in a form that is not read here; read "
            "are 4 bits without desc_act, of AWQ the version gemm.",
            {"field": "model"},
        )
    stored = {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    for path in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        qweight, qzeros, scales = (stored.pop(f"{path}.{part}") for part in ("qweight", "qzeros", "scales"))
        stored.pop(f"{path}.g_idx", None)  # without desc_act rows are in their order
        if layout == "awq":
            weight = unpack_awq(qweight, qzeros, scales)
        else:
            less_one = settings.get("checkpoint_format") != "gptq_v2"
            weight = unpack_gptq(qweight, qzeros, scales, less_one=less_one)
        stored[f"{path}.weight"] = weight.to(dtype)
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    del config.quantization_config
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return family.from_pretrained(None, config=config, state_dict=stored, dtype=dtype)


def _nibbles(packed: Tensor) -> Tensor:
    """int32 [a, b] -> int32 [a, b, 8], the lowest bits first."""
    shifts = torch.arange(0, 32, _BITS, dtype=torch.int32)
    return (packed.unsqueeze(-1) >> shifts) & (2**_BITS - 1)


def _weight(values: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """(q - zero) * scale, turned.

    Args:
        values: int32 [in, out].
        zeros: int32 [in / group, out].
        scales: [in / group, out].
    """
    group = values.shape[0] // scales.shape[0]
    spread_zeros, spread_scales = (each.repeat_interleave(group, 0) for each in (zeros, scales.float()))
    return ((values - spread_zeros) * spread_scales).t().contiguous()
