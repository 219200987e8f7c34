"""Sections of plain settings, each of one framework or of any, and what they ask of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sim.interop.values import Problem, WrongValueError, read_mapping
from sim.scenario import fields
from sim.scenario.sections.resolution import Resolution

_LAYERS = {"async_tensor_model_parallel_allreduce"}
"""Megatron's settings of its layers, which Megatron-DeepSpeed runs too: they may stand under deepspeed."""

_LAYERS_IN_WORDS = "async_tensor_model_parallel_allreduce, which Megatron-DeepSpeed has too"

_DEFAULTS_OF_SIM = {
    ("ddp", "mixed_precision"): "sim's default: torch.autocast, as most train",
    ("fsdp2", "param_dtype"): "training.precision",
    ("fsdp2", "reduce_dtype"): "sim's default: fp32, as torchtitan reduces",
    ("fsdp2", "orig_dtype"): "sim's default: fp32, as torchtitan optimizes",
    ("fsdp2", "wrap"): "sim's default: each block, then the model",
    ("fsdp1", "mixed_precision"): "MosaicML Composer's default",
    ("fsdp1", "orig_dtype"): "sim's default: fp32, which Composer trains",
    ("fsdp1", "shard_size"): "the GPUs of a node, as FSDP's default process groups",
}


def read_settings(
    r: Resolution, key: str, table: Any, given: object, framework: str | None, frameworks: str
) -> dict[str, Any]:
    """Read a section of plain settings, which belongs to one framework or to any (``frameworks`` empty)."""
    layers = key == "megatron" and framework == "deepspeed" and isinstance(given, Mapping) and set(given) <= _LAYERS
    if given is not None and frameworks and framework is not None and framework != frameworks and not layers:
        r.problems.append(
            Problem(
                (key,),
                f"{key} settings are given, but framework is {framework}",
                f"write framework: {frameworks}, or "
                + (f"only {_LAYERS_IN_WORDS}" if key == "megatron" and framework == "deepspeed" else "remove them"),
            )
        )
        return {}
    values, _ = read_mapping(given, table, (key,), r.problems)
    if frameworks == framework or not frameworks:
        for name in table:
            if name not in values:
                r.sources[f"{key}.{name}"] = _DEFAULTS_OF_SIM.get(
                    (key, name), "Megatron's default" if key == "megatron" else "PyTorch's default"
                )
    return values


def check_tensor_parallel_overlap(r: Resolution, megatron: Mapping[str, Any], fsdp2: Mapping[str, Any]) -> None:
    """Exchanges in pieces: all-gathers and reduce-scatters, between GPUs that reach each other's memory.

    Sources: megatron/training/arguments.py (``tp_comm_overlap``); torchtitan, "Async TP requires torch.compile".
    """
    d = r.draft
    keys = (("megatron", "tp_comm_overlap", megatron), ("fsdp2", "async_tensor_parallel", fsdp2))
    for section, name, values in keys:
        if not values.get(name):
            continue
        path, key = (section, name), f"{section}.{name}"
        if d.knows("sp") and not d.sp:
            what = f"{key} needs sequence parallelism, but parallelism.sp is false"
            r.problems.append(Problem(path, what, f"write parallelism.sp: true and a tp above 1, or {name}: false"))
        if section == "fsdp2" and d.knows("compile") and not d.compile:
            what = f"{key} is Inductor's, but training.compile is false"
            r.problems.append(Problem(path, what, f"write training.compile: true, or {name}: false"))
        if section == "megatron" and values.get("transformer_impl") == "local":
            what = f"{key} is Transformer Engine's, but megatron.transformer_impl is local"
            r.problems.append(Problem(path, what, f"write transformer_impl: transformer_engine, or {name}: false"))
        if d.knows("tp") and d.knows("node"):
            reach = d.node.nvlink_domain_nodes * sum(kind == "gpu" for _, kind in d.node.devices)
            if d.tp > reach:
                what = f"{key} copies between GPUs of one node, but tp {d.tp} spans several of {reach}"
                r.problems.append(Problem(path, what, f"write tp: {reach} or less, or {name}: false"))


def read_allocator(r: Resolution, given: object) -> dict[str, Any]:
    """Return the allocator's settings, from a mapping or as ``PYTORCH_ALLOC_CONF`` writes them."""
    if isinstance(given, str):
        try:
            given = fields.allocator_mapping(given)
        except WrongValueError as error:
            r.problems.append(Problem(("allocator",), f"allocator: {error.problem}", error.remedy))
            return {}
    values = read_settings(r, "allocator", fields.ALLOCATOR, given, None, "")
    if "max_split_size" in values:
        values["max_split_size_bytes"] = values.pop("max_split_size")
    if values.get("garbage_collection_threshold") and "memory_fraction" not in values:
        r.warnings.append(
            "allocator.garbage_collection_threshold does nothing without allocator.memory_fraction: PyTorch collects "
            "only where set_per_process_memory_fraction was called (c10/cuda/CUDACachingAllocator.cpp)"
        )
    if "cublas_workspace" in values:
        values["cublas_workspace_bytes"] = values.pop("cublas_workspace")
    return values
