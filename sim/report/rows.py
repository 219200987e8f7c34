"""The report's tables as rows of text and numbers, for whoever lays them out: terminal, Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sim.ir.footprint import CATEGORIES, Footprint
from sim.memory.confidence import COVERAGE, Confidence
from sim.report.certainty import TimeConfidence
from sim.report.report import RemedyResult, Report
from sim.scenario.schema import Scenario
from sim.units import format_bytes, format_duration, format_flops, format_rate, seconds

_PART_WORDS = {
    "compute": "compute",
    "exposed_communication": "exposed communication",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "other": "waiting for the host",
}
_BESIDE_WORDS = {
    "fragmentation": "cached, fragmentation",
    "cuda_context": "CUDA context",
    "nccl": "NCCL",
    "libraries": "libraries",
}
CLASS_HEADER = ("ranks", "stage", "allocated", "reserved", "device", "peak in")
COMMUNICATION_HEADER = ("kind", "axis", "count", "bytes", "time", "exposed", "bus bw", "algorithm")


@dataclass(frozen=True, slots=True)
class Headline:
    """The question in three lines, the answer in two. ``verdict`` is "fits" or "does not fit"."""

    model: str
    machine: str
    layout: str
    job: str
    verdict: str
    memory: str
    time: str
    rate: str
    efficiency: str


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
    machine = f"{cluster.num_nodes} x {cluster.node.name}" if cluster.num_nodes > 1 else cluster.node.name
    recompute = "no recompute" if training.recompute == "none" else f"{training.recompute} recompute"
    microbatches = f"{scenario.num_microbatches:,} microbatches" if scenario.num_microbatches > 1 else "one microbatch"
    step = report.to_dict()["step"]
    return Headline(
        model=scenario.model.name or scenario.name,
        machine=f"{report.world_size:,} {cluster.gpu.name} ({machine})",
        layout=" · ".join(
            (f"{scenario.framework}{zero}", *axes, training.precision, training.optimizer, recompute,
             f"{training.attention} attention")
        ),
        job=f"{training.global_batch_size:,} sequences of {training.sequence_length:,} tokens a step · "
        f"{microbatches} of {training.micro_batch_size:,} on each rank",
        verdict="fits" if report.fits else "does not fit",
        memory=_memory_words(report),
        time=format_duration(report.time_s),
        rate=f"{_count(step['tokens_per_s'])} tokens/s ({_count(step['tokens_per_s_per_gpu'])} per GPU)",
        efficiency=f"{format_flops(step['model_flops_per_s_per_gpu'])} per GPU · "
        f"MFU {step['mfu']:.1%} · HFU {step['hfu']:.1%}",
    )  # fmt: skip


def _memory_words(report: Report) -> str:
    fullest = report.fullest
    device, capacity = fullest.peak_device_bytes, report.capacity_bytes
    if report.fits:
        return (
            f"{format_bytes(device)} of {format_bytes(capacity)} on the fullest GPU, "
            f"{format_bytes(capacity - device)} to spare"
        )
    if report.fits_gpu:
        host, node = report.host_bytes_per_node, report.host_capacity_bytes
        return (
            f"needs {format_bytes(host)} of {format_bytes(node)} of a node's host memory, "
            f"{format_bytes(host - node)} too much; {format_bytes(device)} on the fullest GPU"
        )
    if device > capacity:
        return (
            f"needs {format_bytes(device)} of {format_bytes(capacity)} on the fullest GPU, "
            f"{format_bytes(device - capacity)} too much"
        )
    return f"a request of the fullest GPU finds too little left of {format_bytes(capacity)}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def moment(phase: str, module: str) -> str:
    """Return a place of the step in words: "backward of block.3", "end of backward", "optimizer (norm)"."""
    if module == "end":
        return f"end of {phase}"
    if module in ("", phase):
        return phase
    return f"{phase} ({module})" if phase == "optimizer" else f"{phase} of {module}"


def peak_words(footprint: Footprint) -> str:
    """Return when the peak is and who has it: "backward of block.3, first step · 64 ranks alike"."""
    step = {"first": ", first step"}.get(footprint.peak_step, "")
    ranks = f"{len(footprint.ranks):,} ranks alike" if len(footprint.ranks) > 1 else f"rank {footprint.ranks[0]}"
    return f"{moment(footprint.peak_phase, footprint.peak_module)}{step} · {ranks}"


def band_words(found: Confidence) -> str:
    """Return the band and the probability: "9 like runs of 10 are between 26.9 and 31.2 GiB; ..."."""
    probability = min(max(found.probability_fits, 0.001), 0.999)
    return (
        f"{round(10 * COVERAGE)} like runs of 10 would be between {format_bytes(found.least_bytes)} and "
        f"{format_bytes(found.most_bytes)}; the probability that it fits is {probability:.3f}"
    )


def time_band_words(found: TimeConfidence) -> str:
    """Return the band of a step's time: "9 like runs of 10 would take between 3.9 s and 5.4 s, ..."."""
    words = (
        f"{round(10 * COVERAGE)} like runs of 10 would take between {format_duration(found.low_s)} and "
        f"{format_duration(found.high_s)}, as published runs did; by its parts alone between "
        f"{format_duration(found.parts_low_s)} and {format_duration(found.parts_high_s)}"
    )
    return f"{words}, most by {found.parts[0].name}" if found.parts else words


