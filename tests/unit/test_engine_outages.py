"""Whole runs with failures: what is certain, and Daly's closed form on average."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.engine.outages import RunSettings, simulate_run
from sim.planner.goodput import daly_s, expected_s, waiting_s

HOUR, DAY = 3600.0, 86400.0
RUN = RunSettings(
    work_s=30 * DAY, failures_per_s=1 / (20 * HOUR), checkpoint_s=60.0, interval_s=HOUR, detect_s=600.0,
    restart_s=300.0, repair_s=DAY, spare_nodes=4,
)  # fmt: skip


def test_without_failures_a_run_is_its_work_and_its_checkpoints() -> None:
    run = simulate_run(replace(RUN, failures_per_s=0.0), 1)
    assert run.wall_s == pytest.approx(30 * DAY + 30 * 24 * 60.0)  # an hour of work, a minute of checkpoint
    assert (run.num_failures, run.lost_s, run.down_s) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_add_up_and_no_work_is_lost_for_good(seed: int) -> None:
    run = simulate_run(RUN, seed)
    assert run.work_s == RUN.work_s
    assert run.work_s + run.checkpoints_s + run.lost_s + run.down_s == pytest.approx(run.wall_s)
    assert run.down_s >= run.num_failures * 300  # at least the restart, where failures come one at a time
    assert run == simulate_run(RUN, seed)


def test_a_failure_costs_detection_restart_and_less_than_an_interval() -> None:
    run = simulate_run(replace(RUN, failures_per_s=1 / (200 * HOUR)), 3)
    assert run.num_failures > 0
    assert run.down_s == pytest.approx(run.num_failures * 900)
    assert 0 < run.lost_s < run.num_failures * (HOUR + 60)


@pytest.mark.parametrize("spares", [0, 1, 4])
def test_the_mean_is_dalys(spares: int) -> None:
    settings = replace(RUN, spare_nodes=spares)
    mtbf = 1 / settings.failures_per_s
    wait = waiting_s(settings.failures_per_s, settings.repair_s, spares)
    closed = expected_s(settings.work_s, mtbf, 900.0, settings.checkpoint_s, settings.interval_s, wait)
    mean = sum(simulate_run(settings, seed).wall_s for seed in range(150)) / 150
    assert mean == pytest.approx(closed, rel=0.03)


def test_no_interval_is_better_than_dalys() -> None:
    best = daly_s(20 * HOUR, 60.0)
    at_best = sum(simulate_run(replace(RUN, interval_s=best), seed).wall_s for seed in range(100))
    for factor in (0.3, 3.0):
        other = sum(simulate_run(replace(RUN, interval_s=best * factor), seed).wall_s for seed in range(100))
        assert other > at_best
