"""The whole program on one page."""

from __future__ import annotations

from dataclasses import dataclass

from sim.cluster.topology import Cluster, build_cluster
from sim.cost.model import CostModel
from sim.engine.run import run
from sim.ir.footprint import Footprint
from sim.ir.ledger import Ledger
from sim.ir.program import World
from sim.ir.timeline import Timeline
from sim.memory.replay import footprints
from sim.model.transformer import describe
from sim.parallel.lower import lower
from sim.report.report import Report, summarise
from sim.scenario.schema import Scenario


@dataclass(frozen=True, slots=True)
class Simulation:
    """Every noun of one answered scenario, for whoever draws more than the report."""

    scenario: Scenario
    cluster: Cluster
    ledger: Ledger
    world: World
    timeline: Timeline
    footprints: tuple[Footprint, ...]
    report: Report


def simulate(scenario: Scenario) -> Simulation:
    """Answer one scenario. Pure: same scenario and catalogue, same report, byte for byte."""
    raise NotImplementedError
