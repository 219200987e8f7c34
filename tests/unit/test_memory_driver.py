"""What the allocator asks of the driver in every step: found by the replay, written into the programs, timed."""

from __future__ import annotations

import pytest
from engine_world import UNIT, UnitCost, collective, kernel, world

from sim.cost.host import driver_s
from sim.engine.run import run
from sim.ir.footprint import DriverCalls
from sim.ir.program import Alloc, Call, Free, HostCompute, HostWait, Instruction, Program, Record, Storage
from sim.memory.allocator import AllocatorSettings
from sim.memory.driver import moved, with_driver_calls
from sim.memory.replay import replay
from sim.pipeline import simulate
from sim.scenario.load import load_scenario_text

MIB = 2**20
FULL = AllocatorSettings(capacity_bytes=40 * MIB)
EXPANDABLE = AllocatorSettings(capacity_bytes=40 * MIB, expandable_segments=True)
ONE, OTHER = Storage("one", 24 * MIB, "temporary"), Storage("other", 30 * MIB, "temporary", stream="comm")


def turns(calls: int = 1) -> Program:
    """Two streams need 24 and 30 MiB one after the other; neither can use what the other left in the cache."""
    chunk: tuple[Instruction, ...] = (kernel(10), Alloc(ONE), kernel(5), Free(ONE), Alloc(OTHER), Free(OTHER))
    step = tuple(Call("all", microbatch) for microbatch in range(calls))
    return Program((0,), 0, {"all": chunk}, (), step, step, {"dp": "dp"})


def test_two_streams_that_take_turns_empty_the_cache_each_time() -> None:
    """Of 40 MiB, 24 have to go for 30 to come, and the other way round: twice a step, for ever."""
    found = replay(turns(), FULL).driver
    assert found == (
        DriverCalls((0, 1), 1, 24 * MIB, 1, 30 * MIB, True, False),
        DriverCalls((0, 4), 1, 30 * MIB, 1, 24 * MIB, True, False),
    )
    # each takes two handles of 20 MiB
    found = replay(turns(), EXPANDABLE).driver
    assert [(calls.taken, calls.given, calls.expandable) for calls in found] == [(2, 2, True), (2, 2, True)]


@pytest.mark.parametrize("calls", [1, 3, 40])
def test_microbatches_that_are_skipped_ask_as_well(calls: int) -> None:
    found = replay(turns(calls), FULL).driver
    assert [each.position for each in found] == [(call, at) for call in range(calls) for at in (1, 4)]


def test_who_has_room_asks_nothing() -> None:
    assert replay(turns(), AllocatorSettings(capacity_bytes=60 * MIB)).driver == ()
    program = turns()
    assert with_driver_calls(program, ()) is program


def test_the_host_waits_for_all_streams_then_gives_then_takes() -> None:
    calls = DriverCalls((0, 1), 1, 24 * MIB, 2, 30 * MIB, True, False)
    changed = with_driver_calls(turns(), (calls,))
    chunk = changed.chunks[changed.step[0].chunk]
    assert changed.first_step == changed.step
    assert chunk[1:8] == (
        Record("flush compute", "compute"),
        HostWait("flush compute"),
        HostCompute("cuda_free", "cuda_free", 2),
        HostCompute("cuda_free", "cuda_free_page", 15),
        HostCompute("cuda_malloc", "cuda_malloc", 1),
        HostCompute("cuda_malloc", "cuda_malloc_page", 12),
        Alloc(ONE),
    )


def test_a_flush_drains_the_gpu_and_takes_the_drivers_time() -> None:
    """Kernels of 10 and 5: 15. With a flush between them of one call and 15 pages, one call and 12 pages, 29 units: the
    second starts at 10 + 29 and ends at 44; beside a collective of 20, for which the host waits too, at 54."""
    calls = (DriverCalls((0, 1), 1, 24 * MIB, 1, 30 * MIB, True, False),)
    program = turns()
    assert run(world(program), UnitCost()).end == 15 * UNIT
    assert run(world(with_driver_calls(program, calls)), UnitCost()).end == 44 * UNIT
    chunk = (collective("gather", 20), *program.chunks["all"])
    program = Program((0, 1), 0, {"all": chunk}, (), program.step, program.step, {"dp": "dp"})
    later = (DriverCalls((0, 2), 1, 24 * MIB, 1, 30 * MIB, True, False),)
    assert run(world(program), UnitCost()).end == 20 * UNIT
    assert run(world(with_driver_calls(program, later)), UnitCost()).end == 54 * UNIT


def test_places_in_the_step_move_with_what_is_inserted() -> None:
    """The peak is at the second allocation: six instructions come before the first, six more before it."""
    program = turns()
    footprint = replay(program, FULL)
    assert footprint.peak_position == (0, 4)
    assert moved(footprint, program).peak_position == (0, 4 + 2 * 6)
    changed = with_driver_calls(program, footprint.driver)
    assert changed.chunks[changed.step[0].chunk][16] == program.chunks["all"][4]


def test_times_of_the_driver_are_a_call_and_its_pages() -> None:
    """2 GiB by cudaMalloc: 50 us + 1,024 x 0.6 us; by handles of 20 MiB 103 x 69 us."""
    assert driver_s("cuda_malloc", 1) + driver_s("cuda_malloc_page", 1024) == pytest.approx(664.4e-6)
    assert driver_s("map_handle", 103) == pytest.approx(7107e-6)


TEXT = """
model: {hidden_size: 2048, intermediate_size: 8192, num_hidden_layers: 4, num_attention_heads: 16, vocab_size: 32000}
cluster: {node: dgx-a100-80gb, num_gpus: 8}
framework: fsdp1
parallelism: {zero: 3}
training: {sequence_length: 2048, micro_batch_size: 2, global_batch_size: 32, precision: bf16}
"""


def test_a_run_near_the_end_of_memory_takes_longer_and_says_so() -> None:
    """A share of the memory between what is allocated and what would be cached."""
    whole = simulate(load_scenario_text(TEXT, "whole.yaml"))
    assert whole.timeline is whole.undisturbed[1]
    assert whole.world is whole.undisturbed[0]
    fullest = whole.report.fullest
    wanted = (fullest.peak_allocated_bytes + fullest.peak_reserved_bytes) / 2
    share = f"allocator.memory_fraction={wanted / whole.scenario.cluster.gpu.total_memory_bytes:.5f}"
    scenario = load_scenario_text(TEXT, "part.yaml", (share,))
    part, alike = simulate(scenario), simulate(scenario, like=whole)
    assert (
        part.report.to_dict()
        == alike.report.to_dict()
        == simulate(scenario, fold=False).report.to_dict() | {"memory": part.report.to_dict()["memory"]}
    )
    assert tuple(part.undisturbed[1].spans) == tuple(whole.timeline.spans)
    assert part.report.time_ticks > whole.report.time_ticks
    assert sum(part.report.step_ticks.values()) == part.report.time_ticks
    assert part.report.step_ticks["other"] > whole.report.step_ticks["other"]
    flushes = sum(calls.given > 0 for calls in part.report.fullest.driver)
    assert any(f"empties its cache {flushes} x a step" in words for words in part.report.warnings)
    assert any("expandable_segments: true or a smaller micro_batch_size" in words for words in part.report.warnings)
    expanded = simulate(load_scenario_text(TEXT, "part.yaml", (share, "allocator.expandable_segments=true")))
    assert any("expandable_segments: true" not in words and "avoids it" in words for words in expanded.report.warnings)
    again = simulate(load_scenario_text(TEXT, "whole.yaml"), like=part)
    assert again.report.to_dict() == whole.report.to_dict()
