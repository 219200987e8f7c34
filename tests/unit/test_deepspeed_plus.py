"""ZeRO++: what is gathered nearby, how many bytes the quantised wires carry, and what a secondary partition holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from deepspeed_world import Job, P, gpt
from held import live, live_bytes

from sim.ir.ledger import Dim, Layer, Parameter
from sim.ir.program import Chunk, Collective, HostWait
from sim.parallel.frameworks.deepspeed_plus import quantization_groups
from sim.parallel.mesh import mesh_of

DP = 16
FAR: dict[str, Any] = {
    "prefetch_bucket_size": 0,
    "param_persistence_threshold": 0,
    "max_live_parameters": 1,
    "max_reuse_distance": 0,
    "reduce_bucket_size": 500_000,
}
"""Nothing is prefetched or kept: each pass gathers everything."""


def moved(chunk: Chunk, kind: str) -> Counter[str]:
    """Return axis -> bytes."""
    found = Counter[str]()
    for each in chunk:
        if isinstance(each, Collective) and each.kind == kind:
            found[each.axis] += each.tensor_bytes
    return found


def with_matrices() -> tuple[Layer, ...]:
    """The same model, its weights of two dimensions."""

    def shaped(parameter: Parameter) -> Parameter:
        count = parameter.num_elements
        if not parameter.name.endswith("weight") or count <= 256:
            return parameter
        return Parameter(parameter.name, (Dim("rows", count // 256), Dim("columns", 256)))

    made: dict[int, Layer] = {}
    layers = gpt()
    for layer in layers:
        made.setdefault(id(layer), replace(layer, parameters=tuple(map(shaped, layer.parameters))))
    return tuple(made[id(layer)] for layer in layers)


def padded() -> int:
    job = Job(3, DP, **FAR)
    return sum(job.hooks.partitions) * DP  # type: ignore[union-attr]


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_only_the_first_forward_of_a_step_gathers_far_away(num_microbatches: int) -> None:
    job = Job(3, DP, num_microbatches=num_microbatches, zero_hpz_partition_size=8, **FAR)
    everything = 2 * padded()
    for index, (forward, backward) in enumerate(job.passes):
        assert moved(forward, "all_gather") == {"dp" if index == 0 else "dp.within.8": everything}
        assert moved(backward, "all_gather") == {"dp.within.8": everything}


def test_a_secondary_partition_is_held_until_the_step_is_over() -> None:
    job = Job(3, DP, zero_hpz_partition_size=8, **FAR)
    plain = Job(3, DP, **FAR)
    until = [job.setup, *job.passes[0]]
    assert live_bytes(until) - live_bytes([plain.setup, *plain.passes[0]]) == 2 * padded() // 8
    assert live_bytes(job.chunks) == live_bytes(plain.chunks)
    assert not [s for s in live(job.chunks).values() if "secondary" in s.name]
    parameters = len(job.hooks.parameters)
    waits = [sum(isinstance(each, HostWait) for each in j.passes[0][0]) for j in (job, plain)]
    assert waits[0] - waits[1] == parameters  # for each that is made


def test_quantised_gathers_move_half_the_bytes_and_a_scale_for_thousands() -> None:
    plain, quantised = Job(3, DP, **FAR), Job(3, DP, zero_quantized_weights=True, **FAR)
    for theirs, ours in zip(plain.passes[0], quantised.passes[0], strict=True):
        before, after = moved(theirs, "all_gather")["dp"], moved(ours, "all_gather")["dp"]
        assert before // 2 < after < before // 2 * 1.01
    assert live_bytes(plain.chunks) == live_bytes(quantised.chunks)
    both = Job(3, DP, zero_quantized_weights=True, zero_hpz_partition_size=8, **FAR)
    assert set(moved(both.passes[0][1], "all_gather")) == {"dp.within.8"}


@pytest.mark.parametrize(("count", "groups"), [(8000, 1), (16_000, 2), (64_000, 8), (65_536, 16), (2**20, 256)])
def test_groups_of_quantised_weights(count: int, groups: int) -> None:
    assert quantization_groups(count) == groups
    assert count % (8 * groups) == 0 and count / groups <= 16_000


def test_matrices_are_reduced_in_4_bits_vectors_are_not() -> None:
    job = Job(3, DP, layers=with_matrices(), zero_quantized_gradients=True, **FAR)
    backward = job.passes[0][1]
    matrices = sum(p.num_elements for i, p in enumerate(job.hooks.parameters) if i in job.hooks.matrices)  # type: ignore[union-attr]
    assert 0.98 * P < matrices < P
    exchanged = moved(backward, "all_to_all")
    assert matrices // 2 < exchanged["dp.within.8"] < matrices // 2 * 1.05
    assert matrices // 16 < exchanged["dp.across.8"] < matrices // 16 * 1.05
    assert moved(backward, "reduce_scatter") == {"dp": 2 * (P - matrices)}
    one_node = Job(3, 8, layers=with_matrices(), zero_quantized_gradients=True, **FAR)
    assert moved(one_node.passes[0][1], "all_to_all") == {}


def test_groups_along_a_part_of_an_axis() -> None:
    mesh = mesh_of({"dp": 16})
    assert mesh.groups("dp.within.4") == tuple(tuple(range(at, at + 4)) for at in (0, 4, 8, 12))
    assert mesh.groups("dp.across.8") == tuple((at, at + 8) for at in range(8))
    for axis in ("dp.within.4", "dp.within.8", "dp.across.8"):
        assert sorted(rank for group in mesh.groups(axis) for rank in group) == list(range(16))
