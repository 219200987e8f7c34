"""CUDA_LAUNCH_BLOCKING: what stands behind each kernel; one that says it is waited for takes as long as by an event."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.ir.ledger import Dim, Pointwise, Tensor
from sim.ir.program import COMPUTE, Chunk, Collective, Compute, HostWait, Instruction, Record, Send, Wait
from sim.parallel.blocking import EVENT, blocking, waited_for
from sim.pipeline import programs, simulate
from sim.scenario.load import load_scenario
from sim.scenario.schema import Scenario

X = Tensor("x", (Dim("n", 1 << 20),), "bf16")
KERNEL = Compute("add", Pointwise("elementwise", (X,), (X,)))
SUM = Collective("sum", "all_reduce", "tp", 1 << 20, "bf16", "nccl")
WAITED = (Record(EVENT, COMPUTE), HostWait(EVENT))


def test_the_first_kernel_of_a_stream_that_may_be_busy_is_waited_for_by_an_event() -> None:
    """After a wait or a message the stream may be busy though the host has seen it empty; events disturb nothing."""
    kept = replace(KERNEL, blocking=True)
    assert waited_for((KERNEL, KERNEL, Record("e", COMPUTE), KERNEL)) == (
        KERNEL, *WAITED, kept, Record("e", COMPUTE), kept,
    )  # fmt: skip
    for disturbance in (Wait("e", COMPUTE), Send("s", "pp", 1, COMPUTE)):
        assert waited_for((KERNEL, disturbance, KERNEL)) == (KERNEL, *WAITED, disturbance, KERNEL, *WAITED)
    assert waited_for((SUM, KERNEL)) == (SUM, Record(EVENT, "nccl"), HostWait(EVENT), KERNEL, *WAITED)


def written_out(chunk: Chunk) -> Chunk:
    """Return a chunk whose kernels do not say that they are waited for but have an event each."""
    found: list[Instruction] = []
    for step in chunk:
        if isinstance(step, Compute) and step.blocking:
            found += (replace(step, blocking=False), Record(EVENT, step.stream), HostWait(EVENT))
        else:
            found.append(step)
    return tuple(found)


@pytest.mark.parametrize("where", ["scenarios/7b_ddp.yaml", "scenarios/70b_zero3.yaml"])
def test_a_kernel_that_is_waited_for_takes_as_long_as_one_with_an_event(where: str) -> None:
    blocked = load_scenario(where, ["training.launch_blocking=true"])
    ledger, world = programs(blocked)
    out = [replace(p, chunks={name: written_out(chunk) for name, chunk in p.chunks.items()}) for p in world.programs]
    told = simulate(blocked, written=(ledger, world)).timeline
    events = simulate(blocked, written=(ledger, replace(world, programs=tuple(out)))).timeline
    assert told.end == events.end


@pytest.mark.parametrize("where", ["scenarios/7b_ddp.yaml", "scenarios/70b_zero3.yaml"])
def test_blocking_launches_take_longer_and_change_no_bytes(where: str) -> None:
    """Nothing is hidden any more: neither the host's work nor collectives beside kernels."""

    def answer(*overrides: str) -> tuple[int, list[int]]:
        scenario: Scenario = load_scenario(where, list(overrides))
        found = simulate(scenario)
        return found.timeline.end, [f.peak_allocated_bytes for f in found.footprints]

    (free, bytes_free), (blocked, bytes_blocked) = answer(), answer("training.launch_blocking=true")
    assert blocked > free
    assert bytes_blocked == bytes_free


def test_chunks_that_are_one_stay_one() -> None:
    _, world = programs(load_scenario("scenarios/7b_ddp.yaml", []))
    chunk = (KERNEL,)
    (program,) = blocking([replace(world.programs[0], chunks={"a": chunk, "b": chunk})])
    assert program.chunks["a"] is program.chunks["b"]
