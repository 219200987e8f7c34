"""Prices and rates of the catalogue: whole, dated, of GPUs that exist."""

from __future__ import annotations

import datetime

import pytest

from sim import units
from sim.catalog import economy, load


def test_every_offer_has_a_known_gpu_a_price_a_date_and_a_source() -> None:
    offers = (*economy.rents(), *economy.purchases())
    assert len(offers) > 40
    for quote in offers:
        assert quote.gpu in load.names("gpu")
        assert not quote.node or load.node(quote.node).gpu == quote.gpu
        assert quote.usd > 0
        datetime.date.fromisoformat(quote.date)
        assert len(quote.source) > 10


@pytest.mark.parametrize("section", ["power", "failures", "storage", "people"])
def test_every_fact_has_a_kind_and_a_source(section: str) -> None:
    for fact in economy.running(section).values():
        assert fact.kind in ("datasheet", "measured", "assumed", "derived")
        assert len(fact.source) > 10


def test_failure_rates_follow_from_their_table() -> None:
    """Llama 3: 419 unexpected interruptions in 54 days on 16,384 GPUs in 2,048 nodes; 268 of them by GPUs."""
    hours = 54 * 24
    facts = economy.running("failures")
    assert units.parse_duration(facts["gpu_mtbf"].text) / 3600 == pytest.approx(16_384 * hours / 268, rel=0.01)
    assert units.parse_duration(facts["node_mtbf"].text) / 3600 == pytest.approx(2_048 * hours / 151, rel=0.01)


@pytest.mark.parametrize(("text", "usd"), [("2 MUSD", 2e6), ("35 kUSD", 35e3), ("$2M", 2e6), ("250000 USD", 250e3)])
def test_money(text: str, usd: float) -> None:
    assert units.parse_money(text) == usd


def test_prices_name_what_they_are_per() -> None:
    assert units.parse_money_per("0.08 USD/kWh", "kWh") == 0.08
    with pytest.raises(ValueError, match="is not a price per h; write"):
        units.parse_money_per("2 USD/day", "h")
    assert units.format_money(1.234e6) == "1.23 MUSD"
    assert units.format_energy(3.6e9) == "1.00 MWh"


def test_the_catalogue_shows_what_a_gpu_is_offered_for() -> None:
    """Each offer of the prices' file with its date, the cheapest first, beside the GPU's facts."""
    from sim.report.catalog import catalogue

    facts = [one for one in catalogue("gpu", "h100-sxm-80gb")["facts"] if one["name"].startswith(("rent.", "buy"))]
    quotes = [quote for quote in (*economy.rents(), *economy.purchases()) if quote.gpu == "h100-sxm-80gb"]
    assert len(facts) == len(quotes) > 5
    rents = [float(one["value"].removesuffix(" USD/h")) for one in facts if one["name"].startswith("rent.")]
    assert rents == sorted(quote.usd for quote in quotes if quote in economy.rents())
    assert all(any(one["source"].endswith(quote.date) for quote in quotes) for one in facts)
    assert not [one for one in catalogue("link", "nvlink4")["facts"] if one["name"].startswith("rent.")]
