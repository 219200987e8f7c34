"""Whether layouts that were published are what ``sim plan`` would choose: ``python -m benchmarks.published [ID...]``.

Takes runs of ``validation/runs`` whose layout their authors chose for their cluster, has the planner generate the
layouts around it that the framework had at that time (the run's own settings: sequence parallelism, overlap, dtypes,
attention), and simulates, best bound first, those whose bound is better than the best step so far. Prints for each the
published layout's step as simulated, the best one's, the gap, and in what the two differ.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import process_time
from typing import Any

import yaml

from sim.planner.bounds import Bounds
from sim.planner.load import load_plan_text
from sim.planner.schema import Plan
from sim.planner.space import Candidate, candidates, scenario_of
from sim.planner.trial import PARTS, trial
from sim.units import format_bytes

RUNS = Path(__file__).parents[1] / "validation" / "runs"
PAPERS, TITAN = "megatron_papers.yaml", "torchtitan_benchmarks.yaml"


@dataclass(frozen=True)
class Case:
    """A published run, and what is tried of each axis.

    ``slack`` is by what a step may be below the bound, which is that of a plan: with sequence parallelism, and without
    torch.compile.
    """

    id: str
    axes: Mapping[str, Any]
    file: str = PAPERS
    slack: float = 0.97


def sc21(name: str, pp: list[int], vpp: list[int], micro: list[int]) -> Case:
    """Narayanan et al., SC 2021: recomputation of whole layers, no sequence parallelism, no distributed optimizer."""
    axes = {"tp": [4, 8], "pp": pp, "vpp": vpp, "micro_batch_size": micro, "recompute": ["full"]}
    return Case(f"sc21-t1-{name}", axes)


def korthikanti(name: str, pp: list[int], vpp: list[int], micro: list[int]) -> Case:
    """Korthikanti et al., MLSys 2023: sequence parallelism and selective recomputation."""
    axes = {"tp": [4, 8], "pp": pp, "vpp": vpp, "micro_batch_size": micro, "recompute": ["selective", "full"]}
    return Case(f"korth-t5-{name}-selective", axes)


CASES = (
    sc21("7.5B", [1, 2, 4], [1, 2], [4, 8, 16]),
    sc21("39.1B", [2, 4, 8], [1, 2, 3], [1, 2, 4]),
    sc21("76.1B", [2, 4, 8], [1, 3, 5], [1, 2]),
    sc21("310.1B", [8, 16], [1, 2, 3], [1, 2]),
    sc21("529.6B", [35], [1, 3], [1, 2]),
    sc21("1008.0B", [32, 64], [1, 2], [1]),
    korthikanti("22B", [1, 2], [1, 2, 4], [1, 2, 4]),
    korthikanti("175B", [4, 8, 16], [1, 3, 6], [1, 2]),
    korthikanti("530B", [35], [1, 3], [1, 2]),
    korthikanti("1T", [32, 64], [1, 2], [1]),
    Case("llama3-t4-16384-cp1", {"tp": [8], "pp": [8, 16], "vpp": [4, 8], "micro_batch_size": [1],
                                 "shard_size": [16384], "recompute": ["none", "full"]}),
    Case("titan24-70b-n256-2D", {"tp": [2, 4, 8], "micro_batch_size": [4, 8, 16], "shard_size": [256],
                                 "recompute": ["selective-op", "full"]}, TITAN, 0.6),
)  # fmt: skip


def run_of(case: Case) -> dict[str, Any]:
    """Return the scenario of a published run."""
    text = (RUNS / case.file).read_text(encoding="utf-8")
    runs = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["runs"]
    found: dict[str, Any] = next(run["scenario"] for run in runs if run["id"] == case.id)
    return found


def plan_of(case: Case, run: Mapping[str, Any]) -> Plan:
    """Return the plan that looks for the fastest layout on the published cluster, with the published work."""
    training, cluster = run["training"], run["cluster"]
    workload = {"steps": 1000, "sequence_length": training["sequence_length"],
                "global_batch_size": training["global_batch_size"], "precision": training["precision"],
                "attention": training["attention"]}  # fmt: skip
    megatron = {"schedule": ["1f1b", "interleaved"]} if run["framework"] == "megatron" else {}
    content = {
        "model": run["model"], "workload": workload, "goal": {"fastest": True}, "frameworks": [run["framework"]],
        "candidates": {"nodes": [cluster["node"]], "num_gpus": [cluster["num_gpus"]]},
        "axes": {**case.axes, **megatron, "zero": [run["parallelism"]["zero"]]},
    }  # fmt: skip
    return load_plan_text(yaml.safe_dump(content), "published", folder=RUNS)


def as_then(run: Mapping[str, Any], scenario: dict[str, Any]) -> dict[str, Any]:
    """Return a candidate's scenario with the settings of the published run, and none that came later."""
    own = run["parallelism"]
    parallelism = {**scenario["parallelism"], "zero": own["zero"]}
    parallelism.pop("sp", None)
    if own.get("sp") and parallelism.get("tp", 1) > 1:
        parallelism["sp"] = True
    training = {**run["training"], **{key: scenario["training"][key] for key in ("micro_batch_size", "recompute")}}
    others = {key: value for key, value in run.items() if key not in ("parallelism", "training")}
    return {**others, "parallelism": parallelism, "training": training}


