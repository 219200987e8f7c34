"""Run one step of a world: streams and hosts as processes on one clock, and proof that everyone finished."""

from __future__ import annotations

from itertools import chain

import simpy

from sim.engine.cost import Cost
from sim.engine.host import Host
from sim.engine.network import Network
from sim.engine.rendezvous import Meetings, solo_transfers
from sim.engine.stream import Machine
from sim.errors import DeadlockError
from sim.ir.program import World
from sim.ir.timeline import Repeat, Spans, Timeline
from sim.units import Ticks


def run(world: World, cost: Cost) -> Timeline:
    """Return when everything of ``Program.step`` happens, from tick 0.

    Classes are created in the order of their representatives' ranks and a class's streams in the order in which the
    host first uses them, so that ties do not depend on how the world is written down. Spans stand by rank, then the
    host's, then stream by stream in that order, each in the order of time.

    Raises DeadlockError and CollectiveMismatchError, which name the ranks.
    """
    env = simpy.Environment()
    network = Network(env, cost.links)
    meetings = Meetings(env, network, cost, world)
    machine = Machine(env, world, cost, network, meetings, solo_transfers(world, cost, meetings, network))
    hosts = [Host(program, machine) for program in sorted(world.programs, key=lambda program: program.rank)]
    for host in hosts:
        host.go()
    env.run()  # returns in silence when everyone waits
    for host in hosts:
        host.count_replays()
    streams = [list(host.streams.values()) for host in hosts]
    if not all(host.finished for host in hosts) or not all(stream.finished for stream in chain(*streams)):
        raise DeadlockError("\n".join(meetings.who_waits() + [host.held_up() for host in hosts if host.waits_for]))
    rank_end = {
        host.program.rank: Ticks(max(host.clock, *(stream.free for stream in own), 0))
        for host, own in zip(hosts, streams, strict=True)
    }
    parts = {
        host.program.rank: list(chain(host.spans, *(stream.spans for stream in own)))
        for host, own in zip(hosts, streams, strict=True)
    }
    repeats = any(isinstance(part, Repeat) for own in parts.values() for part in own)
    return Timeline(
        spans=Spans(parts) if repeats else tuple(span for own in parts.values() for span in own),  # type: ignore[misc]
        end=max(rank_end.values(), default=Ticks(0)),
        rank_end=rank_end,
        releases=tuple(release for host in hosts for release in host.releases()),
        link_use=network.link_use(),
    )
