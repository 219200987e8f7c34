"""NCCL's choice and the wires, against sums by hand, NCCL's own tables and published bus bandwidths."""

from __future__ import annotations

from functools import cache

import pytest

from sim.catalog import load
from sim.cluster.topology import Cluster, build_cluster
from sim.cost.collective import bus_bytes_per_s
from sim.cost.copies import plan_copy
from sim.cost.nccl.plan import plan_collective, plan_point_to_point
from sim.cost.nccl.rings import ring_graph
from sim.cost.nccl.tuning import _shape, nvls_graph
from sim.ir.traffic import Traffic
from sim.scenario.schema import ClusterSpec

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all")
MIB = 2**20


@cache
def machine(name: str, num_nodes: int = 1) -> Cluster:
    node = load.node(name)
    network = load.network(node.default_network) if node.default_network else None
    num_gpus = num_nodes * node.num_gpus
    return build_cluster(
        ClusterSpec(node=node, gpu=load.gpu(node.gpu), network=network, num_nodes=num_nodes, num_gpus=num_gpus)
    )


def alone_s(cluster: Cluster, traffic: Traffic) -> float:
    """The time on idle wires: the fluid is as slow as its busiest link or its own cap."""
    total = 0.0
    for phase in traffic.phases:
        slowest = max(num_bytes / cluster.bytes_per_s(link) for link, num_bytes in phase.loads)
        if phase.max_bytes_per_s:
            slowest = max(slowest, phase.stream_bytes / phase.max_bytes_per_s)
        total += phase.latency_s + slowest
    return total


def by_name(cluster: Cluster, traffic: Traffic) -> dict[str, float]:
    return {cluster.link(link).name: num_bytes for phase in traffic.phases for link, num_bytes in phase.loads}


def bus(cluster: Cluster, kind: str, ranks: tuple[int, ...], tensor_bytes: int) -> float:
    traffic = plan_collective(cluster, [ranks], kind, tensor_bytes)
    return bus_bytes_per_s(kind, len(ranks), tensor_bytes, alone_s(cluster, traffic))


def test_a_ring_on_one_node_loads_every_gpus_wires_alike() -> None:
    """A100, 8 GPUs, all-gather of 800 MB: each GPU sends and receives 7/8 of it."""
    cluster = machine("dgx-a100-80gb")
    traffic = plan_collective(cluster, [tuple(range(8))], "all_gather", 800_000_000)
    assert traffic.algorithm == "ring/Simple"
    assert traffic.wire_bytes == 700_000_000
    loads = by_name(cluster, traffic)
    assert len(loads) == 16
    assert list(loads.values()) == pytest.approx([700_000_000] * 16)


def test_between_nodes_every_nic_carries_its_share() -> None:
    """H100, 4 nodes, all-gather of 1 GB over 32 ranks: 31/32 GB cross each hop, 1/8 of it by each NIC."""
    cluster = machine("dgx-h100", 4)
    loads = by_name(cluster, plan_collective(cluster, [tuple(range(32))], "all_gather", 10**9))
    nics = {name: num_bytes for name, num_bytes in loads.items() if "leaf" in name}
    assert len(nics) == 4 * 8 * 2
    assert list(nics.values()) == pytest.approx([10**9 * 31 / 32 / 8] * 64)


def test_groups_across_nodes_use_one_rail_each() -> None:
    """Data-parallel groups beside tensor parallelism: GPU i of each node with its peers, all eight groups at once."""
    cluster = machine("dgx-h100", 4)
    groups = [tuple(range(i, 32, 8)) for i in range(8)]
    together = by_name(cluster, plan_collective(cluster, groups, "reduce_scatter", 10**9))
    alone = by_name(cluster, plan_collective(cluster, groups[:1], "reduce_scatter", 10**9))
    assert {name for name in alone if "leaf" in name} == {
        name for n in range(4) for name in (f"node{n}.nic0>leaf", f"node{n}.leaf>nic0")
    }
    assert len(together) == 8 * len(alone)
    assert not any("nvswitch" in name for name in together)


def test_llama_style_groups_inside_nodes_do_not_touch_the_network() -> None:
    cluster = machine("dgx-h100", 4)
    groups = [tuple(range(8 * n, 8 * n + 8)) for n in range(4)]
    loads = by_name(cluster, plan_collective(cluster, groups, "all_reduce", 64 * MIB))
    assert {name.split(".")[1].strip("gpu01234567>") for name in loads} == {"nvswitch"}


