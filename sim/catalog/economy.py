"""What GPUs cost, what clusters draw and how they break: the catalogue's facts that a plan needs.

``prices.yaml`` has offers with their dates; ``running.yaml`` shares of power, failure rates and storage, each with its
kind and source. Users' own price files are written alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sim import units
from sim.catalog.schema import Fact

_FOLDER = Path(__file__).parent
TERMS = ("on-demand", "reserved", "spot")


@dataclass(frozen=True, slots=True)
class Quote:
    """An offer: US dollars for a GPU-hour (``rent``) or for a GPU (``buy``), on one kind of node or on any ("")."""

    gpu: str
    node: str
    provider: str
    term: str
    usd: float
    date: str
    source: str


@cache
def _read(name: str) -> Any:
    text = (_FOLDER / name).read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def rents() -> tuple[Quote, ...]:
    """Return the known offers to rent, as they stand in the file."""
    return tuple(_quote(entry, "h") for entry in _read("prices.yaml")["rent"])


def purchases() -> tuple[Quote, ...]:
    """Return the known prices of GPUs with their share of node and network."""
    return tuple(_quote(entry, "GPU") for entry in _read("prices.yaml")["buy"])


def _quote(entry: Mapping[str, Any], per: str) -> Quote:
    sources = _read("prices.yaml")["sources"]
    return Quote(
        entry["gpu"],
        entry.get("node", ""),
        entry.get("provider", "bought"),
        entry.get("term", "bought"),
        units.parse_money_per(entry["price"], per),
        str(entry["date"]),
        sources.get(entry["source"], entry["source"]),
    )


def running(section: str) -> Mapping[str, Fact]:
    """Return the facts of a section of ``running.yaml``: power, failures, storage or people."""
    found = _read("running.yaml")[section]
    return {key: Fact(str(entry["value"]), entry["kind"], entry["source"]) for key, entry in found.items()}
