"""Rotation with cache write equals its reference, for stacked projections of any number of heads, on every device."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from lorikeet.kernels import rope
from lorikeet.kernels.attention_reference import kv_write_reference_
from lorikeet.kernels.rope import rope_reference, rotation_table
from torch import Tensor

from .native_libraries import every_library, two_threads, use_library

__all__ = ["two_threads"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# (atol, rtol) against the fp32 rotation of the same values. 16 bit: the CPU path rounds a product, then the sum; with
# a norm in front a value may be rounded to its neighbour twice before.
TOLERANCES = {FP32: (1e-5, 1e-5), FP16: (4e-3, 4e-3), BF16: (3.2e-2, 3.2e-2)}
EPS = 1e-6


def dtypes(*chosen: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", chosen, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Case:
    """The shape of one call; `slots` of its tokens, -1 = padding."""

    name: str
    slots: tuple[int, ...] = (7, 0, -1, 11, 5)
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    norm: bool = False
    gap: int = 0


CASES = [
    Case("gqa"),
    Case("mha", num_heads=3, num_kv_heads=3),
    Case("mqa-9", num_heads=9, num_kv_heads=1),
    Case("one-head", num_heads=1, num_kv_heads=1),
    Case("more-heads-than-a-tile", num_heads=21, num_kv_heads=7, head_dim=128, slots=(3, 9)),
    Case("head-dim-2", head_dim=2),
    Case("half-12", head_dim=24),
    Case("half-40", head_dim=80),
    Case("odd-half", head_dim=14),
    Case("rows-apart", gap=8),
    Case("norm", norm=True),
    Case("norm-half-24", norm=True, head_dim=48, num_heads=5, num_kv_heads=1),
    Case("all-padding", slots=(-1, -1)),
    Case("no-token", slots=()),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@dataclass
class Call:
    """Arguments of the operator; cache entries that the call must leave alone are random."""

    case: Case
    qkv: Tensor
    rotations: Tensor
    k_cache: Tensor
    v_cache: Tensor
    kv_slots: Tensor
    head_norm: Tensor | None

    def args(self) -> tuple[Tensor | float | None, ...]:
        return self.qkv, self.rotations, self.k_cache, self.v_cache, self.kv_slots, self.head_norm, EPS

    def heads(self) -> Tensor:
        return self.qkv.unflatten(1, (-1, self.case.head_dim))


def make(case: Case, dtype: torch.dtype, device: str = "cpu", num_blocks: int = 3, block_size: int = 4) -> Call:
    num_tokens, kv = len(case.slots), case.num_kv_heads
    width = (case.num_heads + 2 * kv) * case.head_dim
    table = rotation_table(1 / 100.0 ** torch.rand(case.head_dim // 2), 1.3, 400, dtype)
    cache = (kv, num_blocks, block_size, case.head_dim)
    tensors = (
        torch.randn(num_tokens, width + case.gap).to(dtype)[:, :width],
        table[torch.randint(400, (num_tokens,))],
        torch.randn(cache).to(dtype),
        torch.randn(cache).to(dtype),
        torch.tensor(case.slots, dtype=torch.int64),
    )
    weight = (1 + 0.5 * torch.randn(case.num_heads + kv, case.head_dim)).to(dtype).to(device) if case.norm else None
    return Call(case, *(tensor.to(device) for tensor in tensors), weight)


def assert_rotates_and_writes(
    run: Callable[..., None], case: Case, dtype: torch.dtype, device: str = "cpu", **sizes: int
) -> None:
    call = make(case, dtype, device, **sizes)
    atol, rtol = TOLERANCES[dtype]
    heads, kv = call.heads().clone(), case.num_kv_heads
    rotated = torch.empty(len(case.slots), case.num_heads + kv, case.head_dim)
    for head in range(case.num_heads + kv):
        weight = None if call.head_norm is None else call.head_norm[head]
        rotated[:, head] = rope_reference(heads[:, head], call.rotations, weight, EPS).cpu()
    k_cache, v_cache = call.k_cache.float().cpu(), call.v_cache.float().cpu()
    values = heads[:, -kv:].float().cpu()
    kv_write_reference_(rotated[:, case.num_heads :], values, k_cache, v_cache, call.kv_slots)

    run(*call.args())
    queries = call.heads()[:, : case.num_heads]
    torch.testing.assert_close(queries.float().cpu(), rotated[:, : case.num_heads], atol=atol, rtol=rtol)
    torch.testing.assert_close(call.k_cache.float().cpu(), k_cache, atol=atol, rtol=rtol)
    assert torch.equal(call.v_cache.float().cpu(), v_cache)
    # What was not written is as it was, and values are only read.
    written = torch.zeros(k_cache.shape[1] * k_cache.shape[2], dtype=torch.bool)
    written[[slot for slot in case.slots if slot >= 0]] = True
    assert torch.equal(call.k_cache.float().cpu().flatten(1, 2)[:, ~written], k_cache.flatten(1, 2)[:, ~written])
    assert torch.equal(call.heads()[:, -kv:], heads[:, -kv:])


class TestTable:
    @dtypes(FP32, BF16)
    def test_rows_are_cos_and_sin_of_the_position(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rope, "_TABLE_PIECE", 7)  # so that several pieces make the table
        frequencies = torch.rand(5)
        table = rotation_table(frequencies, 0.7, 23, dtype)
        assert table.shape == (23, 3, 5) and table.dtype == dtype
        angles = torch.arange(23).float()[:, None] * frequencies
        # The same fp32 values rounded to the dtype.
        assert torch.equal(table[:, 0], (angles.cos() * 0.7).to(dtype))
        assert torch.equal(table[:, 2], (angles.sin() * 0.7).to(dtype))
        assert torch.equal(table[:, 1], -table[:, 2])


class TestCpu:
    @every_library
    @dtypes(FP32, FP16, BF16)
    def test_equals_reference(self, library: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        use_library(monkeypatch, library, rope, {"_rotate": rope._ROTATE, "_rotate_briefly": rope._ROTATE})
        for case in CASES:
            assert_rotates_and_writes(rope.rope_kv_write_, case, dtype)

    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
    def test_threads_change_nothing(self, norm: bool, two_threads: None) -> None:
        slots = tuple(torch.randperm(400)[:130].tolist())
        call = make(Case("many", slots, 9, 3, 64, norm), BF16, num_blocks=100)
        before = call.qkv.clone()
        rope.rope_kv_write_(*call.args())
        queries, keys = call.heads()[:, :9].clone(), call.k_cache.clone()
        torch.set_num_threads(1)
        call.qkv.copy_(before)
        rope.rope_kv_write_(*call.args())
        assert torch.equal(call.heads()[:, :9], queries) and torch.equal(call.k_cache, keys)


class TestOperators:
    @pytest.mark.parametrize("name", ["gqa", "norm"])
    def test_opcheck_and_the_dispatched_call(self, name: str) -> None:
        case = next(case for case in CASES if case.name == name)
        operator = torch.ops.lorikeet.rope_kv_write_.default
        torch.library.opcheck(operator, make(case, FP32).args())
        assert_rotates_and_writes(operator, case, FP32)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("qkv", lambda t: t.double(), "expected float32, bfloat16 or float16"),
            ("qkv", lambda t: t[:, :64], "qkv must be \\[num_tokens, \\(num_heads \\+ 4\\) \\* 16\\]"),
            ("qkv", lambda t: t.t().contiguous().t(), "with contiguous rows"),
            ("rotations", lambda t: t[:3], "rotations must be torch.float32 \\[5, 3, 8\\]"),
            ("rotations", lambda t: t.half(), "rotations must be torch.float32"),
            ("k_cache", lambda t: t.half(), "k_cache must be torch.float32"),
            ("v_cache", lambda t: t[:, :2].contiguous(), "v_cache must be torch.float32"),
            ("kv_slots", lambda t: t.int(), "kv_slots must be int64"),
            ("head_norm", lambda t: t[1:], "head_norm must be torch.float32 \\[8, 16\\]"),
        ],
    )
    def test_what_breaks_the_contract_is_refused(
        self, name: str, change: Callable[[Tensor], Tensor], message: str
    ) -> None:
        call = make(Case("broken", norm=True), FP32)
        setattr(call, name, change(getattr(call, name)))
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lorikeet.rope_kv_write_.default(*call.args())


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs natively, in TestGpu")
class TestInterpreted:
    """The Triton kernel in Triton's interpreter, on the CPU. Its casts to bf16 truncate (Triton 3.6 and 3.7)."""

    @every_case
    @dtypes(FP32, FP16)
    def test_equals_reference(self, case: Case, dtype: torch.dtype) -> None:
        from lorikeet.kernels import rope_triton

        assert_rotates_and_writes(rope_triton.rope_kv_write_, case, dtype)


