"""A plain network against its own table, by hand."""

from __future__ import annotations

import pytest

from sim.catalog import load
from sim.cluster.topology import Cluster, build_cluster
from sim.cost import alpha_beta
from sim.cost.backend import backend
from sim.cost.model import CostModel
from sim.engine.run import run
from sim.ir.program import Call, Collective, Program, World
from sim.parallel.fold import fold
from sim.parallel.mesh import mesh_of
from sim.scenario.schema import ClusterSpec
from sim.units import ticks


def machine(num_gpus: int = 8) -> Cluster:
    node = load.node("dgx-h100")
    return build_cluster(
        ClusterSpec(node=node, gpu=load.gpu(node.gpu), network=None, num_nodes=1, num_gpus=num_gpus,
                    backend="alpha-beta", alpha_s=5e-6, beta_bytes_per_s=10e9)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "n", "time_s"),
    [
        ("all_reduce", 8, 6 * 5e-6 + 2 * 7 / 8 * 0.8),
        ("all_gather", 8, 3 * 5e-6 + 7 / 8 * 0.8),
        ("reduce_scatter", 5, 3 * 5e-6 + 4 / 5 * 0.8),
        ("broadcast", 8, 3 * (5e-6 + 0.8)),
        ("reduce", 6, 3 * (5e-6 + 0.8)),
        ("all_to_all", 4, 3 * 5e-6 + 3 / 4 * 0.8),
        ("shift", 4, 5e-6 + 0.8),
        ("barrier", 8, 3 * 5e-6),
        ("all_reduce", 1, 0.0),
    ],
)
def test_closed_forms(kind: str, n: int, time_s: float) -> None:
    """8 GB at 10 GB/s are 0.8 s, a message 5 us."""
    assert alpha_beta.time_s(kind, n, 8 * 10**9, 5e-6, 10e9) == pytest.approx(time_s, rel=1e-15)


def test_links_are_the_machines_and_two_ports_a_gpu() -> None:
    cluster = machine(2)
    links = alpha_beta.links(cluster)
    assert len(links) == cluster.num_links + 4
    assert links[: cluster.num_links] == tuple(cluster.links)
    assert [link.name for link in links[-4:]] == ["gpu0>network", "network>gpu0", "gpu1>network", "network>gpu1"]
    assert {link.bytes_per_s for link in links[-4:]} == {10e9}


def test_a_binomial_tree_of_six_sends_the_tensor_five_times() -> None:
    """Rounds: 0>1; 0>2, 1>3; 0>4, 1>5. A reduction is the same backwards."""
    cluster = machine(8)
    first = cluster.num_links
    down = dict(alpha_beta.plan_collective(cluster, [tuple(range(6))], "broadcast", 100).phases[0].loads)
    assert {gpu: down.get(first + 2 * gpu, 0) for gpu in range(6)} == {0: 300, 1: 200, 2: 0, 3: 0, 4: 0, 5: 0}
    assert {gpu: down.get(first + 2 * gpu + 1, 0) for gpu in range(6)} == {0: 0, **dict.fromkeys(range(1, 6), 100)}
    up = dict(alpha_beta.plan_collective(cluster, [tuple(range(6))], "reduce", 100).phases[0].loads)
    assert up == {link ^ 1 if first % 2 == 0 else first + ((link - first) ^ 1): load for link, load in down.items()}


def test_messages_load_the_senders_and_the_receivers_port() -> None:
    cluster = machine(4)
    traffic = alpha_beta.plan_point_to_point(cluster, [(0, 1), (2, 3), (3, 3)], 50)
    first = cluster.num_links
    assert dict(traffic.phases[0].loads) == dict.fromkeys((first, first + 3, first + 4, first + 7), 50)
    assert alpha_beta.plan_point_to_point(cluster, [(3, 3)], 50).phases == ()


def test_every_library_is_in_the_table() -> None:
    from sim.scenario.fields import BACKENDS

    assert [backend(name).is_nccl for name in BACKENDS] == [True, False, False]


def run_two(streams: tuple[str, str]) -> int:
    """Return the ticks of two all-gathers of 10 MB, of pairs on two axes, on these streams of four GPUs."""
    mesh = mesh_of({"tp": 2, "dp": 2})
    folding = fold(mesh, [0] * 4, axes=("tp", "dp"))
    step = tuple(
        Collective(axis, "all_gather", axis, 10_000_000, "bf16", stream)
        for axis, stream in zip(("tp", "dp"), streams, strict=True)
    )
    calls = (Call("pass"),)
    programs = tuple(
        Program(ranks, 0, {"pass": step}, (), calls, calls, axes)
        for ranks, axes in zip(folding.classes, folding.axes, strict=True)
    )
    cluster = machine(4)
    return run(World(4, programs, folding.communicators), CostModel(cluster, cluster.spec.gpu)).end


def test_collectives_of_two_streams_share_the_port_and_those_of_one_wait() -> None:
    """Each sends 5 MB, 0.5 ms of a port's 10 GB/s. The port rests for the latency of each where one waits for the
    other, once where they go together."""
    apart, together = run_two(("one", "one")), run_two(("one", "two"))
    assert apart > 2 * ticks(5e-6 + 0.5e-3)
    assert together == apart - ticks(5e-6)
