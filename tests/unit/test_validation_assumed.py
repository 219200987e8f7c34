"""What ``assumed`` of a measured run changes in its scenario, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sim.validation.assumed import read_assumed
from sim.validation.predict import validate
from sim.validation.runs import read_runs

SCENARIO = {"framework": "megatron", "training": {"attention": "flash-2", "recompute": "none", "precision": "bf16"}}


def test_a_guess_is_left_out() -> None:
    read, changes = read_assumed(SCENARIO, ["attention flash-2", "no recompute", "vocabulary 50,304"])
    assert read["training"] == {"recompute": "none", "precision": "bf16"}
    assert changes == ((("training", "attention"), None),)
    assert SCENARIO["training"]["attention"] == "flash-2", "what was given is not touched"


def test_a_guess_of_something_else_is_not_this_one() -> None:
    assert read_assumed(SCENARIO, ["attention math", "full recompute", "attention of its time: math"])[1] == ()


@pytest.mark.parametrize(
    ("framework", "words", "section", "key", "value"),
    [
        ("megatron", "overlap: TP overlap", "megatron", "tp_comm_overlap", True),
        ("fsdp2", "overlap: async TP", "fsdp2", "async_tensor_parallel", True),
        (
            "megatron",
            "overlap: none (overlap off by contract); cross-entropy fusion (cef)",
            "training",
            "loss",
            "fused",
        ),
        ("megatron", "overlap: none; cross-entropy fusion (cef); cp a2a", "parallelism", "cp_comm", "a2a"),
        ("ddp", "compile: torch.compile", "training", "compile", True),
        ("megatron", "compile: CUDA graphs", "megatron", "cuda_graph_impl", "local"),
    ],
)
def test_what_the_run_did_is_set(framework: str, words: str, section: str, key: str, value: object) -> None:
    divided = {"framework": framework, "parallelism": {"tp": 2, "sp": True}, "training": {"compile": True}}
    scenario = {"framework": framework} if section in ("training", "parallelism") else divided
    assert read_assumed(scenario, [words])[0][section][key] == value


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ({"framework": "megatron", "training": {"recompute": "full"}}, "compile: CUDA graphs"),
        ({"framework": "megatron", "parallelism": {"tp": 2}}, "overlap: TP overlap"),
        ({"framework": "fsdp2", "parallelism": {"tp": 2, "sp": True}}, "overlap: async TP"),
    ],
)
def test_what_would_be_refused_is_not_set(scenario: dict[str, Any], words: str) -> None:
    """Blocks that run again are in no graph; exchanges in pieces need sequence parallelism, DTensor's a compiler."""
    assert read_assumed(scenario, [words]) == (scenario, ())


def test_what_the_scenario_says_itself_stands() -> None:
    said = {"framework": "megatron", "megatron": {"tp_comm_overlap": False}}
    assert read_assumed(said, ["overlap: TP overlap"]) == (said, ())
    other = {"framework": "fsdp2"}
    assert read_assumed(other, ["overlap: TP overlap"]) == (other, ()), "a key of another framework"


def test_validate_says_what_it_left_to_the_default(tmp_path: Path) -> None:
    scenario = {
        "model": "gpt2",
        "cluster": {"node": "dgx-a100-80gb", "num_gpus": 8},
        "framework": "deepspeed",
        "training": {"sequence_length": 512, "micro_batch_size": 1, "attention": "flash-2"},
    }
    row = {"id": "a", "scenario": scenario, "measured": {"step_time_s": 1.0}, "assumed": ["attention flash-2"]}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"source": {"title": "mine"}, "runs": [row, row | {"id": "b", "assumed": []}]}))
    told = validate(read_runs([file]), jobs=1)
    assert told.assumptions[0] == "mine: training.attention of 1 runs: a guess, left to sim's default"
    guessed, given = (row.predicted for row in told.comparisons)
    assert guessed != given, "Megatron-DeepSpeed's default is its fused softmax, not FlashAttention"
