"""Predict every measured run: one simulation for each different scenario, on all cores.

Workers are processes of ``concurrent.futures``: simulations are pure Python and share nothing. They start afresh
(``spawn``), so that no thread or lock of this process is copied into them.
"""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

from sim.errors import ScenarioError, SimError
from sim.interop.values import dotted, show
from sim.pipeline import simulate
from sim.scenario.load import load_scenario_mapping
from sim.scenario.schema import Scenario
from sim.validation.formulas import OURS, Counts, counts_of, formula_of
from sim.validation.runs import Run, RunsFile

WORTH_A_POOL = 8
"""Fewer simulations than this are done before a worker has started."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a simulation says that can be measured, and what the run is filed under.

    ``values`` is by quantity, ``counts`` what the FLOP formulas are made of, ``parts_s`` the slowest rank's step.
    """

    values: dict[str, float | bool]
    gpu: str
    num_gpus: int
    strategy: str
    parameters: int
    counts: Counts
    parts_s: dict[str, float]
    ranks: tuple[Mapping[str, Any], ...] = ()
    """Memory of each class of ranks, as the report has it."""
    band_s: tuple[float, float] | None = None
    """The band beside the step time."""
    deviation: float = 0.0
    """Standard deviation of the logarithm that the step's parts bring to the band."""
    num_nodes: int = 1
    stages: int = 1
    probability_fits: float | None = None
    exposed_s: tuple[tuple[str, str, float], ...] = ()
    """Exposed time of each (kind, axis), the longest first."""
    assumed: tuple[str, ...] = ()
    """What the report says is assumed, extrapolated or not modelled."""

    def rank_of(self, run: Run) -> Mapping[str, Any] | None:
        """Return the memory of the rank that a run measured: the fullest one's, or that of a pipeline rank."""
        chosen = [r for r in self.ranks if run.pipeline_rank is None or r["stage"] == run.pipeline_rank]
        return max(chosen, key=lambda r: (r["peak_allocated_bytes"], -r["rank"]), default=None)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a scenario has no prediction: one or more reasons; ``defect`` where it is our fault."""

    reasons: tuple[str, ...]
    defect: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity of one run. ``error`` is predicted / measured - 1; for ``fits`` 1 where they differ."""

    run: Run
    source: str
    quantity: str
    measured: float | bool
    predicted: float | bool
    error: float
    prediction: Prediction


@dataclass(frozen=True, slots=True)
class Failed:
    run: Run
    source: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class Validation:
    """All comparisons and failures, in the order of the files; ``assumptions`` say how figures were made comparable."""

    files: tuple[RunsFile, ...]
    comparisons: tuple[Comparison, ...]
    failed: tuple[Failed, ...]
    assumptions: tuple[str, ...]


def validate(
    files: Sequence[RunsFile], jobs: int | None = None, progress: Callable[[str], None] = lambda words: None
) -> Validation:
    """Return every run of the files beside its prediction. The same whatever the number of ``jobs``."""
    rows = [(run, file.name) for file in files for run in file.runs]
    keys = [_key(run) for run, _ in rows]
    tasks = {key: (run.scenario, run.id, run.folder) for key, (run, _) in reversed(list(zip(keys, rows, strict=True)))}
    answers = _answers({key: tasks[key] for key in dict.fromkeys(keys)}, jobs, progress)
    comparisons: list[Comparison] = []
    failed: list[Failed] = []
    for key, (run, source) in zip(keys, rows, strict=True):
        answer = answers[key]
        if isinstance(answer, Failure):
            failed.append(Failed(run, source, answer))
        else:
            comparisons.extend(_compare(run, source, answer))
    return Validation(tuple(files), tuple(comparisons), tuple(failed), tuple(_assumptions(comparisons)))


