"""GPUs of one kind differ, and the slowest of those that wait for each other sets the pace.

At one power limit each GPU holds a clock of its own: leakage, voltage and cooling differ from one to the next. Speeds
are taken to be normal, with the standard deviations of ``sim/catalog/measured/spread.yaml``. A GPU's speed stays what
it is, so who waits for others waits for the same one all step long:

    time on the slowest of N  =  time on an average GPU * (1 + sigma * E[largest of N standard normals])
    E  =  integral from 0 to infinity of  1 - P(x)^N - (1 - P(x))^N,     P the distribution function

All ranks of a synchronous job wait for each other at least once a step, when gradients are reduced. In a pipeline of
p stages a microbatch first goes through each stage in turn, then the slowest stage is the bottleneck: of m v + p - 1
turns (m microbatches, v chunks a rank) p are of one stage each, m v - 1 of the slowest. Of d pipelines that meet at
the end of a step only (``pipelines_of``) the slowest counts. A stage of one of them has g = N / p / d ranks that wait
for each other in every microbatch; its pace has the mean E(g) and the deviation S(g), that of the largest of g:

    deviations  =  ((m v - 1) E(N) + p (E(g) + S(g) / root(p) E(d))) / (m v + p - 1)

Exact for stages that are alike and d = 1. With more pipelines both terms are taken from the worst of them, which need
not be one: 0.15 deviations too much at most where held against clusters drawn at random, 0.3 % of the time.

Which GPU a table of kernels was measured on is not known; an average one is assumed. A calibrated GPU
(``sim calibrate``) stands for the average of its machine.

Source of the integral: David and Nagaraja, "Order Statistics", 3rd ed., section 3.1.
Leaves out: GPUs that are out of order (``faults`` says so), a clock that changes in the course of a run, GPUs that do
not reach their power limit (they differ less), stages of unequal length (the slowest GPU may have time to spare),
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
"""Standard deviations beyond which no GPU is: one in 1e19."""
_STEPS = 360
"""Of Simpson's rule: exact to 1e-9 up to a million GPUs."""


@dataclass(frozen=True, slots=True)
class Slowest:
    """Of GPUs that wait for each other: how many, and how many standard deviations slower than an average GPU."""

    num_gpus: int
    deviations: float


ALONE = Slowest(1, 0.0)


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard deviations of the times of one kernel on GPUs of one kind: bound by the clock, and by memory."""

    matmul: float
    memory: float


@lru_cache(maxsize=1024)
def largest_of(count: int) -> tuple[float, float]:
    """Return mean and standard deviation of the largest of so many standard normal numbers."""
    if count <= 1:
        return 0.0, 1.0
    width = _FAR / _STEPS
    mean = square = 0.0
    for i in range(_STEPS + 1):
        x = i * width
        above = erfc(x / sqrt(2)) / 2
        beyond, below = -expm1(count * log1p(-above)), above**count  # that the largest is above x, below -x
        weight = width / 3 * (1 if i in (0, _STEPS) else 4 if i % 2 else 2)
        mean += weight * (beyond - below)
        square += weight * 2 * x * (beyond + below)
    return mean, sqrt(square - mean**2)


def expected_largest(count: int) -> float:
    """Return the mean of the largest of so many standard normal numbers."""
    return largest_of(count)[0]


def slowest_of(num_gpus: int, num_stages: int = 1, num_passes: int = 1, num_pipelines: int = 1) -> Slowest:
    """Return whose pace so many GPUs have: ``num_passes`` forwards of chunks a rank of a pipeline of so many stages."""
    largest = expected_largest(num_gpus)
    if num_stages > 1:
        mean, deviation = largest_of(num_gpus // num_stages // num_pipelines)
        filling = min(largest, mean + deviation / sqrt(num_stages) * expected_largest(num_pipelines))
        largest = ((num_passes - 1) * largest + num_stages * filling) / (num_passes + num_stages - 1)
    return Slowest(num_gpus, largest)


def pipelines_of(framework: str, zero: int, dp: int) -> int:
    """Return how many pipelines meet at the end of a step only: one where parameters are gathered in every pass."""
    return 1 if framework in ("fsdp1", "fsdp2") or zero >= 2 else dp


def slowest_in(scenario: Scenario) -> Slowest:
    """Return whose pace all GPUs of a scenario have."""
    p = scenario.parallelism
    pipelines = pipelines_of(scenario.framework, p.zero, p.dp)
    return slowest_of(p.world_size, p.pp, scenario.num_microbatches * p.vpp, pipelines)


def spread_of(gpu: GpuFacts) -> Spread:
    """Return how much GPUs of this kind differ: as measured, or in proportion to what the scenario says of matmuls."""
    facts = efficiency.read("spread.yaml")
    matmul, memory = float(facts["matmul"]["value"]), float(facts["memory"]["value"])
    if gpu.spread is None:
        return Spread(matmul, memory)
    return Spread(gpu.spread, gpu.spread * memory / matmul)
