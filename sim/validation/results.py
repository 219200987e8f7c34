"""RESULTS.md: the errors by source, GPU, strategy and size, the worst, and what could not be predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import exp
from statistics import fmean, median
from typing import Any

from sim.cost.residuals import whole_runs
from sim.validation.band import Limits, by_source, left_out, points_of
from sim.validation.predict import Comparison, Validation, above_peak
from sim.validation.summary import (
    TIMES,
    Summary,
    by_quantity,
    grouped,
    reasons,
    sources_alike,
    summarise,
    time_errors,
    time_row,
)
from sim.validation.tables import grouped_failures, percent, show

NUM_WORST = 10
_SIZES = (
    (1e9, "below 1 B"),
    (5e9, "1 to 5 B"),
    (2e10, "5 to 20 B"),
    (1e11, "20 to 100 B"),
    (float("inf"), "above 100 B"),
)
_HEADER = ("quantity", "number", "mean", "mean absolute", "median absolute", "worst")


def results_markdown(validation: Validation, command: str, picture: str = "") -> str:
    """Return the page. The same bytes for the same validation; ``command`` is what makes it again.

    ``picture``: name of the file beside it that ``points`` are drawn in.
    """
    return "\n".join(_page(validation, command, picture)).rstrip() + "\n"


def points(validation: Validation) -> dict[str, list[tuple[float, float]]]:
    """Return (measured, predicted) step times in seconds of each source, for a picture.

    A rate stands for the step time that it is of the predicted batch.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for error, row in time_errors(validation.comparisons):
        predicted_s = float(row.prediction.values["step_time_s"])
        found.setdefault(row.source, []).append((predicted_s / (1 + error), predicted_s))
    return found


def _picture_line(rows: Sequence[Comparison], picture: str) -> Iterator[str]:
    if picture and time_errors(rows):
        yield from (f"![step times, predicted against measured]({picture})", "")


def _band(rows: Sequence[Comparison]) -> Iterator[str]:
    """How many measured times are in the band beside the predicted one, also where their own source was left out."""
    points = points_of([time_row(error, row) for error, row in time_errors(rows)])
    if not points:
        return
    whole, sources = whole_runs(), by_source(points)
    now = Limits(whole.below, whole.above)
    without = left_out(points) if len(sources) > 1 else {}
    held = {source: fmean(now.hold(p) for p in own) for source, own in sources.items()}
    parts = {source: fmean(Limits(0.0, 0.0).hold(p) for p in own) for source, own in sources.items()}
    bands = [now.band(p.deviation) for p in points]
    yield from (
        "## The band of the time",
        "",
        "It is made of the residuals of kernels, NCCL and host, and of what whole runs were off beyond these: data",
        "loading, other code, stragglers. The second is of published runs, these among them, so a run is held against",
        "it with its source left out, too: *left out* has the limits that all other sources of this page give.",
        "Nine in ten of the runs of a new source are meant to be inside.",
        "",
        f"It holds {fmean(now.hold(p) for p in points):.0%} of {len(points):,} runs, each source weighing the same "
        f"{fmean(held.values()):.0%}"
        + (f" and left out {fmean(share for _, share in without.values()):.0%}" if without else "")
        + f"; by the parts alone {fmean(parts.values()):.0%}. "
        f"The median band is from {median(b[0] for b in bands) - 1:+.1%} to "
        f"{median(b[1] for b in bands) - 1:+.1%} of the prediction.",
        "",
    )
    yield from _table(
        ("source", "runs", "measured / predicted, median", "by parts alone", "in the band", "left out"),
        [
            (
                source,
                f"{len(own):,}",
                f"{exp(median(p.log_ratio for p in own)):.2f}",
                f"{parts[source]:.0%}",
                f"{held[source]:.0%}",
                f"{without[source][1]:.0%}" if without else "",
            )
            for source, own in sources.items()
        ],
    )


