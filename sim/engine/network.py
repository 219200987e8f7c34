"""Flows over shared links: each moving phase of a transfer is a job that drains as one fluid.

Rates are max-min fair by progressive filling. The level that rises is a job's *share*: its rate as a fraction of what
it would have with its links to itself (of a communicator of several groups: of what one group would have). On one link
between two jobs this gives both the same bytes per second, whatever their sizes; a job's own cap
(``Phase.max_bytes_per_s``) stops its share without holding others back.

    sum over jobs j of  load_jl / links_s_j * share_j  <=  capacity_l,   links_s_j = max over l of load_jl / capacity_l

Rates change only when a job begins or ends, and only for jobs that share links with it, directly or through others.
Source: Bertsekas and Gallager, "Data Networks", 2nd ed., section 6.5.2 (max-min flow control).
Leaves out: packets, transients of congestion control, unfairness between flows of different round-trip time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, fsum, inf
from typing import Any

import simpy

from sim.errors import ContentionError
from sim.ir.timeline import LinkUse
from sim.ir.traffic import Link, Phase, Traffic
from sim.units import TICKS_PER_S, Ticks, ticks

_TIE = 1 + 1e-12
"""Links that fill within this of the first are taken to fill with it: their jobs stop at the lower level."""

_LAST = 9
"""Priority of what comes last within a tick (simpy: urgent is 0, normal is 1)."""


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """A phase as the network needs it.

    ``links_s``  the time of one of its groups with all its links to itself; 0 if it loads none
    ``alone_s``  the time of all its groups together, or longer if its own cap is the limit
    ``cap``      the share that its own groups and its own cap leave it
    ``uses``     (link, fraction of the link it uses at share 1): to fourteen digits the same for all sizes of a message
    ``mask``     its links as bits
    ``number``   equal for flows of equal ``uses``
    """

    latency: Ticks
    links_s: float
    alone_s: float
    cap: float
    loads: tuple[tuple[int, float], ...]
    uses: tuple[tuple[int, float], ...]
    mask: int
    number: int = 0


def flow_of(phase: Phase, links: Sequence[Link]) -> Flow:
    """Return the flow of a phase. A loaded link needs a capacity."""
    loads = tuple((link, num_bytes) for link, num_bytes in phase.loads if num_bytes > 0)
    times = [num_bytes / links[link].bytes_per_s for link, num_bytes in loads]
    most_s = max(times, default=0.0)
    links_s = phase.group_s or most_s
    capped = phase.stream_bytes > 0 and phase.max_bytes_per_s > 0
    alone_s = max(most_s, phase.stream_bytes / phase.max_bytes_per_s if capped else 0.0)
    return Flow(
        latency=ticks(phase.latency_s),
        links_s=links_s,
        alone_s=alone_s,
        cap=links_s / alone_s if alone_s else 1.0,
        loads=loads,
        uses=tuple((link, round(time / links_s, 14)) for (link, _), time in zip(loads, times, strict=True)),
        mask=sum(1 << link for link in dict.fromkeys(link for link, _ in loads)),
    )


def _whole(seconds: float, left: float = 1.0) -> int:
    """Return whole ticks, rounded up, of what is left of so many seconds.

    Shares and sums of loads carry errors of some 1e-14, which depend on how jobs are grouped: what is above a whole
    tick by no more than 1e-11 of all is that tick.
    """
    whole = seconds * TICKS_PER_S
    return max(0, ceil(left * whole - min(whole * 1e-11, 0.4)))


def fair_shares(flows: Sequence[Flow]) -> list[float]:
    """Return each flow's share, max-min fair. All load links; sums are exact, so the order does not matter."""
    caps = [flow.cap for flow in flows]
    shares = [0.0] * len(flows)
    users: dict[int, list[tuple[int, float]]] = {}
    for j, flow in enumerate(flows):
        for link, use in flow.uses:
            users.setdefault(link, []).append((j, use))
    constraints = list(dict.fromkeys(map(tuple, users.values())))  # most links are used alike
    rising = dict.fromkeys(range(len(flows)))
    level = 0.0
    while rising:
        fills: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        for on_link in constraints:
            demand = fsum(use for j, use in on_link if j in rising)
            if demand > 0:
                taken = fsum(use * shares[j] for j, use in on_link if j not in rising)
                fills.append((max(1.0 - taken, 0.0) / demand, on_link))
        # never falls: what is left of a link that is all but full is rounding
        level = max(level, min(*(fill for fill, _ in fills), *(caps[j] for j in rising)))
        stop = {j for j in rising if caps[j] <= level * _TIE}
        for fill, on_link in fills:
            if fill <= level * _TIE:
                stop.update(j for j, _ in on_link if j in rising)
        for j in stop:
            shares[j] = level
            del rising[j]
    return shares


