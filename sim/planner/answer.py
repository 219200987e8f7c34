"""What a search means: what to buy, how to run it, why the others lose, and what would change that. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from sim.errors import ScenarioError
from sim.planner.bounds import Bounds
from sim.planner.economics import Economics
from sim.planner.goodput import distribution
from sim.planner.schema import Plan, Site
from sim.planner.search import Discarded, Runner, Search, Tried, excess, goal_value, keeps_goal, misses
from sim.planner.sensitivity import flips, memory_margin, on_slower_networks, optimistic
from sim.planner.space import Candidate, candidates, scenario_of
from sim.report.certainty import COVERAGE
from sim.units import format_bytes, format_duration, format_energy, format_money, format_si

SCHEMA_VERSION = 1


def answer(search: Search, runner: Runner, say: Callable[[str], None] = lambda words: None) -> dict[str, Any]:
    """Return the answer as ``sim plan --json`` prints it, without how long it took.

    ``runner`` simulates the recommended candidate on slower networks.
    """
    plan = search.plan
    economics = Economics(plan)
    fitting = [one for one in search.tried if one.cost is not None]
    ranked = sorted(fitting, key=lambda one: (goal_value(plan, one.cost), one.candidate))  # type: ignore[arg-type]
    best = next((one for one in ranked if one.cost is not None and keeps_goal(plan, one.cost)), None)
    front = search.front
    reference = best or (ranked[0] if ranked else None)
    entries = {id(one): entry(plan, one, economics, _why(plan, one, reference)) for one in ranked}
    say("simulating whole runs")
    for one in {id(one): one for one in (*([best] if best else []), *front)}.values():
        entries[id(one)]["run"]["distribution"] = _distribution(plan, one, economics)
    rejected = _all_rejected(search, economics, {one.candidate.site for one in fitting})
    return {
        "schema_version": SCHEMA_VERSION,
        "plan": plan.name,
        "question": question(plan),
        "recommended": {**entries[id(best)], "words": recommendation(plan, best, ranked, search)} if best else None,
        "nothing": None if best else _nothing(plan, ranked, search),
        "sensitivity": _sensitivity(search, best, fitting, runner, say) if best else None,
        "front": [entries[id(one)] for one in front],
        "ranked": [entries[id(one)] for one in ranked],
        "rejected": rejected,
        "searched": {
            "candidates": search.num_candidates,
            "pruned": len(search.discarded),
            "pruned_by_memory": sum(bool(one.over_bytes) for one in search.discarded),
            "simulated": len(search.tried),
        },
        "assumptions": list(plan.assumptions),
    }


def question(plan: Plan) -> str:
    """Return the plan as a question of one sentence."""
    work, goal = plan.workload, plan.goal
    amount = f"{format_si(work.tokens).strip()} tokens" if work.tokens else f"{work.steps:,} steps"
    wanted = {
        "cheapest": "for the least money",
        "fastest": "soonest",
        "least_energy": "with the least energy",
        "fewest_gpus": "on the fewest GPUs",
        "trade_off": f"if a day sooner is worth {format_money(goal.usd_per_s * 86400)}",
    }[goal.objective]
    limits = ""
    if goal.deadline_s is not None:
        limits += f" within {format_duration(goal.deadline_s)}"
    if goal.budget_usd is not None:
        limits += f"{' and' if limits else ''} for at most {format_money(goal.budget_usd)}"
    return f"What trains {model_name(plan)} on {amount}{limits}, {wanted}?"


def model_name(plan: Plan) -> str:
    return plan.draft.name or "the model"


def cluster_words(plan: Plan, candidate: Candidate) -> str:
    """Return "64 x dgx-h100 (512 GPUs)"."""
    site = plan.sites[candidate.site]
    nodes = -(-candidate.num_gpus // site.node.num_gpus)
    if candidate.num_gpus < site.node.num_gpus:
        return f"{candidate.num_gpus} GPUs of one {site.name}"
    return f"{nodes:,} x {site.name} ({candidate.num_gpus:,} GPUs)"


def entry(plan: Plan, one: Tried, economics: Economics, why: str) -> dict[str, Any]:
    """Return a candidate that fits, with its figures and its scenario."""
    cost, c, outcome = one.cost, one.candidate, one.outcome
    assert cost is not None
    site = plan.sites[c.site]
    reliable = economics.reliability(c.site, c.num_gpus)
    return {
        "cluster": cluster_words(plan, c),
        "node": site.node.name,
        "network": site.network.name if site.network and c.num_gpus > site.node.num_gpus else None,
        "num_gpus": c.num_gpus,
        "strategy": c.words(),
        "time_s": cost.time_s,
        "usd": cost.usd,
        "joules": cost.joules,
        "power_w": cost.power_w,
        "keeps_goal": keeps_goal(plan, cost),
        "why": why,
        "step": {"time_s": outcome["step_s"], "band_s": outcome["step_band_s"],
                 **{f"{k}_s": v for k, v in outcome["parts"].items()}, "mfu": outcome["mfu"],
                 "tokens_per_s": outcome["tokens_per_s"]},
        "memory": {"peak_device_bytes": outcome["peak_device_bytes"], "capacity_bytes": outcome["capacity_bytes"],
                   "probability_fits": outcome["probability_fits"], "at_peak": dict(outcome["at_peak"]),
                   "beside": dict(outcome["beside"])},
        "money": {"gpus": cost.usd_gpus, "power": cost.usd_power, "people": cost.usd_people,
                  "storage": cost.usd_storage, "provider": site.offer.provider, "term": site.offer.term,
                  "usd_per_gpu_hour": site.offer.usd_per_gpu_hour, "owned_gpus": site.owned_gpus,
                  "date": site.offer.date,
                  "source": site.offer.source},
        "run": {"goodput": cost.goodput, "mtbf_s": reliable.mtbf_s, "checkpoint_s": reliable.checkpoint_s,
                "checkpoint_interval_s": reliable.interval_s, "recovery_s": reliable.recovery_s,
                "waiting_s": reliable.waiting_s,
                "spare_nodes": reliable.spare_nodes, "straggler_factor": reliable.straggler_factor},
        "scenario": scenario_of(plan, c),
    }  # fmt: skip


def _distribution(plan: Plan, one: Tried, economics: Economics) -> dict[str, Any]:
    reliable = economics.reliability(one.candidate.site, one.candidate.num_gpus)
    steps = plan.workload.num_steps(one.candidate.global_batch_size)
    return asdict(distribution(plan, reliable, steps * one.outcome["step_s"] * reliable.straggler_factor))


def _sensitivity(
    search: Search, best: Tried, fitting: Sequence[Tried], runner: Runner, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return what would change the recommendation, as data and in words."""
    say("looking for what would change it")
    plan = search.plan
    found = flips(plan, best, fitting, optimistic(plan, search))
    margin = memory_margin(best)
    words: list[str] = []
    data: list[dict[str, Any]] = []
    for flip in found:
        then = f"{cluster_words(plan, flip.then.candidate)}, {flip.then.candidate.words()}" if flip.then else None
        sure = flip.surely if flip.at_least else flip
        data.append({
            "what": flip.what, "flips_at": flip.factor, "at_least": flip.at_least, "then": then,
            "surely_at": sure.factor if sure else None, "value_change_of_10_percent": flip.value_change,
        })  # fmt: skip
        if flip.factor is None:
            continue
        result = f"at {_change(flip.factor)}, " + (
            f"{then} {'may be' if flip.at_least else 'is'} better" if then else "nothing keeps the goal"
        )
        if flip.at_least and sure is not None and sure.factor is not None:
            result += f"; at {_change(sure.factor)} " + (
                f"{cluster_words(plan, sure.then.candidate)} is" if sure.then else "nothing keeps the goal"
            )
        if words and words[-1].endswith(f": {result}"):  # what is rented costs as much more as it is slower
            words[-1] = f"{words[-1].partition(': ')[0]}, or {flip.what}: {result}"
        else:
            words.append(f"{flip.what}: {result}")
    networks = []
    measured = on_slower_networks(plan, best, runner)
    for share, outcome in measured[1:]:
        slower = outcome["step_s"] / measured[0][1]["step_s"] - 1
        networks.append({"bytes_per_s": share, "step_change": slower, "fits": outcome["fits"]})
    if networks:
        said = ", ".join(f"{n['step_change']:+.1%} with {n['bytes_per_s']:.0%} of its bytes" for n in networks)
        words.append(f"the network between nodes: the step is {said}")
    words.append(f"memory: it still fits if {margin:.1%} more is needed than was simulated")
    return {"flips": data, "networks": networks, "memory_margin": margin, "words": words}


