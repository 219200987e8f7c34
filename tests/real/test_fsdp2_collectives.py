"""Real FSDP2 and FSDP1 processes on the CPU do what our programs say: the same collectives in order, the same bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from fsdp_world import Job, collectives, layers_of
from held import live_bytes

from sim.parallel.frameworks.fsdp1 import fsdp1
from sim.parallel.frameworks.fsdp2 import fsdp2
from sim.parallel.frameworks.plan import Plan
from sim.scenario.schema import Fsdp1Settings, Fsdp2Settings
from validation.real import fsdp2 as torch_fsdp


@cache
def measured(num_ranks: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = torch_fsdp.measure(num_ranks)
    return found


def job(case: dict[str, Any], shapes: Any, num_ranks: int, rank: int) -> Job:
    replicas, microbatches = case.get("replicas", 1), case.get("microbatches", 1)
    dtype = case.get("param_dtype") or "fp32"
    layers = layers_of(shapes)
    recompute = "full" if case.get("checkpoint") else "none"
    plan = Plan(
        dp=num_ranks // replicas,
        parameter_dtype=dtype,
        master=dtype != "fp32",
        num_microbatches=microbatches,
        dp_rank=rank % (num_ranks // replicas),
        replicas=replicas,
        gradient_clipping=case.get("clipping", 0.0),
    )
    if "strategy" in case:
        settings1 = Fsdp1Settings(
            sharding_strategy=case["strategy"],
            mixed_precision="FULL" if dtype == "fp32" else "DEFAULT" if "reduce_dtype" in case else "PURE",
            backward_prefetch=case.get("prefetch", "BACKWARD_PRE"),
            forward_prefetch=case.get("forward_prefetch", False),
            use_orig_params=case.get("orig", False),
            gradient_sync=case.get("sync", "every"),
        )
        return Job(fsdp1(layers, settings1, plan), layers, dtype, microbatches, recompute)
    settings = Fsdp2Settings(
        reshard_after_forward=case.get("reshard", True),
        reshard_root=case.get("reshard_root", False),
        reduce_dtype=case.get("reduce_dtype"),
        wrap="torchtitan" if case.get("separate") else "blocks",
        gradient_sync=case.get("sync", "every"),
    )
    return Job(fsdp2(layers, settings, plan), layers, dtype, microbatches, recompute)


@pytest.mark.real
@pytest.mark.parametrize(
    ("num_ranks", "name"), [(num_ranks, name) for num_ranks in (2, 4) for name in torch_fsdp.cases(num_ranks)]
)
def test_collectives_and_state_bytes_are_those_of_torch(num_ranks: int, name: str) -> None:
    case, real = torch_fsdp.CASES[name], measured(num_ranks)[name]
    ranks = {"dp": num_ranks // case.get("replicas", 1), "dp_replicate": case.get("replicas", 1), "dp_reshard": 2}
    for rank in range(num_ranks):
        ours = job(case, real["parameters"], num_ranks, rank)
        chunks = [*ours.micro, ours.step]
        found = [(kind, size, ranks[axis]) for chunk in chunks for kind, size, axis in collectives(chunk)]
        assert found == [tuple(each) for each in real["collectives"]]
        ends = [sum(len(collectives(c)) for c in chunks[: i + 1]) for i in range(len(chunks) - 1)]
        assert ends == real["marks"]
        before = [ours.setup, *ours.micro, ours.first_step]
        held = [live_bytes([*before, *ours.micro[: 2 * index + 2]]) for index in range(len(ours.passes))]
        stepped = [*before, *ours.micro]
        gradients = sum(g.gradient.num_bytes for g in getattr(ours.hooks, "groups", None) or ours.hooks.units)
        held += [live_bytes([*stepped, ours.step]) + gradients, live_bytes([*stepped, ours.step])]
        if case.get("orig"):
            # the flat gradient goes when the next forward finds that no original parameter has one
            held[-1] += gradients
        assert held == real["live_bytes"][rank]
