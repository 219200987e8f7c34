"""Plots of an answer as SVG: time against money, cost by candidate, memory by configuration.

Colours are CSS variables with fallbacks, so that one drawing serves a page in light or dark and stands alone as a file.
Text is text: it can be searched, copied and read by a screen reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

from sim.units import format_bytes, format_duration, format_energy, format_money

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 120, 18, 18, 52
ROW = 66
"""Height of a bar with its two lines."""
_SERIES = ("#2a6fdb", "#c2571a", "#1f8a5b", "#8a4fc7", "#b8860b", "#c23b6b", "#4a7a8c", "#6b6b6b")
_STYLE = (
    "<style>.ink{fill:var(--ink,#1c1c1c)}.soft{fill:var(--soft,#5f6368)}.grid{stroke:var(--grid,#dadce0)}"
    ".front{stroke:var(--ink,#1c1c1c)}text{font:12px system-ui,sans-serif}</style>"
)
MAX_BARS = 14
PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers", "temporary", "beside")


def pareto(answer: Mapping[str, Any]) -> str:
    """Return time against money of all that was simulated and fits; the front is joined, the recommended ringed."""
    entries = answer["ranked"]
    best = answer["recommended"]
    xs, ys = [e["time_s"] for e in entries], [e["usd"] for e in entries]
    x, y = _Axis(xs, LEFT, WIDTH - RIGHT), _Axis(ys, HEIGHT - BOTTOM, TOP)
    out = [*_frame(x, y, format_duration, format_money, "time to train", "money")]
    front = sorted(answer["front"], key=lambda e: (e["time_s"], e["usd"]))
    steps = _pareto_line(front, x, y)
    if steps:
        out.append(f'<polyline class="front" fill="none" stroke-width="1.2" stroke-dasharray="4 3" points="{steps}"/>')
    colour = _colours(entries)
    for e in reversed(entries):
        at = f'cx="{x.at(e["time_s"]):.1f}" cy="{y.at(e["usd"]):.1f}"'
        words = f"{e['cluster']}: {e['strategy']} – {format_duration(e['time_s'])}, {format_money(e['usd'])}"
        radius = 3 + 1.2 * max(0.0, log10(e["num_gpus"]) - 1)
        out.append(
            f'<circle {at} r="{radius:.1f}" fill="{colour[e["node"]]}" fill-opacity="0.75">'
            f"<title>{escape(words)}</title></circle>"
        )
        if best and (e["cluster"], e["strategy"], e["network"]) == (best["cluster"], best["strategy"], best["network"]):
            out.append(f'<circle class="front" {at} r="{radius + 4:.1f}" fill="none" stroke-width="2"/>')
    out += _legend(colour)
    return _svg(out, "Time to train against money, one dot a candidate", HEIGHT + 22 * _rows(colour))


def cost(answer: Mapping[str, Any]) -> str:
    """Return what the best candidate of each cluster costs, as bars beside its time."""
    firsts: dict[str, Mapping[str, Any]] = {}
    for e in answer["ranked"]:
        firsts.setdefault(e["cluster"] + (e["network"] or ""), e)
    return _bars(
        [
            (
                e["cluster"],
                [(colour, e["money"][part]) for part, colour in zip(_MONEY, _SERIES, strict=False)],
                f"{format_money(e['usd'])}, {format_duration(e['time_s'])}, {format_energy(e['joules'])}",
            )
            for e in list(firsts.values())[:MAX_BARS]
        ],
        dict(zip(("GPUs", "power", "people", "storage"), _SERIES, strict=False)),
        "What the best candidate of each cluster costs",
        None,
    )


_MONEY = ("gpus", "power", "people", "storage")


def memory(answer: Mapping[str, Any]) -> str:
    """Return what holds the memory of the fullest GPU at its peak, by configuration, against its capacity."""
    rows = []
    for e in answer["ranked"][:MAX_BARS]:
        held = dict(e["memory"]["at_peak"])
        held["buffers"] = held.get("buffers", 0) + held.pop("rounding", 0)
        held["beside"] = sum(e["memory"]["beside"].values())
        rows.append((
            f"{format_bytes(e['memory']['peak_device_bytes'])} of {format_bytes(e['memory']['capacity_bytes'])}: "
            f"{e['cluster']}",
            [(colour, held.get(part, 0)) for part, colour in zip(PARTS, _SERIES, strict=False)],
            e["strategy"],
        ))  # fmt: skip
    most = max((e["memory"]["capacity_bytes"] for e in answer["ranked"][:MAX_BARS]), default=1)
    return _bars(rows, dict(zip(PARTS, _SERIES, strict=False)), "Memory of the fullest GPU at its peak", most)


# --- pieces --------------------------------------------------------------------------------------


class _Axis:
    """Values on a line of pixels; logarithmic where they spread over more than a factor of five."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        positive = [v for v in values if v > 0]
        self.log = bool(positive) and len(positive) == len(values) and max(values) > 5 * min(values)
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if low == high:
            low, high = low * 0.9, high * 1.1 or 1.0
        if self.log:
            self.low, self.high = low / 1.15, high * 1.15
        else:
            room = (high - low) * 0.08
            self.low, self.high = max(0.0, low - room), high + room
        self.first, self.last = first, last

    def at(self, value: float) -> float:
        if self.log:
            share = log10(value / self.low) / log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        if self.log:
            found = [
                digit * 10.0**power
                for power in range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
                for digit in (1, 2, 5)
            ]
            return [value for value in found if self.low <= value <= self.high]
        step = 10.0 ** floor(log10((self.high - self.low) / 3 or 1.0))
        step = next(s for s in (step, 2 * step, 5 * step, 10 * step) if (self.high - self.low) / s <= 6)
        return [n * step for n in range(ceil(self.low / step), floor(self.high / step) + 1)]


