"""Keeps the quantized form of a 16-bit base on disk, so that only the first start pays for quantizing.

One safetensors file a (source files, compute dtype): the stacked codes and constants of every site, nested where they
can be, whatever device wrote it, and the tensors that stay 16-bit. It is only ever a copy: anything wrong with it means
quantizing again, and a full disk means doing without.
"""

import hashlib
import os
from pathlib import Path
from typing import Final

import structlog
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...kernels.nf4_weight import Absmax, NestedAbsmax
from .checkpoint import BaseCheckpoint
from .fill import required_dense_names, set_parameter
from .site_plan import SitePlan

_log = structlog.get_logger(__name__)

# Part of the key: raise it when the content of the file changes.
_FORMAT = "3"
# What lies beside the codes of nested constants.
_NESTED: Final = ("code_map", "scales", "offsets")


class NF4Cache:
    """The cache file of one checkpoint.

    Args:
        directory: cache root; files go to its folder `nf4`.
        checkpoint: the 16-bit source; its files' names, sizes and modification times are the key.
        dtype: compute dtype, in which the dense tensors are kept.
    """

    def __init__(self, directory: Path, checkpoint: BaseCheckpoint, dtype: torch.dtype) -> None:
        digest = hashlib.sha256(f"{_FORMAT} {dtype}".encode())
        for file in [checkpoint.directory / "config.json", *checkpoint.files]:
            stat = file.stat()
            digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
        self.path = directory / "nf4" / f"{digest.hexdigest()[:32]}.safetensors"

    def read(self, model: nn.Module, plans: list[SitePlan], device: torch.device) -> bool:
        """Fill the model from the cache; False (and the model untouched) when there is no usable file."""
        if not self.path.is_file():
            return False
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name).to(device) for name in file.offset_keys()}
        except (SafetensorError, OSError):
            _log.warning("nf4_cache_unreadable", path=str(self.path))
            return False
        required = {f"sites.{i}.{key}" for i in range(len(plans)) for key in ("codes", "absmax")}
        nested = {name for name in required if name.endswith(".absmax") and _is_nested(tensors, name)}
        required |= {f"{name}.{key}" for name in nested for key in _NESTED}
        if not required | required_dense_names(model, plans) <= tensors.keys():
            _log.warning("nf4_cache_incomplete", path=str(self.path))
            return False
        for index, plan in enumerate(plans):
            plan.codes = tensors.pop(f"sites.{index}.codes")
            plan.absmax = _take_absmax(tensors, f"sites.{index}.absmax", one_offset=len(plan.parts) == 1)
            plan.bias = tensors.pop(f"sites.{index}.bias", None)
            plan.missing.clear()
        for name, tensor in tensors.items():
            set_parameter(model, name, tensor)
        return True

    def write(self, model: nn.Module, plans: list[SitePlan]) -> None:
        """Store the filled model; a disk that is full or read-only is logged and otherwise ignored."""
        tensors: dict[str, Tensor] = {name: p.data for name, p in model.named_parameters() if p.device.type != "meta"}
        for index, plan in enumerate(plans):
            assert plan.codes is not None and plan.absmax is not None
            tensors[f"sites.{index}.codes"] = plan.codes
            tensors |= _name_absmax(plan.absmax, f"sites.{index}.absmax")
            if plan.bias is not None:
                tensors[f"sites.{index}.bias"] = plan.bias
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, temporary)
            temporary.replace(self.path)
        except (OSError, SafetensorError):
            _log.warning("nf4_cache_not_written", path=str(self.path), hint="the next start quantizes again")
        finally:
            temporary.unlink(missing_ok=True)


def _is_nested(tensors: dict[str, Tensor], name: str) -> bool:
    return name in tensors and tensors[name].dtype == torch.uint8


def _name_absmax(absmax: Absmax, name: str) -> dict[str, Tensor]:
    if not isinstance(absmax, NestedAbsmax):
        return {name: absmax}
    return {name: absmax.codes} | {f"{name}.{key}": getattr(absmax, key) for key in _NESTED}


def _take_absmax(tensors: dict[str, Tensor], name: str, *, one_offset: bool) -> Absmax:
    """Remove the constants that `_name_absmax` named."""
    nested = _is_nested(tensors, name)
    codes = tensors.pop(name)
    if not nested:
        return codes
    code_map, scales, offsets = (tensors.pop(f"{name}.{key}") for key in _NESTED)
    return NestedAbsmax(codes, code_map, scales, offsets, one_offset)
