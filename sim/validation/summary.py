"""Errors in few numbers."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sim.validation.predict import Comparison, Failed, Validation, above_peak
from sim.validation.runs import QUANTITIES


@dataclass(frozen=True, slots=True)
class Summary:
    """Errors of one quantity, as fractions. ``worst`` is the error that is farthest from zero, with its sign.

    For ``fits`` an error is 0 or 1, so that the means are the share of wrong answers; ``optimistic`` counts runs that
    ran out of memory and are predicted to fit.
    """

    count: int
    mean_error: float
    mean_absolute_error: float
    median_absolute_error: float
    worst: float
    optimistic: int | None = None

    def to_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "count": self.count,
            "mean_error": self.mean_error,
            "mean_absolute_error": self.mean_absolute_error,
            "median_absolute_error": self.median_absolute_error,
            "worst": self.worst,
        }
        if self.optimistic is not None:
            content["optimistic"] = self.optimistic
        return content


def summarise(errors: Sequence[float]) -> Summary:
    """Return the summary of at least one error."""
    sizes = [abs(error) for error in errors]
    return Summary(
        count=len(errors),
        mean_error=statistics.fmean(errors),
        mean_absolute_error=statistics.fmean(sizes),
        median_absolute_error=statistics.median(sizes),
        worst=max(errors, key=abs),
    )


def by_quantity(comparisons: Iterable[Comparison]) -> dict[str, Summary]:
    """Return a summary for each quantity that occurs, in the order of ``QUANTITIES``."""
    errors: dict[str, list[float]] = {quantity: [] for quantity in QUANTITIES}
    optimistic = 0
    for row in comparisons:
        errors[row.quantity].append(row.error)
        optimistic += row.quantity == "fits" and bool(row.predicted) and not row.measured
    summaries = {quantity: summarise(found) for quantity, found in errors.items() if found}
    if (fits := summaries.get("fits")) is not None:
        summaries["fits"] = Summary(
            fits.count, fits.mean_error, fits.mean_absolute_error, fits.median_absolute_error, fits.worst, optimistic
        )
    return summaries


def grouped(comparisons: Iterable[Comparison], group: Callable[[Comparison], str]) -> dict[str, tuple[Comparison, ...]]:
    """Return the comparisons by group, groups in the order in which they first occur."""
    groups: dict[str, list[Comparison]] = {}
    for row in comparisons:
        groups.setdefault(group(row), []).append(row)
    return {name: tuple(rows) for name, rows in groups.items()}


def by_source(comparisons: Iterable[Comparison]) -> dict[str, dict[str, Summary]]:
    return {source: by_quantity(rows) for source, rows in grouped(comparisons, lambda row: row.source).items()}


def sources_alike(comparisons: Iterable[Comparison]) -> dict[str, dict[str, float]]:
    """Return, for each quantity, means in which every source weighs the same, however many runs it has."""
    found: dict[str, list[Summary]] = {}
    for summaries in by_source(comparisons).values():
        for quantity, summary in summaries.items():
            found.setdefault(quantity, []).append(summary)
    return {
        quantity: {
            "sources": len(found[quantity]),
            "mean_error": statistics.fmean(s.mean_error for s in found[quantity]),
            "mean_absolute_error": statistics.fmean(s.mean_absolute_error for s in found[quantity]),
            "median_absolute_error": statistics.fmean(s.median_absolute_error for s in found[quantity]),
        }
        for quantity in QUANTITIES
        if quantity in found
    }


TIMES = ("step_time_s", "tokens_per_s_per_gpu", "model_flops_per_s_per_gpu", "mfu")


def time_errors(comparisons: Iterable[Comparison]) -> list[tuple[float, Comparison]]:
    """Return one error of the step time for each run that has a figure of time, the first of ``TIMES``.

    A rate is a step time upside down: measured rate / predicted rate - 1.
    """
    first: dict[tuple[str, str], Comparison] = {}
    for row in comparisons:
        if row.quantity in TIMES:
            first.setdefault((row.run.file, row.run.id), row)
    return [
        (row.error if row.quantity == "step_time_s" else float(row.measured) / float(row.predicted) - 1, row)
        for row in first.values()
        if row.predicted
    ]


def result(validation: Validation) -> dict[str, Any]:
    """Return what ``sim validate --json`` prints."""
    from sim.validation.parts import all_differences

    comparisons = validation.comparisons
    return {
        "runs": [
            {
                "id": row.run.id,
                "quantity": row.quantity,
                "measured": row.measured,
                "predicted": row.predicted,
                "error": row.error,
                "file": row.run.file,
                "predicted_fits": row.prediction.values["fits"],
                "probability_fits": row.prediction.probability_fits,
            }
            for row in comparisons
        ],
        "times": [time_row(error, row) for error, row in time_errors(comparisons)],
        "at_peak": [
            {
                "id": run.id,
                "file": run.file,
                "categories": [
                    {
                        "category": d.category,
                        "measured": d.measured_bytes,
                        "predicted": d.predicted_bytes,
                        "difference": d.difference_bytes,
                    }
                    for d in found
                ],
            }
            for run, found in all_differences(validation)
        ],
        "summary": _plain(by_quantity(comparisons)),
        "failed": [_failed(row) for row in validation.failed],
        "summary_by_file": {source: _plain(summaries) for source, summaries in by_source(comparisons).items()},
        "sources_alike": sources_alike(comparisons),
        "assumptions": list(validation.assumptions),
    }


def time_row(error: float, row: Comparison) -> dict[str, Any]:
    """Return a run's step time beside what it may depend on by how much it is off."""
    p = row.prediction
    step_s = float(p.values["step_time_s"])
    return {
        "id": row.run.id,
        "source": row.source,
        "measured_s": step_s / (1 + error),
        "predicted_s": step_s,
        "band_s": p.band_s,
        "parts_deviation": p.deviation,
        "above_peak": above_peak(row),
        "gpu": p.gpu,
        "num_gpus": p.num_gpus,
        "num_nodes": p.num_nodes,
        "stages": p.stages,
        "strategy": p.strategy,
        "parts_s": p.parts_s,
    }


def _plain(summaries: dict[str, Summary]) -> dict[str, Any]:
    return {quantity: summary.to_dict() for quantity, summary in summaries.items()}


def _failed(row: Failed) -> dict[str, Any]:
    return {"id": row.run.id, "why": "; ".join(row.failure.reasons), "file": row.run.file, "line": row.run.line}


def reasons(failed: Iterable[Failed]) -> list[tuple[str, int]]:
    """Return (reason, number of runs), most first; figures in a reason are left out, so that like falls with like."""
    counted: dict[str, int] = {}
    for row in failed:
        for words in dict.fromkeys(_NUMBER.sub(r"\1 ...", reason) for reason in row.failure.reasons):
            counted[words] = counted.get(words, 0) + 1
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))


_NUMBER = re.compile(r"(=) [0-9][0-9.,]*")
