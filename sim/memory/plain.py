"""The caching allocator as most people run it, and fast.

With no setting but rounding and limits, ``CachingAllocator`` serves a request by the smallest free block of its pool
that fits, the lowest of those, splits it, and merges what is freed with free neighbours. That takes no objects for
blocks, as nothing need be known of one but where it starts and how long it is: free ones stand in dictionaries by where
they start and end, and in bins of one size. Most requests find a block of their own size: one look into a bin.

Addresses are made up, as ``CachingAllocator``'s are, but segments never touch: blocks that do are neighbours.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import length_hint

from sim.memory.allocator import (
    MIN_BLOCK_BYTES,
    ROUND_LARGE_BYTES,
    SMALL_BYTES,
    UNLIMITED,
    AllocatorSettings,
    Asked,
    segment_size,
)
from sim.memory.script import CALL, OWN, USE, Code, Script, Scripts, go_on


@dataclass(slots=True)
class Most:
    """The most that was allocated while a call was replayed, and after which action; -1: no more than before it."""

    allocated_bytes: int
    action: int


class PlainPool:
    """Free blocks of one stream, small or large: ``bins`` has their addresses, ascending, by size.

    ``sizes`` has, ascending, every size of which there is a bin; bins may be empty, until somebody comes by.
    ``keeps`` is what may be left over of a block without being split off.
    """

    __slots__ = ("bins", "keeps", "sizes")

    def __init__(self, small: bool) -> None:
        self.bins: dict[int, list[int]] = {}
        self.sizes: list[int] = []
        self.keeps = MIN_BLOCK_BYTES - 1 if small else SMALL_BYTES  # should_split

    def put(self, address: int, size: int) -> None:
        found = self.bins.get(size)
        if found is None:
            self.bins[size] = [address]
            insort(self.sizes, size)
        else:
            insort(found, address)


class PlainAllocator:
    """``CachingAllocator`` with plain settings, of one rank: the same in every number.

    ``live``      slot, with its microbatch, -> address of its block, or that address below zero (``~``) once another
                  stream uses the block
    ``awaiting``  a heap of (when ready, number, address, bytes, pool): freed, but another stream still uses the block
    """

    def __init__(self, settings: AllocatorSettings, scripts: Scripts) -> None:
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self.num_alloc_retries = 0
        self.peak_awaiting_bytes = 0
        self.on_out_of_memory: Callable[[int, int, int], None] | None = None
        self.on_driver: Callable[[int, Asked], None] | None = None
        """Called with the action's index and what was asked of the driver for it."""
        self.live: dict[int, int] = {}
        self.awaiting: list[tuple[int, int, int, int, PlainPool]] = []
        self._awaiting_bytes = 0
        self._num_awaited = 0
        limits = (settings.capacity_bytes, settings.allowed_bytes)
        self._limit = min(UNLIMITED if limit is None else limit for limit in limits)
        self._scripts = scripts
        self._pools: list[PlainPool] = []
        self._bound: dict[Script, tuple[list[PlainPool], list[dict[int, list[int]]]]] = {}
        """By script: the pool and its bins of each register."""
        self._starts: dict[int, int] = {}
        """Bytes of each free block, by the address where it starts; ``_ends``: by that where it ends."""
        self._ends: dict[int, int] = {}
        self._wider: dict[int, int] = {}
        """Bytes of the blocks, by address, that are not of the size that was asked for."""
        self._segments: dict[int, int] = {}
        self._next_address = 0

    # --- what a replay asks --------------------------------------------------------------------

    def play(  # noqa: PLR0912, PLR0915 (the hot loop: calls would double its time)
        self, code: Code, call: int, bits: int, ready: Mapping[int, int] | None
    ) -> Most:
        """Do what a chunk does. ``ready``: position of a free -> when its block may be used again.

        ``CachingAllocator.malloc`` and ``free``. It keeps no count; where it needs to know how far it is, which is
        rare, it asks the iterator what is left.
        """
        script, live = code.script, self.live
        bound = self._bound.get(script)
        if bound is None:
            bound = self._bound[script] = self._bind(script)
        pools, bins_of = bound
        wanted, positions, base = script.sizes, code.positions, call << CALL
        held = [0] * len(wanted)
        if code.inputs:
            for register, slot in zip(script.inputs, code.inputs, strict=True):
                held[register] = live.pop(slot + bits if slot & OWN else slot)
        starts, ends, wider, awaiting = self._starts, self._ends, self._wider, self.awaiting
        allocated = peak = self.allocated_bytes
        peak_at = -1
        last = len(positions) - 1
        iterator = iter(script.actions)
        for action in iterator:
            if action >= 0:  # allocate
                size = wanted[action]
                if awaiting:
                    now = base | positions[last - length_hint(iterator)]
                    while awaiting and awaiting[0][0] <= now:
                        self._complete()
                found = bins_of[action].get(size)
                if found:
                    address = found.pop(0)
                    del starts[address], ends[address + size]
                else:
                    pool, bins = pools[action], bins_of[action]
                    sizes = pool.sizes
                    at = bisect_right(sizes, size)
                    while at < len(sizes) and not bins[sizes[at]]:
                        del bins[sizes.pop(at)]
                    width = sizes[at] if at < len(sizes) else self._grow(pool, size, last - length_hint(iterator))
                    found = bins[width]
                    address = found.pop(0)
                    del starts[address]
                    rest = width - size
                    if rest > pool.keeps:
                        after = address + size
                        starts[after] = ends[after + rest] = rest
                        found = bins.get(rest)
                        if found is None:
                            bins[rest] = [after]
                            insort(sizes, rest)
                        elif found:
                            insort(found, after)
                        else:
                            found.append(after)
                    else:
                        del ends[address + width]
                        if rest:
                            wider[address] = size = width
                held[action] = address
                allocated += size
                if allocated > peak:
                    peak = allocated
                    peak_at = last - length_hint(iterator)
            elif action > USE:  # free
                register = ~action
                address = held[register]
                size = wanted[register]
                if address < 0:
                    address = ~address
                    when = None if ready is None else ready.get(positions[last - length_hint(iterator)])
                    if when is not None:
                        size = wider.pop(address, size)
                        allocated -= size
                        self._free_later(address, size, pools[register], when)
                        continue
                if wider and address in wider:
                    size = wider.pop(address)
                allocated -= size
                bins = bins_of[register]
                end = address + size
                if end in starts:
                    width = starts.pop(end)
                    bins[width].remove(end)
                    end += width
                    size += width
                if address in ends:
                    width = ends.pop(address)
                    address -= width
                    bins[width].remove(address)
                    size += width
                starts[address] = ends[end] = size
                found = bins.get(size)
                if found is None:
                    bins[size] = [address]
                    insort(pools[register].sizes, size)
                elif found:
                    insort(found, address)
                else:
                    found.append(address)
            else:
                register = USE - action
                if held[register] >= 0:
                    held[register] = ~held[register]
        self.allocated_bytes = allocated
        if code.outputs:
            for register, slot in zip(script.outputs, code.outputs, strict=True):
                live[slot + bits if slot & OWN else slot] = held[register]
        return Most(peak, peak_at)

    def shift(self, bits: int, num_calls: int) -> None:
        """Go on as if so many microbatches and calls had been replayed."""
        go_on(self.live, self.awaiting, bits, num_calls)

    def alone(self, slot: int, size: int) -> bool:
        """Whether the block of a live slot, asked for with ``size``, is a whole segment."""
        address = self.live[slot]
        if address < 0:
            address = ~address
        return self._segments.get(address) == self._wider.get(address, size)

    def look(self, call: int) -> tuple[object, dict[int, int]]:
        """Return all that decides how later requests are served, from the view of a call: what is free, and where each
        slot is."""
        base = call << CALL
        awaiting = sorted([(at - base, address) for at, _, address, *_ in self.awaiting])
        return (self.reserved_bytes, self._limit, self._starts.copy(), awaiting), self.live.copy()

    # --- away from the hot path ----------------------------------------------------------------

    def _bind(self, script: Script) -> tuple[list[PlainPool], list[dict[int, list[int]]]]:
        self._pools += [PlainPool(small) for _, small in list(self._scripts.pools)[len(self._pools) :]]
        pools = [self._pools[number] for number in script.pools]
        return pools, [pool.bins for pool in pools]

    def _grow(self, pool: PlainPool, size: int, at: int) -> int:
        """Have a segment for a request that no free block serves, return its bytes: ``CachingAllocator``'s ladder."""
        num_bytes = segment_size(size)
        limit, short = self._limit, 0
        asked = Asked()
        if self.reserved_bytes + num_bytes > limit:
            asked.given, asked.given_bytes = self._empty_cache()
            asked.retried = True
            self.num_alloc_retries += 1
            short = max(0, self.reserved_bytes + num_bytes - limit)
            if short:
                self._limit = UNLIMITED
        address = self._next_address
        self._next_address += (-(-num_bytes // ROUND_LARGE_BYTES) + 1) * ROUND_LARGE_BYTES
        self._segments[address] = self._starts[address] = self._ends[address + num_bytes] = num_bytes
        pool.put(address, num_bytes)
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        if short and self.on_out_of_memory is not None:
            self.on_out_of_memory(at, size, short)
        if self.on_driver is not None:
            asked.taken, asked.taken_bytes = 1, num_bytes
            self.on_driver(at, asked)
        return num_bytes

    def _free_later(self, address: int, size: int, pool: PlainPool, when: int) -> None:
        """Free a block that another stream still uses until ``when``; it no longer counts as allocated."""
        self._awaiting_bytes += size
        self.peak_awaiting_bytes = max(self.peak_awaiting_bytes, self._awaiting_bytes)
        self._num_awaited += 1
        heappush(self.awaiting, (when, self._num_awaited, address, size, pool))

    def _complete(self) -> None:
        """The block that was awaited first is free: it joins its free neighbours."""
        _, _, address, size, pool = heappop(self.awaiting)
        self._awaiting_bytes -= size
        starts, ends = self._starts, self._ends
        end = address + size
        if end in starts:
            width = starts.pop(end)
            pool.bins[width].remove(end)
            end += width
        if address in ends:
            width = ends.pop(address)
            address -= width
            pool.bins[width].remove(address)
        starts[address] = ends[end] = end - address
        pool.put(address, end - address)

    def _empty_cache(self) -> tuple[int, int]:
        """``emptyCache``: return to the driver every segment that is one free block; how many, and their bytes."""
        given, before = 0, self.reserved_bytes
        while self.awaiting:
            self._complete()
        for pool in self._pools:
            for size, addresses in pool.bins.items():
                for address in [address for address in addresses if self._segments.get(address) == size]:
                    addresses.remove(address)
                    del self._starts[address], self._ends[address + size], self._segments[address]
                    self.reserved_bytes -= size
                    given += 1
        return given, before - self.reserved_bytes
