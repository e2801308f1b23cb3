"""The stand-ins for the operators are called in their place, and no longer than they should be."""

import re
from pathlib import Path

import torch
from lorikeet.kernels import lora
from torch import Tensor

from ..devices import on_each_device
from ..kernels.lora_affine_cases import NUM_SLOTS, make_affine_case
from ..kernels.lora_cases import make_case
from ..kernels.popularity import get_segments
from .plain_kernels import REFERENCES, operators, plain_kernels

TESTS = Path(__file__).resolve().parents[1]


def test_every_operator_has_a_plain_reference() -> None:
    assert operators() == REFERENCES.keys()


@on_each_device
def test_references_stand_in_and_go(device: torch.device) -> None:
    segments = get_segments("zipf", 12, min(5, NUM_SLOTS))
    case = make_case(segments, padding_rows=0, device=str(device))
    affine = make_affine_case(segments, padding_rows=0, device=str(device))

    def run() -> tuple[Tensor, Tensor, Tensor]:
        h = lora.lora_shrink(case.x, case.arena, *case.tables, case.max_rank, case.weights)
        y = case.y.clone()
        lora.lora_expand_(y, h, case.arena, *case.tables, case.slice_widths, case.x.shape[1])
        scaled = affine.y.clone()
        lora.lora_affine_(scaled, affine.arena, *affine.tables)
        return h.sum(dim=0), y, scaled

    fast = run()
    with plain_kernels(device) as calls:
        for got, want in zip(fast, run(), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert calls == dict.fromkeys(("lora_shrink", "lora_expand_", "lora_affine_"), 1)
    for got, want in zip(fast, run(), strict=True):
        assert torch.equal(got, want)
    assert calls.total() == 3


def test_make_test_gpu_runs_every_test_that_is_marked_so() -> None:
    makefile = (TESTS.parent / "Makefile").read_text()
    (folders,) = re.findall(r"^GPU_TESTS = (.*)$", makefile, re.MULTILINE)
    names = r"\bmark\.gpu\b|\bon_each_device\b|\bplaces\(|\bgpu_place\b"
    marked = {path for path in TESTS.rglob("test_*.py") if re.search(names, path.read_text())}
    run = {path for folder in folders.split() for path in (TESTS.parent / folder).rglob("test_*.py")}
    assert marked <= run
