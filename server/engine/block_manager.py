"""Who owns which KV block, and which blocks still hold KV that a later request may share. Imports no torch.

Only the scheduler calls it, on the step thread. A block is in one of three states:

    in use    refs > 0: in the block tables of `refs` requests
    cached    refs == 0, registered: its KV can be shared until the block is reused, least recently used first
    free      refs == 0, unregistered

Example with block_size 4. Request A has the prompt `t0..t9` and has computed all of it: its table is [7, 2, 5], and
blocks 7 (t0..t3) and 2 (t4..t7) are registered; block 5 is not full. Request B of the same adapter version and the
prompt `t0..t7` finds block 7 only: one token at least has to be computed, and blocks are shared whole, so nobody ever
writes into a shared one. Its table is [7, 9].

Blocks are found by a chain: the key of a block is (parent, its tokens), where parent is the adaptation's digest for a
first block and else the uid that the block before got when it was registered. Uids are never used again and tuples
compare by value, so a hit proves adaptation and every token from the first on; no hash can collide unnoticed.
When a parent is reused for something else, its children cannot be found any more and are reused in their turn. That is
rare: a request's blocks are freed last block first, so children are older in the LRU order than their parents.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from .request import Request

Key = tuple[int | str, tuple[int, ...]]


class IntegrityError(RuntimeError):
    """An invariant of the engine's own bookkeeping is broken: a bug."""


class BlockStats(NamedTuple):
    """Counts of blocks by state, and of prompt tokens that were looked up and found since start."""

    total: int
    used: int
    cached: int
    free: int
    queried_tokens: int
    hit_tokens: int


@dataclass(slots=True)
class _Block:
    refs: int = 0
    key: Key | None = None
    uid: int = 0
    owners: tuple[str, ...] = ()  # digests of the versions that its KV was computed with; ("",) is the base


@dataclass(slots=True)
class _Chain:
    """How far a request's table is registered: its first `length` blocks; `parent` goes into the next one's key."""

    parent: int | str
    length: int


