"""Everything worth keeping of an answer, as files: the same bytes however often the search was interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sim.planner import charts
from sim.planner.page import page
from sim.planner.tables import csv_text
from sim.report.report import json_text


def save(answer: Mapping[str, Any], out: Path) -> None:
    """Write JSON, CSV, plots and the page, the recommended scenario and those of the front into a directory."""
    (out / "plan.json").write_text(json_text(answer), encoding="utf-8")
    (out / "plan.html").write_text(page(answer), encoding="utf-8")
    if answer["ranked"]:
        for name, draw in (("pareto", charts.pareto), ("cost", charts.cost), ("memory", charts.memory)):
            (out / f"{name}.svg").write_text(draw(answer), encoding="utf-8")
    (out / "ranked.csv").write_text(csv_text(answer), encoding="utf-8")
    if answer["recommended"]:
        _scenario(out / "recommended.yaml", answer["recommended"])
    for place, one in enumerate(answer["front"], 1):
        _scenario(out / f"front_{place}.yaml", one)


def _scenario(path: Path, entry: Mapping[str, Any]) -> None:
    head = f"# {entry['cluster']}: {entry['strategy']}\n"
    path.write_text(head + yaml.safe_dump(entry["scenario"], sort_keys=False, width=110), encoding="utf-8")
