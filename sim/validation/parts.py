"""Where measured and predicted memory differ: by category, and over time from a real memory snapshot."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.errors import Finding, ScenarioError
from sim.ir.footprint import CATEGORIES
from sim.validation.predict import Prediction, Validation
from sim.validation.runs import Run

MAX_SNAPSHOT_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Difference:
    """Bytes of one category at the peak, measured and predicted."""

    category: str
    measured_bytes: int
    predicted_bytes: int

    @property
    def difference_bytes(self) -> int:
        return self.predicted_bytes - self.measured_bytes


def differences(run: Run, prediction: Prediction) -> tuple[Difference, ...]:
    """Return the difference of each category that a run measured, the largest first; ``other`` is what is left.

    ``other`` stands where the run has its peak too: what the source has in no category.
    """
    rank = prediction.rank_of(run)
    if run.at_peak is None or rank is None:
        return ()
    predicted: Mapping[str, int] = rank["at_peak"]
    found = [Difference(name, size, predicted.get(name, 0)) for name, size in run.at_peak.items()]
    whole = run.measured.get("peak_allocated_bytes")
    if whole is not None:
        rest = sum(predicted.get(name, 0) for name in CATEGORIES if name not in run.at_peak)
        found.append(Difference("other", round(float(whole)) - sum(run.at_peak.values()), rest))
    return tuple(sorted(found, key=lambda d: (-abs(d.difference_bytes), d.category)))


def all_differences(validation: Validation) -> Iterator[tuple[Run, tuple[Difference, ...]]]:
    """Yield the runs that measured categories, each with its differences."""
    seen: set[tuple[str, str]] = set()
    for row in validation.comparisons:
        key = (row.run.file, row.run.id)
        if row.run.at_peak is not None and key not in seen:
            seen.add(key)
            yield row.run, differences(row.run, row.prediction)


# --- real memory snapshots ------------------------------------------------------------------------


class _Plain(pickle.Unpickler):
    """A snapshot is lists, dicts, texts and numbers: whatever names code is no snapshot and is not loaded."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a memory snapshot does not")


def read_snapshot(path: Path) -> dict[str, Any]:
    """Return what ``torch.cuda.memory._dump_snapshot`` wrote. Raises ScenarioError."""
    try:
        if path.stat().st_size > MAX_SNAPSHOT_BYTES:
            raise ValueError("it is larger than 4 GB")
        content = _Plain(io.BytesIO(path.read_bytes())).load()
        if not isinstance(content, dict) or not {"segments", "device_traces"} <= set(content):
            raise ValueError("it has no segments and device_traces")
    except Exception as error:  # a pickle can fail in any way
        finding = Finding(
            str(path), 0, f"is no memory snapshot: {error}", "write it with torch.cuda.memory._dump_snapshot"
        )
        raise ScenarioError([finding]) from error
    return content


def allocated_curve(content: Mapping[str, Any]) -> list[tuple[float, int]]:
    """Return (time in us, or the number of the event, requested bytes) after each event of the fullest device.

    The record says what changed; what was held before it follows from what the segments hold at its end. Memory counts
    as given back when it was freed (free_requested), as ``torch.cuda.memory_allocated`` does.
    """
    traces = [trace for trace in content["device_traces"] if trace]
    if not traces:
        return []
    trace = max(traces, key=len)
    device = next((i for i, t in enumerate(content["device_traces"]) if t is trace), 0)
    held = sum(
        block.get("requested_size", block["size"])  # events have what was asked for, too
        for segment in content["segments"]
        if segment.get("device", 0) == device
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    )
    signs = {"alloc": 1, "free_requested": -1}
    changes = [(e.get("time_us"), signs[e["action"]] * e["size"]) for e in trace if e["action"] in signs]
    now = held - sum(change for _, change in changes)
    start = next((time for time, _ in changes if time is not None), None)
    points: list[tuple[float, int]] = [(0.0, now)]
    for number, (time, change) in enumerate(changes, 1):
        now += change
        points.append((float(time - start) if time is not None and start is not None else float(number), now))
    return points


def write_plots(validation: Validation, folder: Path) -> list[Path]:
    """Draw, for each predicted run that names a snapshot, measured and predicted memory in one picture."""
    written: list[Path] = []
    done: set[tuple[str, str]] = set()
    for row in validation.comparisons:
        run = row.run
        if not run.snapshot or (run.file, run.id) in done:
            continue
        done.add((run.file, run.id))
        content = read_snapshot(Path(run.folder) / run.snapshot)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', run.id)}.png"
        path.write_bytes(_picture(run, content))
        written.append(path)
    return written


def _picture(run: Run, content: Mapping[str, Any]) -> bytes:
    """Simulate the run once more, with the curve of its memory, and draw both."""
    from sim.pipeline import simulate
    from sim.report.clock import curve
    from sim.report.plots import measured_png
    from sim.scenario.load import load_scenario_mapping
    from sim.units import TICKS_PER_S

    simulation = simulate(load_scenario_mapping(dict(run.scenario), run.id, folder=run.folder), record=True)
    stages = [f for f in simulation.footprints if run.pipeline_rank is None or f.stage == run.pipeline_rank]
    footprint = max(stages or simulation.footprints, key=lambda f: f.peak_allocated_bytes)
    program = next(p for p in simulation.world.programs if p.ranks == footprint.ranks)
    points = curve(footprint, simulation.timeline, program)
    predicted = [(tick / TICKS_PER_S, sample.allocated_bytes) for tick, sample in points]
    trace: list[dict[str, Any]] = max(content["device_traces"], key=len, default=[])
    timed = any("time_us" in event for event in trace)
    return measured_png(run.id, allocated_curve(content), predicted, timed)