def _page(validation: Validation, command: str, picture: str) -> Iterator[str]:
    rows, failed = validation.comparisons, validation.failed
    num_runs = sum(len(file.runs) for file in validation.files)
    yield from (
        "# Predicted against measured",
        "",
        "Errors are predicted / measured - 1: above zero is too slow, too large, or (of rates) too fast. No row is",
        "tuned, and none that the command chose is left out; what a source leaves open is under `assumed` in its file.",
        "",
        f"{num_runs:,} measured runs of {sum(1 for file in validation.files if file.runs)} sources, "
        f"{num_runs - len(failed):,} predicted, {len(failed):,} not (below, by reason). Made by",
        "",
        f"    {command}",
        "",
        "`time` is one figure for each run: its step time, or else the step time that its rate or MFU stands for.",
        "For `fits` mean is the share of wrong answers and worst the number of runs that ran out of memory and are",
        "predicted to fit.",
        "",
    )
    yield from _section("All", rows, lambda row: "all")
    alike = sources_alike(rows)
    yield from ("### Each source weighing the same", "")
    yield from _table(
        ("quantity", "sources", "mean", "mean absolute", "median absolute"),
        [
            (name, str(m["sources"]), percent(m["mean_error"]), f"{m['mean_absolute_error']:.1%}",
             f"{m['median_absolute_error']:.1%}")
            for name, m in {"time": _time_alike(rows), **alike}.items()
            if m
        ],
    )  # fmt: skip
    yield from _picture_line(rows, picture)
    yield from _band(rows)
    yield from _section("By source", rows, lambda row: row.source, validation)
    yield from _section("By GPU", rows, lambda row: row.prediction.gpu)
    yield from _section("By framework and strategy", rows, lambda row: row.prediction.strategy)
    yield from _section("By size of the model", rows, _size)
    yield from _worst("time", [row for row in rows if row.quantity in TIMES])
    yield from _worst("memory", [row for row in rows if row.quantity.endswith("_bytes")])
    yield from _fits(rows)
    yield from ("## Not predicted", "")
    if failed:
        by_file = grouped_failures(failed)
        yield from _table(("source", "runs"), [(name, f"{len(found):,}") for name, found in by_file.items()])
        yield from ("A run may have several reasons.", "")
        yield from _table(("reason", "runs"), [(words, f"{count:,}") for words, count in reasons(failed)])
    else:
        yield from ("None.", "")
    yield from ("## How figures were made comparable", "")
    yield from (f"- {words}" for words in validation.assumptions)
    yield from ("", "Sources:", "")
    yield from (f"- `{file.name}`: {_cite(file.source)}" for file in validation.files if file.runs)


def _time_alike(rows: Sequence[Comparison]) -> dict[str, float]:
    """Return the means of the sources' means of time."""
    found = [summarise([e for e, _ in times]) for times in
             (time_errors(own) for own in grouped(rows, lambda row: row.source).values()) if times]  # fmt: skip
    if not found:
        return {}
    return {
        "sources": len(found),
        "mean_error": fmean(s.mean_error for s in found),
        "mean_absolute_error": fmean(s.mean_absolute_error for s in found),
        "median_absolute_error": fmean(s.median_absolute_error for s in found),
    }


def _section(
    heading: str, rows: Sequence[Comparison], group: Callable[[Comparison], str], validation: Validation | None = None
) -> Iterator[str]:
    yield from (f"## {heading}", "")
    groups = grouped(rows, group)
    names = list(groups) if validation else sorted(groups, key=_order)
    lines = []
    for name in names:
        for index, (quantity, summary) in enumerate(_summaries(groups[name]).items()):
            lines.append((name if index == 0 else "", quantity, *_cells(quantity, summary)))
    yield from _table((heading.removeprefix("By ").lower(), *_HEADER), lines)


def _order(name: str) -> tuple[int, str]:
    sizes = [words for _, words in _SIZES]
    return (sizes.index(name) if name in sizes else 0, name)


def _summaries(rows: Sequence[Comparison]) -> dict[str, Summary]:
    """Return time first, then what the rows have of memory, then ``fits``."""
    times = [error for error, _ in time_errors(rows)]
    rest = {name: summary for name, summary in by_quantity(rows).items() if name not in TIMES}
    return {**({"time": summarise(times)} if times else {}), **rest}


def _cells(quantity: str, summary: Summary) -> tuple[str, ...]:
    if quantity == "fits":
        return f"{summary.count:,}", f"{summary.mean_error:.1%} wrong", "", "", f"{summary.optimistic} optimistic"
    return (
        f"{summary.count:,}",
        percent(summary.mean_error),
        f"{summary.mean_absolute_error:.1%}",
        f"{summary.median_absolute_error:.1%}",
        percent(summary.worst),
    )


def _size(row: Comparison) -> str:
    return next(words for limit, words in _SIZES if row.prediction.parameters < limit)


def _worst(words: str, rows: Sequence[Comparison]) -> Iterator[str]:
    """The largest errors, one for each run; of time, by step time."""
    if not rows:
        return
    yield from (f"## The {NUM_WORST} worst of {words}", "")
    if words == "time":
        candidates = time_errors(rows)
    else:
        by_run = grouped(rows, lambda row: f"{row.run.file}:{row.run.id}").values()
        candidates = [(row.error, row) for row in (max(found, key=lambda row: abs(row.error)) for found in by_run)]
    worst = sorted(candidates, key=lambda pair: (-abs(pair[0]), pair[1].source, pair[1].run.id))[:NUM_WORST]
    yield from _table(
        (
            "run",
            "scenario",
            "quantity",
            "measured",
            "predicted",
            f"error of {words}",
            "predicted step",
            "reason",
            "assumed",
        ),
        [
            (
                f"{row.source}:{row.run.id}",
                _scenario(row),
                row.quantity,
                show(row.quantity, row.measured),
                show(row.quantity, row.predicted),
                percent(error),
                _parts(row),
                reason(row, error) if words == "time" else "",
                "; ".join(row.run.assumed),
            )
            for error, row in worst
        ],
    )


HOST_SHARE, EXPOSED_SHARE, BUBBLE_SHARE, COMPUTE_SHARE = 0.15, 0.15, 0.25, 0.4
"""Parts of a predicted step from which on they are what its error can be of."""


