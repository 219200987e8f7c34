"""One candidate, simulated. What comes back is plain data: it crosses processes, and is what the cache holds."""

from __future__ import annotations

import gc
from typing import Any

from sim.errors import ScenarioError
from sim.ir.program import World
from sim.memory.allocator import AllocatorSettings
from sim.memory.replay import Known, footprints
from sim.pipeline import programs, simulate
from sim.report.report import Report
from sim.scenario.load import load_scenario_mapping
from sim.scenario.schema import Scenario

PARTS = ("compute", "exposed_communication", "bubble", "optimizer", "other")
VERSION = 3
"""Of what a trial holds: an older cache is not read."""


_NOTHING: dict[str, Any] = {
    "version": VERSION,
    "fits": False,
    "fits_gpu": False,
    "step_s": 0.0,
    "parts": dict.fromkeys(PARTS, 0.0),
    "exposed": {},
    "mfu": 0.0,
    "tokens_per_s": 0.0,
    "peak_device_bytes": 0,
    "capacity_bytes": 0,
    "short_bytes": 0,
    "short_stage": 0,
    "host_short_bytes": 0,
    "at_peak": {},
    "beside": {},
    "probability_fits": None,
    "step_band_s": None,
}
"""The outcome of what was not simulated."""


def is_outcome(found: object) -> bool:
    """Whether what was read from a file is a whole outcome, and of this version."""
    if not isinstance(found, dict) or found.get("version") != VERSION:
        return False
    parts = found.get("parts")
    if not isinstance(parts, dict) or set(parts) != set(PARTS):
        return False
    return all(
        key in found and isinstance(found[key], _KINDS.get(type(value), object)) for key, value in _NOTHING.items()
    )


_KINDS: dict[type, Any] = {bool: bool, int: (int, float), float: (int, float), dict: dict}


def trial(scenario: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the outcome of a candidate's scenario.

    What does not fit even without NCCL's buffers is told without working out when anything happens: the allocator acts
    in the order in which the host issues.
    """
    try:
        resolved = load_scenario_mapping(scenario, "candidate", folder=folder)
    except ScenarioError as error:
        return {**_NOTHING, "refused": error.findings[0].problem}
    found = None
    if resolved.framework == "megatron":
        written = programs(resolved)
        replayed: Known = {}
        found = _too_large(resolved, written[1], replayed)
        if found is None:
            found = outcome(simulate(resolved, written=written, replayed=replayed).report)
    else:
        found = outcome(simulate(resolved).report)
    gc.collect()
    return found


def _too_large(scenario: Scenario, world: World, replayed: Known) -> dict[str, Any] | None:
    """Return the outcome of a scenario whose tensors, cached blocks and CUDA context alone are too much; else None."""
    gpu, config = scenario.cluster.gpu, scenario.allocator
    settings = AllocatorSettings(
        expandable_segments=config.expandable_segments,
        max_split_size_bytes=config.max_split_size_bytes,
        roundup_power2_divisions=config.roundup_power2_divisions,
        garbage_collection_threshold=config.garbage_collection_threshold,
        capacity_bytes=gpu.total_memory_bytes - gpu.cuda_context_bytes,
    )
    held = footprints(world, None, settings, {}, known=replayed)
    if all(footprint.out_of_memory is None for footprint in held):
        return None
    short, stage = max((f.out_of_memory.short_bytes, -f.stage) for f in held if f.out_of_memory)
    fullest = max(held, key=lambda footprint: footprint.peak_device_bytes)
    return {
        **_NOTHING,
        "peak_device_bytes": fullest.peak_reserved_bytes + gpu.cuda_context_bytes,
        "capacity_bytes": gpu.total_memory_bytes,
        "short_bytes": short,
        "short_stage": -stage,
        "at_peak": dict(fullest.at_peak),
        "beside": dict(fullest.beside),
    }


def outcome(report: Report) -> dict[str, Any]:
    """Return what a plan needs of a report."""
    data = report.to_dict()
    fullest = report.fullest
    short = max((f.out_of_memory.short_bytes for f in report.footprints if f.out_of_memory), default=0)
    where = next((f.stage for f in report.footprints if f.out_of_memory), fullest.stage)
    exposed: dict[str, float] = {}
    for total in data["communication"]:
        exposed[total["axis"]] = exposed.get(total["axis"], 0.0) + total["exposed_s"]
    return {
        "version": VERSION,
        "fits": report.fits,
        "fits_gpu": report.fits_gpu,
        "step_s": data["step"]["time_s"],
        "parts": {key: data["step"][f"{key}_s"] for key in PARTS},
        "exposed": exposed,
        "mfu": data["step"]["mfu"],
        "tokens_per_s": data["step"]["tokens_per_s"],
        "peak_device_bytes": fullest.peak_device_bytes,
        "capacity_bytes": report.capacity_bytes,
        "short_bytes": short,
        "short_stage": where,
        "host_short_bytes": max(0, report.host_bytes_per_node - report.host_capacity_bytes)
        if not report.fits_host
        else 0,
        "at_peak": dict(fullest.at_peak),
        "beside": dict(fullest.beside),
        "probability_fits": report.confidence.probability_fits if report.confidence else None,
        "step_band_s": data["step"].get("band_s"),
    }
