"""The block manager alone, first by example, then as a state machine against a model of what each block holds."""

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.version import AdapterVersion
from lorikeet.server.engine.block_manager import BlockManager
from lorikeet.server.engine.request import Request
from lorikeet.server.engine.sampling_params import SamplingParams


def single(adapter_id: str, digest: str) -> Adaptation:
    return Adaptation.single(AdapterVersion(adapter_id, digest))


A, B = single("a", "da"), single("b", "db")
HALF = Adaptation.of([(A.versions[0], 0.5)])
BOTH = Adaptation.of([(A.versions[0], 0.5), (B.versions[0], 0.5)])
OTHERS = Adaptation.of([(A.versions[0], 0.5), (B.versions[0], 0.25)])


def request_of(tokens: list[int], adapter: Adaptation | None = None, name: str = "r") -> Request:
    return Request(name, list(tokens), SamplingParams(), adapter, lambda _: None)


def compute(blocks: BlockManager, request: Request, num_tokens: int | None = None) -> None:
    request.num_computed_tokens = request.num_tokens if num_tokens is None else num_tokens
    blocks.commit(request)


def test_computed_full_blocks_are_found_again():
    blocks = BlockManager(8, 4)
    first = request_of(range(10))
    assert blocks.allocate(first) == 0
    compute(blocks, first)
    table = list(first.block_table)
    blocks.free(first)
    second = request_of([*range(9), 99])
    assert blocks.allocate(second) == 8
    assert second.block_table[:2] == table[:2]
    assert second.block_table[2] not in table[:2]
    assert blocks.stats().hit_tokens == 8
    assert blocks.stats().queried_tokens == 20


def test_blocks_are_shared_while_in_use():
    blocks = BlockManager(8, 4)
    first, second = request_of(range(8)), request_of([*range(8), 1])
    blocks.allocate(first)
    compute(blocks, first)
    assert blocks.allocate(second) == 8
    assert blocks.stats().used == 3
    blocks.free(first)
    assert blocks.stats().used == 3
    blocks.check_integrity()


def test_full_hit_leaves_a_token_to_compute():
    blocks = BlockManager(8, 4)
    first, second = request_of(range(8)), request_of(range(8))
    blocks.allocate(first)
    compute(blocks, first)
    assert blocks.allocate(second) == 4
    assert second.block_table[1] != first.block_table[1]


def test_blocks_that_are_not_computed_are_not_found():
    blocks = BlockManager(8, 4)
    first, second = request_of(range(12)), request_of(range(12))
    blocks.allocate(first)
    compute(blocks, first, 7)
    assert blocks.allocate(second) == 4


def test_another_adapter_or_another_version_finds_nothing():
    blocks = BlockManager(16, 4)
    first = request_of(range(12), A)
    blocks.allocate(first)
    compute(blocks, first)
    for adapter in (None, B, single("a", "newer")):
        other = request_of(range(12), adapter)
        assert blocks.allocate(other) == 0
        blocks.free(other)
    assert blocks.allocate(request_of(range(12), single("renamed", "da"))) == 8


def test_same_block_after_another_prefix_is_not_a_hit():
    blocks = BlockManager(16, 4)
    first = request_of([1, 1, 1, 1, 5, 6, 7, 8, 0])
    blocks.allocate(first)
    compute(blocks, first)
    assert blocks.allocate(request_of([2, 2, 2, 2, 5, 6, 7, 8, 0])) == 0


def test_colliding_hashes_do_not_serve_wrong_kv(monkeypatch):
    class Collider(int):
        __hash__ = lambda self: 7  # noqa: E731

    blocks = BlockManager(16, 2)
    first = request_of([Collider(n) for n in (1, 2, 3, 4, 5)])
    blocks.allocate(first)
    compute(blocks, first)
    assert blocks.allocate(request_of([Collider(n) for n in (4, 3, 2, 1, 5)])) == 0
    assert blocks.allocate(request_of([Collider(n) for n in (1, 2, 9, 9, 5)])) == 2


