"""What if: the same scenario with something changed, or with as much of something as fits. Each answer is a simulation.

A change is what a user would type after ``--set``, so that it can be run as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sim.errors import ScenarioError
from sim.pipeline import Simulation, simulate
from sim.scenario.load import load_scenario

LARGEST = {"micro_batch_size": 1, "sequence_length": 256}
"""Keys of ``training`` that can be searched, and the step to which the answer is found."""
_MOST = {"micro_batch_size": 4096, "sequence_length": 2**24}


@dataclass(frozen=True, slots=True)
class Answer:
    """One change and what its simulation said; ``problem`` where it is no scenario."""

    overrides: tuple[str, ...]
    fits: bool = False
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    peak_device_bytes: int = 0
    time_s: float = 0.0
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        if self.problem:
            return {"set": list(self.overrides), "problem": self.problem}
        return {
            "set": list(self.overrides),
            "fits": self.fits,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "time_s": self.time_s,
        }


def check_changes(file: Path, overrides: Sequence[str], changes: Sequence[str]) -> None:
    """Raise the problems of all changes that are no scenario, before anything is simulated."""
    findings = []
    for change in changes:
        try:
            load_scenario(file, [*overrides, *change.split()])
        except ScenarioError as error:
            findings += [replace(f, file=f"--what-if '{change}'", line=0) for f in error.findings]
    if findings:
        raise ScenarioError(findings)


def what_if(
    file: Path, overrides: Sequence[str], changes: Sequence[str], simulation: Simulation, step: Callable[[str], None]
) -> tuple[Answer, ...]:
    """Return the answer to each change; settings of one change stand in one text, with spaces between them."""
    found = []
    for change in changes:
        step(change)
        found.append(_answer(file, overrides, tuple(change.split()), simulation))
    return tuple(found)


def largest(
    file: Path, overrides: Sequence[str], key: str, simulation: Simulation, step: Callable[[str], None]
) -> tuple[Answer, ...]:
    """Return the largest value of a key of ``training`` with which it fits, and the next one, with which it does not.

    The number of microbatches stays. By doubling, then halving the distance.
    """
    unit, most = LARGEST[key], _MOST[key]
    parts = 2 * simulation.scenario.parallelism.cp if simulation.scenario.parallelism.cp > 1 else 1
    unit = unit * parts if key == "sequence_length" else unit

    def ask(value: int) -> Answer:
        step(f"{key} {value:,}")
        changed = [f"training.{key}={value}"]
        if key == "micro_batch_size":
            scenario = simulation.scenario
            changed.append(f"training.global_batch_size={value * scenario.parallelism.dp * scenario.num_microbatches}")
        return _answer(file, overrides, tuple(changed), simulation)

    good: tuple[int, Answer | None] = (0, None)
    value = unit
    while value <= most and (answer := ask(value)).fits:
        good, value = (value, answer), value * 2
    bad = (value, ask(value) if value > most else answer)
    while bad[0] - good[0] > unit:
        middle = (good[0] + bad[0]) // 2 // unit * unit
        answer = ask(middle)
        if answer.fits:
            good = (middle, answer)
        else:
            bad = (middle, answer)
    return tuple(answer for answer in (good[1], bad[1]) if answer is not None)


def _answer(file: Path, overrides: Sequence[str], change: tuple[str, ...], simulation: Simulation) -> Answer:
    try:
        scenario = load_scenario(file, [*overrides, *change])
    except ScenarioError as error:
        return Answer(change, problem=error.findings[0].problem)
    report = simulate(scenario).report
    memory = report.to_dict()["memory"]
    return Answer(
        change,
        fits=report.fits,
        peak_allocated_bytes=memory["peak_allocated_bytes"],
        peak_reserved_bytes=memory["peak_reserved_bytes"],
        peak_device_bytes=memory["peak_device_bytes"],
        time_s=report.time_s,
    )
