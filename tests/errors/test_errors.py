"""Every message, word for word: a wrong ``NAME.yaml`` (with ``NAME.args``, one --set a line) beside its ``NAME.txt``.

``pytest tests/errors --update`` writes what is said today; read the difference as a user would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sim.errors import ScenarioError
from sim.interop.values import Problem
from sim.scenario.checks import RULES, Rule, run_rules
from sim.scenario.draft import Draft
from sim.scenario.load import load_scenario

HERE = Path(__file__).parent
CASES = sorted(path.stem for path in HERE.glob("*.yaml"))


def said(path: str | Path, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(path, overrides)
    return str(caught.value) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_message(name: str, update: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    args = Path(f"{name}.args")
    message = said(f"{name}.yaml", args.read_text().splitlines() if args.exists() else ())
    golden = Path(f"{name}.txt")
    if update:
        golden.write_text(message)
    assert message == golden.read_text()


@pytest.mark.parametrize("name", CASES)
def test_every_finding_names_its_file_and_a_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    args = Path(f"{name}.args")
    with pytest.raises(ScenarioError) as caught:
        load_scenario(f"{name}.yaml", args.read_text().splitlines() if args.exists() else ())
    for finding in caught.value.findings:
        assert finding.file == "--set" or Path(finding.file).suffix in (".yaml", ".json", "")
        assert finding.remedy, f"{finding} says nothing to do"
        assert "\n" not in finding.problem + finding.remedy


def test_every_rule_has_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    broken: set[str] = set()

    def noted(rule: Rule) -> Rule:
        def rule_and_note(draft: Draft) -> Iterator[Problem]:
            for problem in rule(draft):
                broken.add(rule.__name__)
                yield problem

        return rule_and_note

    monkeypatch.setattr(run_rules, "__defaults__", (tuple(map(noted, RULES)),))
    for name in CASES:
        args = Path(f"{name}.args")
        with pytest.raises(ScenarioError):
            load_scenario(f"{name}.yaml", args.read_text().splitlines() if args.exists() else ())
    assert {rule.__name__ for rule in RULES} - broken == set()


def test_there_are_at_least_sixty() -> None:
    assert len(CASES) >= 60


def test_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scenarios").mkdir()
    assert said("scenarios") == "scenarios: is a directory\n    name the file that holds a scenario\n"


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("70b_zero3.yaml").write_text("model: llama-2-70b\n")
    assert said("70b_zero.yaml") == "70b_zero.yaml: no such file\n    did you mean 70b_zero3.yaml?\n"


def test_fifty_megabytes_are_refused_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("large.yaml").open("wb") as file:
        file.truncate(50_000_000)  # a hole: reading it would give 50 MB of zeros
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    assert said("large.yaml") == (
        "large.yaml: is 50.0 MB large; sim reads at most 1 MB\n    name the file that holds a scenario\n"
    )


def test_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.yaml").write_bytes("model: llama-2-7b\nname: Zürich\n".encode("latin-1"))
    assert said("latin.yaml") == "latin.yaml:2: byte 0xfc is not UTF-8\n    save the file as UTF-8 text\n"


def test_a_control_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nul.yaml").write_bytes(b"model: llama-2-7b\nname: a\x00b\n")
    assert said("nul.yaml") == "nul.yaml:2: is not YAML: it holds a control character\n    save it as plain text\n"


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("secret.yaml").write_text("model: llama-2-7b\n")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert said("secret.yaml") == "secret.yaml: may not be read\n    allow it: chmod u+r secret.yaml\n"


def test_a_hundred_thousand_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("deep.yaml").write_text("model: " + "[" * 100_000)
    assert said("deep.yaml") == "deep.yaml:1: is nested more than 16 deep\n    a scenario needs four levels\n"


def test_a_name_with_a_nul(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "cannot be read" in said("a\0b.yaml")
