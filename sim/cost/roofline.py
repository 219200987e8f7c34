"""The bounds that no kernel beats, and what of a GPU the kernel models need.

    T >= FLOPs / peak        T >= bytes that must cross the memory bus / bandwidth

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 52(4), 2009.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sim.catalog.schema import GpuFacts


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU as a kernel meets it, at one precision. ``peak_flops`` is dense; ``element_bytes`` of the operands, with
    the scales of their blocks."""

    peak_flops: float
    element_bytes: float
    num_sms: int
    clock_hz: float
    memory_bytes_per_s: float
    l2_bytes: int


@dataclass(frozen=True, slots=True)
class Beside:
    """What collectives hold of a GPU while a kernel runs: SMs, and a share of the memory's bandwidth."""

    sms: int
    memory_share: float


def left_of(machine: Machine, beside: Beside) -> Machine:
    """Return what collectives leave of ``machine``."""
    num_sms = machine.num_sms - beside.sms
    return replace(
        machine,
        num_sms=num_sms,
        peak_flops=machine.peak_flops * num_sms / machine.num_sms,
        memory_bytes_per_s=machine.memory_bytes_per_s * (1 - beside.memory_share),
    )


_ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "mxfp8": 1 + 1 / 32, "nvfp4": 1 / 2 + 1 / 16}
_NEXT_BEST = {
    "mxfp8": ("fp8",),
    "nvfp4": ("fp8", "bf16"),
    "fp8": ("bf16", "fp16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "fp16": ("bf16", "fp32"),
    "tf32": ("fp32",),
}
"""Whose rate applies where a GPU has no rate of its own: the operands are converted on the way in. MXFP8 is FP8 whose
scales the tensor cores apply themselves, at the same rate (NVIDIA Blackwell's data sheets name both in one line)."""


def peak_of(gpu: GpuFacts, dtype: str) -> tuple[float, str]:
    """Return the dense peak for matmuls of ``dtype``, in FLOP/s, and the precision whose rate it is."""
    for name in (dtype, *_NEXT_BEST.get(dtype, ())):
        if peak := gpu.peak_flops.get(name, 0.0):
            return peak, name
    best = max(gpu.peak_flops, key=lambda name: (gpu.peak_flops[name], name))
    return gpu.peak_flops[best], best


def machine_of(gpu: GpuFacts, dtype: str) -> Machine:
    """Return what the kernel models need of ``gpu`` for matmuls of ``dtype``."""
    return Machine(
        peak_flops=peak_of(gpu, dtype)[0],
        element_bytes=_ELEMENT_BYTES.get(dtype, 4),
        num_sms=gpu.num_sms,
        clock_hz=gpu.boost_clock_hz,
        memory_bytes_per_s=gpu.memory_bytes_per_s,
        l2_bytes=gpu.l2_bytes,
    )


def bound_s(flops: float, memory_bytes: float, machine: Machine) -> float:
    """Return the time, in seconds, below which no kernel of that work can be."""
    return max(flops / machine.peak_flops, memory_bytes / machine.memory_bytes_per_s)