class BlockManager:
    """Paged KV blocks with reference counts and a prefix cache.

    Args:
        num_blocks: blocks of the KV cache, at least 1.
        block_size: tokens per block, at least 1.
        prefix_cache: False never shares a block.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks ({num_blocks}) and block_size ({block_size}) must be 1 or more")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._blocks = [_Block() for _ in range(num_blocks)]
        # In the order of reuse: free ones, then cached ones, least recently used first.
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_cached = 0
        self._by_key: dict[Key, int] = {}
        self._by_owner: dict[str, set[int]] = {}
        self._chains: dict[Request, _Chain] = {}
        self._next_uid = 0
        self._queried_tokens = 0
        self._hit_tokens = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit into the whole cache."""
        return self.num_blocks * self.block_size

    def stats(self) -> BlockStats:
        """Current counts; O(1)."""
        unused = len(self._unused)
        used = self.num_blocks - unused
        free = unused - self._num_cached
        return BlockStats(self.num_blocks, used, self._num_cached, free, self._queried_tokens, self._hit_tokens)

    def allocate(self, request: Request, *, spare: int = 0) -> int | None:
        """Give a request without blocks a table for all tokens it has, sharing cached blocks of its prefix.

        Args:
            request: `block_table` is filled.
            spare: blocks that must remain unused afterwards.

        Returns:
            The number of tokens whose KV is already there (less than `num_tokens`), or None, and nothing changed, if
            there are too few blocks.
        """
        assert request not in self._chains
        chain, hits = self._match(request)
        num_unused_hits = sum(not self._blocks[block].refs for block in hits)
        num_fresh = self._blocks_for(request.num_tokens) - len(hits)
        if num_fresh + spare > len(self._unused) - num_unused_hits:
            return None
        for block in hits:
            self._take(block)
        request.block_table = hits + [self._take_oldest() for _ in range(num_fresh)]
        self._chains[request] = chain
        num_cached = len(hits) * self.block_size
        if request.num_preemptions == 0:  # what a preempted request finds again is its own
            self._queried_tokens += request.num_tokens
            self._hit_tokens += num_cached
        return num_cached

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Extend a request's table so that it holds `num_tokens`; False, and nothing changed, if blocks are missing."""
        missing = self._blocks_for(num_tokens) - len(request.block_table)
        if missing > len(self._unused):
            return False
        request.block_table.extend(self._take_oldest() for _ in range(missing))
        return True

    def commit(self, request: Request) -> None:
        """Register the request's blocks whose KV is complete by now, according to `num_computed_tokens`."""
        chain = self._chains[request]
        num_full = request.num_computed_tokens // self.block_size
        if not self._prefix_cache or num_full == chain.length:
            return
        owners = _owners(request)
        for i in range(chain.length, num_full):
            key = (chain.parent, self._tokens(request, i))
            twin = self._by_key.get(key)
            if twin is None:  # else another request computed the same at the same time: ours stays unregistered
                twin = request.block_table[i]
                self._register(twin, key, owners)
            chain.parent = self._blocks[twin].uid
        chain.length = num_full

    def free(self, request: Request) -> None:
        """Take a request's blocks back; registered ones stay cached. Nothing happens if it has none."""
        if self._chains.pop(request, None) is None:
            return
        for index in reversed(request.block_table):
            block = self._blocks[index]
            block.refs -= 1
            if not block.refs:
                self._unused[index] = None
                if block.key is None:
                    self._unused.move_to_end(index, last=False)
                else:
                    self._num_cached += 1
        request.block_table = []

    def drop_adapter(self, digest: str) -> None:
        """Forget the cached KV of an adapter version, alone or among others; blocks in use stay with their requests."""
        for index in list(self._by_owner.get(digest, ())):
            self._unregister(index)
            if not self._blocks[index].refs:
                self._num_cached -= 1
                self._unused.move_to_end(index, last=False)

    def check_integrity(self) -> None:
        """Verify every invariant; O(blocks + table entries).

        Raises:
            IntegrityError: names the first block or request that is wrong.
        """
        refs = [0] * self.num_blocks
        for request in self._chains:
            if len(set(request.block_table)) != len(request.block_table):
                raise IntegrityError(f"{request.request_id} holds a block twice: {request.block_table}")
            for index in request.block_table:
                refs[index] += 1
        for index, block in enumerate(self._blocks):
            if block.refs != refs[index]:
                raise IntegrityError(f"block {index} counts {block.refs} references, its requests {refs[index]}")
            if (block.refs == 0) != (index in self._unused):
                raise IntegrityError(f"block {index} has {block.refs} references and is in the wrong list")
            if block.key is not None and self._by_key.get(block.key) != index:
                raise IntegrityError(f"block {index} is registered under a key that leads elsewhere")
            for owner in block.owners:
                if (block.key is not None) != (index in self._by_owner.get(owner, ())):
                    raise IntegrityError(f"block {index} and the index of {owner!r} disagree")
        registered = [block for block in self._blocks if block.key is not None]
        num_registered = len(registered)
        num_owners = sum(len(block.owners) for block in registered)
        if num_registered != len(self._by_key) or num_owners != sum(map(len, self._by_owner.values())):
            raise IntegrityError(f"{num_registered} blocks are registered, {len(self._by_key)} keys are known")
        num_cached = sum(block.key is not None and not block.refs for block in self._blocks)
        if num_cached != self._num_cached:
            raise IntegrityError(f"{num_cached} blocks are cached, {self._num_cached} were counted")

    def _match(self, request: Request) -> tuple[_Chain, list[int]]:
        chain = _Chain(_digest(request), 0)
        hits: list[int] = []
        if self._prefix_cache:
            for i in range(request.num_reusable_tokens // self.block_size):
                block = self._by_key.get((chain.parent, self._tokens(request, i)))
                if block is None:
                    break
                hits.append(block)
                chain = _Chain(self._blocks[block].uid, i + 1)
        return chain, hits

    def _tokens(self, request: Request, index: int) -> tuple[int, ...]:
        return tuple(request.token_ids(index * self.block_size, (index + 1) * self.block_size))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take(self, index: int) -> None:
        block = self._blocks[index]
        if not block.refs:
            del self._unused[index]
            self._num_cached -= block.key is not None
        block.refs += 1

    def _take_oldest(self) -> int:
        index = next(iter(self._unused))
        self._take(index)
        if self._blocks[index].key is not None:
            self._unregister(index)
        return index

    def _register(self, index: int, key: Key, owners: tuple[str, ...]) -> None:
        block = self._blocks[index]
        block.key, block.owners, block.uid = key, owners, self._next_uid
        self._next_uid += 1
        self._by_key[key] = index
        for owner in owners:
            self._by_owner.setdefault(owner, set()).add(index)

    def _unregister(self, index: int) -> None:
        block = self._blocks[index]
        assert block.key is not None
        del self._by_key[block.key]
        block.key = None
        for owner in block.owners:
            indices = self._by_owner[owner]
            indices.discard(index)
            if not indices:
                del self._by_owner[owner]


def _digest(request: Request) -> str:
    return request.adapter.digest if request.adapter is not None else ""


def _owners(request: Request) -> tuple[str, ...]:
    """Sorted, each once: two ids can have the same content."""
    if request.adapter is None:
        return ("",)
    return tuple(sorted({version.digest for version in request.adapter.versions}))
