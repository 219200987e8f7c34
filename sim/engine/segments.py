"""What a chunk asks of the host and the streams, worked out once: kernels in runs, everything else as it stands.

A run of kernels on one stream with nothing in between that could interact (an event, a transfer, a wait) is one
:class:`Segment`. Kernel i starts when it has been issued and kernel i-1 has ended,

    end_i = max(end_{i-1}, issued_i) + d_i

so that a segment needs one event of the simulation however many kernels it has, and is exact.

Later work slows kernels down while a collective takes SMs or bandwidth: :func:`execute` is the only place that
turns work into time; a segment whose rate changes half-way is its remaining kernels, executed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

from sim.engine.cost import Cost
from sim.ir.ledger import Kernel
from sim.ir.program import (
    Alloc,
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
class Stretch:
    """Steps whose times all follow from when ``base`` (a stream) gets to them, worked out once for all calls.

    Nothing in it can be held up by others: kernels, events, and transfers that share no link with any other stream.
    All times are ticks relative to when ``base`` gets here, if the host is far enough ahead:

    ``steps``     the steps themselves, for when it is not
    ``launches``  stream -> ticks of the host from the start of the stretch until it has issued each launch
    ``host``      ticks of the host for all of it
    ``clocks``    ticks of the host until it is through with each step
    ``slack``     how much later than ``base`` gets here the host may begin without holding anything up
    ``sides``     other streams -> latest tick at which they may get here without holding anything up
    ``inputs``    events recorded before -> likewise
    ``outputs``   events recorded -> when
    ``now``       stream -> when it is through; ``free`` when it finished its last work (absent if it has none)
    ``ends``      stream -> the end of each launch
    ``work``      what leaves a span
    ``messages``  the transfers
    """

    base: str
    steps: tuple[tuple[int, Step], ...]
    launches: Mapping[str, tuple[int, ...]]
    host: int
    clocks: tuple[int, ...]
    slack: int
    sides: Mapping[str, int]
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    now: Mapping[str, int]
    free: Mapping[str, int]
    ends: Mapping[str, tuple[int, ...]]
    work: tuple[Work, ...]
    messages: tuple[Collective, ...]
    last_mark: Mark | None
    patterns: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Spans from tick 0 on, by the mark under which the stretch begins."""


Step = Segment | Collective | Send | Recv | Copy | HostCompute | Alloc | Free | UseOn | Record | Wait | HostWait | Mark
CompiledChunk = tuple[tuple[int, Step], ...]
BundledChunk = tuple[tuple[int, "Step | Stretch"], ...]
Work = tuple[str, int, "Segment | Collective", int, int, tuple[tuple[int, int, int], ...], "Mark | None"]
"""(stream, index, step, start, end, kernels, mark that it stands under) of what leaves a span."""
Duration = Callable[[Collective], int]
"""Ticks of a transfer that nothing else can slow down; -1 for others."""
"""(index into the chunk, what to do), in the order in which the host issues."""


_LIFE = (Alloc, Free, UseOn)


class Prices:
    """Ticks of one class's kernels, asked of the cost layer once for each kernel object."""

    def __init__(self, cost: Cost, rank: int) -> None:
        self._cost = cost
        self._rank = rank
        self._of: dict[int, tuple[int, int]] = {}
        self.issue = ticks(cost.issue_s(rank))

    def of(self, kernel: Kernel) -> tuple[int, int]:
        """Return (ticks of the host to launch it, ticks on the GPU)."""
        found = self._of.get(id(kernel))
        if found is None:
            cost, rank = self._cost, self._rank
            found = (ticks(cost.launch_s(kernel, rank)), ticks(cost.kernel_s(kernel, rank)))
            self._of[id(kernel)] = found
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


def compile_chunk(chunk: Chunk, prices: Prices, shared: frozenset[Storage]) -> CompiledChunk:
    """Return what the host and the streams need of a chunk: no bytes but those of ``shared`` storages."""
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
            launch, duration = of(step.kernel)
            offset += launch
            kernels.append((index, offset, duration))
            continue
        elif isinstance(step, Mark):
            if step == mark:
                continue
            mark = step
        close()
        steps.append((index, step))
    close()
    return tuple(steps)


def bundle(steps: CompiledChunk, duration: Duration, issue: int) -> BundledChunk:
    """Return the steps with those that can be worked out beforehand in stretches, as long ones as can be."""
    found: list[tuple[int, Step | Stretch]] = []
    at = 0
    while at < len(steps):
        draft = _Draft(duration, issue)
        end = at
        while end < len(steps) and draft.takes(*steps[end]):
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


