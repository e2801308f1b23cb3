"""The extent allocator: nothing is owned twice, nothing leaks, compaction's moves are safe in their order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lorikeet.adapters.arena import ALIGNMENT, ExtentAllocator, aligned


def test_first_fit_reuses_a_freed_extent():
    allocator = ExtentAllocator(10 * ALIGNMENT)
    starts = [allocator.alloc(2 * ALIGNMENT) for _ in range(5)]
    assert starts == [0, 128, 256, 384, 512] and allocator.alloc(1) is None
    allocator.free(128)
    assert allocator.alloc(ALIGNMENT) == 128
    allocator.check_integrity()


def test_neighbours_coalesce_in_any_order_of_freeing():
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        allocator = ExtentAllocator(3 * ALIGNMENT)
        starts = [allocator.alloc(1) for _ in range(3)]
        for i in order:
            allocator.free(starts[i])
            allocator.check_integrity()
        assert allocator.largest_free == 3 * ALIGNMENT


def test_extents_are_aligned():
    allocator = ExtentAllocator(1000)
    assert allocator.capacity == 960
    assert allocator.alloc(1) == 0 and allocator.alloc(65) == 64 and allocator.alloc(1) == 192
    assert aligned(64) == 64 and aligned(65) == 128


def test_freeing_twice_is_an_error():
    allocator = ExtentAllocator(1000)
    start = allocator.alloc(10)
    allocator.free(start)
    with pytest.raises(KeyError):
        allocator.free(start)


def test_arena_without_memory_holds_nothing():
    allocator = ExtentAllocator(ALIGNMENT - 1)
    assert allocator.alloc(1) is None and allocator.compact() == []
    allocator.check_integrity()


@given(st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=40))
@settings(max_examples=100, deadline=None)
def test_executing_compaction_moves_in_order_keeps_every_extent(entries):
    """Each extent's cells carry its number; a move copies cell by cell upwards, as the device does chunk by chunk."""
    allocator = ExtentAllocator(64 * ALIGNMENT)
    cells = [None] * allocator.capacity
    owner = {}
    for number, (size, _) in enumerate(entries):
        start = allocator.alloc(size)
        if start is not None:
            owner[start] = (number, size)
            cells[start : start + size] = [number] * size
    for start, (number, _) in list(owner.items()):
        if entries[number][1]:
            allocator.free(start)
            del owner[start]
    for source, target, size in allocator.compact():
        assert target < source
        for i in range(size):
            cells[target + i] = cells[source + i]
        owner[target] = owner.pop(source)
    allocator.check_integrity()
    for start, (number, size) in owner.items():
        assert cells[start : start + size] == [number] * size
    assert allocator.largest_free == allocator.capacity - allocator.used_elements


class AllocatorMachine(RuleBasedStateMachine):
    @initialize(capacity=st.integers(0, 5000))
    def create(self, capacity):
        self.allocator = ExtentAllocator(capacity)
        self.sizes = {}

    @rule(size=st.integers(1, 1500))
    def alloc(self, size):
        start = self.allocator.alloc(size)
        if start is None:
            assert self.allocator.largest_free < size
        else:
            self.sizes[start] = aligned(size)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def free(self, data):
        start = data.draw(st.sampled_from(sorted(self.sizes)))
        self.allocator.free(start)
        del self.sizes[start]

    @rule()
    def compact(self):
        for source, target, size in self.allocator.compact():
            assert self.sizes.pop(source) == size
            self.sizes[target] = size

    @invariant()
    def extents_are_disjoint_and_accounted(self):
        self.allocator.check_integrity()
        assert self.allocator.used_elements == sum(self.sizes.values())
        end = 0
        for start, size in sorted(self.sizes.items()):
            assert start >= end
            end = start + size


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