def _change(factor: float) -> str:
    """Return "12.5% more" of a factor."""
    change = factor - 1
    return f"{abs(change):.1%} {'more' if change > 0 else 'less'}" if abs(change) >= 5e-4 else "any change"


# --- words ---------------------------------------------------------------------------------------


def recommendation(plan: Plan, best: Tried, ranked: Sequence[Tried], search: Search) -> str:
    """Return the recommendation with the three figures that carry it: time, money, and what the step reaches."""
    cost, c = best.cost, best.candidate
    assert cost is not None
    economics = Economics(plan)
    text = (
        f"{_acquire(plan, c, economics)} and run {c.words()}. "
        f"It takes {format_duration(cost.time_s)}, costs {format_money(cost.usd)} and draws "
        f"{format_energy(cost.joules)}: a step of {format_duration(best.outcome['step_s'])} reaches "
        f"{best.outcome['mfu']:.0%} of the GPUs' peak."
    )
    if (band := best.outcome["step_band_s"]) is not None:
        low, high = (time_s / best.outcome["step_s"] - 1 for time_s in band)
        text += f" {round(10 * COVERAGE)} like runs of 10 would take from {-low:.0%} less to {high:.0%} more"
        text += f"{_at_worst(plan, best, economics, band[1])}."
    if (sure := best.outcome["probability_fits"]) is not None:
        text += f" It fits with a probability of {min(max(sure, 0.001), 0.999):.1%}."
    other = next((o for o in ranked if o is not best and o.candidate.site != c.site), None)
    if other is not None and other.cost is not None:
        name = plan.sites[other.candidate.site].name
        text += f" On {name} it would take {format_duration(other.cost.time_s)} and cost "
        text += f"{format_money(other.cost.usd)}."
    return text


