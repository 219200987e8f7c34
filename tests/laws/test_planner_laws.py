"""Laws of the planner: bounds are below what is simulated, and pruning by them loses nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_world import ONE_NODE, TINY, TWO_SITES, Pretended, plan_of

from sim.errors import ScenarioError
from sim.planner.bounds import Bounds
from sim.planner.economics import Economics
from sim.planner.floor import floor_s
from sim.planner.run import Runner
from sim.planner.schema import Plan
from sim.planner.search import Search, search
from sim.planner.space import Candidate, candidates, scenario_of
from sim.planner.trial import trial
from sim.scenario.load import load_scenario_mapping

PLANS = {
    "one node": ONE_NODE,
    "two nodes": TINY + "goal: {fastest: true}\ncandidates: {nodes: dgx-h100, num_gpus: 16}\n"
    "axes: {tp: [1, 2, 4], pp: [1, 2, 4], vpp: [1, 2], schedule: [1f1b, interleaved, zb-h1, zb-v, gpipe]}\n"
    "frameworks: [megatron, fsdp2, deepspeed, fsdp1, ddp]\n",
    "PCIe": TINY + "goal: {fastest: true}\ncandidates: {nodes: pcie-8x-l40s, num_gpus: [8, 16]}\n",
    "stages of whole nodes": TINY + "goal: {fastest: true}\ncandidates: {nodes: pcie-8x-h100, num_gpus: [16, 32]}\n"
    "axes: {tp: [1, 2], pp: [2, 4], vpp: [1, 2], micro_batch_size: [1, 4]}\nframeworks: [megatron]\n",
    "FSDP2's pipelines": TINY.replace("num_hidden_layers: 4", "num_hidden_layers: 8") + "goal: {fastest: true}\n"
    "candidates: {nodes: [dgx-h100, pcie-8x-l40s], num_gpus: [8, 16]}\nframeworks: [fsdp2]\n"
    "axes: {tp: [1, 2], pp: [2, 4], vpp: [1, 2], schedule: [1f1b, interleaved, gpipe, zb-v], shard_size: [2, 16]}\n",
    "PCIe without switches": TINY + "goal: {fastest: true}\ncandidates: {nodes: [pcie-8x-4090, pcie-2x-3090], "
    "num_gpus: [1, 2, 8, 16]}\naxes: {tp: [1, 2, 4], pp: [1, 2], micro_batch_size: [1, 4], shard_size: [2, 16]}\n"
    "frameworks: [megatron, fsdp2, fsdp1, deepspeed, ddp]\n",
    "PCIe switches, NVLink pairs": TINY.replace("hidden_size: 512", "hidden_size: 1024")
    + "goal: {fastest: true}\ncandidates: {nodes: [pcie-8x-3090-switch, pcie-2x-3090-nvlink], num_gpus: [2, 4, 8]}\n"
    "axes: {tp: [1, 2], zero: [0, 1, 2, 3]}\nframeworks: [megatron, fsdp2, fsdp1, deepspeed]\n",
    "context parallelism": TINY + "goal: {fastest: true}\ncandidates: {nodes: dgx-a100-80gb, num_gpus: 8}\n"
    "axes: {tp: [1, 2], cp: [1, 2, 4], pp: [1, 2]}\n",
}


@cache
def _plan(name: str) -> tuple[Plan, tuple[Candidate, ...], Bounds]:
    plan = plan_of(PLANS[name])
    return plan, tuple(candidates(plan)), Bounds(plan)


@pytest.mark.parametrize("name", PLANS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_no_simulation_is_below_its_bound(name: str, data: st.DataObject) -> None:
    plan, every, bounds = _plan(name)
    candidate = data.draw(st.sampled_from(every))
    bound = bounds.bound(candidate)
    scenario = scenario_of(plan, candidate)
    found = trial(scenario, ".")
    assert found["step_s"] >= bound.time_s, candidate.words()
    assert found["step_s"] >= floor_s(scenario, ".") > 0, candidate.words()
    assert not found["fits"] or found["peak_device_bytes"] >= bound.memory_bytes, candidate.words()


@pytest.mark.parametrize("name", PLANS)
def test_every_candidate_is_a_scenario_that_can_be_simulated_and_no_two_are_one(name: str) -> None:
    plan, every, _ = _plan(name)
    assert len(set(every)) == len(every) > 20
    assert len({repr(scenario_of(plan, c)) for c in every}) == len(every)
    for candidate in every:
        try:
            scenario = load_scenario_mapping(scenario_of(plan, candidate), "x")
        except ScenarioError as error:
            raise AssertionError(candidate.words()) from error
        assert scenario.num_microbatches == candidate.num_microbatches
        assert scenario.parallelism.dp == candidate.dp


def _front(found: Search) -> list[tuple[Candidate, Any]]:
    return [(one.candidate, one.cost) for one in found.front]


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 0.5), goal=st.sampled_from([
    "{cheapest: true}", "{fastest: true}", "{deadline: 60 days}", "{budget: 60 kUSD}", "{value_of_time: 1 kUSD/day}",
    "{deadline: 1 h}", "{least_energy: true}",
]))  # fmt: skip
def test_the_front_and_the_winner_are_those_of_an_exhaustive_search(seed: int, spread: float, goal: str) -> None:
    """On some 2,000 candidates whose steps take their bounds and up to half as long again."""
    plan = plan_of(TWO_SITES.replace("{deadline: 90 days}", goal))
    pruned = search(plan, Pretended(plan, seed, spread))
    whole = search(plan, Pretended(plan, seed, spread), exhaustive=True)
    assert 500 < whole.num_candidates <= 2000
    assert len(whole.tried) == whole.num_candidates == len(pruned.tried) + len(pruned.discarded)
    if any(True for _ in pruned.front) and "1 h" not in goal:
        assert _front(pruned) == _front(whole)
    assert len(pruned.tried) < len(whole.tried) / 4


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31), tolerance=st.sampled_from([0.01, 0.05]))
def test_with_a_tolerance_the_front_is_missed_by_no_more(seed: int, tolerance: float) -> None:
    plan = plan_of(TWO_SITES)
    exact, rough = search(plan, Pretended(plan, seed)), search(plan, Pretended(plan, seed), tolerance=tolerance)
    assert len(rough.tried) <= len(exact.tried)
    for one in exact.front:
        assert one.cost is not None
        time_s, usd, joules, gpus = one.cost.objectives()
        allowed = (time_s * (1 + tolerance), usd * (1 + tolerance), joules * (1 + tolerance), gpus)
        assert any(
            all(mine <= theirs for mine, theirs in zip(other.cost.objectives(), allowed, strict=True))
            for other in rough.front
            if other.cost is not None
        )


def test_the_front_of_real_simulations_is_that_of_an_exhaustive_search() -> None:
    """Of sequences that keep the GPU busy: bounds leave the host out, and exclude nothing where all wait for it."""
    plan = plan_of(
        ONE_NODE, "workload.sequence_length=16384", "candidates.num_gpus=4",
        "axes.tp=[1, 2]", "axes.pp=[1, 2]", "axes.micro_batch_size=2",
        "axes.recompute=[none, full]", "frameworks=[megatron, fsdp2]",
    )  # fmt: skip
    runner = Runner(jobs=1)
    pruned = search(plan, runner)
    whole = search(plan, runner, exhaustive=True)
    assert len(whole.tried) >= 10
    assert _front(pruned) == _front(whole)
    assert pruned.discarded


@settings(max_examples=25, deadline=None)
@given(data=st.data(), factor=st.floats(1.0, 3.0))
def test_all_that_counts_grows_with_the_step(data: st.DataObject, factor: float) -> None:
    """So a bound of the step bounds time, money and energy."""
    plan = plan_of(TWO_SITES)
    candidate = data.draw(st.sampled_from(candidates(plan)))
    economics = Economics(plan)
    short, long = economics.cost(candidate, 1.0, 0.5), economics.cost(candidate, factor, 0.5)
    assert all(a <= b for a, b in zip(short.objectives(), long.objectives(), strict=True))
