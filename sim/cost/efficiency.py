"""The measured coefficients of a GPU, read from ``sim/catalog/measured`` when first needed, and what was assumed.

A GPU is *measured* when its figures are those of a machine of ``index.yaml``. Another takes the coefficients of
the machine that stands for it: they are shares of its own peak, bandwidth and clock, so they scale with its figures.
A GPU that may draw less power for each FLOP/s than that machine cannot hold the clock either: its compute rate falls
with the cube root of the ratio, as dynamic power goes with clock times voltage squared and voltage with clock.
(A100 PCIe, 300 W, against SXM, 400 W: cube root 0.91; best measured 253 and 271 TFLOP/s: 0.93.) Where it is the same
GPU under a power limit (``nvidia-smi -pl``), on Hopper and later, it loses more, as what memory and idle circuits draw
does not shrink: H100's matmuls reach 0.82 to 0.91 at 500 of 700 W, B200's 0.77 to 0.79 at 750 of 1000 W
(``sim/catalog/measured/power.yaml``). So does attention:
FlashAttention-3 465 TFLOP/s on Meta's H100, 640 as its authors have it (meta-pytorch/tritonbench #141).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sim import units
from sim.catalog.schema import GpuFacts
from sim.cost.attention import AttentionCoefficients
from sim.cost.gemm import Alignment, GemmCoefficients

MEASURED = Path(__file__).parents[1] / "catalog" / "measured"
ALIGNMENT = Alignment(eight_bytes=0.685, four_bytes=0.685, two_bytes=1 / 3)
"""4 bytes: n = 10922 against 10944 with k = 4096 on H100, 272.7 and 398.4 TFLOP/s (stas00/ml-engineering @744d01e1,
model sizes); 8 bytes: no worse; 2 bytes: certain vocabularies that are not padded triple the head's time (Netflix,
"Scaling LLM Post-Training at Netflix", 13 February 2026: a fallback from cuBLAS to a CUTLASS kernel; taken for all
odd ones, of whose three products each has one operand or result with such rows). Where both operands have odd rows,
as no model's linears do, H100 does 71 to 115 TFLOP/s (meta-pytorch/float8_experimental #145, four of five shapes; the
fifth is as fast as aligned), less than half of what this gives. A property of the library's fallback kernels, taken to
be alike on all GPUs."""
BATCHED_ALIGNMENT = {
    "fp16": Alignment(eight_bytes=0.29, four_bytes=0.061, two_bytes=0.061),
    "bf16": Alignment(eight_bytes=0.061, four_bytes=0.061, two_bytes=0.061),
}
"""Batched products on Ampere, those of attention: 384 times [1024, 1024] by [1024, 140] (rows of 280 bytes) at 53.9
TFLOP/s in fp16 and 12.2 in bf16, where 512 times n = 128 reach 132.5 in both (pytorch/pytorch #83272, CUDA 11.6). The
shares are those with which :func:`sim.cost.gemm.gemm_s` gives these two times on A100. Rows at multiples of 4 or 2
bytes are assumed to get the slower of the two kernels, which loads single elements."""
_BATCHED_MEASURED_ON = 8
"""Major compute capability of the GPU of that measurement; others keep :data:`ALIGNMENT`."""
_SIMILAR = 0.03
_LIMITED_FROM = (9, 0)
"""Compute capability from which power limits were measured."""
_LEAST_ABOVE_IDLE = 0.02
"""A limit below what idle circuits draw leaves the lowest clocks."""
_KERNEL_OF = {
    "flash-2": ("flash-2",),
    "flash-3": ("flash-3", "cudnn", "flash-2"),
    "cudnn": ("cudnn", "flash-3", "flash-2"),
}
"""Kernels whose coefficients may stand for another's, best first."""
LEGACY_FLOPS_PER_CLOCK = dict.fromkeys(("flash-1", "flash-triton", "flash-2"), 4096.0)
"""16-bit FLOP a clock of an SM that a kernel built on ``mma.sync`` can reach: the instruction kept Hopper's rate, later
generations have others for theirs (CUTLASS, ``media/docs/cpp/blackwell_functionality.md``: tcgen05)."""


@dataclass(frozen=True, slots=True)
class MemoryCoefficients:
    """Kernels bound by memory: share of the bandwidth by family, floor, where the L2 helps, and the random numbers that
    an SM draws in a clock."""

    fractions: Mapping[str, float]
    assumed: frozenset[str]
    floor_s: float
    resident_fraction: float
    l2_over_memory: float
    random_per_clock: float


@lru_cache(maxsize=64)
def read(name: str) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    path = MEASURED / name
    return yaml.load(path.read_text(encoding="utf-8"), loader) if path.exists() else None


def _near(value: float, other: float) -> bool:
    return abs(value - other) <= _SIMILAR * other


@dataclass(frozen=True, slots=True)
class Source:
    """Whose measurements a GPU uses; ``same``: its own; ``power``: share of the clock that its power leaves;
    ``limited``: share of it that a power limit leaves to matmuls and attention."""

    name: str
    same: bool
    why: str
    power: float
    limited: float = 1.0


def source_of(gpu: GpuFacts) -> Source:
    """Return the measured machine for ``gpu``."""
    index = read("index.yaml")
    capability = ".".join(map(str, gpu.compute_capability))
    peak = gpu.peak_flops.get("bf16") or gpu.peak_flops.get("fp16") or gpu.peak_flops.get("fp32", 0.0)
    if gpu.vendor == "nvidia" and peak:
        for entry in index["measured"]:
            if (
                entry["capability"] == capability
                and entry["num_sms"] == gpu.num_sms
                and _near(gpu.memory_bytes_per_s, units.parse_rate(entry["memory"]))
                and _near(peak, _rate(entry))
            ):
                return Source(entry["name"], True, "", _power_factor(gpu, peak, entry), _limited(gpu, peak, entry))
    for rule in index["stands_for"]:
        if (
            gpu.name in rule.get("gpus", ())
            or (gpu.vendor == "nvidia" and capability in rule.get("capabilities", ()))
            or rule.get("vendor") == gpu.vendor
        ):
            entry = _entry(rule["take"])
            power, limited = _power_factor(gpu, peak, entry), _limited(gpu, peak, entry)
            return Source(rule["take"], False, rule["why"], power, limited)
    return Source("a100-sxm", False, "no nearer architecture was measured", 1.0)


def _entry(name: str) -> Any:
    index = read("index.yaml")
    return next(entry for entry in (*index["measured"], *index["others"]) if entry["name"] == name)


def _rate(entry: Mapping[str, Any]) -> float:
    """Return the dense peak of 16-bit matmuls on a machine of the index."""
    return units.parse_flops(entry.get("bf16") or entry["fp16"])


def _power_factor(gpu: GpuFacts, peak: float, entry: Mapping[str, Any]) -> float:
    """Share of the clock that the power of ``gpu`` allows, against the machine of the measurements."""
    if not gpu.power_w or not peak:
        return 1.0
    ratio = gpu.power_w / peak * _rate(entry) / units.parse_power(entry["power"])
    return 1.0 if ratio > 1 - _SIMILAR else float(ratio ** (1 / 3))


def _limited(gpu: GpuFacts, peak: float, entry: Mapping[str, Any]) -> float:
    """Share of the clock that a power limit leaves to a card that is otherwise the one of ``entry``."""
    ratio = gpu.power_w / units.parse_power(entry["power"])
    same_card = entry["num_sms"] == gpu.num_sms and _near(peak, _rate(entry))
    if not same_card or not 0 < ratio < 1 - _SIMILAR or gpu.compute_capability < _LIMITED_FROM:
        return 1.0
    facts = read("power.yaml")
    idle = float(facts["idle"])
    return float((max(ratio - idle, _LEAST_ABOVE_IDLE) / (1 - idle)) ** float(facts["exponent"]))


def _file(family: str, name: str) -> str:
    return f"{family}_{name.replace('-', '_')}.yaml"


def gemm_coefficients(source: Source, dtype: str) -> tuple[GemmCoefficients, str]:
    """Return the coefficients for matmuls of ``dtype``, and whose they are ("" if this GPU's own).

    fp16 runs on the same units as bf16 and counts as measured; nvfp4 takes fp8's shares, others bf16's.
    """
    entry, data, key = _gemm_entry(source, dtype)
    asked = _rate_name(entry, dtype)
    values = data[key]["coefficients"]
    reasons = []
    shares = entry.get("shares", {}).get(asked)
    instead = entry.get("instead", {}).get(shares or asked)
    if instead:
        reasons.append(f"{instead} ({entry['why']})")
    elif not source.same:
        reasons.append(f"{source.name} ({source.why})")
    elif key != asked or data.get("kind") == "assumed":
        reasons.append(f"{key} on {source.name}" + (f" ({entry['shares_why']})" if shares else ""))
    fields = GemmCoefficients.__dataclass_fields__
    whose = ", ".join(reasons)
    return GemmCoefficients(**{field: values[field] for field in fields}), whose


def gemm_data(source: Source, dtype: str) -> Mapping[str, Any]:
    """Return the whole entry of the fit whose coefficients matmuls of ``dtype`` take: its residuals too."""
    _, data, key = _gemm_entry(source, dtype)
    found: Mapping[str, Any] = data[key]
    return found


def _rate_name(entry: Mapping[str, Any], dtype: str) -> str:
    """fp16 runs at the rate of bf16 where a machine has that."""
    return "bf16" if dtype == "fp16" and "bf16" in entry else dtype


def _gemm_entry(source: Source, dtype: str) -> tuple[Any, Any, str]:
    """Return a machine's entry of the index, the fits that it takes for ``dtype``, and which of them."""
    entry = _entry(source.name)
    name = _rate_name(entry, dtype)
    name = entry.get("shares", {}).get(name) or name
    data = read(_file("gemm", entry.get("instead", {}).get(name) or source.name))
    usual = "bf16" if "bf16" in data else "fp16"
    return entry, data, name if name in data else "fp8" if name == "nvfp4" and "fp8" in data else usual


def attention_residuals(source: Source, kernel: str, backward: bool) -> Mapping[str, Any] | None:
    """Return the residuals of the fit whose coefficients an attention kernel takes: rows held out before curves."""
    other = read("attention_others.yaml").get(kernel)
    if other is not None:
        stated: Mapping[str, Any] = other["residuals"]
        return stated
    for name in _KERNEL_OF[kernel]:
        for place in (source.name, *_ATTENTION_FALLBACK.get(source.name, ()), "a100-sxm"):
            stated = (read(_file("attention", place)) or {}).get(name, {}).get("residuals")
            if stated:
                labels = (
                    ("plot, backward", "plot, both", "loop backward, held out")
                    if backward
                    else ("measured forward, held out", "plot, forward", "loop forward, held out")
                )
                return next((stated[label] for label in (*labels, "plot, both") if label in stated), None)
    return None


def sustained_droop(source: Source, dtype: str, droop: float) -> float:
    """Return the droop of matmuls at the rate of ``dtype`` that follow each other: as measured so, else ``droop``.

    All of them run at the clock that the power controller settles at, short ones too: it averages over many kernels.
    """
    name = {"fp16": "bf16", "mxfp8": "fp8", "nvfp4": "fp8"}.get(dtype, dtype)
    entries = read("sustained.yaml").get(source.name, {})
    entry = entries.get(dtype, entries.get(name))
    return droop if entry is None else float(entry["droop"])


def attention_droop(source: Source, kernel: str, backward: bool) -> float:
    """Return the droop of attention kernels that follow each other, 0 where long ones were not measured."""
    entry = read("sustained.yaml").get(source.name, {}).get("attention", {}).get(kernel, {})
    return float(entry.get("backward" if backward else "forward", {}).get("droop", 0.0))


def alignment_of(gpu: GpuFacts, dtype: str, batch: int) -> Alignment:
    """Return what is left of the rate of ``batch`` products of ``dtype`` whose rows are not aligned."""
    if batch > 1 and gpu.vendor == "nvidia" and gpu.compute_capability[0] == _BATCHED_MEASURED_ON:
        return BATCHED_ALIGNMENT.get(dtype, ALIGNMENT)
    return ALIGNMENT


def exposed_accumulation(source: Source) -> float:
    """Return the share of the reading and writing of C that main loops do not hide."""
    facts = read("accumulation.yaml")
    return float(facts.get(source.name, facts["otherwise"])["exposed"])


def promotion(gpu: GpuFacts) -> float:
    """Return how much longer the main loop of an 8-bit product takes that promotes its partial sums to fp32."""
    facts = read("promotion.yaml")["by_capability"]
    return float(facts.get(".".join(map(str, gpu.compute_capability)), {}).get("slower", 1.0))


def sdpa_kernel(gpu: GpuFacts) -> tuple[str, str]:
    """Return the kernel of torch's scaled_dot_product_attention on ``gpu``, and what that assumes ("" if nothing).

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp. FlashAttention-2 needs compute capability 8.0; cuDNN
    comes first on 10.0 (and, from torch 2.10 on with cuDNN 9.15, on 9.0).
    """
    major = gpu.compute_capability[0]
    if gpu.vendor == "nvidia" and major < 8:
        return "memory-efficient", ""
    if gpu.vendor == "nvidia" and major == 10:
        return "cudnn", ""
    if gpu.vendor == "nvidia" and major == 9:
        return "flash-2", "sdpa runs FlashAttention-2, as torch before 2.10 does (later ones prefer cuDNN on Hopper)"
    return "flash-2", ""


def attention_coefficients(
    source: Source, kernel: str, backward: bool, head_dim: int = 128
) -> tuple[AttentionCoefficients, str]:
    """Return the coefficients of an attention kernel, and in words what was assumed ("" if nothing)."""
    direction = "backward" if backward else "forward"
    other = read("attention_others.yaml").get(kernel)
    if other is not None:
        c, _ = attention_coefficients(source, other["of"], backward)
        slower = _by_head_dim({int(d): float(ways[direction]) for d, ways in other["slower"].items()}, head_dim)
        c = replace(c, peak_fraction=c.peak_fraction / slower, softmax_clocks=c.softmax_clocks * slower)
        return c, f"{slower:g} times slower than {other['of']}"
    wanted = _KERNEL_OF[kernel]
    places = [source.name, *_ATTENTION_FALLBACK.get(source.name, ()), "a100-sxm"]
    for name in wanted:
        for place in places:
            data = read(_file("attention", place))
            if data is None or name not in data:
                continue
            assumed = []
            if not source.same or place != source.name:
                assumed.append(f"takes the shares of {name} on {place}")
            elif data.get("kind") == "assumed":
                assumed.append(f"{name} on {place} is assumed")
            if name != wanted[0]:
                assumed.append(f"stands for {kernel}")
            if backward and "backward_kind" in data[name]:
                assumed.append(f"backward of {name} on {place} in proportion to forward")
            return AttentionCoefficients(**data[name][direction]), ", ".join(assumed)
    raise AssertionError(f"no coefficients for attention kernel {kernel}")


def _by_head_dim(known: Mapping[int, float], head_dim: int) -> float:
    """Return what is known of head sizes for another: in proportion between two, beyond them as the nearest."""
    small, large = min(known), max(known)
    place = min(max((head_dim - small) / (large - small), 0.0), 1.0)
    return known[small] + place * (known[large] - known[small])


_ATTENTION_FALLBACK: dict[str, tuple[str, ...]] = {
    "h100-sxm": (),
    "h200-sxm": ("h100-sxm",),
    "b200-sxm": ("h100-sxm",),
    "b300-sxm": ("gb300", "b200-sxm", "h100-sxm"),
    "gb200": ("b200-sxm", "h100-sxm"),
    "gb300": ("b200-sxm", "h100-sxm"),
    "rtx-pro-6000": ("l40s",),
    "mi300x": (),
}
"""Machines whose attention kernels stand in, nearest first, where the machine itself has none measured."""


def memory_coefficients(gpu: GpuFacts) -> MemoryCoefficients:
    """Return the coefficients of kernels bound by memory."""
    data = read("memory_bound.yaml")
    own = data["by_capability"].get(".".join(map(str, gpu.compute_capability)), {}) if gpu.vendor == "nvidia" else {}
    facts = {**data["default"], **own}
    floor, resident, l2 = facts.pop("floor"), facts.pop("resident_fraction"), facts.pop("l2_over_memory")
    random = facts.pop("random_per_clock")
    return MemoryCoefficients(
        fractions={family: float(fact["value"]) for family, fact in facts.items()},
        assumed=frozenset(family for family, fact in facts.items() if fact["kind"] != "measured"),
        floor_s=units.parse_duration(floor["value"]),
        resident_fraction=float(resident["value"]),
        l2_over_memory=float(l2["value"]),
        random_per_clock=float(random["value"]),
    )
