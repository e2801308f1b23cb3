"""NF4 weights for the tests: random values, with constants nested, plain, or with many second-level offsets."""

import torch
from lorikeet.kernels.nf4_quantize import quantize_nf4
from lorikeet.kernels.nf4_weight import NestedAbsmax, NF4Weight, plain_absmax
from torch import Tensor

FORMS = ("nested", "plain", "stacked")
CPU = torch.device("cpu")


def make_weight(n: int, k: int, form: str = "nested", device: torch.device = CPU) -> NF4Weight:
    """A random weight. "stacked" gives every group of constants an offset and a scale of its own, as stacks have."""
    codes, absmax = quantize_nf4(torch.randn(n, k, device=device))
    if form == "plain":
        return NF4Weight(codes, plain_absmax(absmax), n, k)
    if form == "stacked":
        factors = 1 + torch.arange(absmax.scales.numel(), device=device) % 5
        absmax = NestedAbsmax(
            absmax.codes, absmax.code_map, absmax.scales * factors, absmax.offsets * factors, one_offset=False
        )
    return NF4Weight(codes, absmax, n, k)


def to_device(weight: NF4Weight, device: torch.device) -> NF4Weight:
    """The same weight elsewhere."""
    absmax = weight.absmax
    if isinstance(absmax, NestedAbsmax):
        tensors = (t.to(device) for t in (absmax.codes, absmax.code_map, absmax.scales, absmax.offsets))
        absmax = NestedAbsmax(*tensors, absmax.one_offset)
    else:
        absmax = absmax.to(device)
    return NF4Weight(weight.codes.to(device), absmax, weight.out_features, weight.in_features)


def tensors_of(weight: NF4Weight) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As the operators take a weight: codes, absmax, code_map, scales, offsets."""
    absmax = weight.absmax
    if isinstance(absmax, NestedAbsmax):
        return weight.codes, absmax.codes, absmax.code_map, absmax.scales, absmax.offsets
    return weight.codes, absmax, None, None, None


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN where either has one."""
    return float(torch.linalg.vector_norm(got.double() - want.double()) / torch.linalg.vector_norm(want.double()))


def worst_row_error(got: Tensor, want: Tensor) -> float:
    """The largest of the rows' own; NaN where any has one."""
    errors = torch.linalg.vector_norm(got.double() - want.double(), dim=1)
    return float((errors / torch.linalg.vector_norm(want.double(), dim=1)).max())
