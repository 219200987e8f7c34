"""What a chunk asks of the host and the streams, worked out once: kernels in runs, everything else as it stands.

A run of kernels on one stream with nothing in between that could interact (an event, a transfer, a wait) is one
:class:`Segment`. Kernel i starts when it has been issued and kernel i-1 has ended,

    end_i = max(end_{i-1}, issued_i) + d_i

so that a segment needs one event of the simulation however many kernels it has, and is exact.

Later work slows kernels down while a collective takes SMs or bandwidth: :func:`execute` is the only place that
turns work into time; a segment whose rate changes half-way is its remaining kernels, executed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

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


Step = Segment | Collective | Send | Recv | Copy | HostCompute | Alloc | Free | UseOn | Record | Wait | HostWait | Mark
CompiledChunk = tuple[tuple[int, Step], ...]
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
