"""A lower bound of one candidate's step from its own programs, without working out when anything happens.

Each call of a chunk is played by itself, beginning with what one stream, or the host, gets to it at 0 and with nothing
known of the others: what they do counts from where it waits for something that happened since. So no play is later
than what the simulation makes of this call, and as calls follow each other on a stream

    T  >=  max over streams and host s of  sum over calls c of  (when s is through with c, having got there at 0)
    T  >=  max over links l of  sum of bytes over l / capacity of l

A kernel takes what the engine makes it take beside its chunk's collectives; a transfer what one that shares its links
with nothing takes, of the groups that a communicator stands for the first alone: ranks of others, which may be told
apart from it (``sim/parallel/fold.py``), are taken to move in no time. So this holds what ``bounds`` leaves out:
kernels and exchanges that a framework adds, at the rate of the links inside the node too, launches, and where the host
waits for the GPU. Left out: what others hold up, so a pipeline's bubble; contention; full launch queues. It costs a
small part of a simulation.

Checked by: tests/laws/test_planner_laws.py, against the simulation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sim.cluster.topology import Cluster, build_cluster
from sim.cost.model import CostModel
from sim.engine.beside import durations_beside, own_ticks
from sim.engine.segments import Prices
from sim.errors import ScenarioError
from sim.ir.program import (
    HOST,
    Chunk,
    Collective,
    Communicator,
    Compute,
    Copy,
    HostCompute,
    HostWait,
    Program,
    Record,
    Recv,
    Send,
    Wait,
    World,
)
from sim.ir.traffic import Traffic
from sim.pipeline import cost_settings, programs
from sim.planner.bounds import SAFETY
from sim.scenario.load import load_scenario_mapping
from sim.scenario.schema import ClusterSpec
from sim.units import TICKS_PER_S, ticks

_Move = Collective | Send | Recv | Copy


def floor_s(scenario: dict[str, Any], folder: str) -> float:
    """Return seconds that no simulation of this scenario is below; 0 for one that is refused."""
    try:
        resolved = load_scenario_mapping(scenario, "candidate", folder=folder)
    except ScenarioError:
        return 0.0
    _, world = programs(resolved)
    cost = CostModel(_cluster(resolved.cluster), resolved.cluster.gpu, cost_settings(resolved))
    return max(_ranks_s(world, cost)) * SAFETY


_known: list[tuple[ClusterSpec, Cluster]] = []


def _cluster(spec: ClusterSpec) -> Cluster:
    """Return the cluster, one of the last few: it remembers its routes."""
    for known, cluster in _known:
        if known == spec:
            return cluster
    _known.append((spec, build_cluster(spec)))
    del _known[:-8]
    return _known[-1][1]


def _ranks_s(world: World, cost: CostModel) -> list[float]:
    """Return what each class of ranks needs at least, and what the links do."""
    found = []
    loads: dict[int, float] = {}
    for number, program in enumerate(world.programs):
        reader = _Reader(world, program, number, cost)
        busy: dict[str, int] = {}
        for name, times in Counter(call.chunk for call in program.step).items():
            chunk = program.chunks[name]
            for stream, taken in reader.taken(chunk).items():
                busy[stream] = busy.get(stream, 0) + times * taken
            for link, num_bytes in reader.loads(chunk).items():
                loads[link] = loads.get(link, 0.0) + times * num_bytes
        found.append(max(busy.values(), default=0) / TICKS_PER_S)
    found.append(max((n / cost.links[link].bytes_per_s for link, n in loads.items()), default=0.0))
    return found


_Step = tuple[int, str, int, int]
"""(kind, stream or event, ticks of the host, ticks on the stream)."""
_RUN, _BLOCK, _RECORD, _WAIT, _HOST_WAIT = range(5)
_NEVER = -(1 << 80)
"""When something happened of which nothing is known."""


class _Reader:
    """What the chunks of one class take of its streams, its host, and the links."""

    def __init__(self, world: World, program: Program, number: int, cost: CostModel) -> None:
        self._world, self._program, self._number, self._cost = world, program, number, cost
        self._prices = Prices(cost, program.rank)
        self._taken: dict[int, Mapping[str, int]] = {}
        self._loads: dict[int, Mapping[int, float]] = {}
        self._moves: dict[_Move, int] = {}

    def taken(self, chunk: Chunk) -> Mapping[str, int]:
        """Return stream -> ticks from when it gets to the chunk until it is through; the host's is ``HOST``."""
        found = self._taken.get(id(chunk))
        if found is None:
            steps = self._steps(chunk)
            names = dict.fromkeys(stream for kind, stream, _, _ in steps if kind in (_RUN, _BLOCK) and stream)
            found = self._taken[id(chunk)] = {name: _play(steps, name) for name in (*names, HOST)}
        return found

    def _steps(self, chunk: Chunk) -> list[_Step]:
        prices, cost, program = self._prices, self._cost, self._program

        def traffic_of(message: Collective) -> Traffic | None:
            communicator = self._communicator(message)
            return None if communicator.num_ranks == 1 else cost.collective(message, communicator)

        beside = durations_beside(chunk, prices.alone, traffic_of, cost, program.rank)
        steps: list[_Step] = []
        for index, step in enumerate(chunk):
            if isinstance(step, Compute):
                launch, time = prices.of(step.kernel, step.caller)
                steps.append((_BLOCK if step.blocking else _RUN, step.stream, launch, beside.get(index, time)))
            elif isinstance(step, _Move):
                steps.append((_RUN, step.stream, prices.issue(step), self._alone(step)))
            elif isinstance(step, HostCompute):
                steps.append((_RUN, "", ticks(cost.host_s(step, program.ranks)), 0))
            elif isinstance(step, Record):
                steps += [(_RUN, step.stream, 0, 0), (_RECORD, step.event, 0, 0)]
            elif isinstance(step, Wait):
                steps += [(_RUN, step.stream, 0, 0), (_WAIT, step.event, 0, 0)]
            elif isinstance(step, HostWait):
                steps.append((_HOST_WAIT, step.event, 0, 0))
        return steps

    def _communicator(self, message: Collective | Send | Recv) -> Communicator:
        return self._world.communicators[self._program.axes[message.axis]]

    def loads(self, chunk: Chunk) -> Mapping[int, float]:
        """Return link -> bytes of what this class answers for: the first of those that meet, and who sends."""
        found = self._loads.get(id(chunk))
        if found is not None:
            return found
        loads: dict[int, float] = {}
        for step in chunk:
            if not isinstance(step, Collective | Send):
                continue
            communicator = self._communicator(step)
            first = isinstance(step, Send) or communicator.classes[0] == self._number
            if communicator.num_ranks == 1 or not first:
                continue
            for phase in self._cost.traffic(step, communicator, ()).phases:
                for link, num_bytes in phase.loads:
                    loads[link] = loads.get(link, 0.0) + num_bytes
        self._loads[id(chunk)] = loads
        return loads

    def _alone(self, move: _Move) -> int:
        """Return the ticks of a transfer that shares its links with nothing, its communicator's other groups either."""
        found = self._moves.get(move)
        if found is None:
            found = self._moves[move] = self._move(move)
        return found

    def _move(self, move: _Move) -> int:
        if isinstance(move, Copy):
            return max(0, own_ticks(self._cost.copy(move, self._program.ranks[:1]), self._cost) - 1)
        communicator = self._communicator(move)
        if communicator.num_ranks == 1 or self._program.rank not in communicator.groups[0]:
            return 0
        return max(0, own_ticks(self._cost.traffic(move, communicator, ()), self._cost) - 1)


def _play(steps: Sequence[_Step], base: str) -> int:
    """Return when ``base`` is through with the steps if it gets there at 0, and nobody else before."""
    clock = {base: 0}
    events: dict[str, int] = {}
    host = 0 if base == HOST else _NEVER
    stream = ""
    for kind, name, issue, time in steps:
        if kind <= _BLOCK:
            host += issue
            if name:
                stream = name
                end = clock[name] = max(clock.get(name, _NEVER), host) + time
                if kind == _BLOCK and end > host:
                    host = end
        elif kind == _RECORD:
            events[name] = clock[stream]
        elif kind == _WAIT:
            clock[stream] = max(clock[stream], events.get(name, _NEVER))
        else:
            host = max(host, events.get(name, _NEVER))
    return host if base == HOST else clock[base]
