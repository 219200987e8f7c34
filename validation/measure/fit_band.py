"""Derive by how much whole runs are off beyond their parts, for the band beside a step's time.

    sim validate validation/runs --json --quiet > times.json
    python validation/measure/fit_band.py times.json [--write]

Without ``--write`` it prints sim/catalog/measured/whole_runs.yaml, with it the file is written. A part of the runs
will do (``--limit 300``) if every source has some. The method is that of ``sim/validation/band.py``.

What was tried instead is printed beside it, each source left out in turn: the share held, and the interval score of
Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation" (2007), section 6.2: the width, and 20
times by how much a run is outside; in logarithms, every source weighing the same. Less is better. "As one more source
may be anywhere" holds 0.9 (K + 1) / K of K sources, after Lee, Barber and Willett (arXiv 2306.06342).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from math import exp, hypot
from pathlib import Path
from statistics import fmean, median

from sim.cost.efficiency import MEASURED
from sim.cost.residuals import NINE_IN_TEN
from sim.report.certainty import COVERAGE
from sim.validation.band import Limits, Point, by_source, left_out, limits_of, points_of, quantile, weighted

FEWEST_SOURCES = 3
"""A group of runs with fewer sources takes the limits of all."""
Group = Callable[[Point], str]
GROUPS: dict[str, Group] = {
    "all alike": lambda p: "all",
    "host-bound": lambda p: "host" if p.share("other") > 0.1 else "kernels",
    "one node or several": lambda p: "several" if p.num_nodes > 1 else "one",
    "with a pipeline or without": lambda p: "pipeline" if p.stages > 1 else "none",
    "generation of the GPU": lambda p: p.gpu[0],
    "exposed communication": lambda p: "exposed" if p.share("exposed_communication") > 0.1 else "hidden",
}


def ends(limits: Limits, deviation: float) -> tuple[float, float]:
    parts = NINE_IN_TEN * deviation
    return -hypot(parts, limits.below), hypot(parts, limits.above)


def score(limits: Limits, point: Point) -> float:
    """Return the interval score of one run's band, in logarithms."""
    low, high = ends(limits, point.deviation)
    outside = max(low - point.log_ratio, point.log_ratio - high, 0.0)
    return high - low + 2 / (1 - COVERAGE) * outside


def alternative(points: Sequence[Point], group: Group, coverage: float = COVERAGE) -> tuple[float, float, float]:
    """Return the share held, the median width and the mean score, sources left out in turn and weighing the same."""
    sources = by_source(points)
    held, scores, widths = [], [], []
    for source, own in sources.items():
        others = [p for p in points if p.source != source]
        found: dict[str, Limits] = {}
        for name in {group(p): None for p in own}:
            like = [p for p in others if group(p) == name]
            found[name] = limits_of(like if len(by_source(like)) >= FEWEST_SOURCES else others, coverage)
        held.append(fmean(found[group(p)].hold(p) for p in own))
        scores.append(fmean(score(found[group(p)], p) for p in own))
        widths += [ends(found[group(p)], p.deviation)[1] - ends(found[group(p)], p.deviation)[0] for p in own]
    return fmean(held), median(widths), fmean(scores)


def text_of(points: Sequence[Point], today: str) -> str:
    """Return the data file."""
    limits, sources, without = limits_of(points), by_source(points), left_out(points)
    logs = [(p.log_ratio, weight) for p, weight in weighted(points)]
    at = ", ".join(f"{name}: {quantile(logs, share):.3f}" for name, share in
                   (("p05", 0.05), ("p25", 0.25), ("p50", 0.5), ("p75", 0.75), ("p95", 0.95)))  # fmt: skip
    bands = [limits.band(p.deviation) for p in points]
    lines = [
        "# By how much whole published runs were shorter and longer than their parts explain, for the band of a step's",
        "# time (sim/report/certainty.py). Written by validation/measure/fit_band.py from what sim validate --json",
        "# says of validation/runs, by sim/validation/band.py. Logarithms; every source weighs the same.",
        f"date: {today}",
        f"runs: {len(points)}",
        f"sources: {len(sources)}",
        "kind: measured",
        f"beyond_parts: {{below: {limits.below:.3f}, above: {limits.above:.3f}}}",
        "# Of log(measured / predicted) itself: it is not centred on zero, and nothing is corrected by it.",
        f"log_ratio: {{{at}}}",
        "# With the source of a run left out: the share of its runs that are inside, the mean of the sources; and the",
        "# band's ends over the prediction, of the median run.",
        f"left_out: {{held: {fmean(share for _, share in without.values()):.3f}, "
        f"median_low: {median(b[0] for b in bands):.3f}, median_high: {median(b[1] for b in bands):.3f}}}",
        "by_source:",
    ]
    for source, own in sorted(sources.items()):
        lines.append(
            f"  {source}: {{runs: {len(own)}, measured_over_predicted: {exp(median(p.log_ratio for p in own)):.3f}, "
            f"left_out_held: {without[source][1]:.2f}}}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("file", type=Path, help="what sim validate --json printed")
    parser.add_argument("--write", action="store_true", help="write the data file of the catalogue")
    options = parser.parse_args()
    points = points_of(json.loads(options.file.read_text(encoding="utf-8"))["times"])
    text = text_of(points, date.today().isoformat())
    print(text)
    tried = {name: alternative(points, group) for name, group in GROUPS.items()}
    whole = [replace(p, deviation=0.0) for p in points]
    tried["whole runs alone, whatever their parts"] = alternative(whole, GROUPS["all alike"])
    sources = len(by_source(points)) - 1
    tried["as one more source may be anywhere"] = alternative(
        points, GROUPS["all alike"], 0.9 * (sources + 1) / sources
    )
    print("# sources left out in turn: held, median width, interval score")
    for name, (held, width, mean) in tried.items():
        print(f"# {name}: {held:.1%}, {width:.3f}, {mean:.3f}")
    if options.write:
        (MEASURED / "whole_runs.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