def _frame(x: _Axis, y: _Axis, x_words: Any, y_words: Any, x_name: str, y_name: str) -> list[str]:
    out = []
    days = 86400.0
    for value in _day_ticks(x):
        at = x.at(value)
        out.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        words = f"{value / days:g} d" if value >= days else x_words(value)
        out.append(f'<text class="soft" x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{words}</text>')
    for value in y.ticks():
        at = y.at(value)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text class="soft" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y_words(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="ink" x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{x_name}</text>')
    out.append(f'<text class="ink" x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})">{y_name}</text>')
    return out


def _day_ticks(x: _Axis) -> list[float]:
    """Return ticks of a time axis at whole days, or hours where it is shorter."""
    unit = 86400.0 if x.high > 3 * 86400 else 3600.0
    scaled = _Axis([1.0], x.first, x.last)
    scaled.log, scaled.low, scaled.high = x.log, x.low / unit, x.high / unit
    return [value * unit for value in scaled.ticks()]


def _pareto_line(front: Sequence[Mapping[str, Any]], x: _Axis, y: _Axis) -> str:
    """Return the steps of what is cheapest by each time."""
    points: list[str] = []
    least: float | None = None
    for e in front:
        if least is not None and e["usd"] >= least:
            continue
        if least is not None:
            points.append(f"{x.at(e['time_s']):.1f},{y.at(least):.1f}")
        least = e["usd"]
        points.append(f"{x.at(e['time_s']):.1f},{y.at(e['usd']):.1f}")
    return " ".join(points) if len(points) > 1 else ""


def _colours(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    nodes = sorted({e["node"] for e in entries})
    return {node: _SERIES[i % len(_SERIES)] for i, node in enumerate(nodes)}


def _rows(colour: Mapping[str, str]) -> int:
    return -(-len(colour) // 4)


def _legend(colour: Mapping[str, str], top: float = HEIGHT) -> list[str]:
    out = []
    for i, (name, fill) in enumerate(colour.items()):
        left, at = LEFT + (i % 4) * 160, top + 14 + 22 * (i // 4)
        out.append(f'<rect x="{left}" y="{at - 10}" width="12" height="12" fill="{fill}"/>')
        out.append(f'<text class="ink" x="{left + 18}" y="{at}">{escape(name)}</text>')
    return out


def _bars(
    rows: Sequence[tuple[str, list[tuple[str, float]], str]], legend: Mapping[str, str], title: str, most: float | None
) -> str:
    """Return stacked bars, two lines above each, so that a phone has room for larger letters; ``most`` is the whole."""
    full = max([*(sum(value for _, value in parts) for _, parts, _ in rows), most or 0.0], default=1.0) or 1.0
    inner = WIDTH - 2 * RIGHT
    out = []
    for i, (name, parts, words) in enumerate(rows):
        top = 8 + ROW * i
        out.append(f'<text class="ink" x="{RIGHT}" y="{top + 12}">{escape(name)}</text>')
        out.append(f'<text class="soft" x="{RIGHT}" y="{top + 33}">{escape(words)}</text>')
        left = float(RIGHT)
        for fill, value in parts:
            width = inner * value / full
            if width > 0.05:
                out.append(f'<rect x="{left:.1f}" y="{top + 40}" width="{width:.1f}" height="14" fill="{fill}"/>')
            left += width
    height = 8 + ROW * len(rows)
    out += _legend(legend, height)
    return _svg(out, title, height + 22 * _rows(legend) + 6)


def _svg(parts: Sequence[str], title: str, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{_STYLE}{"".join(parts)}</svg>'
    )