@pytest.mark.parametrize("kind", ["broadcast", "reduce"])
def test_a_chain_leaves_out_the_hop_back_to_the_root(kind: str) -> None:
    cluster = machine("dgx-a100-80gb")
    loads = by_name(cluster, plan_collective(cluster, [tuple(range(8))], kind, 100 * MIB))
    into_root, out_of_root = ("nvswitch0>gpu0", "gpu0>nvswitch0")
    idle = into_root if kind == "broadcast" else out_of_root
    assert f"node0.{idle}" not in loads
    assert len(loads) == 14


def test_switches_that_reduce_carry_each_byte_once_and_a_share() -> None:
    """H100, 8 GPUs: every GPU sends S and its part S/8 (nvls), where a ring would send 2 x 7/8 S."""
    cluster = machine("dgx-h100")
    traffic = plan_collective(cluster, [tuple(range(8))], "all_reduce", 512 * MIB)
    assert traffic.algorithm == "nvls/Simple"
    assert list(by_name(cluster, traffic).values()) == pytest.approx([512 * MIB * 9 / 8] * 16)
    assert traffic.wire_bytes == 512 * MIB * 14 // 8


def test_no_nvls_where_nccl_has_none() -> None:
    """Not for two GPUs, not on A100, and with four GPUs the ring is as good: nccl-tests on H100 see no gain there."""
    assert plan_collective(machine("dgx-h100"), [(0, 1)], "all_reduce", 512 * MIB).algorithm.startswith("ring")
    assert plan_collective(machine("dgx-h100"), [(0, 1, 2, 3)], "all_reduce", 512 * MIB).algorithm.startswith("ring")
    assert plan_collective(machine("dgx-a100-80gb"), [tuple(range(8))], "all_reduce", 512 * MIB).algorithm == (
        "ring/Simple"
    )


def test_small_messages_take_the_protocol_of_low_latency() -> None:
    """8 A100, 1 KiB: by NCCL's figures ring LL costs 6.6 + 14 x 0.6 us, tree LL 6.8 + 2 x 7 x 0.6 us."""
    cluster = machine("dgx-a100-80gb")
    traffic = plan_collective(cluster, [tuple(range(8))], "all_reduce", 1024)
    assert traffic.algorithm == "ring/LL"
    assert alone_s(cluster, traffic) == pytest.approx(21.8e-6, rel=0.35)  # aiconfigurator@095f58a51: 21.8 us
    assert traffic.sms == 1


@pytest.mark.parametrize(
    ("name", "num_nodes", "channels", "total_gb"),
    [
        ("dgx-a100-80gb", 1, 24, 240),  # 12 x NVLink3 of 20 GB/s; NCCL prints "24 coll channels" on DGX A100
        ("dgx-h100", 1, 24, 360),  # 6 x 60 of 370.8 GB/s, split and doubled
        ("dgx-h100", 4, 16, 360),  # 8 x 45: eight NICs, the NVLinks shared by eight rings
        ("dgx-a100-80gb", 4, 16, 192),  # 8 x 24 of eight HDR NICs
        ("dgx-1", 1, 12, 120),  # the hybrid cube mesh is three rings and their reverses, 6 x 20
        ("hgx-a100-4-80gb", 1, 24, 240),  # four links to each of three peers: six rings and their reverses
    ],
)
def test_channels_are_those_nccl_finds(name: str, num_nodes: int, channels: int, total_gb: float) -> None:
    cluster = machine(name, num_nodes)
    graph = ring_graph(cluster, tuple(range(cluster.num_gpus)))
    assert graph.channels * graph.channel_bw == pytest.approx(total_gb)
    assert graph.compute_channels == channels


