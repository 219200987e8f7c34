"""What is taken over from a similar question changes nothing."""

from __future__ import annotations

import pytest

from sim.pipeline import simulate
from sim.scenario.load import load_scenario_text

TEXT = """
model: {hidden_size: 512, intermediate_size: 1024, num_hidden_layers: 4, num_attention_heads: 8, vocab_size: 1024}
cluster: {node: dgx-a100-80gb, num_nodes: 2}
framework: megatron
parallelism: {tp: 2, pp: 2}
training: {sequence_length: 256, micro_batch_size: 2, global_batch_size: 32, precision: bf16}
"""


@pytest.mark.parametrize(
    "change",
    [
        "allocator.expandable_segments=true",
        "allocator.cublas_workspace=32 MiB",
        "training.recompute=full",
        "training.micro_batch_size=1",
        "parallelism.zero=1",
        "parallelism.tp=4",
        "cluster.num_nodes=4",
    ],
)
def test_what_is_taken_over_changes_nothing(change: str) -> None:
    before = simulate(load_scenario_text(TEXT, "like.yaml"))
    scenario = load_scenario_text(TEXT, "like.yaml", (change,))
    with_it, alone = simulate(scenario, like=before), simulate(scenario)
    assert with_it.report.to_dict() == alone.report.to_dict()
    assert tuple(with_it.timeline.spans) == tuple(alone.timeline.spans)


def test_another_allocator_needs_no_other_timeline() -> None:
    before = simulate(load_scenario_text(TEXT, "like.yaml"))
    after = simulate(load_scenario_text(TEXT, "like.yaml", ("allocator.expandable_segments=true",)), like=before)
    assert after.timeline is before.timeline


def test_what_the_process_may_take_decides_how_sure_it_is_that_it_fits() -> None:
    """Of 80 GiB all, or a tenth more than the allocator reserves: both fit, the second not as surely."""
    whole = simulate(load_scenario_text(TEXT, "share.yaml")).report
    share = 1.1 * whole.fullest.peak_reserved_bytes / whole.capacity_bytes
    part = simulate(load_scenario_text(TEXT, "share.yaml", (f"allocator.memory_fraction={share:.5f}",))).report
    assert whole.fits
    assert part.fits
    assert whole.confidence is not None
    assert part.confidence is not None
    assert part.confidence.probability_fits < 0.9 < whole.confidence.probability_fits
