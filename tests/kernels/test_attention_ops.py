"""Paged attention and cache writes equal the plain reference, whatever the mix of sequences and layout of blocks."""

import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from lorikeet.kernels import attention, attention_cpu, overlap
from lorikeet.kernels.attention_reference import kv_write_reference_, paged_attention_reference
from torch import Tensor

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

# (atol, rtol) against the fp32 reference on the same 16-bit inputs. fp32: only the order of additions differs. 16 bit:
# half a unit in the last place of results below 4, which is all the CPU path loses; the Triton kernel also rounds the
# weights before it multiplies them with V.
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One step: (rows, context length) of each sequence, and the model's shape."""

    name: str
    sequences: tuple[tuple[int, int], ...]
    group: int = 3
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    window: int = 0
    softcap: float = 0.0
    shared_blocks: int = 0  # first blocks that all sequences share, as after a hit in the prefix cache
    padding_rows: int = 0


DECODES = ((1, 9), (1, 1), (1, 30), (1, 12), (1, 13))
PREFILLS = ((9, 9), (1, 1), (5, 5), (16, 16))
MIDDLES = ((5, 17), (3, 30), (2, 8))
MIXED = ((1, 21), (7, 7), (1, 1), (4, 23), (0, 6), (1, 32), (2, 2))

CASES = [
    Case("decodes", DECODES),
    Case("one-decode", ((1, 37),)),
    Case("one-token", ((1, 1),)),
    Case("prefills", PREFILLS),
    Case("middles-of-prompts", MIDDLES),
    Case("mixed", MIXED),
    Case("mha", MIXED, group=1, num_kv_heads=3),
    Case("mqa-8", MIXED, group=8, num_kv_heads=1),
    Case("group-17", ((1, 9), (3, 8)), group=17, num_kv_heads=1),
    Case("head-dim-8", ((1, 9), (6, 11)), head_dim=8),
    Case("head-dim-48", MIXED, head_dim=48),
    Case("head-dim-64", MIXED, head_dim=64),
    Case("head-dim-80", ((1, 9), (6, 11)), head_dim=80),
    Case("head-dim-96", ((1, 9), (6, 11)), head_dim=96),
    Case("block-1", ((1, 9), (6, 11)), block_size=1),
    Case("block-7", MIXED, block_size=7),
    Case("block-16", MIXED, block_size=16),
    Case("window-1", MIXED, window=1),
    Case("window-5", MIXED, window=5),
    Case("window-8-decodes", DECODES, window=8),
    Case("window-over-context", MIXED, window=1000),
    Case("softcap", MIXED, softcap=2.0),
    Case("softcap-window", MIXED, softcap=2.0, window=6),
    Case("shared-prefix", ((1, 13), (4, 15), (1, 9), (2, 10)), shared_blocks=2),
    Case("padding", ((1, 9), (3, 8)), padding_rows=3),
    Case("padding-decodes", DECODES, padding_rows=2),
    Case("graph-padding", ((1, 9), (1, 20), (0, 0), (0, 0)), padding_rows=2),
    Case("all-padding", ((0, 0), (0, 0)), padding_rows=2),
    Case("no-sequence", ()),
    Case("no-sequence-padding", (), padding_rows=2),
    Case("no-rows", ((0, 5), (0, 3))),
    Case("long-and-short", ((1, 300), (1, 3), (1, 5), (70, 200), (1, 2))),
    Case("long-window", ((1, 300), (70, 200)), window=20),
]
CASE = {case.name: case for case in CASES}