@pytest.mark.parametrize(
    ("name", "num_nodes", "per_node", "kind", "size_mib", "measured_gb"),
    [
        # ai-dynamo/aiconfigurator@095f58a51, systems/data/*/comm/nccl, half precision
        ("dgx-a100-80gb", 1, 8, "all_reduce", 512, 222),
        ("dgx-a100-80gb", 1, 8, "all_gather", 512, 205),
        ("dgx-a100-80gb", 1, 8, "reduce_scatter", 512, 213),
        ("dgx-h100", 1, 8, "all_reduce", 512, 445),
        ("dgx-h100", 1, 8, "all_gather", 512, 335),
        ("dgx-h100", 1, 8, "reduce_scatter", 512, 336),
        ("dgx-h100", 1, 4, "all_reduce", 512, 350),
        # xxrjun/nccl-tests-cluster@455de4f, cluster01: H100 HGX, eight NDR NICs, ten nodes
        ("dgx-h100", 10, 1, "all_reduce", 2048, 48.9),
        ("dgx-h100", 10, 2, "all_reduce", 2048, 98),
        ("dgx-h100", 10, 4, "all_reduce", 2048, 196),
        ("dgx-h100", 10, 8, "all_reduce", 2048, 337),
        ("dgx-h100", 10, 8, "all_gather", 16384, 324),
        ("dgx-h100", 10, 8, "reduce_scatter", 16384, 323),
        ("dgx-h100", 10, 8, "all_to_all", 2048, 50),
        # argonne-lcf/alcf-nccl-tests@385be33, Sophia: two DGX A100, eight HDR NICs
        ("dgx-a100-80gb", 2, 8, "all_reduce", 1024, 180),
    ],
)
def test_large_messages_reach_measured_bus_bandwidths(
    name: str, num_nodes: int, per_node: int, kind: str, size_mib: int, measured_gb: float
) -> None:
    cluster = machine(name, num_nodes)
    ranks = tuple(8 * node + i for node in range(num_nodes) for i in range(per_node))
    assert bus(cluster, kind, ranks, size_mib * MIB) / 1e9 == pytest.approx(measured_gb, rel=0.18)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_has_no_traffic(kind: str) -> None:
    assert plan_collective(machine("dgx-h100"), [(3,)], kind, MIB).phases == ()


def test_a_barrier_is_a_tiny_all_reduce() -> None:
    traffic = plan_collective(machine("dgx-h100", 2), [tuple(range(16))], "barrier", 0)
    assert traffic.phases[0].latency_s > 0


def test_all_to_all_is_what_its_routes_are() -> None:
    """Counting by shared pieces equals walking every route: 16 GPUs of two nodes in an odd order."""
    cluster = machine("dgx-a100-80gb", 2)
    group = (0, 9, 3, 12, 5, 8, 1, 15)
    want: dict[int, float] = {}
    for source in group:
        for target in group:
            for link in cluster.route(source, target).links:
                want[link] = want.get(link, 0.0) + 800 / 8
    got = dict(plan_collective(cluster, [group], "all_to_all", 800).phases[0].loads)
    assert got == pytest.approx(want)


def test_copies_behind_one_switch_share_its_uplink() -> None:
    """DGX A100: two GPUs on each PCIe switch. One copy alone has the wire to itself; its neighbour halves it."""
    cluster = machine("dgx-a100-80gb")
    alone = alone_s(cluster, plan_copy(cluster, [0], "host_to_device", 2**30))
    neighbour = alone_s(cluster, plan_copy(cluster, [0, 1], "host_to_device", 2**30))
    far = alone_s(cluster, plan_copy(cluster, [0, 7], "host_to_device", 2**30))
    assert neighbour == pytest.approx(2 * alone, rel=1e-3)
    assert far == pytest.approx(alone, rel=1e-3)


def test_messages_add_up_on_shared_links_only() -> None:
    cluster = machine("dgx-h100", 2)
    one = by_name(cluster, plan_point_to_point(cluster, [(0, 8)], MIB))
    both = by_name(cluster, plan_point_to_point(cluster, [(0, 8), (1, 9)], MIB))
    assert {name for name in one if "leaf" in name} == {"node0.nic0>leaf", "node1.leaf>nic0"}
    assert set(both.values()) == {MIB}
    assert plan_point_to_point(cluster, [(0, 8)], MIB).sms == 4  # 50 GB/s by channels of 14
    assert plan_point_to_point(cluster, [(4, 4)], MIB).phases == ()


