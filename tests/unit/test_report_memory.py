"""The views of a recorded footprint add up to what the report says."""

from __future__ import annotations

import yaml

from sim.pipeline import Simulation, simulate
from sim.report.memory import VIEWS, memory_views
from sim.scenario.load import load_scenario_text


def recorded() -> Simulation:
    text = {
        "model": {
            "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
            "vocab_size": 512,
        },
        "cluster": {"node": "dgx-h100", "num_gpus": 2},
        "framework": "fsdp2",
        "training": {
            "sequence_length": 128, "micro_batch_size": 1, "global_batch_size": 2, "precision": "bf16",
            "recompute": "full",
        },
    }  # fmt: skip
    return simulate(load_scenario_text(yaml.safe_dump(text), "views.yaml"), record=True)


def test_modules_and_kinds_add_up_to_the_account_at_the_peak() -> None:
    footprint = recorded().footprints[0]
    views = memory_views(footprint)
    requested = footprint.peak_allocated_bytes - footprint.at_peak["rounding"]
    assert sum(m["at_peak_bytes"] for m in views["by_module"]) == requested
    assert {k["kind"]: k["at_peak_bytes"] for k in views["by_kind"]} == {
        name: size for name, size in footprint.at_peak.items() if name != "rounding"
    }


def test_the_peak_is_the_highest_of_its_steps_phases() -> None:
    footprint = recorded().footprints[0]
    phases = [p for p in memory_views(footprint)["by_phase"] if p["step"] == footprint.peak_step]
    highest = max(phases, key=lambda p: p["peak_bytes"])
    assert highest["phase"] == footprint.peak_phase
    assert highest["peak_bytes"] == sum(highest["by_kind"].values())
    assert highest["peak_bytes"] == footprint.peak_allocated_bytes - footprint.at_peak["rounding"]


def test_full_recompute_leaves_each_block_its_input() -> None:
    """16 bit, 128 tokens of 256: 64 KiB a block after forward; the last block's output is the head's."""
    modules = {m["module"]: m for m in memory_views(recorded().footprints[0])["by_module"]}
    assert modules["block.0"]["after_forward_bytes"] == 2 * 128 * 256
    assert modules["block.0"]["most_bytes"] >= modules["block.0"]["after_forward_bytes"]


def test_every_view_has_a_name() -> None:
    assert {view.replace("-", "_") for view in VIEWS} == set(memory_views(recorded().footprints[0]))
