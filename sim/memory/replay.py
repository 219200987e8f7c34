"""Replay of a program's allocations and frees through the allocator: what one rank holds, and when it holds most.

Setup is replayed once, then the first step, then later steps until the allocator ends one in a state it has been in
before: from there on everything repeats. Within a step the same holds for microbatches: once a run of identical calls
comes back to the same state, the rest of the run is skipped; likewise after so many that took no memory (``QUIET``), as
storages of several microbatches can change places for hundreds. Peaks are therefore those of the whole training.

A program is first compiled (sim/memory/script.py). Then it is played on one of two allocators that agree in every
number: ``PlainAllocator``, which is fast, or ``CachingAllocator`` where a setting is used that the other does not know,
or where somebody watches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any

from sim.ir.footprint import CATEGORIES, BlockEvent, DriverCalls, Footprint, OutOfMemory, Sample, Segment
from sim.ir.program import Call, Program, Storage, World
from sim.ir.timeline import Position, Release, Timeline
from sim.memory.allocator import (
    ALLOCATED,
    AWAITING,
    SMALL_BYTES,
    UNMAPPED,
    AllocatorSettings,
    Asked,
    Block,
    CachingAllocator,
)
from sim.memory.attribution import Owner, account, holders
from sim.memory.plain import Most, PlainAllocator
from sim.memory.runtime import NOTHING, Outside
from sim.memory.script import CALL, MICROBATCH, OWN, SLOT_MASK, USE, Code, Compiler, Scripts, go_on

MAX_STEPS = 3
"""Steps replayed at most: a state that has not come back by then is taken not to."""
MAX_BUSY_STEPS = 8
"""Steps replayed at most where each gives memory back, so that what it does is what it will go on doing."""
MAX_CHECKS = 6
"""Places within a step at which its state is compared with the step before: from equal ones on, equal things follow."""
QUIET, MAX_QUIET = 8, 64
"""Equal groups of calls in a row that neither take memory nor end in a state that was there before, after which the
rest is taken not to take any either: ``MAX_QUIET``, or as soon as ``QUIET`` more than there are microbatches in flight
where all that outlives a group fills segments of its own.

