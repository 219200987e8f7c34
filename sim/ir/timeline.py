"""Timeline: what happened, in integer ticks (picoseconds). No opinions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

from sim.units import Ticks

SpanKind = Literal["compute", "collective", "send", "recv", "copy", "host"]
Position = tuple[int, int]
"""(index into ``Program.step``, index into the called chunk): the place of an instruction in a step."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a collective, send, receive or copy moved.

    ``kind`` is the collective's ("all_gather", ...), "send", "recv", "host_to_device" or "device_to_host"; ``axis`` the
    communicator's axis ("" for copies); ``instance`` numbers the meetings on one ``communicator`` (its name), so that
    the spans of one meeting can be found on all ranks; ``start`` is when the bytes began to flow (all had arrived).
    """

    kind: str
    axis: str
    num_ranks: int
    tensor_bytes: int
    wire_bytes: int
    algorithm: str
    instance: int
    start: Ticks
    communicator: str = ""

    def moved(self, start: Ticks, instance: int) -> Transfer:
        """Return a later one like it."""
        return Transfer(
            self.kind, self.axis, self.num_ranks, self.tensor_bytes, self.wire_bytes, self.algorithm, instance, start,
            self.communicator,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """Something occupied ``stream`` of a rank (the representative of its class) during [start, end).

    ``position`` is that of its first instruction. A run of kernels that nothing could interrupt is one
    span, with (index into the chunk, start, end) of each kernel in ``kernels``; gaps between them are the GPU
    waiting for the host. A span of a transfer starts when the stream reached it.
    """

    rank: int
    stream: str
    kind: SpanKind
    name: str
    start: Ticks
    end: Ticks
    phase: str
    module: str
    microbatch: int
    position: Position
    kernels: tuple[tuple[int, Ticks, Ticks], ...] = ()
    transfer: Transfer | None = None


PatternSpan = tuple[Span, str, int]
"""A span from tick 0 on; of a transfer the communicator, and which meeting on it in the pattern it is."""
Pattern = tuple[PatternSpan, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A pattern of spans that happened from ``start`` on, in call ``call`` of the step, for that microbatch.

    ``instances``: number of the first meeting on each communicator.
    """

    pattern: Pattern
    start: int
    microbatch: int
    call: int
    instances: Mapping[str, int]

    def spans(self) -> Iterator[Span]:
        """Yield the spans as they happened."""
        shift = self.start
        for span, communicator, nth in self.pattern:
            transfer = span.transfer
            if transfer is not None:
                start = Ticks(transfer.start + shift)
                transfer = transfer.moved(start, self.instances[communicator] + nth)
            kernels = tuple([(index, Ticks(start + shift), Ticks(end + shift)) for index, start, end in span.kernels])
            yield Span(
                span.rank, span.stream, span.kind, span.name, Ticks(span.start + shift), Ticks(span.end + shift),
                span.phase, span.module, self.microbatch, (self.call, span.position[1]), kernels, transfer,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Later:
    """What happened once, and again ``times`` of so many periods later.

    ``times``         how many periods later, each time
    ``period``        ticks of a period
    ``calls``         calls of the step in a period
    ``meetings``      meetings in a period, by communicator ("": copies on the stream)
    ``microbatches``  microbatch of each call of the step
    ``again``         it only repeats what happened before
    """

    parts: Sequence[Part]
    times: range
    period: int
    calls: int
    meetings: Mapping[str, int]
    microbatches: Sequence[int]
    again: bool

    def unrolled(self) -> Iterator[Span | Repeat]:
        """Yield spans and patterns when they happened."""
        microbatches = self.microbatches
        for times in self.times:
            ticks, calls = times * self.period, times * self.calls
            meetings = {name: times * count for name, count in self.meetings.items()}
            for part in unrolled(self.parts):
                if isinstance(part, Repeat):
                    call = part.call + calls
                    instances = {name: first + meetings.get(name, 0) for name, first in part.instances.items()}
                    yield Repeat(part.pattern, part.start + ticks, microbatches[call], call, instances)
                    continue
                transfer = part.transfer
                if transfer is not None:
                    instance = transfer.instance + meetings.get(transfer.communicator, 0)
                    transfer = transfer.moved(Ticks(transfer.start + ticks), instance)
                call = part.position[0] + calls
                kernels = tuple(
                    [(index, Ticks(start + ticks), Ticks(end + ticks)) for index, start, end in part.kernels]
                )
                yield Span(
                    part.rank, part.stream, part.kind, part.name, Ticks(part.start + ticks), Ticks(part.end + ticks),
                    part.phase, part.module, microbatches[call], (call, part.position[1]), kernels, transfer,
                )  # fmt: skip


Part = Span | Repeat | Later


@dataclass(frozen=True, slots=True)
class Run:
    """So many equal periods of a rank, one after the other.

    From ``at_least`` of them on, each adds the same to every sum and every time that is covered by something: with
    fewer, what came before them meets what comes after.
    """

    times: int
    period: int
    at_least: int


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of equal periods of one rank: (times, ticks) of each, and what was noted around and in them.

    ``streams``: of each stream what comes before, in and after each: [before, in, before, in, ..., after].
    """

    times: tuple[tuple[int, int], ...]
    streams: Sequence[Sequence[Sequence[Span | Repeat]]]

    def found(self) -> tuple[Run, ...]:
        """Return the runs, with the number of periods from which on each is like the others."""
        runs = []
        for nth, (times, period) in enumerate(self.times):
            at = 2 * nth + 1
            before = _extent([part for stream in self.streams for parts in stream[:at] for part in parts])
            inside = _extent([part for stream in self.streams for part in stream[at]])
            after = _extent([part for stream in self.streams for parts in stream[at + 1 :] for part in parts])
            # one may be put in at tick x if all before ends by x, and all after begins later: in the last period
            latest = max(before[1] if before else 0, inside[1] - period if inside else 0)
            earliest = min([extent[0] for extent in (inside, after) if extent is not None], default=latest)
            runs.append(Run(times, period, max(0, -((earliest - latest) // period))))
        return tuple(runs)


def _extent(parts: Sequence[Span | Repeat]) -> tuple[int, int] | None:
    """Return when the first of them starts and the last one ends."""
    bounds = [
        (part.start + part.pattern[0][0].start, part.start + part.pattern[-1][0].end)
        if isinstance(part, Repeat)
        else (part.start, part.end)
        for part in parts
    ]
    return (min(start for start, _ in bounds), max(end for _, end in bounds)) if bounds else None


def _with(parts: Sequence[Part], times: Sequence[int]) -> Sequence[Part]:
    """Return parts with so many periods in each run; they are nested, what comes after one holds the next."""
    found: list[Part] = []
    for part in parts:
        if not isinstance(part, Later):
            found.append(part)
        elif part.again:
            found.append(replace(part, times=range(1, times[0] + 1)))
        else:
            found.append(replace(part, parts=_with(part.parts, times[1:]), times=range(times[0], times[0] + 1)))
    return found


def unrolled(parts: Sequence[Part]) -> Iterator[Span | Repeat]:
    """Yield spans and patterns, each time that they happened."""
    for part in parts:
        if isinstance(part, Later):
            yield from part.unrolled()
        else:
            yield part


class Spans(Sequence[Span]):
    """Spans of which many repeat: kept as patterns, told one by one. Equal to the tuple of them."""

    def __init__(self, parts: Mapping[int, Sequence[Part]], runs: Mapping[int, Runs] | None = None) -> None:
        self._parts = parts
        """By rank, in the order in which the spans stand."""
        self._runs = runs or {}
        self._shortened: dict[tuple[int, ...], tuple[Span, ...]] = {}

    def runs(self, rank: int) -> tuple[Run, ...]:
        """Return the runs of equal periods of one representative."""
        return self._runs[rank].found() if rank in self._runs else ()

    def shortened(self, rank: int, times: Sequence[int]) -> tuple[Span, ...]:
        """Return the spans of one representative as if its runs had so many periods; kept, as several look at them."""
        key = (rank, *times)
        found = self._shortened.get(key)
        if found is None:
            spans: list[Span] = []
            for part in unrolled(_with(self._parts.get(rank, ()), times)):
                if isinstance(part, Span):
                    spans.append(part)
                else:
                    spans.extend(part.spans())
            found = self._shortened[key] = tuple(spans)
        return found

    def of(self, rank: int) -> Iterator[Span]:
        """Yield the spans of one representative."""
        for part in unrolled(self._parts.get(rank, ())):
            if isinstance(part, Span):
                yield part
            else:
                yield from part.spans()

    def distinct(self) -> Iterator[Span]:
        """Yield every span, of those that repeat earlier ones only the first."""
        seen: dict[int, None] = {}
        for parts in self._parts.values():
            for part in unrolled([part for part in parts if not isinstance(part, Later) or not part.again]):
                if isinstance(part, Span):
                    yield part
                elif id(part.pattern) not in seen:
                    seen[id(part.pattern)] = None
                    yield from part.spans()

    def __iter__(self) -> Iterator[Span]:
        for rank in self._parts:
            yield from self.of(rank)

    def __len__(self) -> int:
        return sum(_count(part) for parts in self._parts.values() for part in parts)

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Span, ...]: ...
    def __getitem__(self, index: int | slice) -> Span | tuple[Span, ...]:
        return tuple(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Spans, tuple)) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(len(self))


def _count(part: Part) -> int:
    if isinstance(part, Later):
        return len(part.times) * sum(map(_count, part.parts))
    return len(part.pattern) if isinstance(part, Repeat) else 1


@dataclass(frozen=True, slots=True)
class Release:
    """A block freed at ``freed_at`` that another stream still used: reusable from ``reusable_at`` on."""

    rank: int
    freed_at: Position
    reusable_at: Position


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What one link (an index) carried during the step, and for how long it carried anything."""

    link: int
    num_bytes: float
    busy: Ticks


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step, from tick 0. ``end`` is when the last rank finished, ``rank_end`` when each representative did."""

    spans: Sequence[Span]
    end: Ticks
    rank_end: Mapping[int, Ticks]
    releases: tuple[Release, ...] = ()
    link_use: tuple[LinkUse, ...] = ()

    def of(self, rank: int) -> Iterator[Span]:
        """Yield the spans of one representative."""
        spans = self.spans
        return spans.of(rank) if isinstance(spans, Spans) else (span for span in spans if span.rank == rank)

    def distinct(self) -> Iterator[Span]:
        """Yield every span, of those that only repeat earlier ones at other times the first."""
        return self.spans.distinct() if isinstance(self.spans, Spans) else iter(self.spans)

    def runs(self, rank: int) -> tuple[Run, ...]:
        """Return the runs of equal periods of one representative: whatever is summed up need not look at each."""
        return self.spans.runs(rank) if isinstance(self.spans, Spans) else ()

    def shortened(self, rank: int, times: Sequence[int]) -> Timeline:
        """Return one representative's part of the timeline, as if its runs had so many periods."""
        assert isinstance(self.spans, Spans)
        fewer = sum((run.times - count) * run.period for run, count in zip(self.runs(rank), times, strict=True))
        end = Ticks(self.end - fewer)
        return Timeline(self.spans.shortened(rank, times), end, {rank: Ticks(self.rank_end[rank] - fewer)})
