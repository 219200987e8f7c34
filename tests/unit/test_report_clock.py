"""Memory is drawn when the GPU was there: over the whole step, in order, at the height that it had."""

from __future__ import annotations

import pytest
from report_scenarios import answered

from sim.ir.footprint import Sample
from sim.ir.program import Call
from sim.report.clock import _filled, curve


def sample(call: int, allocated: int) -> Sample:
    return Sample((call, 5), allocated, allocated, (allocated,))


def test_a_call_that_was_skipped_repeats_the_last_one_of_its_chunk():
    calls = (Call("forward", 0), Call("backward", 0), Call("forward", 1), Call("backward", 1), Call("step"))
    samples = (sample(0, 10), sample(1, 20), sample(4, 30))
    filled = [(position, s.allocated_bytes) for position, s in _filled(samples, calls)]
    assert filled == [((0, 5), 10), ((1, 5), 20), ((2, 5), 10), ((3, 5), 20), ((4, 5), 30)]


@pytest.mark.parametrize("name", ["zero_3", "zero_2", "ddp", "too_large"])
def test_the_curve_runs_forward_within_the_step_and_shows_the_peak(name):
    simulation = answered(name)
    footprint = simulation.report.fullest
    (program,) = (p for p in simulation.world.programs if p.rank == footprint.ranks[0])
    points = curve(footprint, simulation.timeline, program)
    ticks = [tick for tick, _ in points]
    assert ticks == sorted(ticks)
    assert ticks[0] >= 0
    assert ticks[-1] <= simulation.timeline.end
    assert max(state.allocated_bytes for _, state in points) == footprint.peak_allocated_bytes


def test_a_first_step_that_makes_optimizer_states_is_drawn_on_the_clock_of_a_later_one():
    simulation = answered("too_large")
    footprint = simulation.report.fullest
    (program,) = simulation.world.programs
    assert footprint.peak_step == "first"
    assert program.first_step != program.step
    ticks = [tick for tick, _ in curve(footprint, simulation.timeline, program)]
    # the peak is in the optimizer, which is the end of the step but not its last tick alone
    assert 0.5 * simulation.timeline.end < ticks[-1] <= simulation.timeline.end
    assert len(set(ticks)) > 10
