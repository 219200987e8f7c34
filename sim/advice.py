"""Where a scenario does not fit: which changes would make it fit, each tried by simulation.

A remedy is what a user would type: ``--set`` options over the same file. So whatever is printed here can be run as it
stands, and gives the figures that stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sim.errors import ScenarioError
from sim.pipeline import Simulation, simulate
from sim.scenario.load import load_scenario
from sim.scenario.schema import Scenario
from sim.units import format_bytes

MAX_REMEDIES = 5
EXPANDED = ("allocator.expandable_segments=true",)


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change, tried: its ``--set`` options, and what the simulation of it said."""

    words: str
    overrides: tuple[str, ...]
    fits: bool
    peak_device_bytes: int
    time_s: float
    tokens_per_s: float
    host_short_bytes: int = 0
    """What a node's host memory lacks."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "change": self.words,
            "set": list(self.overrides),
            "fits": self.fits,
            "peak_device_bytes": self.peak_device_bytes,
            "time_s": self.time_s,
            "tokens_per_s": self.tokens_per_s,
        }


Change = tuple[str, tuple[str, ...]]


def remedies_for(
    file: Path, overrides: Sequence[str], simulation: Simulation, step: Callable[[str], None]
) -> tuple[Remedy, ...]:
    """Return changes that make the scenario fit, fastest training first.

    Single changes are tried first; only where none of them is enough, they are added up, the one that saves most
    first, until it fits. If nothing does, the last entry is how far all of them together get (``fits`` is False).
    ``step`` is called with the words of each trial before it runs.
    """
    asked = list(changes(simulation.scenario))
    # what only spares fragmentation is not enough where tensors alone are too much; together with others it may be
    vain = [change for change in asked if change[1] == EXPANDED and _tensors_alone_exceed(simulation)]
    tried = [
        remedy for change in asked if change not in vain and (remedy := _try(file, overrides, change, step, simulation))
    ]
    enough = [remedy for remedy in tried if remedy.fits]
    if not enough:
        tried += [remedy for change in vain if (remedy := _try(file, overrides, change, step, simulation))]
        enough = _together(file, overrides, tried, step, simulation)
    return tuple(map(_with_host, sorted(enough, key=lambda r: (-r.tokens_per_s, r.words))[:MAX_REMEDIES]))


def _tensors_alone_exceed(simulation: Simulation) -> bool:
    """Whether the tensors of some rank at its peak, and what its process holds beside, are more than the GPU has."""
    outside = ("cuda_context", "nccl", "libraries")
    return any(
        held.peak_allocated_bytes - held.at_peak["rounding"] + sum(held.beside[name] for name in outside)
        > simulation.scenario.cluster.gpu.total_memory_bytes
        for held in simulation.footprints
    )


def _with_host(remedy: Remedy) -> Remedy:
    """Say where it is the host's memory that does not suffice."""
    if not remedy.host_short_bytes:
        return remedy
    short = format_bytes(remedy.host_short_bytes)
    return replace(remedy, words=f"{remedy.words}; host memory lacks {short}")


def _together(
    file: Path,
    overrides: Sequence[str],
    tried: Sequence[Remedy],
    step: Callable[[str], None],
    simulation: Simulation,
) -> list[Remedy]:
    sum_: Remedy | None = None
    for remedy in sorted(tried, key=lambda r: (r.peak_device_bytes, r.words)):
        if sum_ is None:
            sum_ = remedy
            continue
        if {o.partition("=")[0] for o in sum_.overrides} & {o.partition("=")[0] for o in remedy.overrides}:
            continue
        both = (f"{sum_.words}, and {remedy.words}", (*sum_.overrides, *remedy.overrides))
        better = _try(file, overrides, both, step, simulation)
        if better and better.peak_device_bytes < sum_.peak_device_bytes:
            sum_ = better
        if sum_.fits:
            break
    return [sum_] if sum_ else []


def _try(
    file: Path, overrides: Sequence[str], change: Change, step: Callable[[str], None], simulation: Simulation
) -> Remedy | None:
    words, options = change
    step(words)
    try:
        report = simulate(load_scenario(file, (*overrides, *options)), like=simulation).report
    except ScenarioError:
        return None  # the change is not legal here (a ds_config that says otherwise, a batch that does not divide)
    return Remedy(
        words,
        options,
        report.fits,
        report.fullest.peak_device_bytes,
        report.time_s,
        report.tokens_per_step / report.time_s,
        0 if report.fits_host else report.host_bytes_per_node - report.host_capacity_bytes,
    )


def changes(scenario: Scenario) -> Iterator[Change]:
    """Yield the changes worth trying, cheapest for the user first."""
    training, parallelism, cluster = scenario.training, scenario.parallelism, scenario.cluster
    if not scenario.allocator.expandable_segments:
        yield "let the allocator expand its segments", EXPANDED
    if training.recompute == "none":
        yield "recompute activations", ("training.recompute=full",)
    half = training.micro_batch_size // 2
    while half >= 1:
        yield f"microbatches of {half}", (f"training.micro_batch_size={half}",)
        half //= 2
    if scenario.framework == "deepspeed":
        for stage in range(parallelism.zero + 1, 4):
            yield f"ZeRO-{stage}", (f"parallelism.zero={stage}",)
        bucket = scenario.deepspeed.reduce_bucket_size
        if bucket > 50_000_000:
            yield "smaller reduce buckets", ("deepspeed.zero_optimization.reduce_bucket_size=50000000",)
        if parallelism.zero and scenario.deepspeed.offload_optimizer == "none":
            yield "optimizer states in host memory", ("deepspeed.zero_optimization.offload_optimizer.device=cpu",)
        if parallelism.zero:
            yield (
                f"twice the nodes ({2 * cluster.num_nodes})",
                (f"cluster.num_nodes={2 * cluster.num_nodes}", f"parallelism.dp={2 * parallelism.dp}"),
            )
    if scenario.framework == "ddp":
        for stage in (1, 2, 3):
            yield f"DeepSpeed ZeRO-{stage}", ("framework=deepspeed", f"parallelism.zero={stage}")
        if training.recompute == "none":
            yield (
                "DeepSpeed ZeRO-3 and recompute",
                ("framework=deepspeed", "parallelism.zero=3", "training.recompute=full"),
            )
