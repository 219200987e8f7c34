"""GPUs of one kind differ, and the slowest of those that wait for each other sets the pace.

At one power limit each card holds a clock of its own: leakage, voltage and cooling differ from card to card. Speeds
are taken to be normal, with the standard deviations of ``sim/catalog/measured/spread.yaml``. A card's speed stays what
it is, so who waits for others waits for the same card all step long:

    time on the slowest of N  =  time on an average card * (1 + sigma * E[largest of N standard normals])
    E  =  integral from 0 to infinity of  1 - P(x)^N - (1 - P(x))^N,     P the distribution function

All ranks of a synchronous job wait for each other at least once a step, when gradients are reduced. In a pipeline of
p stages a microbatch first goes through each stage in turn, then the slowest stage is the bottleneck: of m v + p - 1
turns (m microbatches, v chunks a rank) p are of one stage each, whose N / p ranks wait for each other, and m v - 1 of
the slowest of all N:

    deviations  =  ((m v - 1) E(N) + p E(N / p)) / (m v + p - 1)

Exact for stages that are alike and one data-parallel rank; with more, pipelines that do not wait for each other before
the end of a step average their filling a little better (0.2 sigma at most of what was tried).

Which card a table of kernels was measured on is not known; an average one is assumed. A calibrated card
(``sim calibrate``) stands for the average of its machine.

Source of the integral: David and Nagaraja, "Order Statistics", 3rd ed., section 3.1.
Leaves out: cards that are out of order (``faults`` says so), a clock that changes in the course of a run, GPUs that do
not reach their power limit (they differ less), stages of unequal length (the slowest card may have time to spare),
NVLink and NICs.
Checked by: tests/unit/test_cost_spread.py, tests/laws/test_spread_laws.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import erfc, expm1, log1p, sqrt
from typing import TYPE_CHECKING

from sim.catalog.schema import GpuFacts
from sim.cost import efficiency

if TYPE_CHECKING:
    from sim.scenario.schema import Scenario

_FAR = 9.0
"""Standard deviations beyond which no card is: one in 1e19."""
_STEPS = 360
"""Of Simpson's rule: exact to 1e-9 up to a million GPUs."""


@dataclass(frozen=True, slots=True)
class Slowest:
    """Of GPUs that wait for each other: how many, and how many standard deviations slower than an average card."""

    num_gpus: int
    deviations: float


ALONE = Slowest(1, 0.0)


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard deviations of the times of one kernel on cards of one kind: bound by the clock, and by memory."""

    matmul: float
    memory: float


@lru_cache(maxsize=1024)
def expected_largest(count: int) -> float:
    """Return the mean of the largest of so many standard normal numbers."""
    if count <= 1:
        return 0.0

    def beyond(x: float) -> float:
        above = erfc(x / sqrt(2)) / 2
        return -expm1(count * log1p(-above)) - above**count

    width = _FAR / _STEPS
    inner = sum((4 if i % 2 else 2) * beyond(i * width) for i in range(1, _STEPS))
    return (beyond(0.0) + inner + beyond(_FAR)) * width / 3


def slowest_of(num_gpus: int, num_stages: int = 1, num_passes: int = 1) -> Slowest:
    """Return whose pace so many GPUs have: ``num_passes`` forwards of chunks a rank of a pipeline of so many stages."""
    largest = expected_largest(num_gpus)
    if num_stages > 1:
        of_stage = expected_largest(num_gpus // num_stages)
        largest = ((num_passes - 1) * largest + num_stages * of_stage) / (num_passes + num_stages - 1)
    return Slowest(num_gpus, largest)


def slowest_in(scenario: Scenario) -> Slowest:
    """Return whose pace all GPUs of a scenario have."""
    p = scenario.parallelism
    return slowest_of(p.world_size, p.pp, scenario.num_microbatches * p.vpp)


def spread_of(gpu: GpuFacts) -> Spread:
    """Return how much GPUs of this kind differ: as measured, or in proportion to what the scenario says of matmuls."""
    facts = efficiency.read("spread.yaml")
    matmul, memory = float(facts["matmul"]["value"]), float(facts["memory"]["value"])
    if gpu.spread is None:
        return Spread(matmul, memory)
    return Spread(gpu.spread, gpu.spread * memory / matmul)
