"""How sure the recommendation is: what changes it, and how much of that it takes.

Every simulated candidate is priced again with one thing changed; nothing is simulated anew but the recommended one on
slower networks. A *flip* is the smallest factor, found by bisection, at which another candidate is best. What bounds
excluded of a kind of node is represented by its best bound: it takes that much at the least; and by the one of it that
was simulated: with that much another is best for certain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sim.planner.economics import Cost, Economics
from sim.planner.schema import Plan
from sim.planner.search import Discarded, Runner, Search, Tried, goal_value, keeps_goal
from sim.planner.space import Candidate, scenario_of

FURTHEST = 4.0
"""Factors beyond this are not looked for."""
PRECISION = 1e-3
STEPS = 24
"""Factors that are looked at between 1 and the furthest, before the first flip is narrowed down."""

Change = Callable[[Plan, float], Plan]


@dataclass(frozen=True, slots=True)
class Flip:
    """What is changed (in words), its factor, and who is best then (None: nothing keeps the goal any more)."""

    what: str
    factor: float | None
    then: Tried | None
    value_change: float
    """By how much 10 % more of it changes the recommended one's value."""
    at_least: bool = False
    """Whether it rests on a bound and not on a simulation."""
    surely: Flip | None = None
    """Then: where something that was simulated is best instead."""


def _priced(plan: Plan, one: Tried, economics: Economics, slower: dict[int, float]) -> Cost:
    step_s = one.outcome["step_s"] * slower.get(one.candidate.site, 1.0)
    return economics.cost(one.candidate, step_s, min(one.bound.compute_s, step_s))


def best_of(plan: Plan, fitting: Sequence[Tried], slower: dict[int, float] | None = None) -> Tried | None:
    """Return who is best under a changed plan, the steps of some sites longer by a factor."""
    economics = Economics(plan)
    found: tuple[float, Tried] | None = None
    for one in fitting:
        cost = _priced(plan, one, economics, slower or {})
        if keeps_goal(plan, cost):
            value = goal_value(plan, cost)
            if found is None or (value, one.candidate) < (found[0], found[1].candidate):
                found = (value, one)
    return found[1] if found else None


def optimistic(plan: Plan, search: Search) -> list[Tried]:
    """Return the best bound of what was not simulated of each kind of node, as if it were an outcome.

    Only where nothing that was simulated of that kind is as good.
    """
    found: dict[int, Discarded] = {}
    for one in search.discarded:
        site = one.candidate.site
        if not one.over_bytes and (
            site not in found or _place(plan, one.best, one) < _place(plan, found[site].best, found[site])
        ):
            found[site] = one
    for tried in search.tried:
        rival = found.get(tried.candidate.site)
        if rival and tried.cost is not None and _place(plan, tried.cost, tried) <= _place(plan, rival.best, rival):
            del found[tried.candidate.site]
    return [Tried(one.candidate, one.bound, {"step_s": one.bound.time_s}, one.best) for _, one in sorted(found.items())]


def _place(plan: Plan, cost: Cost, one: Tried | Discarded) -> tuple[bool, float, Candidate]:
    return not keeps_goal(plan, cost), goal_value(plan, cost), one.candidate


