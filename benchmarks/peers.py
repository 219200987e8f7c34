"""Hold sim's step times beside those of other simulators, on the tables that these were run on.

    python -m benchmarks.peers [--limit N] [--jobs N] [--times FILE] [--write]

Every run of ``validation/runs`` that belongs to a table of ``validation/peers.yaml`` is predicted (1,250 of them, some
ten minutes on two cores; ``--limit`` takes N of each table, evenly spread). ``--times`` takes what ``sim validate
--json`` said of them instead. ``--write`` puts the table into ``validation/PEERS.md``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sim.validation.predict import select, validate
from sim.validation.runs import read_runs
from sim.validation.summary import Summary, summarise, time_errors

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "validation/PEERS.md"
PEERS = ("simumax", "calculon", "llm-analysis")


def answer(table: Mapping[str, Any], limit: int | None, jobs: int | None) -> tuple[Summary, int]:
    """Return the errors of the times of a table's runs, and how many runs could not be predicted."""
    name, beginning = table["runs"]
    file = read_runs([ROOT / f"validation/runs/{name}.yaml"])
    answered = validate(select(file, f"{name}:{beginning}", limit), jobs)
    return summarise([error for error, _ in time_errors(answered.comparisons)]), len(answered.failed)


def answered(table: Mapping[str, Any], told: Mapping[str, Any]) -> tuple[Summary, int]:
    """Return the same of the runs of a table that ``sim validate --json`` told of."""
    name, beginning = table["runs"]

    def belongs(row: Mapping[str, Any]) -> bool:
        return bool(Path(row.get("source") or row["file"]).stem == name and row["id"].startswith(beginning))

    errors = [row["predicted_s"] / row["measured_s"] - 1 for row in told["times"] if belongs(row)]
    return summarise(errors), sum(map(belongs, told["failed"]))


def cell(peer: Mapping[str, Any]) -> str:
    """Return a peer's figures in words."""
    told = [f"{peer['bias']:+.1%}"] if "bias" in peer else []
    told += [f"worst {peer['worst']:.0%}"] if "worst" in peer else []
    told += ["{} of {} rows".format(*peer["rows"])] if "rows" in peer else []
    told += [peer["note"]] if "note" in peer else []
    return f"{peer['absolute']:.1%}" + (f" ({', '.join(told)})" if told else "")


def page(tables: Sequence[Mapping[str, Any]], ours: Sequence[tuple[Summary, int]], command: str) -> Iterator[str]:
    """Yield the lines of the page."""
    yield from (
        "# Beside other simulators",
        "",
        "Mean absolute error of step times (bias, worst). The others were run on the same published cases, see",
        "`validation/peers.yaml`; ours are so many runs of the table, evenly spread, none tuned to. Made by",
        "",
        f"    {command}",
        "",
        f"| table | runs | sim | {' | '.join(PEERS)} | best |",
        f"|---|---|---|{'---|' * len(PEERS)}---|",
    )
    for table, (found, failed) in zip(tables, ours, strict=True):
        figures = {"sim": found.mean_absolute_error} | {peer: table[peer]["absolute"] for peer in PEERS}
        runs = f"{found.count}" + (f", {failed} not predicted" if failed else "")
        mine = f"{found.mean_absolute_error:.1%} ({found.mean_error:+.1%}, worst {found.worst:+.0%})"
        theirs = " | ".join(cell(table[peer]) for peer in PEERS)
        yield f"| {table['name']} | {runs} | {mine} | {theirs} | {min(figures, key=lambda name: figures[name])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Step times beside other simulators'.")
    parser.add_argument("--limit", type=int, help="runs of each table, evenly spread")
    parser.add_argument("--jobs", type=int, help="processes")
    parser.add_argument("--times", type=Path, help="what sim validate --json said, instead of predicting")
    parser.add_argument("--write", action="store_true", help="write validation/PEERS.md")
    given = parser.parse_args()
    tables = yaml.safe_load((ROOT / "validation/peers.yaml").read_text(encoding="utf-8"))["tables"]
    command = "python -m benchmarks.peers" + (f" --limit {given.limit}" if given.limit else "")
    if given.times:
        told = json.loads(given.times.read_text(encoding="utf-8"))
        ours = [answered(table, told) for table in tables]
        command += f" --times {given.times.name}"
    else:
        ours = [answer(table, given.limit, given.jobs) for table in tables]
    lines = list(page(tables, ours, command + " --write"))
    print("\n".join(lines))
    if given.write:
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
