"""What a chunk asks of the host and the streams, worked out once: kernels in runs, everything else as it stands.

A run of kernels on one stream with nothing in between that could interact (an event, a transfer, a wait) is one
:class:`Segment`. Kernel i starts when it has been issued and kernel i-1 has ended,

    end_i = max(end_{i-1}, issued_i) + d_i

so that a segment needs one event of the simulation however many kernels it has, and is exact.

How long a kernel takes beside the collectives of its chunk is worked out before (``beside``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sim.engine.cost import Cost
from sim.ir.ledger import Kernel
from sim.ir.program import (
    Alloc,
    Caller,
    Chunk,
    Collective,
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
)
from sim.units import Ticks, ticks

LAUNCH_QUEUE_DEPTH = 1024
"""Launches that may be pending on one stream before the next one blocks the host. Observed, not documented: NVIDIA
developer forums, topic 68937, "CUDA stream are blocked when launch lots of kernels (>1000)": about 1000 on each of
three streams, and the launch after them takes as long as a kernel."""

MAX_KERNELS = LAUNCH_QUEUE_DEPTH // 2
"""Longest segment: shorter than the queue, so that whether a launch blocks depends on earlier segments only."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of kernels on ``stream``.

    ``kernels``   (index into the chunk, ticks of the host since the segment began when it is issued, ticks on the GPU)
    ``host``      ticks of the host for all launches
    """

    stream: str
    name: str
    kernels: tuple[tuple[int, int, int], ...]
    host: int


MIN_LAUNCHES = 4
"""Fewest launches of a stretch: shorter ones gain nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """When the steps of a stretch happen, in ticks from its origin, as long as nothing else holds them up.

    ``latest``    stream -> latest tick at which it may get to the stretch without holding anything up
    ``inputs``    events recorded before -> likewise
    ``outputs``   events recorded -> when
    ``now``       stream -> when it is through; ``free`` when it finished its last work (absent if it has none)
    ``ends``      stream -> the end of each launch
    ``work``      what leaves a span
    ``patterns``  spans from tick 0 on, by the mark under which the stretch begins
    """

    latest: Mapping[str, int]
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    now: Mapping[str, int]
    free: Mapping[str, int]
    ends: Mapping[str, tuple[int, ...]]
    work: tuple[Work, ...]
    patterns: dict[tuple[str, str], Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Steps that nothing else can hold up once stream ``base`` gets to them, worked out once for all calls.

    Kernels, events, and transfers of its own class that share no link with another stream.

    ``ahead``     what happens if the host is ahead throughout; its origin is when ``base`` gets here
    ``behind``    what happens if all streams wait for the host; its origin is when the host begins to issue it
    ``slack``     how much later than ``base`` gets here the host may begin and still be ahead throughout
    ``steps``     the steps themselves, for when it is neither
    ``launches``  stream -> ticks of the host from the start of the stretch until it has issued each launch
    ``clocks``    ticks of the host until it is through with each step; ``host`` with all
    """

    base: str
    steps: tuple[tuple[int, Step], ...]
    launches: Mapping[str, tuple[int, ...]]
    clocks: tuple[int, ...]
    host: int
    slack: int
    ahead: Plan
    behind: Plan
    messages: tuple[Collective, ...]
    last_mark: tuple[str, str] | None

    @property
    def streams(self) -> Mapping[str, int]:
        """The streams that it needs, the base first."""
        return self.ahead.now


Step = Segment | Collective | Send | Recv | Copy | HostCompute | Alloc | Free | UseOn | Record | Wait | HostWait | Mark
CompiledChunk = tuple[tuple[int, Step], ...]
BundledChunk = tuple[tuple[int, "Step | Stretch"], ...]
Work = tuple[str, int, "Segment | Collective", int, int, tuple[tuple[int, int, int], ...], "Mark | None"]
"""(stream, index, step, start, end, kernels, mark that it stands under) of what leaves a span."""
Duration = Callable[[Collective], int]
"""Ticks of a transfer that nothing else can slow down; -1 for others."""
"""(index into the chunk, what to do), in the order in which the host issues."""


_LIFE = (Alloc, Free, UseOn)
_ALONE: Mapping[int, int] = {}


class Prices:
    """Ticks of one class's kernels, asked of the cost layer once for each kernel object."""

    def __init__(self, cost: Cost, rank: int) -> None:
        self._cost = cost
        self._rank = rank
        self._of: dict[Caller, dict[int, tuple[int, int]]] = {}
        self._alone: dict[int, int] = {}
        self._issue: dict[Caller, int] = {}
        self.wait = ticks(cost.wait_s())

    def issue(self, move: Collective | Send | Recv | Copy) -> int:
        """Return the ticks of the host to issue a transfer."""
        caller = move.caller
        found = self._issue.get(caller)
        if found is None:
            found = self._issue[caller] = ticks(self._cost.issue_s(self._rank, caller))
        return found

    def of(self, kernel: Kernel, caller: Caller) -> tuple[int, int]:
        """Return (ticks of the host to launch it, ticks on the GPU)."""
        by_kernel = self._of.setdefault(caller, {})
        found = by_kernel.get(id(kernel))
        if found is None:
            cost, rank = self._cost, self._rank
            found = (ticks(cost.launch_s(kernel, rank, caller)), self.alone(kernel))
            by_kernel[id(kernel)] = found
        return found

    def alone(self, kernel: Kernel) -> int:
        """Return the ticks on the GPU with nothing beside it."""
        found = self._alone.get(id(kernel))
        if found is None:
            found = self._alone[id(kernel)] = ticks(self._cost.kernel_s(kernel, self._rank))
        return found


def shared_storages(program: Program) -> frozenset[Storage]:
    """Return the storages that the step uses on a stream other than their own (``record_stream``)."""
    chunks = {id(chunk): chunk for chunk in (program.chunks[call.chunk] for call in program.step)}
    return frozenset(
        step.storage
        for chunk in chunks.values()
        for step in chunk
        if type(step) is UseOn and step.stream != step.storage.stream
    )


def compile_chunk(
    chunk: Chunk, prices: Prices, shared: frozenset[Storage], beside: Mapping[int, int] = _ALONE
) -> CompiledChunk:
    """Return what the host and the streams need of a chunk: no bytes but those of ``shared`` storages.

    ``beside``: ticks of the kernels (by index) that collectives slow down.
    """
    steps: list[tuple[int, Step]] = []
    kernels: list[tuple[int, int, int]] = []
    first: Compute | None = None
    offset = 0
    mark: Mark | None = None
    of = prices.of

    def close() -> None:
        nonlocal first, offset
        if first is not None:
            steps.append((kernels[0][0], Segment(first.stream, first.op, tuple(kernels), offset)))
            kernels.clear()
            first, offset = None, 0

    for index, step in enumerate(chunk):
        if isinstance(step, _LIFE):
            if not shared or step.storage not in shared:
                continue
            if isinstance(step, UseOn) and step.stream == step.storage.stream:
                continue
        elif isinstance(step, Compute):
            if first is None or first.stream != step.stream or len(kernels) == MAX_KERNELS:
                close()
                first = step
            launch, duration = of(step.kernel, step.caller)
            offset += launch
            if beside:
                duration = beside.get(index, duration)
            kernels.append((index, offset, duration))
            if step.blocking:
                offset += duration + (prices.wait if duration else 0)
            continue
        elif isinstance(step, Mark):
            if step == mark:
                continue
            mark = step
        close()
        steps.append((index, step))
    close()
    return tuple(steps)


def bundle(
    steps: CompiledChunk, duration: Duration, issue: Duration, shared: frozenset[str] = frozenset()
) -> BundledChunk:
    """Return the steps with those that can be worked out beforehand in stretches, as long ones as can be.

    ``shared`` streams carry other transfers too, which may hold them up: they are in no stretch but their own.
    """
    found: list[tuple[int, Step | Stretch]] = []
    at = 0
    while at < len(steps):
        draft = _Draft(duration, issue, shared)
        end = at
        while end < len(steps) and draft.takes(steps[end][1]):
            end += 1
        while end > at and isinstance(steps[end - 1][1], Mark):
            end -= 1
        if draft.num_launches >= MIN_LAUNCHES and end > at:
            found.append((steps[at][0], draft.stretch(steps[at:end])))
            at = end
        else:
            found.append(steps[at])
            at += 1
    return tuple(found)


class _Draft:
    """A stretch in the making. It begins with a kernel, whose stream is the base.

    Every other stream first waits for an event that follows from the base: so nothing in it can be known, nor can it
    matter, before the base gets there.
    """

    def __init__(self, duration: Duration, issue: Duration, shared: frozenset[str]) -> None:
        self._duration, self._issue, self._shared = duration, issue, shared
        self._launches: dict[str, int] = {}
        self._streams: dict[str, None] = {}
        self._events: dict[str, None] = {}
        self.num_launches = 0

    def takes(self, step: Step) -> bool:
        """Append a step if it can be part of the stretch."""
        if isinstance(step, Segment):
            if not self._streams:
                self._streams[step.stream] = None
            return self._launch(step.stream, len(step.kernels))
        if not self._streams:
            return False
        if isinstance(step, Collective):
            return self._duration(step) >= 0 and self._launch(step.stream, 1)
        if isinstance(step, Record):
            fits = step.stream in self._streams
            if fits:
                self._events[step.event] = None
            return fits
        if isinstance(step, Wait):
            fits = step.stream in self._streams or (step.event in self._events and step.stream not in self._shared)
            if fits:
                self._streams[step.stream] = None
            return fits
        return isinstance(step, Mark)

    def _launch(self, stream: str, num: int) -> bool:
        launched = self._launches.get(stream, 0) + num
        if stream not in self._streams or launched > MAX_KERNELS:
            return False
        self._launches[stream] = launched
        self.num_launches += num
        return True

    def stretch(self, steps: CompiledChunk) -> Stretch:
        first = steps[0][1]
        assert isinstance(first, Segment)
        ahead = _Player(self._duration, self._issue, first.stream, ahead=True).play(steps)
        behind = _Player(self._duration, self._issue, first.stream, ahead=False).play(steps)
        return Stretch(
            base=first.stream,
            steps=steps,
            launches={stream: tuple(found) for stream, found in ahead.launches.items()},
            clocks=tuple(ahead.clocks),
            host=ahead.host,
            slack=ahead.slack,
            ahead=ahead.plan(),
            behind=behind.plan(),
            messages=tuple(step for _, step in steps if isinstance(step, Collective)),
            last_mark=next(((step.phase, step.module) for _, step in reversed(steps) if isinstance(step, Mark)), None),
        )


class _Player:
    """Works a stretch out: with ``ahead`` from when the base gets there, else from when the host begins."""

    def __init__(self, duration: Duration, issue: Duration, base: str, ahead: bool) -> None:
        self._duration, self._issue, self._ahead = duration, issue, ahead
        self._now: dict[str, int] = {base: 0} if ahead else {}
        self._base = base
        self._latest: dict[str, int] = {}
        self._inputs: dict[str, int] = {}
        self._events: dict[str, int] = {}
        self._free: dict[str, int] = {}
        self._ends: dict[str, list[int]] = {}
        self._work: list[Work] = []
        self.launches: dict[str, list[int]] = {}
        self.clocks: list[int] = []
        self.host = 0
        self.slack = 1 << 62

    def _reach(self, stream: str, recorded: int | None = None) -> int:
        """Move a stream on to what it does next, issued by now; return when."""
        known = [
            tick for tick in (self._now.get(stream), recorded, None if self._ahead else self.host) if tick is not None
        ]
        now = max(known)
        if stream not in self._now:
            self._latest[stream] = now
        self.slack = min(self.slack, now - self.host)
        self._now[stream] = now
        return now

    def play(self, steps: CompiledChunk) -> _Player:
        mark: Mark | None = None
        for index, step in steps:
            if isinstance(step, Segment):
                self._segment(index, step, mark)
            elif isinstance(step, Collective):
                self.host += self._issue(step)
                start = self._launch(step.stream, self._duration(step))
                self._work.append((step.stream, index, step, start, self._now[step.stream], (), mark))
            elif isinstance(step, Record):
                self._events[step.event] = self._reach(step.stream)
            elif isinstance(step, Wait):
                recorded = self._events.get(step.event)
                now = self._reach(step.stream, recorded)
                if recorded is None:
                    self._inputs[step.event] = min(self._inputs.get(step.event, now), now)
            elif isinstance(step, Mark):
                mark = step
            self.clocks.append(self.host)
        return self

    def _launch(self, stream: str, duration: int) -> int:
        """Add a launch that the host is through with; return when it starts."""
        start = self._reach(stream)
        self._now[stream] = self._free[stream] = start + duration
        self.launches.setdefault(stream, []).append(self.host)
        self._ends.setdefault(stream, []).append(start + duration)
        return start

    def _segment(self, index: int, segment: Segment, mark: Mark | None) -> None:
        begun, kernels = self.host, []
        for at, offset, duration in segment.kernels:
            self.host = begun + offset
            start = self._launch(segment.stream, duration)
            kernels.append((at, start, start + duration))
        self.host = begun + segment.host
        end = kernels[-1][2]
        self._work.append((segment.stream, index, segment, kernels[0][1], end, tuple(kernels), mark))

    def plan(self) -> Plan:
        ends = {stream: tuple(found) for stream, found in self._ends.items()}
        return Plan(self._latest, self._inputs, self._events, self._now, self._free, ends, tuple(self._work))


def execute(
    segment: Segment, free: int, issued: int | Sequence[int], ends: list[int]
) -> tuple[tuple[int, Ticks, Ticks], ...]:
    """Return (index, start, end) of each kernel on a stream that is free from ``free`` on; append the ends to ``ends``.

    ``issued`` is when the host began with the segment or, where the queue held it up, when it issued each kernel.
    """
    end = free
    done: list[tuple[int, int, int]] = []
    if isinstance(issued, int):
        for index, offset, duration in segment.kernels:
            start = issued + offset
            if start < end:  # noqa: PLR1730  (a call of max() costs as much as the rest of the loop)
                start = end
            end = start + duration
            done.append((index, start, end))
            ends.append(end)
    else:
        for (index, _, duration), at in zip(segment.kernels, issued, strict=True):
            start = max(at, end)
            end = start + duration
            done.append((index, start, end))
            ends.append(end)
    return cast("tuple[tuple[int, Ticks, Ticks], ...]", tuple(done))
