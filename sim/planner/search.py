"""The search: bounds first, simulations best first, until what is left cannot be on the front.

A candidate is discarded only where its lower bound says so: it holds more memory than the GPU has, it misses the plan's
deadline or budget at best, or a simulated candidate is at least as good as its bound in time, money, energy and GPUs.
Of a kind of node that bounds exclude whole the best one is simulated nevertheless, so that it has figures to compare.
None of these can discard a candidate of the front, which is of those that keep the plan's limits; so the front is that
of an exhaustive search (tests/laws/test_planner_laws.py).

What is next in turn gets a sharper bound first, from its own programs (``floor``; a pipeline's where that helps),
and has to stand up to it: it goes back to its new place in the order, or is discarded.

Candidates are simulated in waves: the next wave is chosen from what all waves before it have shown, and its size does
not depend on the number of processes. So the answer does not either, nor on how often the search was interrupted.
Processes that a wave leaves idle work ahead on what comes next; what they find waits until it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any, Protocol

from sim.errors import ScenarioError
from sim.planner.bounds import Bound, Bounds
from sim.planner.economics import Cost, Economics
from sim.planner.schema import Plan
from sim.planner.space import Candidate, candidates, scenario_of
from sim.units import format_duration, format_money, format_power

WAVE = 4
"""Candidates of a wave."""
REPRESENTED = 3
"""Candidates of a kind of node that are simulated at most, to have one of it that fits."""


ASKED = 4
"""Pipelines whose programs may be asked in vain, beyond every other one."""
WORTH = 1.05
"""A bound that rises by less was asked for in vain."""


class Runner(Protocol):
    """Whoever simulates the scenarios of a wave, in the order given; ``ahead`` with what has nothing else to do."""

    @property
    def width(self) -> int: ...

    def run(
        self, scenarios: Sequence[dict[str, Any]], folder: str, ahead: Sequence[dict[str, Any]] = ()
    ) -> list[dict[str, Any]]: ...

    def floor_s(self, scenario: dict[str, Any], folder: str) -> float:
        """Return seconds that no step of this scenario takes less than, for less than a simulation costs."""
        ...


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate that was simulated. ``cost`` is None where it does not fit."""

    candidate: Candidate
    bound: Bound
    outcome: Mapping[str, Any]
    cost: Cost | None


@dataclass(frozen=True, slots=True)
class Discarded:
    """A candidate that its bound excludes: it cannot beat ``by``; or it cannot fit (``over_bytes``), or keep the plan's
    limits."""

    candidate: Candidate
    bound: Bound
    best: Cost
    by: Tried | None
    over_bytes: int = 0


@dataclass(slots=True)
class Search:
    """What a search found."""

    plan: Plan
    num_candidates: int = 0
    tried: list[Tried] = field(default_factory=list)
    discarded: list[Discarded] = field(default_factory=list)
    refused: list[tuple[Candidate, str]] = field(default_factory=list)
    """Candidates that the scenario's door does not let in, and why: a rule that ``space`` does not know."""

    @property
    def front(self) -> list[Tried]:
        """What nothing that keeps the plan's limits is better than, in the order of time."""
        kept = [one for one in self.tried if one.cost is not None and keeps_goal(self.plan, one.cost)]
        return front(kept or self.tried)


def front(tried: Iterable[Tried]) -> list[Tried]:
    """Return what nothing else is better than or as good as; of equals the one that was generated first."""
    fitting = [one for one in tried if one.cost is not None]
    fitting.sort(key=lambda one: (one.cost.objectives() if one.cost else (), one.candidate))
    found: list[Tried] = []
    for one in fitting:
        assert one.cost is not None
        mine = one.cost.objectives()
        if not any(_dominates(other.cost, mine) for other in found if other.cost):
            found.append(one)
    return found


def _dominates(cost: Cost, other: tuple[float, float, float, int]) -> bool:
    return all(mine <= theirs for mine, theirs in zip(cost.objectives(), other, strict=True))


