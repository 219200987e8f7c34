"""``sim catalog``: what is known, each fact with its kind and source, as data and for a person."""

from __future__ import annotations

from typing import Any

from sim.catalog import describe, load
from sim.catalog.describe import KINDS
from sim.catalog.load import Kind
from sim.errors import Finding, ScenarioError
from sim.interop.values import near
from sim.report.layout import Cell, Line, Screen, paragraphs, title

_PLURALS = {"gpu": "GPUs", "node": "Nodes", "network": "Networks", "link": "Links", "model": "Models"}


def catalogue(kind: str | None, name: str | None) -> dict[str, Any]:
    """Return all kinds with their names, the entries of one kind, or every fact about one entry.

    Raises ScenarioError, with the nearest names, for what is not in the catalogue.
    """
    if kind is None:
        return {each: _entries(each) for each in KINDS}
    if kind not in KINDS:
        raise _unknown(f"there is no kind {kind!r} in the catalogue", kind, KINDS, "sim catalog")
    known: Kind = kind
    if name is None:
        return {known: _entries(known)}
    if name not in load.names(known):
        raise _unknown(f"there is no {kind} {name!r} in the catalogue", name, load.names(known), f"sim catalog {kind}")
    return {
        "kind": known,
        "name": name,
        "facts": [
            {"name": row.name, "value": row.value, "kind": row.kind, "source": row.source, "note": row.note}
            for row in describe.describe(known, name)
        ]
        + _offers(known, name),
    }


def _offers(kind: Kind, name: str) -> list[dict[str, str]]:
    """Return what a GPU or a node is offered for, as facts: what ``sim plan`` reckons with, the cheapest first."""
    if kind not in ("gpu", "node"):
        return []
    from sim.catalog import economy

    found = []
    for word, unit, quotes in (("rent", "h", economy.rents()), ("buy", "GPU", economy.purchases())):
        own = [quote for quote in quotes if (quote.gpu if kind == "gpu" else quote.node) == name]
        for quote in sorted(own, key=lambda quote: quote.usd):
            of = f" of {quote.node}" if kind == "gpu" and quote.node else ""
            rented = word == "rent"
            found.append({
                "name": f"rent.{quote.provider}" if rented else "buy",
                "value": f"{quote.usd:.10g} USD/{unit}",
                "kind": "datasheet",
                "source": "; ".join(filter(None, (quote.source, quote.date))),
                "note": f"{quote.term}{of}" if rented else "",
            })  # fmt: skip
    return found


def print_catalogue(screen: Screen, content: dict[str, Any]) -> None:
    """Print what ``catalogue`` returned."""
    width = min(screen.width, 140)
    if "facts" in content:
        screen.show([title(f"{content['kind']} {content['name']}"), *paragraphs(fact_rows(content["facts"]), width)])
        return
    for number, (kind, entries) in enumerate(content.items()):
        rows: list[tuple[Cell, ...]] = [(entry["name"], entry["title"]) for entry in entries]
        more: list[Line] = [()] if number else []
        screen.show([*more, title(_PLURALS[kind], f"sim catalog {kind} NAME"), *paragraphs(rows, width)])


def fact_rows(facts: list[dict[str, Any]]) -> list[tuple[Cell, ...]]:
    """Return rows of (name, value, kind, source; note). A long value stands before its source, in the last column."""
    rows: list[tuple[Cell, ...]] = []
    for fact in facts:
        kind = (fact["kind"], _STYLES.get(fact["kind"], ""))
        words = "; ".join(filter(None, (fact["source"], fact["note"])))
        if len(fact["value"]) > _LONG:
            rows.append((fact["name"], "", kind, "; ".join(filter(None, (fact["value"], words)))))
        else:
            rows.append((fact["name"], fact["value"], kind, (words, "dim")))
    return rows


_LONG = 22
_STYLES = {"datasheet": "green", "measured": "green", "derived": "", "assumed": "yellow", "user": "cyan"}


def _entries(kind: Kind) -> list[dict[str, str]]:
    return [{"name": name, "title": words} for name, words in describe.overview(kind)]


def _unknown(problem: str, word: str, known: tuple[str, ...], where: str) -> ScenarioError:
    close = near(word, known)
    mean = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}" if len(known) < 8 else ""
    return ScenarioError([Finding(where, 0, f"{problem}; {mean or f'{where!r} lists them'}")])
