"""Sizes that steps are padded to: what there is, and that every step takes the least one with room for it."""

import subprocess
import sys

import pytest
from lorikeet.adapters.lora_shape import LoraShape
from lorikeet.server.engine.graph_sizes import MAX_GRAPH_ROWS, GraphSize, GraphSizes
from lorikeet.server.engine.step_graphs import MAX_GRAPHS, start_shapes


def test_decodes() -> None:
    assert GraphSizes(64, 1).decodes == [1]
    assert GraphSizes(64, 3).decodes == [1, 2, 3]
    assert GraphSizes(64, 20).decodes == [1, 2, 4, 8, 16, 20]
    for most in (*range(1, 140), 300, MAX_GRAPH_ROWS, 4096):
        rows = GraphSizes(8192, most).decodes
        assert rows == sorted(set(rows)) and rows[-1] == min(most, MAX_GRAPH_ROWS) and len(rows) < 32


def test_mixed() -> None:
    sizes = GraphSizes(512, 128)
    assert (sizes.tokens, sizes.requests) == ([64, 128, 192, 256, 384, 512], [8, 24, 72, 128])
    sizes = GraphSizes(100, 12)
    assert (sizes.tokens, sizes.requests) == ([64, 100], [8, 12])
    assert [size for size in sizes.all() if not size.is_decode] == [(64, 8), (64, 12), (100, 8), (100, 12)]


@pytest.mark.parametrize("step_tokens", [1, 7, 64, 65, 500, 512, 8192])
@pytest.mark.parametrize("max_requests", [1, 7, 8, 24, 31, 128, 500, 1000])
def test_each_step_takes_the_least_size_that_has_room(step_tokens: int, max_requests: int) -> None:
    sizes = GraphSizes(step_tokens, min(max_requests, step_tokens))
    every = sizes.all()
    assert every == sorted(set(every)) and sum(len(start_shapes(LoraShape(), size)) for size in every) <= MAX_GRAPHS
    for requests in range(1, min(max_requests, step_tokens) + 1, 3):
        decode = sizes.of_decodes(requests)
        assert decode == next((s for s in every if s.is_decode and s.requests >= requests), None)
        for tokens in range(requests, min(step_tokens, 600) + 1, 17):
            fitting = (s for s in every if not s.is_decode and s.tokens >= tokens and s.requests >= requests)
            assert sizes.of_mixed(tokens, requests) == next(fitting, None)


def test_number_of_graphs_at_start_by_default() -> None:
    """As docs/performance.md and server/engine/step_graphs.py say."""
    assert sum(len(start_shapes(LoraShape(), size)) for size in GraphSizes(512, 128).all()) == 88


def test_mixed_graphs_have_more_rows_than_requests() -> None:
    sizes = GraphSizes(512, 128)
    assert sizes.of_mixed(64, 60) == GraphSize(128, 72)
    assert sizes.of_mixed(72, 72) == GraphSize(128, 72)
    assert sizes.of_mixed(512, 129) is None and sizes.of_mixed(513, 2) is None


def test_sizes_need_no_torch() -> None:
    program = "import sys, lorikeet.server.engine.graph_sizes; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