def test_messages_of_a_large_communicator_get_few_channels() -> None:
    """32 channels over 8 ranks: 4, over 2 ranks 16. A communicator on several nodes gives every peer what one on
    another node gets: 25 GB/s of a NIC by channels of 14 are 2."""
    cluster = machine("dgx-a100-80gb", 2)
    pairs = [(i, i + 1) for i in range(7)]
    assert plan_point_to_point(cluster, [(0, 1)], 16 * MIB).sms == 16
    assert plan_point_to_point(cluster, pairs, 16 * MIB, 8).sms == 4
    assert plan_point_to_point(cluster, pairs, 16 * MIB, 16, spans=True).sms == 2


def versioned(name: str, num_nodes: int, version: tuple[int, int]) -> Cluster:
    spec = machine(name, num_nodes).spec
    return build_cluster(spec.model_copy(update={"nccl": version}))


def test_only_gpus_of_the_communicator_relay() -> None:
    """DGX A100: GPUs 0 and 1 share a switch with NICs 0 and 1. Those of a group of odd GPUs relay by odd ones."""
    cluster = machine("dgx-a100-80gb", 2)
    even, odd = (ring_graph(cluster, tuple(range(first, 16, 4))) for first in (0, 1))
    gpus = [{cluster.link(link).name for link, _ in graph.patterns[0].loads} for graph in (even, odd)]
    assert even.patterns[0].inter == odd.patterns[0].inter == "PXN"
    assert not any("gpu1>" in name or ">gpu1" in name for name in gpus[0])
    assert not any("gpu0>" in name or ">gpu0" in name for name in gpus[1])


def test_rings_without_relays_leave_through_the_socket_or_by_another_nic() -> None:
    """NCCL 2.10 on DGX A100. Four GPUs on two sockets: each ring ends at another GPU of its NIC's socket, and leaves
    through that socket's memory. Two GPUs on two sockets: 16 GB/s between sockets are fewer than the NIC's 24, so each
    ring leaves by the NIC beside its last GPU."""
    cluster = versioned("dgx-a100-80gb", 2, (2, 10))
    four = ring_graph(cluster, tuple(range(0, 16, 2))).patterns[0]
    two = ring_graph(cluster, tuple(range(0, 16, 4))).patterns[0]
    assert (four.inter, four.out_rails) == ("PHB", four.rails)
    assert "memory" in {cluster.link(link).kind for link, _ in four.loads}
    assert two.out_rails == (two.rails[1], two.rails[0])
    assert [(order[0], order[-1]) for order in two.orders] == [(0, 4), (4, 0)]
    assert "memory" not in {cluster.link(link).kind for link, _ in two.loads}
    assert ring_graph(versioned("dgx-a100-80gb", 2, (2, 12)), tuple(range(0, 16, 4))).patterns[0].inter == "PXN"


@pytest.mark.parametrize(("minor", "channels"), [(10, 1), (12, 2), (28, 2), (29, 4)])
def test_channels_of_a_message_between_nodes_by_version(minor: int, channels: int) -> None:
    """src/graph/paths.cc of the tags: 1; NCCL_NCHANNELS_PER_NET_PEER 2; 50 GB/s by channels of 14."""
    cluster = versioned("dgx-h100", 2, (2, minor))
    assert plan_point_to_point(cluster, [(0, 8)], 64 * MIB).sms == channels


def test_algorithms_come_with_their_versions() -> None:
    """NVLS came with 2.17."""
    group = tuple(range(8))
    for minor, algorithm in ((16, "ring"), (17, "nvls")):
        cluster = versioned("dgx-h100", 1, (2, minor))
        assert plan_collective(cluster, [group], "all_reduce", 2**30).algorithm.startswith(f"{algorithm}/")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "num_nodes"), [("dgx-h100", 2), ("dgx-1", 1), ("pcie-8x-4090", 2), ("p5", 3)])
def test_no_link_has_less_than_nothing_and_time_grows_with_bytes(kind: str, name: str, num_nodes: int) -> None:
    """Twice the bytes never take less time, except where NCCL's own choice is a mistake by its tables (5 %)."""
    cluster = machine(name, num_nodes)
    ranks = tuple(range(cluster.num_gpus))
    last = 0.0
    for power in range(8, 33, 2):
        traffic = plan_collective(cluster, [ranks], kind, 2**power)
        assert all(num_bytes > 0 for phase in traffic.phases for _, num_bytes in phase.loads)
        now = alone_s(cluster, traffic)
        assert now > 0.95 * last
        last = now


