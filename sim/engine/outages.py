"""A training run, event by event: work, checkpoints, failures, spares, repairs, restarts.

The job works and writes a checkpoint after each stretch of work. Every node in use, its GPUs included, fails at a
constant rate (exponential times: most of a node's life lies between its first weeks and its last years). On a failure
the job stops; the node goes to repair and comes back after ``repair_s``. The job waits for detection and for a node
(a spare stands ready, or the first one that is repaired is taken), restarts, and does again what it had done since the
last checkpoint that was whole. Failures during detection and restart count too; a job that waits for nodes does not
fail.

Nodes are simpy's: a container holds those that stand ready. Where nothing fails for a while, the checkpoints of that
while are worked out at once, so that a run costs as many events as it has failures.

Source of the model: Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22
(2006), section 2; with spares and repairs beside it. Checked by: tests/unit/test_engine_outages.py, against his
closed form.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import simpy


@dataclass(frozen=True, slots=True)
class RunSettings:
    """A run as plain values. ``work_s`` is the training itself, without any interruption.

    ``failures_per_s`` of the whole job; ``interval_s`` of work between checkpoints of ``checkpoint_s``.
    """

    work_s: float
    failures_per_s: float
    checkpoint_s: float
    interval_s: float
    detect_s: float
    restart_s: float
    repair_s: float
    spare_nodes: int


@dataclass(frozen=True, slots=True)
class RunResult:
    """When it ended, and what the time went into; the parts add up to ``wall_s``."""

    wall_s: float
    work_s: float
    checkpoints_s: float
    lost_s: float
    """Work, and checkpoints, that were done again or cut off."""
    down_s: float
    """Detection, waiting for nodes, restarts."""
    num_failures: int


def simulate_run(settings: RunSettings, seed: int) -> RunResult:
    """Return one run. The same seed gives the same run; times between failures are drawn in order."""
    env = simpy.Environment()
    job = _Job(env, settings, random.Random(seed))
    env.process(job.go())
    env.run(job.done)
    return job.result()


class _Job:
    def __init__(self, env: Any, settings: RunSettings, draws: random.Random) -> None:
        self._env = env
        self._settings = settings
        self._draws = draws
        self._ready = simpy.Container(env, init=settings.spare_nodes)
        self.done = env.event()
        self._saved_s = 0.0
        self._checkpoints_s = 0.0
        self._lost_s = 0.0
        self._down_s = 0.0
        self._num_failures = 0

    def go(self) -> Generator[Any, Any, None]:
        env, settings = self._env, self._settings
        left = self._until_failure()
        while True:
            whole_s = self._remaining_s()
            if left >= whole_s:
                self._checkpoints_s += whole_s - (settings.work_s - self._saved_s)
                self._saved_s = settings.work_s
                yield env.timeout(whole_s)
                break
            cycle = settings.interval_s + settings.checkpoint_s
            cycles = int(left // cycle)
            self._saved_s += cycles * settings.interval_s
            self._checkpoints_s += cycles * settings.checkpoint_s
            self._lost_s += left - cycles * cycle
            yield env.timeout(left)
            left = yield from self._recover()
        self.done.succeed()

    def _recover(self) -> Generator[Any, Any, float]:
        """Go through detection, the wait for a node and the restart; return how long nothing fails afterwards."""
        env, settings = self._env, self._settings
        began, missing = env.now, 0
        while True:
            self._num_failures += 1
            missing += 1
            env.process(self._repair())
            left = self._until_failure()
            if left < settings.detect_s:
                yield env.timeout(left)
                continue
            yield env.timeout(settings.detect_s)
            yield self._ready.get(missing)  # what stands still does not fail
            left, missing = left - settings.detect_s, 0
            if left < settings.restart_s:
                yield env.timeout(left)
                continue
            yield env.timeout(settings.restart_s)
            self._down_s += env.now - began
            return left - settings.restart_s

    def _repair(self) -> Generator[Any, Any, None]:
        yield self._env.timeout(self._settings.repair_s)
        yield self._ready.put(1)

    def _until_failure(self) -> float:
        rate = self._settings.failures_per_s
        return self._draws.expovariate(rate) if rate > 0 else float("inf")

    def _remaining_s(self) -> float:
        """Return the time to the end if nothing fails: work with a checkpoint after each interval, the last one too."""
        settings = self._settings
        work_s = settings.work_s - self._saved_s
        full = work_s / settings.interval_s
        return work_s + full * settings.checkpoint_s

    def result(self) -> RunResult:
        return RunResult(
            wall_s=self._env.now,
            work_s=self._saved_s,
            checkpoints_s=self._checkpoints_s,
            lost_s=self._lost_s,
            down_s=self._down_s,
            num_failures=self._num_failures,
        )
