"""The thread that issues: it walks the program in issue order and pays for each launch.

Nothing that a GPU does changes what the host issues; only when. It depends on the GPU in two places: an event that it
waits for, and a full launch queue. Between them the host runs ahead of the simulation's clock on a clock of its own and
puts items into the queues with the tick at which it issues them, so that issuing costs no events.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence

from sim.engine.beside import durations_beside
from sim.engine.segments import (
    LAUNCH_QUEUE_DEPTH,
    BundledChunk,
    Prices,
    Segment,
    Stretch,
    bundle,
    compile_chunk,
    shared_storages,
)
from sim.engine.stream import Await, Happening, Joint, Machine, Move, Place, Process, Reach, Run, Stream
from sim.ir.program import (
    HOST,
    Alloc,
    Call,
    Collective,
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
)
from sim.ir.timeline import Position, Release, Span
from sim.ir.traffic import Traffic
from sim.units import Ticks, ticks


class Calls:
    """The calls of a step as a host takes them, one after the other; ``skipped`` of them were cut out (``steady``)."""

    __slots__ = ("at", "skipped", "step")

    def __init__(self, step: Sequence[Call]) -> None:
        self.step = step
        self.at = 0
        self.skipped = 0

    def __iter__(self) -> Iterator[tuple[int, Call]]:
        """Yield (number, call): the number as if nothing had been cut out."""
        step = self.step
        while self.at + self.skipped < len(step):
            number = self.at
            self.at = number + 1
            yield number, step[number + self.skipped]


class Host:
    """The host thread of the representative of one class.

    ``clock``      when it got through with its last instruction; never behind the simulation's own while it runs
    ``waits_for``  what holds it up, in words
    ``pause_at``   number of the call before which ``pause`` is called; whoever paused the host calls ``go``
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self.clock = 0
        self.spans: list[Span] = []
        self.streams: dict[str, Stream] = {}
        self.waits_for = ""
        self.program = program
        self.finished = False
        self.calls = Calls(program.step)
        self.pause_at = -1
        self.pause: Callable[[], None] | None = None
        self._machine = machine
        self._process = self._issue_all()
        self._prices = Prices(machine.cost, program.rank)
        self._shared = shared_storages(program)
        self._compiled: dict[int, BundledChunk] = {}
        self._held_up = frozenset() if self._shared else self._waiting_streams()
        self._messages: dict[Stretch, list[tuple[str, int]]] = {}
        """Of each stretch, how many transfers on which communicator."""
        self._recorded: dict[str, Happening] = {}
        self._issued_at: list[int] = []
        """Ticks at which the host got through with each step that takes time; ascending."""
        self._issued: list[tuple[int, int, Segment | None, int | list[int]]] = []
        """(call, index into the chunk, its segment if it is one, when its kernels were issued), likewise."""
        self._used_on: dict[tuple[Storage, int], dict[str, None]] = {}
        self._freed: list[tuple[Position, int, list[Happening]]] = []

    def _chunk(self, name: str) -> BundledChunk:
        chunk = self.program.chunks[name]
        found = self._compiled.get(id(chunk))
        if found is None:
            machine, prices = self._machine, self._prices
            beside = durations_beside(chunk, prices.alone, self._traffic_of, machine.cost, self.program.rank)
            steps: BundledChunk = compile_chunk(chunk, prices, self._shared, beside)
            if not self._shared:  # else every tick at which the host issues counts (releases)
                steps = bundle(steps, self._solo, self._prices.issue, self._held_up)  # type: ignore[arg-type]
            found = self._compiled[id(chunk)] = steps
        return found

    def _waiting_streams(self) -> frozenset[str]:
        """Return the streams with transfers that others can hold up."""
        names = dict.fromkeys(call.chunk for call in self.program.step)
        chunks = {id(chunk): chunk for chunk in (self.program.chunks[name] for name in names)}
        moves = (Collective, Send, Recv, Copy)
        return frozenset(
            step.stream
            for chunk in chunks.values()
            for step in chunk
            if isinstance(step, moves) and (self.program.rank, id(step)) not in self._machine.solo
        )

    def _traffic_of(self, message: Collective) -> Traffic | None:
        machine = self._machine
        communicator = machine.world.communicators[self.program.axes[message.axis]]
        return None if communicator.num_ranks == 1 else machine.meetings.traffic_of(message, communicator)

    def _solo(self, message: Collective) -> int:
        found = self._machine.solo.get((self.program.rank, id(message)))
        return -1 if found is None else found[0]

    def _stream(self, name: str) -> Stream:
        found = self.streams.get(name)
        if found is None:
            found = self.streams[name] = Stream(name, self.program, self._machine)
        return found

    def go(self) -> None:
        """Issue until something holds the host up; whatever that is calls this again."""
        next(self._process, None)

    def _issue_all(self) -> Process:
        phase = module = ""
        for number, call in self.calls:
            if number == self.pause_at:
                assert self.pause is not None
                self.pause()
                yield
            microbatch = call.microbatch
            for index, step in self._chunk(call.chunk):
                if isinstance(step, Segment):
                    yield from self._launch(step, Place(phase, module, microbatch, (number, index)))
                elif isinstance(step, Stretch):
                    place = Place(phase, module, microbatch, (number, index))
                    if not (yield from self._joint(step, place)):
                        yield from self._one_by_one(step, place)
                    phase, module = (phase, module) if step.last_mark is None else step.last_mark
                elif isinstance(step, (Record, Wait)):
                    self._event(step)
                elif isinstance(step, Mark):
                    phase, module = step.phase, step.module
                elif isinstance(step, HostWait):
                    yield from self._wait(step, (number, index))
                elif isinstance(step, HostCompute):
                    self._compute(step, Place(phase, module, microbatch, (number, index)))
                elif isinstance(step, (Alloc, Free, UseOn)):
                    self._life(step, microbatch, (number, index))
                else:
                    yield from self._transfer(step, Place(phase, module, microbatch, (number, index)))
        self.finished = True

    def _event(self, step: Record | Wait) -> None:
        if isinstance(step, Record):
            happening = self._recorded[step.event] = Happening()
            self._stream(step.stream).put(Reach(happening, self.clock))
        elif (awaited := self._recorded.get(step.event)) is not None:
            self._stream(step.stream).put(Await(awaited, self.clock))

    def _one_by_one(self, stretch: Stretch, place: Place) -> Process:
        """Issue the steps of a stretch as if they were no stretch."""
        phase, module = place.phase, place.module
        for index, step in stretch.steps:
            where = Place(phase, module, place.microbatch, (place.position[0], index))
            if isinstance(step, Segment):
                yield from self._launch(step, where)
            elif isinstance(step, (Record, Wait)):
                self._event(step)
            elif isinstance(step, Mark):
                phase, module = step.phase, step.module
            elif isinstance(step, Collective):
                yield from self._transfer(step, where)
            else:
                raise AssertionError(f"{step} is no step of a stretch")

    def _joint(self, stretch: Stretch, place: Place) -> Generator[None, None, bool]:
        """Put a stretch into all its streams at once; False: it has to be issued step by step.

        The queue of the base may hold the host up: what the stretch's launches wait for there ends before the stretch
        begins. If another stream's may, nothing can be said beforehand.
        """
        streams = {name: self._stream(name) for name in stretch.streams}
        clock = self.clock
        held = False
        for name, launches in stretch.launches.items():
            stream = streams[name]
            last = stream.num_launched + len(launches) - 1 - LAUNCH_QUEUE_DEPTH
            if last < 0:
                continue
            if last >= stream.num_ended:
                if name != stretch.base or last >= stream.num_launched:
                    return False
                yield from self._slot(stream, last)
            held = held or stream.end_of(last) > clock
        issued: dict[str, list[int]] = {}
        clocks: list[int] = []
        in_time = clock
        if held:
            for name, launches in stretch.launches.items():
                last = streams[name].num_launched + len(launches) - 1 - LAUNCH_QUEUE_DEPTH
                if last >= 0:
                    in_time = max(in_time, streams[name].end_of(last))
            self._issue(stretch, streams, issued, clocks)
        else:
            self.clock = clock + stretch.host
        instances = self._instances(stretch) if stretch.messages else {}
        recorded = self._recorded
        outputs = {event: Happening() for event in stretch.ahead.outputs}
        inputs = {event: recorded[event] for event in stretch.ahead.inputs if event in recorded}
        joint = Joint(stretch, clock, in_time, issued, clocks, place, inputs, outputs, streams, instances)
        recorded.update(outputs)
        for name, launches in stretch.launches.items():
            streams[name].num_launched += len(launches)
        for name in reversed(tuple(stretch.streams)):  # the base, which has the last word, comes last
            streams[name].put(joint)
        return True

    def _instances(self, stretch: Stretch) -> dict[str, int]:
        """Return the number of the first meeting of a stretch on each communicator."""
        counts = self._messages.get(stretch)
        if counts is None:
            names = [self.program.axes[message.axis] for message in stretch.messages]
            counts = self._messages[stretch] = [(name, names.count(name)) for name in dict.fromkeys(names)]
        return self._machine.meetings.numbers(self.program, counts)

    def count_replays(self) -> None:
        """Tell the network of the transfers in stretches that went as planned."""
        for stretch in self._messages:
            times = self._machine.replays.get(stretch, 0)
            for message in stretch.messages if times else ():
                self._machine.network.count(self._machine.solo[self.program.rank, id(message)][1], times)

    def _issue(
        self, stretch: Stretch, streams: dict[str, Stream], issued: dict[str, list[int]], clocks: list[int]
    ) -> None:
        """Note when the host issues each launch and gets through with each step, full queues and all."""
        clock = self.clock
        next_launch = {name: streams[name].num_launched - LAUNCH_QUEUE_DEPTH for name in stretch.launches}
        for name in stretch.launches:
            issued[name] = []
        for _, step in stretch.steps:
            if isinstance(step, Segment):
                stream, at, paid = streams[step.stream], issued[step.stream], 0
                ends, first = stream.ends, stream.first_end
                for before, (_, offset, _) in enumerate(step.kernels, next_launch[step.stream]):
                    clock += offset - paid
                    paid = offset
                    if before >= 0 and ends[before - first] > clock:
                        clock = ends[before - first]
                    at.append(clock)
                next_launch[step.stream] += len(step.kernels)
            elif isinstance(step, Collective):
                before = next_launch[step.stream]
                next_launch[step.stream] = before + 1
                clock += self._prices.issue(step)
                if before >= 0:
                    clock = max(clock, streams[step.stream].end_of(before))
                issued[step.stream].append(clock)
            clocks.append(clock)
        self.clock = clock

    def _launch(self, segment: Segment, place: Place) -> Process:
        stream = self._stream(segment.stream)
        first = stream.num_launched
        stream.num_launched = first + len(segment.kernels)
        last = stream.num_launched - 1 - LAUNCH_QUEUE_DEPTH  # the launch that must end before the segment's last one
        issued: int | list[int] = self.clock
        if last < 0 or (last < stream.num_ended and stream.end_of(last) <= self.clock):
            self.clock += segment.host
        else:
            issued, paid, clock = [], 0, self.clock
            for before, (_, offset, _) in enumerate(segment.kernels, first - LAUNCH_QUEUE_DEPTH):
                clock += offset - paid
                paid = offset
                if before >= 0:
                    if before >= stream.num_ended:
                        yield from self._slot(stream, before)
                    clock = max(clock, stream.end_of(before))
                issued.append(clock)
            self.clock = clock
        stream.put(Run(segment, issued, place))
        self._note(place.position, segment, issued)

    def _transfer(self, message: Collective | Send | Recv | Copy, place: Place) -> Process:
        stream = self._stream(message.stream)
        before = stream.num_launched - LAUNCH_QUEUE_DEPTH
        stream.num_launched += 1
        self.clock += self._prices.issue(message)
        if before >= 0:
            if before >= stream.num_ended:
                yield from self._slot(stream, before)
            self.clock = max(self.clock, stream.end_of(before))
        if isinstance(message, Copy):
            stream.put(Move(message, self.clock, place))
        else:
            machine = self._machine
            communicator = machine.world.communicators[self.program.axes[message.axis]]
            instance = machine.meetings.number(communicator, self.program, message)
            duration = self._solo(message) if isinstance(message, Collective) else -1
            stream.put(Move(message, self.clock, place, communicator, instance, duration))
        self._note(place.position)

    def _slot(self, stream: Stream, launch: int) -> Process:
        self.waits_for = f"room in the launch queue of stream {stream.name}"
        if launch >= stream.num_ended:
            stream.when_known(launch, self.go)
            yield
        self.waits_for = ""

    def _wait(self, step: HostWait, position: Position) -> Process:
        happening = self._recorded.get(step.event)
        if happening is None:
            return
        if happening.at < 0:
            self.waits_for = f"event '{step.event}'"
            happening.then(self.go)
            yield
            self.waits_for = ""
        if happening.at > self.clock:
            self.clock = happening.at + self._prices.wait
        self._note(position)

    def _compute(self, work: HostCompute, place: Place) -> None:
        start = self.clock
        self.clock += ticks(self._machine.cost.host_s(work, self.program.ranks))
        self.spans.append(
            Span(
                self.program.rank,
                HOST,
                "host",
                work.op,
                Ticks(start),
                Ticks(self.clock),
                place.phase,
                place.module,
                place.microbatch,
                place.position,
            )
        )
        self._note(place.position)

    def _note(self, position: Position, segment: Segment | None = None, issued: int | list[int] = 0) -> None:
        if not self._shared:
            return
        self._issued_at.append(self.clock)
        self._issued.append((*position, segment, issued))

    def held_up(self) -> str:
        return f"the host of rank {self.program.rank} waits for {self.waits_for}"

    # --- blocks used on several streams ----------------------------------------------------------

    def _life(self, step: Alloc | Free | UseOn, microbatch: int, position: Position) -> None:
        storage = step.storage
        key = (storage, microbatch if storage.per_microbatch else 0)
        if isinstance(step, UseOn):
            self._used_on.setdefault(key, {}).setdefault(step.stream)
            return
        used_on = self._used_on.pop(key, None)
        if used_on and isinstance(step, Free):
            # as the allocator does: an event on each of these streams (CUDACachingAllocator.cpp, insert_events)
            happenings = []
            for name in used_on:
                happening = Happening()
                self._stream(name).put(Reach(happening, self.clock))
                happenings.append(happening)
            self._freed.append((position, self.clock, happenings))

    def releases(self) -> list[Release]:
        """Return, once all is done, the blocks that another stream still used when they were freed.

        A block that is used beyond the last instruction of the step is reusable from the next step's first on:
        position (number of calls, 0).
        """
        found = []
        for freed_at, at, happenings in self._freed:
            drained = max(happening.at for happening in happenings)
            if drained > at:
                found.append(Release(self.program.rank, freed_at, self._position_at(drained)))
        return found

    def _position_at(self, tick: int) -> Position:
        """Return the position of the first instruction issued at that tick or later."""
        at = bisect_left(self._issued_at, tick)
        if at == len(self._issued_at):
            return (len(self.program.step), 0)
        call, index, segment, issued = self._issued[at]
        if segment is not None:
            for k, (kernel, offset, _) in enumerate(segment.kernels):
                if (issued + offset if isinstance(issued, int) else issued[k]) >= tick:
                    return (call, kernel)
        return (call, index)