def reason(row: Comparison, error: float) -> str:
    """Return why a time may be off, from what the predicted step is made of: the likeliest first.

    It is read off the breakdown, not found out: where several parts are large any of them may be it.
    """
    prediction = row.prediction
    if above_peak(row):
        return "the measured time is faster than the GPU's peak allows: the table's batch or time is not what ran"
    total = sum(prediction.parts_s.values()) or 1.0
    share = {part: time_s / total for part, time_s in prediction.parts_s.items()}
    found = []
    if share["other"] > HOST_SHARE:
        words = "the host limits it: times of this Python and torch, not of the run's"
        found.append((share["other"], f"{words} ({share['other']:.0%})"))
    for kind, axis, exposed_s in prediction.exposed_s:
        if exposed_s / total > EXPOSED_SHARE:
            across = " across nodes" if axis == "tp" and _leaves_node(row) else ""
            found.append((exposed_s / total, f"exposed {kind} of {axis}{across} ({exposed_s / total:.0%})"))
    if share["bubble"] > BUBBLE_SHARE:
        words = "the bubble repeats what a stage's pass is off"
        found.append((share["bubble"], f"{words} ({share['bubble']:.0%})"))
    found.sort(key=lambda pair: -pair[0])
    words_of = [words for _, words in found]
    unlike = [words for words in row.run.assumed if words.startswith("overlap:")]
    if unlike and error > 0:
        words_of.insert(0, f"the source hides or spares what is not simulated ({unlike[0]})")
    words_of += _assumed_kernels(row, share)
    if words_of:
        return "; ".join(words_of)
    if error < 0:
        return (
            f"slower than its kernels explain (compute {share['compute']:.0%}): other kernels than those assumed, or "
            "what runs beside training"
        )
    return f"its kernels are faster than those assumed (compute {share['compute']:.0%})"


def _assumed_kernels(row: Comparison, share: Mapping[str, float]) -> list[str]:
    """Return which families that matter to a step take coefficients of another machine or kernel."""
    found = []
    for words in row.prediction.assumed:
        if words.startswith(("matmuls in", "attention (")) and share["compute"] > COMPUTE_SHARE:
            found.append(f"assumed: {words.split(':')[0]}")
        if words.startswith("collectives") and share["exposed_communication"] > EXPOSED_SHARE:
            found.append(f"assumed: {words.split(':')[0]}")
    return found


def _leaves_node(row: Comparison) -> bool:
    parallelism, cluster = row.run.scenario.get("parallelism") or {}, row.run.scenario.get("cluster") or {}
    nodes = cluster.get("num_nodes", 1)
    return isinstance(nodes, int) and nodes > 1 and parallelism.get("tp", 1) > row.prediction.num_gpus // nodes


def _scenario(row: Comparison) -> str:
    parallelism, training = row.run.scenario.get("parallelism") or {}, row.run.scenario.get("training") or {}
    axes = " ".join(f"{key}{value}" for key, value in parallelism.items() if isinstance(value, int) and value > 1)
    return (
        f"{row.prediction.parameters / 1e9:.3g} B, {row.prediction.num_gpus} x {row.prediction.gpu}, "
        f"{row.prediction.strategy}, {axes}, microbatch {training.get('micro_batch_size')} x "
        f"{training.get('sequence_length')}, batch {training.get('global_batch_size')}, {training.get('precision')}, "
        f"recompute {training.get('recompute', 'none')}, {training.get('attention', 'sdpa')}"
    )


def _parts(row: Comparison) -> str:
    total = sum(row.prediction.parts_s.values())
    return ", ".join(
        f"{part.replace('_', ' ')} {value / total:.0%}"
        for part, value in row.prediction.parts_s.items()
        if total and value >= 0.005 * total
    )


def _fits(rows: Sequence[Comparison]) -> Iterator[str]:
    """Where the answer to the first question is wrong: measured runs that have a step count as runs that fit."""
    ran = grouped(rows, lambda row: f"{row.run.file}:{row.run.id}")
    wrong = [
        found[0] for found in ran.values()
        if found[0].run.measured.get("fits", True) != found[0].prediction.values["fits"]
    ]  # fmt: skip
    num_fit = sum(1 for found in ran.values() if found[0].run.measured.get("fits", True))
    yield from (
        "## Fits or not",
        "",
        f"Of {len(ran):,} predicted runs {num_fit:,} ran and {len(ran) - num_fit:,} ran out of memory. Wrong answers:",
        "",
    )
    counted: dict[tuple[str, str], int] = {}
    for row in wrong:
        key = (row.source, "predicted to fit" if row.prediction.values["fits"] else "predicted not to fit")
        counted[key] = counted.get(key, 0) + 1
    yield from _table(("source", "wrong answer", "runs"), [(*key, f"{count:,}") for key, count in counted.items()])


def _cite(source: dict[str, Any]) -> str:
    return ", ".join(str(source[key]) for key in ("title", "url", "table", "commit", "date") if source.get(key))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    yield line(header)
    yield "|" + "---|" * len(header)
    yield from map(line, rows)
    yield ""
