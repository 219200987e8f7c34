"""NCCL over switches that reduce, by its own formulas, by hand, and against published bus bandwidths."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from sim.catalog import load
from sim.cluster.topology import Cluster, build_cluster
from sim.cost.calibrated import alone_s
from sim.cost.collective import bus_bytes_per_s
from sim.cost.nccl import collnet
from sim.cost.nccl.loads import Loads, add_load, pat_loads
from sim.cost.nccl.plan import plan_collective
from sim.cost.nccl.rings import ring_graph
from sim.cost.nccl.tuning import OVER_SHARP, _candidates
from sim.memory.runtime import MIB, NET_BYTES, NcclCommunicator, nccl_bytes
from sim.pipeline import simulate
from sim.scenario.load import load_scenario_text
from sim.scenario.schema import ClusterSpec


@cache
def machine(name: str, num_nodes: int, sharp: bool = True, nodes_per_leaf: int = 32, gpus: int = 8) -> Cluster:
    node = load.node(name)
    network = replace(load.network(node.default_network), sharp=sharp, nodes_per_leaf=nodes_per_leaf)
    return build_cluster(
        ClusterSpec(node=node, gpu=load.gpu(node.gpu), network=network, num_nodes=num_nodes, num_gpus=num_nodes * gpus)
    )


def everyone(cluster: Cluster) -> tuple[int, ...]:
    return tuple(range(cluster.num_gpus))


def offered(cluster: Cluster, kind: str) -> dict[str, tuple[float, float]]:
    """Latency in us and bandwidth in GB/s of each algorithm, Simple."""
    found = _candidates(cluster, ring_graph(cluster, everyone(cluster)), kind)
    return {c.algorithm: (c.latency_us, c.bw) for c in found if c.protocol == "Simple"}


def test_what_nccl_expects_of_each_algorithm_on_h100() -> None:
    """8 nodes, 8 NICs of 48 GB/s in its list. Direct: 2 (3.7 + 7 x 0.4) + 31 us, 8 x 48 x 0.85 / 2; chains: 2 x 7 x 2.8
    + 30 us, 8 x 48 / 2; NVLS: 25 + 18 us, 8 x min(48, 2 x 40 x 0.85 x 7/8) x 64 / 126."""
    found = offered(machine("dgx-h100", 8), "all_reduce")
    assert found["collnet_direct"] == pytest.approx((44.0, 163.2))
    assert found["collnet_chain"] == pytest.approx((69.2, 192.0))
    assert found["nvls_sharp"] == pytest.approx((43.0, 384 * 64 / 126))
    gathers = offered(machine("dgx-h100", 8), "all_gather")
    assert gathers["collnet_direct"] == pytest.approx((44.0, 8 * 0.9 * 48))
    assert gathers["nvls_sharp"] == pytest.approx((43.0, 8 * 40 * 0.85 * 7 / 8 * 7 / 8))
    assert "collnet_chain" not in gathers


def test_chains_are_faster_inside_nodes_than_between_them() -> None:
    """A100, 8 NICs of 24 GB/s: 8 chains of 30 GB/s fit 12 NVLinks of 20; a direct exchange twice the NICs' 24."""
    found = offered(machine("dgx-a100-80gb", 4), "all_reduce")
    assert found["collnet_chain"][1] == pytest.approx(8 * 30 / 2)
    assert found["collnet_direct"][1] == pytest.approx(8 * 48 / 2)
    cluster = machine("dgx-a100-80gb", 4)
    graph = ring_graph(cluster, everyone(cluster))
    assert collnet.num_channels(cluster, graph) == graph.compute_channels * 3 // 2


@pytest.mark.parametrize(("name", "num_nodes", "sharp"), [("dgx-h100", 8, False), ("dgx-h100", 1, True)])
def test_it_is_never_there_unasked(name: str, num_nodes: int, sharp: bool) -> None:
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
        assert not set(offered(machine(name, num_nodes, sharp), kind)) & set(OVER_SHARP)


@pytest.mark.parametrize(("gibibytes", "bus"), [(0.5, 356.0), (1, 365.9), (2, 380.7), (4, 383.2), (8, 386.6)])
def test_64_h100_with_sharp_as_published(gibibytes: float, bus: float) -> None:
    """coreweave/nccl-tests@0120901, README.md: all_reduce_perf on 64 H100 over NDR with SHARP, GB/s out of place."""
    num_bytes = int(gibibytes * 2**30)
    cluster = machine("dgx-h100", 8)
    traffic = plan_collective(cluster, [everyone(cluster)], "all_reduce", num_bytes)
    assert traffic.algorithm == "nvls_sharp/Simple"
    found = bus_bytes_per_s("all_reduce", 64, num_bytes, alone_s(cluster, traffic)) / 1e9
    assert found == pytest.approx(bus, rel=0.07)