def account(footprint: Footprint) -> Iterator[AccountRow]:
    """Yield the account at the peak: categories, allocated, fragmentation, reserved, what is outside torch, device."""
    for category in CATEGORIES:
        if footprint.at_peak.get(category, 0):
            yield AccountRow(category, footprint.at_peak[category], False)
    yield AccountRow("allocated by tensors", footprint.peak_allocated_bytes, True)
    yield AccountRow(_BESIDE_WORDS["fragmentation"], footprint.beside["fragmentation"], False)
    yield AccountRow("reserved by the allocator", footprint.peak_reserved_bytes, True)
    for name, num_bytes in footprint.beside.items():
        if name != "fragmentation" and num_bytes:
            yield AccountRow(_BESIDE_WORDS.get(name, name), num_bytes, False)
    yield AccountRow("on the device", footprint.peak_device_bytes, True)


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


def class_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield a row for each class of ranks, under ``CLASS_HEADER``, the fullest first."""
    fullest = report.fullest
    for footprint in (fullest, *(f for f in report.footprints if f is not fullest)):
        yield (
            ranks_words(footprint.ranks),
            str(footprint.stage),
            format_bytes(footprint.peak_allocated_bytes),
            format_bytes(footprint.peak_reserved_bytes),
            format_bytes(footprint.peak_device_bytes),
            moment(footprint.peak_phase, footprint.peak_module),
        )


def ranks_words(ranks: Sequence[int]) -> str:
    """Return ranks, ascending, in few words: "0-7", "0 2 4", "0 8 16 and 5 more"."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    more = f" and {len(ranks) - 3} more" if len(ranks) > 4 else ""
    return " ".join(map(str, ranks[:3] if more else ranks)) + more


def remedy_rows(remedies: Sequence[RemedyResult]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (change, memory, time, options) of what was tried."""
    for remedy in remedies:
        yield (
            remedy.words,
            format_bytes(remedy.peak_device_bytes),
            f"{format_duration(remedy.time_s)} a step",
            " ".join(f"--set {option}" for option in remedy.overrides),
        )


def out_of_memory_words(report: Report) -> str:
    """Return at which moment it ends, and who asked for what."""
    lost = next(f.out_of_memory for f in report.footprints if f.out_of_memory is not None)
    step = {"first": "first step, ", "steady": "a later step, "}.get(lost.step, "")
    return (
        f"{step}{moment(lost.phase, lost.module)}: {lost.name} asks for {format_bytes(lost.requested_bytes)}, "
        f"{format_bytes(lost.short_bytes)} more than is left"
    )
