"""One HTML page of an answer, to send to whoever signs: no network, no script, a phone or a desk, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from sim.planner import charts
from sim.units import format_bytes, format_duration, format_energy, format_money, format_power


def page(answer: Mapping[str, Any]) -> str:
    """Return the page. Everything from the plan file is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "duration": format_duration, "money": format_money, "energy": format_energy, "power": format_power,
        "bytes": format_bytes,
    }  # fmt: skip
    best = answer["recommended"]
    return environment.get_template("page.html.j2").render(
        a=answer,
        best=best,
        table=_table,
        pareto=Markup(charts.pareto(answer)),
        cost=Markup(charts.cost(answer)),
        memory=Markup(charts.memory(answer)),
        scenario=yaml.safe_dump(best["scenario"], sort_keys=False, width=100) if best else "",
    )


_HEADER = ("", "time", "money", "energy", "MFU", "memory", "cluster and strategy")


def _table(entries: Sequence[Mapping[str, Any]], why: bool, name: str) -> Markup:
    """Return a table that becomes a list of cards on a phone."""
    head = "".join(f"<th{' class=n' if i < 6 else ''}>{cell}</th>" for i, cell in enumerate(_HEADER))
    rows = []
    for place, one in enumerate(entries, 1):
        cells = (
            format_duration(one["time_s"]), format_money(one["usd"]), format_energy(one["joules"]),
            f"{one['step']['mfu']:.0%}",
            f"{one['memory']['peak_device_bytes'] / one['memory']['capacity_bytes']:.0%}",
        )  # fmt: skip
        figures = "".join(
            f'<td class="n" data-name="{label}">{cell}</td>' for label, cell in zip(_HEADER[1:6], cells, strict=True)
        )
        reason = f'<div class="why">{escape(one["why"])}</div>' if why and one["why"] else ""
        rows.append(
            f'<tr><td class="n">{place}</td>{figures}<td>{escape(one["cluster"])}<br>{escape(one["strategy"])}'
            f"{reason}</td></tr>"
        )
    body = "".join(rows)
    return Markup(f'<table class="wide" id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')
