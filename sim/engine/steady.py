"""What repeats itself is skipped: the steady part of a pipeline, or of many accumulated microbatches.

At certain calls of one class, the *anchor*, everything the engine's future depends on is looked at: where each host is
in its program, what its streams and their queues hold, meetings, transfers under way, and the simulation's pending
events. Two such states are *equal up to a shift* if they differ only so:

    ticks                              by P, the period (long past ones do not matter: all they meet is later)
    calls of each program              by D, the calls of a period
    meetings on each communicator      by the meetings of a period, and so launches and copies of each stream

The engine is deterministic and knows no absolute tick or number, so from the second of them on it does what it did from
the first one on, P later, for as long as the programs go on calling the same chunks. As many periods are cut out
of all programs as these repeat; the engine runs the rest, and what it noted between the two states is told once
for each period that was cut (:class:`sim.ir.timeline.Later`). So the timeline is the same to the tick; nothing is
approximated, and a state that never comes back is simulated as it stands.

States are walked as graphs of objects, whatever attributes they have: one that this module does not know must be
equal, or (a whole number) equal or later by P. So state that is added to the engine is looked at without being named
here. What is only output and grows has to be named in ``_ASIDE``, else nothing is skipped any more.

Leaves out: blocks used on several streams (``record_stream``), whose releases are places in the program.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import getgeneratorlocals
from types import FunctionType, GeneratorType, MethodType
from typing import Any

import simpy

from sim.engine.host import Host
from sim.engine.network import Flow, Network
from sim.engine.rendezvous import Meeting, Meetings
from sim.engine.segments import Plan, Segment, Stretch
from sim.engine.stream import Happening, Joint, Machine, Move, Place, Stream
from sim.ir.program import (
    Alloc,
    Call,
    Collective,
    Communicator,
    Compute,
    Copy,
    Free,
    HostCompute,
    HostWait,
    Mark,
    Program,
    Record,
    Recv,
    Send,
    Storage,
    UseOn,
    Wait,
    World,
)
from sim.ir.timeline import Later, Part, Repeat, Runs, Span
from sim.ir.traffic import Link, Phase, Traffic

MIN_PERIODS = 4
"""Fewest equal groups of calls, one after the other, that are worth looking at."""

MIN_SHARE = 0.1
"""Of the calls of a step: shorter runs of equal groups gain less than they cost."""

MAX_LOOKS = 24
"""How often the whole state is looked at in one run: an end to what is lost where nothing repeats."""

_LAST = 10
"""Priority of a pause within its tick: after all else, the network's last word too."""

_PLAIN = frozenset({str, bytes, float, bool, type(None)})
_FIXED = frozenset({
    Program, World, Communicator, Traffic, Phase, Link, Flow, Segment, Stretch, Plan, Storage, Call, Compute,
    Collective, Send, Recv, Copy, HostCompute, HostWait, Alloc, Free, UseOn, Record, Wait, Mark,
})  # fmt: skip
"""What never changes and lives as long as the run: equal if it is the same object."""

_ASIDE: Mapping[type, frozenset[str]] = {
    Machine: frozenset({"env", "world", "cost", "solo", "replays"}),
    Host: frozenset({
        "spans", "program", "calls", "pause_at", "pause", "_machine", "_prices", "_shared", "_compiled", "_messages",
        "_held_up", "_process", "clock", "streams", "finished",
    }),
    Stream: frozenset({
        "spans", "ends", "first_end", "now", "free", "num_launched", "_wanted", "_env", "_program", "_machine",
        "_copies", "_num_copies",
    }),
    Network: frozenset({
        "_env", "_links", "_flows", "_phases", "_uses", "_shares", "_moved", "_busy", "_counted", "_kind", "_alike",
        "lone", "again",
    }),
    Meetings: frozenset({
        "_env", "_network", "_cost", "_world", "_ranks", "_roles", "_traffic", "lone", "_count", "_open",
    }),
}  # fmt: skip
"""What a walk leaves out: what is only told at the end, what is worked out once and kept, what is looked at apart."""

_LAUNCHES = frozenset({"first", "last", "before", "launch"})
"""Names in the host's suspended functions that number a stream's launches."""


