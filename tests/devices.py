"""Where a test runs: the same code on the CPU in every test run, and on a CUDA device in those of `make test-gpu`."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch

CPU = torch.device("cpu")
# LORIKEET_TEST_DEVICE=cpu runs what is marked `gpu` on the CPU as far as that goes: a way to try the tests themselves.
GPU = torch.device(os.environ.get("LORIKEET_TEST_DEVICE", "cuda:0"))
HAS_GPU = GPU.type == "cpu" or torch.cuda.is_available()

needs_cuda = pytest.mark.skipif(GPU.type != "cuda", reason="nothing of it can be tried on a CPU")


on_each_device = pytest.mark.parametrize("device", [CPU, pytest.param(GPU, id="cuda", marks=pytest.mark.gpu)], ids=str)


class Place(NamedTuple):
    """A model family, and the device that it runs on."""

    family: str
    device: torch.device


def places(families: Iterable[str], group: str) -> list[object]:
    """Parameters of a fixture: every family on the CPU, and, marked `gpu`, on the CUDA device.

    Args:
        families: their names.
        group: with the family's name what pytest-xdist keeps in one process, because it is expensive to make.
    """
    found: list[object] = []
    for family in families:
        found.append(pytest.param(Place(family, CPU), id=family))
        found.append(gpu_place(family, group))
    return found


def gpu_place(family: str, group: str) -> object:
    """One family on the CUDA device."""
    marks = (pytest.mark.gpu, pytest.mark.xdist_group(f"{group}-{family}"))
    return pytest.param(Place(family, GPU), id=f"{family}-cuda", marks=marks)
