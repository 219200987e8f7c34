"""Small worlds for stories of the engine. Times are whole units of 2^-12 s, which are whole ticks: sums are exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sim.ir.ledger import Kernel, Pointwise
from sim.ir.program import (
    Call,
    Chunk,
    Collective,
    CollectiveKind,
    Communicator,
    Compute,
    Copy,
    HostCompute,
    Instruction,
    Program,
    Recv,
    Send,
    World,
)
from sim.ir.traffic import Link, Phase, Traffic

UNIT_S = 2.0**-12
UNIT = 10**12 // 2**12
"""Ticks of a unit."""


def kernel(gpu: int, launch: int = 0, stream: str = "compute", op: str = "op") -> Compute:
    """A kernel of that many units on the GPU and on the host."""
    return Compute(op, Pointwise(f"{launch}/{gpu}", (), ()), stream)


def collective(
    name: str, units: int, stream: str = "comm", kind: CollectiveKind = "all_gather", axis: str = "dp"
) -> Collective:
    """A collective that takes that many units alone: it loads each link with what that carries in this time."""
    return Collective(name, kind, axis, units, "bf16", stream)


@dataclass
class UnitCost:
    """Reads durations off the instructions; every transfer loads link 0 (or what ``routes`` says) for its units."""

    links: tuple[Link, ...] = (Link("wire", "nvlink", 1.0 / UNIT_S),)
    issue: int = 0
    wait: int = 0
    routes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def kernel_s(self, kernel: Kernel, rank: int) -> float:
        assert isinstance(kernel, Pointwise)
        return int(kernel.kind.split("/")[1]) * UNIT_S

    def launch_s(self, kernel: Kernel, rank: int, caller: str = "framework") -> float:
        assert isinstance(kernel, Pointwise)
        return int(kernel.kind.split("/")[0]) * UNIT_S

    def issue_s(self, rank: int, caller: str = "framework") -> float:
        return self.issue * UNIT_S

    def wait_s(self) -> float:
        return self.wait * UNIT_S

    def host_s(self, work: HostCompute, ranks: tuple[int, ...]) -> float:
        return work.num_elements * UNIT_S

    def _traffic(self, route: str, units: int) -> Traffic:
        loads = tuple((link, float(units)) for link in self.routes.get(route, (0,)))
        return Traffic("ring", (Phase(0.0, loads),), units)

    def collective(self, collective: Collective, communicator: Communicator) -> Traffic:
        return self._traffic(communicator.name, collective.tensor_bytes)

    def point_to_point(self, message: Send | Recv, communicator: Communicator) -> Traffic:
        return self._traffic(communicator.name, message.tensor_bytes)

    def copy(self, copy: Copy, ranks: tuple[int, ...]) -> Traffic:
        return self._traffic(copy.direction, copy.num_bytes)


def program(
    ranks: tuple[int, ...], *instructions: Instruction, axes: Mapping[str, str] | None = None, stage: int = 0
) -> Program:
    """A program of one chunk that is called once."""
    chunks: dict[str, Chunk] = {"all": instructions}
    return Program(ranks, stage, chunks, (), (Call("all"),), (Call("all"),), axes or {"dp": "dp"})


def world(*programs: Program, communicators: Sequence[Communicator] | None = None) -> World:
    """A world; by default all its ranks are one group "dp"."""
    ranks = tuple(sorted(rank for p in programs for rank in p.ranks))
    if communicators is None:
        communicators = [Communicator("dp", "dp", (ranks,), tuple(range(len(programs))))]
    return World(len(ranks), programs, {c.name: c for c in communicators})
