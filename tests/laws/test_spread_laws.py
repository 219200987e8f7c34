"""Laws of the slowest of many GPUs: more GPUs, more deviations and more passes are never faster; folding keeps it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from sim.cost.spread import expected_largest, slowest_of
from sim.pipeline import simulate
from tests.unit.test_cost_model import H100, attention, gemm, model, pointwise
from tests.unit.test_cost_spread import scenario

COUNT = st.one_of(st.integers(1, 64), st.integers(1, 1 << 20))
STAGES = st.integers(1, 64)
KERNEL = st.sampled_from([gemm(4096, 4096, 4096), gemm(64, 64, 64), attention(4096), pointwise("norm", 1 << 20)])


@given(COUNT, COUNT)
def test_more_gpus_have_a_slower_slowest(one: int, other: int) -> None:
    """The largest of m n numbers is less above that of m than that of n is above one."""
    few, many = sorted((one, other))
    assert 0.0 <= expected_largest(few) <= expected_largest(many) + 1e-9
    assert expected_largest(few * many) <= expected_largest(few) + expected_largest(many) + 1e-9


@given(STAGES, STAGES, STAGES, st.integers(1, 1 << 12), st.integers(1, 1 << 10))
def test_a_pipeline_is_between_a_stage_and_all(of_stage: int, stages: int, dp: int, passes: int, more: int) -> None:
    count = of_stage * stages * dp
    found = slowest_of(count, stages, passes, dp).deviations
    assert expected_largest(of_stage) - 1e-9 <= found <= expected_largest(count) + 1e-9
    assert found <= slowest_of(count, stages, passes + more, dp).deviations + 1e-9
    assert found <= slowest_of(count, stages, passes).deviations + 1e-9  # waiting in every microbatch is no faster


@given(KERNEL, COUNT, COUNT, st.floats(0, 0.2), st.floats(0, 0.2))
def test_kernels_are_slower_with_more_gpus_and_more_spread(kernel, one, other, less, more) -> None:
    few, many = sorted((one, other))
    little, much = sorted((less, more))
    found = [
        model(replace(H100, spread=spread), slowest=slowest_of(count)).kernel_s(kernel, 0)
        for count, spread in ((1, much), (few, little), (many, little), (many, much))
    ]
    assert found[0] == model().kernel_s(kernel, 0)
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(found))


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["ddp", "fsdp2", "deepspeed", "megatron"]),
    st.sampled_from([(2, 1, 1), (4, 1, 1), (8, 1, 1), (4, 2, 1), (4, 1, 2), (8, 2, 2)]),
    st.floats(0, 0.1),
)
def test_folded_is_unfolded_and_the_parts_add_up(framework, shape, spread) -> None:
    num_gpus, tp, pp = shape
    if framework != "megatron":
        tp = pp = 1
    asked = scenario(num_gpus, framework, {"spread": spread}, tp=tp, pp=pp)
    folded, unfolded = simulate(asked), simulate(asked, fold=False)
    assert folded.report.time_ticks == unfolded.report.time_ticks
    assert sum(folded.report.step_ticks.values()) == folded.report.time_ticks
