"""Money and energy of a training, by hand."""

from __future__ import annotations

import pytest
from plan_world import TWO_SITES, plan_of

from sim.planner.economics import Economics
from sim.planner.space import candidates

CALM = (
    "failures.gpu_mtbf=1e9 years",
    "failures.node_mtbf=1e9 years",
    "failures.gpu_spread=0",
    "failures.spare_nodes=0",
)


def _first(plan, num_gpus=64, site=0):
    return next(c for c in candidates(plan) if c.num_gpus == num_gpus and c.site == site)


def test_rent_is_gpus_times_hours_times_price() -> None:
    plan = plan_of(TWO_SITES, *CALM, "prices.rent={dgx-h100: 2 USD/h}", "prices.storage=0 USD/TB/month")
    cost = Economics(plan).cost(_first(plan), 10.0, 5.0)
    steps = 1e11 / (256 * 8192)
    assert cost.time_s == pytest.approx(steps * 10, rel=1e-3)
    assert cost.usd == pytest.approx(64 * 2 * cost.time_s / 3600)
    assert cost.usd_power == cost.usd_people == 0


def test_energy_follows_the_share_of_time_in_kernels() -> None:
    """H100: 700 W, 0.9 of it computing and 0.5 waiting; the rest of a DGX is (10.2 kW - 5.6 kW) / 8, 0.7 of it."""
    plan = plan_of(TWO_SITES, *CALM, "prices.pue=1.5")
    economics = Economics(plan)
    rest = 0.7 * (10_200 - 8 * 700) / 8
    assert economics.power_w(plan.sites[0], 64, 1.0) == pytest.approx(1.5 * 64 * (0.9 * 700 + rest))
    assert economics.power_w(plan.sites[0], 64, 0.25) == pytest.approx(1.5 * 64 * (0.6 * 700 + rest))
    cost = economics.cost(_first(plan), 10.0, 2.5)
    assert cost.joules == pytest.approx(cost.power_w * cost.time_s, rel=1e-3)


def test_bought_gpus_are_written_off_and_pay_for_their_power() -> None:
    plan = plan_of(TWO_SITES, *CALM, "prices.acquire=buy", "prices.buy={h100-sxm-80gb: 35040 USD/GPU}",
                   "prices.lifetime=4 years", "prices.power=0.10 USD/kWh")  # fmt: skip
    assert plan.sites[0].offer.usd_per_gpu_hour == pytest.approx(1.0)  # 35,040 hours
    cost = Economics(plan).cost(_first(plan), 10.0, 5.0)
    assert cost.usd_gpus == pytest.approx(64 * cost.time_s / 3600)
    assert cost.usd_power == pytest.approx(cost.joules / 3.6e6 * 0.10)


def test_owned_gpus_cost_power_and_no_rent() -> None:
    plan = plan_of(TWO_SITES, *CALM, "candidates.owned={dgx-h100: 64}")
    cost = Economics(plan).cost(_first(plan), 10.0, 5.0)
    assert cost.usd_gpus == 0
    assert cost.usd_power == pytest.approx(cost.joules / 3.6e6 * 0.08)


def test_people_and_checkpoints_are_paid_by_the_time() -> None:
    plan = plan_of(TWO_SITES, *CALM, "prices.people=365 kUSD/year", "prices.storage=30 USD/TB/month", "storage.kept=2")
    cost = Economics(plan).cost(_first(plan), 10.0, 5.0)
    assert cost.usd_people == pytest.approx(1000 * cost.time_s / 86400)
    assert cost.usd_storage == pytest.approx(plan.num_parameters * 14 * 2 / 1e12 * cost.time_s / 86400)


def test_spares_are_paid_too() -> None:
    plan = plan_of(TWO_SITES, *CALM[:3], "failures.spare_nodes=2", "prices.rent={dgx-h100: 2 USD/h}")
    cost = Economics(plan).cost(_first(plan), 10.0, 5.0)
    assert cost.usd_gpus == pytest.approx((64 + 16) * 2 * cost.time_s / 3600)