def select(files: Sequence[RunsFile], text: str = "", limit: int | None = None) -> tuple[RunsFile, ...]:
    """Return the files with only the runs whose ``file:id`` contains ``text``, at most ``limit``, evenly spread."""
    chosen = [run for file in files for run in file.runs if text.lower() in f"{file.name}:{run.id}".lower()]
    if limit is not None and limit < len(chosen):
        chosen = [chosen[index * len(chosen) // limit] for index in range(limit)]
    kept = {id(run) for run in chosen}
    return tuple(
        RunsFile(file.file, file.name, file.source, tuple(run for run in file.runs if id(run) in kept))
        for file in files
    )


def calibrated(files: Sequence[RunsFile], calibration: str) -> tuple[RunsFile, ...]:
    """Return the files with a calibration in every scenario; those of another GPU will say that it is not theirs."""
    return tuple(
        replace(file, runs=tuple(replace(r, scenario={**r.scenario, "calibration": calibration}) for r in file.runs))
        for file in files
    )


# --- one scenario --------------------------------------------------------------------------------


def predict(scenario: Mapping[str, Any], name: str, folder: str) -> Prediction | Failure:
    """Simulate one scenario. Whatever goes wrong is a ``Failure`` with its reasons."""
    try:
        resolved = load_scenario_mapping(dict(scenario), name, folder=folder)
        return _predicted(resolved)
    except ScenarioError as error:
        return Failure(tuple(dict.fromkeys(finding.problem for finding in error.findings)), defect=False)
    except (SimError, ArithmeticError, AssertionError, LookupError, TypeError, ValueError, AttributeError,
            NotImplementedError, RecursionError, MemoryError) as error:  # fmt: skip
        return Failure((f"a defect of sim: {type(error).__name__}: {error}"[:300],), defect=True)


def _predicted(scenario: Scenario) -> Prediction:
    content = simulate(scenario).report.to_dict()
    step, memory = content["step"], content["memory"]
    counts = counts_of(scenario)
    return Prediction(
        values={
            "step_time_s": step["time_s"],
            "tokens_per_s_per_gpu": step["tokens_per_s_per_gpu"],
            "model_flops_per_s_per_gpu": step["model_flops_per_s_per_gpu"],
            "mfu": step["mfu"],
            "peak_allocated_bytes": memory["peak_allocated_bytes"],
            "peak_reserved_bytes": memory["peak_reserved_bytes"],
            "peak_device_bytes": memory["peak_device_bytes"],
            "fits": content["fits"],
        },
        gpu=scenario.cluster.gpu.name,
        num_gpus=content["world_size"],
        strategy=strategy_of(scenario),
        parameters=round(counts.parameters),
        counts=counts,
        ranks=tuple(memory["ranks"]),
        parts_s={part: step[f"{part}_s"] for part in step["ticks"] if part != "time"},
        band_s=tuple(step["band_s"]) if "band_s" in step else None,
        deviation=step.get("band_deviation", 0.0),
        num_nodes=scenario.cluster.num_nodes,
        stages=scenario.parallelism.pp,
        probability_fits=memory.get("probability_fits"),
        exposed_s=tuple((total["kind"], total["axis"], total["exposed_s"]) for total in content["communication"]),
        assumed=tuple(content["warnings"]),
    )


def strategy_of(scenario: Scenario) -> str:
    """Return framework, ZeRO stage and the axes that are used: "deepspeed ZeRO-1 tp pp"."""
    zero = f" ZeRO-{scenario.parallelism.zero}" if scenario.parallelism.zero else ""
    axes = "".join(f" {axis}" for axis in ("tp", "pp", "cp", "ep") if getattr(scenario.parallelism, axis) > 1)
    return f"{scenario.framework}{zero}{axes or ' dp only'}"


# --- measured beside predicted -------------------------------------------------------------------


def _compare(run: Run, source: str, prediction: Prediction) -> Iterator[Comparison]:
    for quantity, measured in run.measured.items():
        predicted = in_formula(quantity, run.flops_formula, prediction)
        if run.pipeline_rank is not None and quantity.startswith("peak_"):
            predicted = (prediction.rank_of(run) or {}).get(quantity, predicted)
        error = float(predicted != measured) if quantity == "fits" else predicted / measured - 1
        yield Comparison(run, source, quantity, measured, predicted, error, prediction)


def in_formula(quantity: str, flops_formula: str, prediction: Prediction) -> float | bool:
    """Return a predicted value; FLOP/s and MFU in the source's formula, where it is known."""
    value = prediction.values[quantity]
    formula = formula_of(flops_formula)
    if quantity not in ("model_flops_per_s_per_gpu", "mfu") or formula is None:
        return value
    return value * formula.flops(prediction.counts) / OURS.flops(prediction.counts)


def _assumptions(comparisons: Sequence[Comparison]) -> Iterator[str]:
    runs = {(row.source, row.run.id): row.run for row in comparisons}
    taken = Counter((source, *change) for (source, _), run in runs.items() for change in run.taken)
    for (source, path, value), count in taken.items():
        given = "a guess, left to sim's default" if value is None else f"{show(value)}, as assumed says"
        yield f"{source}: {dotted(path)} of {count} runs: {given}"
    counted: dict[tuple[str, str], int] = {}
    for row in comparisons:
        if row.quantity in ("model_flops_per_s_per_gpu", "mfu"):
            key = (row.source, row.run.flops_formula)
            counted[key] = counted.get(key, 0) + 1
    for (source, words), count in counted.items():
        formula = formula_of(words)
        said = f'"{words}"' if words else "not named"
        if formula is None:
            yield f"{source}: FLOP formula {said}: {count} figures compared as if it were {OURS.words}"
        elif formula is not OURS:
            yield f"{source}: FLOP formula {said}: {count} figures compared in {formula.words}"
    for row in comparisons:
        if above_peak(row):
            yield (
                f"{row.source}: {row.run.id}: it needs more FLOP/s than the GPU has: the source's batch or "
                "time cannot be what stands in its table; compared as it is"
            )
    yield from contradictions(comparisons)
    if lost := len({(r.source, r.run.id) for r in comparisons if not r.prediction.values["fits"] and _ran(r.run)}):
        yield (
            f"{lost} runs that were measured are predicted not to fit; the memory predicted for them ends where the "
            "allocator gives up"
        )


SAME_TOKENS = 0.05
"""Shares by which a step's tokens by two measured figures may differ: they are rounded, and of different steps."""


def contradictions(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield, for each run whose own figures cannot all hold, which do not; all are compared as they are."""
    for row in {(r.source, r.run.id): r for r in comparisons}.values():
        found, ours, name = row.run.measured, row.prediction.values, f"{row.source}: {row.run.id}"
        step, rate = (found.get(quantity) for quantity in ("step_time_s", "tokens_per_s_per_gpu"))
        if step and rate:
            tokens = float(ours["step_time_s"]) * float(ours["tokens_per_s_per_gpu"])
            if abs(float(step) * float(rate) / tokens - 1) > SAME_TOKENS:
                theirs = f"{float(step) * float(rate):,.0f} tokens of a GPU and step"
                yield f"{name}: step_time_s times tokens_per_s_per_gpu is {theirs}, the scenario has {tokens:,.0f}"
        held = [
            (q, found[q]) for q in ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes") if q in found
        ]
        for (less, a), (more, b) in pairwise(held):
            if float(a) > float(b):
                yield f"{name}: {less} is above {more}, which includes it"


def above_peak(row: Comparison) -> bool:
    """Whether a measured time or token rate would need more than the GPU's peak: then something else was measured."""
    if row.quantity not in ("step_time_s", "tokens_per_s_per_gpu") or not row.predicted:
        return False
    measured, predicted = float(row.measured), float(row.predicted)
    faster = predicted / measured if row.quantity == "step_time_s" else measured / predicted
    return row.prediction.values["mfu"] * faster > 1


def _ran(run: Run) -> bool:
    return run.measured.get("fits", True) is not False


# --- many scenarios ------------------------------------------------------------------------------

Task = tuple[dict[str, Any], str, str]
"""Scenario, name, folder."""


def _key(run: Run) -> str:
    return json.dumps([run.scenario, run.folder], sort_keys=True, default=str)


def _answers(
    tasks: Mapping[str, Task], jobs: int | None, progress: Callable[[str], None]
) -> dict[str, Prediction | Failure]:
    """Return an answer for each task."""
    workers = min(jobs or _num_cores(), len(tasks))
    answers: dict[str, Prediction | Failure] = {}
    if workers <= 1 or len(tasks) < WORTH_A_POOL:
        for key, task in tasks.items():
            answers[key] = predict(*task)
            _after(key, answers, tasks, progress)
            gc.collect()
        return answers
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    futures: dict[str, Future[Prediction | Failure]] = {}
    try:
        for key in sorted(tasks, key=lambda key: -_work_of(tasks[key][0])):  # what takes longest does not come last
            futures[key] = pool.submit(_work, tasks[key])
        for key, future in futures.items():
            try:
                answers[key] = future.result()
            except BrokenProcessPool:
                answers[key] = Failure(("its process was ended from outside; too little memory?",), defect=True)
            _after(key, answers, tasks, progress)
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()
    return answers


def _work_of(scenario: Mapping[str, Any]) -> float:
    """Return what a simulation costs, roughly: calls of chunks, which are passes of microbatches through stages."""
    parallelism, training = scenario.get("parallelism"), scenario.get("training")
    try:
        stages = parallelism.get("pp", 1) * parallelism.get("vpp", 1)  # type: ignore[union-attr]
        replicas = parallelism.get("dp", 1)  # type: ignore[union-attr]
        return float(stages * training["global_batch_size"] / (training["micro_batch_size"] * replicas))  # type: ignore[index]
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0.0  # its mistake is found where it is read


def _after(key: str, answers: Mapping[str, object], tasks: Mapping[str, Task], progress: Callable[[str], None]) -> None:
    progress(f"{len(answers):,} of {len(tasks):,}, {tasks[key][1]}")


def _num_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    """Ctrl-C is the parent's: it lets what runs end and starts no more. Cycles are collected between simulations."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    gc.freeze()


def _work(task: Task) -> Prediction | Failure:
    answer = predict(*task)
    gc.collect()
    return answer
