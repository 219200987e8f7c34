"""A resolved scenario as a file: every value written out, sizes with units, and where each default comes from."""

from __future__ import annotations

from typing import Any

import yaml

from sim.interop.deepspeed_config import write_deepspeed_config
from sim.scenario.schema import Scenario


def dump(scenario: Scenario) -> str:
    """Return YAML that ``load_scenario`` reads as the same Scenario, sources and warnings included."""
    header = "# Resolved by sim: every default is written out, and 'sources' says where each comes from.\n"
    return header + yaml.dump(
        plain(scenario),
        Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper),
        sort_keys=False,
        allow_unicode=True,
        width=110,
    )


def plain(scenario: Scenario) -> dict[str, Any]:
    """Return the mapping that such a file holds."""
    cluster, parallelism = scenario.cluster, scenario.parallelism
    data: dict[str, Any] = {
        "name": scenario.name,
        "model": {
            key: value
            for key, value in scenario.model.model_dump().items()
            if value not in (None, "") and not (key == "max_position_embeddings" and _unused_table(scenario))
        },
        "cluster": {
            **{"node": cluster.node.name, **cluster.written},
            "num_nodes": cluster.num_nodes,
            "num_gpus": cluster.num_gpus,
        },
        "framework": scenario.framework,
        "parallelism": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in parallelism.model_dump().items()
            if value is not None
        },
        "training": scenario.training.model_dump(),
    }
    if scenario.framework == "deepspeed":
        precision = scenario.training.precision
        if precision in ("fp8", "mxfp8", "nvfp4"):
            precision = "bf16"  # what is not in 8 bit or less
        data["deepspeed"] = {
            "train_micro_batch_size_per_gpu": scenario.training.micro_batch_size,
            "gradient_accumulation_steps": scenario.num_microbatches,
            "train_batch_size": scenario.training.global_batch_size,
            **({precision: {"enabled": True}} if precision in ("bf16", "fp16") else {}),
            **write_deepspeed_config(scenario.deepspeed),
        }
    if scenario.framework == "ddp":
        data["ddp"] = scenario.ddp.model_dump()
    if scenario.framework == "fsdp2":
        data["fsdp2"] = scenario.fsdp2.model_dump()
    if scenario.framework == "fsdp1":
        data["fsdp1"] = scenario.fsdp1.model_dump()
    if scenario.framework == "megatron":
        given = scenario.megatron.model_dump()
        data["megatron"] = {key: value for key, value in given.items() if value is not None}
    apart = {"max_split_size_bytes", "cublas_workspace_bytes", "memory_fraction"}
    allocator = scenario.allocator.model_dump(exclude=apart)
    if (split := scenario.allocator.max_split_size_bytes) is not None:
        allocator["max_split_size"] = size_text(split)
    if (fraction := scenario.allocator.memory_fraction) is not None:
        allocator["memory_fraction"] = fraction
    if (workspace := scenario.allocator.cublas_workspace_bytes) is not None:
        allocator["cublas_workspace"] = size_text(workspace)
    data["allocator"] = allocator
    faults = {key: list(entries) for key, entries in scenario.faults.model_dump(mode="json").items() if entries}
    if faults:
        data["faults"] = faults
    if scenario.calibration is not None:
        data["calibration"] = scenario.calibration.file
    data["sources"] = dict(scenario.sources)
    if scenario.warnings:
        data["warnings"] = list(scenario.warnings)
    return data


def _unused_table(scenario: Scenario) -> bool:
    """Whether the config said nothing of positions, and nothing depends on them: writing them would be a claim."""
    return scenario.sources.get("model.max_position_embeddings") == "sim's default"


def size_text(num_bytes: int) -> str:
    """Return bytes as a text that reads back exactly: in the largest binary unit that divides them."""
    for prefix, factor in (("Ti", 2**40), ("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if num_bytes and num_bytes % factor == 0:
            return f"{num_bytes // factor} {prefix}B"
    return f"{num_bytes} B"
