"""The house stands: what may be imported, what is public, what the README promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCENARIOS = sorted((ROOT / "scenarios").glob("*.yaml"))


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_sim_loads_nothing_else():
    heavy = "numpy pydantic yaml simpy networkx matplotlib typer rich torch deepspeed"
    out = python(f"import sys, sim; print([m for m in {heavy.split()!r} if m in sys.modules])")
    assert out.strip() == "[]"


def test_a_run_needs_neither_torch_nor_deepspeed_nor_anything_to_draw_with():
    code = """
import sys
for name in ("torch", "deepspeed", "matplotlib", "numpy", "networkx"):
    sys.modules[name] = None  # importing it fails
from sim import load_scenario, simulate
print(simulate(load_scenario("scenarios/70b_zero3.yaml")).report.fits)
"""
    assert python(code).strip() in ("True", "False")


def test_every_public_name_is_where_it_is_said_to_be():
    out = python("import sim; print([getattr(sim, name).__name__ for name in sim.__all__])")
    assert out.strip() == str(
        ["Report", "Scenario", "ScenarioError", "SimError", "Simulation", "load_scenario", "simulate"]
    )


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^pip install .*tests/run$", readme, flags=re.MULTILINE)
    assert len(commands) == 1, "README.md has one command that installs and passes the tests"
    assert commands[0] in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_the_library_of_scenarios_is_large_enough():
    assert len(SCENARIOS) >= 12


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_a_scenario_opens_with_the_question_it_answers_and_what_to_look_at(path):
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and "?" in first
    assert second.startswith("# Look at: ")


def test_only_plots_draw():
    importers = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "sim").rglob("*.py"))
        if re.search(r"^\s*(import|from) matplotlib", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    assert importers == ["sim/report/plots.py"]


def test_only_the_command_line_prints_and_exits():
    offenders = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "sim").rglob("*.py"))
        if re.search(r"(?<![\w.])print\(|sys\.exit\(", path.read_text(encoding="utf-8"))
    ]
    assert offenders == ["sim/cli.py"]
