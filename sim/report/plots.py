"""Pictures. The only importer of matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sim.cluster.topology import Cluster
from sim.ir.footprint import CATEGORIES, Footprint, Sample
from sim.ir.program import Program
from sim.ir.timeline import Timeline
from sim.report.clock import curve
from sim.report.metrics import busy
from sim.report.report import Report
from sim.report.rows import moment
from sim.units import TICKS_PER_S, format_bytes, format_duration

COLOURS = {
    "parameters": "#4e79a7",
    "gradients": "#f28e2b",
    "optimizer": "#59a14f",
    "activations": "#e15759",
    "buffers": "#b07aa1",
    "temporary": "#edc948",
    "rounding": "#9c755f",
}
KIND_COLOURS = {
    "compute": "#4e79a7",
    "optimizer": "#59a14f",
    "communication": "#f28e2b",
    "waits for a rank": "#f9d9b8",
    "copy or CPU": "#8c8c8c",
}
PHASE_COLOURS = {"forward": "#d5dfeb", "backward": "#f3d9d9", "optimizer": "#d9ead7"}
RESULT_COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#edc948", "#9c755f", "#76b7b2", "#ff9da7", "#8c8c8c",
)  # fmt: skip
RESULT_MARKS = ("o", "s", "^")
LIMIT = "#b00020"
GIB = 2**30
NUM_BINS = 1500
MAX_ROWS = 32
_WIDTH, _DPI = 11.0, 130


def _time_unit(ticks: int) -> tuple[float, str]:
    seconds = ticks / TICKS_PER_S
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= 2 * factor:
            return TICKS_PER_S * factor, unit
    return TICKS_PER_S * 1e-9, "ns"


def results_png(points: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """Draw predicted against measured step times, in seconds, a colour and mark a source."""
    figure = Figure(figsize=(9.2, 6.0), layout="constrained")
    axes = figure.subplots()
    every = [value for found in points.values() for pair in found for value in pair]
    ends = (min(every, default=0.1) / 1.5, max(every, default=1.0) * 1.5)
    axes.fill_between(ends, [0.9 * x for x in ends], [1.1 * x for x in ends], color="#e4e4e4", label="within 10 %")
    axes.plot(ends, ends, color="#555555", linewidth=0.8)
    for index, (source, found) in enumerate(points.items()):
        xs, ys = zip(*found, strict=True)
        colour = RESULT_COLOURS[index % len(RESULT_COLOURS)]
        mark = RESULT_MARKS[index // len(RESULT_COLOURS) % len(RESULT_MARKS)]
        label = f"{source} ({len(found):,})"
        axes.scatter(xs, ys, s=14, color=colour, marker=mark, linewidths=0, alpha=0.75, label=label)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured step, s", ylabel="predicted step, s")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    return _png(figure)


# --- memory --------------------------------------------------------------------------------------


def measured_png(
    name: str, measured: Sequence[tuple[float, int]], predicted: Sequence[tuple[float, int]], seconds: bool
) -> bytes:
    """Draw allocated bytes of a real run (left) and of the simulation (right) over time, on one scale of bytes.

    ``measured`` is (us, or number of the event, bytes); ``predicted`` (seconds, bytes) of one step. The peaks of both
    are marked in both.
    """
    figure = Figure(figsize=(_WIDTH, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    peaks = [max((size for _, size in points), default=0) / GIB for points in (measured, predicted)]
    for axes, points, scale, colour in ((left, measured, 1e-6 if seconds else 1.0, "#4e79a7"),
                                        (right, predicted, 1.0, "#f28e2b")):  # fmt: skip
        times = np.array([time for time, _ in points], dtype=float) * scale
        sizes = np.array([size for _, size in points], dtype=float) / GIB
        axes.fill_between(times, sizes, step="post", color=colour, alpha=0.6)
        axes.axhline(peaks[0], color="#4e79a7", linestyle="--", linewidth=1, label=f"measured peak {peaks[0]:.2f} GiB")
        axes.axhline(peaks[1], color="#f28e2b", linestyle="--", linewidth=1, label=f"predicted peak {peaks[1]:.2f} GiB")
        axes.set_ylim(bottom=0)
    left.set(title=f"{name}: measured", xlabel="s" if seconds else "event", ylabel="allocated, GiB")
    right.set(title="predicted, one step", xlabel="s")
    right.legend(loc="lower right", fontsize="small")
    return _png(figure)


def memory_png(footprint: Footprint, timeline: Timeline, program: Program, report: Report) -> bytes:
    """Draw what a rank holds over the step, stacked by category; the peak and the GPU's capacity are marked."""
    rank = footprint.ranks[0]
    scale, unit = _time_unit(timeline.end)
    times, chosen, reserved = _binned(curve(footprint, timeline, program), timeline.end)
    edges = np.append(times, timeline.end) / scale
    heights = np.array([sample.by_category for sample in chosen], dtype=float).reshape(-1, len(CATEGORIES)).T / GIB
    cached = np.array(reserved, dtype=float) / GIB
    figure = Figure(figsize=(_WIDTH, 5.6), layout="constrained")
    axes = figure.subplots()
    base = np.zeros(len(chosen))
    for index, name in enumerate(CATEGORIES):
        if heights[index].max(initial=0.0) * GIB >= 1.0:
            axes.stairs(base + heights[index], edges, baseline=base, fill=True, color=COLOURS[name], label=name)
            base = base + heights[index]
    axes.stairs(cached, edges, baseline=base, fill=True, color="#ececec", label="cached by the\nallocator, free")
    axes.stairs(cached, edges, baseline=None, color="#555555", linewidth=0.9, label="reserved")
    top = max(report.capacity_bytes, max(reserved, default=0), footprint.peak_allocated_bytes) / GIB * 1.13
    _limits(axes, report, timeline.end / scale)
    _peak(axes, footprint, edges, base, top)
    _phases(axes, timeline, rank, scale, top)
    axes.set_ylim(0, top)
    axes.set_xlim(0, timeline.end / scale)
    axes.set_xlabel(f"time in the step ({unit})")
    axes.set_ylabel("GPU memory (GiB)")
    step = {"first": "the first step", "setup": "setup (not timed)"}.get(footprint.peak_step, "a step")
    alike = f" ({len(footprint.ranks) - 1:,} more are alike)" if len(footprint.ranks) > 1 else ""
    _title(axes, f"{report.scenario}: memory of rank {rank} over {step}{alike}")
    _legend(axes, reverse=True)
    return _png(figure)


