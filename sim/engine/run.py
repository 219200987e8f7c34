"""Run one step of a world: streams and hosts as processes on one clock, and proof that everyone finished."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

import simpy

from sim.engine.cost import Cost
from sim.engine.host import Host
from sim.engine.network import Network
from sim.engine.rendezvous import Meetings, Moved, solo_transfers
from sim.engine.stream import Machine
from sim.errors import CollectiveMismatchError, ContentionError, DeadlockError
from sim.ir.program import World
from sim.ir.timeline import Part, Repeat, Runs, Span, Spans, Timeline
from sim.ir.traffic import Traffic
from sim.units import Ticks

if TYPE_CHECKING:
    from sim.engine.steady import Watch


MIN_CALLS = 12
"""Calls of a step from which on it is looked for what repeats."""


def run(world: World, cost: Cost, *, skipping: bool = True) -> Timeline:
    """Return when everything of ``Program.step`` happens, from tick 0. See ``_run``.

    Not ``skipping``: what repeats is simulated each time, for those who want to compare.

    Raises DeadlockError and CollectiveMismatchError, which name the ranks, and ContentionError if a transfer on a lone
    communicator was not alone on its links: the world has to be folded otherwise then.
    """
    try:
        return _run(world, cost, trusting=True, skipping=skipping)
    except ContentionError:
        if any(communicator.lone for communicator in world.communicators.values()):
            raise
    return _run(world, cost, trusting=False, skipping=skipping)


def _run(world: World, cost: Cost, trusting: bool, skipping: bool) -> Timeline:
    """Return when everything of ``Program.step`` happens, from tick 0.

    Classes are created in the order of their representatives' ranks and a class's streams in the order in which the
    host first uses them, so that ties do not depend on how the world is written down. Spans stand by rank, then the
    host's, then stream by stream in that order, each in the order of time.

    Whoever is ``trusting`` takes more transfers for lone than the communicators that are; ContentionError if one was
    not alone on its links.
    """
    env = simpy.Environment()
    network = Network(env, cost.links)
    meetings = Meetings(env, network, cost, world)
    machine = Machine(env, world, cost, network, meetings, solo_transfers(world, cost, meetings, network, trusting))
    hosts = [Host(program, machine) for program in sorted(world.programs, key=lambda program: program.rank)]
    watch = _watch(machine, hosts) if skipping else None
    for host in hosts:
        host.go()
    try:
        env.run()  # returns in silence when everyone waits
    except CollectiveMismatchError:
        if watch is not None and watch.cuts:
            return _run(world, cost, trusting, skipping=False)  # it names meetings by their numbers
        raise
    cuts = watch.cuts if watch is not None else ()
    if watch is not None:
        watch.count()
    for host in hosts:
        host.count_replays()
    streams = [list(host.streams.values()) for host in hosts]
    if not all(host.finished for host in hosts) or not all(stream.finished for stream in chain(*streams)):
        raise DeadlockError("\n".join(meetings.who_waits() + [host.held_up() for host in hosts if host.waits_for]))
    if network.lone:
        for host in hosts:
            _undisturbed(host, network, machine.solo)
    rank_end = {
        host.program.rank: Ticks(
            max(host.clock, *(stream.free for stream in own), 0) + sum(cut.delay(host.program.rank) for cut in cuts)
        )
        for host, own in zip(hosts, streams, strict=True)
    }
    parts: dict[int, list[Part]] = {}
    runs: dict[int, Runs] = {}
    for host, own in zip(hosts, streams, strict=True):
        if watch is not None and cuts:
            parts[host.program.rank], runs[host.program.rank] = watch.spans_of(host), watch.runs_of(host)
        else:
            parts[host.program.rank] = list(chain(host.spans, *(stream.spans for stream in own)))
    repeats = any(not isinstance(part, Span) for own in parts.values() for part in own)
    releases = tuple(release for host in hosts for release in host.releases())
    for thing in (*hosts, *chain(*streams), *((watch,) if watch is not None else ())):
        vars(thing).clear()  # they know each other: so what they held goes at once, and waits for no collector
    return Timeline(
        spans=Spans(parts, runs) if repeats else tuple(span for own in parts.values() for span in own),  # type: ignore[misc]
        end=max(rank_end.values(), default=Ticks(0)),
        rank_end=rank_end,
        releases=releases,
        link_use=network.link_use(),
    )


def _watch(machine: Machine, hosts: list[Host]) -> Watch | None:
    """Return who finds what repeats, where there is enough of it."""
    if not hosts or len(hosts[0].program.step) < MIN_CALLS:
        return None
    from sim.engine.steady import watch

    return watch(machine, hosts)


def _undisturbed(host: Host, network: Network, solo: Mapping[tuple[int, int], Moved]) -> None:
    """Raise ContentionError if a transfer whose time was worked out beforehand met a lone one on its links.

    A stream's transfers are taken together with what is between them in a stretch: it is looked at closely only then.
    """
    rank = host.program.rank
    traffics: dict[int, Traffic] = {}
    issued: dict[tuple[str, str], None] = {}
    for (whose, _), (_, traffic, where) in solo.items():
        if whose == rank:
            traffics[id(traffic)], issued[where] = traffic, None
    mask = 0
    for traffic in traffics.values():
        mask |= network.mask_of(traffic)
    moved = [(start, end) for start, end, links in network.lone if links & mask]
    if not moved:
        return
    first, last = min(moved)[0], max(end for _, end in moved)
    for stream in host.streams.values():
        for part in reversed(stream.spans):  # ascending: once they end before it, so did the others
            spans = part.spans() if isinstance(part, Repeat) else (part,)
            until = part.start + part.pattern[-1][0].end if isinstance(part, Repeat) else part.end
            if until <= first:
                break
            if part.start >= last:
                continue
            for span in spans:
                transfer = span.transfer
                if transfer is None or (transfer.communicator, span.stream) not in issued:
                    continue
                if any(transfer.start < end and start < span.end for start, end in moved):
                    raise ContentionError(f"rank {rank}: '{span.name}' shares links with a lone transfer")
