"""Blank tensors are zeros, and cost nothing before something is written."""

import errno
import gc
import mmap
import resource
from pathlib import Path

import pytest
import torch
from lorikeet.kernels.blank import blank

from ..devices import CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 5, 2), (1,), (0,), (4, 0)], ids=str)
def test_zeros_to_write_on(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    first, second = blank(shape, dtype, CPU), blank(shape, dtype, CPU)
    assert first.shape == shape and first.dtype is dtype and first.is_contiguous()
    assert torch.equal(first, torch.zeros(shape, dtype=dtype))
    first.fill_(3)
    assert not second.any()
    view = first.flatten()
    del first, second
    gc.collect()
    assert (view == 3).all()


def test_memory_is_taken_when_it_is_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    tensor = blank((2**28,), torch.float32, CPU)
    assert resident() - before < 2**26
    tensor[: 2**25] = 1  # 128 MiB
    assert resident() - before > 2**26
    assert not tensor[2**25 : 2**25 + 1000].any()


def test_a_system_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(errno.EINVAL, "no huge pages")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    tensor = blank([3, 5], torch.float32, CPU)
    assert tensor.shape == (3, 5) and not tensor.any()
