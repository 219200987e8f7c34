"""The report's tables as rows of text and numbers, for whoever lays them out: terminal, Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sim.ir.footprint import CATEGORIES, Footprint
from sim.report.report import Report
from sim.scenario.schema import Scenario
from sim.units import format_bytes, format_duration, format_flops, format_rate, format_si, seconds

_PART_WORDS = {
    "compute": "compute",
    "exposed_communication": "exposed communication",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "other": "waiting for the host",
}
_BESIDE_WORDS = {
    "fragmentation": "fragmentation",
    "cuda_context": "CUDA context",
    "nccl": "NCCL",
    "libraries": "libraries",
}
COMMUNICATION_HEADER = ("kind", "axis", "count", "bytes", "time", "exposed", "bus bandwidth", "algorithm")


@dataclass(frozen=True, slots=True)
class Headline:
    """The question in two lines, the answer in two. ``verdict`` is "fits" or "does not fit"."""

    model: str
    where: str
    how: str
    verdict: str
    memory: str
    time: str
    rate: str


@dataclass(frozen=True, slots=True)
class AccountRow:
    """A line of the memory account; a ``total`` sums what stands above it."""

    name: str
    num_bytes: int
    total: bool


def headline(scenario: Scenario, report: Report) -> Headline:
    """Return what a person wants to read first."""
    cluster, parallelism, training = scenario.cluster, scenario.parallelism, scenario.training
    axes = [f"{axis} {size}" for axis in ("dp", "tp", "pp", "cp", "ep") if (size := getattr(parallelism, axis)) > 1]
    zero = f" ZeRO-{parallelism.zero}" if scenario.framework == "deepspeed" else ""
    layout = ", ".join(axes) or "one rank"
    machine = f"{cluster.num_nodes} x {cluster.node.name}" if cluster.num_nodes > 1 else cluster.node.name
    fullest = report.fullest
    device, capacity = fullest.peak_device_bytes, report.capacity_bytes
    if report.fits:
        verdict = "fits"
        spare = format_bytes(capacity - device)
        memory = f"{format_bytes(device)} of {format_bytes(capacity)} on the fullest GPU, {spare} to spare"
    else:
        lost = fullest.out_of_memory
        over = max(device - capacity, lost.short_bytes if lost else 0)
        verdict = "does not fit"
        memory = f"{format_bytes(over)} over the {format_bytes(capacity)} of the fullest GPU"
    step = report.to_dict()["step"]
    return Headline(
        model=scenario.model.name or scenario.name,
        where=f"{report.world_size} {cluster.gpu.name} ({machine}) · {scenario.framework}{zero} · {layout}",
        how=f"sequences of {training.sequence_length:,} · microbatch {training.micro_batch_size} · "
        f"global batch {training.global_batch_size:,} · {training.precision} · recompute {training.recompute}",
        verdict=verdict,
        memory=memory,
        time=format_duration(report.time_s),
        rate=f"{format_si(step['tokens_per_s'])}tokens/s ({format_si(step['tokens_per_s_per_gpu'])}per GPU) · "
        f"{format_flops(step['model_flops_per_s_per_gpu'])} per GPU · MFU {step['mfu']:.1%}",
    )


def peak_words(footprint: Footprint) -> str:
    """Return when the peak is and who has it: "backward of layers.3, first step; 64 ranks alike"."""
    step = {"first": ", first step", "setup": ", setup"}.get(footprint.peak_step, "")
    ranks = f"{len(footprint.ranks):,} ranks alike" if len(footprint.ranks) > 1 else f"rank {footprint.ranks[0]}"
    return f"{footprint.peak_phase} of {footprint.peak_module}{step}; {ranks}"


def account(footprint: Footprint) -> Iterator[AccountRow]:
    """Yield the account at the peak: categories, allocated, fragmentation, reserved, what is outside torch, device."""
    for category in CATEGORIES:
        if footprint.at_peak.get(category, 0):
            yield AccountRow(category, footprint.at_peak[category], False)
    yield AccountRow("allocated by tensors", footprint.peak_allocated_bytes, True)
    yield AccountRow("fragmentation", footprint.beside["fragmentation"], False)
    yield AccountRow("reserved by the allocator", footprint.peak_reserved_bytes, True)
    for name, num_bytes in footprint.beside.items():
        if name != "fragmentation":
            yield AccountRow(_BESIDE_WORDS.get(name, name), num_bytes, False)
    yield AccountRow("device", footprint.peak_device_bytes, True)


def step_rows(report: Report) -> Iterator[tuple[str, str, float]]:
    """Yield (part, duration, share of the step)."""
    for part, words in _PART_WORDS.items():
        ticks = report.step_ticks[part]
        if ticks or part != "bubble":
            yield words, format_duration(seconds(ticks)), ticks / report.time_ticks if report.time_ticks else 0.0


def communication_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield a row for each kind on each axis, under ``COMMUNICATION_HEADER``."""
    for total in report.communication:
        time_s = seconds(total.time)
        yield (
            total.kind,
            total.axis,
            f"{total.count:,}",
            format_bytes(total.tensor_bytes),
            format_duration(time_s),
            format_duration(seconds(total.exposed)),
            format_rate(total.wire_bytes / time_s) if time_s else "-",
            total.algorithm,
        )


def out_of_memory_words(report: Report) -> str:
    """Return at which moment it ends, and who asked for what."""
    lost = next(f.out_of_memory for f in report.footprints if f.out_of_memory is not None)
    return (
        f"in the {lost.step} step, {lost.phase} of {lost.module}: {lost.name} asks for "
        f"{format_bytes(lost.requested_bytes)}, {format_bytes(lost.short_bytes)} short"
    )
