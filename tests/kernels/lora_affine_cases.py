"""Inputs for LoRA's affine in which everything that must not be read is NaN, and what must hold of the output."""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from lorikeet.kernels.lora_reference import lora_affine_reference_
from torch import Tensor

from .lora_cases import bits

# (atol, rtol). fp32 differs where the product is not rounded before the offset is added; the same makes 16-bit results
# one unit in the last place different where the fp32 values lie on either side of a tie.
AFFINE_TOLERANCES = {torch.float32: (1e-6, 1e-6), torch.float16: (1e-6, 1e-3), torch.bfloat16: (1e-6, 8e-3)}
NUM_SLOTS = 12


@dataclass(frozen=True)
class AffineCase:
    """Arguments of the operator.

    Attributes:
        y: [num_tokens, width], NaN in the rows that no segment owns.
        arena: NaN outside the gains and offsets of slots that the segments use.
        tables: offsets, seg_starts, seg_slots.
    """

    y: Tensor
    arena: Tensor
    tables: tuple[Tensor, Tensor, Tensor]

    def touched(self) -> Tensor:
        """Returns which rows have gains and offsets: bool [num_tokens]."""
        offsets, starts, slots = self.tables
        touched = torch.zeros(self.y.shape[0], dtype=torch.bool)
        for g, slot in enumerate(slots.tolist()):
            touched[int(starts[g]) : int(starts[g + 1])] = slot >= 0 and int(offsets[slot]) >= 0
        return touched


def make_affine_case(
    segments: Sequence[tuple[int, int]],
    *,
    width: int = 230,
    without: Collection[int] = (1, 5),
    dtype: torch.dtype = torch.float32,
    padding_rows: int = 3,
    aligned: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> AffineCase:
    """Builds a case of the given (slot, rows) segments over NUM_SLOTS slots; those in `without` have no gains.

    Gains and offsets lie in shuffled order with gaps, at odd elements, unless `aligned`, in which case they lie in
    order, evenly spaced.
    """
    generator = torch.Generator().manual_seed(seed)
    order = [slot for slot in range(NUM_SLOTS) if slot not in without]
    if not aligned:
        random.Random(seed).shuffle(order)
    offsets = torch.full((NUM_SLOTS,), -1, dtype=torch.int64)
    end = 0
    for slot in order:
        end = -(-end // 64) * 64 if aligned else end + 3 + end % 2
        offsets[slot] = end
        end += 2 * width
    arena = torch.full((end + 5,), torch.nan)
    for slot in {slot for slot, rows in segments if slot >= 0 and rows > 0} - set(without):
        start = int(offsets[slot])
        arena[start : start + width] = 1 + torch.randn(width, generator=generator) / 4
        arena[start + width : start + 2 * width] = torch.randn(width, generator=generator)
    starts = torch.tensor([0, *(rows for _, rows in segments)]).cumsum(0).to(torch.int32)
    num_rows = int(starts[-1])
    y = torch.full((num_rows + padding_rows, width), torch.nan)
    y[:num_rows] = torch.randn(num_rows, width, generator=generator)
    y[:num_rows, ::7] = -0.0  # times 1 plus 0 would flip its sign: no bit may change where no adapter asks for it
    slots = torch.tensor([slot for slot, _ in segments], dtype=torch.int32)
    return AffineCase(
        y.to(device, dtype), arena.to(device, dtype), (offsets.to(device), starts.to(device), slots.to(device))
    )


def assert_affine_equals_reference(case: AffineCase, affine_: Callable[..., None]) -> None:
    """Runs the operator and compares it with the reference: other rows are untouched, and no NaN reaches a result."""
    expected = case.y.clone()
    lora_affine_reference_(expected, case.arena, *case.tables)
    # Rows of a wider tensor, as a slice of a stacked linear's output is; what lies beside them must stay.
    wide = torch.full((case.y.shape[0], case.y.shape[1] + 24), 7.0, dtype=case.y.dtype, device=case.y.device)
    y = wide[:, 8:-16]
    y.copy_(case.y)
    affine_(y, case.arena, *case.tables)
    touched = case.touched().to(y.device)
    assert torch.equal(bits(y)[~touched], bits(case.y)[~touched])
    atol, rtol = AFFINE_TOLERANCES[y.dtype]
    torch.testing.assert_close(y[touched], expected[touched], atol=atol, rtol=rtol)
    assert (wide[:, :8] == 7).all() and (wide[:, -16:] == 7).all()

    contiguous = case.y.clone()
    affine_(contiguous, case.arena, *case.tables)
    torch.testing.assert_close(contiguous[touched], y[touched], atol=0, rtol=0)
    assert torch.equal(bits(contiguous)[~touched], bits(case.y)[~touched])
