"""Laws of the allocator and of a replay: what must hold for every order of requests.

``Reference`` is a second allocator, written straight from the published rules with lists and linear searches, and no
thought for speed; the two must agree on every address.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.ir.footprint import CATEGORIES
from sim.ir.program import Alloc, Call, Chunk, Free, Mark, Program, Storage
from sim.memory.allocator import (
    ALLOCATED,
    AWAITING,
    FREE,
    UNMAPPED,
    AllocatorSettings,
    Block,
    CachingAllocator,
    round_size,
)
from sim.memory.replay import _Replay, replay

MIB = 2**20

Op = tuple[str, int, str]
"""("malloc", bytes, stream), ("free", which, ""), ("use", which, stream), ("events", 0, ""), ("empty", 0, "")."""

sizes = st.one_of(
    st.integers(1, 4096),
    st.integers(1, 3 * MIB),
    st.integers(MIB, 64 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 2 * MIB, 10 * MIB - 512, 10 * MIB, 20 * MIB, 12_000_000, 40_000_000]),
)
streams = st.sampled_from(["compute", "compute", "gather"])
operations: st.SearchStrategy[Op] = st.one_of(
    st.tuples(st.just("malloc"), sizes, streams),
    st.tuples(st.just("malloc"), sizes, streams),
    st.tuples(st.just("free"), st.integers(0, 30), st.just("")),
    st.tuples(st.just("use"), st.integers(0, 30), streams),
    st.tuples(st.sampled_from(["events", "events", "events", "empty"]), st.just(0), st.just("")),
)
traces = st.lists(operations, max_size=80)
configurations = st.builds(
    AllocatorSettings,
    expandable_segments=st.booleans(),
    max_split_size_bytes=st.none(),
    roundup_power2_divisions=st.sampled_from([0, 0, 4, 8]),
    capacity_bytes=st.sampled_from([None, 100 * MIB, 400 * MIB]),
) | st.builds(
    AllocatorSettings,
    max_split_size_bytes=st.sampled_from([20 * MIB, 32 * MIB]),
    capacity_bytes=st.sampled_from([None, 100 * MIB, 400 * MIB]),
)


# --- the reference -----------------------------------------------------------------------------------


@dataclass
class Piece:
    address: int
    size: int
    state: int = FREE
    used_elsewhere: bool = False


@dataclass
class Stretch:
    """A segment, or with ``handle`` the address range of an expandable one."""

    stream: str
    small: bool
    handle: int
    pieces: list[Piece]


class OutOfMemoryError(Exception):
    pass


class Reference:
    """The rules of the caching allocator, one after the other."""

    def __init__(self, settings: AllocatorSettings) -> None:
        self.settings = settings
        self.capacity = settings.capacity_bytes or 2**62
        self.max_split = settings.max_split_size_bytes or 2**62
        self.stretches: list[Stretch] = []
        self.awaiting: list[Piece] = []
        self.done: list[Piece] = []
        self.next_address = CachingAllocator(settings)._next_address

    @property
    def reserved(self) -> int:
        return sum(p.size for s in self.stretches for p in s.pieces if p.state != UNMAPPED)

    @property
    def allocated(self) -> int:
        return sum(p.size for s in self.stretches for p in s.pieces if p.state == ALLOCATED)

    def merge(self) -> None:
        for stretch in self.stretches:
            merged = stretch.pieces[:1]
            for piece in stretch.pieces[1:]:
                if piece.state == merged[-1].state and piece.state in {FREE, UNMAPPED}:
                    merged[-1].size += piece.size
                else:
                    merged.append(piece)
            stretch.pieces = merged

    def malloc(self, request: int, stream: str) -> int:
        self.complete(self.done)
        size = round_size(request, self.settings.roundup_power2_divisions)
        small = size <= MIB
        found = self.fit(size, stream, small) or self.new(size, stream, small)
        if found is None and self.release_oversize(size, stream, small):
            found = self.new(size, stream, small)
        if found is None:
            self.empty()
            found = self.new(size, stream, small)
        if found is None:
            raise OutOfMemoryError
        stretch, piece = found
        rest = piece.size - size
        fine = small or self.settings.expandable_segments
        if rest >= 512 if fine else rest > MIB and size < self.max_split:
            stretch.pieces.insert(stretch.pieces.index(piece) + 1, Piece(piece.address + size, rest))
            piece.size = size
        piece.state = ALLOCATED
        return piece.address

    def fit(self, size: int, stream: str, small: bool) -> tuple[Stretch, Piece] | None:
        free = sorted(
            (
                (piece.size, piece.address, stretch, piece)
                for stretch in self.stretches
                for piece in stretch.pieces
                if stretch.stream == stream and stretch.small == small and piece.state == FREE and piece.size >= size
            ),
            key=lambda entry: entry[:2],
        )
        if not free:
            return None
        best = free[0]
        for other in free[1:]:
            if not self.settings.expandable_segments or reach(*other[2:]) >= reach(*best[2:]):
                break
            best = other
        if size < self.max_split <= best[0] or (size >= self.max_split and best[0] >= size + 20 * MIB):
            return None
        return best[2], best[3]

    def new(self, size: int, stream: str, small: bool) -> tuple[Stretch, Piece] | None:
        if self.settings.expandable_segments:
            return self.expand(size, stream, small)
        wanted = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + wanted > self.capacity:
            return None
        stretch = Stretch(stream, small, 0, [Piece(self.next_address, wanted)])
        self.next_address += wanted
        self.stretches.append(stretch)
        return stretch, stretch.pieces[0]

    def lowest_run(self, size: int, stream: str, small: bool) -> tuple[Stretch, int] | None:
        mine = [s for s in self.stretches if s.stream == stream and s.small == small]
        for stretch in sorted(mine, key=lambda s: s.pieces[0].address):
            for at, piece in enumerate(stretch.pieces):
                if piece.state != UNMAPPED:
                    continue
                first = at - 1 if at and stretch.pieces[at - 1].state == FREE else at
                run = itertools.takewhile(lambda p: p.state in {FREE, UNMAPPED}, stretch.pieces[first:])
                if sum(p.size for p in run) >= size:
                    return stretch, stretch.pieces[first].address
        return None

    def expand(self, size: int, stream: str, small: bool) -> tuple[Stretch, Piece] | None:
        start = self.lowest_run(size, stream, small)
        if start is None:
            handle = 2 * MIB if small else 20 * MIB
            limit = self.settings.capacity_bytes
            space = max(limit + limit // 8 if limit is not None else 2**42, size)
            space = -(-space // handle) * handle
            stretch = Stretch(stream, small, handle, [Piece(self.next_address, space, UNMAPPED)])
            self.next_address += space
            self.stretches.append(stretch)
            start = (stretch, stretch.pieces[0].address)
        stretch, address = start
        while True:
            at = next(i for i, p in enumerate(stretch.pieces) if p.address == address)
            piece = stretch.pieces[at]
            if piece.state == FREE and piece.size >= size:
                return stretch, piece
            if piece.state == FREE:
                have, at = piece.size, at + 1
                piece = stretch.pieces[at]
            else:
                have = 0
            handles = -(-min(size - have, piece.size) // stretch.handle) * stretch.handle
            if self.reserved + handles > self.capacity:
                return None
            if handles < piece.size:
                stretch.pieces.insert(at + 1, Piece(piece.address + handles, piece.size - handles, UNMAPPED))
                piece.size = handles
            piece.state = FREE
            self.merge()

    def release_oversize(self, size: int, stream: str, small: bool) -> bool:
        if self.max_split == 2**62:
            return False
        wanted = max(size, self.max_split)
        whole = sorted(
            (s for s in self.stretches if (s.stream, s.small) == (stream, small) and s.pieces[0].state == FREE),
            key=lambda s: (s.pieces[0].size, s.pieces[0].address),
        )
        whole = [s for s in whole if len(s.pieces) == 1 and s.pieces[0].size >= self.max_split]
        enough = [s for s in whole if s.pieces[0].size >= wanted]
        if enough:
            self.stretches.remove(enough[0])
            return True
        released = 0
        while whole and released < wanted:
            released += whole[-1].pieces[0].size
            self.stretches.remove(whole.pop())
        return released >= wanted

    def free(self, address: int) -> None:
        piece = next(p for s in self.stretches for p in s.pieces if p.address == address)
        if piece.used_elsewhere:
            piece.state = AWAITING
            self.awaiting.append(piece)
        else:
            piece.state = FREE
            self.merge()

    def use(self, address: int, stream: str) -> None:
        for stretch in self.stretches:
            for piece in stretch.pieces:
                if piece.address == address and stretch.stream != stream:
                    piece.used_elsewhere = True

    def events(self) -> None:
        """The other streams have caught up with all that is freed by now; the next malloc finds out."""
        self.done += self.awaiting
        self.awaiting = []

    def complete(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            piece.state, piece.used_elsewhere = FREE, False
        pieces.clear()
        self.merge()

    def empty(self) -> None:
        self.complete(self.done)
        self.complete(self.awaiting)
        self.stretches = [s for s in self.stretches if s.handle or s.pieces[0].state != FREE or len(s.pieces) > 1]
        for stretch in self.stretches:
            if not stretch.handle:
                continue
            base, kept = stretch.pieces[0].address, []
            for piece in stretch.pieces:
                begin = base + -(-(piece.address - base) // stretch.handle) * stretch.handle
                end = base + (piece.address + piece.size - base) // stretch.handle * stretch.handle
                if piece.state != FREE or begin >= end:
                    kept.append(piece)
                    continue
                parts = [(piece.address, begin, FREE), (begin, end, UNMAPPED), (end, piece.address + piece.size, FREE)]
                kept += [Piece(low, high - low, state) for low, high, state in parts if high > low]
            stretch.pieces = kept
        self.merge()
        self.stretches = [s for s in self.stretches if len(s.pieces) > 1 or s.pieces[0].state != UNMAPPED]


def reach(stretch: Stretch, piece: Piece) -> int:
    at = stretch.pieces.index(piece) + 1
    grows = at < len(stretch.pieces) and stretch.pieces[at].state == UNMAPPED
    return piece.size + (stretch.pieces[at].size if grows else 0)


# --- laws of the allocator ---------------------------------------------------------------------------


class Driver:
    """Runs a trace on the allocator; frees and uses pick among the live blocks."""

    def __init__(self, settings: AllocatorSettings) -> None:
        self.allocator = CachingAllocator(settings)
        self.settings = settings
        self.live: list[Block] = []
        self.now = 0

    def step(self, op: Op) -> None:
        kind, number, stream = op
        allocator = self.allocator
        if kind == "malloc":
            allocator.process_events(self.now)
            size = round_size(number, self.settings.roundup_power2_divisions)
            self.live.append(allocator.malloc(allocator.pool(stream, size), size))
        elif kind == "free" and self.live:
            block = self.live.pop(number % len(self.live))
            if block.used_elsewhere:
                allocator.free_later(block, self.now + 1)
            else:
                allocator.free(block)
        elif kind == "use" and self.live:
            allocator.use_on(self.live[number % len(self.live)], stream)
        elif kind == "events":
            self.now += 1
        elif kind == "empty":
            allocator.empty_cache()


@given(traces, configurations)
def test_agrees_with_the_reference_on_every_address(trace: list[Op], settings: AllocatorSettings) -> None:
    driver, reference = Driver(settings), Reference(settings)
    addresses: list[int] = []
    for op in trace:
        kind, number, stream = op
        if kind == "malloc":
            try:
                addresses.append(reference.malloc(number, stream))
            except OutOfMemoryError:
                driver.step(op)
                assert driver.allocator.out_of_memory is not None
                return
        elif kind == "free" and addresses:
            reference.free(addresses.pop(number % len(addresses)))
        elif kind == "use" and addresses:
            reference.use(addresses[number % len(addresses)], stream)
        elif kind == "events":
            reference.events()
        elif kind == "empty":
            reference.empty()
        driver.step(op)
        assert driver.allocator.out_of_memory is None
        assert [block.address for block in driver.live] == addresses
        assert driver.allocator.allocated_bytes == reference.allocated
        assert driver.allocator.reserved_bytes == reference.reserved


@given(traces, configurations)
def test_blocks_tile_their_segments_and_add_up(trace: list[Op], settings: AllocatorSettings) -> None:
    driver = Driver(settings)
    allocator = driver.allocator
    for op in trace:
        driver.step(op)
        mapped = allocated = 0
        live = set()
        for start, head in allocator.segments.items():
            address, before = start, None
            for block in allocator.blocks(head):
                assert block.address == address
                assert block.size > 0
                assert not (before in {FREE, UNMAPPED} and block.state == before)  # such neighbours are one block
                address += block.size
                before = block.state
                mapped += block.size if block.state != UNMAPPED else 0
                if block.state == ALLOCATED:
                    allocated += block.size
                    live.add(block.address)
        assert live == {block.address for block in driver.live}
        assert allocated == allocator.allocated_bytes <= allocator.peak_allocated_bytes
        assert mapped == allocator.reserved_bytes <= allocator.peak_reserved_bytes
        assert allocated <= mapped


@given(traces, configurations)
def test_freeing_everything_leaves_nothing_that_cannot_be_given_back(
    trace: list[Op], settings: AllocatorSettings
) -> None:
    driver = Driver(settings)
    for op in trace:
        driver.step(op)
    for block in driver.live:
        driver.allocator.free(block)
    assert driver.allocator.allocated_bytes == 0
    driver.allocator.empty_cache()
    assert driver.allocator.reserved_bytes == 0
    assert not driver.allocator.segments


@given(st.lists(sizes, min_size=1, max_size=20), st.booleans())
def test_the_same_requests_again_reserve_nothing_more(requests: list[int], expandable: bool) -> None:
    """Allocating in the same order into an otherwise empty cache finds what the round before left."""
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=expandable))
    reserved = []
    for _ in range(3):
        blocks = [allocator.malloc(allocator.pool("compute", n), n) for n in map(round_size, requests)]
        for block in blocks:
            allocator.free(block)
        reserved.append(allocator.reserved_bytes)
    assert reserved[1] == reserved[2]


@given(sizes, st.integers(1, 50))
def test_one_request_over_and_over_uses_one_segment(request: int, times: int) -> None:
    allocator = CachingAllocator(AllocatorSettings())
    size = round_size(request)
    for _ in range(times):
        allocator.free(allocator.malloc(allocator.pool("compute", size), size))
    assert len(allocator.segments) == 1


# --- laws of a replay --------------------------------------------------------------------------------

storages = st.builds(
    Storage,
    name=st.sampled_from(["a", "b", "c"]),
    num_bytes=sizes,
    category=st.sampled_from(CATEGORIES[:-1]),
    per_microbatch=st.just(True),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Some state, then microbatches whose backward frees what their forward keeps, in any order, then an optimizer."""
    state = draw(st.lists(storages, max_size=4))
    kept = draw(st.lists(storages, max_size=6))
    temporary = draw(st.lists(storages, max_size=6))
    kept_first = draw(st.permutations(range(len(kept))))
    setup = tuple(Alloc(Storage(s.name, s.num_bytes, s.category)) for s in state)
    forward: Chunk = (Mark("forward", "layer"), *map(Alloc, kept), *map(Alloc, temporary), *map(Free, temporary))
    scratch = [Storage(s.name, s.num_bytes, s.category, True) for s in temporary]
    backward: Chunk = (
        Mark("backward", "layer"),
        *map(Alloc, scratch),
        *(Free(kept[i]) for i in kept_first),
        *map(Free, scratch),
    )
    num_microbatches = draw(st.integers(1, 12))
    ahead = draw(st.integers(1, 3))
    calls = []
    for microbatch in range(num_microbatches + ahead):
        if microbatch < num_microbatches:
            calls.append(Call("forward", microbatch))
        if microbatch >= ahead:
            calls.append(Call("backward", microbatch - ahead))
    chunks: dict[str, Chunk] = {"setup": setup, "forward": forward, "backward": backward}
    return Program((0,), 0, chunks, (Call("setup"),), tuple(calls), tuple(calls))


