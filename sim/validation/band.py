"""How wide the band of a step time has to be: what is left of published runs beyond the residuals of their parts.

Of each run there is z = log(measured / predicted) and d, the standard deviation that its parts bring
(``sim/report/certainty.py``). What is left beyond the parts, with the sign of z:

    excess = sign(z) root(max(0, z^2 - (1.645 d)^2))

A band from -root((1.645 d)^2 + below^2) to root((1.645 d)^2 + above^2) holds a run just if -below <= excess <= above.
So nothing is counted twice: a run that is within what its parts are known to has no excess, and a run whose parts are
extrapolated has less of it. ``below`` and ``above`` are quantiles of the excess in which every source weighs the same.
They are not alike: most runs are slower than their parts.

The runs of one source are alike, so a new run is not one more of these but one of another source. Whether nine in ten
of the runs of a source that is not among them are inside is counted with each source left out in turn: ``left_out``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, hypot, log, sqrt
from statistics import fmean
from typing import Any

from sim.cost.residuals import NINE_IN_TEN
from sim.report.certainty import COVERAGE


@dataclass(frozen=True, slots=True)
class Point:
    """One run: its source, log(measured / predicted), the standard deviation of its parts, and the step's shares."""

    source: str
    log_ratio: float
    deviation: float
    num_nodes: int = 1
    stages: int = 1
    gpu: str = ""
    shares: Mapping[str, float] | None = None

    def share(self, part: str) -> float:
        """Return the share of the predicted step that a part has."""
        return (self.shares or {}).get(part, 0.0)

    @property
    def excess(self) -> float:
        beyond = sqrt(max(0.0, self.log_ratio**2 - (NINE_IN_TEN * self.deviation) ** 2))
        return beyond if self.log_ratio > 0 else -beyond


@dataclass(frozen=True, slots=True)
class Limits:
    """By how much a run may be shorter and longer than its prediction, beyond its parts; logarithms, not negative."""

    below: float
    above: float

    def band(self, deviation: float) -> tuple[float, float]:
        """Return the factors of the predicted time between which a run is, its parts' deviation given."""
        parts = NINE_IN_TEN * deviation
        return exp(-hypot(parts, self.below)), exp(hypot(parts, self.above))

    def hold(self, point: Point) -> bool:
        return -self.below <= point.excess <= self.above


def points_of(times: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return what ``sim validate --json`` has under ``times``, without runs that are faster than their GPU's peak."""
    found = []
    for row in times:
        if row["above_peak"]:
            continue
        total = sum(row["parts_s"].values()) or 1.0
        shares = {part: time_s / total for part, time_s in row["parts_s"].items()}
        ratio = log(row["measured_s"] / row["predicted_s"])
        found.append(
            Point(row["source"], ratio, row["parts_deviation"], row["num_nodes"], row["stages"], row["gpu"], shares)
        )
    return found


def by_source(points: Sequence[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.source, []).append(point)
    return found


def quantile(weighted: Sequence[tuple[float, float]], share: float) -> float:
    """Return the smallest value up to which at least ``share`` of the weight is; the largest beyond all of it."""
    ordered = sorted(weighted)
    wanted, sum_of = share * sum(weight for _, weight in ordered), 0.0
    for value, weight in ordered:
        sum_of += weight
        if sum_of >= wanted - 1e-12:
            return value
    return ordered[-1][0]


def weighted(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Return each point with its weight: sources alike, and runs of one source alike."""
    return [(point, 1 / len(own)) for own in by_source(points).values() for point in own]


def limits_of(points: Sequence[Point], coverage: float = COVERAGE) -> Limits:
    """Return the limits outside which a half of what ``coverage`` leaves is below, and as much above, at most."""
    up_to = (1 + min(1.0, coverage)) / 2
    excess = [(point.excess, weight) for point, weight in weighted(points)]
    below = quantile([(-value, weight) for value, weight in excess], up_to)
    return Limits(max(0.0, below), max(0.0, quantile(excess, up_to)))


def left_out(points: Sequence[Point]) -> dict[str, tuple[Limits, float]]:
    """Return, for each source, the limits from all other sources and the share of its runs that they hold."""
    sources = by_source(points)
    found = {}
    for source, own in sources.items():
        limits = limits_of([point for point in points if point.source != source])
        found[source] = (limits, fmean(limits.hold(point) for point in own))
    return found