class _State:
    """All that the future depends on, ticks relative to the anchor's clock."""

    def __init__(self, machine: Machine, hosts: Sequence[Host], base: int) -> None:
        self.base = base
        self.tokens: list[object] = []
        self.numbers: list[tuple[object, int]] = []
        """(group, number): all of a group differ alike."""
        self.others: list[int] = []
        """Whole numbers whose meaning is not known: ticks, or what does not change."""
        self._seen: dict[int, int] = {}
        self._past = {host.program.rank: _past(host) for host in hosts}
        self._rank = -1
        for host in hosts:
            self._host(host)
        self._visit(machine)
        network, meetings = machine.network, machine.meetings
        for mask, busy in network._busy.items():
            if busy.num_active:
                self.tokens += (mask, busy.num_active)
                self.others.append(busy.since)
        for (name, role), count in meetings._count.items():
            self.tokens.append(role)
            self.numbers.append((("meetings", name), count))
        for key in sorted(meetings._open):
            self._visit(meetings._open[key])
        queue = machine.env._queue
        self.tokens.append(machine.env.now - base if queue else None)
        for at, priority, _, event in sorted(queue, key=lambda entry: entry[:3]):
            self.tokens += (at - base, priority)
            self._visit(event)

    def _time(self, tick: int, past: int) -> None:
        self.tokens.append(max(tick, past) - self.base)

    def _visit(self, thing: Any) -> None:
        kind = thing.__class__
        tokens = self.tokens
        if kind is int:
            tokens.append(int)
            self.others.append(thing)
        elif kind in _PLAIN:
            tokens.append(thing)
        elif kind in _FIXED or isinstance(thing, type):
            tokens.append(id(thing))
        elif kind is tuple:
            tokens.append(len(thing))
            for part in thing:
                self._visit(part)
        elif kind is Place:
            tokens += (thing.phase, thing.module, thing.position[1])
            self.numbers.append((("calls", self._rank), thing.position[0]))
        elif (number := self._seen.get(id(thing))) is not None:
            tokens += ("seen", number)
        else:
            self._seen[id(thing)] = len(self._seen)
            tokens.append(kind)
            self._new(thing, kind)

    def _new(self, thing: Any, kind: type) -> None:  # noqa: PLR0912 (one case a kind)
        tokens = self.tokens
        if kind is list or kind is deque:
            tokens.append(len(thing))
            for part in thing:
                self._visit(part)
        elif kind is dict:
            tokens.append(len(thing))
            for key, part in thing.items():
                self._visit(key)
                self._visit(part)
        elif kind is Happening:
            if thing.at >= 0:
                self._time(thing.at, self._past.get(self._rank, 0))
            else:
                self._visit(thing._waiters)
        elif kind is Move:
            name = thing.communicator.name if thing.communicator is not None else ""
            self.numbers.append((("meetings", name) if name else (), thing.instance))
            self._attributes(thing, frozenset({"instance"}))
        elif kind is Joint:
            self._meetings(thing.instances)
            self._attributes(thing, frozenset({"instances"}))
        elif kind is Meeting:
            self.numbers.append((("meetings", thing.communicator.name), thing.instance))
            self._attributes(thing, frozenset({"instance"}))
        elif kind is Stream:
            self._attributes(thing, _ASIDE[Stream])
        elif isinstance(thing, simpy.Event):
            self._visit(thing.callbacks)
        elif kind is FunctionType:
            self._function(thing)
        elif kind is MethodType:
            tokens.append(id(thing.__func__))
            self._visit(thing.__self__)
        elif kind is GeneratorType:
            self._generator(thing)
        elif kind is set or kind is frozenset:
            tokens.append(object())  # no order to walk it in: never equal
        else:
            self._attributes(thing, _ASIDE.get(kind, frozenset()))

    def _attributes(self, thing: Any, aside: frozenset[str]) -> None:
        names: Iterable[str] = getattr(thing, "__dict__", ())
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        for name in (*names, *slots):
            if name not in aside and hasattr(thing, name):
                self.tokens.append(name)
                self._visit(getattr(thing, name))

    def _meetings(self, instances: Mapping[str, int]) -> None:
        for name, instance in instances.items():
            self.tokens.append(name)
            self.numbers.append((("meetings", name), instance))

    def _host(self, host: Host) -> None:
        rank = self._rank = host.program.rank
        tokens, past = self.tokens, self._past[rank]
        self._seen[id(host)] = len(self._seen)
        if host.finished and all(stream.finished for stream in host.streams.values()):
            tokens.append("finished")
            return
        calls = host.calls
        self.numbers.append((("calls", rank), calls.at))
        chunk = calls.step[calls.at - 1 + calls.skipped].chunk
        tokens += (host.finished, id(host.program.chunks[chunk]), host.clock - self.base)
        for name, stream in host.streams.items():
            self._seen[id(stream)] = len(self._seen)
            idle = not stream.blocked and not stream.queue
            tokens.append(name)
            self._time(stream.now, host.clock if idle else past)
            # earlier ends are waited for by nobody: the host has got beyond them
            tokens.append(tuple([end - self.base for end in stream.ends[bisect_right(stream.ends, host.clock) :]]))
            launches = ("launches", rank, name)
            self.numbers += (launches, stream.num_launched), (launches, stream.num_ended)
            if stream._known is not None:
                self.numbers.append((launches, stream._wanted))
            self.numbers.append((("copies", rank, name), stream._num_copies))
        self._visit(host._process)
        self._attributes(host, _ASIDE[Host])
        for stream in host.streams.values():
            self._attributes(stream, _ASIDE[Stream])
        self._rank = -1

    def _function(self, thing: Any) -> None:
        """A closure is what it is called with later: its code and what it closes over."""
        self.tokens.append(id(thing.__code__))
        before = self._rank
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        for content in cells:
            if isinstance(content, Stream):
                self._rank = content._program.rank
        for content in (*cells, *(thing.__defaults__ or ())):
            self._visit(content)
        self._rank = before

    def _generator(self, thing: Any) -> None:
        """A suspended function is where it stands and its variables, and likewise what it waits for."""
        while isinstance(thing, GeneratorType) and thing.gi_frame is not None:
            self.tokens += (id(thing.gi_code), thing.gi_frame.f_lasti)
            found = getgeneratorlocals(thing)
            stream = found.get("stream")
            for name, value in found.items():
                if name in ("call", "microbatch"):
                    continue  # what is called was looked at; for which microbatch makes no difference
                self.tokens.append(name)
                if name == "number":
                    self.numbers.append((("calls", self._rank), value))
                elif name == "position":
                    self.tokens.append(value[1])
                    self.numbers.append((("calls", self._rank), value[0]))
                elif name in _LAUNCHES and isinstance(stream, Stream):
                    self.numbers.append((("launches", self._rank, stream.name), value))
                else:
                    self._visit(value)
            thing = thing.gi_yieldfrom

    def shift_from(self, other: _State) -> dict[object, int] | None:
        """Return by how much each group of numbers is ahead of an earlier state's; None if more differs than that."""
        period = self.base - other.base
        if period <= 0 or self.tokens != other.tokens or len(self.numbers) != len(other.numbers):
            return None
        if any(b - a not in (0, period) for a, b in zip(other.others, self.others, strict=True)):
            return None
        shifts: dict[object, int] = {}
        for (group, before), (same, after) in zip(other.numbers, self.numbers, strict=True):
            if group != same or shifts.setdefault(group, after - before) != after - before:
                return None
        return shifts


