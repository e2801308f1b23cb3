"""Paged attention and cache writes equal the plain reference, whatever the mix of sequences and layout of blocks."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from lorikeet.kernels import attention, overlap
from torch import Tensor

from .attention_cases import (
    BF16,
    CASE,
    FP16,
    FP32,
    TOLERANCES,
    Case,
    Step,
    assert_attends,
    assert_writes,
    every_case,
    every_dtype,
    make_step,
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


class TestCpu:
    @every_case
    @every_dtype(FP32, BF16)
    def test_attention_equals_reference(self, case: Case, dtype: torch.dtype) -> None:
        assert_attends(make_step(case, dtype), attention.paged_attention)

    @every_case
    @every_dtype(FP32, BF16)
    def test_writes_go_to_their_slots_and_nowhere_else(self, case: Case, dtype: torch.dtype) -> None:
        assert_writes(make_step(case, dtype), attention.kv_write_)

    def test_tables_refilled_in_place_are_seen(self) -> None:
        """The runner refills the same tensors every step, also in inference mode, where tensors count no versions."""
        with torch.inference_mode():
            step = make_step(Case("first", ((1, 9), (3, 20))), FP32)
            assert_attends(step, attention.paged_attention)
            other = make_step(Case("second", ((3, 20), (1, 9))), FP32, seed=1)
            for name in ("query_starts", "context_lens", "block_tables"):
                getattr(step, name).copy_(getattr(other, name))
            step.k_cache.copy_(other.k_cache)
            step.v_cache.copy_(other.v_cache)
            assert_attends(step, attention.paged_attention)

    def test_attention_over_what_was_just_written(self) -> None:
        step = make_step(CASE["mixed"], FP32)
        attention.kv_write_(*step.write_args())
        assert_attends(step, attention.paged_attention)


class TestOperators:
    @pytest.mark.parametrize("name", ["decodes", "mixed"])
    def test_opcheck(self, name: str) -> None:
        step = make_step(CASE[name], FP32)
        # opcheck compares outputs and mutated inputs with ==, which no NaN survives.
        step.k_cache.nan_to_num_(), step.v_cache.nan_to_num_()
        torch.library.opcheck(torch.ops.lorikeet.paged_attention.default, step.attention_args())
        torch.library.opcheck(torch.ops.lorikeet.kv_write_.default, step.write_args())

    def test_dispatched_call_equals_the_direct_one(self) -> None:
        step = make_step(CASE["mixed"], BF16)
        assert_attends(step, torch.ops.lorikeet.paged_attention.default)
        assert_writes(step, torch.ops.lorikeet.kv_write_.default)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("q", lambda t: t[..., :8], "head_dim of the cache is 16, got 8"),
            ("q", lambda t: t.half(), "k_cache is torch.float16 like its input, got torch.float32"),
            ("q", lambda t: t.double(), "expected float32, bfloat16 or float16, got torch.float64"),
            ("q", lambda t: t[:, :5], "num_heads is a multiple of num_kv_heads 2, got 5"),
            ("k_cache", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "k_cache is contiguous"),
            ("v_cache", lambda t: t[:, 1:].contiguous(), "caches of one shape"),
            ("context_lens", lambda t: t.long(), "context_lens is int32"),
            ("context_lens", lambda t: t[1:], "for 4 context_lens"),
            ("block_tables", lambda t: t.t().contiguous().t(), "block_tables is int32, contiguous, of 2"),
        ],
    )
    def test_attention_refuses_what_breaks_its_contract(
        self, name: str, change: Callable[[Tensor], Tensor], message: str
    ) -> None:
        step = make_step(CASE["decodes"], FP32)
        setattr(step, name, change(getattr(step, name)))
        for run in (attention.paged_attention, torch.ops.lorikeet.paged_attention.default):
            with pytest.raises(RuntimeError, match=message):
                run(*step.attention_args())

    def test_write_refuses_what_breaks_its_contract(self) -> None:
        step = make_step(CASE["decodes"], FP32)
        step.kv_slots = step.kv_slots.int()
        with pytest.raises(RuntimeError, match="kv_slots is int64"):
            torch.ops.lorikeet.kv_write_.default(*step.write_args())


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively, in TestGpu")
class TestInterpreted:
    """The Triton kernels in Triton's interpreter, on the CPU. Its tl.dot can't multiply bf16 (Triton 3.6 and 3.7)."""

    @every_case
    def test_attention_equals_reference(self, case: Case) -> None:
        from lorikeet.kernels import attention_triton

        assert_attends(make_step(case, FP32), attention_triton.paged_attention)

    @pytest.mark.parametrize("name", ["decodes", "mixed", "head-dim-48", "softcap-window"])
    def test_fp16_attention_equals_reference(self, name: str) -> None:
        from lorikeet.kernels import attention_triton

        assert_attends(make_step(CASE[name], FP16), attention_triton.paged_attention)

    @pytest.mark.parametrize("num_splits", [2, 3, 32])
    @pytest.mark.parametrize("window", [0, 40])
    def test_split_contexts_join(self, num_splits: int, window: int) -> None:
        from lorikeet.kernels import attention_triton

        sequences = ((1, 150), (1, 1), (0, 7), (0, 0))
        case = Case("split", sequences, num_kv_heads=1, window=window, padding_rows=2)
        assert_attends(
            make_step(case, FP32), lambda *args: attention_triton.paged_attention(*args, num_splits=num_splits)
        )

    @pytest.mark.parametrize(("num_splits", "window", "dtype"), [(2, 0, FP32), (3, 40, FP16)])
    def test_split_contexts_of_chunks_join(self, num_splits: int, window: int, dtype: torch.dtype) -> None:
        """Some rows of a tile see no key of a split, decodes beside them fewer keys than there are splits."""
        from lorikeet.kernels import attention_triton

        sequences = ((1, 90), (7, 110), (0, 5), (1, 2))
        case = Case("split", sequences, num_kv_heads=1, window=window, padding_rows=2)
        assert_attends(
            make_step(case, dtype), lambda *args: attention_triton.paged_attention(*args, num_splits=num_splits)
        )

    @pytest.mark.parametrize("sequences", [((1, 90), (0, 0)), ((0, 0), (0, 0))])
    def test_rows_of_no_sequence_are_left_alone(self, sequences: tuple[tuple[int, int], ...]) -> None:
        """Those of a graph's padding: no split is joined for them."""
        from lorikeet.kernels import attention_triton

        step = make_step(Case("padding", sequences, num_kv_heads=1, padding_rows=3), FP32)
        out = attention_triton.paged_attention(*step.attention_args(), num_splits=4)
        owned = int(step.query_starts[-1])
        assert out[:owned].isfinite().all()
        step.q[owned:] = torch.nan
        again = attention_triton.paged_attention(*step.attention_args(), num_splits=4)
        torch.testing.assert_close(again[:owned], out[:owned], atol=0, rtol=0)

    def test_splits_fill_the_gpu_but_no_more(self) -> None:
        from lorikeet.kernels.attention_triton import _choose_splits

        cpu = torch.device("cpu")  # taken for an H100, with 132 multiprocessors
        assert [_choose_splits(cpu, batch * 8, 8192) for batch in (1, 2, 16, 32, 64, 500)] == [32, 32, 4, 2, 1, 1]
        assert [_choose_splits(cpu, 8, context) for context in (1, 255, 1024, 2**20)] == [1, 1, 4, 32]
        # Of steps with chunks, by the rows and requests that they are captured for.
        sizes = ((64, 8), (64, 24), (128, 24), (256, 24), (4096, 16))
        found = [_choose_splits(cpu, (tokens // 16 + requests) * 8, 8192) for tokens, requests in sizes]
        assert found == [5, 2, 2, 1, 1]

    @pytest.mark.parametrize("name", ["mixed", "mha", "head-dim-48", "padding", "no-sequence", "no-sequence-padding"])
    @every_dtype(FP32, FP16, BF16)
    def test_writes_go_to_their_slots_and_nowhere_else(self, name: str, dtype: torch.dtype) -> None:
        from lorikeet.kernels import kv_write_triton

        assert_writes(make_step(CASE[name], dtype), kv_write_triton.kv_write_)


def refill(args: list, step: Step) -> None:
    """Put another step into the tensors of a captured one; what it has no blocks for is poisoned."""
    blocks, width = step.k_cache.shape[1], step.block_tables.shape[1]
    args[0].copy_(step.q)
    args[1].fill_(float("nan"))[:, :blocks].copy_(step.k_cache)
    args[2].fill_(float("nan"))[:, :blocks].copy_(step.v_cache)
    args[3].copy_(step.query_starts)
    args[4].copy_(step.context_lens)
    args[5].zero_()[:, :width].copy_(step.block_tables)


@pytest.mark.gpu
class TestGpu:
    @every_case
    @every_dtype(FP32, FP16, BF16)
    def test_attention_equals_reference(self, case: Case, dtype: torch.dtype) -> None:
        assert_attends(make_step(case, dtype), attention.paged_attention, "cuda")

    @every_case
    @every_dtype(FP32, FP16, BF16)
    def test_writes_go_to_their_slots_and_nowhere_else(self, case: Case, dtype: torch.dtype) -> None:
        assert_writes(make_step(case, dtype), attention.kv_write_, "cuda")

    @every_dtype(FP32, FP16, BF16)
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    @pytest.mark.parametrize("window", [0, 700])
    def test_split_contexts_join(self, head_dim: int, window: int, dtype: torch.dtype) -> None:
        case = Case("split", ((1, 3000), (1, 1), (1, 700)), group=4, head_dim=head_dim, block_size=16, window=window)
        assert_attends(make_step(case, dtype), attention.paged_attention, "cuda")

    @pytest.mark.parametrize("name", ["decodes", "mixed"])
    def test_opcheck(self, name: str) -> None:
        step = make_step(CASE[name], FP32)
        step.k_cache.nan_to_num_(), step.v_cache.nan_to_num_()
        torch.library.opcheck(torch.ops.lorikeet.paged_attention.default, step.attention_args("cuda"))
        torch.library.opcheck(torch.ops.lorikeet.kv_write_.default, step.write_args("cuda"))

    @every_dtype(FP32, BF16)
    @pytest.mark.parametrize("dependent", [False, True])
    def test_captured_decode_replays_with_other_contexts(
        self, dtype: torch.dtype, dependent: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(overlap.switches, "dependent_launch", dependent)
        captured = make_step(Case("captured", ((1, 900), (1, 900), (0, 30), (1, 400)), block_size=16), dtype)
        args = list(captured.attention_args("cuda"))
        with overlap.rehearsal():
            attention.paged_attention(*args)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention.paged_attention(*args)
        for seed, contexts in enumerate(((5, 899, 12, 300), (64, 1, 3, 2)), start=1):
            rows = (1, 1, 0, 1)
            step = make_step(Case("replayed", tuple(zip(rows, contexts, strict=True)), block_size=16), dtype, seed)
            refill(args, step)
            graph.replay()
            atol, rtol = TOLERANCES[dtype]
            torch.testing.assert_close(out.float().cpu(), step.reference(), atol=atol, rtol=rtol)

    @every_dtype(FP32, BF16)
    @pytest.mark.parametrize("num_kv_heads", [1, 8])
    def test_captured_step_with_chunks_replays_with_other_rows(self, dtype: torch.dtype, num_kv_heads: int) -> None:
        """Of 64 rows and 6 sequences, whatever rows these have; split contexts, with one KV head more of them."""
        shape = {"num_kv_heads": num_kv_heads, "group": 4, "head_dim": 64, "block_size": 16}

        def padded(name: str, sequences: tuple[tuple[int, int], ...], seed: int) -> Step:
            case = Case(name, sequences, **shape, padding_rows=64 - sum(rows for rows, _ in sequences))
            return make_step(case, dtype, seed)

        captured = padded("captured", ((64, 900), *[(0, 900)] * 5), 0)
        args = list(captured.attention_args("cuda"))
        args[7] = 8192  # of the model
        with overlap.rehearsal():
            attention.paged_attention(*args)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention.paged_attention(*args)
        replays = (
            ((1, 800), (1, 3), (40, 700), (1, 1), (1, 90), (0, 0)),
            ((30, 30), (1, 640), (20, 500), (0, 0), (0, 0), (0, 0)),
            ((1, 5), (1, 6), (1, 7), (1, 8), (1, 9), (1, 900)),
            (((0, 0),) * 6),
        )
        for seed, sequences in enumerate(replays, start=1):
            step = padded("replayed", sequences, seed)
            refill(args, step)
            graph.replay()
            owned = int(step.query_starts[-1])
            atol, rtol = TOLERANCES[dtype]
            torch.testing.assert_close(out[:owned].float().cpu(), step.reference()[:owned], atol=atol, rtol=rtol)

    def test_no_call_waits_for_the_device(self) -> None:
        decode, mixed = make_step(CASE["decodes"], BF16), make_step(CASE["mixed"], BF16)
        calls = [(step.attention_args("cuda"), step.write_args("cuda")) for step in (decode, mixed)]

        def run() -> None:
            for attention_args, write_args in calls:
                attention.kv_write_(*write_args)
                attention.paged_attention(*attention_args)

        run()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
