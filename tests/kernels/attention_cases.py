"""Steps of paged attention, and what both operators must make of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from lorikeet.kernels.attention_reference import kv_write_reference_, paged_attention_reference
from torch import Tensor

# (atol, rtol) against the fp32 reference on the same 16-bit inputs. fp32: only the order of additions differs. 16 bit:
# half a unit in the last place of results below 4, which is all the CPU path loses in fp32; the Triton kernel and the
# CPU's for bfloat16 also round the weights before they multiply them with V, the latter not for a single row.
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
    Case("head-dim-20", MIXED, head_dim=20, window=9),
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


def exact_attention(step: Step) -> Tensor:
    """What the step should come to, in fp64; rows that no sequence owns are zero."""
    case = step.case
    out = torch.zeros(step.q.shape, dtype=torch.float64)
    starts = step.query_starts.tolist()
    for n, context in enumerate(step.context_lens.tolist()):
        rows = starts[n + 1] - starts[n]
        queries = step.q[starts[n] : starts[n + 1]].double().unflatten(1, (case.num_kv_heads, case.group))
        for row, position in enumerate(range(context - rows, context)):
            seen = torch.arange(max(0, position - case.window + 1) if case.window else 0, position + 1)
            entries = step.block_tables[n, seen // case.block_size].long(), seen % case.block_size
            keys, values = (cache[:, *entries].double() for cache in (step.k_cache, step.v_cache))
            scores = queries[row] @ keys.mT * case.head_dim**-0.5
            if case.softcap:
                scores = case.softcap * (scores / case.softcap).tanh()
            out[starts[n] + row] = (scores.softmax(-1) @ values).flatten(0, 1)
    return out


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
