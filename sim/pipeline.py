"""The whole program on one page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sim.cluster.topology import Cluster, build_cluster, degrade
from sim.cost.model import CostModel, CostSettings
from sim.cost.spread import slowest_in
from sim.engine.run import run
from sim.errors import ContentionError, DeadlockError
from sim.ir.footprint import Footprint
from sim.ir.ledger import Ledger
from sim.ir.program import Copy, World
from sim.ir.timeline import Timeline
from sim.memory.allocator import AllocatorSettings
from sim.memory.confidence import Confidence, confidence
from sim.memory.replay import Known, footprints
from sim.memory.runtime import Outside
from sim.model.transformer import describe
from sim.outside import connections, outside_of
from sim.parallel.frameworks import warnings_of
from sim.parallel.lower import lower
from sim.parallel.precision import dtypes_of, exchange_sms_of
from sim.report.report import Report, summarise
from sim.scenario.schema import Scenario
from sim.units import format_bytes, format_duration, seconds


@dataclass(frozen=True, slots=True)
class Simulation:
    """Every noun of one answered scenario, for whoever draws more than the report."""

    scenario: Scenario
    cluster: Cluster
    ledger: Ledger
    world: World
    cost: CostModel
    timeline: Timeline
    outside: Mapping[int, Outside]
    footprints: tuple[Footprint, ...]
    report: Report
    undisturbed: tuple[World, Timeline]
    """World and timeline as if the allocator never asked the driver; the others are these wherever it does not."""


def simulate(
    scenario: Scenario,
    *,
    record: bool = False,
    fold: bool = True,
    like: Simulation | None = None,
    written: tuple[Ledger, World] | None = None,
    replayed: Known | None = None,
) -> Simulation:
    """Answer one scenario. Pure: same scenario and catalogue, same report, byte for byte.

    ``record`` keeps the allocator's history and the memory curve, for plots and snapshots. Without ``fold`` every rank
    is simulated by itself, which must not change the answer. ``like``: an answer to a similar question, of which what
    cannot differ is taken over: that saves time and changes nothing. So do ``written``, what ``programs`` said of this
    scenario, and ``replayed``, footprints of these programs that are known already.
    """
    if like is not None and _same_but_allocator(scenario, like.scenario):
        ledger, cluster, cost, outside = like.ledger, like.cluster, like.cost, like.outside
        world, timeline = like.undisturbed
    else:
        ledger, cluster, world, cost, timeline = _timed(scenario, fold, like, written)
        outside = outside_of(world, timeline, cluster, scenario.cluster.gpu)
    allocators = {rank: _allocator(scenario, beside) for rank, beside in outside.items()}
    held = footprints(world, timeline, allocators, outside, record, samples=record, known=replayed)
    undisturbed = world, timeline
    flushes = max(sum(calls.given > 0 for calls in footprint.driver) for footprint in held)
    if flushes:
        world, timeline, held = _disturbed(world, held, cost) or (*undisturbed, held)
    report = summarise(
        scenario,
        ledger,
        world,
        timeline,
        held,
        usable_bytes=min(_usable(settings) for settings in allocators.values()),
        warnings=(
            *scenario.warnings,
            *warnings_of(scenario),
            *_cache_notes(held, flushes, undisturbed[1], timeline),
            *_assumptions(outside),
            *cost.assumptions(),
        ),
        confidence=_confidence(scenario, held, outside),
        cost=cost,
    )
    return Simulation(scenario, cluster, ledger, world, cost, timeline, outside, held, report, undisturbed)


def _disturbed(
    world: World, held: tuple[Footprint, ...], cost: CostModel
) -> tuple[World, Timeline, tuple[Footprint, ...]] | None:
    """Return world and timeline with what each rank's allocator asks of the driver in every step.

    What is held stays as it was, but for where it is in these programs. None where ranks would wait for each other for
    ever: one for all that its GPU has to do, a receive among it, of what another sends once it got something from it.
    """
    from sim.memory.driver import moved, with_driver_calls

    programs = tuple(with_driver_calls(p, f.driver) for p, f in zip(world.programs, held, strict=True))
    disturbed = replace(world, programs=programs)
    try:
        timeline = run(disturbed, cost)
    except (ContentionError, DeadlockError):
        return None
    return disturbed, timeline, tuple(moved(f, p) for f, p in zip(held, world.programs, strict=True))


def _confidence(scenario: Scenario, held: tuple[Footprint, ...], outside: Mapping[int, Outside]) -> Confidence:
    """Return how sure the memory of the rank is that is most likely not to fit: one that did not, else the fullest."""
    worst = max(held, key=lambda f: (f.out_of_memory is not None, f.peak_device_bytes, f.peak_allocated_bytes))
    gpu = scenario.cluster.gpu
    beside = outside[min(rank for rank in outside if rank in worst.ranks)]
    total = min(gpu.total_memory_bytes, _usable(_allocator(scenario, beside)) + beside.total_bytes)
    return confidence(worst, beside, total, gpu.cuda_context_band_bytes)


def _same_but_allocator(scenario: Scenario, other: Scenario) -> bool:
    """Whether two scenarios ask the same, but for how they were written down and how the allocator manages its memory.

    What cuBLAS takes is written into the programs, though a variable of the allocator's section says how much it is.
    """
    if scenario.allocator.cublas_workspace_bytes != other.allocator.cublas_workspace_bytes:
        return False
    names = [name for name in Scenario.model_fields if name not in ("name", "sources", "warnings", "allocator")]
    return all(getattr(scenario, name) == getattr(other, name) for name in names)


def programs(scenario: Scenario) -> tuple[Ledger, World]:
    """Return what one replica computes, and what each rank does for it."""
    dtypes = dtypes_of(scenario)
    ledger = describe(
        scenario.model,
        scenario.training,
        parameter_dtype=dtypes.parameter,
        compute_dtype=dtypes.compute,
        autocast=dtypes.autocast,
        flash=scenario.cluster.gpu.compute_capability >= (8, 0),
        local=scenario.framework != "megatron" or scenario.megatron.transformer_impl == "local",
        tp=scenario.parallelism.tp,
        megatron=scenario.megatron,
    )
    return ledger, lower(ledger, scenario)


def cost_settings(scenario: Scenario) -> CostSettings:
    """Return what the times of a scenario's kernels and transfers depend on beside the machine."""
    return CostSettings(
        compiled=scenario.training.compile,
        code=scenario.training.code,
        exchange_sms=exchange_sms_of(scenario),
        slow={fault.rank: 1 / fault.factor for fault in scenario.faults.slow},
        slowest=slowest_in(scenario),
        calibration=scenario.calibration,
        cpu_threads=scenario.training.cpu_threads,
    )


