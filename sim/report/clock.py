"""When an instruction of the step happened on its rank: program positions to ticks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from sim.ir.footprint import Footprint, Sample
from sim.ir.program import Call, Program
from sim.ir.timeline import Position, Timeline


def clock_of(timeline: Timeline, rank: int) -> Callable[[Position], int]:
    """Return a function from a position to the tick at which the next kernel issued after it began.

    The allocator acts when the host issues; what people want to see is when the GPU was there. So memory is drawn at
    the time of the kernel for which it was taken.
    """
    starts: list[tuple[Position, int]] = []
    for span in timeline.of(rank):
        if span.kind != "compute":
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


def curve(footprint: Footprint, timeline: Timeline, program: Program) -> list[tuple[int, Sample]]:
    """Return (tick, state) of the rank's memory over the step of its peak, in order.

    Microbatches that the replay skipped, as they repeat an earlier one, repeat it here. A first step is drawn on the
    clock of a later one, call by call: only that is timed. Setup has no clock: its samples are spread evenly.
    """
    calls = {"setup": program.setup, "first": program.first_step}.get(footprint.peak_step, program.step)
    samples = list(_filled(footprint.samples, calls))
    if footprint.peak_step == "setup":
        return [(index * timeline.end // len(samples), sample) for index, (_, sample) in enumerate(samples)]
    when = clock_of(timeline, footprint.ranks[0])
    place = _aligned(calls, program)
    points: list[tuple[int, Sample]] = []
    latest = 0
    for position, sample in samples:
        latest = max(latest, when(place(position)))
        points.append((latest, sample))
    return points


def _filled(samples: Sequence[Sample], calls: Sequence[Call]) -> Iterator[tuple[Position, Sample]]:
    """Yield samples at their positions; calls without any take those of the last call of their chunk."""
    by_call: dict[int, list[Sample]] = {}
    for sample in samples:
        by_call.setdefault(sample.position[0], []).append(sample)
    by_chunk: dict[str, list[Sample]] = {}
    for index, call in enumerate(calls):
        found = by_call.get(index) or by_chunk.get(call.chunk, [])
        by_chunk[call.chunk] = found
        for sample in found:
            yield (index, sample.position[1]), sample


def _aligned(calls: Sequence[Call], program: Program) -> Callable[[Position], Position]:
    """Return a function from a position among ``calls`` to the like position of the step that is timed.

    Calls are like each other if their chunks' names are, "first." apart; the step may lack some of the first step's.
    """
    if tuple(calls) == tuple(program.step):
        return lambda position: position
    like: dict[int, tuple[int, float]] = {}
    at = 0
    for index, call in enumerate(calls):
        name = call.chunk.removeprefix("first.")
        found = next((i for i in range(at, len(program.step)) if program.step[i].chunk == name), None)
        if found is None:
            like[index] = (at, 0.0)
            continue
        ours, theirs = len(program.chunks[call.chunk]), len(program.chunks[name])
        like[index] = (found, theirs / ours if ours else 0.0)
        at = found + 1
    return lambda position: (like[position[0]][0], int(position[1] * like[position[0]][1]))
