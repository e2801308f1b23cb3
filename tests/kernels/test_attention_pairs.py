"""Paged attention by products of pairs of bfloat16, as CPUs with AVX512-BF16 compute it, in every library.

The oracle is `exact_attention`: fp64, over the same bfloat16 queries, keys and values.
"""

import ctypes
import mmap
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lorikeet.kernels import attention, attention_cpu
from torch import Tensor

from .attention_cases import BF16, FP32, TOLERANCES, Case, Step, exact_attention, make_step
from .native_libraries import LIBRARIES, two_threads, use_library

__all__ = ["two_threads"]

# Lengths around tiles of 64 and 128 keys, vectors of 16, pieces of 512.
DECODES = ((1, 1), (1, 16), (1, 17), (1, 127), (1, 300), (1, 1025), (1, 2))
# Of 3 heads: 32 rows are a tile of queries, so 33 are one and a row that is left over, between two others.
CHUNKS = ((1, 129), (5, 70), (33, 33), (2, 513), (0, 4), (1, 3), (65, 131))
CASES = [
    Case("decodes", DECODES, 3, 3, 64, 16),
    Case("chunks", CHUNKS, 3, 3, 64, 16),
    Case("gqa-128", (*DECODES, *CHUNKS), 4, 2, 128, 16),
    Case("mha-32", (*DECODES, *CHUNKS), 1, 3, 32, 7),
    Case("group-5-head-dim-96", (*DECODES, *CHUNKS), 5, 1, 96, 16),
    Case("group-7-head-dim-160", (*DECODES, *CHUNKS), 7, 1, 160, 8),
    Case("mqa-9-head-dim-256", (*DECODES, *CHUNKS), 9, 1, 256, 32),
    Case("more-heads-than-a-tile", ((3, 70), (1, 5)), 100, 1, 32, 16),
    Case("window", (*DECODES, *CHUNKS), 3, 2, 64, 16, window=65),
    Case("long-window", (*DECODES, *CHUNKS), 3, 2, 64, 16, window=600),
    Case("window-1", CHUNKS, 3, 2, 64, 16, window=1),
    Case("softcap", ((1, 600), (40, 150)), 2, 2, 64, 16, softcap=3.0),
    Case("softcap-window", ((1, 600), (40, 150)), 2, 2, 64, 16, softcap=3.0, window=33),
    Case("padding", ((1, 9), (33, 40)), 3, 2, 64, 4, padding_rows=3),
]
every_library = pytest.mark.parametrize("library", LIBRARIES[:-1])  # plain torch has no pairs
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply(monkeypatch, True)


def multiply(monkeypatch: pytest.MonkeyPatch, in_pairs: bool) -> None:
    monkeypatch.setattr(attention_cpu, "multiplies_bf16", lambda: in_pairs)


