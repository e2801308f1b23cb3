"""The base of a merge, read from its checkpoint: the `MergeBase` that adapters are added to."""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from ..adapters.fingerprint import BaseFingerprint
from ..adapters.merge.base import Rows
from ..adapters.merge.targets import Onto
from ..adapters.sites import SiteTable
from ..kernels.nf4 import nf4_rows
from ..kernels.nf4_quantize import quantize_nf4
from ..kernels.nf4_weight import NF4Weight
from .base.base_hash import identify_base
from .base.checkpoint import BaseCheckpoint, quantization_of
from .base.families import check_servable
from .base.fill import dense_names, is_complete, is_ignorable, parameter_name, read_nf4, tied_names
from .base.loader import empty_model, read_config
from .base.module_table import describe_modules
from .base.site_plan import describe_sites, plan_sites
from .errors import BaseModelError

_CPU = torch.device("cpu")
_FLOATS = ("F16", "BF16", "F32")


class _Stored(NamedTuple):
    """A tensor of the checkpoint.

    Attributes:
        part: its name behind the path of its linear, such as `weight.absmax`; of a whole parameter its last name.
    """

    part: str
    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class _DenseRows:
    """The `Rows` of a parameter that is stored in 16 or 32 bit."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor = torch.atleast_1d(tensor)
        self.shape = tuple(self._tensor.shape)

    def read(self, start: int, stop: int) -> Tensor:
        return self._tensor[start:stop].to(torch.float32, copy=True)


class _NF4Rows:
    """The `Rows` of an NF4 weight: the values that a server computes with."""

    def __init__(self, weight: NF4Weight) -> None:
        self._weight = weight
        self.shape = (weight.out_features, weight.in_features)

    def read(self, start: int, stop: int) -> Tensor:
        return nf4_rows(self._weight, start, stop)


class CheckpointWeights:
    """A base for merging. Not safe for several threads; maps one file at a time.

    Args:
        source: directory or hub id that was asked for.
        directory: where its files are.
        name: its public name, where it is not `source`.

    Attributes:
        config: of the model.
        architecture: e.g. LlamaForCausalLM.
        fingerprint: how adapters may name it.
        checkpoint: its files.
        is_quantized: it is an NF4 checkpoint, so there are no 16-bit weights of its linears.
        onto: whose values linears have; may be set before the first `open`.
        sites, modules, shapes, linears: see `MergeBase`.

    Raises:
        BaseModelError: it could not be served, or its weights are damaged or incomplete.
    """

    def __init__(self, source: str, directory: Path, *, name: str = "") -> None:
        self.config: PretrainedConfig = read_config(directory)
        self.architecture = check_servable(self.config)
        self.is_quantized = quantization_of(self.config) is not None
        self.onto = Onto.NF4
        self.checkpoint = BaseCheckpoint(directory)
        self.fingerprint: BaseFingerprint = identify_base(source, name, directory, self.checkpoint)
        model = empty_model(self.config, torch.bfloat16)
        plans = plan_sites(model)
        self.sites = SiteTable(describe_sites(model, plans))
        self.modules = describe_modules(model)
        self._linears = {f"{plan.parent}.{leaf}" for plan in plans for leaf in plan.parts}
        self.linears = frozenset(f"{linear}.weight" for linear in self._linears)
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        dense = dense_names(model, plans)
        self._stored: dict[str, list[_Stored]] = defaultdict(list)
        for stored in self._read_headers():
            owner, part = self._place(stored.name, dense)
            if owner in expected and owner not in tied_names(model):
                self._stored[owner].append(stored._replace(part=part))
            elif not is_ignorable(model, owner):
                raise BaseModelError(
                    f"The checkpoint has a tensor {stored.name} that the architecture has no place for."
                )
        self._check(expected, set(expected) - set(tied_names(model)))
        self.shapes = {name: expected[name] for name in self._stored}
        self._open: tuple[Path, Any] | None = None

    def open(self, name: str) -> Rows:
        """See `MergeBase.open`.

        Raises:
            BaseModelError: the file is damaged.
        """
        parts = {stored.part: self._tensor(stored) for stored in self._stored[name]}
        if name not in self.linears:
            (tensor,) = parts.values()
            return _DenseRows(tensor)
        rows, columns = self.shapes[name]
        if self.is_quantized:
            codes, absmax, shape = read_nf4(name.rpartition(".")[0], parts, _CPU)
            if shape != (rows, columns):
                raise BaseModelError(f"{name} is {list(shape)}; the config asks for {[rows, columns]}.")
        elif self.onto is Onto.NF4:
            codes, absmax = quantize_nf4(parts["weight"])
        else:
            return _DenseRows(parts["weight"])
        return _NF4Rows(NF4Weight(codes, absmax, rows, columns))

    def _read_headers(self) -> list[_Stored]:
        found: list[_Stored] = []
        for file in self.checkpoint.files:
            try:
                with safe_open(file, framework="pt", device="cpu") as shard:
                    for name in shard.offset_keys():
                        piece = shard.get_slice(name)
                        found.append(_Stored("", file, name, tuple(piece.get_shape()), piece.get_dtype()))
            except SafetensorError as error:
                raise _damaged(file) from error
        return found

    def _place(self, raw: str, dense: set[str]) -> tuple[str, str]:
        """(parameter, part of it) of a tensor of the checkpoint."""
        name = parameter_name(raw, dense, self._linears)
        linear = name.rpartition(".")[0]
        owner = linear if linear in self._linears else name.partition(".weight.")[0]
        if owner not in self._linears:
            return name, name.rpartition(".")[2]
        part = name.removeprefix(f"{owner}.")
        return (name, part) if part == "bias" else (f"{owner}.weight", part)

    def _check(self, expected: dict[str, tuple[int, ...]], required: set[str]) -> None:
        absent = sorted(required - self._stored.keys())
        if absent:
            raise BaseModelError(f"The checkpoint lacks {len(absent)} tensors: {', '.join(absent[:4])}.")
        for name, parts in self._stored.items():
            if self.is_quantized and name in self.linears:
                found = {stored.part: torch.empty(0, dtype=_meta_dtype(stored.dtype)) for stored in parts}
                if not is_complete(found):
                    raise BaseModelError(f"The checkpoint lacks tensors of the 4-bit weight {name}.")
                continue
            if len(parts) != 1:
                raise BaseModelError(f"The checkpoint has {name} more than once, or in a form that is not known.")
            (stored,) = parts
            if stored.shape != expected[name]:
                raise BaseModelError(
                    f"Tensor {name} is {list(stored.shape)}; the config asks for {list(expected[name])}."
                )
            if stored.dtype not in _FLOATS:
                raise BaseModelError(f"{name} is {stored.dtype}; 16- or 32-bit floats can be merged.")

    def _tensor(self, stored: _Stored) -> Tensor:
        if self._open is None or self._open[0] != stored.file:
            self._open = None  # lets go of the file before, and of its pages
            try:
                self._open = stored.file, safe_open(stored.file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise _damaged(stored.file) from error
        try:
            tensor: Tensor = self._open[1].get_tensor(stored.name)
        except SafetensorError as error:
            raise _damaged(stored.file) from error
        return tensor


def _meta_dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "F32" else torch.uint8


def _damaged(file: Path) -> BaseModelError:
    return BaseModelError(f"The weights file {file.name} is truncated or damaged; copy it again.")