@pytest.mark.parametrize("algorithm", OVER_SHARP)
@pytest.mark.parametrize("num_nodes", [2, 8])
def test_a_nic_sends_and_receives_its_part_once(algorithm: str, num_nodes: int) -> None:
    """Of 800 MB each of 8 NICs 100 MB each way, however many nodes."""
    cluster = machine("dgx-h100", num_nodes)
    loads: Loads = {}
    graph = ring_graph(cluster, everyone(cluster))
    collnet.add_loads(cluster, graph, algorithm, "all_reduce", 800e6, loads)
    nics = [load for link, load in loads.items() if cluster.is_nic(link)]
    assert nics == pytest.approx([100e6] * 16 * num_nodes)
    assert max(loads) < cluster.num_domains * cluster.links_per_domain  # one leaf a rail: nothing on the spine


def test_leaves_hand_up_one_sum() -> None:
    """Eight nodes, four a leaf: 16 leaves, each an eighth up and an eighth down, where all four would send theirs."""
    cluster = machine("dgx-h100", 8, nodes_per_leaf=4)
    graph, first = ring_graph(cluster, everyone(cluster)), cluster.num_domains * cluster.links_per_domain
    for kind, up, down in (("all_reduce", 100e6, 100e6), ("all_gather", 50e6, 100e6), ("reduce_scatter", 100e6, 50e6)):
        loads: Loads = {}
        collnet.add_loads(cluster, graph, "nvls_sharp", kind, 800e6, loads)
        fabric = {link - first: load for link, load in loads.items() if link >= first}
        assert fabric == pytest.approx({2 * leaf + way: (up, down)[way] for leaf in range(16) for way in (0, 1)})


def test_a_direct_exchange_sends_every_head_its_part_and_has_it_back() -> None:
    """Each GPU sends 7/8 to the heads, and as a head 7 x 1/8 back: 1.75 S out and in."""
    cluster = machine("dgx-a100-80gb", 2)
    loads: Loads = {}
    collnet._direct(cluster, ring_graph(cluster, everyone(cluster)), "all_reduce", 8.0, loads)
    assert list(loads.values()) == pytest.approx([14.0] * 32)


def test_pat_goes_far_with_little() -> None:
    """Of eight nodes of one GPU each sends four parts to the next, two over two, one over four; of six 3, 1, 1."""
    for num_nodes, farther in ((8, {1: 4, 2: 2, 4: 1}), (6, {1: 3, 2: 1, 4: 1})):
        cluster = machine("dgx-h100", num_nodes, sharp=False, nodes_per_leaf=1, gpus=1)
        loads: Loads = {}
        pat_loads(cluster, ring_graph(cluster, everyone(cluster)), float(num_nodes), loads)
        expected: Loads = {}
        for distance, parts in farther.items():
            for node in range(num_nodes):
                add_load(expected, 0, cluster.route(node, (node + distance) % num_nodes, rail=0).links, parts)
        assert loads == pytest.approx(expected)
        assert sum(farther.values()) == num_nodes - 1


@pytest.mark.parametrize(
    ("communicator", "num_bytes"),
    [
        # 8 nodes of one GPU, 4 channels: before and after over 1 and 2, one other over 4: 4 + 4 + 2 ends
        (NcclCommunicator("dp", 8, 8, num_channels=4, algorithms=("pat/Simple",)), 4 * 10 * NET_BYTES),
        # beside a ring, whose two ends to its neighbours are PAT's too
        (NcclCommunicator("dp", 8, 8, num_channels=4, algorithms=("ring/LL", "pat/Simple")), 4 * 10 * NET_BYTES),
        # 2 nodes of 8, 16 channels of NVLS over 8 heads, 8 MiB a channel for the switches
        (
            NcclCommunicator("dp", 16, 2, num_channels=16, algorithms=("nvls_sharp/Simple",), num_heads=8),
            8 * 16 * 2 * MIB + 16 * 8 * MIB,
        ),
        # a chain: both neighbours, each 12 MiB a channel
        (
            NcclCommunicator("dp", 16, 2, num_channels=24, algorithms=("collnet_chain/Simple",), num_heads=8),
            24 * 2 * 12 * MIB + 24 * 8 * MIB,
        ),
        # direct: to 7 heads, and as a head from 7 GPUs
        (
            NcclCommunicator("dp", 16, 2, num_channels=24, algorithms=("collnet_direct/Simple",), num_heads=8),
            24 * 14 * 12 * MIB + 24 * 8 * MIB,
        ),
    ],
)
def test_buffers(communicator: NcclCommunicator, num_bytes: int) -> None:
    assert nccl_bytes(communicator) == num_bytes


SCENARIO = """
model: {num_hidden_layers: 2, hidden_size: 1024, intermediate_size: 4096, num_attention_heads: 8, vocab_size: 8000}
cluster: {node: dgx-h100, num_nodes: 3, sharp: true}
framework: ddp
training: {sequence_length: 128, micro_batch_size: 1, global_batch_size: 24}
"""


def test_a_folded_answer_is_that_of_all_ranks() -> None:
    asked = load_scenario_text(SCENARIO, "sharp.yaml")
    folded, whole = simulate(asked), simulate(asked, fold=False)
    assert folded.timeline.end == whole.timeline.end
    assert folded.report.communication == whole.report.communication
    assert "nvls_sharp/Simple" in {row.algorithm for row in folded.report.communication}
