"""The tensors of an adapter's weights files: views of the bytes that were read, made when they are asked for."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from .errors import AdapterInvalidError
from .finite import all_finite
from .weights_file import TensorInfo, WeightsHeader

_DTYPES: Final = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class PayloadTensors(Mapping[str, Tensor]):
    """Name in the file -> its values: CPU, float16, bfloat16 or float32. Every value is finite.

    Args:
        headers: of the files, in their order.
        payloads: of each; writable bytes.

    Raises:
        AdapterInvalidError: a value is not finite; names the first tensor that has one.
    """

    def __init__(self, headers: Sequence[WeightsHeader], payloads: Sequence[memoryview]) -> None:
        self._places: dict[str, tuple[TensorInfo, memoryview]] = {}
        for header, payload in zip(headers, payloads, strict=True):
            infos = header.tensors.values()
            self._places |= zip(header.tensors, zip(infos, itertools.repeat(payload)), strict=True)
        # A run at a time: what a look at a tensor costs beside its bytes counts where there are hundreds of small ones.
        runs = ((payload, run) for header, payload in zip(headers, payloads, strict=True) for run in header.runs)
        if not all(all_finite(_view(payload, *run)) for payload, run in runs):
            self._refuse()

    def __getitem__(self, name: str) -> Tensor:
        info, payload = self._places[name]
        if info.start == info.stop:  # AdaLoRA may keep no rank at all; torch.frombuffer refuses an empty range
            return torch.empty(info.shape, dtype=_DTYPES[info.dtype])
        return _view(payload, info.dtype, info.start, info.stop).view(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _refuse(self) -> None:
        for name, tensor in self.items():
            if not all_finite(tensor):
                raise AdapterInvalidError(
                    f"Tensor {name!r} has values that are not finite (NaN or infinity).", {"tensor": name[:256]}
                )
        raise AssertionError("a value that is not finite belongs to a tensor")


def _view(payload: memoryview, dtype: str, start: int, stop: int) -> Tensor:
    kind = _DTYPES[dtype]
    return torch.frombuffer(payload, dtype=kind, count=(stop - start) // kind.itemsize, offset=start)
