"""How sure the time of a step is: a band beside the estimate, from the residuals of what went into it.

The step of the slowest rank is taken apart: kernels by family, exposed collectives by whether they leave a node, the
host, copies. What computes keeps its part of the step in proportion to its kernels' own times (collectives beside slow
all alike); a bubble waits for the same work on other ranks and grows with it.

    shared = sum over families of shared_f t_f          what is off by one cause adds up, and all causes the same way
    own    = root of sum over shapes of (own_f t_s)^2   shapes are off by themselves: some compensate others
    parts = 1.645 root(shared^2 + own^2) / step
    band = step exp(-root(parts^2 + below^2)) to step exp(root(parts^2 + above^2))

``shared_f`` and ``own_f``: ``sim/cost/residuals.py``. Nothing of the parts is fitted to a training run. They leave out
what the step does not contain (data loading, stragglers, congestion, a busy host), an attention kernel or a framework's
setting that is another one in the real run, and what is hidden now and would be exposed if it took longer. ``below``
and ``above`` are by how much whole published runs were shorter and longer than their parts explain
(``sim/validation/band.py``); they are not alike, as most of that makes a run longer. The estimate stays where the
mechanism has it: nothing is corrected by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, hypot, sqrt

from sim.cost.model import CostModel
from sim.cost.residuals import NINE_IN_TEN, Residual, Residuals, WholeRuns, whole_runs
from sim.ir.program import Copy, HostCompute, Program, World
from sim.report.metrics import CommunicationTotal, Kernels

COVERAGE = 0.9
"""Share of the distribution inside the band, the same share outside above as below."""


@dataclass(frozen=True, slots=True)
class TimePart:
    """One family: its part of the step, and the standard deviation that it brings, both in seconds."""

    name: str
    time_s: float
    deviation_s: float
    source: str


@dataclass(frozen=True, slots=True)
class TimeConfidence:
    """The band of a step's time, and its parts, what drives it first.

    ``parts_low_s`` and ``parts_high_s`` are by the parts alone, ``deviation`` the standard deviation of the logarithm
    that they bring; ``whole`` is what is beyond them.
    """

    low_s: float
    high_s: float
    parts: tuple[TimePart, ...]
    deviation: float
    parts_low_s: float
    parts_high_s: float
    whole: WholeRuns


@dataclass(slots=True)
class _Family:
    residual: Residual
    time_s: float = 0.0
    squares: float = 0.0
    """Of the times of single shapes."""


def time_confidence(
    parts_s: Mapping[str, float],
    communication: Iterable[CommunicationTotal],
    world: World,
    rank: int,
    kernels: Sequence[Kernels],
    cost: CostModel,
) -> TimeConfidence:
    """Return the band of the step of ``rank``, a representative, from its parts (``metrics.PARTS``) in seconds.

    ``kernels`` are those of each program.
    """
    residuals = Residuals(cost)
    at = next(index for index, program in enumerate(world.programs) if program.ranks[0] == rank)
    program, step_s = world.programs[at], sum(parts_s.values())
    families = _by_family(kernels[at], rank, cost, residuals)
    kernels_s = sum(family.time_s for family in families.values())
    on_gpu_s = parts_s["compute"] + parts_s["optimizer"]
    beyond_s = max(0.0, parts_s["optimizer"] - _optimizer_kernels(families, kernels_s, parts_s))
    if beyond_s and not _copies(program):
        beyond_s = 0.0
    scale = max(0.0, on_gpu_s - beyond_s) / kernels_s if kernels_s else 0.0
    for family in families.values():
        family.time_s *= scale
        family.squares *= scale**2
    exposed_s = parts_s["exposed_communication"]
    totals = list(communication)
    exposed = sum(total.exposed for total in totals)
    pairs = {c.axis: c for c in reversed(tuple(world.communicators.values()))}  # of messages
    for total in totals:
        share_s = exposed_s * total.exposed / exposed if exposed else 0.0
        if share_s:
            axis = world.communicators.get(program.axes.get(total.axis, "")) or pairs.get(total.axis)
            _add(families, residuals.collectives(axis) if axis else residuals.copies(), share_s)
    if exposed_s and not exposed:  # it waits for slower ranks, which do the same work
        _add(families, residuals.waiting(), exposed_s)
    if beyond_s:
        _add(families, residuals.copies(), beyond_s)
    if parts_s["other"]:
        _add(families, residuals.host(), parts_s["other"])
    known_s = sum(family.time_s for family in families.values())
    grown = step_s / known_s if known_s else 0.0  # the bubble waits for the same work
    shared_s = grown * sum(family.residual.shared * family.time_s for family in families.values())
    own_s = grown * sqrt(sum(family.residual.own**2 * family.squares for family in families.values()))
    deviation = sqrt(shared_s**2 + own_s**2) / step_s if step_s else 0.0
    width, whole = NINE_IN_TEN * deviation, whole_runs()
    found = [
        TimePart(
            name,
            family.time_s,
            grown * sqrt((family.residual.shared * family.time_s) ** 2 + family.residual.own**2 * family.squares),
            family.residual.source,
        )
        for name, family in families.items()
        if family.time_s
    ]
    found.sort(key=lambda part: (-part.deviation_s, part.name))
    return TimeConfidence(
        low_s=step_s * exp(-hypot(width, whole.below)),
        high_s=step_s * exp(hypot(width, whole.above)),
        parts=tuple(found),
        deviation=deviation,
        parts_low_s=step_s * exp(-width),
        parts_high_s=step_s * exp(width),
        whole=whole,
    )


def _by_family(kernels: Kernels, rank: int, cost: CostModel, residuals: Residuals) -> dict[str, _Family]:
    """Return the kernels of a rank's step by family; a kernel object is one shape, however often it runs."""
    families: dict[str, _Family] = {}
    for number, kernel in kernels.values():
        _add(families, residuals.kernel(kernel), cost.kernel_s(kernel, rank) * number)
    return families


def _copies(program: Program) -> bool:
    """Whether a step copies to or from host memory or has the CPU compute."""
    return any(
        instruction.__class__ is Copy or instruction.__class__ is HostCompute
        for chunk in {call.chunk: None for call in program.step}
        for instruction in program.chunks[chunk]
    )


def _add(families: dict[str, _Family], residual: Residual, time_s: float) -> None:
    family = families.get(residual.family)
    if family is None:
        family = families[residual.family] = _Family(residual)
    family.time_s += time_s
    family.squares += time_s**2


def _optimizer_kernels(families: Mapping[str, _Family], kernels_s: float, parts_s: Mapping[str, float]) -> float:
    """Return how much of the optimizer's part its kernels can be: the rest is copies and work of the CPU."""
    own = families.get("optimizer kernels")
    left_s = max(0.0, kernels_s - parts_s["compute"])
    return max(left_s, own.time_s if own is not None else 0.0)
