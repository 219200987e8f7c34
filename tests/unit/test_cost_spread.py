"""The slowest of GPUs that wait for each other: order statistics, the measured deviations, and a step."""

from __future__ import annotations

from dataclasses import replace
from math import pi, sqrt
from random import Random
from statistics import fmean
from typing import Any

import pytest

from sim.cost import efficiency
from sim.cost.spread import ALONE, Slowest, expected_largest, largest_of, slowest_of, spread_of
from sim.pipeline import simulate
from sim.report.explain import explanation
from sim.scenario.document import Document
from sim.scenario.load import load_scenario_mapping
from tests.unit.test_cost_model import H100, attention, gemm, model, pointwise


def scenario(num_gpus: int, framework: str = "ddp", gpu: Any = None, **parallelism: int) -> Any:
    return load_scenario_mapping(
        {
            "model": "gpt2",
            "cluster": {"node": "dgx-h100", "num_gpus": num_gpus, **({"gpu": gpu} if gpu else {})},
            "framework": framework,
            "parallelism": parallelism,
            "training": {"sequence_length": 1024, "micro_batch_size": 8, "global_batch_size": 64, "precision": "bf16"},
        },
        "test",
    )


def test_the_largest_of_few_has_closed_forms() -> None:
    """Of two 1 / sqrt(pi), of three 3 / (2 sqrt(pi)); 8 and 100 as in tables (Teichroew, Ann. Math. Stat. 27, 1956)."""
    assert expected_largest(1) == 0.0
    assert expected_largest(2) == pytest.approx(1 / sqrt(pi), abs=1e-9)
    assert expected_largest(3) == pytest.approx(1.5 / sqrt(pi), abs=1e-9)
    assert expected_largest(8) == pytest.approx(1.42360, abs=1e-5)
    assert largest_of(2)[1] == pytest.approx(sqrt(1 - 1 / pi), abs=1e-9)
    assert expected_largest(100) == pytest.approx(2.50759, abs=1e-5)


def test_the_deviations_are_those_of_the_quartiles() -> None:
    """Three quarters of a normal distribution are below 0.6745 deviations: 2 * 0.6745 between the quartiles."""
    for fact in efficiency.read("spread.yaml").values():
        low, middle, high = fact["quartiles"]
        assert fact["value"] == pytest.approx((high - low) / (2 * 0.6745) / middle, rel=0.02)


def test_a_pipeline_waits_for_its_slowest_stage_and_goes_once_through_each() -> None:
    """16 GPUs, 4 stages, 8 passes: 7 turns at the pace of the slowest of 16, 4 at that of the slowest of 4."""
    expected = (7 * expected_largest(16) + 4 * expected_largest(4)) / 11
    assert slowest_of(16, 4, 8) == Slowest(16, pytest.approx(expected))
    assert slowest_of(4, 4, 1).deviations == 0.0  # one microbatch visits each stage once: an average of GPUs
    assert slowest_of(1) == ALONE


@pytest.mark.parametrize(("ranks", "stages", "pipelines", "passes"), [(8, 8, 1, 8), (1, 4, 4, 4), (2, 4, 8, 16)])
def test_drawn_clusters_have_that_pace(ranks: int, stages: int, pipelines: int, passes: int) -> None:
    """Of 1,500 clusters, the mean of the slowest pipeline's turns; its standard error is 0.02 at most."""
    draw = Random(0)
    turns = []
    for _ in range(1500):
        stages_of = [[max(draw.gauss(0, 1) for _ in range(ranks)) for _ in range(stages)] for _ in range(pipelines)]
        turns.append(max(((passes - 1) * max(own) + sum(own)) / (passes + stages - 1) for own in stages_of))
    found = slowest_of(ranks * stages * pipelines, stages, passes, pipelines).deviations
    assert fmean(turns) - 0.06 < found < fmean(turns) + (0.16 if pipelines > 1 else 0.06)


def test_matmuls_and_attention_have_the_pace_of_the_slowest_and_memory_hardly() -> None:
    alone, many = model(), model(slowest=slowest_of(64))
    largest = expected_largest(64)
    for kernel, sigma in (
        (gemm(4096, 4096, 4096), 0.0172),
        (attention(4096), 0.0172),
        (pointwise("norm", 1 << 24), 0.001),
    ):
        assert many.kernel_s(kernel, 0) == pytest.approx(alone.kernel_s(kernel, 0) * (1 + sigma * largest))
        assert many.beside_s(kernel, 0, 16, 1e11) == pytest.approx(
            alone.beside_s(kernel, 0, 16, 1e11) * (1 + sigma * largest)
        )
    assert any("64 GPUs wait for the slowest" in text for text in many.assumptions())
    assert not any("slowest" in text for text in alone.assumptions())


def test_a_slow_rank_is_slow_beyond_the_slowest_of_the_others() -> None:
    cost, kernel = model(slowest=slowest_of(8), slow={3: 1.5}), gemm(1024, 1024, 1024)
    assert cost.kernel_s(kernel, 3) == 1.5 * cost.kernel_s(kernel, 0) > 1.5 * model().kernel_s(kernel, 0)


def test_a_scenario_may_say_otherwise() -> None:
    """Memory-bound kernels differ in proportion: 0.0010 where matmuls differ by 0.0172."""
    assert spread_of(replace(H100, spread=0.0)).matmul == 0.0
    half = spread_of(replace(H100, spread=0.0086))
    assert (half.matmul, half.memory) == (0.0086, pytest.approx(0.0005))
    alike, usual = simulate(scenario(8, gpu={"spread": 0})), simulate(scenario(8))
    assert not any("slowest" in words for words in alike.report.warnings)
    assert 1.0 < usual.report.time_s / alike.report.time_s < 1 + 0.0172 * expected_largest(8)
    own = next(
        family
        for family in explanation(usual.scenario, Document("", {}, {}, {}))["cost"]
        if family["family"] == "spread"
    )
    assert [fit["value"] for fit in own["fits"]] == [0.0172, 0.001]


def test_one_gpu_waits_for_nobody() -> None:
    alone = simulate(scenario(1))
    assert alone.report.time_ticks == simulate(scenario(1, gpu={"spread": 0.1})).report.time_ticks
