"""How small kernels of a captured step start before what they follow has ended. Two ways, each with a switch.

A third way is not to launch them at all (`lora_nf4_triton`); its switch is here, too.

*Dependent launch* (programmatic dependent launch, compute capability 9.0): a kernel starts while the one before it on
the stream still runs, reads what that one can't write (tables, weights), and only then waits for it (`gdc_wait`). It
replaces the gap between two kernels, 1 us or more, and hides the first loads.
*Side stream*: work that doesn't depend on each other runs beside each other, between a fork and a join.

Only while a CUDA graph is being captured, and in the run before (`rehearsal`). Elsewhere launches are bound by the
host, so nothing would be won. And what a dependent kernel reads before it waits must not be written by the kernels
shortly before it; in a graph that holds, since tables and weights are its inputs, written before it is replayed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class OverlapSwitches:
    """What captured steps make use of; graphs that exist already stay as they are.

    Attributes:
        dependent_launch: kernels that know how are launched dependently.
        lora_side_stream: LoRA's shrink runs beside the base's matmul. Its kernels are not launched dependently then:
            what that means for a kernel with predecessors on two streams has not been tried.
        side_stream_rows: in steps of at least so many rows. In smaller ones the bytes that a side stream hides are
            worth less than the dependent launches that it costs (estimated, see `lora_triton`).
        lora_in_matmul: LoRA is part of the base's matmul, in steps that are not captured, too.
        in_matmul_rows: in steps of at most so many rows (estimated, see `lora_nf4_triton`).
        in_matmul_rows_of_one: the same where all rows that have an adapter have the same one.
    """

    dependent_launch: bool = True
    lora_side_stream: bool = True
    side_stream_rows: int = 8
    lora_in_matmul: bool = True
    in_matmul_rows: int = 4
    in_matmul_rows_of_one: int = 64


switches = OverlapSwitches()
_rehearsing = False


@contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, kernels are launched as while a graph is captured, so that those get compiled and loaded.

    For the run before a capture, on the one thread that captures. Nothing may be under way on the device that writes
    what the run reads.
    """
    global _rehearsing
    _rehearsing = True
    try:
        yield
    finally:
        _rehearsing = False


def launches_dependently(device: torch.device) -> bool:
    """Whether a kernel that is launched now may start before the one before it on the current stream has ended."""
    return (
        switches.dependent_launch
        and device.type == "cuda"
        and _is_captured()
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def lora_runs_beside(num_rows: int) -> bool:
    """Whether a site with so many rows forks now, in order to run its shrink on the side stream."""
    return switches.lora_side_stream and num_rows >= switches.side_stream_rows and _is_captured()


def lora_runs_in_matmul(num_rows: int, one_adapter: bool) -> bool:
    """Whether a site with so many rows does LoRA in the base's matmul, where that knows how.

    Args:
        num_rows: of the step.
        one_adapter: all rows that have an adapter have the same one.
    """
    most = switches.in_matmul_rows_of_one if one_adapter else switches.in_matmul_rows
    return switches.lora_in_matmul and num_rows <= most


def _is_captured() -> bool:
    return _rehearsing or torch.cuda.is_current_stream_capturing()


class SideStream:
    """A second stream beside the current one.

    Tensors that are allocated inside `beside` may be freed after `join` without further ado: the next fork waits for
    all that was launched on the current stream by then, so what reuses their memory runs later than what read them.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched inside follows what the current stream has so far, and runs beside what it gets later."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        except BaseException:
            self.join()  # a capture can only end when all of its streams have been joined
            raise

    def join(self) -> None:
        """What the current stream gets from now on follows what was launched inside `beside`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
