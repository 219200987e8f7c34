"""Measured beside predicted, as a person reads it: 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from sim.report.layout import Cell, Line, Screen, fold, grid, title
from sim.units import format_bytes, format_duration, format_flops
from sim.validation.predict import Comparison, Failed, Validation, contradictions
from sim.validation.summary import Summary, by_quantity, by_source, grouped, reasons, sources_alike

SUMMARY_HEADER = ("", "number", "mean", "mean abs", "median abs", "worst")
MAX_REASONS = 12
LARGE = 0.2
"""Errors above this are shown in red."""


def print_validation(screen: Screen, validation: Validation, quiet: bool) -> None:
    """Print every run and quantity (unless ``quiet``), then the summaries by file and over all."""
    screen.show(_lines(validation, min(screen.width, 120), quiet))


def _by_category(validation: Validation, width: int) -> Iterator[Line]:
    """Where a run measured categories: what each is off, and which is the largest difference."""
    from sim.validation.parts import all_differences

    for run, found in all_differences(validation):
        if not found:
            continue
        yield title(f"{run.id}: memory at the peak by category", f"most of the difference is {found[0].category}")
        header = [(name, "dim") for name in ("", "measured", "predicted", "difference")]
        rows = [
            (d.category, format_bytes(d.measured_bytes), format_bytes(d.predicted_bytes), _signed(d.difference_bytes))
            for d in found
        ]
        yield from grid([header, *rows], "lrrr", width, indent=4)
        yield ()


def _signed(num_bytes: int) -> str:
    return f"{'-' if num_bytes < 0 else '+'}{format_bytes(abs(num_bytes))}"


def _lines(validation: Validation, width: int, quiet: bool) -> Iterator[Line]:
    sources = {file.name: file.source.get("title") or "" for file in validation.files}
    if not quiet:
        failed = grouped_failures(validation.failed)
        rows = grouped(validation.comparisons, lambda row: row.source)
        for file in validation.files:
            if file.name in rows or file.name in failed:
                yield title(file.name)
                yield from (((line, "dim"),) for line in fold(str(sources[file.name]), width, 2))
                yield from _runs(rows.get(file.name, ()), width)
                yield from _failures(failed.get(file.name, ()), width)
                yield ()
        yield from _by_category(validation, width)
        if wrong := list(contradictions(validation.comparisons)):
            yield title("figures that cannot all hold")
            for words in wrong:
                yield from (((line, "yellow"),) for line in fold(words, width, 2, hang=2))
            yield ()
    for source, summaries in by_source(validation.comparisons).items():
        yield title(source)
        yield from _summaries(summaries, width)
        yield ()
    if validation.comparisons:
        yield title("all files")
        yield from _summaries(by_quantity(validation.comparisons), width)
        alike = sources_alike(validation.comparisons)
        if len(validation.files) > 1:
            yield ()
            yield title("each file weighing the same")
            yield from grid(
                [
                    [(cell, "dim") for cell in ("", "files", "mean", "mean abs", "median abs")],
                    *(
                        (
                            name,
                            str(means["sources"]),
                            percent(means["mean_error"]),
                            f"{means['mean_absolute_error']:.1%}",
                            f"{means['median_absolute_error']:.1%}",
                        )
                        for name, means in alike.items()
                    ),
                ],
                "lrrrr",
                width,
            )
    if validation.failed:
        yield ()
        yield title(f"{len(validation.failed):,} runs could not be predicted", "a run may have several reasons")
        counted = reasons(validation.failed)
        yield from grid([(f"{count:,}", words) for words, count in counted[:MAX_REASONS]], "rl", width)
        if more := len(counted) - MAX_REASONS:
            yield ((f"  and {more} more reasons (--json has all)" if more > 0 else "", "dim"),)


def grouped_failures(failed: Iterable[Failed]) -> dict[str, list[Failed]]:
    groups: dict[str, list[Failed]] = {}
    for row in failed:
        groups.setdefault(row.source, []).append(row)
    return groups


def _runs(rows: Iterable[Comparison], width: int) -> Iterator[Line]:
    lines: list[tuple[Cell, ...]] = [tuple((cell, "dim") for cell in ("", "measured", "predicted", "error"))]
    heads: dict[int, Line] = {}
    last = ""
    for row in rows:
        if row.run.id != last:
            last = row.run.id
            beside = "" if row.prediction.values["fits"] else "  predicted not to fit"
            heads[len(lines)] = ("  ", last, (beside, "yellow"))
        lines.append(
            (
                row.quantity,
                show(row.quantity, row.measured),
                show(row.quantity, row.predicted),
                (error_words(row), "red" if abs(row.error) > LARGE else ""),
            )
        )
    if len(lines) == 1:
        return
    for index, line in enumerate(grid(lines, "lrrr", width, indent=4)):
        if index in heads:
            yield heads[index]
        yield line


def _failures(rows: Iterable[Failed], width: int) -> Iterator[Line]:
    for row in rows:
        yield "  ", row.run.id, ("  not predicted", "yellow")
        yield from ((line,) for line in fold("; ".join(row.failure.reasons), width, 4))


def _summaries(summaries: Mapping[str, Summary], width: int) -> Iterator[Line]:
    rows: list[tuple[Cell, ...]] = [tuple((cell, "dim") for cell in SUMMARY_HEADER)]
    rows += [summary_row(quantity, summary) for quantity, summary in summaries.items()]
    yield from grid(rows, "lrrrrr", width)


def summary_row(quantity: str, summary: Summary) -> tuple[str, ...]:
    """Return a line under ``SUMMARY_HEADER``. Of ``fits`` the share of wrong answers says all."""
    if quantity == "fits":
        wrong = round(summary.mean_error * summary.count)
        return quantity, f"{summary.count:,}", f"{wrong:,} wrong", "", "", f"{summary.optimistic} optimistic"
    return (
        quantity,
        f"{summary.count:,}",
        percent(summary.mean_error),
        f"{summary.mean_absolute_error:.1%}",
        f"{summary.median_absolute_error:.1%}",
        percent(summary.worst),
    )


def error_words(row: Comparison) -> str:
    if row.quantity == "fits":
        return "wrong" if row.error else "right"
    return percent(row.error)


def percent(fraction: float) -> str:
    return f"{fraction:+.1%}"


def show(quantity: str, value: float | bool) -> str:
    """Return a measured or predicted value for people."""
    if isinstance(value, bool):
        return "fits" if value else "does not fit"
    if quantity == "step_time_s":
        return format_duration(value)
    if quantity.endswith("_bytes"):
        return format_bytes(value)
    if quantity == "mfu":
        return f"{value:.1%}"
    if quantity == "model_flops_per_s_per_gpu":
        return format_flops(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
