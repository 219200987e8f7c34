"""PyTorch's CUDA caching allocator, rule by rule.

What it reproduces is ``DeviceCachingAllocator`` of c10/cuda/CUDACachingAllocator.cpp; each function names the one of
that file whose rules it follows, and the sizes are those of c10/core/AllocatorConfig.h. Left out: CUDA graphs'
private pools, peer access, free-memory callbacks.

Addresses are made up: ``cudaMalloc`` is taken to give ascending addresses and never the same one twice. Among free
blocks of one size the lowest address wins, so a driver that reuses addresses can order equal blocks differently.

Two things are arranged for speed and change no result. A free list is a sorted list of integers, size in the high bits
and address in the low ones, so that best fit is one bisection. And where blocks split or merge, the object of the lower
address stays; a segment's first block is therefore always the same object.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

KIB, MIB = 2**10, 2**20

# c10/core/AllocatorConfig.h: kMinBlockSize, kSmallSize, kSmallBuffer, kMinLargeAlloc, kRoundLarge; kLargeBuffer is the
# default of large_segment_size and of max_non_split_rounding_size.
MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 * MIB
SMALL_SEGMENT_BYTES = 2 * MIB
MIN_LARGE_BYTES = 10 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
ROUND_LARGE_BYTES = 2 * MIB
MAX_NON_SPLIT_ROUNDING_BYTES = 20 * MIB

_FIRST_ADDRESS = 0x7F00_0000_0000 - 2**46
SHIFT = 48
ADDRESS_MASK = 2**SHIFT - 1
UNLIMITED = 2**62
_UNBOUNDED_RANGE_BYTES = 2**42

FREE, ALLOCATED, AWAITING, UNMAPPED = range(4)
"""States of a block. Free is 0, for the sake of a quick test; AWAITING is ``active_awaiting_free``."""


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """What ``PYTORCH_CUDA_ALLOC_CONF`` says, and how much there is.

    ``max_split_size_bytes``           None: blocks of any size may be split (PyTorch's default)
    ``roundup_power2_divisions``       0: none
    ``garbage_collection_threshold``   0: none; PyTorch heeds it only where ``allowed_bytes`` is set
    ``capacity_bytes``                 what ``cudaMalloc`` can give to this allocator in total; None: no limit
    ``allowed_bytes``                  what ``set_per_process_memory_fraction`` allows; None: not called
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    roundup_power2_divisions: int = 0
    garbage_collection_threshold: float = 0.0
    capacity_bytes: int | None = None
    allowed_bytes: int | None = None

    @property
    def collects(self) -> bool:
        return self.allowed_bytes is not None and self.garbage_collection_threshold > 0

    @property
    def plain(self) -> bool:
        """Whether a request is served by the smallest free block that fits, whatever else there is."""
        return not (self.expandable_segments or self.collects or self.max_split_size_bytes is not None)


@dataclass(slots=True)
class Asked:
    """What the driver was asked for: calls (handles, of expandable segments) and bytes taken and given back.

    ``retried``: the whole cache was emptied.
    """

    taken: int = 0
    taken_bytes: int = 0
    given: int = 0
    given_bytes: int = 0
    retried: bool = False


def round_size(num_bytes: int, divisions: int = 0) -> int:
    """Return the block size of a request: ``round_size`` and ``roundup_power2_next_division``.

    Multiples of 512 B; with ``divisions`` = d and more than 512 d bytes, the next of d steps between powers of two.
    """
    if num_bytes < MIN_BLOCK_BYTES:
        return MIN_BLOCK_BYTES
    if divisions > 1 and num_bytes > MIN_BLOCK_BYTES * divisions:
        floor = 1 << (num_bytes.bit_length() - 1)
        step = floor >> (divisions.bit_length() - 1)
        return -(-num_bytes // step) * step
    return -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def segment_size(block_bytes: int) -> int:
    """Return what is asked of ``cudaMalloc`` for a rounded request: ``get_allocation_size``."""
    if block_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-block_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


class Range:
    """The virtual addresses of one expandable segment: ``ExpandableSegment``. Backed in handles of ``handle_bytes``."""

    __slots__ = ("address", "handle_bytes", "num_bytes")

    def __init__(self, address: int, num_bytes: int, handle_bytes: int) -> None:
        self.address = address
        self.num_bytes = num_bytes
        self.handle_bytes = handle_bytes


class Pool:
    """Free blocks of one stream, small or large: the part of a ``BlockPool`` that one request can see.

    ``free``      sorted ``size << 48 | address``
    ``keeps``     what may be left over without being split off
    ``unmapped``  addresses of the unbacked blocks of expandable segments, ascending
    """

    __slots__ = ("free", "keeps", "max_split", "small", "stream", "unmapped")

    def __init__(self, stream: str, small: bool, expandable: bool, max_split: int) -> None:
        # should_split
        fine = small or expandable
        self.stream = stream
        self.small = small
        self.free: list[int] = []
        self.unmapped: list[int] = []
        self.keeps = MIN_BLOCK_BYTES - 1 if fine else SMALL_BYTES
        self.max_split = UNLIMITED if fine else max_split


class Block:
    """A stretch of a segment. ``key`` is valid while free; ``used_elsewhere``: ``stream_uses`` is not empty."""

    __slots__ = (
        "address",
        "age",
        "key",
        "name",
        "next",
        "pool",
        "prev",
        "requested",
        "size",
        "space",
        "state",
        "used_elsewhere",
    )

    prev: Block
    next: Block

    def __init__(self, address: int, size: int, pool: Pool, space: Range | None) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.space = space
        self.state = FREE
        self.key = 0
        self.age = 0
        self.used_elsewhere = False
        self.requested = 0
        self.name = ""


class CachingAllocator:
    """``DeviceCachingAllocator`` of one GPU.

    ``allocated_bytes``, ``reserved_bytes`` are ``torch.cuda.memory_allocated()`` and ``memory_reserved()``; the peaks
    those of ``max_memory_allocated()`` and ``max_memory_reserved()``. When memory runs out, ``on_out_of_memory`` is
    called with (bytes of the block, bytes missing), the two are kept in ``out_of_memory``, and there is no limit from
    then on. ``awaiting`` is a heap of (when ready, number, block): freed, but another stream still uses the block.
    ``trace``, if set to a list, receives (action, address, bytes, stream, name) of what PyTorch's own trace records,
    but for alloc, free_requested and the free_completed of blocks that are free at once. ``at_address`` has every
    block.
    """

    def __init__(self, settings: AllocatorSettings) -> None:
        self.settings = settings
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.num_alloc_retries = 0
        self.out_of_memory: tuple[int, int] | None = None
        self.on_out_of_memory: Callable[[int, int], None] | None = None
        self.on_driver: Callable[[Asked], None] | None = None
        """Called after each request for which the driver was asked."""
        self._asked = Asked()
        self.awaiting: list[tuple[int, int, Block]] = []
        self.trace: list[tuple[str, int, int, str, str]] | None = None
        self.segments: dict[int, Block] = {}
        self._pools: dict[tuple[str, bool], Pool] = {}
        self.at_address: dict[int, Block] = {}
        self.awaiting_bytes = 0
        self.peak_awaiting_bytes = 0
        self._num_awaited = 0
        self._capacity = UNLIMITED if settings.capacity_bytes is None else settings.capacity_bytes
        self._allowed = UNLIMITED if settings.allowed_bytes is None else settings.allowed_bytes
        self._max_split = UNLIMITED if settings.max_split_size_bytes is None else settings.max_split_size_bytes
        self._expandable = settings.expandable_segments
        self._collects = settings.collects
        self._calls = [0, 0]
        self._plain = settings.plain
        self._next_address = _FIRST_ADDRESS
        # Stands before the first and after the last block of a segment, so that no neighbour is None.
        self._edge = Block(0, 0, Pool("", True, False, 0), None)
        self._edge.state = ALLOCATED

    def _more(self, pool: Pool, size: int) -> Block:
        """Return a block for a request that no free block serves; it is in no free list, and may be larger."""
        return self._find(pool, size) or self._grow(pool, size)

    # --- the requests --------------------------------------------------------------------------

    def pool(self, stream: str, block_bytes: int) -> Pool:
        """Return where a request of ``stream``, already rounded, is served from: ``get_pool``."""
        small = block_bytes <= SMALL_BYTES
        found = self._pools.get((stream, small))
        if found is None:
            found = self._pools[stream, small] = Pool(stream, small, self._expandable, self._max_split)
        return found

    def malloc(self, pool: Pool, size: int) -> Block:
        """Return a block for a request of ``size`` bytes, already rounded: ``malloc`` and ``alloc_found_block``."""
        free = pool.free
        at = bisect_left(free, size << SHIFT)
        found = self._plain and at < len(free)
        block = self.at_address[free.pop(at) & ADDRESS_MASK] if found else self._more(pool, size)
        rest = block.size - size
        if rest > pool.keeps and size < pool.max_split:
            address = block.address + size
            remaining = Block(address, rest, pool, block.space)
            self.at_address[address] = remaining
            remaining.prev = block
            remaining.next = after = block.next
            after.prev = remaining
            block.next = remaining
            block.size = size
            remaining.key = key = rest << SHIFT | address
            if self._collects:
                remaining.age = self._calls[pool.small]
            insort(free, key)
        else:
            size = block.size
        block.state = ALLOCATED
        self.allocated_bytes = allocated = self.allocated_bytes + size
        if allocated > self.peak_allocated_bytes:  # noqa: PLR1730 (a call of max costs three times as much)
            self.peak_allocated_bytes = allocated
        return block

    def free(self, block: Block) -> None:
        """Give back a block that no other stream uses: ``free``, ``free_block`` and ``try_merge_blocks``."""
        size = block.size
        self.allocated_bytes -= size
        pool = block.pool
        free = pool.free
        after = block.next
        if not after.state:
            del free[bisect_left(free, after.key)]
            del self.at_address[after.address]
            size += after.size
            after = after.next
            block.next = after
            after.prev = block
        before = block.prev
        if not before.state:
            del free[bisect_left(free, before.key)]
            del self.at_address[block.address]
            size += before.size
            before.next = after
            after.prev = before
            block = before
        block.state = FREE
        block.size = size
        block.key = key = size << SHIFT | block.address
        if self._collects:
            block.age = self._calls[pool.small]
        insort(free, key)

    def use_on(self, block: Block, stream: str) -> None:
        """``recordStream``: nothing on the stream of the block's own pool."""
        if stream != block.pool.stream:
            block.used_elsewhere = True

    def free_later(self, block: Block, ready_at: int) -> None:
        """Free a block that another stream still uses until ``ready_at``: ``free`` and ``insert_events``.

        It no longer counts as allocated, and cannot be reused or merged before :meth:`process_events` finds it ready.
        """
        self.allocated_bytes -= block.size
        block.state = AWAITING
        self.awaiting_bytes += block.size
        self.peak_awaiting_bytes = max(self.peak_awaiting_bytes, self.awaiting_bytes)
        self._num_awaited += 1
        heappush(self.awaiting, (ready_at, self._num_awaited, block))

    def process_events(self, now: int) -> None:
        """Free the blocks whose other streams are done by ``now``: ``process_events``; every malloc begins with it."""
        awaiting = self.awaiting
        while awaiting and awaiting[0][0] <= now:
            self._complete(heappop(awaiting)[2])

    def empty_cache(self) -> None:
        """Return to the driver what is wholly free: ``emptyCache`` and ``release_cached_blocks``."""
        while self.awaiting:
            self._complete(heappop(self.awaiting)[2])
        for small in (False, True):
            for pool in self._pools.values():
                if pool.small == small:
                    self._release_blocks(pool)

    # --- what there is -------------------------------------------------------------------------

    def blocks(self, head: Block) -> Iterator[Block]:
        """Yield the blocks of a segment, backed or not, by address."""
        while head is not self._edge:
            yield head
            head = head.next

    def state(self) -> tuple[object, ...]:
        """Return all that decides how later requests are served, beside the live blocks themselves."""
        pools = tuple((tuple(pool.free), tuple(pool.unmapped)) for pool in self._pools.values())
        return self.reserved_bytes, self._capacity, pools, tuple(self._calls)

    # --- away from the hot path ----------------------------------------------------------------

    def _complete(self, block: Block) -> None:
        if self.trace is not None:
            self.trace.append(("free_completed", block.address, block.requested, block.pool.stream, block.name))
        block.used_elsewhere = False
        self.awaiting_bytes -= block.size
        self.allocated_bytes += block.size  # free takes it off again
        self.free(block)

    def _insert(self, block: Block) -> None:
        block.state = FREE
        block.key = block.size << SHIFT | block.address
        block.age = self._calls[block.pool.small]
        insort(block.pool.free, block.key)

    def _take(self, block: Block) -> None:
        free = block.pool.free
        del free[bisect_left(free, block.key)]

    def _find(self, pool: Pool, size: int) -> Block | None:
        """``get_free_block``: the smallest free block that fits, lowest address first, and when not to take it."""
        if self._collects:
            self._calls[pool.small] += 1
        free = pool.free
        at = bisect_left(free, size << SHIFT)
        if at == len(free):
            return None
        block = self.at_address[free[at] & ADDRESS_MASK]
        if self._expandable:
            # What counts is the size that a block can grow to: prefer a later one that cannot grow as far.
            reach = block.size + (block.next.size if block.next.state == UNMAPPED else 0)
            while at + 1 < len(free):
                other = self.at_address[free[at + 1] & ADDRESS_MASK]
                other_reach = other.size + (other.next.size if other.next.state == UNMAPPED else 0)
                if other_reach >= reach:
                    break
                block, reach, at = other, other_reach, at + 1
        if size < self._max_split <= block.size:
            return None
        if size >= self._max_split and block.size >= size + MAX_NON_SPLIT_ROUNDING_BYTES:
            return None
        del free[at]
        return block

    def _grow(self, pool: Pool, size: int) -> Block:
        """The ladder of ``malloc`` once no free block fits: new memory, release some, release all, out of memory."""
        asked = self._asked = Asked()
        if self._collects:
            self._garbage_collect()
        block = self._alloc_block(pool, size)
        if block is None and self._release_available(pool, size):
            block = self._alloc_block(pool, size)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            asked.retried = True
            block = self._alloc_block(pool, size)
        if block is None:
            limit = min(self._capacity, self._allowed)
            if self.trace is not None:
                self.trace.append(("oom", limit - self.reserved_bytes, size, pool.stream, ""))
            self._capacity = self._allowed = UNLIMITED
            block = self._alloc_block(pool, size)
            assert block is not None, "an unlimited allocator gives"
            self.out_of_memory = (size, self.reserved_bytes - limit)
            if self.on_out_of_memory is not None:
                self.on_out_of_memory(*self.out_of_memory)
        if self.on_driver is not None:
            self.on_driver(asked)
        return block

    def _alloc_block(self, pool: Pool, size: int) -> Block | None:
        """``alloc_block``: a new segment, or more of an expandable one. The block is in no free list."""
        num_bytes = segment_size(size)
        if self.reserved_bytes + num_bytes > self._allowed:
            return None
        if self._expandable:
            return self._alloc_expandable(pool, size)
        if self.reserved_bytes + num_bytes > self._capacity:
            return None
        block = Block(self._next_address, num_bytes, pool, None)
        block.prev = block.next = self._edge
        self._next_address += -(-num_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
        self.at_address[block.address] = self.segments[block.address] = block
        self._reserve("segment_alloc", block.address, num_bytes, pool)
        return block

    def _reserve(self, action: str, address: int, num_bytes: int, pool: Pool) -> None:
        asked, takes = self._asked, action in {"segment_alloc", "segment_map"}
        handle = SMALL_SEGMENT_BYTES if pool.small else LARGE_SEGMENT_BYTES
        calls = num_bytes // handle if action in {"segment_map", "segment_unmap"} else 1
        if takes:
            self.reserved_bytes += num_bytes
            asked.taken += calls
            asked.taken_bytes += num_bytes
        else:
            self.reserved_bytes -= num_bytes
            asked.given += calls
            asked.given_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        if self.trace is not None:
            self.trace.append((action, address, num_bytes, pool.stream, ""))

    def _release_block(self, block: Block) -> None:
        """``release_block``: ``cudaFree`` of a segment that is one free block."""
        self._take(block)
        del self.at_address[block.address], self.segments[block.address]
        self._reserve("segment_free", block.address, block.size, block.pool)

    def _is_whole(self, block: Block) -> bool:
        return block.prev is self._edge and block.next is self._edge

    def _release_blocks(self, pool: Pool) -> None:
        """``release_blocks``: free every unsplit block, unmap what is free of expandable segments."""
        for block in [self.at_address[key & ADDRESS_MASK] for key in pool.free]:
            if block.space is not None:
                self._unmap(block)
            elif self._is_whole(block):
                self._release_block(block)

    def _release_available(self, pool: Pool, size: int) -> bool:
        """``release_available_cached_blocks``: with a maximal split size, just enough oversize blocks of the stream."""
        if self._max_split == UNLIMITED or self._expandable:
            return False
        wanted = max(size, self._max_split)
        free = pool.free
        at = bisect_left(free, wanted << SHIFT)
        if at < len(free):
            self._release_block(self.at_address[free[at] & ADDRESS_MASK])
            return True
        released = 0
        while free and released < wanted and free[-1] >> SHIFT >= self._max_split:
            block = self.at_address[free[-1] & ADDRESS_MASK]
            released += block.size
            self._release_block(block)
        return released >= wanted

    def _garbage_collect(self) -> None:
        """``garbage_collect_cached_blocks``: release unsplit large blocks unused for longer than the mean."""
        threshold = int(self.settings.garbage_collection_threshold * self._allowed)
        target = self.reserved_bytes - threshold
        if target <= 0:
            return
        calls = self._calls[False]
        freeable = [
            block
            for pool in self._pools.values()
            if not pool.small
            for block in (self.at_address[key & ADDRESS_MASK] for key in pool.free)
            if self._is_whole(block)
        ]
        total_age = sum(calls - block.age for block in freeable)
        reclaimed, freed = 0, True
        while reclaimed < target and freed and freeable:
            mean = total_age / len(freeable)
            old = [block for block in freeable if calls - block.age >= mean]
            freeable = [block for block in freeable if calls - block.age < mean]
            freed = bool(old)
            for block in old:
                reclaimed += block.size
                total_age -= calls - block.age
                self._release_block(block)

    # --- expandable segments -------------------------------------------------------------------

    def _alloc_expandable(self, pool: Pool, size: int) -> Block | None:
        """``try_allocate_expandable_block``: map handles at the lowest address where ``size`` can be."""
        candidate = self._find_expandable(pool, size)
        if candidate.state == UNMAPPED:
            mapped = self._map(candidate, min(candidate.size, size))
            if mapped is None:
                return None
            candidate = mapped
        while candidate.size < size:
            mapped = self._map(candidate.next, min(size - candidate.size, candidate.next.size))
            if mapped is None:
                return None
            candidate = mapped
        self._take(candidate)
        return candidate

    def _find_expandable(self, pool: Pool, size: int) -> Block:
        """``find_expandable_block``: the first run of free and unmapped blocks with room, or a new range."""
        for address in pool.unmapped:
            block = self.at_address[address]
            if block.prev.state == FREE:
                block = block.prev
            room, last = 0, block
            while room < size and last.state in {FREE, UNMAPPED}:
                room += last.size
                last = last.next
            if room >= size:
                return block
        handle = SMALL_SEGMENT_BYTES if pool.small else LARGE_SEGMENT_BYTES
        # 1 1/8 of the GPU's memory is reserved as addresses; the capacity stands for it here.
        wanted = self._capacity + self._capacity // 8 if self._capacity != UNLIMITED else _UNBOUNDED_RANGE_BYTES
        space = Range(self._next_address, -(-max(wanted, size) // handle) * handle, handle)
        self._next_address += space.num_bytes
        block = Block(space.address, space.num_bytes, pool, space)
        block.prev = block.next = self._edge
        block.state = UNMAPPED
        self.at_address[block.address] = self.segments[block.address] = block
        insort(pool.unmapped, block.address)
        return block

    def _map(self, block: Block, size: int) -> Block | None:
        """``map_block``: back the first ``size`` bytes, in whole handles, of a block; it joins free neighbours."""
        space, pool = block.space, block.pool
        assert space is not None and (block.address - space.address) % space.handle_bytes == 0
        num_bytes = -(-size // space.handle_bytes) * space.handle_bytes
        if self.reserved_bytes + num_bytes > self._capacity:
            return None
        address = block.address
        pool.unmapped.remove(address)
        if num_bytes < block.size:
            rest = self._cut(block, num_bytes)
            rest.state = UNMAPPED
            insort(pool.unmapped, rest.address)
        block.state = FREE
        if block.next.state == FREE:
            self._take(block.next)
            self._absorb_next(block)
        if block.prev.state == FREE:
            block = block.prev
            self._take(block)
            self._absorb_next(block)
        self._insert(block)
        self._reserve("segment_map", address, num_bytes, pool)
        return block

    def _unmap(self, block: Block) -> None:
        """``unmap_block``: take back the handles that lie wholly in a free block; drop the range if nothing is left."""
        space, pool = block.space, block.pool
        assert space is not None
        handle = space.handle_bytes
        begin = space.address + -(-(block.address - space.address) // handle) * handle
        end = space.address + (block.address + block.size - space.address) // handle * handle
        if begin >= end:
            return
        self._take(block)
        if begin > block.address:
            inner = self._cut(block, begin - block.address)
            self._insert(block)
            block = inner
        if end < block.address + block.size:
            self._insert(self._cut(block, end - block.address))
        block.state = UNMAPPED
        if block.next.state == UNMAPPED:
            pool.unmapped.remove(block.next.address)
            self._absorb_next(block)
        if block.prev.state == UNMAPPED:
            block = block.prev
            self._absorb_next(block)
        else:
            insort(pool.unmapped, block.address)
        self._reserve("segment_unmap", begin, end - begin, pool)
        if self._is_whole(block):
            pool.unmapped.remove(block.address)
            del self.at_address[block.address], self.segments[block.address]

    def _cut(self, block: Block, size: int) -> Block:
        """Split a block in two, return the upper one."""
        upper = Block(block.address + size, block.size - size, block.pool, block.space)
        self.at_address[upper.address] = upper
        upper.prev, upper.next = block, block.next
        block.next.prev = upper
        block.next, block.size = upper, size
        return upper

    def _absorb_next(self, block: Block) -> None:
        upper = block.next
        del self.at_address[upper.address]
        block.size += upper.size
        block.next = upper.next
        block.next.prev = block
