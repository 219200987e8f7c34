"""The report as a person reads it in a terminal, 80 columns and more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp

from sim.ir.footprint import Footprint
from sim.report.certainty import TimeConfidence
from sim.report.layout import Cell, Line, Screen, fold, grid, title
from sim.report.report import RemedyResult, Report
from sim.report.rows import (
    CLASS_HEADER,
    COMMUNICATION_HEADER,
    account,
    band_words,
    class_rows,
    communication_rows,
    headline,
    out_of_memory_words,
    peak_words,
    remedy_rows,
    step_rows,
    time_band_words,
)
from sim.scenario.schema import Scenario
from sim.units import format_bytes, format_duration

NAME_WIDTH, SIZE_WIDTH, SHARE_WIDTH = 26, 9, 6
MIN_BAR, MAX_BAR = 10, 48
MAX_CLASSES = 8
MAX_HOLDERS = 6
MAX_SOURCES = 4


def print_report(screen: Screen, scenario: Scenario, report: Report, remedies: Sequence[RemedyResult]) -> None:
    """Print headline, memory, step, communication; where it does not fit, who holds it and what would help."""
    screen.show(_report(scenario, report, remedies, min(screen.width, 120)))


def print_warnings(screen: Screen, warnings: Sequence[str]) -> None:
    """Print what was assumed, extrapolated or not modelled, a paragraph each."""
    if not warnings:
        return
    width = min(screen.width, 120)
    lines = [line for words in warnings for line in fold(f"- {words}", width, 2, hang=2)]
    screen.show([(), title("Assumed, extrapolated or not modelled"), *((line,) for line in lines)])


def _report(scenario: Scenario, report: Report, remedies: Sequence[RemedyResult], width: int) -> Iterator[Line]:
    yield from _headline(scenario, report, width)
    yield ()
    yield from _memory(report.fullest, report, width)
    if len(report.footprints) > 1:
        yield ()
        yield title("Memory of all ranks at their peaks")
        rows = list(class_rows(report))[:MAX_CLASSES]
        yield from grid([_dim(CLASS_HEADER), *rows], "lrrrrl", width)
        if more := len(report.footprints) - len(rows):
            yield ((f"  and {more} more classes of ranks (--json has all)", "dim"),)
    if not report.fits_gpu:
        yield ()
        yield (("Out of memory", "bold red"),)
        yield from ((line,) for line in fold(out_of_memory_words(report), width, 2))
        yield ()
        yield from _holders(next(f for f in report.footprints if f.out_of_memory is not None), width)
    if not report.fits and remedies:
        yield ()
        yield from _remedies(remedies, width)
    yield ()
    yield title("Time of a step", "the slowest rank")
    rest = width - _BAR_AT
    for words, duration, share in step_rows(report):
        yield _bar_line(words, duration, share, share, rest, total=False)
    if report.time_confidence is not None:
        yield from (((line, "dim"),) for line in fold(time_band_words(report.time_confidence), width, 2))
    if report.communication:
        yield ()
        yield title("Communication in a step", "of one rank")
        yield from grid([_dim(COMMUNICATION_HEADER), *communication_rows(report)], "llrrrrrl", width)


def _headline(scenario: Scenario, report: Report, width: int) -> Iterator[Line]:
    words = headline(scenario, report)
    yield (words.model, "bold"), f" on {words.machine}"
    yield from (((line, "dim"),) for line in fold(words.layout, width, 0))
    yield from (((line, "dim"),) for line in fold(words.job, width, 0))
    yield ()
    style = "bold green" if report.fits else "bold red"
    yield from _answer((words.verdict, style), words.memory, width)
    together = f"{words.rate} · {words.efficiency}"
    fits = ANSWER_WIDTH + 2 + len(together) <= width
    yield from _answer((f"{words.time} a step", "bold"), together if fits else words.rate, width)
    if not fits:
        yield from ((line,) for line in fold(words.efficiency, width, ANSWER_WIDTH + 2))


def _answer(answer: tuple[str, str], words: str, width: int) -> Iterator[Line]:
    indent = ANSWER_WIDTH + 2
    first, *rest = fold(words, width, indent)
    yield (answer[0].ljust(ANSWER_WIDTH), answer[1]), "  ", first.strip()
    yield from ((line,) for line in rest)


ANSWER_WIDTH = 13
_BAR_AT = 2 + NAME_WIDTH + SIZE_WIDTH + 2 + SHARE_WIDTH + 2


def _memory(footprint: Footprint, report: Report, width: int) -> Iterator[Line]:
    yield title("Memory of the fullest GPU at its peak")
    yield from (((line, "dim"),) for line in fold(peak_words(footprint), width, 2))
    whole = max(report.capacity_bytes, footprint.peak_device_bytes)
    for row in account(footprint):
        share, part = row.num_bytes / report.capacity_bytes, row.num_bytes / whole
        yield _bar_line(row.name, format_bytes(row.num_bytes), share, part, width - _BAR_AT, total=row.total)
    if report.confidence is not None:
        yield from (((line, "dim"),) for line in fold(band_words(report.confidence), width, 2))
    if report.host_bytes_per_node:
        name = "host memory of a node"
        share = report.host_bytes_per_node / report.host_capacity_bytes if report.host_capacity_bytes else 0.0
        words = f"  {name:<{NAME_WIDTH}}{format_bytes(report.host_bytes_per_node):>{SIZE_WIDTH}}"
        of = f"  of {format_bytes(report.host_capacity_bytes)}" if share else ""
        yield (words, "" if report.fits_host else "bold red"), of


def _bar_line(name: str, value: str, share: float, part: float, rest: int, total: bool) -> Line:
    left = f"{name if total else f'  {name}':<{NAME_WIDTH}}{value:>{SIZE_WIDTH}}"
    drawn = "" if total or rest < MIN_BAR else bar(part, min(rest, MAX_BAR))
    return "  ", (left, "bold" if total else ""), f"  {share:>{SHARE_WIDTH}.1%}  ", (drawn, "cyan")


def _holders(footprint: Footprint, width: int) -> Iterator[Line]:
    yield title("Who holds most at the peak")
    rows: list[tuple[Cell, ...]] = [
        (h.name, f"{h.count} x" if h.count > 1 else "", format_bytes(h.num_bytes), (h.category, "dim"))
        for h in footprint.holders[:MAX_HOLDERS]
    ]
    yield from grid(rows, "lrrl", width)


def _remedies(remedies: Sequence[RemedyResult], width: int) -> Iterator[Line]:
    fitting = any(remedy.fits for remedy in remedies)
    yield title(
        "What makes it fit" if fitting else "Nothing that was tried makes it fit; nearest", "each was simulated"
    )
    rows = list(remedy_rows(remedies))
    for line, row in zip(grid([row[:3] for row in rows], "lrr", width), rows, strict=True):
        yield line
        options = row[3].replace("--set ", "--set\0")  # an option stays with its value
        yield from (((part.replace("\0", " "), "dim"),) for part in fold(options, width, 4))


def bar(part: float, width: int) -> str:
    """Return a bar of eighths of a character; ``part`` 1 is the full width."""
    full, rest = divmod(round(max(0.0, min(1.0, part)) * width * 8), 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def _dim(header: Sequence[str]) -> list[Cell]:
    return [(name, "dim") for name in header]


def print_time(screen: Screen, found: TimeConfidence, time_s: float) -> None:
    """Print what the band of a step's time rests on, what drives it first."""
    screen.show(_certainty(found, time_s, min(screen.width, 120)))