def _acquire(plan: Plan, c: Candidate, economics: Economics) -> str:
    """Say what to rent, buy or take: what is owned costs no rent, spare nodes included."""
    site, words = plan.sites[c.site], cluster_words(plan, c)
    missing = economics.num_paid(c) - site.owned_gpus
    if missing <= 0:
        return f"Take {words}, which you own,"
    how = {"bought": "Buy", "given": "Take", "unknown": "Take"}.get(site.offer.term, "Rent")
    from_ = f" from {site.offer.provider} ({site.offer.term})" if how == "Rent" else ""
    price = f" at {site.offer.usd_per_gpu_hour:.2f} USD a GPU-hour" if site.offer.usd_per_gpu_hour else ""
    if site.owned_gpus >= c.num_gpus:
        price = price or " whose price is not known"
        return f"Take {words}, which you own, {how.lower()} {missing:,} spare GPUs{from_}{price}"
    if site.owned_gpus:
        return f"Take the {site.owned_gpus:,} GPUs that you own and {how.lower()} the rest of {words}{from_}{price},"
    return f"{how} {words}{from_}{price}"


def _at_worst(plan: Plan, best: Tried, economics: Economics, step_s: float) -> str:
    """Say whether deadline and budget are kept at the slow end of the step's band; "" without such limits."""
    limits = [name for name, limit in (("deadline", plan.goal.deadline_s), ("budget", plan.goal.budget_usd)) if limit]
    if not limits:
        return ""
    missed = misses(plan, economics.cost(best.candidate, step_s, min(best.bound.compute_s, step_s)))
    return f", and then be {missed}" if missed else f", which keeps the {' and the '.join(limits)}"


def _nothing(plan: Plan, ranked: Sequence[Tried], search: Search) -> str:
    """Say what comes nearest where nothing keeps the plan's limits."""
    more = _with_more(plan)
    if not ranked:
        near = min(search.tried, key=lambda t: t.outcome["short_bytes"] or 1 << 62, default=None)
        if near is not None:
            return f"Nothing fits. Nearest: {cluster_words(plan, near.candidate)}, {near.candidate.words()}: " + (
                _does_not_fit(plan, near) + f".{more}"
            )
        best = min(search.discarded, key=lambda d: d.over_bytes, default=None)
        if best is None:
            return (
                "No candidate is valid: nothing of frameworks and axes divides the model, the batch and the GPUs that "
                "the plan names. Leave axes out, or name other num_gpus."
            )
        return (
            f"Nothing fits. Nearest: {cluster_words(plan, best.candidate)}, {best.candidate.words()}, "
            f"{format_bytes(best.over_bytes)} over on stage {best.bound.stage} at the least.{more}"
        )
    near_one = min(ranked, key=lambda one: excess(plan, one.cost) if one.cost else 0.0)
    assert near_one.cost is not None
    return (
        f"Nothing keeps the goal. Nearest: {cluster_words(plan, near_one.candidate)}, {near_one.candidate.words()}: "
        f"{misses(plan, near_one.cost)}.{more}"
    )


MOST_GPUS = 1 << 17


