"""`lorikeet serve` as a process on a CUDA device, asked over gRPC, beside the same server on a CPU."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lorikeet.server.client import LorikeetClient

from ..conftest import TINY_ADAPTERS
from ..devices import CPU, GPU
from ..server.process import ServerProcess, eventually, running_server
from ..tiny import TEXT

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("serve")]
# (dtype fp32, absolute tolerance of log probabilities): sums are grouped differently on the two devices.
TOLERANCE = 1e-3
COMMON = ("--compute-dtype", "float32", "--threads", "1", "--kv-cache-bytes", "32MiB")


@pytest.fixture(scope="module")
def arguments(tiny_model: Path, tiny_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    return ["--model", str(tiny_model), "--adapters", str(tiny_adapters), "--cache-dir", str(cache), *COMMON]


@pytest.fixture(scope="module")
def server(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("gpu") / "log", *arguments, "--device", str(GPU)) as server:
        yield server


@pytest.fixture(scope="module")
def beside(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("cpu") / "log", *arguments, "--device", str(CPU)) as server:
        yield server


def scores(server: ServerProcess) -> dict[str, list[float]]:
    """Log probabilities of a text's tokens, by the base and each adapter, all asked at once."""
    adapters = ("", *TINY_ADAPTERS)
    with LorikeetClient(server.address, timeout_s=120) as client, ThreadPoolExecutor(len(adapters)) as pool:
        found = pool.map(lambda adapter: client.score(text=" ".join(TEXT), adapter_id=adapter), adapters)
        return {
            adapter: [token.logprob for token in each.logprobs] for adapter, each in zip(adapters, found, strict=True)
        }


def test_ready_line_names_the_device(server: ServerProcess) -> None:
    assert server.ready["device"] == str(GPU)
    assert server.ready["dtype"] == "float32"
    assert server.ready["adapters"] == str(len(TINY_ADAPTERS))


def test_scores_are_those_of_the_cpu(server: ServerProcess, beside: ServerProcess) -> None:
    some, others = scores(server), scores(beside)
    for adapter, logprobs in some.items():
        assert len(logprobs) > 20 and all(map(math.isfinite, logprobs))
        assert logprobs == pytest.approx(others[adapter], abs=TOLERANCE), adapter or "the base"
    assert len({tuple(logprobs) for logprobs in some.values()}) == len(some)


def test_streams_of_all_adapters_end_whole_and_leave_nothing(server: ServerProcess) -> None:
    wanted = [(("", *TINY_ADAPTERS)[i % 5], f"{i}: {TEXT[i % len(TEXT)]}", 4 + i) for i in range(24)]

    def ask(adapter: str, prompt: str, tokens: int) -> tuple[int, int]:
        with LorikeetClient(server.address, timeout_s=120) as client:
            events = list(
                client.stream(prompt=prompt, adapter_id=adapter, max_tokens=tokens, temperature=0.0, ignore_eos=True)
            )
        return sum(len(event.delta.token_ids) for event in events), events[-1].finished.usage.generated_tokens

    with ThreadPoolExecutor(len(wanted)) as pool:
        counts = list(pool.map(lambda each: ask(*each), wanted))
    assert counts == [(tokens, tokens) for _, _, tokens in wanted]
    eventually(server.is_idle)
    if GPU.type == "cuda":
        assert server.metric("lorikeet_cuda_graph_replays_total") > 0


def test_a_cancelled_stream_gives_its_blocks_back(server: ServerProcess) -> None:
    with LorikeetClient(server.address, timeout_s=60) as client:
        stream = client.stream(prompt=TEXT[0], adapter_id="cedar", max_tokens=10_000, temperature=0.0, ignore_eos=True)
        assert any(event.HasField("delta") for event in stream)
        stream.close()
        eventually(server.is_idle)
        eventually(lambda: client.get_adapter("cedar").in_flight_requests == 0)
