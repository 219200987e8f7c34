"""The answer for a terminal: the recommendation, the front, what comes after it, and why the others lose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sim.report.layout import Line, Screen, fold, grid
from sim.units import format_duration, format_energy, format_money

MAX_RANKED = 12
MAX_REASONS = 6


def print_answer(screen: Screen, answer: Mapping[str, Any], quiet: bool = False) -> None:
    screen.show(_lines(answer, screen.width, quiet))


def _lines(answer: Mapping[str, Any], width: int, quiet: bool) -> Iterator[Line]:
    yield ((answer["question"], "bold"),)
    yield ()
    yield from _recommended(answer, width)
    if answer["front"]:
        yield ()
        yield from _table("nothing is better in time, money, energy and GPUs", answer["front"], width)
    ranked = answer["ranked"]
    if ranked:
        yield ()
        more = f", {MAX_RANKED} of {len(ranked)}" if len(ranked) > MAX_RANKED else ""
        yield from _table(f"ranked{more}", ranked[:MAX_RANKED], width, why=True)
    if answer["rejected"]:
        yield ()
        yield ((f"rejected: {len(answer['rejected']):,}", "bold"),)
        for one in answer["rejected"][:MAX_REASONS]:
            for line in fold(f"{one['candidate']}: {one['why']}", width, 2, 2):
                yield (f"  {line.strip()}",)
    searched = answer["searched"]
    yield ()
    seconds = f" in {format_duration(searched['seconds'])}" if "seconds" in searched else ""
    yield (
        f"{searched['candidates']:,} candidates: {searched['pruned']:,} excluded by bounds, "
        f"{searched['simulated']:,} simulated{seconds}",
    )
    if not quiet and answer["assumptions"]:
        yield ()
        yield (("assumed", "bold"),)
        for words in answer["assumptions"]:
            for line in fold(words, width, 2, 2):
                yield (f"  {line}",) if not line.startswith("  ") else (line,)


def _recommended(answer: Mapping[str, Any], width: int) -> Iterator[Line]:
    """Say what is recommended, how the run goes, and what would change it."""
    best = answer["recommended"]
    if not best:
        yield from ((line,) for line in fold(answer["nothing"], width, 2))
        return
    yield from ((line,) for line in fold(best["words"], width, 2))
    yield from _run(best["run"], width)
    yield ()
    yield (("what would change it", "bold"),)
    for words in answer["sensitivity"]["words"]:
        yield from ((line,) for line in fold(words, width, 2, 2))


def _run(run: Mapping[str, Any], width: int) -> Iterator[Line]:
    """Say how long the whole training takes, and what of it is lost."""
    spread = run["distribution"]
    words = (
        f"Nine runs of ten end within {format_duration(spread['p90_s'])}, half within "
        f"{format_duration(spread['p50_s'])}: {spread['failures']:.1f} failures, one every "
        f"{format_duration(run['mtbf_s'])}; a checkpoint of "
        f"{format_duration(run['checkpoint_s'])} every {format_duration(run['checkpoint_interval_s'])}, "
        f"{run['spare_nodes']} spare node{'' if run['spare_nodes'] == 1 else 's'}. Goodput {run['goodput']:.1%}."
    )
    if spread["by_deadline"] is not None:
        words += f" {spread['by_deadline']:.0%} of the runs keep the deadline."
    for line in fold(words, width, 2):
        yield (line,)


def _table(title: str, entries: Sequence[Mapping[str, Any]], width: int, why: bool = False) -> Iterator[Line]:
    yield ((title, "bold"),)
    header = ["", "time", "money", "energy", "MFU", "memory", "cluster", "strategy"]
    rows: list[list[Any]] = [[(cell, "dim") for cell in header]]
    for place, one in enumerate(entries, 1):
        memory = one["memory"]["peak_device_bytes"] / one["memory"]["capacity_bytes"]
        rows.append([
            str(place), format_duration(one["time_s"]), format_money(one["usd"]), format_energy(one["joules"]),
            f"{one['step']['mfu']:.0%}", f"{memory:.0%}", one["cluster"], one["strategy"],
        ])  # fmt: skip
    lines = grid(rows, "rrrrrrll", width)
    yield next(lines)
    for one, line in zip(entries, lines, strict=False):
        yield line
        if why and one["why"]:
            for words in fold(one["why"], width, 6):
                yield ((f"      {words.strip()}", "dim"),)


def csv_text(answer: Mapping[str, Any]) -> str:
    """Return the ranked candidates as CSV, base units."""
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([
        "rank", "on_front", "keeps_goal", "node", "num_gpus", "strategy", "time_s", "usd", "joules", "power_w",
        "step_time_s", "mfu", "tokens_per_s", "goodput", "peak_device_bytes", "capacity_bytes", "why",
    ])  # fmt: skip
    on_front = {(one["cluster"], one["strategy"], one["node"], one["network"]) for one in answer["front"]}
    for place, one in enumerate(answer["ranked"], 1):
        writer.writerow([
            place, (one["cluster"], one["strategy"], one["node"], one["network"]) in on_front, one["keeps_goal"],
            one["node"], one["num_gpus"], one["strategy"], one["time_s"], one["usd"], one["joules"], one["power_w"],
            one["step"]["time_s"], one["step"]["mfu"], one["step"]["tokens_per_s"], one["run"]["goodput"],
            one["memory"]["peak_device_bytes"], one["memory"]["capacity_bytes"], one["why"],
        ])  # fmt: skip
    return out.getvalue()
