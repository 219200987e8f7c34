"""Kernels beside collectives and those of other streams: how long they take, by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.engine.beside import durations_beside, own_ticks
from sim.ir.ledger import Kernel, Pointwise
from sim.ir.program import COMPUTE, Chunk, Collective, Compute, Copy, HostWait, Instruction, Record, Wait
from sim.ir.traffic import Link, Phase, Traffic

SIDE, OTHER = "side", "other"
HOLDING = 7
"""FLOPs an element of kernels whose blocks stay to the end, one an SM."""


@dataclass
class ByHand:
    """Kernels name their ticks; 10 SMs taken double them, 20 SMs triple them. Some hold all SMs."""

    links: tuple[Link, ...] = (Link("wire", "nvlink", 1e12),)

    def beside_s(self, kernel: Kernel, rank: int, sms: int, memory_bytes_per_s: float) -> float:
        return alone(kernel) * (1 + sms / 10) * 1e-12

    def waits_for_sms(self, kernel: Kernel, sms: int) -> bool:
        assert isinstance(kernel, Pointwise)
        return kernel.flops_per_element == HOLDING

    def memory_bytes(self, traffic: Traffic) -> float:
        return 0.0


def alone(kernel: Kernel) -> int:
    assert isinstance(kernel, Pointwise)
    return int(kernel.kind)


def kernel(ticks: int, stream: str = COMPUTE) -> Compute:
    return Compute("op", Pointwise(str(ticks), (), ()), stream)


def holding(ticks: int, stream: str = COMPUTE) -> Compute:
    return Compute("op", Pointwise(str(ticks), (), (), flops_per_element=HOLDING), stream)


def collective(ticks: int, stream: str = SIDE, name: str = "gather") -> Collective:
    """One that is called "light" takes no SMs."""
    return Collective(name, "all_gather", "dp", ticks, "bf16", stream)


def found(*chunk: Instruction, sms: int = 10) -> dict[int, int]:
    def traffic_of(step: Collective) -> Traffic:
        return Traffic("ring", (Phase(step.tensor_bytes * 1e-12),), 0, 0 if step.name == "light" else sms)

    return dict(durations_beside(tuple(chunk), alone, traffic_of, ByHand(), 0))  # type: ignore[arg-type]


def test_a_kernel_goes_on_at_its_own_rate_when_the_collective_has_ended() -> None:
    """50 of its ticks it runs at half its rate: 25 are done, 75 are left."""
    assert found(collective(50), kernel(100)) == {1: 125}


def test_it_does_not_matter_which_was_issued_first() -> None:
    assert found(kernel(100), collective(50)) == {0: 125}


def test_a_collective_that_begins_in_the_middle() -> None:
    """The gather begins at 40, when what is before it has ended; 60 are left, at half the rate: 120."""
    assert found(kernel(100), collective(40, name="light"), collective(500)) == {0: 160}


def test_a_collective_begins_when_a_kernel_that_holds_all_sms_has_ended() -> None:
    """From 40 it waits for the kernel's end at 100, which it does not slow down; then it halves the rate until 150."""
    assert found(holding(100), collective(40, name="light"), collective(50), kernel(100)) == {3: 125}


def test_blocks_that_wait_for_the_sms_of_a_collective_begin_when_it_has_ended() -> None:
    """Its last blocks begin at 30 and take 100; beside a longer one they begin when its first ones have ended."""
    assert found(collective(30), holding(100)) == {1: 130}
    assert found(collective(150), holding(100)) == {1: 200}
    assert found(collective(250), holding(100)) == {1: 200}


def test_it_is_the_last_of_several_collectives_that_blocks_wait_for() -> None:
    assert found(collective(30), collective(60, OTHER), holding(100)) == {2: 160}


def test_a_collective_that_waits_for_one_kernel_holds_the_sms_before_the_next() -> None:
    """The gather begins at 100 and ends at 130; the second kernel's last blocks begin then."""
    assert found(holding(100), collective(20, name="light"), collective(30), holding(100)) == {3: 130}


def test_kernels_of_two_streams_take_turns() -> None:
    """The side's may begin at 0, and gets its turn at 100; the next at 100, and gets its turn at 140."""
    assert found(kernel(100), kernel(40, SIDE), kernel(30), kernel(20)) == {1: 140, 2: 70}


def test_kernels_of_three_streams_take_turns_in_the_order_in_which_they_could_begin() -> None:
    """Compute 0-100, side 100-140, other 140-150; compute's next from 100 has 150-180, side's next from 140 180-181."""
    chunk = (kernel(100), kernel(40, SIDE), kernel(10, OTHER), kernel(30), kernel(1, SIDE))
    assert found(*chunk) == {1: 140, 2: 150, 3: 80, 4: 41}


def test_a_kernel_that_waits_for_that_of_the_other_stream_shares_nothing_with_it() -> None:
    assert not found(kernel(100), Record("a", COMPUTE), Wait("a", SIDE), kernel(40, SIDE))


