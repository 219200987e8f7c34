"""Replay of a program's allocations and frees through the allocator: what one rank holds, and when it holds most.

Setup is replayed once, then the first step, then later steps until the allocator ends one in a state it has been in
before: from there on everything repeats. Within a step the same holds for microbatches: once a run of identical calls
comes back to the same state, the rest of the run is skipped; likewise after ``MAX_QUIET`` of them that took no memory,
as storages of several microbatches can change places for hundreds. Peaks are therefore those of the whole training.

A program is first compiled: an allocation becomes (slot, block bytes, pool), a free becomes its slot, everything that
does not concern memory is gone. The loop over these is what the speed of a replay depends on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import length_hint
from typing import Any

from sim.ir.footprint import CATEGORIES, BlockEvent, Footprint, OutOfMemory, Sample, Segment
from sim.ir.program import Alloc, Call, Chunk, Free, Mark, Program, Storage, UseOn, World
from sim.ir.timeline import Position, Release, Timeline
from sim.memory.allocator import (
    ADDRESS_MASK,
    ALLOCATED,
    AWAITING,
    SHIFT,
    UNMAPPED,
    AllocatorSettings,
    Block,
    CachingAllocator,
    round_size,
)
from sim.memory.attribution import Owner, account, holders
from sim.memory.runtime import NOTHING, Outside

MAX_STEPS = 3
"""Steps replayed at most: a state that has not come back by then is taken not to."""
MAX_CHECKS = 6
"""Places within a step at which its state is compared with the step before: from equal ones on, equal things follow."""
MAX_QUIET = 64
"""Equal groups of calls in a row that neither take memory nor end in a state that was there before: the rest of them is
taken not to take any either. Storages of several microbatches can change places for hundreds of groups."""
MAX_SAMPLES = 2000
"""Points of the memory curve that are kept: the lowest and the highest of each of half as many stretches."""
PINNED = "pinned"
"""The stream of host storages that ``CachingHostAllocator`` serves; any other is pageable memory."""

# A slot is the number of a storage. Those of which each microbatch has its own carry a bit, the microbatch above it.
_OWN = 1 << 24
_MICROBATCH = 25
_SLOT_MASK = _OWN - 1
# A position as one number: index of the call in the high bits, index into the chunk in the low ones.
_CALL = 24

# Actions: an int is the slot to free, a tuple is an allocation, a list is one of these.
_USE, _HOST_ALLOC, _HOST_FREE = range(3)
_Action = int | tuple[int, int, int] | list[Any]


@dataclass(slots=True)
class _Code:
    """A chunk as the allocator sees it.

    ``positions``  index into the chunk, for each action
    ``marks``      (index of the action from which on, phase, module)
    ``gains``      what it leaves allocated: slot -> (storage, phase, module), None where an earlier chunk's mark rules
    ``losses``     slots that it frees and does not allocate again
    ``growth``     how many more storages are live afterwards
    """

    actions: list[_Action] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    marks: list[tuple[int, str, str]] = field(default_factory=list)
    gains: dict[int, tuple[Storage, str | None, str]] = field(default_factory=dict)
    losses: list[int] = field(default_factory=list)
    growth: int = 0


class _Compiler:
    """Turns chunks into code. Slots and pools are numbered over all chunks that share storages."""

    def __init__(self, divisions: int) -> None:
        self.storages: list[Storage] = []
        self.pools: list[tuple[str, int]] = []
        self._divisions = divisions
        self._slots: dict[int, int] = {}
        self._allocations: dict[int, tuple[int, int, int]] = {}
        self._pool_of: dict[tuple[str, bool], int] = {}

    def _slot(self, storage: Storage) -> int:
        slot = len(self.storages) | (_OWN if storage.per_microbatch else 0)
        self._slots[id(storage)] = slot
        self.storages.append(storage)
        return slot

    def _allocation(self, storage: Storage, slot: int) -> tuple[int, int, int]:
        size = round_size(storage.num_bytes, self._divisions)
        key = (storage.stream, size <= 2**20)
        pool = self._pool_of.get(key)
        if pool is None:
            pool = self._pool_of[key] = len(self.pools)
            self.pools.append((storage.stream, size))
        action = self._allocations[slot] = (slot, size, pool)
        return action

    def compile(self, chunk: Chunk) -> _Code:  # noqa: PLR0912 (one loop over all there is, for speed)
        slots, allocations = self._slots, self._allocations
        code = _Code()
        act, positions, gains = code.actions.append, code.positions, code.gains
        lost: dict[int, None] = {}
        phase: str | None = None
        module = ""
        for index, instruction in enumerate(chunk):
            kind = instruction.__class__
            if kind is Alloc:
                storage = instruction.storage  # type: ignore[union-attr]
                if not storage.num_bytes:
                    continue  # torch allocates no block for an empty tensor
                slot = slots.get(id(storage))
                if slot is None:
                    slot = self._slot(storage)
                positions.append(index)
                if storage.place == "gpu":
                    act(allocations.get(slot) or self._allocation(storage, slot))
                    gains[slot] = (storage, phase, module)
                    code.growth += 1
                else:
                    act([_HOST_ALLOC, slot, storage])
            elif kind is Free:
                storage = instruction.storage  # type: ignore[union-attr]
                if not storage.num_bytes:
                    continue
                slot = slots.get(id(storage))
                if slot is None:
                    slot = self._slot(storage)
                positions.append(index)
                if storage.place == "gpu":
                    act(slot)
                    if gains.pop(slot, None) is None:
                        lost[slot] = None
                    code.growth -= 1
                else:
                    act([_HOST_FREE, slot, storage])
            elif kind is Mark:
                phase, module = instruction.phase, instruction.module  # type: ignore[union-attr]
                code.marks.append((len(positions), phase, module))
            elif kind is UseOn:
                storage, stream = instruction.storage, instruction.stream  # type: ignore[union-attr]
                if storage.num_bytes and storage.place == "gpu" and stream != storage.stream:
                    slot = slots.get(id(storage))
                    if slot is None:
                        slot = self._slot(storage)
                    positions.append(index)
                    act([_USE, slot, stream])
        code.losses = list(lost)
        return code


class _Host:
    """Host memory: pinned blocks as ``CachingHostAllocator`` keeps them, and what is pageable.

    Pinned requests are rounded up to a power of two, blocks of that size are reused and never given back
    (aten/src/ATen/core/CachingHostAllocator.h: ``allocate``, with pinned_max_round_threshold at its default).
    """

    def __init__(self) -> None:
        self.num_bytes = self.peak_bytes = 0
        self.idle: dict[int, int] = {}

    def alloc(self, storage: Storage) -> None:
        if storage.stream == PINNED:
            size = 1 << (storage.num_bytes - 1).bit_length()
            if self.idle.get(size, 0):
                self.idle[size] -= 1
                return
        else:
            size = storage.num_bytes
        self.num_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def free(self, storage: Storage) -> None:
        if storage.stream == PINNED:
            size = 1 << (storage.num_bytes - 1).bit_length()
            self.idle[size] = self.idle.get(size, 0) + 1
        else:
            self.num_bytes -= storage.num_bytes

    def state(self) -> tuple[object, ...]:
        return self.num_bytes, tuple(sorted(self.idle.items()))


@dataclass(frozen=True, slots=True)
class _Peak:
    """The most that was allocated in one run of a list of calls; ``order`` is the number of calls replayed before."""

    run: str
    allocated_bytes: int
    position: Position
    order: int
    action: int


# Releases of a list of calls: index of the call -> index into the chunk of a free -> when it is reusable.
_Ready = dict[int, dict[int, int]]


class _Replay:
    """One rank's allocator, and what is live in it."""

    def __init__(self, program: Program, settings: AllocatorSettings, releases: Sequence[Release]) -> None:
        self.program = program
        self.allocator = CachingAllocator(settings)
        self.allocator.on_out_of_memory = self._note_out_of_memory
        self.host = _Host()
        self.live: dict[int, Block] = {}
        self.peaks: list[_Peak] = []
        # (code, microbatch bits) of each call replayed, or the microbatches that were skipped
        self.executed: list[tuple[_Code, int] | int] = []
        self.out_of_memory: tuple[str, Position, int, int, int, int] | None = None
        self._compiler = _Compiler(settings.roundup_power2_divisions)
        self._codes: dict[str, _Code] = {}
        self._pools: list[Any] = []
        self._spare: list[Block] = []
        """Blocks that were merged into others, to be used anew."""
        self._repeated: dict[int, tuple[Sequence[Call], _Ready, dict[int, tuple[int, int, int]]]] = {}
        self._releases = releases
        self._where: tuple[str, int, _Code, Iterator[_Action]] | None = None
        # states between the calls of the last run: index of the next call -> state, and which calls these were
        self._checked: dict[int, object] = {}
        self._checked_calls: tuple[Sequence[Call], _Ready] | None = None
        self._may_end_early = True

    # --- the program -----------------------------------------------------------------------------

    def run(self) -> None:
        program = self.program
        ready = _ready(self._releases)
        first_ready = ready if program.first_step == program.step else _moved(ready, program.step, program.first_step)
        self._run("setup", program.setup, {})
        self._run("first", program.first_step, first_ready)
        seen = {self._state(0)}
        for _ in range(MAX_STEPS - 1):
            if self._run("steady", program.step, ready):
                break
            state = self._state(0)
            if state in seen:
                break
            seen.add(state)

    def _code(self, name: str) -> _Code:
        code = self._codes.get(name)
        if code is None:
            code = self._codes[name] = self._compiler.compile(self.program.chunks[name])
            pools = self._compiler.pools
            self._pools += [self.allocator.pool(stream, size) for stream, size in pools[len(self._pools) :]]
        return code

    def _run(self, run: str, calls: Sequence[Call], ready: _Ready) -> bool:
        """Replay calls, skipping what repeats. Return whether it ended early, the rest being as last time."""
        allocator = self.allocator
        self._peak = _Peak(run, allocator.allocated_bytes, (0, 0), len(self.executed), -1)
        allocator.peak_allocated_bytes = allocator.allocated_bytes
        repeats = self._repeats(calls, ready)
        before = self._checked if self._checked_calls == (calls, ready) else {}
        self._checked, self._checked_calls = {}, (calls, ready)
        index, num_calls = 0, len(calls)
        next_check = -(-num_calls // MAX_CHECKS)
        while index < num_calls:
            if index in repeats:
                index = self._run_repeated(run, index, repeats[index], calls, ready)
            else:
                self._call(run, index, calls[index], ready)
                index += 1
            if self._may_end_early and next_check <= index < num_calls:
                next_check = index + -(-num_calls // MAX_CHECKS)
                state = self._checked[index] = self._state(0, index)
                if before.get(index) == state:
                    self.peaks.append(self._peak)
                    return True
        self._shift_awaiting(-num_calls)
        self.peaks.append(self._peak)
        return False

    def _repeats(self, calls: Sequence[Call], ready: _Ready) -> dict[int, tuple[int, int, int]]:
        """Return :func:`_repeats` of these calls, worked out once."""
        found = self._repeated.get(id(calls))
        if found is None or found[1] != ready:
            found = self._repeated[id(calls)] = (calls, ready, _repeats(calls, ready))
        return found[2]

    def _run_repeated(
        self, run: str, index: int, repeat: tuple[int, int, int], calls: Sequence[Call], ready: _Ready
    ) -> int:
        """Replay groups of equal calls until a state comes back, skip whole cycles, replay the rest; return the end."""
        allocator = self.allocator
        period, count, step = repeat
        end = index + period * count
        cheap_seen: set[tuple[int, ...]] = set()
        seen: dict[object, int] = {}
        latest: tuple[int, ...] = ()
        quiet = 0
        while index < end:
            for call in range(index, index + period):
                self._call(run, call, calls[call], ready)
            index += period
            # a state costs something to describe: only where it can have been there before
            cheap = (allocator.allocated_bytes, allocator.reserved_bytes, len(self.live))
            quiet = quiet + 1 if cheap == latest else 0
            latest = cheap
            if quiet >= MAX_QUIET and index < end and self._may_end_early:
                self._skip((end - index) // period * step, end - index)
                return end
            if cheap in cheap_seen and index < end:
                state = self._state(calls[index].microbatch, index)
                if state in seen:
                    cycle = index - seen[state]
                    skipped = (end - index) // cycle * cycle
                    self._skip(skipped // period * step, skipped)
                    index += skipped
                    seen.clear()
                    cheap_seen.clear()
                else:
                    seen[state] = index
            cheap_seen.add(cheap)
        return end

    def _state(self, microbatch: int, call: int = 0) -> tuple[object, ...]:
        """Return everything that later behaviour depends on, microbatches and positions relative to those given."""
        bits, base = microbatch << _MICROBATCH, call << _CALL
        live = frozenset(
            (slot - bits if slot & _OWN else slot, block.address, block.used_elsewhere)
            for slot, block in self.live.items()
        )
        awaiting = tuple(sorted((at - base, block.address) for at, _, block in self.allocator.awaiting))
        return self.allocator.state(), live, awaiting, self.host.state()

    def _skip(self, num_microbatches: int, num_calls: int) -> None:
        """Go on as if the microbatches had been replayed: their storages are where those of the earlier ones were."""
        bits = num_microbatches << _MICROBATCH
        live = {slot + bits if slot & _OWN else slot: block for slot, block in self.live.items()}
        self.live.clear()
        self.live.update(live)
        self._shift_awaiting(num_calls)
        self.executed.append(bits)

    def _shift_awaiting(self, num_calls: int) -> None:
        """Move the positions at which blocks become reusable; the order, and so the heap, stays."""
        awaiting = self.allocator.awaiting
        awaiting[:] = [(at + (num_calls << _CALL), number, block) for at, number, block in awaiting]

    def _call(self, run: str, index: int, call: Call, ready: _Ready) -> None:
        code = self._code(call.chunk)
        bits = call.microbatch << _MICROBATCH
        num_live = len(self.live)
        iterator = iter(code.actions)
        self._where = (run, index, code, iterator)
        try:
            self._replay_actions(iterator, code, index, bits, ready.get(index))
        except KeyError as error:
            storage = self._compiler.storages[error.args[0] & _SLOT_MASK]
            raise AssertionError(f"chunk {call.chunk!r} frees {storage.name!r}, which is not allocated") from None
        assert len(self.live) == num_live + code.growth, f"chunk {call.chunk!r} allocates what is already allocated"
        self.executed.append((code, bits))

    def _replay_actions(  # noqa: PLR0912, PLR0915 (the hot loop: calls would double its time)
        self, iterator: Iterator[_Action], code: _Code, call: int, bits: int, ready: dict[int, int] | None
    ) -> None:
        """Replay the actions of one chunk.

        It keeps no count. Where it needs to know how far it is, which is rare, it asks the iterator what is left.
        ``CachingAllocator.malloc`` and ``free`` stand here once more, word for word but for what a plain allocator
        never does, as calls would take as long as the work.
        """
        allocator = self.allocator
        if not allocator.plain:
            self._replay_by_call(iterator, code, call, bits, ready)
            return
        live, pools, awaiting, at_address = self.live, self._pools, allocator.awaiting, allocator.at_address
        spare = self._spare
        allocated, peak = allocator.allocated_bytes, allocator.peak_allocated_bytes
        positions, base = code.positions, call << _CALL
        last = len(positions) - 1
        peak_at = -1
        for action in iterator:
            if action.__class__ is tuple:
                slot, size, number = action
                if awaiting:
                    now = base | positions[last - length_hint(iterator)]
                    if awaiting[0][0] <= now:
                        allocator.allocated_bytes = allocated
                        allocator.process_events(now)
                        allocated = allocator.allocated_bytes
                pool = pools[number]
                free = pool.free
                at = bisect_left(free, size << SHIFT)
                if at < len(free):
                    block = at_address[free.pop(at) & ADDRESS_MASK]
                else:
                    allocator.allocated_bytes = allocated
                    block = allocator.more(pool, size)
                    allocated = allocator.allocated_bytes
                rest = block.size - size
                if rest > pool.keeps:
                    address = block.address + size
                    if spare:
                        remaining = spare.pop()
                        remaining.address = address
                        remaining.size = rest
                        remaining.pool = pool
                        remaining.state = 0
                    else:
                        remaining = Block(address, rest, pool, None)
                    at_address[address] = remaining
                    remaining.prev = block
                    remaining.next = after = block.next
                    after.prev = remaining
                    block.next = remaining
                    block.size = size
                    remaining.key = key = rest << SHIFT | address
                    insort(free, key)
                    allocated += size
                else:
                    allocated += block.size
                block.state = ALLOCATED
                live[slot + bits if slot & _OWN else slot] = block
                if allocated > peak:
                    peak = allocated
                    peak_at = last - length_hint(iterator)
            elif action.__class__ is int:
                block = live.pop(action + bits if action & _OWN else action)
                if block.used_elsewhere:
                    when = None if ready is None else ready.get(positions[last - length_hint(iterator)])
                    if when is not None:
                        allocator.allocated_bytes = allocated
                        allocator.free_later(block, when)
                        allocated = allocator.allocated_bytes
                        continue
                    block.used_elsewhere = False
                size = block.size
                allocated -= size
                free = block.pool.free
                after = block.next
                if not after.state:
                    del free[bisect_left(free, after.key)]
                    del at_address[after.address]
                    spare.append(after)
                    size += after.size
                    after = after.next
                    block.next = after
                    after.prev = block
                before = block.prev
                if not before.state:
                    del free[bisect_left(free, before.key)]
                    del at_address[block.address]
                    spare.append(block)
                    size += before.size
                    before.next = after
                    after.prev = before
                    block = before
                block.state = 0
                block.size = size
                block.key = key = size << SHIFT | block.address
                insort(free, key)
            else:
                self._other(action, bits)  # type: ignore[arg-type]
        allocator.allocated_bytes, allocator.peak_allocated_bytes = allocated, peak
        if peak_at >= 0:
            self._peak = _Peak(self._peak.run, peak, (call, positions[peak_at]), len(self.executed), peak_at)

    def _replay_by_call(
        self, iterator: Iterator[_Action], code: _Code, call: int, bits: int, ready: dict[int, int] | None
    ) -> None:
        """Replay the actions of one chunk, whatever the allocator's settings."""
        allocator, live, pools = self.allocator, self.live, self._pools
        malloc, free, awaiting = allocator.malloc, allocator.free, allocator.awaiting
        peak = allocator.peak_allocated_bytes
        positions, base = code.positions, call << _CALL
        last = len(positions) - 1
        peak_at = -1
        for action in iterator:
            if action.__class__ is tuple:
                slot, size, pool = action
                if awaiting:
                    now = base | positions[last - length_hint(iterator)]
                    if awaiting[0][0] <= now:
                        allocator.process_events(now)
                if slot & _OWN:
                    slot += bits
                live[slot] = malloc(pools[pool], size)
                if allocator.peak_allocated_bytes > peak:
                    peak = allocator.peak_allocated_bytes
                    peak_at = last - length_hint(iterator)
            elif action.__class__ is int:
                slot = action + bits if action & _OWN else action
                block = live.pop(slot)
                if block.used_elsewhere:
                    at = None if ready is None else ready.get(positions[last - length_hint(iterator)])
                    if at is not None:
                        allocator.free_later(block, at)
                        continue
                    block.used_elsewhere = False
                free(block)
            else:
                self._other(action, bits)  # type: ignore[arg-type]
        if peak_at >= 0:
            self._peak = _Peak(self._peak.run, peak, (call, positions[peak_at]), len(self.executed), peak_at)

    def _other(self, action: list[Any], bits: int) -> None:
        kind, slot, what = action
        if kind == _USE:
            self.allocator.use_on(self.live[slot + bits if slot & _OWN else slot], what)
        elif kind == _HOST_ALLOC:
            self.host.alloc(what)
        else:
            self.host.free(what)

    def _note_out_of_memory(self, size: int, short_bytes: int) -> None:
        assert self._where is not None
        run, index, code, iterator = self._where
        at = len(code.actions) - 1 - length_hint(iterator)
        order = len(self.executed)
        self.out_of_memory = (run, (index, code.positions[at]), order, at, size, short_bytes)

    # --- the account -----------------------------------------------------------------------------

    def peak(self) -> _Peak:
        """Return the highest peak; a steady step's where it is as high as any, so that it is one that comes back."""
        rank = {"setup": 0, "first": 1, "steady": 2}
        return max(self.peaks, key=lambda peak: (peak.allocated_bytes, rank[peak.run]))

    def owners(self, order: int, last_action: int) -> tuple[dict[int, Owner], str, str]:
        """Return what is live after action ``last_action`` of the call ``order``, and the phase and module it is in."""
        live: dict[int, Owner] = {}
        phase, module = "setup", ""
        for entry in self.executed[:order]:
            if isinstance(entry, int):
                live = {slot + entry if slot & _OWN else slot: owner for slot, owner in live.items()}
                continue
            code, bits = entry
            for slot in code.losses:
                live.pop(slot + bits if slot & _OWN else slot, None)
            for slot, (storage, gained_phase, gained_module) in code.gains.items():
                owner = (storage, phase, module) if gained_phase is None else (storage, gained_phase, gained_module)
                live[slot + bits if slot & _OWN else slot] = owner
            if code.marks:
                _, phase, module = code.marks[-1]
        if last_action < 0 or order >= len(self.executed):
            return live, phase, module
        entry = self.executed[order]
        assert not isinstance(entry, int)
        code, bits = entry
        storages = self._compiler.storages
        marks = iter([*code.marks, (len(code.actions) + 1, "", "")])
        change, next_phase, next_module = next(marks)
        for at, action in enumerate(code.actions[: last_action + 1]):
            while at >= change:
                phase, module = next_phase, next_module
                change, next_phase, next_module = next(marks)
            if isinstance(action, tuple):
                slot = action[0]
                live[slot + bits if slot & _OWN else slot] = (storages[slot & _SLOT_MASK], phase, module)
            elif isinstance(action, int):
                live.pop(action + bits if action & _OWN else action)
        return live, phase, module

    def footprint(self) -> Footprint:
        peak = self.peak()
        allocator = self.allocator
        live, phase, module = self.owners(peak.order, peak.action)
        fragmentation = allocator.peak_reserved_bytes - peak.allocated_bytes
        return Footprint(
            ranks=self.program.ranks,
            stage=self.program.stage,
            peak_allocated_bytes=peak.allocated_bytes,
            peak_reserved_bytes=allocator.peak_reserved_bytes,
            peak_device_bytes=allocator.peak_reserved_bytes,
            host_bytes=self.host.peak_bytes,
            at_peak=account(live.values(), peak.allocated_bytes),
            beside={"fragmentation": fragmentation},
            peak_step=peak.run,
            peak_position=peak.position,
            peak_phase=phase,
            peak_module=module,
            holders=holders(live.values()),
            samples=(),
            num_alloc_retries=allocator.num_alloc_retries,
            out_of_memory=self._first_failure(),
            peak_awaiting_bytes=allocator.peak_awaiting_bytes,
        )

    def _first_failure(self) -> OutOfMemory | None:
        if self.out_of_memory is None:
            return None
        run, position, order, at, size, short_bytes = self.out_of_memory
        live, phase, module = self.owners(order, at)
        storage = next(reversed(live.values()))[0]
        return OutOfMemory(position, run, phase, module, storage.name, size, short_bytes)


@dataclass(slots=True)
class _Point:
    """State after one action, and what the action did to the bytes requested by one category."""

    position: Position
    allocated_bytes: int
    reserved_bytes: int
    category: int
    change: int


class _Observed(_Replay):
    """A replay that also writes down the curve of each step, and every event if ``record``. Slower, same results."""

    def __init__(
        self, program: Program, settings: AllocatorSettings, releases: Sequence[Release], record: bool
    ) -> None:
        super().__init__(program, settings, releases)
        self.events: list[BlockEvent] = []
        self._record = record
        self._trace: list[tuple[str, int, int, str, str]] = []
        self.allocator.trace = self._trace
        self._may_end_early = False  # so that the record ends where a step does
        self._totals = [0] * len(CATEGORIES)
        self._category = {name: index for index, name in enumerate(CATEGORIES)}
        self._phase, self._module = "setup", ""
        self._points: list[_Point] = []
        self.samples: dict[int, tuple[Sample, ...]] = {}

    def _run(self, run: str, calls: Sequence[Call], ready: _Ready) -> bool:
        before = list(self._totals)
        self._points = []
        super()._run(run, calls, ready)
        self.samples[len(self.peaks) - 1] = _samples(self._points, before)
        return False

    def _replay_actions(
        self, iterator: Iterator[_Action], code: _Code, call: int, bits: int, ready: dict[int, int] | None
    ) -> None:
        allocator, live, trace = self.allocator, self.live, self._trace
        storages = self._compiler.storages
        assert self._where is not None
        run = self._where[0]
        marks = iter([*code.marks, (len(code.actions) + 1, "", "")])
        change, next_phase, next_module = next(marks)
        peak = allocator.peak_allocated_bytes
        for at, action in enumerate(iterator):
            while at >= change:
                self._phase, self._module = next_phase, next_module
                change, next_phase, next_module = next(marks)
            if isinstance(action, list):
                self._other(action, bits)
                continue
            position = (call, code.positions[at])
            slot = action[0] if isinstance(action, tuple) else action
            storage = storages[slot & _SLOT_MASK]
            key = slot + bits if slot & _OWN else slot
            category = self._category[storage.category]
            if isinstance(action, tuple):
                allocator.process_events(call << _CALL | code.positions[at])
                block = allocator.malloc(self._pools[action[2]], action[1])
                block.requested, block.name = storage.num_bytes, storage.name
                live[key] = block
                change_bytes = storage.num_bytes
                trace.append(("alloc", block.address, storage.num_bytes, storage.stream, storage.name))
                if allocator.peak_allocated_bytes > peak:
                    peak = allocator.peak_allocated_bytes
                    self._peak = _Peak(run, peak, position, len(self.executed), at)
            else:
                block = live.pop(key)
                change_bytes = -storage.num_bytes
                freed = (block.address, storage.num_bytes, storage.stream, storage.name)
                ready_at = None if ready is None else ready.get(code.positions[at])
                trace.append(("free_requested", *freed))
                if block.used_elsewhere and ready_at is not None:
                    allocator.free_later(block, ready_at)
                else:
                    block.used_elsewhere = False
                    trace.append(("free_completed", *freed))
                    allocator.free(block)
            self._totals[category] += change_bytes
            reserved = allocator.reserved_bytes
            self._points.append(_Point(position, allocator.allocated_bytes, reserved, category, change_bytes))
            if self._record:
                where = (storage.category, self._module, self._phase, run, position)
                self.events += [BlockEvent(*event[:5], *where) for event in trace]
            trace.clear()
        for _, phase, module in code.marks[-1:]:
            self._phase, self._module = phase, module

    def footprint(self) -> Footprint:
        peak = self.peak()
        return replace(
            super().footprint(),
            samples=self.samples[self.peaks.index(peak)],
            events=tuple(self.events),
            segments=tuple(self._segments()) if self._record else (),
        )

    def _segments(self) -> Iterator[Segment]:
        """Yield segments with their blocks; of an expandable one each backed stretch, as PyTorch's snapshot does."""
        names = {ALLOCATED: "active_allocated", AWAITING: "active_awaiting_free"}
        for head in self.allocator.segments.values():
            stretch: list[tuple[int, int, int, str, str]] = []
            for block in [*self.allocator.blocks(head), None]:
                if block is not None and block.state != UNMAPPED:
                    state = names.get(block.state, "inactive")
                    used = block.state in names
                    requested, name = (block.requested, block.name) if used else (0, "")
                    stretch.append((block.address, block.size, requested, state, name))
                elif stretch:
                    size = sum(entry[1] for entry in stretch)
                    pool = head.pool
                    expandable = head.space is not None
                    yield Segment(stretch[0][0], size, pool.stream, pool.small, expandable, tuple(stretch))
                    stretch = []


def _samples(points: list[_Point], totals: list[int]) -> tuple[Sample, ...]:
    """Return the lowest and the highest point of each stretch of the curve, in order, with the bytes by category.

    ``totals`` are the bytes requested by category before the first point; rounding is what is allocated beyond them.
    """
    if not points:
        return ()
    width = -(-len(points) // (MAX_SAMPLES // 2))
    kept: set[int] = {0, len(points) - 1}
    for start in range(0, len(points), width):
        stretch = range(start, min(start + width, len(points)))
        kept.add(min(stretch, key=lambda i: points[i].allocated_bytes))
        kept.add(max(stretch, key=lambda i: points[i].allocated_bytes))
    running = totals[:-1]
    samples = []
    for index, point in enumerate(points):
        running[point.category] += point.change
        if index in kept:
            by_category = (*running, point.allocated_bytes - sum(running))
            samples.append(Sample(point.position, point.allocated_bytes, point.reserved_bytes, by_category))
    return tuple(samples)


def _ready(releases: Sequence[Release]) -> _Ready:
    found: _Ready = {}
    for release in releases:
        call, index = release.reusable_at
        found.setdefault(release.freed_at[0], {})[release.freed_at[1]] = call << _CALL | index
    return found


def _moved(ready: _Ready, step: Sequence[Call], other: Sequence[Call]) -> _Ready:
    """Return releases for another list of calls than the timed one: those of the same call of the same chunk."""
    if not ready:
        return {}
    where: dict[tuple[Call, int], int] = {}
    counts: dict[Call, int] = {}
    for index, call in enumerate(other):
        counts[call] = nth = counts.get(call, -1) + 1
        where[call, nth] = index
    moved: _Ready = {}
    counts = {}
    for index, call in enumerate(step):
        counts[call] = nth = counts.get(call, -1) + 1
        target = where.get((call, nth))
        if target is not None and index in ready:
            shift = (target - index) << _CALL
            moved[target] = {at: reusable + shift for at, reusable in ready[index].items()}
    return moved


def _repeats(calls: Sequence[Call], ready: _Ready) -> dict[int, tuple[int, int, int]]:
    """Return where runs of equal groups of calls begin: index -> (calls in a group, groups, microbatches between them).

    Groups are equal if they call the same chunks, for microbatches a constant number apart, with releases at the same
    places. Only runs of four or more count; two replays are needed to see that a state comes back.
    """
    num_calls = len(calls)
    names: dict[tuple[str, object], int] = {}
    keys: list[int] = []
    for index, call in enumerate(calls):
        releases = ready.get(index)
        relative = None if not releases else tuple((at, when - (index << _CALL)) for at, when in releases.items())
        keys.append(names.setdefault((call.chunk, relative), len(names)))
    microbatches = [call.microbatch for call in calls]
    # next_other[i]: the next call of the same key for another microbatch
    next_other = [-1] * num_calls
    latest: dict[int, int] = {}
    for index in range(num_calls - 1, -1, -1):
        after = latest.get(keys[index], -1)
        if after >= 0 and microbatches[after] == microbatches[index]:
            after = next_other[after]
        next_other[index] = after
        latest[keys[index]] = index
    found: dict[int, tuple[int, int, int]] = {}
    index = 0
    while index < num_calls:
        after = next_other[index]
        for _ in range(4):
            if after < 0:
                break
            period, step = after - index, microbatches[after] - microbatches[index]
            count = 1
            start = after
            while keys[start : start + period] == keys[index:after] and _apart(microbatches, start, period, step):
                count += 1
                start += period
            if count >= 4:
                found[index] = (period, count, step)
                index = start - 1
                break
            after = next_other[after]
        index += 1
    return found


def _apart(microbatches: list[int], start: int, period: int, step: int) -> bool:
    return all(microbatches[i] - microbatches[i - period] in {0, step} for i in range(start, start + period))


# --- the public functions ----------------------------------------------------------------------------


def replay(
    program: Program,
    settings: AllocatorSettings,
    releases: Sequence[Release] = (),
    record: bool = False,
    *,
    samples: bool = False,
) -> Footprint:
    """Return what a rank of ``program`` holds; nothing beside PyTorch's allocator yet (see :func:`beside`).

    ``releases`` are those of its representative. ``samples`` asks for the curve of the step of the peak; ``record`` for
    that, every event of the allocator, and its segments at the end.
    """
    run = _Observed(program, settings, releases, record) if record or samples else _Replay(program, settings, releases)
    run.run()
    return run.footprint()


def beside(footprint: Footprint, program: Program, outside: Outside) -> Footprint:
    """Return the footprint as ``program``'s, with what the process holds outside of PyTorch added to it."""
    return replace(
        footprint,
        ranks=program.ranks,
        stage=program.stage,
        peak_device_bytes=footprint.peak_reserved_bytes + outside.total_bytes,
        beside={
            "fragmentation": footprint.peak_reserved_bytes - footprint.peak_allocated_bytes,
            "cuda_context": outside.cuda_context_bytes,
            "nccl": outside.nccl_bytes,
            "libraries": outside.library_bytes,
        },
    )


Known = dict[object, list[tuple[AllocatorSettings, Footprint]]]
"""Footprints by what was replayed, each with the settings it holds for."""


def footprints(
    world: World,
    timeline: Timeline | None,
    settings: AllocatorSettings | Mapping[int, AllocatorSettings],
    outside: Mapping[int, Outside],
    record: bool = False,
    *,
    samples: bool = False,
    known: Known | None = None,
) -> tuple[Footprint, ...]:
    """Return the footprint of each class of ranks, in the order of ``world.programs``.

    ``settings`` for all, or by the representative rank; ``outside`` by the representative rank. Classes that do the
    same are replayed once, unless one of them runs short of memory. ``known``: what was replayed before, of chunks that
    live on and with equal ``record`` and ``samples``; it is added to.
    """
    releases: dict[int, list[Release]] = {}
    for release in timeline.releases if timeline is not None else ():
        releases.setdefault(release.rank, []).append(release)
    known = {} if known is None else known
    result = []
    for program in world.programs:
        chosen = settings if isinstance(settings, AllocatorSettings) else settings[program.rank]
        own = releases.get(program.rank, [])
        chunks = tuple((name, id(chunk)) for name, chunk in sorted(program.chunks.items()))
        when = tuple((release.freed_at, release.reusable_at) for release in own)
        alike = known.setdefault((chunks, program.setup, program.first_step, program.step, when), [])
        footprint = next((found for used, found in alike if _same_replay(found, used, chosen)), None)
        if footprint is None:
            footprint = replay(program, chosen, own, record, samples=samples)
            alike.append((chosen, footprint))
        result.append(beside(footprint, program, outside.get(program.rank, NOTHING)))
    return tuple(result)


def _same_replay(footprint: Footprint, used: AllocatorSettings, settings: AllocatorSettings) -> bool:
    """Whether a replay of the same program with ``settings`` gives what one with ``used`` gave.

    A capacity that was never reached, and would not be, does not matter.
    """
    if used == settings:
        return True
    if used.max_split_size_bytes is not None or replace(used, capacity_bytes=settings.capacity_bytes) != settings:
        return False
    reached = footprint.num_alloc_retries > 0 or footprint.out_of_memory is not None
    return not reached and footprint.peak_reserved_bytes <= (settings.capacity_bytes or 0)