@dataclass
class Step:
    """Inputs of both operators for one case, on the CPU. Everything that the step may not read is NaN."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    kv_slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor

    def attention_args(self, device: str = "cpu") -> tuple[Tensor | int | float, ...]:
        case = self.case
        tensors = (self.q, self.k_cache, self.v_cache, self.query_starts, self.context_lens, self.block_tables)
        # q stays the transpose that it is: .to() keeps strides.
        return (
            *(t.to(device) for t in tensors),
            max((rows for rows, _ in case.sequences), default=0),
            max((context for _, context in case.sequences), default=0),
            case.head_dim**-0.5,
            case.window,
            case.softcap,
        )

    def reference(self) -> Tensor:
        tensors = (self.q, self.k_cache, self.v_cache, self.query_starts, self.context_lens, self.block_tables)
        return paged_attention_reference(*tensors, self.case.head_dim**-0.5, self.case.window, self.case.softcap)

    def write_args(self, device: str = "cpu") -> tuple[Tensor, ...]:
        return tuple(t.to(device) for t in (self.k, self.v, self.k_cache, self.v_cache, self.kv_slots))


def make_step(case: Case, dtype: torch.dtype, seed: int = 0) -> Step:
    """Blocks are scattered; positions before every window and unused table entries are poisoned too."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    size, heads = case.block_size, case.num_kv_heads
    needed = [-(-context // size) for _, context in case.sequences]
    num_blocks = sum(needed) + 3
    free = list(range(num_blocks))
    random.Random(seed).shuffle(free)
    shared = [free.pop() for _ in range(case.shared_blocks)]
    tables = [shared + [free.pop() for _ in range(n - len(shared))] for n in needed]
    unused = free.pop()

    k_cache = torch.full((heads, num_blocks, size, case.head_dim), float("nan"), dtype=dtype)
    v_cache = k_cache.clone()
    kv_slots = []
    for table, (rows, context) in zip(tables, case.sequences, strict=True):
        first = max(0, context - rows - case.window + 1) if case.window else 0
        for position in range(first, context):
            block, offset = table[position // size], position % size
            k_cache[:, block, offset] = randn(heads, case.head_dim)
            v_cache[:, block, offset] = randn(heads, case.head_dim)
        kv_slots += [table[p // size] * size + p % size for p in range(context - rows, context)]
    kv_slots += [-1] * case.padding_rows

    width = max(needed, default=0) + 1
    num_tokens = len(kv_slots)
    return Step(
        case=case,
        q=randn(heads * case.group, num_tokens, case.head_dim).transpose(0, 1),
        k=randn(heads, num_tokens, case.head_dim).transpose(0, 1),
        # As a slice of a stacked qkv projection is: rows further apart than they are long.
        v=randn(num_tokens, heads, 3 * case.head_dim)[..., case.head_dim : 2 * case.head_dim],
        k_cache=k_cache,
        v_cache=v_cache,
        kv_slots=torch.tensor(kv_slots, dtype=torch.int64),
        query_starts=torch.tensor([0, *(rows for rows, _ in case.sequences)]).cumsum(0).int(),
        context_lens=torch.tensor([context for _, context in case.sequences], dtype=torch.int32),
        block_tables=torch.tensor(
            [table + [unused] * (width - len(table)) for table in tables], dtype=torch.int32
        ).view(len(tables), width),
    )


def assert_attends(step: Step, run: Callable[..., Tensor], device: str = "cpu") -> None:
    out = run(*step.attention_args(device)).cpu()
    assert out.shape == step.q.shape
    assert out.dtype == step.q.dtype
    assert out.is_contiguous()
    owned = int(step.query_starts[-1])
    atol, rtol = TOLERANCES[step.q.dtype]
    torch.testing.assert_close(out[:owned].float(), step.reference()[:owned], atol=atol, rtol=rtol)


def assert_writes(step: Step, run: Callable[..., None], device: str = "cpu") -> None:
    k, v, k_cache, v_cache, kv_slots = step.write_args(device)
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    run(k, v, k_cache, v_cache, kv_slots)
    kv_write_reference_(step.k, step.v, step.k_cache, step.v_cache, step.kv_slots)
    torch.testing.assert_close(k_cache.cpu(), step.k_cache, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(v_cache.cpu(), step.v_cache, atol=0, rtol=0, equal_nan=True)


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def every_dtype(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


class TestCpu:
    @every_case
    @every_dtype(FP32, BF16)
    def test_attention_equals_reference(self, case: Case, dtype: torch.dtype) -> None:
        assert_attends(make_step(case, dtype), attention.paged_attention)

    @every_case
    @every_dtype(FP32, BF16)
    def test_writes_go_to_their_slots_and_nowhere_else(self, case: Case, dtype: torch.dtype) -> None:
        assert_writes(make_step(case, dtype), attention.kv_write_)

    def test_many_batches_of_decodes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Limits that split a step of realistic size are lowered until they split a small one."""
        monkeypatch.setattr(attention_cpu, "_MAX_GATHERED", 2000)
        monkeypatch.setattr(attention_cpu, "_MAX_PADDING", 500)
        contexts = random.Random(3).choices(range(1, 60), k=25)
        case = Case("many", tuple((1, context) for context in contexts), window=0)
        attention_cpu._plan.cache_clear()
        assert_attends(make_step(case, FP32), attention.paged_attention)
        assert_attends(make_step(replace(case, window=9), FP32), attention.paged_attention)

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

    @pytest.mark.parametrize("name", ["mixed", "mha", "head-dim-48", "padding", "no-sequence", "no-sequence-padding"])
    @every_dtype(FP32, FP16, BF16)
    def test_writes_go_to_their_slots_and_nowhere_else(self, name: str, dtype: torch.dtype) -> None:
        from lorikeet.kernels import attention_triton

        assert_writes(make_step(CASE[name], dtype), attention_triton.kv_write_)


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
            blocks, width = step.k_cache.shape[1], step.block_tables.shape[1]
            args[0].copy_(step.q)
            args[1].fill_(float("nan"))[:, :blocks].copy_(step.k_cache)
            args[2].fill_(float("nan"))[:, :blocks].copy_(step.v_cache)
            args[3].copy_(step.query_starts)
            args[4].copy_(step.context_lens)
            args[5].zero_()[:, :width].copy_(step.block_tables)
            graph.replay()
            atol, rtol = TOLERANCES[dtype]
            torch.testing.assert_close(out.float().cpu(), step.reference(), atol=atol, rtol=rtol)

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
