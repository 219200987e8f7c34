"""The report as a person reads it in a terminal, 80 columns and more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from sim.ir.footprint import Footprint
from sim.report.report import RemedyResult, Report
from sim.report.rows import (
    COMMUNICATION_HEADER,
    account,
    communication_rows,
    headline,
    out_of_memory_words,
    peak_words,
    step_rows,
)
from sim.scenario.schema import Scenario
from sim.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console

BAR_WIDTH = 24
MAX_CLASSES = 4
MAX_HOLDERS = 6


def print_report(console: Console, scenario: Scenario, report: Report, remedies: Sequence[RemedyResult]) -> None:
    """Print headline, memory, step, communication; where it does not fit, who holds it and what would help."""
    words = headline(scenario, report)
    console.print()
    console.print(Text.assemble((words.model, "bold"), f" on {words.where}"))
    console.print(Text(words.how, style="dim"))
    style = "bold green" if report.fits else "bold red"
    console.print(Text.assemble((words.verdict, style), f": {words.memory}"))
    console.print(Text.assemble("step ", (words.time, "bold"), f" · {words.rate}"))
    fullest = report.fullest
    for footprint in [fullest, *(f for f in report.footprints if f is not fullest)][:MAX_CLASSES]:
        console.print()
        console.print(_memory(footprint, report))
    if not report.fits:
        console.print()
        console.print(Text.assemble(("out of memory ", "bold red"), out_of_memory_words(report)))
        console.print(_holders(next(f for f in report.footprints if f.out_of_memory is not None)))
        if remedies:
            console.print(_remedies(remedies))
    console.print()
    console.print(_step(report))
    if report.communication:
        console.print()
        console.print(_communication(report))


def _memory(footprint: Footprint, report: Report) -> Table:
    table = _table(f"Memory of a GPU at the peak ({peak_words(footprint)})")
    table.add_column(min_width=26)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(min_width=BAR_WIDTH)
    whole = max(report.capacity_bytes, footprint.peak_device_bytes)
    for row in account(footprint):
        style = "bold" if row.total else ""
        table.add_row(
            Text(row.name if row.total else f"  {row.name}", style=style),
            Text(format_bytes(row.num_bytes), style=style),
            f"{row.num_bytes / report.capacity_bytes:.1%}",
            "" if row.total else _bar(row.num_bytes / whole),
        )
    if footprint.host_bytes:
        table.add_row(Text("host memory of the node", style="bold"), format_bytes(report.host_bytes_per_node), "", "")
    return table


def _holders(footprint: Footprint) -> Table:
    table = _table("Who holds it at the peak")
    table.add_column(min_width=26)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for holder in footprint.holders[:MAX_HOLDERS]:
        category = Text(holder.category, style="dim")
        table.add_row(f"  {holder.name}", f"{holder.count} x", format_bytes(holder.num_bytes), category)
    return table


def _remedies(remedies: Sequence[RemedyResult]) -> Table:
    fitting = any(remedy.fits for remedy in remedies)
    table = _table("What makes it fit (each simulated)" if fitting else "Nothing tried makes it fit; the nearest")
    table.add_column(min_width=26)
    table.add_column(justify="right")
    table.add_column(justify="right")
    for remedy in remedies:
        step = f"{format_duration(remedy.time_s)} a step"
        table.add_row(f"  {remedy.words}", format_bytes(remedy.peak_device_bytes), step)
        table.add_row(Text("    " + " ".join(f"--set {o}" for o in remedy.overrides), style="dim"), "", "")
    return table


def _step(report: Report) -> Table:
    table = _table("Time of a step (the slowest rank)")
    table.add_column(min_width=26)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(min_width=BAR_WIDTH)
    for words, duration, share in step_rows(report):
        table.add_row(f"  {words}", duration, f"{share:.1%}", _bar(share))
    return table


def _communication(report: Report) -> Table:
    table = _table("Communication of a rank in a step")
    table.show_header = True
    for name in COMMUNICATION_HEADER:
        justify = "left" if name in ("kind", "axis", "algorithm") else "right"
        table.add_column(f"  {name}" if name == "kind" else name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for kind, *rest in communication_rows(report):
        table.add_row(f"  {kind}", *rest)
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold cyan", header_style="dim", box=None, show_header=False,
        pad_edge=False, padding=(0, 2, 0, 0),
    )  # fmt: skip


def _bar(share: float) -> Text:
    """Return a bar of eighths of a character; full width is 1."""
    full, rest = divmod(round(max(0.0, min(1.0, share)) * BAR_WIDTH * 8), 8)
    return Text("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else ""), style="cyan")