def _timed(
    scenario: Scenario, fold: bool, like: Simulation | None, written: tuple[Ledger, World] | None
) -> tuple[Ledger, Cluster, World, CostModel, Timeline]:
    """Return what is computed, where, by whom, at what cost, and when."""
    faults = scenario.faults
    if like is not None and (like.scenario.cluster, like.scenario.faults) == (scenario.cluster, faults):
        cluster = like.cluster  # and what it remembers of its routes
    else:
        cluster = degrade(build_cluster(scenario.cluster), faults.links)
    settings = cost_settings(scenario)
    ledger, lowered = programs(scenario) if written is None else written
    try:
        world = _folded(lowered, cluster, fold, fold, scenario, settings)
        cost = _cost(cluster, scenario, settings, world, like)
        timeline = run(world, cost)
    except ContentionError:  # other communicators, and so another cost model: it knows them by name
        world = _folded(lowered, cluster, fold, False, scenario, settings)
        cost = _cost(cluster, scenario, settings, world, like)
        timeline = run(world, cost)
    return ledger, cluster, world, cost, timeline


def _cost(
    cluster: Cluster, scenario: Scenario, settings: CostSettings, world: World, like: Simulation | None
) -> CostModel:
    cost = CostModel(cluster, scenario.cluster.gpu, settings)
    same = like is not None and cluster is like.cluster and scenario.calibration == like.scenario.calibration
    if same and like is not None and world.communicators == like.world.communicators:
        cost.take_over(like.cost)
    return cost


