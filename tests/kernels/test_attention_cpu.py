"""Paged attention on a CPU equals the reference at the shapes of real models, in every library and without one."""

import random
from dataclasses import replace

import pytest
import torch
from lorikeet.kernels import attention, attention_cpu
from torch import Tensor

from .attention_cases import (
    BF16,
    CASE,
    FP16,
    FP32,
    Case,
    Step,
    assert_attends,
    assert_writes,
    every_dtype,
    make_step,
)
from .native_libraries import every_library, two_threads, use_library

__all__ = ["two_threads"]

# Lengths around the kernels' tiles of 64 and 128 keys, their pieces of 512 and groups of 8.
DECODES = ((1, 1), (1, 15), (1, 16), (1, 17), (1, 300), (1, 1025))
CHUNKS = ((1, 129), (5, 70), (33, 33), (2, 513), (0, 4), (1, 3))
SHAPES = [
    Case("smollm", DECODES, 3, 3, 64, 16),
    Case("smollm-chunks", CHUNKS, 3, 3, 64, 16),
    Case("mha-80", DECODES, 1, 8, 80, 8),
    Case("mha-80-chunks", CHUNKS, 1, 8, 80, 8),
    Case("qwen", DECODES, 8, 2, 128, 32),
    Case("qwen-chunks", CHUNKS, 8, 2, 128, 32),
    Case("llama-3", ((1, 700), (1, 40)), 4, 8, 128, 16),
    Case("head-dim-32", CHUNKS, 4, 2, 32, 8),
    Case("head-dim-96", CHUNKS, 2, 2, 96, 16),
    Case("head-dim-256", CHUNKS, 5, 1, 256, 16),
    Case("head-dim-24-window", CHUNKS, 7, 1, 24, 8, window=65),
    Case("window", DECODES, 3, 3, 64, 16, window=600),
    Case("softcap", ((1, 600), (40, 150)), 2, 2, 64, 16, softcap=3.0),
    Case("more-heads-than-a-tile", ((3, 70), (1, 5)), 100, 1, 16, 16),
    Case("long", ((1, 5000), (3, 5000)), 3, 1, 64, 16),
]
every_shape = pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)


def choose(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    signatures = {"_attend": attention_cpu._ATTENTION, "_write": attention_cpu._WRITE}
    use_library(monkeypatch, library, attention_cpu, signatures | {"_attend_briefly": attention_cpu._ATTENTION})


def attend(step: Step) -> Tensor:
    return attention.paged_attention(*step.attention_args())


@every_shape
@every_dtype(FP32, BF16, FP16)
def test_equals_reference(case: Case, dtype: torch.dtype) -> None:
    assert_attends(make_step(case, dtype), attention.paged_attention)


@every_library
@pytest.mark.parametrize("name", ["mixed", "window-5", "softcap-window", "block-7", "head-dim-48", "graph-padding"])
@every_dtype(FP32, BF16, FP16)
def test_every_library_equals_reference(
    library: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, library)
    assert_attends(make_step(CASE[name], dtype), attention.paged_attention)
    assert_writes(make_step(CASE[name], dtype), attention.kv_write_)


@every_library
def test_queries_and_keys_of_any_strides(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, library)
    step = make_step(CASE["mixed"], FP32)
    for name in ("q", "k", "v"):
        setattr(step, name, getattr(step, name).transpose(0, 2).contiguous().transpose(0, 2))
        assert getattr(step, name).stride(2) != 1
    step.kv_slots = step.kv_slots.repeat_interleave(2)[::2]
    assert_attends(step, attention.paged_attention)
    assert_writes(step, attention.kv_write_)


@every_shape
def test_threads_change_nothing(case: Case, two_threads: None) -> None:
    step = make_step(case, FP32)
    got = attend(step)
    torch.set_num_threads(1)
    assert torch.equal(got, attend(step))


@pytest.mark.parametrize("window", [0, 50])
def test_a_sequence_does_not_depend_on_the_others(window: int) -> None:
    sequences = random.Random(4).sample([*DECODES, *CHUNKS], 12)
    step = make_step(Case("all", tuple(sequences), 3, 3, 64, 16, window), FP32)
    everything, starts = attend(step), step.query_starts.tolist()
    for n, (rows, context) in enumerate(sequences):
        alone = Case("one", ((rows, context),), 3, 3, 64, 16, window)
        q = step.q[starts[n] : starts[n + 1]]
        tables = {"context_lens": step.context_lens[n : n + 1], "block_tables": step.block_tables[n : n + 1]}
        one = replace(step, case=alone, q=q, query_starts=torch.tensor([0, rows]).int(), **tables)
        assert torch.equal(attend(one), everything[starts[n] : starts[n + 1]])


def test_a_row_is_as_if_later_rows_were_not_there() -> None:
    """A NaN in the keys and values of the chunk's last row reaches no row before it."""
    step = make_step(Case("chunk", ((40, 90),), 3, 2, 64, 16), FP32)
    before = attend(step)
    block, offset = int(step.block_tables[0, 89 // 16]), 89 % 16
    step.k_cache[:, block, offset] = torch.nan
    step.v_cache[:, block, offset] = torch.nan
    after = attend(step)
    assert torch.equal(after[:-1], before[:-1]) and after[-1].isnan().all()


@pytest.mark.parametrize("rows", [1, 7])
def test_extreme_scores(rows: int) -> None:
    """One key takes all the weight, whatever part of the context it is in; -inf counts nothing, NaN everything."""
    step = make_step(Case("peaks", ((rows, 1500),), 1, 2, 16, 16), FP32)
    step.q.fill_(1)
    for position, size in ((1490, 1e30), (3, 1e4), (700, 3e4)):
        step.k_cache[:, step.block_tables[0, position // 16], position % 16] = size
        value = step.v_cache[:, step.block_tables[0, position // 16], position % 16]
        torch.testing.assert_close(attend(step)[0], value.reshape(2, 16), atol=0, rtol=1e-6)
        step.k_cache[:, step.block_tables[0, position // 16], position % 16] = -torch.inf
    assert attend(step).isfinite().all()
    step.k_cache[:, step.block_tables[0, 0], 0, 0] = torch.nan
    assert attend(step).isnan().all()


def test_a_context_of_nothing_gives_zeros() -> None:
    step = make_step(Case("empty", ((1, 1), (2, 2)), 3, 2, 16, 4), FP32)
    step.context_lens.zero_()
    assert torch.equal(attend(step), torch.zeros(3, 6, 16))


@every_library
def test_no_rows(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, library)
    step = make_step(Case("no-rows", ((0, 5),)), BF16)
    assert attend(step).shape == (0, 6, 16)
    assert_writes(step, attention.kv_write_)


def test_both_forms_of_the_call_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that keeps Python's lock, for small steps, and the other."""
    step = make_step(CASE["long-and-short"], FP32)
    got = attend(step)
    monkeypatch.setattr(attention_cpu, "_BRIEF", 1 << 30)
    assert torch.equal(attend(step), got)
