"""When an instruction of the step happened on its rank: program positions to ticks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from sim.ir.timeline import Position, Timeline


def clock_of(timeline: Timeline, rank: int) -> Callable[[Position], int]:
    """Return a function from a position to the tick at which the next kernel issued after it began.

    The allocator acts when the host issues; what people want to see is when the GPU was there. So memory is drawn at
    the time of the kernel for which it was taken.
    """
    starts: list[tuple[Position, int]] = []
    for span in timeline.spans:
        if span.rank != rank or span.kind != "compute":
            continue
        call = span.position[0]
        if span.kernels:
            starts.extend(((call, index), start) for index, start, _ in span.kernels)
        else:
            starts.append((span.position, span.start))
    starts.sort()
    positions = [position for position, _ in starts]
    latest = 0
    times = []
    for _, start in starts:
        latest = max(latest, start)
        times.append(latest)

    def when(position: Position) -> int:
        index = bisect_left(positions, position)
        return times[index] if index < len(times) else timeline.end

    return when
