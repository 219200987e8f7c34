"""The step as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process for each class of ranks, one thread for each stream, a complete event ("X") for each kernel and transfer,
and counters ("C") of allocated and reserved bytes. Times are microseconds, as the format wants them.

Format: "Trace Event Format", Google, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

from sim.ir.footprint import CATEGORIES, Footprint
from sim.ir.program import Program, World
from sim.ir.timeline import Span, Timeline
from sim.report.clock import clock_of
from sim.units import TICKS_PER_S

_TICKS_PER_US = TICKS_PER_S // 10**6


def trace_bytes(world: World, timeline: Timeline, footprints: tuple[Footprint, ...]) -> bytes:
    """Return the trace, gzipped; the same bytes for the same step (no time stamp, no file name in the header)."""
    events = list(trace_events(world, timeline, footprints))
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)


def trace_events(world: World, timeline: Timeline, footprints: tuple[Footprint, ...]) -> Iterator[dict[str, Any]]:
    """Yield the events: names of processes and threads, spans in the order of the timeline, counters."""
    programs = {program.rank: program for program in world.programs}
    threads: dict[tuple[int, str], int] = {}
    for rank, program in sorted(programs.items()):
        alike = f" ({len(program.ranks)} ranks alike)" if len(program.ranks) > 1 else ""
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}{alike}"}}
    for span in timeline.spans:
        key = (span.rank, span.stream)
        if key not in threads:
            threads[key] = sum(rank == span.rank for rank, _ in threads)
            yield {
                "ph": "M",
                "name": "thread_name",
                "pid": span.rank,
                "tid": threads[key],
                "args": {"name": span.stream},
            }
        yield from _span_events(span, programs[span.rank], threads[key])
    for footprint in footprints:
        yield from _counters(footprint, timeline)


def _span_events(span: Span, program: Program, thread: int) -> Iterator[dict[str, Any]]:
    common = {"ph": "X", "pid": span.rank, "tid": thread, "cat": span.phase}
    where = {"module": span.module, "microbatch": span.microbatch}
    if span.kernels:
        chunk = program.chunks[program.step[span.position[0]].chunk]
        for index, start, end in span.kernels:
            name = getattr(chunk[index], "op", span.name)
            yield {**common, "name": name, "ts": _us(start), "dur": _us(end - start), "args": where}
        return
    args: dict[str, Any] = dict(where)
    if span.transfer is not None:
        transfer = span.transfer
        args |= {
            "axis": transfer.axis,
            "ranks": transfer.num_ranks,
            "tensor_bytes": transfer.tensor_bytes,
            "wire_bytes": transfer.wire_bytes,
            "algorithm": transfer.algorithm,
            "waited_us": _us(transfer.start - span.start),
        }
    yield {**common, "name": span.name, "ts": _us(span.start), "dur": _us(span.end - span.start), "args": args}


def _counters(footprint: Footprint, timeline: Timeline) -> Iterator[dict[str, Any]]:
    rank = footprint.ranks[0]
    when = clock_of(timeline, rank)
    for sample in footprint.samples:
        at = {"ph": "C", "pid": rank, "ts": _us(when(sample.position))}
        yield {**at, "name": "allocated bytes", "args": dict(zip(CATEGORIES, sample.by_category, strict=True))}
        yield {**at, "name": "reserved bytes", "args": {"reserved": sample.reserved_bytes}}


def _us(ticks: int) -> float:
    return ticks / _TICKS_PER_US
