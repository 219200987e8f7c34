"""The section ``parallelism``: axes, ZeRO stage, and the data-parallel size that remains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sim.interop.values import Problem, read_mapping
from sim.scenario import fields
from sim.scenario.checks import mesh_fits_cluster
from sim.scenario.draft import UnknownError
from sim.scenario.sections.deepspeed import deepspeed_of
from sim.scenario.sections.resolution import Resolution

_CP_COMM = {"fsdp2": "all_gather", "deepspeed": "a2a"}
"""Megatron's is p2p, torch's ``context_parallel`` gathers unless told otherwise, DeepSpeed's Ulysses swaps heads."""


def read_parallelism(r: Resolution, given: object, framework: str | None) -> None:
    """Fill the draft with the axes; what is left out is 1, or follows from the framework and the other sections."""
    values, wrong = read_mapping(given, fields.PARALLELISM, ("parallelism",), r.problems)
    d = r.draft
    for axis in ("tp", "pp", "cp", "ep", "vpp"):
        if axis not in wrong:
            setattr(d, axis, values.get(axis, 1))
            if axis not in values:
                r.sources[f"parallelism.{axis}"] = "1, as it is left out"
    if "layers_per_stage" not in wrong:
        d.layers_per_stage = values.get("layers_per_stage")
    if "order" not in wrong:
        d.order = values.get("order")
    if "cp_comm" not in wrong:
        _exchange(r, values, framework)
    if "schedule" not in wrong:
        d.schedule = values.get("schedule", "interleaved" if values.get("vpp", 1) > 1 else "1f1b")
        if "schedule" not in values:
            r.sources["parallelism.schedule"] = "Megatron's and DeepSpeed's default"
    if "sp" not in wrong:
        d.sp = values.get("sp", False)
        if d.sp and values.get("tp", 1) == 1 and "tp" not in wrong:
            d.sp = False  # megatron/training/arguments.py turns it off
            r.warnings.append("parallelism.sp needs tp > 1; with tp 1 it is off, as Megatron turns it off")
    if "zero" not in wrong:
        _zero(r, values.get("zero"), framework)
    if "dp" not in wrong:
        _dp(r, values.get("dp"))


def _exchange(r: Resolution, values: Mapping[str, Any], framework: str | None) -> None:
    r.draft.cp_comm = values.get("cp_comm") or _CP_COMM.get(framework or "", "p2p")
    if "cp_comm" not in values and values.get("cp", 1) > 1:
        r.sources["parallelism.cp_comm"] = f"{framework or 'Megatron'}'s default"
    usual = (("schedule", "pp", "1f1b"), ("cp_comm", "cp", _CP_COMM.get(framework or "", "p2p")))
    for key, axis, default in usual:
        if values.get(key, default) != default and values.get(axis, 1) == 1:
            r.warnings.append(f"parallelism.{key} {values[key]} changes nothing: {axis} is 1")


def _zero(r: Resolution, given: int | None, framework: str | None) -> None:
    d, reading = r.draft, deepspeed_of(r)
    stage = reading.fields.get("stage") if reading else None
    if given is not None:
        if stage is not None and stage != given:
            r.problems.append(
                Problem(
                    ("parallelism", "zero"),
                    f"parallelism.zero = {given}, but {r.ds_name} says zero_optimization.stage = {stage}",
                    f"write zero: {stage}, or leave zero out",
                )
            )
        else:
            d.zero = given
    elif stage is not None:
        d.zero = stage
        r.sources["parallelism.zero"] = f"{r.ds_name}: zero_optimization.stage"
    elif framework == "deepspeed" and not d.knows("deepspeed"):
        return
    elif framework in ("fsdp1", "fsdp2"):
        d.zero = 3
        r.sources["parallelism.zero"] = "FSDP's default, full sharding"
    elif framework is not None:
        d.zero = 0
        words = "DeepSpeed's default (deepspeed/runtime/zero/config.py)"
        r.sources["parallelism.zero"] = words if framework == "deepspeed" else "0, as it is left out"


def _dp(r: Resolution, given: int | None) -> None:
    d = r.draft
    if given is not None:
        d.dp = given
    if not d.knows("tp", "pp", "cp", "num_gpus"):
        return
    if given is None:
        dp, rest = divmod(d.num_gpus, d.tp * d.pp * d.cp)
        if not rest:
            d.dp = dp
            r.sources["parallelism.dp"] = f"what remains of {d.num_gpus} GPUs"
            return
    try:
        wrong = list(mesh_fits_cluster(d))
    except UnknownError:
        return
    if wrong:
        r.problems.extend(wrong)
        d.forget("dp")
