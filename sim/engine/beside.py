"""Kernels beside others: what runs at the same time on other streams of a GPU slows down what computes.

A running collective takes SMs and memory bandwidth for as long as it runs, and kernels share what is left with it.

A kernel that takes d(0) ticks alone and d(S) beside a set S of collectives progresses at the rate 1 / d(S) while
exactly S runs:

    sum over the stretches of time t_i with S_i beside it of  t_i / d(S_i)  =  1

A kernel whose blocks stay on their SMs until it ends (Hopper's matmuls: sim.cost.gemm) goes otherwise. A collective
that would begin meanwhile finds no SM free and begins when the kernel has ended. Where collectives run when the kernel
begins, some of its blocks wait until these have ended or the first of its own have: of d alone it takes

    min( d(S),  what S still runs + d )

Kernels of several streams take turns, in the order in which they could begin: the blocks of the next one are dispatched
when those of the one before all are, and have only the room that it leaves (the leftover policy: Amert et al., "GPU
scheduling on the NVIDIA TX2: hidden details revealed", RTSS 2017; Gilman and Walls, "Characterizing concurrency
mechanisms for NVIDIA GPUs under deep learning workloads", Performance Evaluation 151, 2021). What is worth its time has
blocks for every SM and more, and a matrix product's take most registers of theirs (CUTLASS,
media/docs/efficient_gemm.md): nothing is left but in its last wave. Two kernels that are bound by memory would share
its bandwidth, and take the sum of their times either way. So what a framework puts on a stream of its own (FSDP's casts
and divisions of whole gradients) hides behind nothing but collectives, copies and the host. A kernel's time is from
when it could begin, the others' turns included.

Who runs beside whom is worked out once for each chunk, as it goes by itself: the host ahead, nothing left over from the
chunk before, collectives as long as their own group's bytes take. So a kernel's time belongs to its place in the
chunk, like the rest of what is worked out beforehand, whatever runs elsewhere; ranks of one class and ranks of their
own agree about it.

Leaves out: what a collective of one chunk does to kernels of the next; that collectives are held up by others and
by kernels; sends, receives and copies, which take an SM or two or none, and little bandwidth of the memory; the
room that last waves and small kernels leave to the next stream's; that blocks of a stream of higher priority (FSDP2's,
FSDP1's with hybrid sharding) come next when a wave ends, not when the kernel does.
Checked by: tests/laws/test_engine_laws.py, tests/unit/test_engine_beside.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import cast

from sim.engine.cost import Cost
from sim.ir.ledger import Kernel
from sim.ir.program import Chunk, Collective, Compute, HostWait, Record, Wait
from sim.ir.traffic import Traffic
from sim.units import TICKS_PER_S, ticks

TrafficOf = Callable[[Collective], Traffic | None]
"""Traffic of a collective; None where there is nobody to meet."""

_Taken = tuple[int, int, int]
"""(ticks or end, SMs, steps of the memory's bandwidth) of a collective."""
_RUN, _TAKE, _RECORD, _WAIT = range(4)
_Item = tuple[int, "_Run | _Taken | list[int]"]
"""(_RUN, kernels), (_TAKE, collective), (_RECORD or _WAIT, cell)."""
_KINDS = frozenset({Compute, Collective, Record, Wait, HostWait})
_NEVER = 1 << 62
_MEMORY_STEP = 4e9
"""Memory bandwidth is told in steps of so many bytes per second: equal groups agree, and few prices are asked for."""


def own_ticks(traffic: Traffic, cost: Cost) -> int:
    """Return how long a collective takes one of its groups with the links to itself."""
    seconds = 0.0
    for phase in traffic.phases:
        links_s = phase.group_s or max((n / cost.links[link].bytes_per_s for link, n in phase.loads), default=0.0)
        capped = phase.stream_bytes > 0 and phase.max_bytes_per_s > 0
        seconds += phase.latency_s + max(links_s, phase.stream_bytes / phase.max_bytes_per_s if capped else 0.0)
    return ticks(seconds)


def durations_beside(
    chunk: Chunk, duration: Callable[[Kernel], int], traffic_of: TrafficOf, cost: Cost, rank: int
) -> Mapping[int, int]:
    """Return the ticks of the kernels (by index into the chunk) that others are beside. Empty if there are none.

    ``duration`` is a kernel's own.
    """
    if not any(step.__class__ is Collective for step in chunk) and not _several_compute(chunk):
        return {}
    return _Chunk(duration, traffic_of, cost, rank).play(chunk)


def _several_compute(chunk: Chunk) -> bool:
    """Return whether several streams have kernels."""
    only = ""
    for step in chunk:
        if step.__class__ is Compute and step.stream != only:
            if only:
                return True
            only = step.stream
    return False


@dataclass(slots=True, eq=False)
class _Run:
    """Kernels one after the other: (index, kernel, ticks alone) of each, ``total`` ticks; ``at`` the next one."""

    kernels: list[tuple[int, Kernel, int]] = field(default_factory=list)
    total: int = 0
    at: int = 0


@dataclass(slots=True, eq=False)
class _Stream:
    """What one stream of the chunk does in order, how far it is (``at``), and when it was free (``now``).

    ``items``: kernels; a collective; an event to record (a cell that holds its tick, or -1) or to wait for. ``when``
    it goes on: -1 where that is to be looked up; never while its kernel waits for its turn. A kernel that has the GPU:
    it could begin at ``start``; ``left`` of it is to do since ``since``, and all of it takes ``whole`` now; ``queued``:
    blocks of it wait for the SMs of collectives.
    """

    items: list[_Item] = field(default_factory=list)
    gates: int = 0
    at: int = 0
    now: int = 0
    start: int = 0
    left: float = 1.0
    since: int = 0
    whole: int = 0
    end: int = 0
    when: int = -1
    queued: bool = False


class _Chunk:
    """A chunk as it goes by itself. ``active`` are the collectives that run: (end, SMs, memory).

    ``running`` is the stream whose kernel has the GPU, ``turns`` those whose kernels wait for it, the next one first,
    ``held`` those whose collectives wait for it.
    """

    def __init__(self, duration: Callable[[Kernel], int], traffic_of: TrafficOf, cost: Cost, rank: int) -> None:
        self._duration, self._traffic_of, self._cost, self._rank = duration, traffic_of, cost, rank
        self._streams: dict[str, _Stream] = {}
        self._active: list[_Taken] = []
        self._sms = self._memory = 0
        self._ending = _NEVER
        self._running: _Stream | None = None
        self._turns: deque[_Stream] = deque()
        self._held: list[_Stream] = []
        self._told = False
        self._all: tuple[_Stream, ...] = ()
        self._own: dict[int, _Taken] = {}
        self._slower: dict[tuple[int, int, int], int] = {}
        self._waiting: dict[tuple[int, int], bool] = {}
        self._found: dict[int, int] = {}

    def play(self, chunk: Chunk) -> Mapping[int, int]:
        takes = self._issue(chunk)
        if takes or _several_compute(chunk):
            self._all = tuple(self._streams.values())
            while self._next():
                pass
        return self._found

    # --- what the streams are asked to do ---

    def _issue(self, chunk: Chunk) -> bool:
        """Fill the streams; return whether a collective takes SMs. What comes after a host's wait waits for it too."""
        latest: dict[str, list[int]] = {}
        gates: list[list[int]] = []
        runs: dict[str, _Run] = {}
        duration, takes = self._duration, False
        waited = ""  # the stream whose last kernel the host has waited for
        for index, step in enumerate(chunk):
            kind = step.__class__
            if kind not in _KINDS:
                continue
            if waited and kind is not HostWait and step.stream != waited:  # type: ignore[union-attr]
                cell = [-1]
                self._stream(waited, gates).items.append((_RECORD, cell))
                gates.append(cell)
                runs.clear()
                waited = ""
            item: _Item
            if kind is Compute:
                name, kernel = step.stream, step.kernel  # type: ignore[union-attr]
                run = runs.get(name)
                if run is None:
                    run = runs[name] = _Run()
                    self._stream(name, gates).items.append((_RUN, run))
                alone = duration(kernel)
                run.kernels.append((index, kernel, alone))
                run.total += alone
                if step.blocking:  # type: ignore[union-attr]
                    waited = name
                continue
            if kind is Record:
                cell = latest[step.event] = [-1]  # type: ignore[union-attr]
                item = (_RECORD, cell)
            elif kind is Collective:
                taken = self._taken(cast("Collective", step))
                if taken is None:
                    continue
                item, takes = (_TAKE, taken), takes or taken[1] > 0
            else:
                found = latest.get(step.event)  # type: ignore[union-attr]
                if found is None:
                    continue
                if kind is HostWait:
                    gates.append(found)
                    runs.clear()
                    continue
                item = (_WAIT, found)
            name = step.stream  # type: ignore[union-attr]
            self._stream(name, gates).items.append(item)
            runs.pop(name, None)
        return takes

    def _stream(self, name: str, gates: list[list[int]]) -> _Stream:
        """Return a stream that has been made to wait for what the host has waited for."""
        stream = self._streams.get(name)
        if stream is None:
            stream = self._streams[name] = _Stream()
        if stream.gates < len(gates):
            stream.items.extend((_WAIT, gate) for gate in gates[stream.gates :])
            stream.gates = len(gates)
        return stream

    def _taken(self, step: Collective) -> _Taken | None:
        traffic = self._traffic_of(step)
        if traffic is None:
            return None
        known = self._own.get(id(traffic))
        if known is None:
            length = own_ticks(traffic, self._cost)
            moved = self._cost.memory_bytes(traffic) if length and traffic.sms else 0.0
            memory = round(moved * TICKS_PER_S / length / _MEMORY_STEP) if moved else 0
            known = self._own[id(traffic)] = (length, traffic.sms, memory)
        return known

    # --- time ---

    def _next(self) -> bool:
        """Do what comes next in time; False once there is nothing."""
        first: _Stream | None = None
        soonest = limit = _NEVER
        self._told, blocked = False, False
        for stream in self._all:
            when = stream.when
            if when < 0:
                when = self._ready(stream)
                blocked |= stream.when < 0
            if when < soonest:
                first, soonest, limit = stream, when, soonest
            elif when < limit:
                limit = when
        if blocked and self._told:  # an event that one of them waited for may have happened meanwhile
            return True
        ending = self._ending
        if ending <= soonest:
            if ending == _NEVER:
                return False
            self._active = [taken for taken in self._active if taken[0] > ending]
            self._changed(ending)
            return True
        assert first is not None
        if first is self._running:
            self._ended(first)
        elif first.items[first.at][0] == _RUN:
            if self._running is not None:
                first.when = _NEVER
                self._turns.append(first)
                return True
            self._kernels(first, min(limit, ending))
        else:
            self._collective(first, soonest)
        return True

    def _collective(self, stream: _Stream, now: int) -> None:
        """Begin the stream's collective, or hold it until the kernel that has all SMs has ended."""
        length, sms, _ = cast("_Taken", stream.items[stream.at][1])
        running = self._running
        if running is not None and sms and length and running.end > now and self._waits(running, sms):
            stream.when = _NEVER
            self._held.append(stream)
        else:
            self._take(stream, now)

    def _take(self, stream: _Stream, now: int) -> None:
        """Begin the stream's collective."""
        length, sms, memory = cast("_Taken", stream.items[stream.at][1])
        stream.now = now + length
        stream.at += 1
        stream.when = -1
        if sms and length:
            self._active.append((stream.now, sms, memory))
            self._changed(now)

    def _waits(self, stream: _Stream, sms: int) -> bool:
        """Return whether the stream's kernel needs more SMs than others leave that hold so many."""
        run = cast("_Run", stream.items[stream.at][1])
        kernel = run.kernels[run.at][1]
        key = (id(kernel), sms)
        found = self._waiting.get(key)
        if found is None:
            found = self._waiting[key] = self._cost.waits_for_sms(kernel, sms)
        return found

    def _ready(self, stream: _Stream) -> int:
        """Return when a stream does its next kernel or collective; never, as far as can be said now.

        Kept as ``when`` unless it waits for what has not happened yet.
        """
        items = stream.items
        while stream.at < len(items):
            kind, what = items[stream.at]
            if kind <= _TAKE:
                stream.when = stream.now
                return stream.now
            cell = cast("list[int]", what)
            if kind == _RECORD:
                cell[0] = stream.now
                self._told = True
            elif cell[0] < 0:
                return _NEVER
            elif cell[0] > stream.now:
                stream.now = cell[0]
            stream.at += 1
        stream.when = _NEVER
        return _NEVER

    def _kernels(self, stream: _Stream, limit: int) -> None:
        """Do the kernels that end before anything else happens; begin the next one. The GPU is free."""
        now, stream.when = stream.now, -1
        run = cast("_Run", stream.items[stream.at][1])
        if not self._sms and not run.at and now + run.total <= limit:
            stream.now = now + run.total
            stream.at += 1
            return
        kernels = run.kernels
        for at in range(run.at, len(kernels)):
            index, kernel, alone = kernels[at]
            whole = self._ticks(kernel, alone) if self._sms else alone
            if now + whole > limit:
                stream.start = now
                run.at = at
                self._begin(stream, now, whole)
                break
            if whole != alone:
                self._found[index] = whole
            now += whole
        else:
            stream.at += 1
        stream.now = now

    def _begin(self, stream: _Stream, now: int, whole: int) -> None:
        """Give the GPU to the stream's kernel, which takes ``whole`` ticks if nothing changes meanwhile."""
        self._running, stream.left = stream, 1.0
        stream.since, stream.whole = now, whole
        stream.end = stream.when = now + whole
        stream.queued = self._sms > 0 and self._waits(stream, self._sms)

    def _ended(self, stream: _Stream) -> None:
        run = cast("_Run", stream.items[stream.at][1])
        index, _, alone = run.kernels[run.at]
        self._running, stream.now, stream.when = None, stream.end, -1
        run.at += 1
        if run.at == len(run.kernels):
            stream.at += 1
        if stream.end - stream.start != alone:
            self._found[index] = stream.end - stream.start
        if self._held:
            held, self._held = self._held, []
            for other in held:
                self._take(other, stream.end)
        turns = self._turns
        if turns:
            following = turns.popleft()
            if run.at < len(run.kernels):
                stream.when = _NEVER
                turns.append(stream)
            run = cast("_Run", following.items[following.at][1])
            _, kernel, alone = run.kernels[run.at]
            following.start = following.now
            self._begin(following, stream.end, self._ticks(kernel, alone))

    def _changed(self, now: int) -> None:
        """Note who runs from now on: a kernel that has begun goes on at another rate."""
        self._sms = sum(taken[1] for taken in self._active)
        self._memory = sum(taken[2] for taken in self._active)
        self._ending = min((taken[0] for taken in self._active), default=_NEVER)
        stream = self._running
        if stream is not None and stream.queued:
            if not self._sms:
                run = cast("_Run", stream.items[stream.at][1])
                stream.end = stream.when = min(stream.end, now + run.kernels[run.at][2])
        elif stream is not None and stream.whole:
            stream.left -= (now - stream.since) / stream.whole
            run = cast("_Run", stream.items[stream.at][1])
            _, kernel, alone = run.kernels[run.at]
            stream.since, stream.whole = now, self._ticks(kernel, alone)
            stream.end = stream.when = now + ceil(max(stream.left, 0.0) * stream.whole)

    def _ticks(self, kernel: Kernel, alone: int) -> int:
        """Return the ticks of a kernel beside the collectives that run now."""
        if not self._sms:
            return alone
        key = (id(kernel), self._sms, self._memory)
        found = self._slower.get(key)
        if found is None:
            seconds = self._cost.beside_s(kernel, self._rank, self._sms, self._memory * _MEMORY_STEP)
            found = self._slower[key] = max(alone, ticks(seconds))
        return found
