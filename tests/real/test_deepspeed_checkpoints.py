"""DeepSpeed's checkpoints on two real tensor-parallel ranks keep and gather what the program of a rank does."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sim.ir.program import Alloc, Collective, Free, Program
from sim.model.transformer import describe
from sim.parallel.lower import lower
from sim.parallel.precision import dtypes_of
from sim.scenario.load import load_scenario_text

pytestmark = pytest.mark.real

OURS = {"checkpoint_in_cpu": "cpu_checkpointing", "contiguous_checkpointing": "contiguous_memory_optimization",
        "num_checkpoints": "number_checkpoints"}  # fmt: skip
"""Arguments of ``configure`` by the names that they have in a config, where these differ."""


def program_of(settings: dict[str, Any]) -> Program:
    from validation.real.deepspeed_checkpoints import BLOCKS, SEQUENCE, WIDTH

    given = {OURS.get(key, key): value for key, value in settings.items()}
    text = {
        "model": {
            "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
            "vocab_size": 256, "hidden_act": "gelu", "norm": "layernorm", "position": "rope", "bias": False,
            "tie_word_embeddings": False, "dropout": 0, "attention_dropout": 0,
        },
        "cluster": {"node": "dgx-h100", "num_gpus": 2},
        "framework": "deepspeed",
        "deepspeed": {"activation_checkpointing": given},
        "parallelism": {"tp": 2},
        "training": {
            "sequence_length": SEQUENCE, "micro_batch_size": 1, "global_batch_size": 1, "precision": "bf16",
            "recompute": "full", "code": "megatron",
        },
    }  # fmt: skip
    scenario = load_scenario_text(yaml.safe_dump(text), "a.yaml")
    dtypes = dtypes_of(scenario)
    ledger = describe(scenario.model, scenario.training, parameter_dtype=dtypes.parameter,
                      compute_dtype=dtypes.compute, autocast=dtypes.autocast)  # fmt: skip
    (program,) = lower(ledger, scenario).programs
    return program


def found(settings: dict[str, Any]) -> tuple[int, list[int]]:
    """Return the bytes of activations that are held after forward, wherever, and those gathered of checkpoints."""
    program = program_of(settings)
    held: dict[int, int] = {}
    for i in program.chunks["forward.only"]:
        if isinstance(i, Alloc) and i.storage.category == "activations":
            held[id(i.storage)] = i.storage.num_bytes
        elif isinstance(i, Free):
            held.pop(id(i.storage), None)
    backward = program.chunks["backward.only"]
    gathers = [i.tensor_bytes for i in backward if isinstance(i, Collective) and i.name == "checkpoint.gather"]
    return sum(held.values()), gathers


def test_what_stays_and_what_is_gathered() -> None:
    """The head's saved tensors are the same whatever the settings: differences are those of the checkpoints."""
    from validation.real.deepspeed_checkpoints import SETTINGS, measured

    ranks = measured()
    assert ranks[0] == ranks[1]
    whole, _ = found({})
    for name, settings in SETTINGS.items():
        held, gathers = found(settings)
        real = ranks[0][name]
        assert (name, whole - held) == (name, ranks[0]["whole"]["held"] - real["held"])
        assert (name, gathers) == (name, real["gathered"])
