"""Folding: who is alike, and what splits a class."""

from __future__ import annotations

from dataclasses import replace

from sim.catalog import load
from sim.cluster.symmetry import places_of
from sim.cluster.topology import Cluster, build_cluster
from sim.ir.program import Call, Communicator, Program, World
from sim.parallel.fold import Folding, fold, refold
from sim.parallel.mesh import mesh_of
from sim.scenario.schema import ClusterSpec

MESH = mesh_of({"tp": 8, "dp": 4, "pp": 2})
PAIRS = [(rank, rank + 32) for rank in range(32)]


def machine() -> Cluster:
    facts = load.node("dgx-h100")
    gpu, network = load.gpu(facts.gpu), load.network("ib-ndr-400-rail")
    return build_cluster(ClusterSpec(node=facts, gpu=gpu, network=network, num_nodes=8, num_gpus=64))


def folding(slow: int = -1, broken: int = -1) -> Folding:
    cluster = machine()
    if broken >= 0:
        cluster = replace(cluster, degraded={broken: 0.5})
    colours = [(rank // 32, rank == slow) for rank in range(64)]
    return fold(MESH, colours, axes=("tp", "dp"), pairs={"forward": PAIRS}, places=places_of(cluster))


def test_without_faults_a_class_is_a_stage() -> None:
    found = folding()
    assert found.classes == (tuple(range(32)), tuple(range(32, 64)))
    assert found.axes[0] == {"tp": "tp@0", "dp": "dp@0", "forward.send": "forward"}
    assert found.axes[1] == {"tp": "tp@32", "dp": "dp@32", "forward.recv": "forward"}
    assert len(found.communicators["tp@0"].groups) == 4
    assert found.communicators["forward"].groups == tuple(PAIRS)
    assert found.class_of(40) == 1


def test_a_slow_gpu_splits_its_stage_by_who_meets_it() -> None:
    # rank 17: itself; its tensor group 16-23; those it reduces gradients with (1, 9, 25); all others; times two stages
    found = folding(slow=17)
    assert len(found.classes) == 8
    assert {(17,), (1, 9, 25), (16, 18, 19, 20, 21, 22, 23)} < set(found.classes)
    assert {(49,), (33, 41, 57), (48, 50, 51, 52, 53, 54, 55)} < set(found.classes)


def test_a_degraded_link_splits_the_classes_around_it() -> None:
    cluster = machine()
    (broken, _) = cluster.links_between("node2.gpu3", f"node2.{_switch(cluster)}")
    found = folding(broken=broken)
    assert (19,) in found.classes  # GPU 3 of node 2
    assert len(found.classes) == 8


def _switch(cluster: Cluster) -> str:
    return next(device.name for device in cluster.node.devices if device.kind == "nvswitch")


def test_a_group_that_spans_nodes_is_not_like_one_that_does_not() -> None:
    # three tensor ranks on nodes of eight: ranks 6-8 and 15-17 lie on two nodes, the others on one
    facts = load.node("dgx-h100")
    spec = ClusterSpec(
        node=facts, gpu=load.gpu(facts.gpu), network=load.network("ib-ndr-400-rail"), num_nodes=3, num_gpus=24
    )
    mesh = mesh_of({"tp": 3, "dp": 8})
    found = fold(mesh, [0] * 24, axes=("tp",), places=places_of(build_cluster(spec)))
    spanning = [c for c in found.communicators.values() if (6, 7, 8) in c.groups]
    assert all((0, 1, 2) not in c.groups for c in spanning)


def test_unfolded_every_rank_is_a_class_and_every_group_a_communicator() -> None:
    program = Program(tuple(range(4)), 0, {"all": ()}, (), (), (Call("all"),), {"dp": "dp"})
    world = World(4, (program,), {"dp": Communicator("dp", "dp", ((0, 1), (2, 3)), (0,))})
    assert refold(world, speeds={}, places=None) == world
    apart = refold(world, speeds={}, places=None, folded=False)
    assert [p.ranks for p in apart.programs] == [(0,), (1,), (2,), (3,)]
    assert [c.groups for c in apart.communicators.values()] == [((0, 1),), ((2, 3),)]
