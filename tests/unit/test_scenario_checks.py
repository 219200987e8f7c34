"""Rules: silent where a scenario is sound, and their remedies work when they are followed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.errors import Finding, ScenarioError
from sim.scenario.checks import RULES, divisors, multiples, nearest, run_rules
from sim.scenario.draft import Draft
from sim.scenario.load import load_scenario, load_scenario_text
from sim.scenario.supported import NOT_YET

ERRORS = Path(__file__).parent.parent / "errors"
SOUND = """\
model: {hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 24, num_attention_heads: 16,
        num_key_value_heads: 8, vocab_size: 32000}
cluster: {node: dgx-h100, num_nodes: 4}
framework: megatron
parallelism: {tp: 4, pp: 4, vpp: 2, sp: true}
training: {sequence_length: 2048, micro_batch_size: 1, global_batch_size: 16}
"""


def findings(text: str, *overrides: str) -> tuple[Finding, ...]:
    try:
        load_scenario_text(text, "f.yaml", overrides, simulate=False)
    except ScenarioError as error:
        return error.findings
    return ()


def test_a_sound_scenario_breaks_no_rule() -> None:
    assert findings(SOUND) == ()


def test_a_rule_that_lacks_a_value_is_skipped() -> None:
    assert list(run_rules(Draft())) == []


def test_every_rule_says_what_it_is_for() -> None:
    assert len(set(RULES)) == len(RULES)
    for rule in RULES:
        assert rule.__doc__, rule.__name__
    assert not set(RULES) & set(NOT_YET)


_KEY = re.compile(r"(?:^|; or |, or )write ([a-z_.]+): ([\d.]+ [KMGT]?i?B/s|[^\s,;]+)")
_NO_RULE = (  # mistakes of other kinds than a relation of fields
    "unit_", "unknown_", "set_", "ds_", "number_", "gpu_", "model_", "not_yet_", "section_",
)  # fmt: skip


def _dotted(key: str, problem: str) -> str:
    """Return the full path of the key that a remedy names by its last word."""
    if "." in key:
        return key
    section = re.search(rf"\b(model|cluster|parallelism|training|megatron|fsdp2)\.{key}\b", problem)
    if section:
        return f"{section[1]}.{key}"
    for name, keys in {
        "parallelism": ("dp", "tp", "pp", "cp", "ep", "zero", "vpp", "schedule", "cp_comm"),
        "training": (
            "attention",
            "precision",
            "global_batch_size",
            "sequence_length",
            "loss",
            "recompute",
            "optimizer",
        ),
        "model": ("num_attention_heads", "head_dim", "num_key_value_heads", "num_experts_per_tok"),
        "cluster": ("num_gpus", "num_nodes", "backend", "beta"),
    }.items():
        if key in keys:
            return f"{name}.{key}"
    return key


CASES = sorted(path.stem for path in ERRORS.glob("*.yaml") if not path.stem.startswith(_NO_RULE))


@pytest.mark.parametrize("name", CASES)
def test_a_remedy_works_when_it_is_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ERRORS)
    with pytest.raises(ScenarioError) as caught:
        load_scenario(f"{name}.yaml", simulate=False)
    for finding in caught.value.findings:
        found = _KEY.search(finding.remedy)
        if found is None:
            continue
        override = f"{_dotted(found[1], finding.problem)}={found[2]}"
        try:
            load_scenario(f"{name}.yaml", [override], simulate=False)
        except ScenarioError as error:
            assert finding.problem not in {f.problem for f in error.findings}, (finding.problem, override)


@given(st.integers(1, 5000))
def test_divisors_are_all_that_divide(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@given(st.integers(1, 100), st.integers(0, 1000))
def test_multiples_stand_on_both_sides(of: int, around: int) -> None:
    found = multiples(of, around)
    assert found
    assert all(m > 0 and m % of == 0 and abs(m - around) <= of for m in found)


def test_nearest_takes_one_from_each_side() -> None:
    assert nearest([1, 2, 4, 8], 3) == [2, 4]
    assert nearest([1, 2], 5) == [2]
    assert nearest([8], 5) == [8]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("parallelism.tp=16", ""),  # two GPUs of each kv head's rank: a multiple is fine
        ("parallelism.pp=3", "parallelism needs a multiple of"),
        ("training.sequence_length=2049", "does not divide over tp 4 with sp"),
        ("model.num_key_value_heads=3", "does not divide model.num_attention_heads"),
        ("framework=deepspeed", "schedule interleaved is not DeepSpeed's"),
        ("framework=fsdp1", "data parallelism alone"),
        ("parallelism.ep=2", "the model has no experts"),
    ],
)
def test_one_change_breaks_one_rule(override: str, problem: str) -> None:
    overrides = [override] if not override.startswith("parallelism.tp=16") else [override, "parallelism.pp=2"]
    found = findings(SOUND, *overrides)
    if problem:
        assert any(problem in finding.problem for finding in found)
    else:
        assert found == ()
