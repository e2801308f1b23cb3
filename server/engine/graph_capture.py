"""How a step's launches are recorded once and repeated: the interface, and CUDA graphs.

A function that is captured must do the same launches every time: it reads what changes from tensors that stay where
they are, and waits for nothing. Step thread only, but for captures before the engine starts.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from ...kernels import overlap


class CaptureBackend(Protocol):
    """Turns a function into one that repeats its work."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record `run`, which may be called any number of times; returns what repeats it on the current stream.

        Raises:
            RuntimeError: it cannot be recorded; torch.OutOfMemoryError among others.
        """
        ...


class CudaCapture:
    """CUDA graphs that share one memory pool.

    What a captured function computes on the way lies in the pool, and every graph uses the same memory for it: only one
    may run at a time, and only what it wrote elsewhere outlives its run. Capturing the largest first lets the others
    fit into its memory.

    Args:
        device: where the captured functions run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # graphs that share a pool must be captured on the same stream
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `CaptureBackend`. Runs the function once before: kernels are compiled and loaded outside of captures."""
        current = torch.cuda.current_stream(self._device)
        current.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`: it gives all cached memory back each time, of which serving has use.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), _no_garbage_collection():
            with overlap.rehearsal():
                run()
            self._stream.synchronize()
            # Not "global": other threads copy adapters in meanwhile, and allocate memory. Not "thread_local": a kernel
            # that was not loaded before is loaded.
            # torch may keep tensors of its own from the first capture on: normal ones suit captures in either mode.
            with torch.inference_mode(False):
                graph.capture_begin(self._pool, capture_error_mode="relaxed")
            try:
                run()
            except BaseException:
                # The stream must leave capture mode; that the capture is of no use is known.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        return graph.replay


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A finalizer could free device memory in the middle of a capture, which invalidates it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