def _binned(points: Sequence[tuple[int, Sample]], end: int) -> tuple[Any, list[Sample], list[int]]:
    """Return the start of each column of time, the sample that held most in it, and the most that was reserved.

    A picture has fewer columns than a step has samples; each column shows the most that there was in it.
    """
    width = max(1, -(-end // NUM_BINS))
    best: dict[int, Sample] = {}
    most: dict[int, int] = {}
    for tick, sample in points:
        column = min(tick // width, NUM_BINS - 1) if best else 0
        if column not in best or sample.allocated_bytes > best[column].allocated_bytes:
            best[column] = sample
        most[column] = max(most.get(column, 0), sample.reserved_bytes)
    starts = np.array([min(column * width, end) for column in best], dtype=float)
    return starts, list(best.values()), list(most.values())


def _limits(axes: Any, report: Report, end: float) -> None:
    """Mark what the framework can use, and above it what context, NCCL and libraries take of the GPU."""
    usable, capacity = report.usable_bytes / GIB, report.capacity_bytes / GIB
    axes.axhspan(usable, capacity, color=LIMIT, alpha=0.12, linewidth=0)
    axes.axhline(usable, color=LIMIT, linestyle="--", linewidth=1.1)
    axes.annotate(
        f"the allocator can have {format_bytes(report.usable_bytes)} of {format_bytes(report.capacity_bytes)}",
        (end, capacity), xytext=(-4, 4), textcoords="offset points", color=LIMIT, fontsize=9, ha="right",
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}, zorder=6,
    )  # fmt: skip


def _peak(axes: Any, footprint: Footprint, edges: Any, totals: Any, top: float) -> None:
    if not len(totals):
        return
    column = int(np.argmax(totals))
    x, y = (edges[column] + edges[column + 1]) / 2, totals[column]
    late = x > edges[-1] * 0.6
    high = y > top * 0.8
    axes.plot(x, y, "v", color="black", markersize=7, zorder=7, clip_on=False)
    axes.annotate(
        f"peak {format_bytes(footprint.peak_allocated_bytes)}\n"
        f"{moment(footprint.peak_phase, footprint.peak_module)}",
        (x, y), xytext=((-8 if late else 8), (-26 if high else 9)), textcoords="offset points", fontsize=9,
        ha="right" if late else "left", zorder=7,
        bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    )  # fmt: skip


def _phases(axes: Any, timeline: Timeline, rank: int, scale: float, top: float) -> None:
    """Draw a strip below the curve's top edge that says which phase the GPU computes."""
    runs: list[list[Any]] = []
    for span in sorted((s for s in timeline.spans if s.rank == rank and s.stream == "compute"), key=lambda s: s.start):
        if span.kind == "compute" and span.phase in PHASE_COLOURS:
            if runs and runs[-1][0] == span.phase:
                runs[-1][2] = span.end
            else:
                runs.append([span.phase, span.start, span.end])
    y, height = top * 0.965, top * 0.035
    for phase, start, end in runs:
        axes.broken_barh([(start / scale, (end - start) / scale)], (y, height), facecolors=PHASE_COLOURS[phase])
        if (end - start) > 0.012 * len(phase) * timeline.end:
            axes.text((start + end) / 2 / scale, y + height / 2, phase, ha="center", va="center", fontsize=8)


# --- time ----------------------------------------------------------------------------------------


def timeline_png(timeline: Timeline, report: Report) -> bytes:
    """Draw what runs on each stream of each class of ranks.

    A column of the picture is longer than most kernels, so that a bar is as high as the stream was busy in it.
    """
    rows = _streams(timeline)
    left_out = len(rows) - MAX_ROWS
    rows = rows[:MAX_ROWS]
    scale, unit = _time_unit(timeline.end)
    width = max(1, -(-timeline.end // NUM_BINS))
    number = -(-timeline.end // width) if timeline.end else 1
    edges = np.minimum(np.arange(number + 1) * width, timeline.end) / scale
    shares = _shares(timeline, {row: index for index, row in enumerate(rows)}, number, width)
    figure = Figure(figsize=(_WIDTH, 1.5 + 0.46 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for index in range(len(rows)):
        base = np.full(number, float(-index))
        for kind, colour in KIND_COLOURS.items():
            share = shares.get((index, kind))
            if share is None:
                continue
            filled = base + np.minimum(share / width, 1.0) * 0.8
            label = None if kind in labelled else kind
            labelled.add(kind)
            axes.stairs(filled, edges, baseline=base, fill=True, color=colour, label=label)
            base = filled
        axes.axhline(-index, color="#cccccc", linewidth=0.5, zorder=0)
    single = len({rank for rank, _ in rows}) == 1
    names = [stream if single else f"rank {rank} · {stream}" for rank, stream in rows]
    axes.set_yticks([0.4 - index for index in range(len(rows))], names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0.15 - len(rows) + 0.7, 1.0)
    axes.set_xlim(0, timeline.end / scale)
    more = f"; {left_out} more streams are in the trace" if left_out > 0 else ""
    axes.set_xlabel(f"time in the step ({unit}); a bar is as high as the stream is busy{more}")
    alike = f" of rank {rows[0][0]}" if single and rows else ""
    _title(axes, f"{report.scenario}: one step{alike}, {format_duration(report.time_s)}")
    axes.spines["left"].set_visible(False)
    _legend(axes)
    return _png(figure)


def _streams(timeline: Timeline) -> list[tuple[int, str]]:
    """Return (rank, stream) of all that run, by rank, the compute stream first."""
    found = dict.fromkeys((span.rank, span.stream) for span in timeline.spans)
    return sorted(found, key=lambda row: (row[0], row[1] != "compute"))


def _shares(
    timeline: Timeline, rows: dict[tuple[int, str], int], number: int, width: int
) -> dict[tuple[int, str], Any]:
    """Return, for each row and kind, the ticks of each column in which it runs."""
    pieces: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for span in timeline.spans:
        row = rows.get((span.rank, span.stream))
        if row is None:
            continue
        if span.kind == "compute":
            kind = "optimizer" if span.phase == "optimizer" else "compute"
            pieces.setdefault((row, kind), []).extend(busy(span))
        elif span.kind in ("copy", "host") or span.transfer is None:
            pieces.setdefault((row, "copy or CPU"), []).append((span.start, span.end))
        else:
            began = span.transfer.start
            pieces.setdefault((row, "communication"), []).append((began, span.end))
            if began > span.start:
                pieces.setdefault((row, "waits for a rank"), []).append((span.start, began))
    return {key: _coverage(intervals, number, width) for key, intervals in pieces.items()}


def _coverage(intervals: Iterable[tuple[int, int]], number: int, width: int) -> Any:
    """Return how many ticks of each column disjoint intervals cover: the difference of their running total."""
    points = sorted(intervals)
    starts = np.array([start for start, _ in points], dtype=float)
    ends = np.array([end for _, end in points], dtype=float)
    before = np.concatenate([[0.0], np.cumsum(ends - starts)])
    edges = np.arange(number + 1, dtype=float) * width
    index = np.searchsorted(starts, edges, side="right")
    inside = np.where(index > 0, np.maximum(ends[np.maximum(index - 1, 0)] - edges, 0.0), 0.0)
    return np.diff(before[index] - inside)


# --- the machine ---------------------------------------------------------------------------------

DEVICE_ROWS = {"nvswitch": 4, "gpu": 3, "pcie-switch": 2, "nic": 2, "cpu": 1, "memory": 0}
DEVICE_COLOURS = {
    "nvswitch": "#59a14f",
    "gpu": "#76b7b2",
    "pcie-switch": "#bab0ac",
    "nic": "#f28e2b",
    "cpu": "#4e79a7",
}
LINK_COLOURS = {"nvlink": "#59a14f", "xgmi": "#59a14f", "pcie": "#8c8c8c", "cpu": "#4e79a7", "c2c": "#e15759"}


def topology_png(cluster: Cluster) -> bytes:
    """Draw the first node: NVSwitches above the GPUs, PCIe below them down to the sockets; wider is faster."""
    node = cluster.node
    rows: dict[float, list[int]] = {}
    tops = {wire.target for wire in node.wires if node.devices[wire.source].kind == "pcie-switch"}
    for index, device in enumerate(node.devices):
        row = float(DEVICE_ROWS[device.kind])
        if device.kind == "nic":
            row = 2.45
        elif device.kind == "pcie-switch" and any(
            node.devices[wire.target].kind == "pcie-switch" and wire.target in tops
            for wire in node.wires
            if wire.source == index
        ):
            leads_down = any(node.devices[w.target].kind == "gpu" for w in node.wires if w.source == index)
            row = 2.0 if leads_down else 1.6
        rows.setdefault(row, []).append(index)
    beside = 0.3 / max(len(rows.get(2.45, ())), len(node.gpus))  # a NIC stands beside the wire of its GPU
    place = {
        index: ((at + 0.5) / len(members) + (beside if row == 2.45 else 0.0), row)
        for row, members in rows.items()
        for at, index in enumerate(members)
    }
    figure = Figure(figsize=(_WIDTH, 6.0), layout="constrained")
    axes = figure.add_subplot()
    fastest = max((wire.bytes_per_s for wire in node.wires if wire.bytes_per_s < 1e15), default=1.0)
    for wire in node.wires[::2]:
        (x0, y0), (x1, y1) = place[wire.source], place[wire.target]
        width = 0.6 + 3.4 * (min(wire.bytes_per_s, fastest) / fastest) ** 0.5
        bend = 0.0 if y0 != y1 else 0.15
        axes.annotate(
            "", (x1, y1), (x0, y0),
            arrowprops={
                "arrowstyle": "-", "color": LINK_COLOURS.get(wire.kind, "#8c8c8c"), "lw": width, "alpha": 0.7,
                "connectionstyle": f"arc3,rad={bend}",
            },
        )  # fmt: skip
    for index, device in enumerate(node.devices):
        x, y = place[index]
        axes.text(
            x, y, device.name, ha="center", va="center", fontsize=7 if len(node.devices) < 60 else 4,
            bbox={"boxstyle": "round,pad=0.3", "fc": DEVICE_COLOURS[device.kind], "ec": "white"},
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0.3, 4.4)
    axes.axis("off")
    _title(axes, f"{cluster.spec.node.title}: wires as wide as they are fast")
    return _png(figure)


# --- both ----------------------------------------------------------------------------------------


def _title(axes: Any, words: str) -> None:
    axes.set_title(words, loc="left", fontsize=12, pad=10)


def _legend(axes: Any, reverse: bool = False) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, reverse=reverse)


def _png(figure: Figure) -> bytes:
    """Return the picture without a date: the same bytes each time."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": "sim"})
    return buffer.getvalue()
