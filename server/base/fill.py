"""Streams a checkpoint's tensors into a model: linears quantized to NF4 one at a time, the rest as it is."""

from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...kernels.bnb import functional as bnb
from ...kernels.nf4_quantize import quantize_nf4, read_absmax
from ...kernels.nf4_weight import BLOCK, Absmax
from ..errors import BaseModelError
from .checkpoint import BaseCheckpoint
from .site_plan import SitePlan


def fill_model(
    model: nn.Module,
    plans: list[SitePlan],
    checkpoint: BaseCheckpoint,
    device: torch.device,
    dtype: torch.dtype,
    quantized: bool,
    progress: bool,
) -> None:
    """Stream every tensor of the checkpoint to its place; nothing but the tensor in hand is held twice.

    Raises:
        BaseModelError: a tensor is missing, unexpected, or of the wrong shape or dtype.
    """
    by_linear = {f"{p.parent}.{leaf}": (p, leaf) for p in plans for leaf in p.parts}
    wanted = dense_names(model, plans)
    tied = {n for n in tied_names(model) if n in wanted}
    nested: dict[str, dict[str, Tensor]] = defaultdict(dict)
    verb = "Loading NF4 base" if quantized else "Quantizing base to NF4"
    with tqdm(total=checkpoint.nbytes, unit="B", unit_scale=True, desc=verb, disable=not progress) as bar:
        for raw_name, tensor in checkpoint.tensors():
            bar.update(tensor.nbytes)
            name = parameter_name(raw_name, wanted, by_linear)
            linear = name.rpartition(".")[0]
            owner = linear if linear in by_linear else name.partition(".weight.")[0]
            if owner in by_linear:
                plan, part = by_linear[owner]
                if name == f"{owner}.bias":
                    _write_bias(plan, part, tensor, device, dtype)
                elif quantized:
                    nested[owner][name.removeprefix(f"{owner}.")] = tensor
                    if is_complete(nested[owner]):
                        _write_quantized(plan, part, nested.pop(owner), device)
                else:
                    _write_weight(plan, part, tensor, device)
            elif name in wanted:
                # A copy even where nothing changes: a view would keep its whole shard mapped.
                set_parameter(model, name, tensor.to(device=device, dtype=dtype, copy=True))
                wanted.discard(name)
            elif not is_ignorable(model, name):
                raise BaseModelError(f"The checkpoint has a tensor {raw_name} that the architecture has no place for.")
    absent = sorted(wanted - tied) + sorted(n for p in plans for n in p.missing)
    if absent:
        raise BaseModelError(f"The checkpoint lacks {len(absent)} tensors: {', '.join(absent[:4])}.")


def dense_names(model: nn.Module, plans: list[SitePlan]) -> set[str]:
    """Names of the parameters that stay 16-bit, tied ones included."""
    linears = {f"{p.parent}.{leaf}" for p in plans for leaf in p.parts}
    return {n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in linears}


def required_dense_names(model: nn.Module, plans: list[SitePlan]) -> set[str]:
    """Those of `dense_names` that a checkpoint must hold: all but the tied."""
    return dense_names(model, plans) - set(tied_names(model))


def parameter_name(name: str, wanted: Collection[str], by_linear: Collection[str]) -> str:
    """The model's name of a checkpoint's tensor: checkpoints of the bare decoder lack the `model.` prefix.

    Args:
        name: in the file.
        wanted: names of the parameters that stay 16-bit.
        by_linear: paths of the linears that become NF4.
    """
    prefixed = f"model.{name}"
    linear = prefixed.rpartition(".")[0]
    if prefixed in wanted or linear in by_linear or prefixed.partition(".weight.")[0] in by_linear:
        return prefixed
    return name


def tied_names(model: nn.Module) -> list[str]:
    """Parameters that are another one by another name, and so may be missing from a checkpoint."""
    keys = getattr(model, "_tied_weights_keys", None) or {}
    return list(keys) if getattr(model.config, "tie_word_embeddings", False) else []


