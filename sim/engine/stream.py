"""One generator is one in-order stream of a GPU.

The host puts items into its queue with the tick at which it issued each; the stream takes one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from sim.engine.cost import Cost
from sim.engine.network import Network
from sim.engine.rendezvous import Meetings, kind_of
from sim.engine.segments import Segment, execute
from sim.ir.program import Collective, Communicator, Copy, Program, Recv, Send, World
from sim.ir.timeline import Position, Span, SpanKind, Transfer
from sim.ir.traffic import Traffic
from sim.units import Ticks

Process = Generator[Any, Any, None]


class Happening:
    """One recording of an event: ``at`` is the tick at which the stream reached it, -1 before."""

    __slots__ = ("_waiters", "at")

    def __init__(self) -> None:
        self.at = -1
        self._waiters: Any = None

    def wait(self, env: Any) -> Any:
        """Return what to yield for it; only before it has happened."""
        if self._waiters is None:
            self._waiters = env.event()
        return self._waiters

    def happen(self, now: int) -> None:
        self.at = now
        if self._waiters is not None:
            self._waiters.succeed()


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
    """A transfer; ``instance`` is the number of its meeting on ``communicator``. A copy meets nobody."""

    message: Collective | Send | Recv | Copy
    at: int
    place: Place
    communicator: Communicator | None = None
    instance: int = 0


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


Item = Run | Move | Reach | Await


@dataclass(frozen=True, slots=True)
class Machine:
    """What all streams share."""

    env: Any
    world: World
    cost: Cost
    network: Network
    meetings: Meetings


class Stream:
    """An in-order stream of the representative of one class. It comes into being when the host first uses it.

    ``num_launched``  launches the host has put into it
    ``ends``          the end of each launch as far as it is known: of kernels, from the moment their segment starts
    ``free``          when it finished its last item
    """

    def __init__(self, name: str, program: Program, machine: Machine) -> None:
        self.name = name
        self.num_launched = 0
        self.ends: list[int] = []
        self.free = 0
        self.spans: list[Span] = []
        self._env = machine.env
        self._program = program
        self._machine = machine
        self._queue: deque[Item | None] = deque()
        self._idle: Any = None
        self._wanted = -1
        self._known: Any = None
        self._num_copies = 0
        self._copies: dict[int, Traffic] = {}
        self._process = machine.env.process(self.process())

    @property
    def finished(self) -> bool:
        return not self._process.is_alive

    def put(self, item: Item | None) -> None:
        """Append an item; None ends the stream."""
        self._queue.append(item)
        if self._idle is not None:
            idle, self._idle = self._idle, None
            idle.succeed()

    def end_known(self, launch: int) -> Any:
        """Return what to yield until the end of that launch is known; only before it is."""
        self._wanted, self._known = launch, self._env.event()
        return self._known

    def _tell(self) -> None:
        if self._known is not None and len(self.ends) > self._wanted:
            known, self._known = self._known, None
            known.succeed()

    def process(self) -> Process:
        env, queue = self._env, self._queue
        while True:
            if not queue:
                self._idle = env.event()
                yield self._idle
            item = queue.popleft()
            if item is None:
                return
            if isinstance(item, Run):
                done = execute(item.segment, env.now, item.issued, self.ends)
                self._tell()
                start, end = done[0][1], done[-1][2]
                if end > env.now:
                    yield env.timeout(end - env.now)
                self._note("compute", item.segment.name, start, item.place, kernels=done)
                continue
            if item.at > env.now:
                yield env.timeout(item.at - env.now)
            if isinstance(item, Reach):
                item.happening.happen(env.now)
            elif isinstance(item, Await):
                if item.happening.at < 0:
                    yield item.happening.wait(env)
            else:
                yield from self._move(item)
                self.ends.append(env.now)
                self._tell()

    def _move(self, item: Move) -> Process:
        message, communicator = item.message, item.communicator
        if isinstance(message, Copy):
            yield from self._copy(message, item.place)
            return
        assert communicator is not None
        start = self._env.now
        kind = kind_of(message)
        span_kind: SpanKind = "send" if kind == "send" else "recv" if kind == "recv" else "collective"
        wire_bytes, algorithm, began = 0, "none", start
        if communicator.num_ranks > 1:  # else nobody to meet
            meeting = self._machine.meetings.arrive(communicator, self._program, message, item.instance)
            yield meeting.done
            traffic = meeting.traffic
            assert traffic is not None
            wire_bytes, algorithm, began = traffic.wire_bytes, traffic.algorithm, meeting.start
        transfer = Transfer(
            kind=kind,
            axis=communicator.axis,
            num_ranks=communicator.num_ranks,
            tensor_bytes=message.tensor_bytes,
            wire_bytes=wire_bytes,
            algorithm=algorithm,
            instance=item.instance,
            start=Ticks(began),
            communicator=communicator.name,
        )
        self._note(span_kind, message.name, start, item.place, transfer=transfer)

    def _copy(self, copy: Copy, place: Place) -> Process:
        start = self._env.now
        traffic = self._copies.get(id(copy))
        if traffic is None:
            traffic = self._copies[id(copy)] = self._machine.cost.copy(copy, self._program.ranks)
        yield self._machine.network.start(traffic)
        transfer = Transfer(
            kind=copy.direction,
            axis="",
            num_ranks=1,
            tensor_bytes=copy.num_bytes,
            wire_bytes=traffic.wire_bytes,
            algorithm=traffic.algorithm,
            instance=self._num_copies,
            start=Ticks(start),
        )
        self._num_copies += 1
        self._note("copy", copy.name, start, place, transfer=transfer)

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
        self.free = self._env.now
        self.spans.append(
            Span(
                self._program.rank,
                self.name,
                kind,
                name,
                Ticks(start),
                Ticks(self.free),
                place.phase,
                place.module,
                place.microbatch,
                place.position,
                kernels,
                transfer,
            )
        )