def flips(plan: Plan, best: Tried, fitting: Sequence[Tried], bounded: Sequence[Tried] = ()) -> list[Flip]:
    """Return what changes the recommendation: price, speed, failures, power, and how much of each.

    ``bounded`` are the representatives of what was not simulated (``optimistic``).
    """
    site = best.candidate.site
    name = plan.sites[site].name

    def price(of: int) -> Change:
        def change(plan: Plan, factor: float) -> Plan:
            sites = list(plan.sites)
            offer = sites[of].offer
            scaled = {"usd_per_gpu_hour": offer.usd_per_gpu_hour * factor, "usd_per_gpu": offer.usd_per_gpu * factor}
            sites[of] = sites[of].model_copy(update={"offer": offer.model_copy(update=scaled)})
            return plan.model_copy(update={"sites": tuple(sites)})

        return change

    def failures(plan: Plan, factor: float) -> Plan:
        old = plan.failures
        scaled = {"gpu_mtbf_s": old.gpu_mtbf_s / factor, "node_mtbf_s": old.node_mtbf_s / factor}
        return plan.model_copy(update={"failures": old.model_copy(update=scaled)})

    def power(plan: Plan, factor: float) -> Plan:
        scaled = {"usd_per_kwh": plan.prices.usd_per_kwh * factor}
        return plan.model_copy(update={"prices": plan.prices.model_copy(update=scaled)})

    def same(plan: Plan, factor: float) -> Plan:
        return plan

    of = {one.candidate.site: one for one in bounded}
    others = [one for rival, one in of.items() if rival != site]

    def found(what: str, change: Change, rivals: Sequence[Tried], upwards: bool, slows: int | None = None) -> Flip:
        """Where something is best instead, and where what was simulated is."""
        sure = _flip(plan, best, fitting, what, change, upwards=upwards, slows=slows)
        if not rivals:
            return sure
        first = _flip(plan, best, [*fitting, *rivals], what, change, upwards=upwards, slows=slows)
        if first.factor is None or first.then is None or not any(first.then is one for one in rivals):
            return first
        return replace(first, at_least=True, surely=sure)

    flipped = [
        found(f"the price of {name}", price(site), others, True),
        found(f"the step on {name} (its MFU)", same, others, True, site),
    ]
    for rival in sorted({one.candidate.site for one in (*fitting, *bounded)} - {site}):
        other = plan.sites[rival].name
        mine = [of[rival]] if rival in of else []
        flipped.append(found(f"the price of {other}", price(rival), mine, False))
        flipped.append(found(f"the step on {other} (its MFU)", same, mine, False, rival))
    flipped.append(_flip(plan, best, fitting, "the rate of failures", failures, upwards=True))
    if any(s.offer.pays_power or s.owned_gpus for s in plan.sites):
        flipped.append(_flip(plan, best, fitting, "the price of power", power, upwards=True))
    return flipped


def _flip(
    plan: Plan,
    best: Tried,
    fitting: Sequence[Tried],
    what: str,
    change: Change,
    *,
    upwards: bool,
    slows: int | None = None,
) -> Flip:
    def winner(factor: float) -> Tried | None:
        return best_of(change(plan, factor), fitting, {slows: factor} if slows is not None else None)

    def value(factor: float) -> float:
        changed = change(plan, factor)
        slower = {slows: factor} if slows is not None else {}
        return goal_value(changed, _priced(changed, best, Economics(changed), slower))

    today = value(1.0)
    moved = value(1.1 if upwards else 1 / 1.1) / today - 1 if today else 0.0
    low = 1.0
    for step in range(1, STEPS + 1):
        high = FURTHEST ** (step / STEPS)
        if winner(high if upwards else 1 / high) is not best:
            break
        low = high
    else:
        return Flip(what, None, None, moved)
    while high / low > 1 + PRECISION:
        middle = (low * high) ** 0.5
        if winner(middle if upwards else 1 / middle) is best:
            low = middle
        else:
            high = middle
    factor = high if upwards else 1 / high
    return Flip(what, factor, winner(factor), moved)


def memory_margin(best: Tried) -> float:
    """Return the share by which memory may exceed what was simulated."""
    return float(best.outcome["capacity_bytes"] / best.outcome["peak_device_bytes"] - 1)


def on_slower_networks(
    plan: Plan, best: Tried, runner: Runner, shares: Sequence[float] = (1.0, 0.5, 0.25)
) -> list[tuple[float, dict[str, Any]]]:
    """Return the recommended one's outcomes on networks that carry a share of its own's bytes per second.

    The first is its own network, written in words as the others are: they compare with it.
    """
    site, c = plan.sites[best.candidate.site], best.candidate
    network = site.network
    if network is None or c.num_gpus <= site.node.num_gpus:
        return []
    fabric = _FABRICS.get(network.fabric)
    if fabric is None or not network.line_bytes_per_s or network.name != site.node.default_network:
        return []  # words say the rate of a NIC of the node's usual network alone
    scenarios = []
    for share in shares:
        scenario = scenario_of(plan, c)
        words = f"{network.line_bytes_per_s * 8e-9 * share:g} Gbit/s {fabric} per NIC"
        scenarios.append({**scenario, "cluster": {**scenario["cluster"], "network": words}})
    return list(zip(shares, runner.run(scenarios, plan.folder), strict=True))


_FABRICS = {"infiniband": "InfiniBand", "roce": "RoCE", "ethernet": "Ethernet", "efa": "EFA"}