def test_least_recently_used_cached_block_is_reused_first_and_free_ones_before_it():
    blocks = BlockManager(4, 2)
    old, new = request_of([1, 1, 9]), request_of([2, 2, 9])
    for request in (old, new):
        blocks.allocate(request)
        compute(blocks, request)
    blocks.free(old)
    blocks.free(new)
    assert blocks.stats()[1:4] == (0, 2, 2)
    small = request_of([3, 3, 3])
    blocks.allocate(small)  # the two free ones
    assert blocks.stats().cached == 2
    third = request_of([4])
    blocks.allocate(third)  # takes the block of `old`
    assert blocks.stats().cached == 1
    blocks.free(small)
    assert blocks.allocate(request_of([2, 2, 9])) == 2


def test_children_are_reused_before_their_parents():
    blocks = BlockManager(4, 2)
    first = request_of([1, 1, 2, 2, 3])
    blocks.allocate(first)
    compute(blocks, first)
    blocks.free(first)
    others = [request_of([9]) for _ in range(3)]  # two free blocks, then a cached one
    for other in others:
        blocks.allocate(other)
    blocks.free(others[0])
    assert blocks.allocate(request_of([1, 1, 2, 2])) == 2


def test_too_few_blocks_change_nothing():
    blocks = BlockManager(3, 4)
    first = request_of(range(8))
    blocks.allocate(first)
    before = blocks.stats()
    second = request_of(range(100, 108))
    assert blocks.allocate(second) is None
    assert second.block_table == []
    assert blocks.stats() == before
    assert not blocks.grow(first, 13)
    assert blocks.grow(first, 12)
    assert len(first.block_table) == 3


def test_cached_hits_count_as_blocks_that_are_needed():
    blocks = BlockManager(3, 2)
    first = request_of([1, 1, 2, 2, 3])
    blocks.allocate(first)
    compute(blocks, first)
    blocks.free(first)
    # Two hits and two fresh blocks, but only three exist.
    assert blocks.allocate(request_of([1, 1, 2, 2, 3, 3, 4])) is None
    blocks.check_integrity()


def test_blocks_that_are_hit_are_not_reused_for_the_rest_of_the_request():
    blocks = BlockManager(3, 2)
    for tokens in ([1, 1, 3], [2, 2, 3]):
        request = request_of(tokens)
        blocks.allocate(request)
        compute(blocks, request)
        blocks.free(request)
    blocks.allocate(request_of([9]))  # takes the free block; the next to be reused is that of 1, 1
    longer = request_of([1, 1, 8, 8])
    assert blocks.allocate(longer) == 2
    assert len(set(longer.block_table)) == 2
    blocks.check_integrity()
    blocks.free(longer)
    assert blocks.allocate(request_of([1, 1, 8])) == 2


def test_spare_blocks_are_left():
    blocks = BlockManager(4, 4)
    assert blocks.allocate(request_of(range(9)), spare=2) is None
    assert blocks.allocate(request_of(range(8)), spare=2) == 0


def test_compositions_share_blocks_with_themselves_only_and_lose_them_with_any_member():
    blocks = BlockManager(30, 2)
    for adapter in (None, A, B, HALF, BOTH, OTHERS):
        request = request_of([1, 1, 1], adapter)
        assert blocks.allocate(request) == 0
        compute(blocks, request)
        blocks.free(request)
    again = Adaptation.of([(B.versions[0], 0.5), (A.versions[0], 0.5)])
    for adapter in (None, A, B, HALF, BOTH, OTHERS, again):
        request = request_of([1, 1, 1], adapter)
        assert blocks.allocate(request) == 2
        blocks.free(request)
    blocks.drop_adapter("db")
    blocks.check_integrity()
    cached = {name: blocks.allocate(request_of([1, 1, 1], adapter, name)) for name, adapter in
              {"base": None, "a": A, "b": B, "half": HALF, "both": BOTH, "others": OTHERS}.items()}  # fmt: skip
    assert cached == {"base": 2, "a": 2, "b": 0, "half": 2, "both": 0, "others": 0}