def _folded(
    world: World, cluster: Cluster, fold: bool, trusting: bool, scenario: Scenario, settings: CostSettings
) -> World:
    """Return the world with the classes that its ranks form on this machine."""
    if fold and cluster.num_nodes == 1 and not settings.slow and not cluster.degraded and _as_one(world):
        return world
    from sim.cluster.symmetry import places_of
    from sim.parallel.fold import refold

    def same(found: World) -> list[int]:
        from sim.parallel.alike import alike

        cost = CostModel(cluster, scenario.cluster.gpu, settings)
        return alike(found, cost.traffic, cost.links, connections(found, cluster))

    places = places_of(cluster, num_ranks=world.world_size)
    return refold(world, speeds=settings.slow, places=places, folded=fold, trusting=trusting, alike=same)


def _as_one(world: World) -> bool:
    """Return whether the ranks do the same wherever they are: all meet in one group, and none copies for itself."""
    if len(world.programs) > 1 or any(c.num_ranks > 1 and len(c.groups) > 1 for c in world.communicators.values()):
        return False
    chunks = {id(chunk): chunk for chunk in world.programs[0].chunks.values()}
    return not any(isinstance(step, Copy) for chunk in chunks.values() for step in chunk)


def _allocator(scenario: Scenario, outside: Outside) -> AllocatorSettings:
    """cudaMalloc can give the allocator what the context, NCCL and libraries leave of the GPU."""
    config, total = scenario.allocator, scenario.cluster.gpu.total_memory_bytes
    return AllocatorSettings(
        expandable_segments=config.expandable_segments,
        max_split_size_bytes=config.max_split_size_bytes,
        roundup_power2_divisions=config.roundup_power2_divisions,
        garbage_collection_threshold=config.garbage_collection_threshold,
        capacity_bytes=max(0, total - outside.total_bytes),
        allowed_bytes=None if config.memory_fraction is None else int(total * config.memory_fraction),
    )


def _usable(settings: AllocatorSettings) -> int:
    """Return what the allocator can have at most."""
    capacity = settings.capacity_bytes or 0
    return capacity if settings.allowed_bytes is None else min(capacity, settings.allowed_bytes)


def _cache_notes(
    held: tuple[Footprint, ...], flushes: int, undisturbed: Timeline, timeline: Timeline
) -> tuple[str, ...]:
    """Say where the cache is large, or too small, for a reason that people can act on."""
    fullest = max(held, key=lambda footprint: footprint.peak_reserved_bytes)
    notes = []
    if fullest.peak_awaiting_bytes > fullest.peak_allocated_bytes // 10:
        notes.append(
            f"up to {format_bytes(fullest.peak_awaiting_bytes)} of what the allocator caches was freed by the host, "
            "which runs ahead, while another stream still used it (record_stream); how far it runs ahead rests on the "
            "host's launch times and CUDA's queue of 1,024 launches; Python time in a framework's hooks is not modelled"
        )
    if timeline is not undisturbed:
        longer = timeline.end - undisturbed.end
        notes.append(
            f"the allocator empties its cache {flushes} x a step to make room, which waits for the GPU and has the "
            f"driver map memory anew: {format_duration(seconds(longer))} of the step ({longer / timeline.end:.1%}); "
            f"{_way_out(held)}a smaller micro_batch_size avoids it"
        )
    elif flushes:
        notes.append(
            f"the allocator empties its cache {flushes} x a step to make room, which waits for the GPU and for "
            "messages of ranks that wait for this one: the step's time is without it, a real run may hang"
        )
    elif fullest.num_alloc_retries:
        notes.append(
            f"the allocator empties its cache to make room ({fullest.num_alloc_retries} x) in the first steps; that "
            "waits for the GPU, which is not in the step's time"
        )
    return tuple(notes)


def _way_out(held: tuple[Footprint, ...]) -> str:
    expandable = any(calls.expandable for footprint in held for calls in footprint.driver)
    return "" if expandable else "allocator.expandable_segments: true or "


def _assumptions(outside: Mapping[int, Outside]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words for beside in outside.values() for words in beside.assumptions))
