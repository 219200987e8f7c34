"""Failures, checkpoints, spares, stragglers: closed forms by hand."""

from __future__ import annotations

from math import exp, sqrt

import pytest
from plan_world import TWO_SITES, plan_of

from sim.planner.goodput import (
    daly_s,
    distribution,
    expected_s,
    reliability,
    spares_for,
    straggler_factor,
    waiting_s,
    young_s,
)


def test_young_and_daly_agree_where_checkpoints_are_short() -> None:
    # 60 s every ... of 100 h: sqrt(2 * 60 * 360000) = 6573 s; Daly's is 60 s shorter and a little longer
    assert young_s(360_000, 60) == sqrt(2 * 60 * 360_000)
    assert daly_s(360_000, 60) == pytest.approx(young_s(360_000, 60), rel=0.01)
    assert daly_s(10, 60) == 10  # checkpoints longer than twice the time between failures


def test_dalys_interval_is_where_his_time_is_least() -> None:
    best = daly_s(36_000, 120)
    at = [expected_s(1e6, 36_000, 900, 120, best * factor) for factor in (0.8, 1.0, 1.25)]
    assert at[1] == min(at)


def test_without_failures_only_checkpoints_are_added() -> None:
    assert expected_s(1e6, 1e12, 900, 60, 3600) == pytest.approx(1e6 * 3660 / 3600, rel=1e-6)


def test_spares_cover_all_but_one_in_a_hundred() -> None:
    # one failure a day, a day of repair: Poisson with mean 1; P(4 or fewer) = 0.9963, P(3 or fewer) = 0.981
    assert spares_for(1 / 86400, 86400) == 4
    assert sum(exp(-1) / f for f in (1, 1, 2, 6)) < 0.99 < sum(exp(-1) / f for f in (1, 1, 2, 6, 24))


def test_without_spares_every_failure_waits_for_the_repair() -> None:
    assert waiting_s(1 / 86400, 86400, 0) == 86400
    # one spare, mean one away: Erlang B(1, 1) = 1/2, and then the earlier of two
    assert waiting_s(1 / 86400, 86400, 1) == pytest.approx(0.5 * 86400 / 2)


def test_the_slowest_of_many() -> None:
    assert straggler_factor(1, 0.01) == straggler_factor(1000, 0.0) == 1.0
    assert straggler_factor(1024, 0.01) == pytest.approx(
        1.0322, abs=2e-3
    )  # the largest of 1024 normals: about 3.2 deviations


def test_a_cluster_of_a_plan() -> None:
    plan = plan_of(TWO_SITES, "failures.gpu_mtbf=1000 h", "failures.node_mtbf=500 h", "failures.spare_nodes=2",
                   "storage.write_per_node=1 GB/s", "storage.bytes_per_parameter=10")  # fmt: skip
    found = reliability(plan, plan.sites[0], 64)
    assert found.mtbf_s == pytest.approx(3600 / (64 / 1000 + 8 / 500))
    assert found.checkpoint_s == pytest.approx(plan.num_parameters * 10 / 8e9)
    assert found.spare_nodes == 2


def test_a_distribution_is_ordered_and_seeded() -> None:
    plan = plan_of(TWO_SITES, "failures.gpu_mtbf=1000 h", "goal.deadline=11 days")
    found = distribution(plan, reliability(plan, plan.sites[0], 64), 10 * 86400.0)
    assert 10 * 86400 < found.p10_s <= found.p50_s <= found.p90_s
    assert found.work_s + found.checkpoints_s + found.lost_s + found.down_s == pytest.approx(found.mean_s)
    assert found.by_deadline is not None
    assert 0 <= found.by_deadline <= 1
    assert found == distribution(plan, reliability(plan, plan.sites[0], 64), 10 * 86400.0)