Blocks of several microbatches can change places for hundreds of groups, so that no state comes back. Where each is a
whole segment, their places differ in nothing but the address: a request finds one of the same size, with nothing
beside it, and a group does to one what the group before did to another. Elsewhere it is no law: of 3,000 random
programs on split segments two took memory again after 64 quiet groups, twelve after ``QUIET`` and those in flight.
"""
MAX_SAMPLES = 2000
"""Points of the memory curve that are kept: the lowest and the highest of each of half as many stretches."""
PINNED = "pinned"
"""The stream of host storages that ``CachingHostAllocator`` serves; any other is pageable memory."""


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

    def replay(self, storages: Sequence[tuple[bool, Storage]]) -> None:
        """Allocate (True) and free one after the other."""
        for comes, storage in storages:
            (self.alloc if comes else self.free)(storage)

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


class _General:
    """``CachingAllocator`` under a replay: with any settings, and with somebody who may watch each action."""

    def __init__(self, settings: AllocatorSettings, scripts: Scripts) -> None:
        self.allocator = allocator = CachingAllocator(settings)
        allocator.on_out_of_memory = self._note_out_of_memory
        allocator.on_driver = self._note_driver
        self.on_out_of_memory: Callable[[int, int, int], None] | None = None
        self.on_driver: Callable[[int, Asked], None] | None = None
        self.watch: Callable[[Code, int, int, Block], None] | None = None
        """Called after each action with the chunk's code, the action's index, and its block."""
        self.live: dict[int, Block] = {}
        self._scripts = scripts
        self._pools: list[Any] = []
        self._at: tuple[int, Iterator[int]] = 0, iter(())

    @property
    def allocated_bytes(self) -> int:
        return self.allocator.allocated_bytes

    @property
    def reserved_bytes(self) -> int:
        return self.allocator.reserved_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        return self.allocator.peak_reserved_bytes

    @property
    def num_alloc_retries(self) -> int:
        return self.allocator.num_alloc_retries

    @property
    def peak_awaiting_bytes(self) -> int:
        return self.allocator.peak_awaiting_bytes

    def play(  # noqa: PLR0912 (one loop for all who ask)
        self, code: Code, call: int, bits: int, ready: Mapping[int, int] | None
    ) -> Most:
        """Do what a chunk does. ``ready``: position of a free -> when its block may be used again."""
        allocator, live, script, watch = self.allocator, self.live, code.script, self.watch
        malloc, free, awaiting = allocator.malloc, allocator.free, allocator.awaiting
        numbers = self._scripts.pools
        if len(self._pools) < len(numbers):
            self._pools = [allocator.pool(stream, 1 if small else SMALL_BYTES + 1) for stream, small in numbers]
        pools = self._pools
        positions, base = code.positions, call << CALL
        held: list[Any] = [None] * len(code.slots)
        for register, slot in zip(script.inputs, code.inputs, strict=True):
            held[register] = live.pop(slot + bits if slot & OWN else slot)
        sizes = script.sizes
        peak = allocator.allocated_bytes
        peak_at = -1
        last = len(positions) - 1
        iterator = iter(script.actions)
        self._at = last, iterator
        for action in iterator:
            if action >= 0:
                if awaiting:
                    now = base | positions[last - length_hint(iterator)]
                    if awaiting[0][0] <= now:
                        allocator.process_events(now)
                held[action] = block = malloc(pools[script.pools[action]], sizes[action])
                if allocator.allocated_bytes > peak:
                    peak = allocator.allocated_bytes
                    peak_at = last - length_hint(iterator)
            elif action > USE:
                block = held[~action]
                when = None
                if block.used_elsewhere:
                    when = None if ready is None else ready.get(positions[last - length_hint(iterator)])
                    block.used_elsewhere = when is not None
                if when is None:
                    free(block)
                else:
                    allocator.free_later(block, when)
            else:
                block = held[USE - action]
                block.used_elsewhere = True
            if watch is not None:
                watch(code, last - length_hint(iterator), action, block)
        for register, slot in zip(script.outputs, code.outputs, strict=True):
            live[slot + bits if slot & OWN else slot] = held[register]
        return Most(peak, peak_at)

    def shift(self, bits: int, num_calls: int) -> None:
        """Go on as if so many microbatches and calls had been replayed."""
        go_on(self.live, self.allocator.awaiting, bits, num_calls)

    def alone(self, slot: int, size: int) -> bool:
        """Whether the block of a live slot, asked for with ``size``, is a whole segment."""
        block = self.live[slot]
        return block.prev is block.next  # both are the edge

    def look(self, call: int) -> tuple[object, dict[int, int]]:
        """Return all that decides how later requests are served, from the view of a call: what is free, and where each
        slot is."""
        base = call << CALL
        awaiting = sorted([(at - base, block.address) for at, _, block in self.allocator.awaiting])
        live = {slot: -b.address if b.used_elsewhere else b.address for slot, b in self.live.items()}
        return (self.allocator.state(), awaiting), live

    def _note_out_of_memory(self, size: int, short_bytes: int) -> None:
        last, iterator = self._at
        if self.on_out_of_memory is not None:
            self.on_out_of_memory(last - length_hint(iterator), size, short_bytes)

    def _note_driver(self, asked: Asked) -> None:
        last, iterator = self._at
        if self.on_driver is not None:
            self.on_driver(last - length_hint(iterator), asked)


@dataclass(slots=True)
class _Look:  # noqa: PLW1641 (nobody hashes it)
    """Everything that later behaviour depends on, at the call ``call`` for the microbatch whose bits are given."""

    call: int
    bits: int
    free: object
    live: dict[int, int]
    host: tuple[object, ...]

    def __eq__(self, other: object) -> bool:
        """Whether the same will follow, microbatches and positions relative to the two calls."""
        assert isinstance(other, _Look)
        if self.free != other.free or self.host != other.host:
            return False
        if self.bits == other.bits:
            return self.live == other.live
        bits, live = other.bits - self.bits, other.live
        # what came last is what most likely differs
        return len(live) == len(self.live) and all(
            live.get(slot + bits if slot & OWN else slot) == block for slot, block in reversed(self.live.items())
        )


class _Replay:
    """One rank's allocator, and what is live in it."""

    def __init__(
        self,
        program: Program,
        settings: AllocatorSettings,
        releases: Sequence[Release],
        scripts: Scripts | None = None,
        general: bool = False,
    ) -> None:
        self.program = program
        self.scripts = Scripts(settings.roundup_power2_divisions) if scripts is None else scripts
        plain = not general and settings.plain
        self.allocator = PlainAllocator(settings, self.scripts) if plain else _General(settings, self.scripts)
        self.allocator.on_out_of_memory = self._note_out_of_memory
        self.allocator.on_driver = self._note_driver
        self._expandable = settings.expandable_segments
        self._driver: list[DriverCalls] = []
        """What the calls of the run in progress, or else of the last one, asked of the driver."""
        self.steady_driver: tuple[DriverCalls, ...] = ()
        self.host = _Host()
        self.peaks: list[_Peak] = []
        # (code, microbatch bits) of each call replayed, or the microbatches that were skipped
        self.executed: list[tuple[Code, int] | int] = []
        self.out_of_memory: tuple[str, Position, int, int, int, int] | None = None
        self._compiler = Compiler(self.scripts)
        self._codes: dict[str, Code] = {}
        self._repeated: dict[int, tuple[Sequence[Call], _Ready, dict[int, tuple[int, int, int]]]] = {}
        self._releases = releases
        self._where: tuple[str, int, Code] | None = None
        # states between the calls of the last run: index of the next call -> state, and which calls these were
        self._checked: dict[int, _Look] = {}
        self._checked_calls: tuple[Sequence[Call], _Ready] | None = None
        self._may_end_early = True

    # --- the program -----------------------------------------------------------------------------

    def run(self) -> None:
        program = self.program
        ready = _ready(self._releases)
        first_ready = ready if program.first_step == program.step else _moved(ready, program.step, program.first_step)
        self._run("setup", program.setup, {})
        self._run("first", program.first_step, first_ready)
        seen = [self._look(0)]
        asked: list[list[DriverCalls]] = []
        while len(asked) < MAX_STEPS - 1 or (gives_back(self._driver) and len(asked) < MAX_BUSY_STEPS - 1):
            early = self._run("steady", program.step, ready)
            asked.append(self._driver)
            if early:
                asked = asked[-1:]
                break
            look = self._look(0)
            if look in seen:
                asked = asked[seen.index(look) :]  # the steps that go on and on
                break
            seen.append(look)
            if len(asked) >= MAX_STEPS - 1 and asked[-1] == asked[-2]:
                asked = asked[-1:]  # it goes on like this, though segments have new addresses each time
                break
        else:
            asked = asked[-1:]
        asked.sort(key=lambda step: sum(calls.given for calls in step))
        self.steady_driver = tuple(asked[len(asked) // 2])

    def _code(self, name: str) -> Code:
        code = self._codes.get(name)
        if code is None:
            code = self._codes[name] = self._compiler.compile(self.program.chunks[name])
        return code

    def _run(self, run: str, calls: Sequence[Call], ready: _Ready) -> bool:
        """Replay calls, skipping what repeats. Return whether it ended early, the rest being as last time."""
        self._peak = _Peak(run, self.allocator.allocated_bytes, (0, 0), len(self.executed), -1)
        repeats = self._repeats(calls, ready)
        before = self._checked if self._checked_calls == (calls, ready) else {}
        asked_before, self._driver = self._driver, []
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
                look = self._checked[index] = self._look(0, index)
                if index in before and before[index] == look:
                    self.peaks.append(self._peak)
                    self._driver += [calls for calls in asked_before if calls.position[0] >= index]
                    return True
        self.allocator.shift(0, -num_calls)
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
        seen: dict[tuple[int, ...], list[_Look]] = {}
        latest: tuple[int, ...] = ()
        quiet, enough = 0, MAX_QUIET
        while index < end:
            for call in range(index, index + period):
                self._call(run, call, calls[call], ready)
            index += period
            if index == end:
                break
            # a state costs something to describe: only where it can have been there before
            glance = (allocator.allocated_bytes, allocator.reserved_bytes, len(allocator.live))
            quiet = quiet + 1 if glance == latest else 0
            latest = glance
            if quiet == QUIET:
                kept = [slot for slot in allocator.live if slot & OWN]
                if all(allocator.alone(slot, self._compiler.sizes[slot & SLOT_MASK]) for slot in kept):
                    enough = min(QUIET + len({slot >> MICROBATCH for slot in kept}), MAX_QUIET)
            if quiet >= enough and self._may_end_early:
                self._asks_again(index - period, index, end)
                self._skip((end - index) // period * step, end - index)
                break
            before = seen.get(glance)
            if before is None:
                seen[glance] = []
                continue
            look = self._look(calls[index].microbatch, index)
            same = next((other for other in before if other == look), None)
            if same is None:
                before.append(look)
                continue
            cycle = index - same.call
            skipped = (end - index) // cycle * cycle
            self._asks_again(same.call, index, index + skipped)
            self._skip(skipped // period * step, skipped)
            index += skipped
            seen = {}
        return end

    def _asks_again(self, first: int, last: int, until: int) -> None:
        """Note that what the calls from ``first`` to ``last`` asked of the driver is asked again, until that call."""
        asked = [calls for calls in self._driver if first <= calls.position[0] < last]
        for shift in range(last - first, until - first, last - first) if asked else ():
            self._driver += [
                replace(calls, position=(calls.position[0] + shift, calls.position[1]))
                for calls in asked
                if calls.position[0] + shift < until
            ]

    def _look(self, microbatch: int, call: int = 0) -> _Look:
        free, live = self.allocator.look(call)
        bits = microbatch << MICROBATCH
        return _Look(call, bits, free, live, self.host.state())

    def _skip(self, num_microbatches: int, num_calls: int) -> None:
        """Go on as if the microbatches had been replayed: their storages are where those of the earlier ones were."""
        bits = num_microbatches << MICROBATCH
        self.allocator.shift(bits, num_calls)
        self.executed.append(bits)

    def _call(self, run: str, index: int, call: Call, ready: _Ready) -> None:
        code = self._codes.get(call.chunk) or self._code(call.chunk)
        bits = call.microbatch << MICROBATCH
        allocator = self.allocator
        num_live = len(allocator.live)
        self._where = (run, index, code)
        try:
            most = allocator.play(code, index, bits, ready.get(index))
        except KeyError as error:
            storage = self._compiler.storages[error.args[0] & SLOT_MASK]
            raise AssertionError(f"chunk {call.chunk!r} frees {storage.name!r}, which is not allocated") from None
        assert len(allocator.live) == num_live + code.growth, (
            f"chunk {call.chunk!r} allocates what is already allocated"
        )
        if most.allocated_bytes > self._peak.allocated_bytes:
            position = (index, code.positions[most.action])
            self._peak = _Peak(run, most.allocated_bytes, position, len(self.executed), most.action)
        if code.host:
            self.host.replay(code.host)
        self.executed.append((code, bits))

    def _note_out_of_memory(self, at: int, size: int, short_bytes: int) -> None:
        assert self._where is not None
        run, index, code = self._where
        self.out_of_memory = (run, (index, code.positions[at]), len(self.executed), at, size, short_bytes)

    def _note_driver(self, at: int, asked: Asked) -> None:
        assert self._where is not None
        _, index, code = self._where
        where = (index, code.positions[at])
        self._driver.append(
            DriverCalls(
                where, asked.taken, asked.taken_bytes, asked.given, asked.given_bytes, asked.retried, self._expandable
            )
        )

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
                live = {slot + entry if slot & OWN else slot: owner for slot, owner in live.items()}
                continue
            code, bits = entry
            for slot in code.losses:
                live.pop(slot + bits if slot & OWN else slot, None)
            for slot, (storage, gained_phase, gained_module) in code.gains.items():
                owner = (storage, phase, module) if gained_phase is None else (storage, gained_phase, gained_module)
                live[slot + bits if slot & OWN else slot] = owner
            if code.marks:
                _, phase, module = code.marks[-1]
        if last_action < 0 or order >= len(self.executed):
            return live, phase, module
        entry = self.executed[order]
        assert not isinstance(entry, int)
        code, bits = entry
        storages = self._compiler.storages
        actions = code.script.actions
        marks = iter([*code.marks, (len(actions) + 1, "", "")])
        change, next_phase, next_module = next(marks)
        for at, action in enumerate(actions[: last_action + 1]):
            while at >= change:
                phase, module = next_phase, next_module
                change, next_phase, next_module = next(marks)
            if action >= 0:
                slot = code.slots[action]
                live[slot + bits if slot & OWN else slot] = (storages[slot & SLOT_MASK], phase, module)
            elif action > USE:
                slot = code.slots[~action]
                live.pop(slot + bits if slot & OWN else slot)
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
            driver=self.steady_driver if gives_back(self.steady_driver) else (),
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

    allocator: _General

    def __init__(
        self, program: Program, settings: AllocatorSettings, releases: Sequence[Release], record: bool
    ) -> None:
        super().__init__(program, settings, releases, general=True)
        self.events: list[BlockEvent] = []
        self._record = record
        self._trace: list[tuple[str, int, int, str, str]] = []
        self.allocator.allocator.trace = self._trace
        self.allocator.watch = self._watch
        self._may_end_early = False  # so that the record ends where a step does
        self._totals = [0] * len(CATEGORIES)
        self._category = {name: index for index, name in enumerate(CATEGORIES)}
        self._phase, self._module = "setup", ""
        self._marks: Iterator[tuple[int, str, str]] = iter(())
        self._next_mark = (0, "", "")
        self._points: list[_Point] = []
        self.samples: dict[int, tuple[Sample, ...]] = {}

    def _run(self, run: str, calls: Sequence[Call], ready: _Ready) -> bool:
        before = list(self._totals)
        self._points = []
        super()._run(run, calls, ready)
        self.samples[len(self.peaks) - 1] = _samples(self._points, before)
        return False

    def _call(self, run: str, index: int, call: Call, ready: _Ready) -> None:
        code = self._code(call.chunk)
        self._marks = iter([*code.marks, (len(code.positions) + 1, "", "")])
        self._next_mark = next(self._marks)
        super()._call(run, index, call, ready)
        for _, phase, module in code.marks[-1:]:
            self._phase, self._module = phase, module

    def _watch(self, code: Code, at: int, action: int, block: Block) -> None:
        while at >= self._next_mark[0]:
            _, self._phase, self._module = self._next_mark
            self._next_mark = next(self._marks)
        if action <= USE:
            return
        assert self._where is not None
        run, call, _ = self._where
        allocator, trace = self.allocator.allocator, self._trace
        position = (call, code.positions[at])
        slot = code.slots[action if action >= 0 else ~action]
        storage = self._compiler.storages[slot & SLOT_MASK]
        category = self._category[storage.category]
        what = (block.address, storage.num_bytes, storage.stream, storage.name)
        change_bytes = storage.num_bytes
        if action >= 0:
            block.requested, block.name = storage.num_bytes, storage.name
            trace.append(("alloc", *what))
        else:
            change_bytes = -change_bytes
            trace.append(("free_requested", *what))
            if block.state != AWAITING:
                trace.append(("free_completed", *what))
        self._totals[category] += change_bytes
        reserved = allocator.reserved_bytes
        self._points.append(_Point(position, allocator.allocated_bytes, reserved, category, change_bytes))
        if self._record:
            where = (storage.category, self._module, self._phase, run, position)
            self.events += [BlockEvent(*event[:5], *where) for event in trace]
        trace.clear()

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
        for head in self.allocator.allocator.segments.values():
            stretch: list[tuple[int, int, int, str, str]] = []
            for block in [*self.allocator.allocator.blocks(head), None]:
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


def gives_back(driver: Sequence[DriverCalls]) -> bool:
    """Whether memory was given back to the driver: that waits for the GPU."""
    return any(calls.given for calls in driver)


def _ready(releases: Sequence[Release]) -> _Ready:
    found: _Ready = {}
    for release in releases:
        call, index = release.reusable_at
        found.setdefault(release.freed_at[0], {})[release.freed_at[1]] = call << CALL | index
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
            shift = (target - index) << CALL
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
        relative = None if not releases else tuple((at, when - (index << CALL)) for at, when in releases.items())
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
            # where the call a period later is another one, or for a microbatch that is not so many later
            end = after
            while (
                end < num_calls
                and keys[end] == keys[end - period]
                and microbatches[end] - microbatches[end - period] in (0, step)
            ):
                end += 1
            count = (end - index) // period
            if count >= 4:
                found[index] = (period, count, step)
                index += period * count - 1
                break
            after = next_other[after]
        index += 1
    return found


# --- the public functions ----------------------------------------------------------------------------


def replay(
    program: Program,
    settings: AllocatorSettings,
    releases: Sequence[Release] = (),
    record: bool = False,
    *,
    samples: bool = False,
    scripts: Scripts | None = None,
) -> Footprint:
    """Return what a rank of ``program`` holds; nothing beside PyTorch's allocator yet (see :func:`beside`).

    ``releases`` are those of its representative. ``samples`` asks for the curve of the step of the peak; ``record`` for
    that, every event of the allocator, and its segments at the end. ``scripts``: those of the world, to be shared.
    """
    if record or samples:
        run: _Replay = _Observed(program, settings, releases, record)
    else:
        run = _Replay(program, settings, releases, scripts)
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
    shared: dict[int, Scripts] = {}
    result = []
    for program in world.programs:
        chosen = settings if isinstance(settings, AllocatorSettings) else settings[program.rank]
        own = releases.get(program.rank, [])
        chunks = tuple((name, id(chunk)) for name, chunk in sorted(program.chunks.items()))
        when = tuple((release.freed_at, release.reusable_at) for release in own)
        alike = known.setdefault((chunks, program.setup, program.first_step, program.step, when), [])
        footprint = next((found for used, found in alike if _same_replay(found, used, chosen)), None)
        if footprint is None:
            divisions = chosen.roundup_power2_divisions
            scripts = shared.setdefault(divisions, Scripts(divisions))
            footprint = replay(program, chosen, own, record, samples=samples, scripts=scripts)
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