_NEVER = -(1 << 62)


class _Draft:
    """A stretch in the making. It begins with a kernel, whose stream is the base."""

    def __init__(self, duration: Duration, issue: int) -> None:
        self._duration, self._issue = duration, issue
        self._now: dict[str, int] = {}
        self._events: dict[str, int] = {}
        self._sides: dict[str, int] = {}
        self._inputs: dict[str, int] = {}
        self._launches: dict[str, list[int]] = {}
        self._ends: dict[str, list[int]] = {}
        self._free: dict[str, int] = {}
        self._work: list[Work] = []
        self._messages: list[Collective] = []
        self._mark: Mark | None = None
        self._host = 0
        self._slack = -_NEVER
        self._base = ""
        self.num_launches = 0

    def _issued(self, time: int) -> None:
        """Note that what could begin at ``time`` must have been issued by then."""
        self._slack = min(self._slack, time - self._host)

    def takes(self, index: int, step: Step) -> bool:
        """Append a step if it can be part of the stretch."""
        if not self._base:
            if not isinstance(step, Segment):
                return False
            self._base = step.stream
            self._now[step.stream] = 0
        if isinstance(step, Segment):
            return self._segment(index, step)
        if isinstance(step, Collective):
            return self._transfer(index, step)
        if isinstance(step, Record):
            if step.stream not in self._now:
                return False
            self._events[step.event] = self._now[step.stream]
            self._issued(self._now[step.stream])
        elif isinstance(step, Wait):
            return self._wait(step)
        elif isinstance(step, Mark):
            self._mark = step
        else:
            return False
        return True

    def _room(self, stream: str, num: int) -> bool:
        return stream in self._now and len(self._launches.get(stream, ())) + num <= MAX_KERNELS

    def _segment(self, index: int, segment: Segment) -> bool:
        stream = segment.stream
        if not self._room(stream, len(segment.kernels)):
            return False
        launches, ends = self._launches.setdefault(stream, []), self._ends.setdefault(stream, [])
        end = self._now[stream]
        start, begun, kernels = end, self._host, []
        for at, offset, duration in segment.kernels:
            self._host = begun + offset
            self._issued(end)
            launches.append(self._host)
            kernels.append((at, end, end + duration))
            end += duration
            ends.append(end)
        self._host = begun + segment.host
        self._now[stream] = self._free[stream] = end
        self._work.append((stream, index, segment, start, end, tuple(kernels), self._mark))
        self.num_launches += len(kernels)
        return True

    def _transfer(self, index: int, message: Collective) -> bool:
        duration = self._duration(message)
        if duration < 0 or not self._room(message.stream, 1):
            return False
        start = self._now[message.stream]
        self._host += self._issue
        self._issued(start)
        self._launches.setdefault(message.stream, []).append(self._host)
        self._now[message.stream] = self._free[message.stream] = start + duration
        self._ends.setdefault(message.stream, []).append(start + duration)
        self._work.append((message.stream, index, message, start, start + duration, (), self._mark))
        self._messages.append(message)
        self.num_launches += 1
        return True

    def _wait(self, wait: Wait) -> bool:
        stream = wait.stream
        recorded = self._events.get(wait.event)
        if recorded is None:
            if stream not in self._now:
                return False
            self._inputs[wait.event] = min(self._inputs.get(wait.event, self._now[stream]), self._now[stream])
        elif stream not in self._now:
            self._now[stream] = self._sides[stream] = recorded
        else:
            self._now[stream] = max(self._now[stream], recorded)
        self._issued(self._now[stream])
        return True

    def _costs(self, step: Step) -> int:
        return step.host if isinstance(step, Segment) else self._issue if isinstance(step, Collective) else 0

    def stretch(self, steps: CompiledChunk) -> Stretch:
        return Stretch(
            base=self._base,
            steps=steps,
            launches={stream: tuple(found) for stream, found in self._launches.items()},
            host=self._host,
            clocks=tuple(accumulate(self._costs(step) for _, step in steps)),
            slack=self._slack,
            sides=self._sides,
            inputs=self._inputs,
            outputs=self._events,
            now=self._now,
            free=self._free,
            ends={stream: tuple(found) for stream, found in self._ends.items()},
            work=tuple(self._work),
            messages=tuple(self._messages),
            last_mark=next((step for _, step in reversed(steps) if isinstance(step, Mark)), None),
        )


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
