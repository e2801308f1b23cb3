"""What is copied to the device while it computes: adapters on their own stream, a step's tables through staging."""

import itertools
import threading

import pytest
import torch
from lorikeet.adapters.staging import StagedValues

from ..base.family_models import VOCAB
from ..devices import GPU, Place, gpu_place
from ..golden.format_oracle import random_prompts
from ..golden.in_process import Call, greedy_params
from .answers import answer_all, assert_alike
from .worlds import FP32, World, make_world, requests, server


@pytest.fixture(scope="module", params=[gpu_place(family, "loading") for family in ("llama", "qwen2")])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    place: Place = request.param
    return make_world(place.family, tmp_path_factory.mktemp(place.family))


@pytest.mark.parametrize("room", ["384KiB", "1MiB"])
def test_adapters_come_and_go_beside_running_requests(room: str, world: World) -> None:
    """All memory is in use all the time: what one adapter leaves, another is copied to while kernels still run."""
    staying, passing = world.names[1:4], [*world.names[4:], world.names[0]]
    stop = threading.Event()
    rounds: list[str] = []
    errors: list[object] = []
    with server(world, adapter_device_bytes=room) as app:
        wanted = requests(staying, 10, tokens=200, seed=2)
        quiet = answer_all(app, wanted)
        (prompt,) = random_prompts(1, (5, 6), VOCAB, seed=3)

        def churn() -> None:
            for name in itertools.cycle(passing):
                app.manager.load("replaced", name)  # each time another version
                for adapter in ("replaced", name):
                    answer = Call(app, f"churn {len(rounds)}", adapter, prompt, greedy_params(1)).result()
                    rounds.append(adapter)
                    if answer.finished is None:
                        errors.append(answer.failed)
                if stop.is_set():
                    return

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for number in itertools.count():
                assert_alike(quiet, answer_all(app, wanted), FP32)
                if number >= 2 and (len(rounds) >= 8 or not thread.is_alive()):
                    break
        finally:
            stop.set()
            thread.join()
        assert not errors
        assert len(rounds) >= 8
        app.manager.store.check_integrity()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=str)
def test_staged_values_arrive_whole_however_far_the_host_is_ahead(dtype: torch.dtype) -> None:
    size, fills = 700, 400
    staged = StagedValues(size, dtype, GPU)
    address = staged.tensor.data_ptr()
    seen = torch.zeros(fills, size, dtype=dtype, device=GPU)
    lengths = torch.randint(1, size + 1, (fills,), generator=torch.Generator().manual_seed(1)).tolist()
    if GPU.type == "cuda":
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second: the device starts when the host has filled
    for number, length in enumerate(lengths):
        view = staged.fill([number * 1000 + i for i in range(length)])
        assert view.shape == (length,) and view.data_ptr() == address
        seen[number, :length].copy_(view)
    seen = seen.cpu()
    for number, length in enumerate(lengths):
        assert seen[number, :length].tolist() == [number * 1000 + i for i in range(length)]