def _past(host: Host) -> int:
    """Return a tick that nothing the host or its streams will do comes before."""
    working = [stream.now for stream in host.streams.values() if stream.blocked or stream.queue]
    return min(host.clock, *working) if working else host.clock


@dataclass(frozen=True, slots=True)
class _Noted:
    """How much was noted at some moment."""

    now: int
    spans: Mapping[tuple[int, str], int]
    moved: Mapping[Flow, int]
    counted: Mapping[int, int]
    replays: Mapping[Stretch, int]
    num_lone: int

    @classmethod
    def of(cls, machine: Machine, hosts: Sequence[Host]) -> _Noted:
        network = machine.network
        return cls(
            machine.env.now,
            {(host.program.rank, name): len(spans) for host in hosts for name, spans in _all_spans(host)},
            dict(network._moved),
            {key: times for key, (_, times) in network._counted.items()},
            dict(machine.replays),
            len(network.lone),
        )


def _all_spans(host: Host) -> list[tuple[str, list[Any]]]:
    """Return the spans of the host ("") and of its streams, which have names."""
    return [("", host.spans), *((name, stream.spans) for name, stream in host.streams.items())]


@dataclass(frozen=True, slots=True)
class Cut:
    """``times`` periods that were cut out, each like what was noted between ``first`` and ``last``."""

    times: int
    period: int
    shifts: Mapping[object, int]
    finished: frozenset[int]
    first: _Noted
    last: _Noted

    def delay(self, rank: int) -> int:
        """Return by how much later a rank really ends."""
        return 0 if rank in self.finished else self.times * self.period