@pytest.mark.parametrize("kind", KINDS)
def test_what_leaves_the_nics_arrives_at_the_nics(kind: str) -> None:
    cluster = machine("dgx-h100", 3)
    loads = by_name(cluster, plan_collective(cluster, [tuple(range(24))], kind, 64 * MIB))
    out = sum(num_bytes for name, num_bytes in loads.items() if name.endswith(">leaf"))
    into = sum(num_bytes for name, num_bytes in loads.items() if ".leaf>" in name)
    assert out == pytest.approx(into)
    assert out > 0


def test_the_names_of_the_ranks_do_not_matter() -> None:
    """A ring is NCCL's own: shuffled inside the nodes, the wires are the same."""
    cluster = machine("dgx-h100", 2)
    straight = plan_collective(cluster, [tuple(range(16))], "all_gather", MIB)
    shuffled = plan_collective(cluster, [(3, 1, 0, 2, 7, 6, 5, 4, *range(15, 7, -1))], "all_gather", MIB)
    assert straight == shuffled


def test_verbs_over_omni_path_carry_what_their_connections_do() -> None:
    """experiments/bandwidth of bigscience-workshop/bigscience: 64 V100 on 16 nodes open 4 channels, and the busiest hop
    carries 54.5 Gbit/s over them; GPUs 0 and 1 share one NIC of the four, 2 and 3 another."""
    cluster = machine("jean-zay-v100-32gb", 16)
    everyone = tuple(range(64))
    assert ring_graph(cluster, everyone).compute_channels == 4
    assert ring_graph(cluster, everyone[::4]).compute_channels == 2
    assert [cluster.rail_of(gpu) for gpu in range(4)] == [1, 1, 3, 3]
    assert bus(cluster, "all_reduce", everyone, 4_000_000_000) * 8 == pytest.approx(54.5e9, rel=0.02)
    message = plan_point_to_point(cluster, [(0, 4)], 64 << 20)
    assert message.sms == 1
    assert alone_s(cluster, message) == pytest.approx((64 << 20) / 1.7e9, rel=0.01)
    groups = [everyone[i::4] for i in range(4)]  # 8 connections a node, on 4 queues
    together = alone_s(cluster, plan_collective(cluster, groups, "all_gather", 1_000_000_000))
    assert 4 * 1e9 * 15 / 16 / together * 8 == pytest.approx(54.5e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "num_nodes", "num_gpus", "expected"),
    [
        # 370.8 GB/s of NVLink: nine times 40 fit, not nine times 50; then 60 is the fastest of the table
        ("dgx-h100", 1, 8, (8, 40.0, 60.0)),
        # 721.8: nine times 80 fit; 90 is the fastest
        ("dgx-b200", 1, 8, (8, 80.0, 90.0)),
        # 33 times 20 fit, not 33 times 24; 40 is twice as much
        ("gb200-nvl72", 18, 72, (32, 20.0, 40.0)),
        # NICs of 50: channels of 48 go between nodes, of 40 inside
        ("dgx-h100", 4, 32, (8, 40.0, 48.0)),
    ],
)
def test_search_for_nvls(name: str, num_nodes: int, num_gpus: int, expected: tuple[int, float, float]) -> None:
    """Every GPU carries each head's speed once, its own twice (nccl src/graph/search.cc, ncclTopoSearchTryNvls)."""
    cluster = machine(name, num_nodes)
    assert nvls_graph(cluster, ring_graph(cluster, tuple(range(num_gpus)))) == expected


@pytest.mark.parametrize(
    ("name", "num_nodes", "bus_gb", "tree_gb"),
    [
        ("p4d", 2, 48.0, 96.0),  # four channels of 12: 24 is twice as fast, and 4 x 24 fit into 240 GB/s of NVLink
        ("p4d", 3, 48.0, 48.0),
        ("dgx-a100-80gb", 2, 192.0, 240.0),  # eight of 24: 8 x 30 fit, 8 x 48 do not
    ],
)
def test_trees_between_two_nodes_are_faster_inside(name: str, num_nodes: int, bus_gb: float, tree_gb: float) -> None:
    cluster = machine(name, num_nodes)
    shape = _shape(cluster, ring_graph(cluster, tuple(range(8 * num_nodes))))
    assert (shape.bus, shape.tree_bus) == pytest.approx((bus_gb, tree_gb))
