"""`sim`: a discrete-event simulator of distributed LLM training.

    from sim import load_scenario, simulate
    report = simulate(load_scenario("scenarios/70b_zero3.yaml")).report

The public names are imported when first used: ``import sim`` costs nothing and needs neither torch nor deepspeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.errors import ScenarioError, SimError
    from sim.pipeline import Simulation, simulate
    from sim.report.report import Report
    from sim.scenario.load import load_scenario
    from sim.scenario.schema import Scenario

__all__ = ["Report", "Scenario", "ScenarioError", "SimError", "Simulation", "load_scenario", "simulate"]

_HOME = {
    "Report": "sim.report.report",
    "Scenario": "sim.scenario.schema",
    "ScenarioError": "sim.errors",
    "SimError": "sim.errors",
    "Simulation": "sim.pipeline",
    "load_scenario": "sim.scenario.load",
    "simulate": "sim.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