def test_a_kernel_gets_its_turn_beside_a_collective() -> None:
    """The gather halves the rate until 50: 25 are done of the first, 75 are left until 125; the side's follows."""
    assert found(kernel(100), collective(50, OTHER), kernel(40, SIDE)) == {0: 125, 2: 165}
    """Until 300 it halves that of both: 0-200 and 200-280."""
    assert found(kernel(100), collective(300, OTHER), kernel(40, SIDE)) == {0: 200, 2: 280}


def test_copies_by_the_copy_engines_take_no_turns() -> None:
    assert not found(kernel(100), Copy("offload", "device_to_host", 10**9, SIDE))


def test_kernels_one_after_the_other_share_what_a_collective_takes() -> None:
    """30 of the gather go by in the first (15 + 15 ticks of work in 30), 40 - 30 in the second."""
    assert found(collective(40), kernel(15), kernel(100)) == {1: 30, 2: 105}


def test_two_collectives_take_twice_as_much() -> None:
    """Both for 30 ticks: a third of 30 is 10; one more for 20: half, 10; 80 are left."""
    assert found(collective(30), collective(50, OTHER), kernel(100)) == {2: 30 + 20 + 80}


def test_a_collective_that_the_compute_stream_waits_for_slows_nothing_down() -> None:
    assert not found(
        kernel(100), Record("ready", COMPUTE), Wait("ready", SIDE), collective(50), Record("done", SIDE),
        Wait("done", COMPUTE), kernel(100),
    )  # fmt: skip


def test_events_may_go_through_another_stream_and_back() -> None:
    """The compute stream waits for one that has waited for it: what comes then runs beside the gather as ever."""
    through = (Record("a", COMPUTE), Wait("a", OTHER), Record("b", OTHER), Wait("b", COMPUTE))
    after = (Record("c", COMPUTE), Wait("c", SIDE), collective(50), kernel(100))
    assert found(kernel(30), *through, *after) == {8: 125}


def test_what_the_host_issues_after_a_wait_comes_after_it() -> None:
    """The gather is issued when the first kernel has ended."""
    assert found(kernel(100), Record("e", COMPUTE), HostWait("e"), collective(50), kernel(30)) == {4: 55}


def test_one_that_takes_no_sms_slows_nothing_down() -> None:
    assert not found(collective(50), kernel(100), sms=0)


def test_a_group_s_own_time_is_that_of_its_links_or_its_cap() -> None:
    cost = ByHand()
    several = Traffic("ring", (Phase(1e-12, ((0, 800.0),), group_s=1e-10),), 0, 1)
    assert own_ticks(several, cost) == 1 + 100  # type: ignore[arg-type]
    capped = Traffic("ring", (Phase(0.0, ((0, 800.0),), 800.0, 0.5e12),), 0, 1)
    assert own_ticks(capped, cost) == 1600  # type: ignore[arg-type]


steps = st.one_of(
    st.builds(kernel, st.integers(0, 200), st.sampled_from((COMPUTE, SIDE))),
    st.builds(holding, st.integers(0, 200), st.sampled_from((COMPUTE, SIDE))),
    st.builds(collective, st.integers(0, 300), st.sampled_from((SIDE, OTHER))),
    st.builds(Record, st.sampled_from("ef"), st.sampled_from((COMPUTE, SIDE, OTHER))),
    st.builds(Wait, st.sampled_from("ef"), st.sampled_from((COMPUTE, SIDE, OTHER))),
    st.builds(HostWait, st.sampled_from("ef")),
)


@given(st.lists(steps, max_size=30).map(tuple))
def test_a_kernel_takes_no_less_than_alone_and_no_more_than_beside_all(chunk: Chunk) -> None:
    """At most two streams have collectives: three times as long, and no more turns than kernels before its own. Each
    change may round one tick up."""
    every = sum(alone(step.kernel) for step in chunk if isinstance(step, Compute))
    for index, ticks in found(*chunk).items():
        step = chunk[index]
        assert isinstance(step, Compute)
        own = alone(step.kernel)
        assert own < ticks <= 3 * every + len(chunk)


@given(st.lists(steps, max_size=30).map(tuple))
def test_kernels_of_one_stream_are_slowed_down_by_collectives_alone(chunk: Chunk) -> None:
    one: Chunk = tuple(Compute(step.op, step.kernel) if isinstance(step, Compute) else step for step in chunk)
    assert not found(*one, sms=0)
    for index, ticks in found(*one).items():
        step = one[index]
        assert isinstance(step, Compute)
        assert ticks <= 3 * alone(step.kernel) + len(one)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_what_a_collective_adds_in_all_is_half_its_time(number: int) -> None:
    """Whatever the kernels are, while it runs (100 ticks, work there is for longer) half as much is done."""
    chunk = (collective(100), *(kernel(400 // number) for _ in range(number)))
    added = sum(ticks - 400 // number for ticks in found(*chunk).values())
    assert added == 50
