"""``report.md``: the answer in words and tables, for a pull request or a mail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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
    step_rows,
    time_band_words,
)
from sim.scenario.schema import Scenario
from sim.units import format_bytes, format_duration


def to_markdown(scenario: Scenario, report: Report, remedies: Sequence[RemedyResult]) -> str:
    """Return the report as Markdown, with the plots that stand beside it."""
    return "\n".join(_lines(scenario, report, remedies)) + "\n"


def _lines(scenario: Scenario, report: Report, remedies: Sequence[RemedyResult]) -> Iterator[str]:
    words = headline(scenario, report)
    yield f"# {words.model} on {words.machine}\n"
    yield f"{words.layout}  \n{words.job}\n"
    yield f"**{_sentence(words.verdict)}**: {words.memory}.  "
    yield f"**{words.time}** a step: {words.rate} · {words.efficiency}."
    if not report.fits_gpu:
        yield f"\n**Out of memory** in {out_of_memory_words(report)}."
    footprint = report.fullest
    yield f"\n## Memory of the fullest GPU at its peak\n\n{_sentence(peak_words(footprint))}\n"
    rows = (
        (_bold(r.name, r.total), f"{r.num_bytes:,}", _bold(format_bytes(r.num_bytes), r.total))
        for r in account(footprint)
    )
    yield from _table(("held by", "bytes", ""), "lrr", rows)
    if report.confidence is not None:
        yield f"\n{_sentence(band_words(report.confidence))}."
    yield "\n![memory over the step](memory.png)"
    if len(report.footprints) > 1:
        yield "\n## Memory of all ranks at their peaks\n"
        yield from _table(CLASS_HEADER, "lrrrrl", class_rows(report))
    if not report.fits_gpu:
        yield "\n## Who holds most at the peak\n"
        holders = next(f for f in report.footprints if f.out_of_memory is not None).holders
        held = ((h.name, f"{h.count:,}", format_bytes(h.num_bytes), h.category) for h in holders)
        yield from _table(("storage", "number", "together", "category"), "lrrl", held)
    if remedies:
        yield "\n## What would make it fit\n\nEach was simulated.\n"
        yield from map(_remedy, remedies)
    yield "\n## Time of a step\n"
    yield from _table(
        ("part", "time", "share"), "lrr", ((part, time, f"{share:.1%}") for part, time, share in step_rows(report))
    )
    if report.time_confidence is not None:
        yield f"\n{_sentence(time_band_words(report.time_confidence))}."
    yield "\n![one step](timeline.png)"
    if report.communication:
        yield "\n## Communication of one rank in a step\n"
        yield from _table(COMMUNICATION_HEADER, "llrrrrrl", communication_rows(report))
    if report.warnings:
        yield "\n## What was assumed\n"
        yield from (f"- {warning}" for warning in report.warnings)


def _remedy(remedy: RemedyResult) -> str:
    options = " ".join(f"--set {o}" for o in remedy.overrides)
    verdict = "fits" if remedy.fits else "still does not fit"
    memory, time = format_bytes(remedy.peak_device_bytes), format_duration(remedy.time_s)
    return f"- {remedy.words} (`{options}`): {verdict}, {memory}, {time} a step"


def _table(header: Sequence[str], justify: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join('---:' if side == 'r' else '---' for side in justify)}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]
