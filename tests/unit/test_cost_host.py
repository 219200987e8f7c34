"""Host times: by who calls, whose code, and how fast one thread of the node's processor is."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from sim.catalog.load import node
from sim.cost.efficiency import read
from sim.cost.host import host_coefficients, single_thread_points
from sim.ir.program import Caller

CODES = ("torch", "huggingface", "megatron")
NODES = sorted(path.stem for path in Path("topologies").glob("*.yaml"))


def test_a_launch_is_the_drivers_and_the_frameworks_share() -> None:
    """On EPYC 7742 (565 points a GHz, 3.4 GHz): 5 us of a desktop's 4200 points, 19.4 us of Zen 5's 917 at 3.8 GHz.

    Whole steps of Megatron-LM take 1.25 times what its block does in a loop.
    """
    points = 565 * 3.4
    expected = 1.25 * (5e-6 * 4200 / points + 19.4e-6 * 917 * 3.8 / points)
    found = host_coefficients("2x AMD EPYC 7742", "megatron", compiled=False)
    assert found.launch_s["forward"] == pytest.approx(expected)
    assert found.assumed == ""


@pytest.mark.parametrize("code", CODES)
def test_every_caller_has_a_time_and_a_checkpoint_comes_on_top(code: str) -> None:
    found = host_coefficients("2x AMD EPYC 7742", code, compiled=False).launch_s
    assert set(found) == set(get_args(Caller))
    assert found["checkpoint"] > found["forward"] > found["backward"] > 0


@pytest.mark.parametrize("code", CODES)
def test_a_faster_thread_takes_proportionally_less(code: str) -> None:
    slow, fast = (host_coefficients(cpu, code, compiled=False) for cpu in ("EPYC 7742", "EPYC 9374F"))
    for caller in get_args(Caller):
        assert slow.launch_s[caller] * slow.points == pytest.approx(fast.launch_s[caller] * fast.points)
    assert slow.collective_s * slow.points == pytest.approx(fast.collective_s * fast.points)


@pytest.mark.parametrize("name", NODES)
def test_the_processor_of_every_node_is_known(name: str) -> None:
    points, assumed = single_thread_points(node(name).cpu, read("processors.yaml"))
    assert assumed == ""
    assert 1500 < points < 5000


def test_an_unknown_processor_is_assumed_and_said() -> None:
    points, assumed = single_thread_points("2x Zilog Z80", read("processors.yaml"))
    assert points == read("processors.yaml")["otherwise"]["points"]
    assert "Zilog Z80" in assumed
