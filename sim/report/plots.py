"""Pictures. The only importer of matplotlib."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sim.ir.footprint import CATEGORIES, Footprint
from sim.ir.timeline import Timeline
from sim.report.clock import clock_of
from sim.report.metrics import busy
from sim.report.report import Report
from sim.units import TICKS_PER_S, format_bytes, format_duration

COLOURS = {
    "parameters": "#4e79a7",
    "gradients": "#f28e2b",
    "optimizer": "#59a14f",
    "activations": "#e15759",
    "buffers": "#b07aa1",
    "temporary": "#edc948",
    "rounding": "#bab0ac",
}
KIND_COLOURS = {
    "compute": "#4e79a7",
    "optimizer": "#59a14f",
    "transfer": "#f28e2b",
    "wait": "#f7d6b4",
    "host": "#bab0ac",
}
GIB = 2**30


def _time_unit(ticks: int) -> tuple[float, str]:
    seconds = ticks / TICKS_PER_S
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= 2 * factor:
            return TICKS_PER_S * factor, unit
    return TICKS_PER_S * 1e-9, "ns"


def memory_png(footprint: Footprint, timeline: Timeline, report: Report) -> bytes:
    """Draw what a rank holds over the step, stacked by category; the peak and the GPU's capacity are marked."""
    when = clock_of(timeline, footprint.ranks[0])
    samples = footprint.samples
    scale, unit = _time_unit(timeline.end)
    times = np.array([when(s.position) for s in samples], dtype=float) / scale
    heights = np.array([s.by_category for s in samples], dtype=float).T / GIB
    reserved = np.array([s.reserved_bytes for s in samples], dtype=float) / GIB
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
    used = [i for i, name in enumerate(CATEGORIES) if heights[i].max(initial=0) > 0]
    axes.stackplot(
        times, heights[used], labels=[CATEGORIES[i] for i in used], colors=[COLOURS[CATEGORIES[i]] for i in used],
        step="post", linewidth=0,
    )  # fmt: skip
    axes.step(times, reserved, where="post", color="black", linewidth=1.0, label="reserved")
    axes.axhline(report.usable_bytes / GIB, color="#c00000", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"usable by the framework: {format_bytes(report.usable_bytes)}", (0.01, report.usable_bytes / GIB),
        xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points", color="#c00000", fontsize=9,
    )  # fmt: skip
    peak = int(np.argmax(heights.sum(axis=0)))
    axes.plot(times[peak], heights[:, peak].sum(), "v", color="black", markersize=8)
    axes.annotate(
        f"peak {format_bytes(footprint.peak_allocated_bytes)}\n{footprint.peak_phase} of {footprint.peak_module}",
        (times[peak], heights[:, peak].sum()), xytext=(0, 10), textcoords="offset points", fontsize=9,
        ha="right" if times[peak] > times[-1] * 0.6 else "left",
    )  # fmt: skip
    top = max(report.capacity_bytes, footprint.peak_device_bytes, footprint.peak_allocated_bytes) / GIB
    axes.set_ylim(0, top * 1.12)
    axes.set_xlim(0, timeline.end / scale)
    axes.set_xlabel(f"time in the step ({unit})")
    axes.set_ylabel("GPU memory (GiB)")
    axes.set_title(f"{report.scenario}: memory of rank {footprint.ranks[0]} over a step", loc="left")
    _legend(axes)
    return _png(figure)


def timeline_png(timeline: Timeline, report: Report) -> bytes:
    """Draw what runs on each stream of each class of ranks (at most eight classes)."""
    ranks = sorted(timeline.rank_end)[:8]
    rows: list[tuple[int, str]] = []
    for span in timeline.spans:
        if span.rank in ranks and (span.rank, span.stream) not in rows:
            rows.append((span.rank, span.stream))
    rows.sort(key=lambda row: row[0])
    scale, unit = _time_unit(timeline.end)
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for span in timeline.spans:
        if (span.rank, span.stream) not in rows:
            continue
        row = rows.index((span.rank, span.stream))
        if span.kind == "compute":
            kind = "optimizer" if span.phase == "optimizer" else "compute"
            bars.setdefault((row, kind), []).extend((s / scale, (e - s) / scale) for s, e in busy(span))
        elif span.transfer is not None:
            began = span.transfer.start
            bars.setdefault((row, "transfer"), []).append((began / scale, (span.end - began) / scale))
            if began > span.start:
                bars.setdefault((row, "wait"), []).append((span.start / scale, (began - span.start) / scale))
        else:
            bars.setdefault((row, "host"), []).append((span.start / scale, (span.end - span.start) / scale))
    labelled: set[str] = set()
    for (row, kind), pieces in sorted(bars.items()):
        label = None if kind in labelled else kind
        labelled.add(kind)
        axes.broken_barh(pieces, (row - 0.4, 0.8), facecolors=KIND_COLOURS[kind], label=label, linewidth=0)
    axes.set_yticks(range(len(rows)), [f"rank {rank} · {stream}" for rank, stream in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.end / scale)
    axes.set_xlabel(f"time in the step ({unit})")
    axes.set_title(f"{report.scenario}: one step, {format_duration(report.time_s)}", loc="left")
    _legend(axes)
    return _png(figure)


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    """Return the picture, 130 dots an inch, without a date: the same bytes each time."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": "sim"})
    return buffer.getvalue()