@given(programs(), configurations)
def test_the_account_adds_up_and_observing_changes_nothing(program: Program, settings: AllocatorSettings) -> None:
    footprint = replay(program, settings)
    assert sum(footprint.at_peak.values()) == footprint.peak_allocated_bytes
    assert min(footprint.at_peak.values()) >= 0
    assert footprint.peak_allocated_bytes <= footprint.peak_reserved_bytes
    assert sum(h.num_bytes for h in footprint.holders) == footprint.peak_allocated_bytes - footprint.at_peak["rounding"]
    observed = replay(program, settings, record=True)
    assert observed.peak_position == footprint.peak_position
    assert observed.at_peak == footprint.at_peak
    assert observed.peak_reserved_bytes == footprint.peak_reserved_bytes
    assert observed.out_of_memory == footprint.out_of_memory
    for sample in observed.samples:
        assert sum(sample.by_category) == sample.allocated_bytes <= sample.reserved_bytes
    if observed.samples:
        assert max(s.allocated_bytes for s in observed.samples) <= observed.peak_allocated_bytes


@given(programs(), configurations)
def test_skipping_equal_microbatches_changes_no_peak(program: Program, settings: AllocatorSettings) -> None:
    """With a name of its own for each call no two are equal, so that nothing is skipped."""
    calls = tuple(Call(f"{call.chunk}.{index}", call.microbatch) for index, call in enumerate(program.step))
    chunks = {**program.chunks, **{f"{c.chunk}.{i}": program.chunks[c.chunk] for i, c in enumerate(program.step)}}
    unfolded = Program((0,), 0, chunks, program.setup, calls, calls)
    short, long = replay(program, settings), replay(unfolded, settings)
    assert short.peak_allocated_bytes == long.peak_allocated_bytes
    assert short.peak_reserved_bytes == long.peak_reserved_bytes
    assert short.peak_position == long.peak_position
    assert short.at_peak == long.at_peak
    assert short.num_alloc_retries == long.num_alloc_retries or settings.capacity_bytes is not None


