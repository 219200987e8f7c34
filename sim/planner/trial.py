"""One candidate, simulated. What comes back is plain data: it crosses processes, and is what the cache holds."""

from __future__ import annotations

import gc
from typing import Any

from sim.pipeline import simulate
from sim.report.report import Report
from sim.scenario.load import load_scenario_mapping

VERSION = 1
"""Of what a trial holds: an older cache is not read."""


def trial(scenario: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the outcome of a candidate's scenario."""
    resolved = load_scenario_mapping(scenario, "candidate", folder=folder)
    report = simulate(resolved).report
    gc.collect()
    return outcome(report)


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
        "parts": {
            key: data["step"][f"{key}_s"]
            for key in ("compute", "exposed_communication", "bubble", "optimizer", "other")
        },
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
        "probability_fits": data["memory"].get("probability_fits"),
    }
