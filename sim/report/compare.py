"""Several answered scenarios side by side: a column for each, changes relative to the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sim.report.layout import Cell, Line, Screen, grid, title
from sim.report.report import Report
from sim.units import format_bytes, format_duration, format_flops

NAME_WIDTH = 23
MIN_COLUMN = 16
Value = Callable[[dict[str, Any]], float]


def comparison(reports: Sequence[Report], names: Sequence[str]) -> dict[str, Any]:
    """Return what ``sim compare --json`` prints: each result, and each figure relative to the first scenario's."""
    results = [report.to_dict() for report in reports]
    first = results[0]
    return {
        "scenarios": [{"file": name, **content} for name, content in zip(names, results, strict=True)],
        "relative_to_first": [
            {key: _ratio(value(content), value(first)) for key, (value, _) in _FIGURES.items()} for content in results
        ],
    }


def print_comparison(screen: Screen, reports: Sequence[Report], names: Sequence[str]) -> None:
    """Print as many scenarios beside each other as the width has room for, the first in every block."""
    width = min(screen.width, 160)
    room = max(2, (width - 2 - NAME_WIDTH) // (MIN_COLUMN + 2))
    results = [report.to_dict() for report in reports]
    rest = list(range(1, len(results)))
    blocks = [rest[at : at + room - 1] for at in range(0, len(rest), room - 1)] or [[]]
    for number, block in enumerate(blocks):
        if number:
            screen.show([()])
        chosen = [0, *block]
        screen.show(_block([results[i] for i in chosen], [names[i] for i in chosen], width))


def _block(results: Sequence[dict[str, Any]], names: Sequence[str], width: int) -> Iterator[Line]:
    column = max(MIN_COLUMN, (width - 2 - NAME_WIDTH) // len(names) - 2)
    shown = [_short(name, column) for name in names]
    yield from grid(list(_rows(results, shown)), "l" + "r" * len(names), width)
    if len(names) > 1:
        yield ()
        yield title("", f"changes are relative to {names[0]}")


def _rows(results: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[tuple[Cell, ...]]:
    yield ("", *((name, "bold") for name in names))
    yield ("fits", *(("fits", "green") if r["fits"] else ("does not fit", "red") for r in results))
    yield ("GPUs", *(f"{r['world_size']:,}" for r in results))
    for key, (value, words) in _FIGURES.items():
        if any(value(r) for r in results):
            yield (_NAMES[key], *_cells([value(r) for r in results], words))
    kinds = dict.fromkeys((total["kind"], total["axis"]) for r in results for total in r["communication"])
    for kind, axis in kinds:
        bytes_, times = zip(*(_communication(r, kind, axis) for r in results), strict=True)
        yield (f"{kind} {axis}", *_cells(bytes_, format_bytes))
        yield ("  time", *_cells(times, format_duration))


def _communication(result: dict[str, Any], kind: str, axis: str) -> tuple[float, float]:
    """Return (bytes of the tensors, seconds) of one kind on one axis; zero where there is none."""
    found = [total for total in result["communication"] if (total["kind"], total["axis"]) == (kind, axis)]
    return sum(total["tensor_bytes"] for total in found), sum(total["time_s"] for total in found)


def _cells(values: Sequence[float], words: Callable[[float], str]) -> Iterator[str]:
    first = values[0]
    for index, value in enumerate(values):
        text = words(value) if value else "-"
        ratio = _ratio(value, first)
        yield text if index == 0 or ratio is None or not value else f"{text} {_change(ratio)}".rstrip()


def _change(ratio: float) -> str:
    """Return a ratio as people say it: "+12%", "x3.4", "="."""
    if ratio >= 1000:
        return ""
    if ratio >= 2:
        return f"x{ratio:.3g}"
    percent = round((ratio - 1) * 100)
    return f"{percent:+d}%" if percent else ("=" if ratio == 1 else "~")


def _ratio(value: float, first: float) -> float | None:
    return value / first if first else None


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percentage(value: float) -> str:
    return f"{value:.1%}"


def _short(name: str, width: int) -> str:
    """Return a name that fits its column; its end tells it from its neighbours."""
    return name if len(name) <= width else "..." + name[3 - width :]


def _of(section: str, key: str) -> Value:
    return lambda result: float(result[section][key])


_FIGURES: dict[str, tuple[Value, Callable[[float], str]]] = {
    "peak_device_bytes": (_of("memory", "peak_device_bytes"), format_bytes),
    "peak_reserved_bytes": (_of("memory", "peak_reserved_bytes"), format_bytes),
    "peak_allocated_bytes": (_of("memory", "peak_allocated_bytes"), format_bytes),
    "host_bytes_per_node": (_of("memory", "host_bytes_per_node"), format_bytes),
    "time_s": (_of("step", "time_s"), format_duration),
    "compute_s": (_of("step", "compute_s"), format_duration),
    "exposed_communication_s": (_of("step", "exposed_communication_s"), format_duration),
    "bubble_s": (_of("step", "bubble_s"), format_duration),
    "optimizer_s": (_of("step", "optimizer_s"), format_duration),
    "other_s": (_of("step", "other_s"), format_duration),
    "tokens_per_s": (_of("step", "tokens_per_s"), _count),
    "tokens_per_s_per_gpu": (_of("step", "tokens_per_s_per_gpu"), _count),
    "model_flops_per_s_per_gpu": (_of("step", "model_flops_per_s_per_gpu"), format_flops),
    "mfu": (_of("step", "mfu"), _percentage),
}
_NAMES = {
    "peak_device_bytes": "on the device",
    "peak_reserved_bytes": "  reserved",
    "peak_allocated_bytes": "  allocated",
    "host_bytes_per_node": "host memory of a node",
    "time_s": "step",
    "compute_s": "  compute",
    "exposed_communication_s": "  exposed communication",
    "bubble_s": "  pipeline bubble",
    "optimizer_s": "  optimizer",
    "other_s": "  waiting for the host",
    "tokens_per_s": "tokens/s",
    "tokens_per_s_per_gpu": "  per GPU",
    "model_flops_per_s_per_gpu": "FLOP/s per GPU",
    "mfu": "MFU",
}