segments = st.one_of(st.integers(5, 30).map(lambda n: n * 2 * MIB), st.integers(5, 8).map(lambda n: n * 2 * MIB))


@st.composite
def pipelines(draw: st.DrawFn) -> Program:
    """Microbatches, some in flight; what they keep fills segments, what comes and goes is of any size."""

    def some(name: str, bytes_: st.SearchStrategy[int], least: int = 0) -> list[Storage]:
        found = draw(st.lists(bytes_, min_size=least, max_size=5))
        return [Storage(f"{name}{i}", size, "activations", True) for i, size in enumerate(found)]

    kept, ours, theirs = some("kept", segments, 1), some("ours", sizes), some("theirs", sizes)
    received, gradient = some("received", segments), some("gradient", segments)
    forward: Chunk = (
        *map(Alloc, received),
        *map(Alloc, ours),
        *map(Alloc, kept),
        *map(Free, ours),
        *map(Free, received),
    )
    freed = draw(st.permutations(kept))
    backward: Chunk = (*map(Alloc, gradient), *map(Alloc, theirs), *map(Free, freed), *map(Free, (*theirs, *gradient)))
    in_flight = draw(st.integers(1, 6))
    calls = [Call("forward", m) for m in range(in_flight)]
    chunks: dict[str, Chunk] = {"forward": forward, "backward": backward}
    for m in range(in_flight, 50):
        calls += [Call("forward", m), Call("backward", m - in_flight)]
    calls += [Call("backward", m) for m in range(50 - in_flight, 50)]
    return Program((0,), 0, chunks, (), tuple(calls), tuple(calls))


