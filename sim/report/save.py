"""``--out``: a folder with everything worth keeping of one answered scenario.

The same scenario gives the same bytes: no time stamps anywhere. Each file appears whole or not at all: it is written
beside its place and then moved there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from sim.errors import Finding, ScenarioError
from sim.ir.footprint import Footprint
from sim.ir.program import World
from sim.ir.timeline import Timeline
from sim.report.report import RemedyResult, Report, json_text, result
from sim.scenario.schema import Scenario


class Answered(Protocol):
    """What of a simulation is kept. It must have been recorded: samples, events and segments."""

    @property
    def scenario(self) -> Scenario: ...
    @property
    def world(self) -> World: ...
    @property
    def timeline(self) -> Timeline: ...
    @property
    def footprints(self) -> tuple[Footprint, ...]: ...
    @property
    def report(self) -> Report: ...


def prepare(out: Path, option: str = "--out") -> None:
    """Make the folder, before the work is done for it. Raises ScenarioError where it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise _refused(out, "is a file, not a folder", option) from None
    except NotADirectoryError:
        raise _refused(out, "lies below a file", option) from None
    except OSError as error:
        raise _refused(out, _why(error), option) from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise _refused(out, "cannot be written to", option)


def prepare_file(file: Path, option: str) -> None:
    """Make the folder of one file, before the work is done for it. Raises ScenarioError where it cannot be written."""
    if file.is_dir():
        raise _refused(file, "is a folder, not a file", option)
    if not file.exists():
        prepare(file.parent, option)
    elif not os.access(file, os.W_OK):
        raise _refused(file, "cannot be written to", option)


def save(simulation: Answered, remedies: Sequence[RemedyResult], out: Path) -> None:
    """Write the resolved scenario, the report as data and as text, plots, trace and snapshot into ``out``."""
    from sim.report.markdown import to_markdown
    from sim.report.plots import memory_png, timeline_png
    from sim.report.snapshot import snapshot_bytes
    from sim.report.trace import trace_bytes
    from sim.scenario.load import dump_resolved

    prepare(out)
    report, timeline, fullest = simulation.report, simulation.timeline, simulation.report.fullest
    program = next(program for program in simulation.world.programs if program.rank == fullest.ranks[0])
    write_whole(out / "scenario.resolved.yaml", dump_resolved(simulation.scenario).encode())
    write_whole(out / "report.json", json_text(result(report, remedies)).encode())
    write_whole(out / "report.md", to_markdown(simulation.scenario, report, remedies).encode())
    write_whole(out / "memory.png", memory_png(fullest, timeline, program, report))
    write_whole(out / "timeline.png", timeline_png(timeline, report))
    write_whole(out / "trace.json.gz", trace_bytes(simulation.world, timeline, simulation.footprints))
    write_whole(out / "memory_snapshot.pickle", snapshot_bytes(fullest))


def write_whole(path: Path, content: bytes, option: str = "--out") -> None:
    """Write a file so that nobody ever sees a part of it. Raises ScenarioError where that cannot be."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)  # /dev/stdout
            return
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise _refused(path, _why(error), option) from None


def _why(error: OSError) -> str:
    return f"cannot be written: {(error.strerror or str(error)).lower()}"


def _refused(path: Path, problem: str, option: str) -> ScenarioError:
    remedy = "" if option == "--out" else "give a place that can be written to"
    return ScenarioError([Finding(option, 0, f"{path} {problem}", remedy)])
