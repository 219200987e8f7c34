"""One stream of a GPU is an in-order queue: what it does next begins when the last ended and the host has issued it.

The host puts items into it with the tick at which it issued each. What depends on nothing but the stream itself, and on
events whose ticks are known, is worked out at once, ahead of the simulation's clock; a stream waits for the clock only
where it meets other ranks or shares links, and what comes behind that waits in its queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sim.engine.cost import Cost
from sim.engine.network import Network
from sim.engine.rendezvous import Meeting, Meetings, Moved, kind_of
from sim.engine.segments import Plan, Segment, Stretch, execute
from sim.ir.program import Collective, Communicator, Copy, Mark, Program, Record, Recv, Send, Wait, World
from sim.ir.timeline import Pattern, PatternSpan, Position, Repeat, Span, SpanKind, Transfer
from sim.ir.traffic import Traffic
from sim.units import Ticks

Process = Generator[None, None, None]

KEPT_ENDS = 8192
"""Ends of launches that a stream remembers at least half of: far more than a launch queue holds."""


class Happening:
    """One recording of an event: ``at`` is the tick at which the stream reaches it, -1 as long as that is not known."""

    __slots__ = ("_waiters", "at")

    def __init__(self) -> None:
        self.at = -1
        self._waiters: list[Callable[[], None]] | None = None

    def then(self, what: Callable[[], None]) -> None:
        """Call ``what`` as soon as the tick is known; only before it is."""
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(what)

    def happen(self, at: int) -> None:
        self.at = at
        if self._waiters is not None:
            waiters, self._waiters = self._waiters, None
            for waiter in waiters:
                waiter()


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the program an item comes from, for its span."""

    phase: str
    module: str
    microbatch: int
    position: Position


# --- what a queue holds; ``at`` is when the host issued it ---------------------------------------


@dataclass(slots=True)
class Run:
    """A segment, issued from ``issued`` on, or kernel by kernel where the queue was full."""

    segment: Segment
    issued: int | Sequence[int]
    place: Place


@dataclass(slots=True)
class Move:
    """A transfer; ``instance`` is the number of its meeting on ``communicator``. A copy meets nobody.

    ``duration``: what it takes if nothing else can slow it down; else -1.
    """

    message: Collective | Send | Recv | Copy
    at: int
    place: Place
    communicator: Communicator | None = None
    instance: int = 0
    duration: int = -1


@dataclass(slots=True)
class Reach:
    """An event that happens when the stream gets here."""

    happening: Happening
    at: int


@dataclass(slots=True)
class Await:
    """The stream goes on when that has happened."""

    happening: Happening
    at: int


@dataclass(slots=True, eq=False)
class Joint:
    """A stretch in the queues of all its streams: it goes as worked out beforehand if all get there in time.

    ``begun``       when the host began to issue it
    ``in_time``     latest tick from which on the host may have been held up by full queues
    ``issued``      for each stream when the host issued each launch; empty if nothing held it up, as ``clocks`` is:
                    when it got through with each step
    ``instances``   the number of the first meeting on each communicator
    ``apart``       its items for each stream, once it was found that it has to be taken apart
    """

    stretch: Stretch
    begun: int
    in_time: int
    issued: Mapping[str, Sequence[int]]
    clocks: Sequence[int]
    place: Place
    inputs: dict[str, Happening]
    outputs: dict[str, Happening]
    streams: dict[str, Stream]
    instances: dict[str, int]
    apart: dict[str, list[Item]] | None = None


Item = Run | Move | Reach | Await | Joint


@dataclass(frozen=True, slots=True)
class Machine:
    """What all streams share.

    ``solo``     ticks of the transfers that nothing can slow down, by (rank, message's id)
    ``replays``  how often each stretch went as planned
    """

    env: Any
    world: World
    cost: Cost
    network: Network
    meetings: Meetings
    solo: Mapping[tuple[int, int], Moved] = field(default_factory=dict)
    replays: dict[Stretch, int] = field(default_factory=dict)