def _certainty(found: TimeConfidence, time_s: float, width: int) -> Iterator[Line]:
    yield ()
    band = f"{format_duration(found.low_s)} to {format_duration(found.high_s)}"
    yield title("Certainty of the time", f"nine like runs of ten: {band}")
    header: list[Cell] = [(name, "dim") for name in ("family", "time", "share", "off by", "of the step")]
    rows: list[list[Cell]] = [
        [
            part.name,
            format_duration(part.time_s),
            f"{part.time_s / time_s:.1%}",
            f"{part.deviation_s / part.time_s:.1%}",
            f"{part.deviation_s / time_s:.1%}",
        ]
        for part in found.parts
    ]
    yield from grid([header, *rows], "lrrrr", width)
    alone = f"{format_duration(found.parts_low_s)} to {format_duration(found.parts_high_s)}"
    beyond = (
        f"by these parts alone {alone}; whole runs beyond them {1 - exp(-found.whole.below):.0%} shorter to "
        f"{exp(found.whole.above) - 1:.0%} longer: {found.whole.source}"
    )
    yield from (((line, "dim"),) for line in fold(beyond, width, 2, hang=2))
    for part in found.parts[:MAX_SOURCES]:
        yield from (((line, "dim"),) for line in fold(f"{part.name}: {part.source}", width, 2, hang=2))
