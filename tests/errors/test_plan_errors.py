"""Every message about a wrong plan, word for word: ``plans/NAME.yaml`` beside its ``NAME.txt``.

``pytest tests/errors --update`` writes what is said today; read the difference as a user would.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.errors import ScenarioError
from sim.planner.load import load_plan, load_plan_text

HERE = Path(__file__).parent / "plans"
CASES = sorted(path.stem for path in HERE.glob("*.yaml"))


@pytest.mark.parametrize("name", CASES)
def test_message(name: str, update: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    with pytest.raises(ScenarioError) as caught:
        load_plan(f"{name}.yaml")
    message = str(caught.value) + "\n"
    golden = Path(f"{name}.txt")
    if update:
        golden.write_text(message)
    assert message == golden.read_text()
    for finding in caught.value.findings:
        assert finding.remedy, f"{finding} says nothing to do"
        assert "\n" not in finding.problem + finding.remedy


def test_what_is_laid_over_a_plan_is_held_to_the_same_rules() -> None:
    text = "model: llama-3-8b\nworkload: {tokens: 1e12, sequence_length: 8192}\ncandidates: {nodes: dgx-h100}\n"
    with pytest.raises(ScenarioError) as caught:
        load_plan_text(text, "x.yaml", ["goal.deadline=soon"])
    problem, remedy = str(caught.value).split("\n")
    assert problem == "--set: goal.deadline: 'soon' is not a duration"
    assert remedy == "    write '3 us', '12 h' or '90 days'"
