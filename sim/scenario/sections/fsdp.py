"""The sections ``fsdp1`` and ``fsdp2``: shard groups, what is gathered in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sim.interop.values import Problem
from sim.scenario.sections.resolution import Resolution


def check_fsdp(r: Resolution, values: dict[str, Any], framework: str | None) -> None:
    """Shard groups divide the data-parallel ranks; what reshards keeps slices over a part of a group."""
    d = r.draft
    if framework not in ("fsdp1", "fsdp2") or not d.knows("dp"):
        return
    _float8(r, values)
    shard = values.get("shard_size")
    if shard is not None and d.dp % shard:
        r.problems.append(
            Problem(
                (framework, "shard_size"),
                f"{framework}.shard_size = {shard} does not divide dp {d.dp}",
                f"write a divisor of {d.dp}",
            )
        )
        return
    strategy = values.get("sharding_strategy", "FULL_SHARD")
    if framework == "fsdp1" and shard is not None and "HYBRID" not in strategy:
        r.problems.append(
            Problem(
                ("fsdp1", "shard_size"),
                f"fsdp1.shard_size is given, but {strategy} shards over all data-parallel ranks",
                "write sharding_strategy: HYBRID_SHARD, or leave shard_size out",
            )
        )
    ranks = shard or d.dp
    kept = values.get("reshard_after_forward", True)
    # _get_post_forward_mesh_info in torch/distributed/fsdp/_fully_shard/_fsdp_init.py
    if not isinstance(kept, bool) and (ranks % kept or kept >= ranks):
        r.problems.append(
            Problem(
                ("fsdp2", "reshard_after_forward"),
                f"fsdp2.reshard_after_forward = {kept} is no part of a shard group of {ranks} ranks",
                f"write true, false, or a divisor of {ranks} between 1 and it",
            )
        )


def _float8(r: Resolution, values: Mapping[str, Any]) -> None:
    """torchao's Float8LinearConfig gathers in 8 bits with a scale a tensor alone (torchao/float8/config.py)."""
    d = r.draft
    if not values.get("float8_all_gather"):
        return
    if values.get("float8_recipe") == "rowwise":
        r.problems.append(
            Problem(
                ("fsdp2", "float8_all_gather"),
                "fsdp2.float8_all_gather goes with a scale a tensor alone, not with float8_recipe rowwise",
                "write float8_recipe: tensorwise, or leave float8_all_gather out",
            )
        )
    if not d.knows("precision", "code"):
        return
    if d.precision != "fp8":
        r.warnings.append(f"fsdp2.float8_all_gather true changes nothing: precision is {d.precision}")
    elif d.code != "torch":
        r.warnings.append(f"fsdp2.float8_all_gather true changes nothing: it is torchao's, and code is {d.code}")
