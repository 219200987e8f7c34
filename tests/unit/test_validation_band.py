"""By how much whole runs are off beyond their parts: each source weighing the same, and held where it was left out."""

from __future__ import annotations

from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost import efficiency
from sim.cost.residuals import NINE_IN_TEN
from sim.validation.band import Limits, Point, left_out, limits_of, points_of, quantile

logs = st.floats(-1.0, 1.0)
deviations = st.floats(0.0, 0.3)
limits = st.builds(Limits, st.floats(0.0, 1.0), st.floats(0.0, 1.0))


@given(logs, deviations, limits)
def test_a_run_is_in_its_band_just_if_its_excess_is_within_the_limits(z, deviation, found):
    low, high = found.band(deviation)
    point = Point("a", z, deviation)
    if min(abs(z - log(low)), abs(z - log(high))) > 1e-9:
        assert found.hold(point) == (low <= exp(z) <= high)


def test_a_run_within_its_parts_has_no_excess_and_one_beyond_them_what_is_left_in_quadrature():
    assert Point("a", 0.1, 0.1).excess == 0.0
    assert Point("a", -0.5, 0.3 / NINE_IN_TEN).excess == pytest.approx(-0.4)  # 0.3^2 + 0.4^2 = 0.5^2


def test_a_quantile_is_by_weight():
    assert [quantile([(1.0, 3.0), (2.0, 1.0)], share) for share in (0.5, 0.75, 0.76, 1.0)] == [1.0, 1.0, 2.0, 2.0]


def test_sources_weigh_the_same_however_many_runs_they_have():
    few, many = [Point("few", 0.5, 0.0)], [Point("many", 0.1, 0.0)]
    assert limits_of(few + many) == limits_of(few + 50 * many)


def test_one_in_twenty_may_be_outside_either_way():
    """Forty sources, five of them shorter by far: two are outside below, two above."""
    values = [-0.9, -0.8, -0.7, -0.6, -0.5] + [0.01 * i for i in range(1, 36)]
    found = limits_of([Point(f"{i:02d}", value, 0.0) for i, value in enumerate(values)])
    assert found == Limits(0.7, pytest.approx(0.33))  # outside: -0.9, -0.8, 0.34, 0.35


def test_where_all_runs_are_longer_the_band_ends_with_the_parts_below():
    """Twenty sources at 0.05 to 1.0: nineteen of them are up to 0.95."""
    assert limits_of([Point(str(i), i / 20, 0.0) for i in range(1, 21)]) == Limits(0.0, 0.95)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), logs, deviations), min_size=1, max_size=40))
def test_the_limits_always_hold_nine_in_ten_of_the_runs_they_are_from(rows):
    points = [Point(*row) for row in rows]
    sources = {point.source for point in points}
    found = limits_of(points)
    held = [[found.hold(p) for p in points if p.source == source] for source in sorted(sources)]
    assert sum(sum(own) / len(own) for own in held) / len(held) >= 0.9 - 1e-9


def test_a_source_that_is_left_out_has_no_say_in_its_limits():
    points = [Point(name, z, 0.0) for name, z in (("a", 0.1), ("b", 0.2), ("c", 0.9))]
    found = left_out(points)
    assert found["c"] == (Limits(0.0, 0.2), 0.0)
    assert found["a"] == (Limits(0.0, 0.9), 1.0)


def test_runs_faster_than_their_gpu_are_left_out():
    row = {"source": "a", "measured_s": 2.0, "predicted_s": 1.0, "parts_deviation": 0.1, "num_nodes": 1, "stages": 1,
           "gpu": "x", "parts_s": {"compute": 0.75, "other": 0.25}}  # fmt: skip
    (point,) = points_of([row | {"above_peak": False}, row | {"above_peak": True}])
    assert point.log_ratio == pytest.approx(log(2))
    assert point.share("other") == 0.25


def test_nine_in_ten_is_kept_for_a_source_that_was_left_out():
    """What the catalogue says of itself, as it was derived."""
    data = efficiency.read("whole_runs.yaml")
    assert data["sources"] == len(data["by_source"]) >= 10
    assert data["runs"] == sum(own["runs"] for own in data["by_source"].values())
    assert round(data["left_out"]["held"], 1) >= 0.9
