"""Files of measured runs: what is read, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.errors import ScenarioError
from sim.scenario.load import scenario_json_schema
from sim.validation.runs import QUANTITIES, read_runs, runs_schema

GOOD = """
source: {title: A table, url: https://example.org}
runs:
- id: first
  cite: line 3
  scenario: {model: llama-2-7b}
  measured: {fits: true, step_time_s: 2, peak_allocated_bytes: 7e10, memory_note: decimal}
  assumed: [flash attention, 5]
- id: second
  scenario: {model: llama-2-7b}
  measured: {mfu: 0.5}
"""


def write(folder: Path, text: str, name: str = "runs.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def said(*paths: Path) -> str:
    with pytest.raises(ScenarioError) as caught:
        read_runs(paths)
    return str(caught.value)


def test_a_row_keeps_what_it_says_and_where_it_stands(tmp_path):
    (file,) = read_runs([write(tmp_path, GOOD)])
    first, second = file.runs
    assert (file.name, file.source["title"]) == ("runs", "A table")
    assert (first.id, first.line, first.cite, first.assumed) == ("first", 4, "line 3", ("flash attention", "5"))
    assert first.measured == {"step_time_s": 2.0, "peak_allocated_bytes": 7e10, "fits": True}
    assert list(first.measured) == sorted(first.measured, key=QUANTITIES.index)
    assert second.measured == {"mfu": 0.5}


def test_a_directory_is_every_yaml_file_below_it_by_name_and_each_once(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path, GOOD, "b.yaml")
    write(tmp_path / "below", GOOD, "c.yml")
    one = write(tmp_path, GOOD, "a.yaml")
    write(tmp_path, "no runs", "notes.txt")
    assert [file.name for file in read_runs([one, tmp_path])] == ["a", "b", "c"]


def test_everything_wrong_is_said_at_once_with_its_line(tmp_path):
    wrong = GOOD.replace("fits: true", "fits: perhaps").replace("mfu: 0.5", "mfu: 0").replace("id: second", "id: first")
    said_of = said(write(tmp_path, wrong), write(tmp_path, "runs: 3", "other.yaml"), tmp_path / "missing.yaml")
    for words in (
        "runs.yaml:7: run first: measured.fits: 'perhaps' is neither true nor false",
        "runs.yaml:9: run first: another run has this id, in line 4",
        "runs.yaml:11: run first: measured.mfu: 0 is no measurement",
        "other.yaml:1: runs: 3 is not a list",
        "other.yaml:1: source is missing",
        "missing.yaml: no such file",
    ):
        assert words in said_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("source: {}\nruns: [3]", "run 1 is 3"),
        ("source: {}\nruns: [{id: a, scenario: {}, measured: {}}]", "run a: nothing is measured"),
        ("source: {}\nruns: [{id: a, scenario: {}, measured: {memory_note: x}}]", "run a: nothing is measured"),
        ("source: {}\nruns: [{id: a, scenario: 3, measured: {mfu: 1}}]", "run a: scenario: 3 is not a mapping"),
        ("source: {}\nruns: [{id: a, measured: {mfu: 1}}]", "run a: scenario is missing"),
        ("source: {}\nruns: [{id: a, scenario: {}, measured: {mfu: 57}}]", "run a: measured.mfu: 57 is out of range"),
        ("source: {}\nruns: [{id: a, scenario: {}, measured: {mfus: 1}}]", "unknown key measured.mfus"),
        ("source: {}\nruns: [{id: a, scenario: {}, measured: {mfu: .inf}}]", "'.inf' is not a number"),
        ("[1]", "holds a list; a file of measured runs is a mapping"),
        ("", "is empty"),
    ],
)
def test_what_is_said_of_wrong_files(tmp_path, text, words):
    assert words in said(write(tmp_path, text))


def test_an_empty_directory_is_no_answer(tmp_path):
    assert "holds no YAML file" in said(tmp_path)


def test_the_schema_names_every_quantity_and_holds_the_scenario_once():
    schema = runs_schema(scenario_json_schema())
    run = schema["properties"]["runs"]["items"]
    assert set(QUANTITIES) <= set(run["properties"]["measured"]["properties"])
    assert run["properties"]["scenario"]["$ref"] == "#/$defs/scenario"
    assert "model" in schema["$defs"]["scenario"]["properties"]
