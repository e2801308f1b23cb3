"""The order of calls around a CUDA capture, on a stand-in for torch.cuda; what it captures is tested on a GPU."""

import gc
from contextlib import contextmanager

import pytest
import torch
from lorikeet.kernels import overlap
from lorikeet.server.engine.graph_capture import CudaCapture


class FakeCuda:
    """Keeps a diary of calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.invalid = False
        fake = self

        class Stream:
            def __init__(self, device: object = None) -> None:
                self.name = "side" if device is not None else "current"

            def synchronize(self) -> None:
                fake.calls.append(f"synchronize {self.name}")

            def wait_stream(self, other: "Stream") -> None:
                fake.calls.append(f"{self.name} waits for {other.name}")

        class Graph:
            def capture_begin(self, pool: object, capture_error_mode: str) -> None:
                fake.calls.append(f"begin {pool} {capture_error_mode}")

            def capture_end(self) -> None:
                fake.calls.append("end")
                if fake.invalid:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self) -> None:
                fake.calls.append("replay")

        @contextmanager
        def entered(what: object):
            fake.calls.append("enter")
            yield
            fake.calls.append("leave")

        current = Stream()
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph_pool_handle": lambda: "pool",
            "current_stream": lambda device=None: current,
            "stream": entered,
            "device": entered,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_first_run_is_a_rehearsal_outside_of_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    replay = CudaCapture(torch.device("cuda:0")).capture(
        lambda: cuda.calls.append(f"run {overlap._rehearsing} {gc.isenabled()}")
    )
    assert cuda.calls == [
        "synchronize current", "enter", "enter",
        "run True False", "synchronize side",
        "begin pool relaxed", "run False False", "end",
        "leave", "leave", "current waits for side",
    ]  # fmt: skip
    replay()
    assert cuda.calls[-1] == "replay" and gc.isenabled()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("not permitted"), ValueError()])
def test_error_inside_ends_the_capture_and_is_the_one_that_is_raised(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.invalid = True

    def run() -> None:
        if not overlap._rehearsing:
            raise error

    with pytest.raises(type(error)) as caught:
        CudaCapture(torch.device("cuda:0")).capture(run)
    assert caught.value is error and cuda.calls.count("end") == 1 and gc.isenabled()


def test_error_of_the_rehearsal_begins_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def run() -> None:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        CudaCapture(torch.device("cuda:0")).capture(run)
    assert not any(call.startswith("begin") for call in cuda.calls) and gc.isenabled() and not overlap._rehearsing