class Stream:
    """An in-order stream of the representative of one class. It comes into being when the host first uses it.

    ``num_launched``  launches the host has put into it
    ``num_ended``     launches whose end is known; ``end_of`` tells the latest of them
    ``now``           how far it is worked out
    ``free``          when it finished its last item
    ``blocked``       what follows waits for something whose tick is not known yet
    """

    def __init__(self, name: str, program: Program, machine: Machine) -> None:
        self.name = name
        self.num_launched = 0
        self.ends: list[int] = []
        self.first_end = 0
        self.now = 0
        self.free = 0
        self.blocked = False
        self.held: Joint | None = None
        self.spans: list[Span | Repeat] = []
        self.queue: deque[Item] = deque()
        self._env = machine.env
        self._program = program
        self._machine = machine
        self._running = False
        self._wanted = -1
        self._known: Callable[[], None] | None = None
        self._num_copies = 0
        self._copies: dict[int, Traffic] = {}

    @property
    def finished(self) -> bool:
        return not self.blocked and not self.queue

    @property
    def num_ended(self) -> int:
        return self.first_end + len(self.ends)

    def end_of(self, launch: int) -> int:
        return self.ends[launch - self.first_end]

    def put(self, item: Item) -> None:
        """Append an item, and work out what can be."""
        self.queue.append(item)
        if not self.blocked and not self._running:
            self.drain()

    def when_known(self, launch: int, then: Callable[[], None]) -> None:
        """Call ``then`` when the end of that launch is known; only before it is."""
        self._wanted, self._known = launch, then

    def tell(self) -> None:
        """Wake whoever waits for an end that is known by now."""
        ends = self.ends
        if len(ends) > KEPT_ENDS:
            self.first_end += KEPT_ENDS // 2
            del ends[: KEPT_ENDS // 2]
        if self._known is not None and self.num_ended > self._wanted:
            known, self._known = self._known, None
            known()

    def unblock(self) -> None:
        self.blocked = False
        self.drain()

    def drain(self) -> None:
        """Work out what is in the queue, up to the first item whose tick cannot be known yet."""
        if self._running:
            return
        self._running = True
        queue = self.queue
        while queue and not self.blocked:
            item = queue.popleft()
            if isinstance(item, Run):
                done = execute(item.segment, self.now, item.issued, self.ends)
                self.now = done[-1][2]
                self._note("compute", item.segment.name, done[0][1], item.place, kernels=done)
                self.tell()
                continue
            if isinstance(item, Joint):
                self._joint(item)
                continue
            self.now = max(self.now, item.at)
            if isinstance(item, Reach):
                item.happening.happen(self.now)
            elif isinstance(item, Await):
                at = item.happening.at
                if at < 0:
                    self.blocked = True
                    item.happening.then(lambda awaited=item.happening: self._awaited(awaited))  # type: ignore[misc]
                elif at > self.now:
                    self.now = at
            else:
                self._move(item)
        self._running = False

    def _awaited(self, happening: Happening) -> None:
        self.now = max(self.now, happening.at)
        self.unblock()

    # --- stretches -------------------------------------------------------------------------------

    def _joint(self, joint: Joint) -> None:
        """Go through a stretch if this is its base, else wait for the base to do so."""
        if joint.apart is not None:
            self.queue.extendleft(reversed(joint.apart[self.name]))
        elif joint.stretch.base != self.name:
            self.blocked, self.held = True, joint
        elif (planned := _plan_of(joint, self.now)) is not None:
            self._replay(joint, *planned)
        else:
            joint.apart = _taken_apart(joint, self._program, self._machine)
            self.queue.extendleft(reversed(joint.apart[self.name]))
            for side in joint.streams.values():
                if side.held is joint:
                    side.held = None
                    side.queue.extendleft(reversed(joint.apart[side.name]))
                    side.unblock()

    def _replay(self, joint: Joint, plan: Plan, origin: int) -> None:
        touched = joint.streams.values()
        spans = _pattern(joint, plan, self._program, self._machine)
        for stream in touched:
            name = stream.name
            stream.now = origin + plan.now[name]
            if name in plan.free:
                stream.free = origin + plan.free[name]
                stream.ends.extend([origin + end for end in plan.ends[name]])
                place = joint.place
                stream.spans.append(Repeat(spans[name], origin, place.microbatch, place.position[0], joint.instances))
            stream.held = None
        if joint.stretch.messages:
            replays = self._machine.replays
            replays[joint.stretch] = replays.get(joint.stretch, 0) + 1
        for event, at in plan.outputs.items():
            joint.outputs[event].happen(origin + at)
        for stream in touched:
            stream.tell()
            if stream is not self:
                stream.unblock()

    # --- transfers -------------------------------------------------------------------------------

    def _move(self, item: Move) -> None:
        communicator = item.communicator
        if item.duration >= 0:
            start = self.now
            traffic = self._machine.solo[self._program.rank, id(item.message)][1]
            self._machine.network.count(traffic)
            self.now += item.duration
            self._moved(item, start, start, traffic)
        elif communicator is not None and communicator.num_ranks == 1:  # nobody to meet
            self._moved(item, self.now, self.now, None)
        else:
            self.blocked = True
            start = self.now
            if start > self._env.now:
                self._env.timeout(start - self._env.now).callbacks.append(lambda _: self._start(item, start))
            else:
                assert start == self._env.now, "what begins now was known before"
                self._start(item, start)

    def _start(self, item: Move, start: int) -> None:
        if isinstance(item.message, Copy):
            traffic = self._copy_traffic(item.message)
            self._machine.network.start(traffic).callbacks.append(lambda _: self._arrived(item, start, start, traffic))
            return
        assert item.communicator is not None
        meeting: Meeting = self._machine.meetings.arrive(item.communicator, self._program, item.message, item.instance)
        meeting.done.callbacks.append(lambda _: self._arrived(item, start, meeting.start, meeting.traffic))

    def _copy_traffic(self, copy: Copy) -> Traffic:
        traffic = self._copies.get(id(copy))
        if traffic is None:
            traffic = self._copies[id(copy)] = self._machine.cost.copy(copy, self._program.ranks)
        return traffic

    def _arrived(self, item: Move, start: int, began: int, traffic: Traffic | None) -> None:
        self.now = self._env.now
        self._running = True  # so that whoever is told does not overtake
        self.blocked = False
        self._moved(item, start, began, traffic)
        self._running = False
        self.drain()

    def _moved(self, item: Move, start: int, began: int, traffic: Traffic | None) -> None:
        """Note the end of a transfer."""
        message = item.message
        if isinstance(message, Copy):
            kind: SpanKind = "copy"
            instance = self._num_copies
            self._num_copies += 1
        else:
            kind = "send" if isinstance(message, Send) else "recv" if isinstance(message, Recv) else "collective"
            instance = item.instance
        transfer = transfer_of(message, item.communicator, traffic, instance, began)
        self._note(kind, message.name, start, item.place, transfer=transfer)
        self.ends.append(self.now)
        self.tell()

    def _note(
        self,
        kind: SpanKind,
        name: str,
        start: int,
        place: Place,
        *,
        kernels: tuple[tuple[int, Ticks, Ticks], ...] = (),
        transfer: Transfer | None = None,
    ) -> None:
        self.free = self.now
        self.spans.append(
            Span(
                self._program.rank,
                self.name,
                kind,
                name,
                Ticks(start),
                Ticks(self.now),
                place.phase,
                place.module,
                place.microbatch,
                place.position,
                kernels,
                transfer,
            )
        )


def transfer_of(
    message: Collective | Send | Recv | Copy,
    communicator: Communicator | None,
    traffic: Traffic | None,
    instance: int,
    began: int,
) -> Transfer:
    """Return what a span says of a transfer."""
    wire_bytes, algorithm = (traffic.wire_bytes, traffic.algorithm) if traffic is not None else (0, "none")
    start = Ticks(began)
    if isinstance(message, Copy):
        return Transfer(message.direction, "", 1, message.num_bytes, wire_bytes, algorithm, instance, start)
    assert communicator is not None
    axis, num_ranks, name = communicator.axis, communicator.num_ranks, communicator.name
    kind = kind_of(message)
    return Transfer(kind, axis, num_ranks, message.tensor_bytes, wire_bytes, algorithm, instance, start, name)


# --- stretches -------------------------------------------------------------------------------------


def _plan_of(joint: Joint, base: int) -> tuple[Plan, int] | None:
    """Return which plan of a stretch holds, and its origin, now that its base got there; None if neither does."""
    stretch = joint.stretch
    if joint.in_time <= base + stretch.slack:
        plan, origin = stretch.ahead, base
    elif not joint.issued:
        plan, origin = stretch.behind, joint.begun
        if base > origin + plan.latest[stretch.base]:
            return None
    else:
        return None
    for event, latest in plan.inputs.items():
        happening = joint.inputs.get(event)
        if happening is not None and not 0 <= happening.at <= origin + latest:
            return None
    for name, side in joint.streams.items():
        if name != stretch.base and (side.held is not joint or side.now > origin + plan.latest[name]):
            return None
    return plan, origin


def _taken_apart(joint: Joint, program: Program, machine: Machine) -> dict[str, list[Item]]:
    """Return the items of a stretch for each of its streams, as the host would have put them there one by one."""
    stretch, place = joint.stretch, joint.place
    items: dict[str, list[Item]] = {name: [] for name in stretch.streams}
    recorded = dict(joint.inputs)
    last = {step.event: at for at, (_, step) in enumerate(stretch.steps) if isinstance(step, Record)}
    instances = dict(joint.instances)
    used = dict.fromkeys(stretch.launches, 0)
    phase, module = place.phase, place.module
    clocks = joint.clocks or [joint.begun + clock for clock in stretch.clocks]
    for at, ((index, step), clock) in enumerate(zip(stretch.steps, clocks, strict=True)):
        where = Place(phase, module, place.microbatch, (place.position[0], index))
        if isinstance(step, Segment):
            first = used[step.stream]
            used[step.stream] = first + len(step.kernels)
            issued: int | Sequence[int] = clock - step.host
            if joint.issued:
                issued = joint.issued[step.stream][first : first + len(step.kernels)]
            items[step.stream].append(Run(step, issued, where))
        elif isinstance(step, Collective):
            used[step.stream] += 1
            duration = machine.solo[program.rank, id(step)][0]
            name = program.axes[step.axis]
            communicator = machine.world.communicators[name]
            items[step.stream].append(Move(step, clock, where, communicator, instances[name], duration))
            instances[name] += 1
        elif isinstance(step, Record):
            happening = joint.outputs[step.event] if last[step.event] == at else Happening()
            recorded[step.event] = happening
            items[step.stream].append(Reach(happening, clock))
        elif isinstance(step, Wait):
            if (awaited := recorded.get(step.event)) is not None:
                items[step.stream].append(Await(awaited, clock))
        elif isinstance(step, Mark):
            phase, module = step.phase, step.module
    return items


def _pattern(joint: Joint, plan: Plan, program: Program, machine: Machine) -> Mapping[str, Pattern]:
    """Return the spans of a stretch, for each stream, from tick 0 on; worked out once for each mark it begins under."""
    place = joint.place
    key = (place.phase, place.module)
    found = plan.patterns.get(key)
    if found is None:
        by_stream: dict[str, list[PatternSpan]] = {}
        counts: dict[str, int] = {}
        for stream, index, step, start, end, kernels, mark in plan.work:
            phase, module = (mark.phase, mark.module) if mark is not None else key
            kind: SpanKind = "compute"
            name, nth, transfer = "", 0, None
            if isinstance(step, Collective):
                kind, name = "collective", program.axes[step.axis]
                nth = counts.get(name, 0)
                counts[name] = nth + 1
                traffic = machine.solo[program.rank, id(step)][1]
                transfer = transfer_of(step, machine.world.communicators[name], traffic, 0, start)
            done = cast("tuple[tuple[int, Ticks, Ticks], ...]", kernels)
            where = (phase, module, 0, (0, index))
            span = Span(program.rank, stream, kind, step.name, Ticks(start), Ticks(end), *where, done, transfer)
            by_stream.setdefault(stream, []).append((span, name, nth))
        found = plan.patterns[key] = {stream: tuple(spans) for stream, spans in by_stream.items()}
    return found
