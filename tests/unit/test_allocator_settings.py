"""Settings of the allocator as a scenario gives them."""

from __future__ import annotations

from typing import Any

import yaml

from sim.pipeline import simulate
from sim.scenario.load import load_scenario_text
from sim.scenario.schema import Scenario

GIB = 2**30


def asked(allocator: Any) -> Scenario:
    text = {
        "model": {
            "num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8,
            "vocab_size": 32000,
        },
        "cluster": {"node": "dgx-h100", "num_gpus": 2},
        "framework": "fsdp2",
        "training": {"sequence_length": 1024, "micro_batch_size": 4, "global_batch_size": 8, "precision": "bf16"},
        "allocator": allocator,
    }  # fmt: skip
    return load_scenario_text(yaml.safe_dump(text), "allocator.yaml")


def test_a_memory_fraction_bounds_what_is_reserved() -> None:
    """set_per_process_memory_fraction: beyond it the cache is emptied, then it is out of memory."""
    free = simulate(asked({})).report.fullest
    half = asked({"memory_fraction": 0.04})
    allowed = int(0.04 * half.cluster.gpu.total_memory_bytes)
    assert free.peak_reserved_bytes > allowed
    report = simulate(half).report
    assert report.fullest.out_of_memory is not None or report.fullest.peak_reserved_bytes <= allowed
    assert report.usable_bytes == allowed


def test_garbage_collection_without_a_fraction_does_nothing_and_says_so() -> None:
    scenario = asked({"garbage_collection_threshold": 0.5})
    assert any("does nothing without allocator.memory_fraction" in words for words in scenario.warnings)
    plain = simulate(asked({})).report.fullest
    assert simulate(scenario).report.fullest.peak_reserved_bytes == plain.peak_reserved_bytes
    assert not asked({"garbage_collection_threshold": 0.5, "memory_fraction": 0.9}).warnings


def test_pytorchs_own_text_says_the_same() -> None:
    given = asked("garbage_collection_threshold:0.6,per_process_memory_fraction:0.5").allocator
    assert (given.garbage_collection_threshold, given.memory_fraction) == (0.6, 0.5)


def test_rounding_up_to_powers_of_two_holds_more() -> None:
    plain, rounded = (simulate(asked(a)).report.fullest for a in ({}, {"roundup_power2_divisions": 4}))
    assert rounded.at_peak["rounding"] > plain.at_peak["rounding"]


def test_expandable_segments_cache_less() -> None:
    plain, expandable = (simulate(asked(a)).report.fullest for a in ({}, {"expandable_segments": True}))
    assert expandable.peak_allocated_bytes <= plain.peak_allocated_bytes
    assert expandable.peak_reserved_bytes <= plain.peak_reserved_bytes
