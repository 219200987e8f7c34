"""Figures from a timeline: where the step went, and what each kind of communication did.

Every instant of the slowest rank's step belongs to exactly one part, by this order:

compute                a kernel of the model runs
optimizer              a kernel of the optimizer runs (and below: its copies and CPU work)
exposed_communication  nothing of these, and a collective's bytes flow, or it waits for a slower rank
bubble                 nothing of these, and a message is awaited that its sender has not begun to send
other                  copies to host memory, CPU work, or the GPU waits for the host's launches

So the parts add up to the step, in integer ticks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sim.ir.ledger import Kernel
from sim.ir.program import Compute, Program
from sim.ir.timeline import Span, Timeline

PARTS = ("compute", "exposed_communication", "bubble", "optimizer", "other")
_COMPUTE, _OPTIMIZER, _EXPOSED, _BUBBLE, _HOST_OPTIMIZER, _HOST = range(6)

Interval = tuple[int, int]
Key = TypeVar("Key", str, tuple[str, str, str, str])


@dataclass(frozen=True, slots=True)
class CommunicationTotal:
    """All transfers of one kind on one axis, in one step of one rank. Times in ticks."""

    kind: str
    axis: str
    algorithm: str
    num_ranks: int
    count: int
    tensor_bytes: int
    wire_bytes: int
    time: int
    exposed: int


def slowest_rank(timeline: Timeline) -> int:
    """Return the representative that ends last; the lowest of those that tie."""
    return min(timeline.rank_end, key=lambda rank: (-timeline.rank_end[rank], rank))


def _grown(timeline: Timeline, rank: int, measure: Callable[[Timeline], dict[Key, int]]) -> dict[Key, int]:
    """Return the sums that ``measure`` makes of a rank's timeline, without looking at all of what repeats.

    Where periods repeat, each adds the same to every sum from some number of them on (``timeline.Run``): two short
    timelines tell how much.
    """
    runs = timeline.runs(rank)
    if not runs:
        return measure(timeline)
    few = [min(run.at_least, run.times) for run in runs]
    if all(run.times - count < 2 for run, count in zip(runs, few, strict=True)):
        return measure(timeline)
    found = measure(timeline.shortened(rank, few))
    sums = dict(found)
    for nth, run in enumerate(runs):
        more = [count + (at == nth) for at, count in enumerate(few)]
        left = run.times - few[nth]
        for name, value in measure(timeline.shortened(rank, more)).items() if left else ():
            sums[name] = sums.get(name, 0) + left * (value - found.get(name, 0))
    return sums


def step_parts(timeline: Timeline, rank: int) -> dict[str, int]:
    """Return ticks by part for one rank; they add up to ``timeline.end``."""
    return _grown(timeline, rank, lambda line: _step_parts(line, rank))


def of_rank(timeline: Timeline, rank: int) -> Timeline:
    """Return one rank's part of a timeline, its spans told one by one for several to look at; runs stay as they are."""
    if timeline.runs(rank):
        return timeline
    return Timeline(tuple(timeline.of(rank)), timeline.end, {rank: timeline.rank_end[rank]})


def _step_parts(timeline: Timeline, rank: int) -> dict[str, int]:
    layers: list[list[Interval]] = [[] for _ in range(6)]
    for span in timeline.of(rank):
        in_optimizer = span.phase == "optimizer"
        if span.kind == "compute":
            layers[_OPTIMIZER if in_optimizer else _COMPUTE].extend(busy(span))
        elif span.kind in ("copy", "host"):
            layers[_HOST_OPTIMIZER if in_optimizer else _HOST].append((span.start, span.end))
        else:
            began = span.transfer.start if span.transfer else span.start
            layers[_EXPOSED].append((began, span.end))
            if began > span.start:
                # a collective that waits for a slower rank is communication too; a message not yet sent is a bubble
                layers[_BUBBLE if span.kind in ("send", "recv") else _EXPOSED].append((span.start, began))
    taken: list[Interval] = []
    ticks = []
    for intervals in layers:
        merged = merge([*taken, *intervals])
        ticks.append(length(merged) - length(taken))
        taken = merged
    return {
        "compute": ticks[_COMPUTE],
        "optimizer": ticks[_OPTIMIZER] + ticks[_HOST_OPTIMIZER],
        "exposed_communication": ticks[_EXPOSED],
        "bubble": ticks[_BUBBLE],
        "other": ticks[_HOST] + timeline.end - length(taken),
    }


