"""The published runs: they load, say where they are from, and a few of each source are predicted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sim.validation.formulas import formula_of
from sim.validation.predict import select, validate
from sim.validation.runs import read_runs

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "validation" / "runs"
FILES = read_runs([RUNS])


def sim(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sim", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_there_are_as_many_as_were_published():
    assert len(FILES) >= 17
    assert sum(len(file.runs) for file in FILES) >= 2437


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_source_says_who_measured_and_every_row_where_it_stands(file):
    assert file.source["title"]
    assert all(run.cite for run in file.runs)


def test_ids_are_unique_over_all_files():
    ids = [run.id for file in FILES for run in file.runs]
    assert len(ids) == len(set(ids))


def test_formulas_that_sources_name_are_known():
    """What is not: a table that does not state its formula."""
    words = {run.flops_formula for file in FILES for run in file.runs if run.flops_formula}
    assert {text for text in words if formula_of(text) is None} <= {"not stated in tables.tex"}


def test_no_run_is_lost():
    files = select(FILES, "vtrain_multi_node", 4)
    found = validate(files, 1)
    answered = {row.run.id for row in found.comparisons} | {row.run.id for row in found.failed}
    assert answered == {run.id for file in files for run in file.runs}


def test_the_command_prints_data_and_writes_the_page(tmp_path):
    page = tmp_path / "RESULTS.md"
    done = sim("validate", RUNS / "finetune_memory.yaml", "--json", "--results", page)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert {"runs", "summary", "failed"} <= set(content)
    ids = {row["id"] for row in content["runs"]} | {row["id"] for row in content["failed"]}
    assert len(ids) == 4
    assert page.read_text(encoding="utf-8").startswith("# Predicted against measured\n")


def test_wrong_files_are_refused_with_2(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("runs: []\n", encoding="utf-8")
    done = sim("validate", path, tmp_path / "missing.yaml")
    assert done.returncode == 2
    assert "source is missing" in done.stderr
    assert "no such file" in done.stderr
    assert done.stdout == ""


def test_findings_of_all_compared_files_are_said_at_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("model: no-such-model\n", encoding="utf-8")
    done = sim("compare", tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert done.returncode == 2
    assert f"{tmp_path / 'a.yaml'}:1: " in done.stderr
    assert f"{tmp_path / 'b.yaml'}:1: " in done.stderr
