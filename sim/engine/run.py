"""Run one step of a world: streams and hosts as processes on one clock, and proof that everyone finished."""

from __future__ import annotations

from itertools import chain

import simpy

from sim.engine.cost import Cost
from sim.engine.host import Host
from sim.engine.network import Network
from sim.engine.rendezvous import Meetings
from sim.engine.segments import streams_of
from sim.engine.stream import Machine, Stream
from sim.errors import DeadlockError
from sim.ir.program import World
from sim.ir.timeline import Timeline
from sim.units import Ticks


def run(world: World, cost: Cost) -> Timeline:
    """Return when everything of ``Program.step`` happens, from tick 0.

    Classes are created in the order of their representatives' ranks and a class's streams in the order in which they
    first appear, so that ties do not depend on how the world is written down. Spans stand by rank, then the host's,
    then stream by stream in that order, each in the order of time.

    Raises DeadlockError and CollectiveMismatchError, which name the ranks.
    """
    env = simpy.Environment()
    network = Network(env, cost.links)
    meetings = Meetings(env, network, cost, world)
    machine = Machine(env, world, cost, network, meetings)
    hosts: list[tuple[int, Host, list[Stream]]] = []
    processes = []
    for program in sorted(world.programs, key=lambda program: program.rank):
        streams = {name: Stream(name, program, machine) for name in streams_of(program)}
        host = Host(env, program, cost, streams)
        processes.append(env.process(host.process()))
        processes.extend(env.process(stream.process()) for stream in streams.values())
        hosts.append((program.rank, host, list(streams.values())))
    env.run()  # returns in silence when everyone waits
    if any(process.is_alive for process in processes):
        held_up = [f"the host of rank {rank} waits for {host.waits_for}" for rank, host, _ in hosts if host.waits_for]
        raise DeadlockError("\n".join(meetings.who_waits() + held_up))
    rank_end = {rank: Ticks(max(host.clock, *(stream.free for stream in streams), 0)) for rank, host, streams in hosts}
    return Timeline(
        spans=tuple(span for _, host, streams in hosts for span in chain(host.spans, *(s.spans for s in streams))),
        end=max(rank_end.values(), default=Ticks(0)),
        rank_end=rank_end,
        releases=tuple(release for _, host, _ in hosts for release in host.releases()),
        link_use=network.link_use(),
    )