def test_dropped_adapter_is_forgotten_and_its_blocks_are_free():
    blocks = BlockManager(12, 2)
    requests = [request_of([1, 1, 1], A), request_of([1, 1, 1], B), request_of([1, 1, 1])]
    for request in requests:
        blocks.allocate(request)
        compute(blocks, request)
    blocks.free(requests[0])
    blocks.drop_adapter("da")
    blocks.drop_adapter("db")  # in use: its request keeps it
    assert blocks.stats().cached == 0
    assert len(requests[1].block_table) == 2
    blocks.check_integrity()
    assert blocks.allocate(request_of([1, 1, 1], A)) == 0
    assert blocks.allocate(request_of([1, 1, 1], B)) == 0
    assert blocks.allocate(request_of([1, 1, 1])) == 2


def test_preempted_request_is_not_counted_as_a_hit():
    blocks = BlockManager(8, 2)
    request = request_of(range(5))
    blocks.allocate(request)
    compute(blocks, request)
    blocks.free(request)
    request.num_preemptions = 1
    assert blocks.allocate(request) == 4
    assert blocks.stats().hit_tokens == 0
    assert blocks.stats().queried_tokens == 5


def test_prefix_cache_can_be_off():
    blocks = BlockManager(8, 2, prefix_cache=False)
    first = request_of(range(5))
    blocks.allocate(first)
    compute(blocks, first)
    assert blocks.allocate(request_of(range(5))) == 0


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="num_blocks"):
        BlockManager(0, 16)


def test_bookkeeping_imports_no_torch():
    modules = ["block_manager", "scheduler", "waiting", "request", "inbox", "detokenizer", "adapter_port", "stats"]
    imports = ", ".join(f"lorikeet.server.engine.{module}" for module in modules)
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class BlockMachine(RuleBasedStateMachine):
    """`content[block][i]` is what the model's KV would be there: the adapter and the whole prefix up to that token."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(10, 2)
        self.content: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.count = 0

    @rule(
        target=requests,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        adapter=st.sampled_from([None, A, B, HALF, BOTH]),
    )
    def allocate(self, tokens, adapter):
        request = request_of(tokens, adapter, f"r{self.count}")
        self.count += 1
        num_cached = self.blocks.allocate(request)
        if num_cached is None:
            assert self.blocks.stats().used > 0 or len(tokens) > 20
            return multiple()
        assert num_cached < len(tokens)
        assert len(request.block_table) == -(-len(tokens) // 2)
        request.num_computed_tokens = num_cached
        self._verify(request)
        return request

    @rule(request=requests, num_tokens=st.integers(1, 4))
    def compute(self, request, num_tokens):
        for position in range(
            request.num_computed_tokens, min(request.num_tokens, request.num_computed_tokens + num_tokens)
        ):
            place = (request.block_table[position // 2], position % 2)
            self.content[place] = self._truth(request, position)
            request.num_computed_tokens = position + 1
        self.blocks.commit(request)

    @rule(request=requests, token=st.integers(0, 1))
    def say(self, request, token):
        if request.num_computed_tokens == request.num_tokens and self.blocks.grow(request, request.num_tokens + 1):
            request.output_token_ids.append(token)

    @rule(request=consumes(requests))
    def free(self, request):
        self._verify(request)
        self.blocks.free(request)
        assert request.block_table == []

    @rule(adapter=st.sampled_from([A, B]))
    def drop(self, adapter):
        self.blocks.drop_adapter(adapter.digest)
        registered = {owner for block in self.blocks._blocks if block.key is not None for owner in block.owners}
        assert adapter.digest not in registered

    @invariant()
    def integrity(self):
        self.blocks.check_integrity()
        stats = self.blocks.stats()
        assert stats.used + stats.cached + stats.free == stats.total

    def _verify(self, request):
        """Everything that counts as computed is really there, of this adapter and these tokens."""
        for position in range(request.num_computed_tokens):
            place = (request.block_table[position // 2], position % 2)
            assert self.content[place] == self._truth(request, position)

    def _truth(self, request, position):
        return (request.adapter.digest if request.adapter else "", tuple(request.token_ids(0, position + 1)))


BlockMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestBlockMachine = BlockMachine.TestCase