@given(pipelines())
def test_quiet_microbatches_stay_quiet_where_what_they_keep_fills_segments(program: Program) -> None:
    """Nothing is skipped in the second replay, as each call has a name of its own (``QUIET``)."""
    calls = tuple(Call(f"{call.chunk}.{i}", call.microbatch) for i, call in enumerate(program.step))
    chunks = {call.chunk: program.chunks[call.chunk.partition(".")[0]] for call in calls}
    short = replay(program, AllocatorSettings())
    long = replay(Program((0,), 0, chunks, (), calls, calls), AllocatorSettings())
    assert (short.peak_allocated_bytes, short.peak_reserved_bytes) == (
        long.peak_allocated_bytes,
        long.peak_reserved_bytes,
    )
    assert (short.peak_position, short.at_peak) == (long.peak_position, long.at_peak)


@given(programs(), configurations, st.floats(0, 1))
def test_what_is_asked_of_the_driver_is_found_however_steps_are_replayed(
    program: Program, settings: AllocatorSettings, share: float
) -> None:
    """With a capacity between what is allocated and what would be cached: the same calls at the same places where the
    replay is watched, and where no microbatch is skipped as each call has a name of its own."""
    roomy = replay(program, replace(settings, capacity_bytes=None, allowed_bytes=None))
    cached = roomy.peak_reserved_bytes - roomy.peak_allocated_bytes
    tight = replace(settings, capacity_bytes=int(roomy.peak_allocated_bytes + share * cached))
    calls = tuple(Call(f"{call.chunk}.{index}", call.microbatch) for index, call in enumerate(program.step))
    chunks = {**program.chunks, **{f"{c.chunk}.{i}": program.chunks[c.chunk] for i, c in enumerate(program.step)}}
    found = replay(program, tight).driver
    assert replay(program, tight, record=True).driver == found
    assert replay(Program((0,), 0, chunks, program.setup, calls, calls), tight).driver == found


