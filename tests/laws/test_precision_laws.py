"""Laws of low precision and of compiled blocks: folded equals whole; fewer bits are fewer bytes kept."""

from __future__ import annotations

from typing import Any

import pytest

from sim.pipeline import Simulation, simulate
from sim.scenario.load import load_scenario_mapping

MODEL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 1024, "hidden_act": "silu", "norm": "rmsnorm", "position": "rope",
}  # fmt: skip
MEGATRON = {"tp": 2, "pp": 2, "dp": 2, "sp": True, "zero": 1}
RING = {"tp": 2, "cp": 2, "dp": 2, "sp": True, "zero": 1}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "delayed": ("dgx-h100", "megatron", MEGATRON, {"precision": "fp8"}, {}),
    "blockwise": ("dgx-h100", "megatron", RING, {"precision": "fp8"}, {"fp8_recipe": "blockwise"}),
    "mxfp8": ("dgx-b200", "megatron", RING, {"precision": "mxfp8", "recompute": "full"}, {}),
    "nvfp4": ("dgx-b200", "megatron", MEGATRON, {"precision": "nvfp4"}, {"first_last_layers_bf16": True}),
    "compiled": ("dgx-h100", "fsdp2", {"tp": 2, "dp": 4, "sp": True, "zero": 3}, {"compile": True}, {}),
    "torchao": (
        "dgx-h100", "fsdp2", {"pp": 2, "dp": 4, "zero": 3},
        {"precision": "fp8", "compile": True, "recompute": "selective-op"}, {"float8_all_gather": True},
    ),
}  # fmt: skip


def simulated(
    node: str, framework: str, parallelism: dict[str, Any], training: dict[str, Any], settings: dict[str, Any],
    *, fold: bool = True,
) -> Simulation:  # fmt: skip
    scenario = {
        "model": MODEL, "cluster": {"node": node, "num_gpus": 8}, "framework": framework, "parallelism": parallelism,
        "training": {"sequence_length": 512, "micro_batch_size": 1, "global_batch_size": 16, **training},
        **({framework: settings} if settings else {}),
    }  # fmt: skip
    return simulate(load_scenario_mapping(scenario, "case"), fold=fold)


@pytest.mark.parametrize("name", CASES)
def test_folded_equals_whole(name: str) -> None:
    folded, whole = simulated(*CASES[name]), simulated(*CASES[name], fold=False)
    assert folded.timeline.end == whole.timeline.end
    peaks = {rank: f.peak_allocated_bytes for f in folded.footprints for rank in f.ranks}
    assert peaks == {rank: f.peak_allocated_bytes for f in whole.footprints for rank in f.ranks}


@pytest.mark.parametrize(("precision", "fewer"), [("fp8", "bf16"), ("nvfp4", "mxfp8")])
def test_fewer_bits_are_fewer_bytes_of_activations(precision: str, fewer: str) -> None:
    """Of what autograd keeps, that is: the copies of weights that come with it are buffers."""
    kept = [
        max(f.at_peak["activations"] for f in simulated("dgx-b200", "megatron", RING, {"precision": p}, {}).footprints)
        for p in (precision, fewer)
    ]
    assert kept[0] < kept[1]
