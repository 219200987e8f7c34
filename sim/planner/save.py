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
from sim.report.save import write_whole


def save(answer: Mapping[str, Any], out: Path) -> None:
    """Write JSON, CSV, plots and the page, the recommended scenario and those of the front into a directory.

    Each file appears whole or not at all, and none of an earlier answer stays. Raises ScenarioError where one cannot be
    written.
    """
    files = {"plan.json": json_text(answer), "plan.html": page(answer), "ranked.csv": csv_text(answer)}
    if answer["ranked"]:
        for name, draw in (("pareto", charts.pareto), ("cost", charts.cost), ("memory", charts.memory)):
            files[f"{name}.svg"] = draw(answer)
    if answer["recommended"]:
        files["recommended.yaml"] = _scenario(answer["recommended"])
    files |= {f"front_{place}.yaml": _scenario(one) for place, one in enumerate(answer["front"], 1)}
    for name, text in files.items():
        write_whole(out / name, text.encode())
    for path in (*out.glob("front_*.yaml"), *(out / name for name in ("recommended.yaml", *_PLOTS))):
        if path.name not in files:
            path.unlink(missing_ok=True)


_PLOTS = ("pareto.svg", "cost.svg", "memory.svg")


def _scenario(entry: Mapping[str, Any]) -> str:
    head = f"# {entry['cluster']}: {entry['strategy']}\n"
    return head + yaml.safe_dump(entry["scenario"], sort_keys=False, width=110)
