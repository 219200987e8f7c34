"""What it means: the result of one scenario, as data.

``Report.to_dict()`` is the JSON of ``sim run --json`` and of ``report.json``: base units throughout. Times of the
engine are integer picoseconds (``step.ticks``), whose parts add up exactly. In seconds, ``time_s`` is the sum of the
parts in the order in which they are listed, so that they add up exactly there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sim.cost.model import CostModel
from sim.ir.footprint import CATEGORIES, Footprint
from sim.ir.ledger import Attention, Gemm, Kernel, Ledger
from sim.ir.program import World
from sim.ir.timeline import Timeline
from sim.memory.confidence import COVERAGE, Confidence
from sim.report.certainty import TimeConfidence, time_confidence
from sim.report.metrics import (
    PARTS,
    CommunicationTotal,
    Kernels,
    communication,
    kernels_of,
    of_rank,
    slowest_rank,
    step_parts,
)
from sim.scenario.schema import Scenario
from sim.units import seconds

SCHEMA_VERSION = 1


class RemedyResult(Protocol):
    """What a report needs of a remedy: a change that was tried, and what came of it."""

    @property
    def words(self) -> str: ...
    @property
    def overrides(self) -> tuple[str, ...]: ...
    @property
    def fits(self) -> bool: ...
    @property
    def peak_device_bytes(self) -> int: ...
    @property
    def time_s(self) -> float: ...
    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Pipeline:
    schedule: str
    num_stages: int
    num_microbatches: int
    bubble_fraction: float


@dataclass(frozen=True, slots=True)
class Report:
    """One answered scenario.

    ``step_ticks`` are by part (``PARTS``) of the slowest rank and add up to ``time_ticks``. ``capacity_bytes`` is what
    the GPU has for everything; ``usable_bytes`` what is left of it for the framework's allocator.
    """

    scenario: str
    fits: bool
    world_size: int
    time_ticks: int
    step_ticks: Mapping[str, int]
    tokens_per_step: int
    model_flops: int
    executed_flops: int
    flops_formula: str
    peak_flops_per_s: float
    capacity_bytes: int
    usable_bytes: int
    host_bytes_per_node: int
    footprints: tuple[Footprint, ...]
    communication: tuple[CommunicationTotal, ...]
    pipeline: Pipeline
    warnings: tuple[str, ...]
    confidence: Confidence | None = None
    """How sure the memory of the fullest rank is."""
    time_confidence: TimeConfidence | None = None
    """How sure the time of the slowest rank's step is."""
    host_capacity_bytes: int = 0
    """Memory of a node; ``host_bytes_per_node`` is what its ranks hold of it together. 0: unknown."""

    @property
    def fits_host(self) -> bool:
        """Whether a node's memory holds what the framework puts there."""
        return not self.host_capacity_bytes or self.host_bytes_per_node <= self.host_capacity_bytes

    @property
    def fits_gpu(self) -> bool:
        return all(footprint.out_of_memory is None for footprint in self.footprints)

    @property
    def time_s(self) -> float:
        return sum(seconds(self.step_ticks[part]) for part in PARTS)

    @property
    def fullest(self) -> Footprint:
        """The rank that holds most; the first of those that tie."""
        return max(self.footprints, key=lambda f: (f.peak_device_bytes, f.peak_allocated_bytes, -f.ranks[0]))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, in the order of the documentation."""
        time_s = self.time_s
        per_gpu = self.world_size * time_s
        flops_rate = self.model_flops / per_gpu if per_gpu else 0.0
        return {
            "schema_version": SCHEMA_VERSION,
            "scenario": self.scenario,
            "fits": self.fits,
            "world_size": self.world_size,
            "step": {
                "time_s": time_s,
                **{f"{part}_s": seconds(self.step_ticks[part]) for part in PARTS},
                **_time_confidence(self.time_confidence),
                "tokens_per_s": self.tokens_per_step / time_s if time_s else 0.0,
                "tokens_per_s_per_gpu": self.tokens_per_step / per_gpu if per_gpu else 0.0,
                "model_flops": self.model_flops,
                "flops_formula": self.flops_formula,
                "model_flops_per_s_per_gpu": flops_rate,
                "mfu": flops_rate / self.peak_flops_per_s,
                "hfu": self.executed_flops / per_gpu / self.peak_flops_per_s if per_gpu else 0.0,
                "ticks": {"time": self.time_ticks, **{part: self.step_ticks[part] for part in PARTS}},
            },
            "memory": {
                "capacity_bytes": self.capacity_bytes,
                "usable_bytes": self.usable_bytes,
                # of each the most that any rank has: pipeline stages differ in which of them is large
                "peak_allocated_bytes": max(f.peak_allocated_bytes for f in self.footprints),
                "peak_reserved_bytes": max(f.peak_reserved_bytes for f in self.footprints),
                "peak_device_bytes": max(f.peak_device_bytes for f in self.footprints),
                **_confidence(self.confidence),
                "host_capacity_bytes": self.host_capacity_bytes,
                "host_bytes_per_node": self.host_bytes_per_node,
                "ranks": [_rank(footprint) for footprint in self.footprints],
            },
            "communication": [_communication(total) for total in self.communication],
            "pipeline": {
                "schedule": self.pipeline.schedule,
                "num_stages": self.pipeline.num_stages,
                "num_microbatches": self.pipeline.num_microbatches,
                "bubble_fraction": self.pipeline.bubble_fraction,
            },
            "warnings": list(self.warnings),
        }


def _confidence(found: Confidence | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "band_bytes": [found.least_bytes, found.most_bytes],
        "band_coverage": COVERAGE,
        "probability_fits": round(found.probability_fits, 3),
        "band_parts": {
            part.name: {
                "bytes": part.num_bytes,
                "band_bytes": [part.least_bytes, part.most_bytes],
                "source": part.source,
            }
            for part in found.parts
        },
    }


def _time_confidence(found: TimeConfidence | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "band_s": [found.low_s, found.high_s],
        "band_by_parts_s": [found.parts_low_s, found.parts_high_s],
        "band_deviation": found.deviation,
        "band_whole_runs": {"below": found.whole.below, "above": found.whole.above, "source": found.whole.source},
        "band_coverage": COVERAGE,
        "band_parts": {
            part.name: {"time_s": part.time_s, "deviation_s": part.deviation_s, "source": part.source}
            for part in found.parts
        },
    }


def result(report: Report, remedies: Sequence[RemedyResult]) -> dict[str, Any]:
    """Return what ``sim run --json`` prints and ``report.json`` holds."""
    return {**report.to_dict(), "remedies": [remedy.to_dict() for remedy in remedies]}


def json_text(value: object) -> str:
    """Return plain data as JSON for people and programs. Not a number is our defect, and raises."""
    import json

    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def summarise(
    scenario: Scenario,
    ledger: Ledger,
    world: World,
    timeline: Timeline,
    footprints: Sequence[Footprint],
    *,
    usable_bytes: int,
    warnings: Sequence[str],
    confidence: Confidence | None = None,
    cost: CostModel | None = None,
) -> Report:
    """Return the report: the slowest rank's step, each class's memory, the communication, what was assumed.

    ``usable_bytes`` is what cudaMalloc can give the framework's allocator on the fullest rank. ``cost`` is what the
    times came from: how sure they are, it knows.
    """
    rank = slowest_rank(timeline)
    own = of_rank(timeline, rank)
    parts = step_parts(own, rank)
    assert sum(parts.values()) == timeline.end, "the parts of a step add up to it"
    assert set(parts) == set(PARTS)
    peak = peak_flops_per_s(scenario)
    training, parallelism = scenario.training, scenario.parallelism
    replicas = parallelism.dp * scenario.num_microbatches
    host_bytes = max(footprint.host_bytes for footprint in footprints) * scenario.cluster.gpus_per_node
    host_capacity = scenario.cluster.node.host_memory_bytes
    totals = communication(own, rank)
    band = None
    kernels = [kernels_of(program) for program in world.programs]
    if cost is not None and timeline.end:
        parts_s = {part: seconds(parts[part]) for part in PARTS}
        band = time_confidence(parts_s, totals, world, rank, kernels, cost)
    return Report(
        scenario=scenario.name,
        fits=all(footprint.out_of_memory is None for footprint in footprints) and host_bytes <= host_capacity,
        world_size=world.world_size,
        time_ticks=timeline.end,
        step_ticks=parts,
        tokens_per_step=training.global_batch_size * training.sequence_length,
        model_flops=ledger.matmul_flops * replicas,
        executed_flops=executed_flops(world, ledger, kernels),
        flops_formula=ledger.flops_formula,
        peak_flops_per_s=peak,
        capacity_bytes=scenario.cluster.gpu.total_memory_bytes,
        usable_bytes=usable_bytes,
        host_bytes_per_node=host_bytes,
        footprints=tuple(footprints),
        communication=totals,
        pipeline=Pipeline(
            parallelism.schedule if parallelism.pp > 1 else "none",
            parallelism.pp,
            scenario.num_microbatches,
            parts["bubble"] / timeline.end if timeline.end else 0.0,
        ),
        warnings=tuple(warnings),
        host_capacity_bytes=host_capacity,
        confidence=confidence,
        time_confidence=band,
    )


def peak_flops_per_s(scenario: Scenario) -> float:
    """Return the GPU's dense peak in the scenario's precision, against which MFU is counted."""
    precision = {"mxfp8": "fp8"}.get(scenario.training.precision, scenario.training.precision)
    return scenario.cluster.gpu.peak_flops[precision]


def executed_flops(world: World, ledger: Ledger, kernels: Sequence[Kernels] | None = None) -> int:
    """Return the matmul and attention FLOPs that all ranks execute in a step, recompute included.

    Causal attention counts in full, as in ``Ledger.matmul_flops``, though its kernels skip half: so HFU and MFU are
    shares of one measure, and differ by what is computed again. Context parallelism's pieces of it, of which most are
    whole products, leave out the other half too.
    """
    if kernels is None:
        kernels = [kernels_of(program) for program in world.programs]
    causal = any(
        isinstance(kernel, Attention) and kernel.causal
        for layer in ledger.layers
        for op in layer.forward
        for kernel in op.kernels
    )
    return sum(
        len(program.ranks) * sum(number * _matmul_flops(kernel, causal) for number, kernel in own.values())
        for program, own in zip(world.programs, kernels, strict=True)
    )


def _matmul_flops(kernel: Kernel, causal: bool) -> int:
    if isinstance(kernel, Gemm):
        return kernel.flops
    if isinstance(kernel, Attention):
        return kernel.flops * 2 if causal else kernel.flops
    return 0


def _rank(footprint: Footprint) -> dict[str, Any]:
    lost = footprint.out_of_memory
    return {
        "rank": footprint.ranks[0],
        "num_ranks": len(footprint.ranks),
        "stage": footprint.stage,
        "peak_allocated_bytes": footprint.peak_allocated_bytes,
        "peak_reserved_bytes": footprint.peak_reserved_bytes,
        "peak_device_bytes": footprint.peak_device_bytes,
        "at_peak": {category: footprint.at_peak.get(category, 0) for category in CATEGORIES},
        "beside": dict(footprint.beside),
        "peak": {"step": footprint.peak_step, "phase": footprint.peak_phase, "module": footprint.peak_module},
        "holders": [
            {
                "name": holder.name,
                "category": holder.category,
                "phase": holder.phase,
                "count": holder.count,
                "bytes": holder.num_bytes,
            }
            for holder in footprint.holders
        ],
        "num_alloc_retries": footprint.num_alloc_retries,
        "out_of_memory": None
        if lost is None
        else {
            "step": lost.step,
            "phase": lost.phase,
            "module": lost.module,
            "name": lost.name,
            "requested_bytes": lost.requested_bytes,
            "short_bytes": lost.short_bytes,
        },
    }


def _communication(total: CommunicationTotal) -> dict[str, Any]:
    time_s = seconds(total.time)
    return {
        "kind": total.kind,
        "axis": total.axis,
        "num_ranks": total.num_ranks,
        "count": total.count,
        "tensor_bytes": total.tensor_bytes,
        "wire_bytes": total.wire_bytes,
        "time_s": time_s,
        "exposed_s": seconds(total.exposed),
        "algorithm": total.algorithm,
        "bus_bytes_per_s": total.wire_bytes / time_s if time_s else 0.0,
    }