class Watch:
    """Stops the anchor at calls at which what it does begins anew, and looks whether everything else does too."""

    def __init__(self, machine: Machine, hosts: Sequence[Host]) -> None:
        self.cuts: list[Cut] = []
        self._machine = machine
        self._hosts = hosts
        self._anchor = hosts[0]
        self._regions = deque(_regions([call.chunk for call in self._anchor.program.step]))
        self._pauses = 0
        self._looks = 0
        self._alike: dict[object, int] = {}
        self._look_at = -1
        self._cycle = 0
        self._state: tuple[_State, _Noted] | None = None
        if any(host._shared for host in hosts):
            self._regions.clear()
        self._anchor.pause = self._pause
        self._next()

    def _pause(self) -> None:
        """Go on when all that happens at this tick has happened."""
        env = self._machine.env
        event = env.event()
        event._ok, event._value = True, None
        event.callbacks.append(lambda _: self._resume())
        env.schedule(event, priority=_LAST)

    def _resume(self) -> None:
        self._look()
        self._next()
        self._anchor.go()

    def _next(self) -> None:
        """Choose the next call to stop at."""
        calls = self._anchor.calls
        at = calls.at + calls.skipped  # of the next call
        while self._regions:
            start, end, length = self._regions[0]
            call = start + max(1, -(-(at - start) // length)) * length
            if call <= end - length and self._looks < MAX_LOOKS:
                self._anchor.pause_at = call - calls.skipped
                return
            self._regions.popleft()
            self._alike, self._state, self._look_at = {}, None, -1
        self._anchor.pause_at = -1

    def _look(self) -> None:
        pauses = self._pauses = self._pauses + 1
        if self._state is None:
            alike = self._outside()
            before = self._alike.get(alike)
            self._alike[alike] = pauses
            if before is not None and pauses >= self._look_at:
                self._cycle = pauses - before
                self._look_at = pauses + self._cycle
                self._state = self._full()
        elif pauses == self._look_at:
            state, noted = self._full()
            before_state, before_noted = self._state
            shifts = state.shift_from(before_state)
            self._state = None
            if shifts is not None and before_noted.num_lone == noted.num_lone:
                self._cut(state.base - before_state.base, shifts, before_noted, noted)
            self._look_at = pauses + self._looks  # the less it led to, the later again

    def _full(self) -> tuple[_State, _Noted]:
        self._looks += 1
        return _State(self._machine, self._hosts, self._anchor.clock), _Noted.of(self._machine, self._hosts)

    def _outside(self) -> object:
        """Return what tells most states apart at a glance."""
        base = self._anchor.clock
        return tuple([
            (host.clock - base, [
                (len(stream.queue), stream.blocked, stream.num_launched - stream.num_ended)
                for stream in host.streams.values()
            ].__repr__())
            for host in self._hosts if not host.finished
        ])  # fmt: skip

    def _cut(self, period: int, shifts: Mapping[object, int], first: _Noted, last: _Noted) -> None:
        times = min(_periods_left(host, shifts.get(("calls", host.program.rank), 0)) for host in self._hosts)
        if not 1 <= times < 1 << 60:
            return
        for host in self._hosts:
            host.calls.skipped += times * shifts.get(("calls", host.program.rank), 0)
        finished = frozenset(
            host.program.rank
            for host in self._hosts
            if host.finished and all(stream.finished for stream in host.streams.values())
        )
        self.cuts.append(Cut(times, period, shifts, finished, first, last))

    # --- what came of it ---------------------------------------------------------------------------

    def spans_of(self, host: Host) -> list[Part]:
        """Return the spans of a class, those of all that was cut among them."""
        rank = host.program.rank
        microbatches = tuple([call.microbatch for call in host.program.step])
        return [part for name, spans in _all_spans(host) for part in self._parts(rank, name, spans, 0, 0, microbatches)]

    def runs_of(self, host: Host) -> Runs:
        """Return what was noted around and in each cut, stream by stream."""
        rank = host.program.rank
        cuts = [cut for cut in self.cuts if rank not in cut.finished]
        streams: list[list[Sequence[Span | Repeat]]] = []
        for name, spans in _all_spans(host):
            at = 0
            parts: list[Sequence[Span | Repeat]] = []
            for cut in cuts:
                first, last = cut.first.spans.get((rank, name), 0), cut.last.spans.get((rank, name), 0)
                parts += [spans[at:first], spans[first:last]]
                at = last
            streams.append([*parts, spans[at:]])
        return Runs(tuple((cut.times, cut.period) for cut in cuts), streams)

    def _parts(
        self, rank: int, name: str, spans: Sequence[Span | Repeat], start: int, nth: int, microbatches: Sequence[int]
    ) -> list[Part]:
        """Return what was noted from ``start`` on, when it would have been noted without the cuts from ``nth`` on."""
        if nth == len(self.cuts):
            return list(spans[start:])
        cut = self.cuts[nth]
        first, last = cut.first.spans.get((rank, name), 0), cut.last.spans.get((rank, name), 0)
        if rank in cut.finished:
            return list(spans[start:])
        after = self._parts(rank, name, spans, last, nth + 1, microbatches)
        meetings = {group[1]: shift for group, shift in cut.shifts.items() if group and group[0] == "meetings"}  # type: ignore[index]
        meetings[""] = cut.shifts.get(("copies", rank, name), 0)
        how = (cut.period, cut.shifts.get(("calls", rank), 0), meetings, microbatches)
        found: list[Part] = list(spans[start:last])
        if last > first:
            found.append(Later(spans[first:last], range(1, cut.times + 1), *how, again=True))
        if after:
            found.append(Later(after, range(cut.times, cut.times + 1), *how, again=False))
        return found

    def count(self) -> None:
        """Tell network and machine of all that was cut."""
        network, replays = self._machine.network, self._machine.replays
        for cut in self.cuts:
            first, last = cut.first, cut.last
            for flow, times in last.moved.items():
                network._moved[flow] += cut.times * (times - first.moved.get(flow, 0))
            for key, times in last.counted.items():
                traffic, so_far = network._counted[key]
                network._counted[key] = traffic, so_far + cut.times * (times - first.counted.get(key, 0))
            for stretch, times in last.replays.items():
                replays[stretch] += cut.times * (times - first.replays.get(stretch, 0))
            network.again.append((first.now, last.now, cut.times))


def _periods_left(host: Host, calls: int) -> int:
    """Return for how many more groups of so many calls a host calls the chunks of the last one."""
    if not calls:
        return 1 << 60
    step = host.program.step
    first = at = host.calls.at + host.calls.skipped
    chunks = host.program.chunks
    while at < len(step) and chunks[step[at].chunk] is chunks[step[at - calls].chunk]:
        at += 1
    return (at - first) // calls


def _regions(names: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return where groups of calls repeat: (first call, end, calls of a group), ascending."""
    following: list[int] = [-1] * len(names)
    latest: dict[str, int] = {}
    for at in range(len(names) - 1, -1, -1):
        following[at] = latest.get(names[at], -1)
        latest[names[at]] = at
    found: list[tuple[int, int, int]] = []
    start = 0
    while start < len(names):
        after = following[start]
        end = start
        for _ in range(64):  # occurrences in one group: beyond that it would not pay
            if after < 0:
                break
            length = after - start
            end = after
            while end < len(names) and names[end] == names[end - length]:
                end += 1
            if end - start >= max(MIN_PERIODS * length, MIN_SHARE * len(names)):
                found.append((start, end, length))
                break
            after, end = following[after], start
        start = max(end, start + 1)
    return found


def watch(machine: Machine, hosts: Sequence[Host]) -> Watch | None:
    """Return who watches a run, if there is anything in it to look for."""
    found = Watch(machine, hosts)
    return found if found._regions else None
