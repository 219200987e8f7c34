"""Scenarios side by side."""

from __future__ import annotations

import io

import pytest
from report_scenarios import answered

from sim.report.compare import comparison, print_comparison
from sim.report.layout import Screen

NAMES = ["zero_3", "zero_2", "ddp"]


def printed(names, width=80):
    file = io.StringIO()
    print_comparison(Screen(file, width, False), [answered(name).report for name in names], names)
    return file.getvalue()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_up_to_three_stand_beside_each_other_in_80_columns(count):
    lines = printed(NAMES[:count]).splitlines()
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    assert lines[0].split() == NAMES[:count]


def test_more_go_below_with_the_first_again():
    heads = [line.split() for line in printed([*NAMES, "too_large"]).splitlines() if "zero_3 " in f"{line} "]
    assert heads[0] == NAMES
    assert ["zero_3", "too_large"] in heads


def test_each_figure_is_relative_to_the_first():
    reports = [answered(name).report for name in NAMES]
    content = comparison(reports, NAMES)
    assert [entry["file"] for entry in content["scenarios"]] == NAMES
    assert set(content["relative_to_first"][0].values()) <= {1.0, None}
    time = [entry["step"]["time_s"] for entry in content["scenarios"]]
    assert [entry["time_s"] for entry in content["relative_to_first"]] == pytest.approx([t / time[0] for t in time])


def test_every_kind_of_communication_of_any_of_them_has_a_row():
    out = printed(["ddp", "zero_3"])
    kinds = {total.kind for name in ("ddp", "zero_3") for total in answered(name).report.communication}
    assert kinds
    assert all(kind in out for kind in kinds)


def test_it_says_which_fits():
    line = next(line for line in printed(["ddp", "too_large"]).splitlines() if line.strip().startswith("fits"))
    assert line.split("fits", 1)[1].split() == ["fits", "does", "not", "fit"]