def _with_more(plan: Plan) -> str:
    """Say how many GPUs there must be at least, by bounds: the first doubling of a plan's most with which one may do.

    "" if no doubling helps, or the plan allows none.
    """
    economics = Economics(plan)
    for doubling in range(1, 8):
        sites = []
        for site in plan.sites:
            count = max(site.num_gpus, default=0) << doubling
            alone = site.network is None and count > site.node.num_gpus
            allowed = 0 < count <= (plan.constraints.max_gpus or MOST_GPUS) and not alone
            sites.append(site.model_copy(update={"num_gpus": (count,) if allowed else ()}))
        larger = plan.model_copy(update={"sites": tuple(sites)})
        bounds, found = Bounds(larger), []
        for c in candidates(larger):
            try:
                bound = bounds.bound(c)
            except ScenarioError:
                continue
            room = plan.sites[c.site].gpu.total_memory_bytes * (1 - plan.constraints.memory_margin)
            cost = economics.cost(c, bound.time_s, min(bound.compute_s, bound.time_s))
            if bound.memory_bytes <= room and keeps_goal(plan, cost):
                found.append((goal_value(plan, cost), c, cost))
        if found:
            _, c, cost = min(found, key=lambda one: one[:2])
            return (
                f" {cluster_words(larger, c)} may do: at best {format_duration(cost.time_s)} and "
                f"{format_money(cost.usd)}."
            )
    return ""


def _why(plan: Plan, one: Tried, best: Tried | None) -> str:
    """Say why a candidate that fits is not the one, by its largest loss."""
    assert one.cost is not None
    if best is None or one is best or best.cost is None:
        return misses(plan, one.cost) if not keeps_goal(plan, one.cost) else ""
    said = []
    if not keeps_goal(plan, one.cost):
        said.append(misses(plan, one.cost))
    else:
        mine, theirs = goal_value(plan, one.cost), goal_value(plan, best.cost)
        word = {
            "cheapest": "dearer", "fastest": "slower", "least_energy": "more energy", "fewest_gpus": "more GPUs",
            "trade_off": "worse",
        }[plan.goal.objective]  # fmt: skip
        more = mine / theirs - 1 if theirs else 0.0
        said.append(f"{more:.1%} {word}" if more >= 0.0005 else f"as good within {max(more, 0):.2%}")
    if loss := _largest_loss(plan, one):
        said.append(loss)
    return "; ".join(said)


AXES_IN_WORDS = {
    "tp": "tensor parallelism", "dp": "data parallelism", "pp": "the pipeline's messages", "cp": "context parallelism",
    "dp_cp": "data parallelism", "embedding": "tied embeddings", "world": "the norm of the gradients",
}  # fmt: skip
WORTH_SAYING = 0.10


def _largest_loss(plan: Plan, one: Tried) -> str:
    """Name the largest part of the step in which nothing useful is computed, if it is worth it."""
    outcome, c = one.outcome, one.candidate
    step = outcome["step_s"]
    site = plan.sites[c.site]
    exposed, bubble = outcome["parts"]["exposed_communication"] / step, outcome["parts"]["bubble"] / step
    if max(exposed, bubble) < WORTH_SAYING:
        if c.recompute == "full":
            return "a quarter of its kernels' time is spent on computing activations again"
        return ""
    if bubble > exposed:
        return f"the pipeline of {c.pp} stages is empty for {bubble:.0%} of the step"
    axis = max(outcome["exposed"], key=lambda name: (outcome["exposed"][name], name), default="dp")
    short = axis.split(".")[0]
    name = AXES_IN_WORDS.get(short, axis)
    inside = c.num_gpus <= site.node.num_gpus or (short == "tp" and c.tp <= site.node.num_gpus)
    over = (
        _inside(site, c.tp if short == "tp" else c.num_gpus) if inside else site.network.name if site.network else "it"
    )
    return f"{name} across {over}: {exposed:.0%} of the step is exposed communication"


def _inside(site: Site, gpus: int) -> str:
    """Return what so many GPUs of a node exchange over: bridges join two, links between processors none."""
    gpu = {name for name, kind in site.node.devices if kind == "gpu"}
    kinds = {kind for one, other, kind, _ in site.node.wires if one in gpu or other in gpu}
    if any(kind.startswith("nvlink") and (gpus <= 2 or "bridge" not in kind) for kind in kinds):
        return "NVLink"
    return "xGMI" if any(kind.startswith("xgmi") for kind in kinds) else "PCIe"