Kernels = dict[int, tuple[int, Kernel]]
"""By identity: how often a rank runs a kernel in a step, and the kernel."""


def kernels_of(program: Program) -> Kernels:
    """Return the kernels of a program's step; repeated layers have the same objects."""
    counts: dict[int, int] = {}
    different: dict[int, Kernel] = {}
    for chunk, calls in Counter([call.chunk for call in program.step]).items():
        kernels = [instruction.kernel for instruction in program.chunks[chunk] if instruction.__class__ is Compute]
        different.update(zip(map(id, kernels), kernels, strict=True))
        for key, number in Counter(map(id, kernels)).items():
            counts[key] = counts.get(key, 0) + number * calls
    return {key: (number, different[key]) for key, number in counts.items()}


def communication(timeline: Timeline, rank: int) -> tuple[CommunicationTotal, ...]:
    """Return the totals by kind and axis, largest exposed time first."""
    sums = _grown(timeline, rank, lambda line: _communication_sums(line, rank))
    weights: dict[tuple[str, str], dict[str, int]] = {}
    for kind, axis, what, algorithm in sums:
        if what == "weight":
            weights.setdefault((kind, axis), {})[algorithm] = sums[kind, axis, what, algorithm]
    totals = []
    for (kind, axis), weight in weights.items():
        of = {what: sums[kind, axis, what, ""] for what in _SUMS}
        algorithm = max(sorted(weight), key=lambda name: weight[name])
        totals.append(CommunicationTotal(kind=kind, axis=axis, algorithm=algorithm, **of))
    return tuple(sorted(totals, key=lambda t: (-t.exposed, -t.time, t.kind, t.axis)))


_SUMS = ("num_ranks", "count", "tensor_bytes", "wire_bytes", "time", "exposed")


def _communication_sums(timeline: Timeline, rank: int) -> dict[tuple[str, str, str, str], int]:
    """Return figures by (kind, axis, what, algorithm); of an algorithm the bytes that it moved, its weight."""
    spans = list(timeline.of(rank))
    computing = merge(i for s in spans if s.kind == "compute" for i in busy(s))
    groups: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in spans:
        if span.transfer is not None:
            groups[span.transfer.kind, span.transfer.axis].append(span)
    sums: dict[tuple[str, str, str, str], int] = {}
    for group, of_group in groups.items():
        transfers = [s.transfer for s in of_group if s.transfer is not None]
        flowing = merge((s.transfer.start, s.end) for s in of_group if s.transfer is not None)
        for transfer in transfers:
            key = (*group, "weight", transfer.algorithm)
            sums[key] = sums.get(key, 0) + transfer.tensor_bytes
        figures = (
            transfers[0].num_ranks,
            len(of_group),
            sum(t.tensor_bytes for t in transfers),
            sum(t.wire_bytes for t in transfers),
            sum(s.end - s.transfer.start for s in of_group if s.transfer is not None),
            length(subtract(flowing, computing)),
        )
        sums.update({(*group, what, ""): figure for what, figure in zip(_SUMS, figures, strict=True)})
    return sums


def busy(span: Span) -> Iterable[Interval]:
    """Return when kernels of a compute span run; between them the GPU waits for the host."""
    if not span.kernels:
        return ((span.start, span.end),)
    if sum([end - start for _, start, end in span.kernels]) == span.end - span.start:
        return ((span.start, span.end),)
    return [(start, end) for _, start, end in span.kernels]


# --- intervals, as ascending disjoint [start, end) ------------------------------------------------


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals."""
    out: list[Interval] = []
    last_start, last_end = 0, -1
    for start, end in sorted(intervals):
        if start > last_end:
            if last_end > last_start:
                out.append((last_start, last_end))
            last_start, last_end = start, end
        elif end > last_end:
            last_end = end
    if last_end > last_start:
        out.append((last_start, last_end))
    return out


def length(intervals: Sequence[Interval]) -> int:
    return sum(end - start for start, end in intervals)


def subtract(intervals: Sequence[Interval], holes: Sequence[Interval]) -> list[Interval]:
    """Return what of ``intervals`` no hole covers. Both are merged."""
    out: list[Interval] = []
    index = 0
    for start, end in intervals:
        while index < len(holes) and holes[index][1] <= start:
            index += 1
        position, hole = start, index
        while hole < len(holes) and holes[hole][0] < end:
            if holes[hole][0] > position:
                out.append((position, holes[hole][0]))
            position = max(position, holes[hole][1])
            hole += 1
        if position < end:
            out.append((position, end))
    return out
