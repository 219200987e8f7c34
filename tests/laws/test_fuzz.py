"""Whatever the file says, the answer is an answer, a list of findings, or "does not fit"; never a traceback.

Scenarios are drawn valid, then mutated: keys dropped, renamed, added, values replaced by what people and programs write
by mistake; some are mutated as text. The quick form runs in the usual tests, the thorough one (10,000) by
``tests/run real``.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import yaml

from sim.errors import ScenarioError
from sim.pipeline import simulate
from sim.scenario.load import load_scenario_text

WRONG: tuple[Any, ...] = (
    None, True, False, "", "yes", "auto", "none", "80", "80 GB", "400 Gbps", "1e12", "0x10", "é", "..", "/", [], {},
    [1], {"a": 1}, -1, 0, 1, 2, 3, 7, 8, 64, 10**6, 10**12, 0.5, -0.5, 1e300, float("inf"), float("nan"), "2024-01-01",
    "fp16", "bf16", "full", "dgx-h100", "llama-2-7b", "deepspeed", "ddp", "flash-2", "math",
)  # fmt: skip
KEYS = (
    "model", "cluster", "framework", "parallelism", "training", "deepspeed", "allocator", "ddp", "node", "num_nodes",
    "num_gpus", "gpu", "network", "zero", "dp", "tp", "pp", "micro_batch_size", "precision", "optimizer", "zz", "Model",
    "hidden_size", "num_hidden_layers", "zero_optimization", "stage", "bf16", "fp16", "reduce_bucket_size", "enabled",
)  # fmt: skip


def valid(draw: random.Random) -> dict[str, Any]:
    """A small scenario that should be answered."""
    num_gpus = draw.choice([1, 2, 4, 8])
    micro = draw.choice([1, 2, 3])
    framework = draw.choice(["ddp", "deepspeed"])
    scenario: dict[str, Any] = {
        "model": {
            "hidden_size": draw.choice([64, 128]),
            "intermediate_size": draw.choice([128, 344]),
            "num_hidden_layers": draw.choice([1, 2]),
            "num_attention_heads": draw.choice([2, 4]),
            "num_key_value_heads": draw.choice([1, 2]),
            "vocab_size": draw.choice([100, 1000]),
            "hidden_act": draw.choice(["silu", "gelu"]),
            "norm": draw.choice(["rmsnorm", "layernorm"]),
            "position": draw.choice(["rope", "learned", "alibi", "none"]),
            "max_position_embeddings": 512,
            "bias": draw.choice([True, False]),
            "dropout": draw.choice([0, 0.1]),
            "tie_word_embeddings": draw.choice([True, False]),
        },
        "cluster": {"node": draw.choice(["dgx-h100", "dgx-1", "pcie-8x-4090", "dgx-a100-40gb"]), "num_gpus": num_gpus},
        "framework": framework,
        "training": {
            "sequence_length": draw.choice([16, 100]),
            "micro_batch_size": micro,
            "global_batch_size": micro * num_gpus * draw.choice([1, 2, 3]),
            "precision": draw.choice(["bf16", "fp16", "fp32"]),
            "recompute": draw.choice(["none", "selective", "full"]),
            "attention": draw.choice(["math", "sdpa", "flash-2"]),
            "optimizer": draw.choice(["adamw", "adam", "sgd"]),
        },
    }
    if framework == "deepspeed":
        scenario["deepspeed"] = {"zero_optimization": {"stage": draw.choice([0, 1, 2, 3]), "reduce_bucket_size": 5000}}
    return scenario


def mutate(value: Any, draw: random.Random) -> Any:
    """Change one thing somewhere inside."""
    if isinstance(value, dict) and value:
        key = draw.choice(sorted(value, key=str))
        match draw.randrange(6):
            case 0:
                del value[key]
            case 1:
                value[draw.choice(KEYS)] = draw.choice(WRONG)
            case 2:
                value[f"{key}s"] = value.pop(key)
            case 3:
                value[key] = draw.choice(WRONG)
            case _:
                value[key] = mutate(value[key], draw)
        return value
    return draw.choice(WRONG)


def mutate_text(text: str, draw: random.Random) -> str:
    place = draw.randrange(len(text))
    noise = draw.choice(
        ["\n", "  ", "\t", ":", "{", "}", "- ", "&a ", "*a", "!x ", "#", "'", '"', "\x00", "%", "|", "<<: ", "\u2028"]
    )
    return text[:place] + noise + text[place + draw.choice([0, 0, 1, 5]) :]


def outcome(text: str) -> str:
    try:
        scenario = load_scenario_text(text, "fuzz.yaml")
    except ScenarioError as error:
        assert error.findings
        assert all(str(finding).strip() for finding in error.findings)
        return "findings"
    report = simulate(scenario).report
    return "fits" if report.fits else "does not fit"


def fuzz(seed: int, count: int) -> dict[str, int]:
    draw = random.Random(seed)
    seen: dict[str, int] = {}
    for _ in range(count):
        scenario: Any = valid(draw)
        for _ in range(draw.choice([0, 1, 1, 2, 4])):
            scenario = mutate(scenario, draw)
            if not isinstance(scenario, dict):
                break
        text = yaml.safe_dump(scenario, allow_unicode=True)
        if draw.random() < 0.2:
            text = mutate_text(text, draw)
        try:
            found = outcome(text)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\nfor the scenario\n{text}") from error
        seen[found] = seen.get(found, 0) + 1
    return seen


def test_two_hundred_mutated_scenarios():
    seen = fuzz(seed=1, count=200)
    assert set(seen) <= {"findings", "fits", "does not fit"}
    assert seen["findings"] > 20
    assert seen["fits"] > 20


@pytest.mark.real
def test_ten_thousand_mutated_scenarios():
    seen = fuzz(seed=2, count=10_000)
    assert sum(seen.values()) == 10_000
    assert min(seen["findings"], seen["fits"]) > 1000