@pytest.mark.gpu
class TestGpu:
    LARGE = (
        Case("llama-3", tuple(range(64)), num_heads=32, num_kv_heads=8, head_dim=128),
        Case("qwen-3", tuple(range(63, -1, -1)), num_heads=16, num_kv_heads=8, head_dim=128, norm=True),
        Case("smollm", tuple(range(64)), num_heads=9, num_kv_heads=3, head_dim=64),
    )

    @pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
    @dtypes(FP32, FP16, BF16)
    def test_equals_reference(self, case: Case, dtype: torch.dtype) -> None:
        assert_rotates_and_writes(rope.rope_kv_write_, case, dtype, "cuda", num_blocks=16)

    def test_opcheck(self) -> None:
        call = make(Case("checked", norm=True), FP32, "cuda")
        torch.library.opcheck(torch.ops.lorikeet.rope_kv_write_.default, call.args())

    def test_offsets_beyond_32_bits(self) -> None:
        """A cache of more than 2^31 elements; 4 GiB each of keys and values."""
        num_blocks = 2**31 // (2 * 16 * 64) + 8
        case = Case("large", (16 * num_blocks - 1, 3), num_heads=2, num_kv_heads=2, head_dim=64)
        call = make(Case("small", case.slots, num_heads=2, num_kv_heads=2, head_dim=64), BF16, "cuda")
        shape = (2, num_blocks, 16, 64)
        call.k_cache, call.v_cache = (torch.zeros(shape, dtype=BF16, device="cuda") for _ in range(2))
        values = call.heads()[:, -2:].clone()
        rope.rope_kv_write_(*call.args())
        assert torch.equal(call.v_cache[:, -1, -1], values[0])
        assert torch.equal(call.v_cache[:, 0, 3], values[1])
        assert int(call.v_cache.count_nonzero()) <= values.numel()
