"""How sure the memory is: a band beside the estimate, and the probability that it fits.

Each part of what the GPU holds has an uncertainty of its own, from what was measured of it:

* **allocated**: the residuals of published runs whose peak of ``torch.cuda.max_memory_allocated`` is known (sources and
  figures at ``ALLOCATED_SCALE``). They have long tails, as a row is either understood or not: a Laplace distribution.
* **fragmentation**: what the allocator caches beyond that depends on addresses and on how far the host runs ahead.
* **cuda_context**: the catalogue's band for the GPU; **nccl**: from rings alone to every algorithm connected;
  **libraries**: what cuBLAS, cuDNN and others allocate for themselves. All even within their limits.

The parts are taken as independent; all but the first together as normal, by their means and variances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, log, sqrt

from sim.ir.footprint import Footprint
from sim.memory.runtime import MIB, Outside

COVERAGE = 0.9
"""Share of the distribution inside the band, the same share outside above as below."""
ALLOCATED_SCALE = 0.025
"""Scale of the Laplace distribution of measured / predicted - 1 of allocated bytes.

From the absolute residuals of 121 runs of 4 sources (validation/runs: simumax_b200, megatron_golden_memory,
finetune_memory, zero_bubble_pp), each source weighing the same: half are within 1.9 %, 80 % within 3.8 %, 90 % within
6 %. The scale gives 1.7 %, 4.0 % and 5.8 %. Inside the band of 90 % are 100, 93, 75 and 96 % of their runs."""
FRAGMENTATION_SHARE = 0.5
"""The cache beyond what is allocated is taken as even within this share of itself. Of 13 published runs with reserved
bytes (torchtitan, H100 and H200) 11 are within 1.6 % of reserved, two with tensor parallelism 12 and 17 % too low."""
LIBRARY_BAND = (0, 256 * MIB)
"""What libraries allocate by themselves: ai-dynamo/aiconfigurator's planner observed 551 MB beside NCCL on an H100, of
which the context is 525 MiB at most; modules that are loaded later add to it."""
_LAPLACE_POINTS = 32


@dataclass(frozen=True, slots=True)
class Part:
    """One part: its estimate, the limits of its own band at ``COVERAGE``, and what they rest on."""

    name: str
    num_bytes: int
    least_bytes: int
    most_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class Confidence:
    """Of one rank: the band of its device bytes, the probability that it fits, and the parts."""

    least_bytes: int
    most_bytes: int
    probability_fits: float
    parts: tuple[Part, ...]


def confidence(
    footprint: Footprint, outside: Outside, total_bytes: int, context_band: tuple[int, int] | None = None
) -> Confidence:
    """Return how sure a rank's memory is on a GPU of ``total_bytes``.

    It fits if what is allocated and what is beside the allocator do, and the part of the cache that cannot be given
    back: between nothing of it and all. A replay that ran out of memory says how much was missing.
    """
    allocated = footprint.peak_allocated_bytes
    fragmentation = footprint.peak_reserved_bytes - allocated
    context = context_band if context_band and any(context_band) else (outside.cuda_context_bytes,) * 2
    nccl = _nccl_band(outside, context)
    loose = round(fragmentation * FRAGMENTATION_SHARE)
    even = (
        (fragmentation - loose, fragmentation + loose),
        context,
        nccl,
        (outside.library_bytes + LIBRARY_BAND[0], outside.library_bytes + LIBRARY_BAND[1]),
    )
    laplace = allocated * ALLOCATED_SCALE
    low, high = _band(allocated, laplace, even)
    estimate = allocated + fragmentation + outside.total_bytes  # at the end of parts that can only be more
    low, high = min(low, estimate), max(high, estimate)
    missing = footprint.out_of_memory
    if missing is None:  # no GPU ever holds more than it has
        low, high = min(low, total_bytes), min(high, total_bytes)
    if missing is None:
        needed = (0, max(0, min(fragmentation, total_bytes - allocated - outside.total_bytes)))
    else:  # what it had and lacked when the allocator gave up; what was allocated later may be more than both
        short = max(0, total_bytes - outside.total_bytes + missing.short_bytes - allocated)
        needed = (short, short)
    fits = _below(total_bytes, allocated, laplace, (needed, *even[1:]))
    names = ("fragmentation", "cuda_context", "nccl", "libraries")
    sources = (
        f"within {FRAGMENTATION_SHARE:.0%} of itself: addresses and the host's lead decide",
        "the catalogue's band for this GPU",
        "from rings alone to every algorithm connected",
        "what cuBLAS, cuDNN and others allocate for themselves",
    )
    values = (fragmentation, outside.cuda_context_bytes, outside.nccl_bytes, outside.library_bytes)
    within = -laplace * log(1 - COVERAGE)
    parts = [
        Part(
            "allocated", allocated, round(allocated - within), round(allocated + within), "residuals of published runs"
        )
    ]
    parts += [Part(*four) for four in zip(names, values, *zip(*even, strict=True), sources, strict=True)]
    return Confidence(low, high, fits, tuple(parts))


def _nccl_band(outside: Outside, context: tuple[int, int]) -> tuple[int, int]:
    if not outside.most_bytes:
        return (outside.nccl_bytes, outside.nccl_bytes)
    least = outside.least_bytes - context[0] - outside.library_bytes
    most = outside.most_bytes - context[1] - outside.library_bytes
    return min(least, outside.nccl_bytes), max(most, outside.nccl_bytes)


def _below(limit: float, middle: float, scale: float, even: Sequence[tuple[int, int]]) -> float:
    """Return the probability that middle + Laplace(scale) + the even parts is at most ``limit``.

    The Laplace distribution by its quantiles, each of which has the same weight.
    """
    mean = middle + sum(least + most for least, most in even) / 2
    deviation = sqrt(sum((most - least) ** 2 for least, most in even) / 12) or 1.0
    total = 0.0
    for point in range(_LAPLACE_POINTS):
        share = (point + 0.5) / _LAPLACE_POINTS
        away = -scale * log(2 * (1 - share)) if share > 0.5 else scale * log(2 * share)
        total += 0.5 + 0.5 * erf((limit - mean - away) / deviation / sqrt(2))
    return total / _LAPLACE_POINTS


def _band(middle: int, scale: float, even: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the limits with (1 - COVERAGE) / 2 of the distribution below and above."""
    least = middle * (1 - 20 * ALLOCATED_SCALE) + sum(limits[0] for limits in even)
    most = middle * (1 + 20 * ALLOCATED_SCALE) + sum(limits[1] for limits in even)
    found = []
    for share in ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2):
        low, high = least, most
        for _ in range(18):
            half = (low + high) / 2
            low, high = (half, high) if _below(half, middle, scale, even) < share else (low, half)
        found.append(round(high))
    return found[0], found[1]