def is_ignorable(model: nn.Module, name: str) -> bool:
    """Old checkpoints store rotary frequencies; tied ones may repeat lm_head."""
    return name.endswith("rotary_emb.inv_freq") or name in tied_names(model)


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a real tensor where the meta parameter `name` is."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    expected = module._parameters[leaf]
    assert expected is not None
    if expected.shape != value.shape:
        raise BaseModelError(f"Tensor {name} is {list(value.shape)}; the config asks for {list(expected.shape)}.")
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _write_weight(plan: SitePlan, part: str, tensor: Tensor, device: torch.device) -> None:
    _check_shape(plan, part, tuple(tensor.shape))
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise BaseModelError(f"{plan.parent}.{part}.weight is {tensor.dtype}; 16- or 32-bit floats can be quantized.")
    codes, absmax = quantize_nf4(tensor.to(device))
    _write_codes(plan, part, codes, absmax, device)


def is_complete(parts: dict[str, Tensor]) -> bool:
    """Whether these are all tensors of a bitsandbytes 4-bit weight; by their names without the linear's path."""
    state = any(k.startswith("weight.quant_state.") for k in parts)
    nested_ok = ("weight.nested_absmax" in parts) == ("weight.nested_quant_map" in parts)
    return (
        state
        and nested_ok
        and {"weight", "weight.absmax", "weight.quant_map"} <= set(parts)
        and ("weight.nested_absmax" in parts or _not_nested(parts))
    )


def _not_nested(parts: dict[str, Tensor]) -> bool:
    return parts["weight.absmax"].dtype == torch.float32


def read_nf4(linear: str, parts: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Absmax, tuple[int, ...]]:
    """Codes, block constants and [out, in] of a complete bitsandbytes 4-bit weight.

    Raises:
        BaseModelError: it is no NF4 in blocks of 64.
    """
    codes = parts["weight"].to(device).view(torch.uint8).reshape(-1)
    rest = {key: tensor for key, tensor in parts.items() if key != "weight"}
    state = bnb.QuantState.from_dict(rest, device=device)
    if state.quant_type != "nf4" or state.blocksize != BLOCK:
        raise BaseModelError(
            f"{linear} is {state.quant_type} in blocks of {state.blocksize}; nf4 in blocks of 64 is served."
        )
    return codes, read_absmax(state), tuple(state.shape)


def _write_quantized(plan: SitePlan, part: str, parts: dict[str, Tensor], device: torch.device) -> None:
    codes, absmax, shape = read_nf4(f"{plan.parent}.{part}", parts, device)
    _check_shape(plan, part, shape)
    _write_codes(plan, part, codes, absmax, device)


def _check_shape(plan: SitePlan, part: str, shape: tuple[int, ...]) -> None:
    start, stop = plan.span(part)
    if shape != (stop - start, plan.in_features):
        raise BaseModelError(
            f"{plan.parent}.{part}.weight is {list(shape)}; the config asks for {[stop - start, plan.in_features]}."
        )


def _write_codes(plan: SitePlan, part: str, codes: Tensor, absmax: Absmax, device: torch.device) -> None:
    start, stop = plan.span(part)
    k, total = plan.in_features, sum(plan.widths)
    if plan.codes is None:
        plan.codes = torch.empty(total * k // 2, dtype=torch.uint8, device=device)
    plan.codes[start * k // 2 : stop * k // 2] = codes
    plan.add_absmax(part, absmax)
    plan.missing.discard(f"{plan.parent}.{part}.weight")


def _write_bias(plan: SitePlan, part: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    start, stop = plan.span(part)
    if plan.bias is None:
        plan.bias = torch.zeros(sum(plan.widths), dtype=dtype, device=device)
    plan.bias[start:stop] = tensor.to(device=device, dtype=dtype)
    plan.missing.discard(f"{plan.parent}.{part}.bias")