def search(
    plan: Plan,
    runner: Runner,
    say: Callable[[str], None] = lambda words: None,
    *,
    exhaustive: bool = False,
    tolerance: float = 0.0,
) -> Search:
    """Return every candidate of a plan, tried or discarded.

    ``exhaustive``: try all, whatever the bounds say. ``tolerance``: discard as well what can be better than a simulated
    candidate by at most this share in any of time, money and energy; so the front is that of an exhaustive search to
    within it.
    """
    economics, bounds = Economics(plan), Bounds(plan)
    found = Search(plan)
    every = candidates(plan)
    found.num_candidates = len(every)
    say(f"{len(every):,} candidates")
    queue: list[_Entry] = []
    late: list[_Entry] = []
    for candidate in every:
        try:
            bound = bounds.bound(candidate)
        except ScenarioError as error:
            found.refused.append((candidate, error.findings[0].problem))
            continue
        best = economics.cost(candidate, bound.time_s, min(bound.compute_s, bound.time_s))
        room = plan.sites[candidate.site].gpu.total_memory_bytes * (1 - plan.constraints.memory_margin)
        if bound.memory_bytes > room and not exhaustive:
            found.discarded.append(Discarded(candidate, bound, best, None, int(bound.memory_bytes - room)))
        elif keeps_goal(plan, best) or exhaustive:
            queue.append((goal_value(plan, best), candidate, bound, best))
        else:
            late.append((excess(plan, best), candidate, bound, best))
    kept = _Waves(plan, runner, economics, found, say, 1 + tolerance)
    kept.go(queue, WAVE, exhaustive)
    late += kept.missed
    if not any(one.cost is not None and keeps_goal(plan, one.cost) for one in found.tried):
        kept.go(late, 1, first=True)  # nothing keeps the goal: what comes nearest is simulated, to say by how much
        late = kept.left
    elif not exhaustive:
        kept.represent()
    found.discarded += [Discarded(candidate, bound, best, None) for _, candidate, bound, best in late]
    return found


_Entry = tuple[float, Candidate, Bound, Cost]
"""Place in the order, candidate, its bound and what it costs at best."""


@dataclass(slots=True)
class _Waves:
    """Simulates a queue wave by wave. ``left`` is what has not been looked at when it stops."""

    plan: Plan
    runner: Runner
    economics: Economics
    found: Search
    say: Callable[[str], None]
    slack: float
    left: list[_Entry] = field(default_factory=list)
    missed: list[_Entry] = field(default_factory=list)
    """What its sharper bound showed to miss the plan's limits."""
    sharp: set[Candidate] = field(default_factory=set)
    """Candidates that stand in the queue by their sharper bound."""
    floors: dict[Candidate, float] = field(default_factory=dict)
    asked: int = 0
    raised: int = 0
    """Of so many pipelines whose programs were asked, how many bounds they raised."""

    def go(self, queue: list[_Entry], size: int, exhaustive: bool = False, first: bool = False) -> None:
        """Simulate what no simulated candidate beats; ``first``: until one fits."""
        plan, found = self.plan, self.found
        self.left = sorted(queue, key=lambda entry: entry[:2])
        fresh = found.tried
        while self.left and not (first and any(one.cost is not None for one in found.tried)):
            wave = self._all() if exhaustive else self._wave(size, fresh, first)
            if not wave:
                break
            ahead = [one for one in self.left[: 2 * self.runner.width] if self._may_be_next(one)]
            outcomes = self.runner.run(
                [scenario_of(plan, entry[1]) for entry in wave],
                plan.folder,
                [scenario_of(plan, entry[1]) for entry in ahead],
            )
            fresh = [
                Tried(candidate, bound, outcome, _cost(plan, self.economics, candidate, bound, outcome))
                for (_, candidate, bound, _), outcome in zip(wave, outcomes, strict=True)
            ]
            found.tried += fresh
            self.say(f"{len(found.tried):,} simulated, {len(self.left):,} left of {found.num_candidates:,}")

    def represent(self) -> None:
        """Simulate what is best by its bound on each kind of node of which nothing was, so that each has figures.

        What is discarded for another is no better than that one, whatever it takes: the front stays as it is.
        """
        plan, found = self.plan, self.found
        for _ in range(REPRESENTED):
            known = {one.candidate.site for one in found.tried if one.cost is not None}
            first: dict[int, Discarded] = {}
            for one in found.discarded:
                site = one.candidate.site
                if one.by is None or site in known:
                    continue
                if site not in first or _place(plan, one) < _place(plan, first[site]):
                    first[site] = one
            if not first:
                return
            chosen = [one for _, one in sorted(first.items())]
            outcomes = self.runner.run([scenario_of(plan, one.candidate) for one in chosen], plan.folder)
            gone = {id(one) for one in chosen}
            found.discarded = [one for one in found.discarded if id(one) not in gone]
            for one, outcome in zip(chosen, outcomes, strict=True):
                cost = _cost(plan, self.economics, one.candidate, one.bound, outcome)
                found.tried.append(Tried(one.candidate, one.bound, outcome, cost))
            self.say(f"{len(found.tried):,} simulated, one of each kind of node")

    def _all(self) -> list[_Entry]:
        wave, self.left = self.left, []
        return wave

    def _wave(self, size: int, fresh: Sequence[Tried], first: bool) -> list[_Entry]:
        """Take the next wave from what is left, and discard what cannot be on the front any more.

        ``fresh`` is what has been simulated since it was looked at last. What one of the wave beats by their bounds is
        put off: very likely it does so by its simulation too.
        """
        self.left = [entry for entry in self.left if not self._beaten(entry, fresh)]
        wave: list[_Entry] = []
        put_off: list[_Entry] = []
        heap = self.left  # ascending, and so a heap
        while heap and len(wave) < size and len(put_off) < size:
            entry = heappop(heap)
            if entry[1] in self.sharp:
                promising = not any(_dominates(mate[3], entry[3].objectives()) for mate in wave)
                (wave if promising else put_off).append(entry)
                continue
            self.sharp.add(entry[1])
            _, candidate, bound, best = self._sharper(entry, 2 * self.raised >= self.asked - ASKED)
            if candidate.pp > 1 and candidate in self.floors:
                self.asked += 1
                self.raised += bound.time_s > WORTH * entry[2].time_s
            if not first and not keeps_goal(self.plan, best):
                self.missed.append((excess(self.plan, best), candidate, bound, best))
                continue
            place = excess(self.plan, best) if first else goal_value(self.plan, best)
            if not self._beaten((place, candidate, bound, best), self.found.tried):
                heappush(heap, (place, candidate, bound, best))
        self.left = sorted(heap + put_off, key=lambda entry: entry[:2])
        return wave

    def _sharper(self, entry: _Entry, asks: bool) -> _Entry:
        """Return an entry with what its candidate's programs say of its step, if that is more; not yet in its place.

        They know nothing of a pipeline's bubble, which ``bounds`` knows: where they hardly raise a pipeline's bound
        they are not worth their price, and are asked no more.
        """
        place, candidate, bound, _ = entry
        if candidate.pp > 1 and candidate not in self.floors and not asks:
            return entry
        floor_s = self.floors.get(candidate)
        if floor_s is None:
            floor_s = self.runner.floor_s(scenario_of(self.plan, candidate), self.plan.folder)
            self.floors[candidate] = floor_s
        if floor_s <= bound.time_s:
            return entry
        bound = replace(bound, time_s=floor_s)
        return place, candidate, bound, self.economics.cost(candidate, floor_s, min(bound.compute_s, floor_s))

    def _may_be_next(self, entry: _Entry) -> bool:
        best = self._sharper(entry, asks=False)[3]
        return not any(_beats(one, best, self.slack) for one in self.found.tried)

    def _beaten(self, entry: _Entry, by: Iterable[Tried]) -> bool:
        """Discard what one of those simulated beats."""
        _, candidate, bound, best = entry
        better = next((one for one in by if _beats(one, best, self.slack)), None)
        if better is not None:
            self.found.discarded.append(Discarded(candidate, bound, best, better))
        return better is not None