@given(programs(), configurations)
def test_both_allocators_agree(program: Program, settings: AllocatorSettings) -> None:
    """``PlainAllocator`` and ``CachingAllocator``, in every number, with what rounding and limits there are."""
    plain = AllocatorSettings(
        roundup_power2_divisions=settings.roundup_power2_divisions, capacity_bytes=settings.capacity_bytes
    )
    runs = [_Replay(program, plain, (), general=general) for general in (False, True)]
    for run in runs:
        run.run()
    assert runs[0].footprint() == runs[1].footprint()


@pytest.mark.parametrize("expandable", [False, True])
def test_a_bigger_capacity_never_runs_out_where_a_smaller_does_not(expandable: bool) -> None:
    """The shortfall that is reported is enough, once nothing is cached: one block after another, nothing freed."""
    setup = tuple(Alloc(Storage(f"s{i}", 30 * MIB, "parameters")) for i in range(8))
    program = Program((0,), 0, {"setup": setup}, (Call("setup"),), (), ())
    failed = replay(program, AllocatorSettings(expandable, capacity_bytes=100 * MIB)).out_of_memory
    assert failed is not None
    again = replay(program, AllocatorSettings(expandable, capacity_bytes=100 * MIB + failed.short_bytes)).out_of_memory
    assert again is None or again.position > failed.position