def needed(outcome: Mapping[str, Any]) -> int:
    """Return the device bytes that a layout needs, of one that does not fit as well."""
    over: int = outcome["capacity_bytes"] + outcome["short_bytes"]
    peak: int = outcome["peak_device_bytes"]
    return peak if outcome["fits"] else over


def better(case: Case, run: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[Candidate, dict[str, Any]]]:
    """Return layouts with shorter steps, each the best so far, best bound first, until no bound is below the best step.

    They fit; or, where the published one does not as simulated, need no more than it.
    """
    plan = plan_of(case, run)
    bounds = Bounds(plan)
    limit_s, allowed = theirs["step_s"] or inf, max(theirs["capacity_bytes"], needed(theirs))
    entries, found = [], []
    for candidate in candidates(plan):
        bound = bounds.bound(candidate)
        if bound.memory_bytes <= allowed:
            entries.append((bound.time_s, candidate))
    for bound_s, candidate in sorted(entries):
        if bound_s * case.slack >= limit_s:
            break
        outcome = trial(as_then(run, scenario_of(plan, candidate)), str(RUNS))
        if needed(outcome) <= allowed and 0 < outcome["step_s"] < limit_s:
            limit_s = outcome["step_s"]
            found.append((candidate, outcome))
    return found


def words(run: Mapping[str, Any]) -> str:
    """Return a published layout as the planner says its own."""
    axes, training = run["parallelism"], run["training"]
    said = [f"{name} {axes[name]}" for name in ("tp", "cp", "pp") if axes.get(name, 1) > 1]
    if axes.get("vpp", 1) > 1:
        said[-1] += f" x{axes['vpp']}"
    return f"{' '.join(said)} dp {axes['dp']}, microbatches of {training['micro_batch_size']}, {training['recompute']}"


def shares(outcome: Mapping[str, Any]) -> str:
    parts = {key: outcome["parts"][key] for key in PARTS}
    return ", ".join(f"{key.replace('_', ' ')} {parts[key]:.2f} s" for key in PARTS[:3])


FIGURE_13 = ((2, 32), (4, 16), (8, 8), (16, 4), (32, 2))
"""Pipeline and tensor parallelism of 162.2B on 64 GPUs (SC 2021, figure 13; examples/academic_paper_scripts/sc21 of
Megatron-LM, run_figure_13.sh)."""


def figure_13() -> None:
    """Print what the simulation says of a comparison that its authors measured: they found tp 8, a node, best."""
    base = run_of(sc21("39.1B", [], [], []))
    model = {**base["model"], "hidden_size": 20480, "intermediate_size": 81920, "num_hidden_layers": 32,
             "num_attention_heads": 128, "num_key_value_heads": 128}  # fmt: skip
    print("\n| figure 13 | " + " | ".join(f"tp {tp} pp {pp}" for pp, tp in FIGURE_13) + " |\n|---|" + "---|" * 5)
    for batch in (32, 128):
        steps = []
        for pp, tp in FIGURE_13:
            run = {**base, "model": model, "cluster": {**base["cluster"], "num_gpus": 64},
                   "parallelism": {**base["parallelism"], "dp": 1, "tp": tp, "pp": pp},
                   "training": {**base["training"], "micro_batch_size": 1, "global_batch_size": batch}}  # fmt: skip
            steps.append(trial(run, str(RUNS))["step_s"])
        print(f"| batch {batch} | " + " | ".join(f"{step:.2f} s" for step in steps) + " |", flush=True)


def main() -> None:
    gc.disable()
    if sys.argv[1:] == ["figure-13"]:
        figure_13()
        return
    chosen = [case for case in CASES if not sys.argv[1:] or case.id in sys.argv[1:]]
    print("| run | published layout | step | best found | step | gap |\n|---|---|---|---|---|---|")
    for case in chosen:
        began = process_time()
        run = run_of(case)
        theirs = trial(run, str(RUNS))
        tried = better(case, run, theirs)
        best = min(tried, key=lambda one: one[1]["step_s"], default=None)
        outcome = best[1] if best else theirs
        gap = theirs["step_s"] / (outcome["step_s"] or inf) - 1
        mine = best[0].words().partition(" ")[2] if best else "the same"
        fits = "" if theirs["fits"] else f", {format_bytes(needed(theirs) - theirs['capacity_bytes'])} over"
        step = f"{theirs['step_s']:.2f} s{fits}"
        print(f"| {case.id} | {words(run)} | {step} | {mine} | {outcome['step_s']:.2f} s | {gap:.1%} |", flush=True)
        print(f"{case.id}: {process_time() - began:.0f} CPU s; published: {shares(theirs)}; best: {shares(outcome)}",
              file=sys.stderr, flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