def _place(plan: Plan, one: Discarded) -> tuple[bool, float, Candidate]:
    return not keeps_goal(plan, one.best), goal_value(plan, one.best), one.candidate


def _beats(tried: Tried, bound: Cost, slack: float) -> bool:
    """Whether a simulated candidate is as good as another's bound, ``slack`` times which counts as as good."""
    time_s, usd, joules, gpus = bound.objectives()
    return tried.cost is not None and _dominates(tried.cost, (time_s * slack, usd * slack, joules * slack, gpus))


def _cost(
    plan: Plan, economics: Economics, candidate: Candidate, bound: Bound, outcome: Mapping[str, Any]
) -> Cost | None:
    room = outcome["capacity_bytes"] * (1 - plan.constraints.memory_margin)
    if not outcome["fits"] or outcome["peak_device_bytes"] > room:
        return None
    step_s = outcome["step_s"]
    return economics.cost(candidate, step_s, min(bound.compute_s, step_s))


def goal_value(plan: Plan, cost: Cost) -> float:
    """Return by what the goal orders candidates: less is better."""
    goal = plan.goal
    return {
        "cheapest": cost.usd,
        "fastest": cost.time_s,
        "least_energy": cost.joules,
        "fewest_gpus": cost.num_gpus + cost.time_s * 1e-12,
        "trade_off": cost.usd + goal.usd_per_s * cost.time_s,
    }[goal.objective]


def keeps_goal(plan: Plan, cost: Cost) -> bool:
    """Whether a cost keeps deadline, budget and power of a plan."""
    return not misses(plan, cost)


def misses(plan: Plan, cost: Cost) -> str:
    """Say which limits of a plan a cost does not keep, and by how much; "" if it keeps all."""
    goal, limit = plan.goal, plan.constraints.max_power_w
    said = []
    if goal.deadline_s is not None and cost.time_s > goal.deadline_s:
        said.append(f"{format_duration(cost.time_s - goal.deadline_s)} too late")
    if goal.budget_usd is not None and cost.usd > goal.budget_usd:
        said.append(f"{format_money(cost.usd - goal.budget_usd)} over the budget")
    if limit is not None and cost.power_w > limit:
        said.append(f"draws {format_power(cost.power_w)}, {format_power(cost.power_w - limit)} too much")
    return " and ".join(said)


def excess(plan: Plan, cost: Cost) -> float:
    """Return by what factor a cost misses the plan's limits, the worst of them."""
    goal, limit = plan.goal, plan.constraints.max_power_w
    return max(
        cost.time_s / goal.deadline_s if goal.deadline_s else 0.0,
        cost.usd / goal.budget_usd if goal.budget_usd else 0.0,
        cost.power_w / limit if limit else 0.0,
    )
