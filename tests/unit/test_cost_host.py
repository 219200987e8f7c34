"""Host times: by who calls, whose code, and how fast one thread of the node's processor is."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from sim.catalog.load import node
from sim.cost.efficiency import read
from sim.cost.host import CPU_ADAM_BYTES, ELEMENT_BYTES, cpu_step_s, host_coefficients, single_thread_points
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


KINDS = tuple(ELEMENT_BYTES)
BILLION = 10**9


def test_cpu_adam_on_one_thread_takes_what_was_measured() -> None:
    """0.5 ns an element on Zen 5 at 3.8 GHz; Zen 3 at 3.5 GHz (672 points a GHz against 917) in proportion."""
    for cpu, expected in (("EPYC 9755", 0.5e-9 * 3.8 / 4.1), ("EPYC 7763", 0.5e-9 * 917 * 3.8 / (672 * 3.5))):
        found = host_coefficients(cpu, "torch", compiled=False)
        assert cpu_step_s("cpu_adam", BILLION, 1, 64, 1, 1e15, found) == pytest.approx(BILLION * expected)


def test_a_core_of_intel_moves_no_more_than_it_keeps_on_the_way() -> None:
    """28 bytes at 19.9 GB/s are 1.41 ns, where its score alone would give 0.5 * 917 * 3.8 / (647 * 3.4) = 0.79."""
    found = host_coefficients("2x Intel Xeon Platinum 8358", "torch", compiled=False)
    assert found.element_s["cpu_adam"] == pytest.approx(CPU_ADAM_BYTES / 19.9e9)
    assert found.element_s["cpu_overflow"] == pytest.approx(4.7e-9 * 917 * 3.8 / (647 * 3.4))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_help_until_memory_or_cores_end(kind: str) -> None:
    """Twice the threads take half as long; then the node's memory is the bound, or its cores are shared out."""
    found = host_coefficients("EPYC 7763", "torch", compiled=False)

    def time_s(threads: int, ranks: int = 8, cores: int = 128, bandwidth: float = 1e15) -> float:
        return cpu_step_s(kind, BILLION, ranks, cores, threads, bandwidth, found)

    assert time_s(1) == 2 * time_s(2) == 16 * time_s(16)
    assert time_s(16) == time_s(17) == time_s(0) == time_s(128)
    memory_s = 8 * BILLION * ELEMENT_BYTES[kind] / (found.cpu_adam_fraction * 1e9)
    assert time_s(1, bandwidth=1e9) == time_s(16, bandwidth=1e9) == pytest.approx(memory_s)
    assert time_s(8, ranks=1) == time_s(8)


def test_all_cores_of_a_dgx_2_are_bound_by_its_memory_and_one_by_itself() -> None:
    """10^9 elements of 28 bytes: at half of 255.936 GB/s, 0.219 s; on one of its cores, at 19.9 GB/s, 1.41 s."""
    dgx = node("dgx-2")
    found = host_coefficients(dgx.cpu, "torch", compiled=False)
    for threads, bandwidth in ((0, 255.936e9 / 2), (1, 19.9e9)):
        time_s = cpu_step_s("cpu_adam", BILLION, 1, dgx.num_cpu_cores, threads, dgx.host_memory_bytes_per_s, found)
        assert time_s == pytest.approx(BILLION * CPU_ADAM_BYTES / bandwidth)