@dataclass(slots=True, eq=False)
class _Job:
    """A transfer under way: its phases still to come, and how far the one that moves has got.

    ``left`` is the fraction of the phase not yet moved at tick ``since``; ``due`` the tick at which it ends at this
    share.
    """

    flows: tuple[Flow, ...]
    done: Any
    lone: bool = False
    next: int = 0
    left: float = 1.0
    since: int = 0
    share: float = 0.0
    due: int = -1


@dataclass(slots=True)
class _Busy:
    """When the links of one mask carried something: ``spans`` are disjoint and ascending."""

    num_active: int = 0
    since: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    alone: int = 0
    """Ticks of transfers that had these links to themselves, beside ``spans``."""


class Network:
    """All links, and the jobs that load them."""

    def __init__(self, env: Any, links: Sequence[Link]) -> None:
        self._env = env
        self._links = links
        self._active: dict[_Job, Flow] = {}
        self._flows: dict[int, tuple[Traffic, tuple[Flow, ...]]] = {}
        self._phases: dict[Phase, Flow] = {}
        self._uses: dict[tuple[tuple[int, float], ...], int] = {}
        self._shares: dict[tuple[tuple[int, float], ...], list[float]] = {}
        self._moved: dict[Flow, int] = {}
        self._busy: dict[int, _Busy] = {}
        self._changed: list[int] = []
        self._counted: dict[int, tuple[Traffic, int]] = {}
        self._kind: dict[int, int] = {}
        self._alike: dict[int, list[int]] = {}
        self.lone: list[tuple[int, int, int]] = []
        """(start, end, links as bits) of what lone transfers moved."""
        self.again: list[tuple[int, int, int]] = []
        """(start, end, times): what happened in between happened so many times more (``steady``)."""

    def start(self, traffic: Traffic, lone: bool = False) -> simpy.Event:
        """Begin a transfer now; return the event of its end. ``lone``: nothing else may be on its links meanwhile."""
        job = _Job(self._flows_of(traffic), self._env.event(), lone)
        self._next_phase(job)
        return job.done

    def learn(self, traffics: Sequence[Traffic]) -> None:
        """Take note of all traffic there will be: links that all of it loads alike are told apart no more.

        Only the first link of each kind is looked at from here on; what all carried is told at the end.
        """
        phases = list(dict.fromkeys(phase for traffic in traffics for phase in traffic.phases))
        kind: dict[int, int] = {}
        num_kinds = 0
        looked_at: dict[tuple[tuple[int, ...], tuple[int, ...]], None] = {}
        for phase in phases:
            if not phase.loads:
                continue
            loaded, sizes = zip(*phase.loads, strict=True)
            number = {size: at for at, size in enumerate(dict.fromkeys(sizes))}
            pattern = (loaded, tuple(map(number.__getitem__, sizes)))
            if pattern in looked_at:  # the same links told apart alike: messages of another size, say
                continue
            looked_at[pattern] = None
            split: dict[tuple[int, float], int] = {}  # kind before and bytes -> kind after
            for link, num_bytes in phase.loads:
                key = (kind.get(link, -1), num_bytes)
                found = split.get(key)
                if found is None:
                    found = split[key] = num_kinds
                    num_kinds += 1
                kind[link] = found
        rate_of = getattr(self._links, "bytes_per_s", None) or (lambda link: self._links[link].bytes_per_s)
        numbers: dict[tuple[int, float], int] = {}
        kind = {link: numbers.setdefault((found, rate_of(link)), len(numbers)) for link, found in kind.items()}
        alike: dict[int, list[int]] = {}
        for link in sorted(kind):
            alike.setdefault(kind[link], []).append(link)
        self._kind, self._alike = kind, {found[0]: found for found in alike.values()}

    def _seen(self, phase: Phase) -> Phase:
        """Return a phase with one link of each kind."""
        if not self._kind:
            return phase
        firsts, of = self._alike, self._kind
        loads = {of[link]: (link, num_bytes) for link, num_bytes in reversed(phase.loads)}
        assert all(link in firsts for link, _ in loads.values()), "links of one kind are loaded alike"
        return replace(phase, loads=tuple(sorted(loads.values())))

    def links_of(self, traffic: Traffic) -> tuple[int, ...]:
        """Return the links that a transfer loads."""
        return tuple(dict.fromkeys(link for flow in self._flows_of(traffic) for link, _ in flow.loads))

    def mask_of(self, traffic: Traffic) -> int:
        """Return the links that a transfer loads, as bits."""
        mask = 0
        for flow in self._flows_of(traffic):
            mask |= flow.mask
        return mask

    def alone(self, traffic: Traffic) -> int:
        """Return the ticks of a transfer that shares its links with nothing."""
        return sum(flow.latency + _whole(flow.alone_s) for flow in self._flows_of(traffic))

    def count(self, traffic: Traffic, times: int = 1) -> None:
        """Note transfers that shared their links with nothing and took ``alone`` ticks: they need not be run."""
        _, before = self._counted.get(id(traffic), (traffic, 0))
        self._counted[id(traffic)] = (traffic, before + times)

    def _flows_of(self, traffic: Traffic) -> tuple[Flow, ...]:
        found = self._flows.get(id(traffic))
        if found is None:
            for phase in traffic.phases:
                if phase not in self._phases:
                    flow = flow_of(self._seen(phase), self._links)
                    number = self._uses.setdefault(flow.uses, len(self._uses))
                    self._phases[phase] = replace(flow, number=number)
            # the traffic is kept as well: its id stays its own
            found = self._flows[id(traffic)] = (traffic, tuple(self._phases[phase] for phase in traffic.phases))
        return found[1]

    def _next_phase(self, job: _Job) -> None:
        if job.next == len(job.flows):
            job.done.succeed()
            return
        latency = job.flows[job.next].latency
        if latency:
            self._env.timeout(latency).callbacks.append(lambda _: self._begin(job))
        else:
            self._begin(job)

    def _begin(self, job: _Job) -> None:
        now = self._env.now
        flow = job.flows[job.next]
        job.next += 1
        job.left, job.since, job.share = 1.0, now, 0.0
        if not flow.loads:
            self._finish_at(job, now + _whole(flow.alone_s))
            return
        busy = self._busy.setdefault(flow.mask, _Busy())
        if not busy.num_active:
            busy.since = now
        busy.num_active += 1
        shared = self._loaded(flow.mask)
        if shared and (job.lone or any(other.lone and o.mask & flow.mask for other, o in self._active.items())):
            raise ContentionError(f"a lone transfer shares links at tick {now}")
        self._active[job] = flow
        if shared:
            self._change(flow.mask)
        else:
            self._set_share(job, flow, flow.cap)

    def _finish_at(self, job: _Job, due: int) -> None:
        job.due = due

        def finish(_: object) -> None:
            if job.due == due:  # else its share has changed since
                self._finish(job, job.flows[job.next - 1])

        self._env.timeout(due - self._env.now).callbacks.append(finish)

    def _finish(self, job: _Job, flow: Flow) -> None:
        now = self._env.now
        job.due = -1
        if flow.loads:
            del self._active[job]
            self._moved[flow] = self._moved.get(flow, 0) + 1
            if job.lone:
                self.lone.append((job.since, now, flow.mask))
            busy = self._busy[flow.mask]
            busy.num_active -= 1
            if not busy.num_active:
                busy.spans.append((busy.since, now))
            if self._loaded(flow.mask):
                self._change(flow.mask)
        self._next_phase(job)

    def _loaded(self, mask: int) -> bool:
        """Return whether a job loads a link of ``mask`` beyond this tick."""
        now = self._env.now
        return any(flow.mask & mask and job.due != now for job, flow in self._active.items())

    def _change(self, mask: int) -> None:
        """Have the shares on these links worked out anew when all that happens at this tick has happened.

        So the shares do not depend on the order of what happens at one tick.
        """
        if not self._changed:
            last = self._env.event()
            last._ok, last._value = True, None
            last.callbacks.append(lambda _: self._settle())
            self._env.schedule(last, priority=_LAST)
        self._changed.append(mask)

    def _settle(self) -> None:
        changed, self._changed = self._changed, []
        settled: set[_Job] = set()
        for mask in dict.fromkeys(changed):
            jobs = self._sharing(mask)
            if jobs and not settled.issuperset(jobs):
                settled.update(jobs)
                self._share(jobs)

    def _sharing(self, mask: int) -> list[_Job]:
        """Return the jobs that share a link of ``mask`` directly or through others, in the order they began.

        Jobs due at this very tick are through: they take nothing any more.
        """
        now = self._env.now
        rest = [(job, flow) for job, flow in self._active.items() if job.due != now]
        found: set[_Job] = set()
        grown = True
        while grown and rest:
            grown = False
            apart = []
            for job, flow in rest:
                if flow.mask & mask:
                    mask |= flow.mask
                    found.add(job)
                    grown = True
                else:
                    apart.append((job, flow))
            rest = apart
        return [job for job in self._active if job in found]

    def _share(self, jobs: list[_Job]) -> None:
        now = self._env.now
        flows = [self._active[job] for job in jobs]
        key = tuple((flow.number, flow.cap) for flow in flows)
        shares = self._shares.get(key)
        if shares is None:
            shares = self._shares[key] = fair_shares(flows)
        for job, flow, share in zip(jobs, flows, shares, strict=True):
            if share == job.share:
                continue
            if now > job.since:
                moved = (now - job.since) / TICKS_PER_S * job.share / flow.links_s
                job.left, job.since = max(job.left - moved, 0.0), now
            self._set_share(job, flow, share)

    def _set_share(self, job: _Job, flow: Flow, share: float) -> None:
        job.share = share
        whole_s = flow.alone_s if share == flow.cap else flow.links_s / share
        self._finish_at(job, self._env.now + _whole(whole_s, job.left))

    def link_use(self) -> tuple[LinkUse, ...]:
        """Return what each link carried, and for how long it carried anything; links that carried nothing are left out.

        Links that the same sets of flows load have been busy together: the union is worked out once for each such set.
        """
        for traffic, times in self._counted.values():
            for flow in self._flows_of(traffic):
                if flow.loads:
                    self._moved[flow] = self._moved.get(flow, 0) + times
                    self._busy.setdefault(flow.mask, _Busy()).alone += times * _whole(flow.alone_s)
        self._counted = {}
        num_bytes: dict[int, list[float]] = {}
        masks: dict[int, list[int]] = {}
        of_mask: dict[int, int] = {mask: i for i, mask in enumerate(self._busy)}
        seen: set[int] = set()
        for flow, times in self._moved.items():
            for link, load in flow.loads:
                num_bytes.setdefault(link, []).append(times * load)
            if flow.mask not in seen:
                seen.add(flow.mask)
                for link in dict.fromkeys(link for link, _ in flow.loads):
                    masks.setdefault(link, []).append(flow.mask)
        busy: dict[tuple[int, ...], int] = {}
        use = []
        for link in sorted(num_bytes):
            key = tuple(sorted([of_mask[mask] for mask in masks[link]]))
            if key not in busy:
                spans = sorted(span for mask in masks[link] for span in self._busy[mask].spans)
                busy[key] = _covered(spans) + sum(self._busy[mask].alone for mask in masks[link])
                for start, end, times in self.again:
                    busy[key] += times * _covered(
                        [(max(a, start), min(b, end)) for a, b in spans if a < end and b > start]
                    )
            carried = fsum(num_bytes[link])
            use += [LinkUse(alike, carried, Ticks(busy[key])) for alike in self._alike.get(link, (link,))]
        use.sort(key=lambda one: one.link)
        return tuple(use)


def _covered(spans: Sequence[tuple[int, int]]) -> int:
    """Return the length of the union of ascending spans."""
    total, until = 0, -inf
    for start, end in spans:
        if end > until:
            total += end - max(start, int(until)) if start < until else end - start
            until = end
    return total