def choose(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    signatures = dict.fromkeys(("_attend", "_attend_briefly"), attention_cpu._ATTENTION)
    use_library(monkeypatch, library, attention_cpu, signatures)


@pytest.fixture
def guarded() -> Callable[[Tensor], Tensor]:
    """Copies a tensor to the end of memory that a page without any right follows."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def copy(x: Tensor) -> Tensor:
        page, nbytes = mmap.PAGESIZE, x.numel() * x.element_size()
        size = -(-nbytes // page) * page
        memory = torch.frombuffer(mmap.mmap(-1, size + page), dtype=torch.uint8)
        assert libc.mprotect(memory.data_ptr() + size, page, 0) == 0, ctypes.get_errno()
        return memory[size - nbytes : size].view(x.dtype).view(x.shape).copy_(x)

    return copy


def attend(step: Step) -> Tensor:
    return attention.paged_attention(*step.attention_args())


def assert_exact(step: Step, out: Tensor) -> None:
    owned = int(step.query_starts[-1])
    atol, rtol = TOLERANCES[BF16]
    torch.testing.assert_close(out[:owned].double(), exact_attention(step)[:owned], atol=atol, rtol=rtol)


@every_library
@every_case
def test_equals_fp64(case: Case, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, library)
    step = make_step(case, BF16, seed=random.randrange(1 << 30))
    assert_exact(step, attend(step))


def test_any_context(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = random.sample(range(1, 1101), 40)
    sequences = [(random.choice((1, 1, 1, random.randint(1, length))), length) for length in lengths]
    step = make_step(Case("any", tuple(sequences), 3, 1, 64, 16), BF16, seed=lengths[0])
    assert_exact(step, attend(step))


@every_case
def test_as_near_as_without_pairs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the error is what rounding the result costs both; weights of several rows are rounded here besides."""
    step = make_step(case, BF16, seed=random.randrange(1 << 30))
    owned = int(step.query_starts[-1])
    exact = exact_attention(step)[:owned]
    errors = []
    for in_pairs in (False, True):
        multiply(monkeypatch, in_pairs)
        errors.append((attend(step)[:owned].double() - exact).norm())
    assert errors[1] <= 1.5 * errors[0]


def test_only_bfloat16_and_heads_wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for in_pairs in (False, True):
        multiply(monkeypatch, in_pairs)
        for head_dim, dtype in ((64, BF16), (80, BF16), (16, BF16), (64, FP32), (64, torch.float16)):
            step = make_step(Case("some", ((1, 200), (20, 90)), 3, 2, head_dim, 16), dtype)
            found[in_pairs, head_dim, dtype] = attend(step)
    for (in_pairs, head_dim, dtype), out in found.items():
        assert torch.equal(out, found[not in_pairs, head_dim, dtype]) == (dtype is not BF16 or head_dim % 32 != 0)


@every_case
def test_threads_change_nothing(case: Case, two_threads: None) -> None:
    step = make_step(case, BF16)
    owned = int(step.query_starts[-1])
    got = attend(step)[:owned]
    torch.set_num_threads(1)
    assert torch.equal(got, attend(step)[:owned])


@pytest.mark.parametrize(("head_dim", "window"), [(64, 0), (64, 50), (128, 0)])
def test_a_sequence_does_not_depend_on_the_others(head_dim: int, window: int) -> None:
    sequences = random.sample([*DECODES, *CHUNKS], len(DECODES) + len(CHUNKS))
    step = make_step(Case("all", tuple(sequences), 3, 3, head_dim, 16, window), BF16)
    everything, starts = attend(step), step.query_starts.tolist()
    for n, (rows, context) in enumerate(sequences):
        alone = Case("one", ((rows, context),), 3, 3, head_dim, 16, window)
        q = step.q[starts[n] : starts[n + 1]]
        tables = {"context_lens": step.context_lens[n : n + 1], "block_tables": step.block_tables[n : n + 1]}
        one = replace(step, case=alone, q=q, query_starts=torch.tensor([0, rows]).int(), **tables)
        assert torch.equal(attend(one), everything[starts[n] : starts[n + 1]])


@every_library
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("window", [0, 20])
def test_a_row_is_as_if_what_it_does_not_see_were_not_there(
    bad: float, window: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of a position in the middle of the chunk reach the rows that see it and no other."""
    choose(monkeypatch, library)
    step = make_step(Case("chunk", ((70, 130),), 3, 2, 64, 16, window), BF16)
    before = attend(step)
    position = random.randint(70, 120)
    block, offset = int(step.block_tables[0, position // 16]), position % 16
    step.v_cache[:, block, offset] = bad
    seen = torch.zeros(70, dtype=torch.bool)
    seen[position - 60 : position - 60 + window if window else None] = True
    after = attend(step)
    # The same weights and values in another order: one unit in the last place.
    torch.testing.assert_close(after[~seen].float(), before[~seen].float(), atol=8e-3, rtol=8e-3)
    assert not after[seen].isfinite().any()
    step.k_cache[:, block, offset] = torch.nan
    assert torch.equal(attend(step)[~seen], after[~seen]) and attend(step)[seen].isnan().all()


@pytest.mark.parametrize("rows", [1, 7])
def test_extreme_scores(rows: int) -> None:
    """One key takes all the weight, whatever part of the context it is in; -inf counts nothing, NaN everything."""
    step = make_step(Case("peaks", ((rows, 1500),), 1, 2, 32, 16), BF16)
    step.q.fill_(1)
    for position, size in ((1490, 1e30), (3, 1e4), (700, 3e4)):
        step.k_cache[:, step.block_tables[0, position // 16], position % 16] = size
        value = step.v_cache[:, step.block_tables[0, position // 16], position % 16]
        assert torch.equal(attend(step)[0], value.reshape(2, 32))
        step.k_cache[:, step.block_tables[0, position // 16], position % 16] = -torch.inf
    assert attend(step).isfinite().all()
    step.k_cache[:, step.block_tables[0, 0], 0, 0] = torch.nan
    assert attend(step).isnan().all()


@every_library
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_reads_nothing_around_its_tensors(
    head_dim: int, guarded: Callable[[Tensor], Tensor], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that nobody may read lies behind each; the process would end."""
    choose(monkeypatch, library)
    step = make_step(Case("guarded", ((1, 77), (35, 99), (1, 1)), 3, 2, head_dim, 16), BF16)
    before = attend(step)
    step = replace(step, q=guarded(step.q), k_cache=guarded(step.k_cache), v_cache=guarded(step.v_cache))
    assert torch.equal(attend(step), before)


@every_library
def test_a_context_of_nothing_gives_zeros(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, library)
    step = make_step(Case("empty", ((1, 1), (2, 2), (1, 1)), 3, 2, 32, 4), BF16)
    step.context_lens.zero_()
    assert torch.equal(attend(step), torch.zeros(4, 6, 32, dtype=BF16))
    step.context_lens[1] = 1  # of its two rows the first comes before the sequence
    got = attend(step)
    assert torch.equal(got[1], torch.zeros(6, 32, dtype=BF16)) and (got[2] != 0).any()