def _does_not_fit(plan: Plan, one: Tried) -> str:
    outcome = one.outcome
    if "refused" in outcome:
        return str(outcome["refused"])
    if outcome["short_bytes"]:
        return f"does not fit: {format_bytes(outcome['short_bytes'])} over on stage {outcome['short_stage']}"
    if outcome["host_short_bytes"]:
        return f"does not fit: a node's host memory lacks {format_bytes(outcome['host_short_bytes'])}"
    free = outcome["capacity_bytes"] - outcome["peak_device_bytes"]
    return (
        f"fits with {format_bytes(max(0, free))} free, less than the margin of {plan.constraints.memory_margin:.0%} "
        "that the plan asks for"
    )


def _discarded(plan: Plan, one: Discarded) -> str:
    if one.by is None and not one.over_bytes:
        return f"at best {format_duration(one.best.time_s)} and {format_money(one.best.usd)}: {misses(plan, one.best)}"
    if one.by is None:
        return f"does not fit: at least {format_bytes(one.over_bytes)} over on stage {one.bound.stage}"
    assert one.by.cost is not None
    theirs = one.by.cost
    return (
        f"at best {format_duration(one.best.time_s)} and {format_money(one.best.usd)}; "
        f"{cluster_words(plan, one.by.candidate)} with {one.by.candidate.words()} takes "
        f"{format_duration(theirs.time_s)} and {format_money(theirs.usd)}"
    )


def _rejected(plan: Plan, candidate: Candidate, why: str, nearest: str) -> dict[str, Any]:
    found = {"candidate": f"{cluster_words(plan, candidate)}: {candidate.words()}", "why": why}
    return {**found, "nearest_change": nearest} if nearest else found


def _all_rejected(search: Search, economics: Economics, ranked: set[int]) -> list[dict[str, Any]]:
    """Return what is not ranked, and why: the best of each machine and framework first, of machines not ranked before.

    What cannot fit comes after what can.
    """
    plan = search.plan
    entries: list[tuple[tuple[int, int, str], tuple[int, float, Candidate], Tried | Discarded]] = []
    losers: list[Tried | Discarded] = [one for one in search.tried if one.cost is None]
    losers += search.discarded
    for one in losers:
        c, bound = one.candidate, one.bound
        if isinstance(one, Discarded):
            best = one.best
        else:
            best = economics.cost(c, bound.time_s, min(bound.compute_s, bound.time_s))
        short = one.outcome["short_bytes"] or 1 if isinstance(one, Tried) else one.over_bytes
        entries.append(((c.site, c.num_gpus, c.framework), (short, goal_value(plan, best), c), one))
    groups: dict[tuple[int, int, str], list[tuple[tuple[int, float, Candidate], Tried | Discarded]]] = {}
    for group, place, one in sorted(entries, key=lambda entry: entry[:2]):
        groups.setdefault(group, []).append((place, one))
    found: list[tuple[tuple[int, bool, int, float, Candidate], Tried | Discarded]] = []
    for group, members in groups.items():
        found += [((nth, group[0] in ranked, *place), one) for nth, (place, one) in enumerate(members)]
    rejected = []
    for _, one in sorted(found, key=lambda entry: entry[0]):
        if isinstance(one, Tried):
            why, change = _does_not_fit(plan, one), True
        else:
            why, change = _discarded(plan, one), bool(one.over_bytes)
        rejected.append(_rejected(plan, one.candidate, why, _nearest(search, one.candidate) if change else ""))
    return [*rejected, *(_rejected(plan, candidate, why, "") for candidate, why in search.refused)]


_CHANGES = ("recompute", "micro_batch_size", "zero", "shard_size", "vpp", "tp", "pp", "cp")


def _nearest(search: Search, candidate: Candidate) -> str:
    """Return the smallest change of a candidate that does not fit which was simulated and fits ("" if none was)."""
    best: tuple[int, int, Candidate] | None = None
    for one in search.tried:
        other = one.candidate
        if one.cost is None or (other.site, other.num_gpus, other.framework) != (
            candidate.site, candidate.num_gpus, candidate.framework,
        ):  # fmt: skip
            continue
        changed = [i for i, name in enumerate(_CHANGES) if getattr(other, name) != getattr(candidate, name)]
        if changed and (best is None or (len(changed), sum(changed), other) < best):
            best = (len(changed), sum(changed), other)
    if best is None or best[0] > 3:
        return ""
    other = best[2]
    names = [name for name in _CHANGES if getattr(other, name) != getattr(candidate, name)]
    return "fits with " + ", ".join(f"{name} {getattr(other, name)}" for name in names)
