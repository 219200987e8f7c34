"""Where ranks are: orders, groups along one axis and several, neighbours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim.parallel.mesh import ORDERS, across, mesh_of, mirrored, within

SIZES = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in ("tp", "cp", "dp", "pp")})


def test_tensor_groups_are_neighbours_and_pipeline_neighbours_far():
    """tp-cp-ep-dp-pp: 2 x 1 x 2 x 2 ranks, as in the docstring of Megatron's initialize_model_parallel."""
    mesh = mesh_of({"tp": 2, "dp": 2, "pp": 2})
    assert mesh.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.groups("dp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.groups("pp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.groups("model") == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_torch_counts_replicas_slower_than_shards():
    """DeviceMesh (pp, dp_replicate, dp_shard, cp, tp), last fastest: shard groups are nearer than replicas."""
    mesh = mesh_of({"dp_shard": 2, "dp_replicate": 2, "tp": 2}, ORDERS["torch"])
    assert mesh.groups("dp_shard") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.groups("dp_replicate") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.groups("dp") == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_an_order_of_ones_own():
    mesh = mesh_of({"tp": 2, "pp": 2}, ("pp", "tp", "cp", "dp"))
    assert mesh.groups("pp") == ((0, 1), (2, 3))
    assert mesh.groups("tp") == ((0, 2), (1, 3))


def test_embedding_groups_are_the_ends_of_each_pipeline():
    assert mesh_of({"dp": 2, "pp": 4}).groups("embedding") == ((0, 6), (1, 7))


def test_neighbours_along_a_pipeline_and_around_it():
    mesh = mesh_of({"dp": 2, "pp": 3})
    assert mesh.neighbours("pp", 1, around=False) == ((0, 2), (1, 3), (2, 4), (3, 5))
    assert mesh.neighbours("pp", 1, around=True)[-2:] == ((4, 0), (5, 1))
    assert mesh.neighbours("pp", -1, around=False) == ((2, 0), (3, 1), (4, 2), (5, 3))


def test_mirrored_stages_are_one_group():
    """2 x 4 ranks: stages 0 and 3 hold the same layers, and 1 and 2."""
    mesh = mesh_of({"dp": 2, "pp": 4})
    assert mesh.groups(mirrored("dp")) == ((0, 1, 6, 7), (2, 3, 4, 5))
    assert mesh.size(mirrored("dp")) == 4


@given(SIZES, st.permutations(["tp", "cp", "dp", "pp"]))
def test_every_rank_is_in_one_group_of_each_axis(sizes: dict[str, int], order: list[str]) -> None:
    mesh = mesh_of(sizes, order)
    assert all(mesh.rank(mesh.coordinates(rank)) == rank for rank in range(mesh.world_size))
    for axis in ("tp", "cp", "dp", "pp", "dp_cp", "model", "world"):
        groups = mesh.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
        assert {len(group) for group in groups} == {mesh.size(axis)}
        assert all(list(group) == sorted(group) for group in groups)


@given(SIZES)
def test_parts_of_an_axis_make_it_up(sizes: dict[str, int]) -> None:
    mesh = mesh_of({**sizes, "dp": 4})
    for size in (1, 2, 4):
        inner, outer = mesh.groups(within("dp", size)), mesh.groups(across("dp", size))
        assert {len(group) for group in inner} == {size}
        assert {len(group) for group in outer} == {4 // size}
        assert len(inner) * size == len(outer) * (4 // size) == mesh.world_size
