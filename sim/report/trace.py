"""The step as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process for each class of ranks, one thread for each stream, a complete event ("X") for each kernel and transfer,
and counters ("C") of allocated and reserved bytes. Inside a collective, the time until the last rank arrived is an
event of its own. Times are microseconds, as the format wants them.

Format: "Trace Event Format", Google, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from typing import Any

from sim.ir.footprint import CATEGORIES, Footprint
from sim.ir.program import COMPUTE, Program, World
from sim.ir.timeline import Span, Timeline
from sim.report.clock import curve
from sim.units import TICKS_PER_S

_TICKS_PER_US = TICKS_PER_S // 10**6


def trace_bytes(world: World, timeline: Timeline, footprints: Sequence[Footprint]) -> bytes:
    """Return the trace, gzipped; the same bytes for the same step (no time stamp, no file name in the header)."""
    events = list(trace_events(world, timeline, footprints))
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)


def trace_events(world: World, timeline: Timeline, footprints: Sequence[Footprint]) -> Iterator[dict[str, Any]]:
    """Yield the events: names of processes and threads, spans in the order of the timeline, counters."""
    programs = {program.rank: program for program in world.programs}
    for rank, program in sorted(programs.items()):
        alike = f" ({len(program.ranks)} ranks alike)" if len(program.ranks) > 1 else ""
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}{alike}"}}
    streams = sorted(dict.fromkeys((span.rank, span.stream) for span in timeline.spans), key=_thread_order)
    threads: dict[tuple[int, str], int] = {}
    for rank, stream in streams:
        thread = threads[rank, stream] = sum(other == rank for other, _ in threads)
        at = {"ph": "M", "pid": rank, "tid": thread}
        yield {**at, "name": "thread_name", "args": {"name": stream}}
        yield {**at, "name": "thread_sort_index", "args": {"sort_index": thread}}
    for span in timeline.spans:
        yield from _span_events(span, programs[span.rank], threads[span.rank, span.stream])
    for footprint in footprints:
        yield from _counters(footprint, timeline, programs[footprint.ranks[0]])


def _thread_order(row: tuple[int, str]) -> tuple[int, bool]:
    return row[0], row[1] != COMPUTE


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
    transfer = span.transfer
    if transfer is not None:
        args |= {
            "axis": transfer.axis,
            "ranks": transfer.num_ranks,
            "communicator": transfer.communicator,
            "meeting": transfer.instance,
            "tensor_bytes": transfer.tensor_bytes,
            "wire_bytes": transfer.wire_bytes,
            "algorithm": transfer.algorithm,
        }
        if span.end > transfer.start:
            args["wire_bytes_per_s"] = round(transfer.wire_bytes * TICKS_PER_S / (span.end - transfer.start))
    yield {**common, "name": span.name, "ts": _us(span.start), "dur": _us(span.end - span.start), "args": args}
    if transfer is not None and transfer.start > span.start:
        waited = _us(transfer.start - span.start)
        yield {**common, "name": "waits for a rank", "ts": _us(span.start), "dur": waited, "args": {}}


def _counters(footprint: Footprint, timeline: Timeline, program: Program) -> Iterator[dict[str, Any]]:
    if footprint.peak_step == "setup":
        return
    for tick, sample in curve(footprint, timeline, program):
        at = {"ph": "C", "pid": footprint.ranks[0], "ts": _us(tick)}
        yield {**at, "name": "allocated bytes", "args": dict(zip(CATEGORIES, sample.by_category, strict=True))}
        yield {**at, "name": "reserved bytes", "args": {"reserved": sample.reserved_bytes}}


def _us(ticks: int) -> float:
    return ticks / _TICKS_PER_US
