"""Machines built from hand-written facts: links, routes and NICs where a drawing says they are."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest

from sim.catalog import load
from sim.catalog.schema import GpuFacts, LinkFacts, NetworkFacts, NodeFacts
from sim.cluster.topology import Cluster, build_cluster
from sim.scenario.schema import ClusterSpec

GPU = GpuFacts(
    name="gpu",
    vendor="nvidia",
    architecture="ampere",
    compute_capability=(8, 0),
    memory_bytes=80 * 2**30,
    total_memory_bytes=80 * 2**30,
    memory_bytes_per_s=2e12,
    l2_bytes=40 * 2**20,
    num_sms=108,
    boost_clock_hz=1.41e9,
    power_w=400.0,
    peak_flops={"bf16": 312e12},
    cuda_context_bytes=400 * 2**20,
)
LINKS = {
    "nvlink": LinkFacts("nvlink", "nvlink", 20e9, 0.3e-6),
    "pcie": LinkFacts("pcie", "pcie", 24e9, 0.5e-6),
    "upi": LinkFacts("upi", "cpu", 20e9, 0.5e-6),
}
NETWORK = NetworkFacts("ib", "infiniband", nic_bytes_per_s=24e9, nics_per_node=2, latency_s=1e-6, nodes_per_leaf=2)


def node(wires: tuple[tuple[str, str, str, int], ...], name: str = "box") -> NodeFacts:
    """Devices are what the wires name; the kind is the name without its number."""
    names = dict.fromkeys(end for wire in wires for end in wire[:2])
    devices = tuple((n, n.rstrip("0123456789")) for n in sorted(names))
    num_gpus = sum(kind == "gpu" for _, kind in devices)
    return NodeFacts(
        name=name,
        title=name,
        gpu="gpu",
        num_gpus=num_gpus,
        devices=devices,
        wires=wires,
        host_memory_bytes=2**40,
        host_memory_bytes_per_s=400e9,
        num_cpu_cores=64,
        default_network="ib",
    )


# gpu0 gpu1 nic0 on one PCIe switch of socket 0; gpu2 gpu3 nic1 on one of socket 1.
TREE = (
    *((f"gpu{i}", f"pcie-switch{i // 2}", "pcie", 1) for i in range(4)),
    *((f"nic{i}", f"pcie-switch{i}", "pcie", 1) for i in range(2)),
    *((f"pcie-switch{i}", f"cpu{i}", "pcie", 1) for i in range(2)),
    ("cpu0", "cpu1", "upi", 1),
)
SWITCHED = (*TREE, *((f"gpu{i}", f"nvswitch{j}", "nvlink", 3) for i in range(4) for j in range(2)))


def cluster(
    facts: NodeFacts, num_nodes: int = 1, network: NetworkFacts | None = NETWORK, gpu: GpuFacts = GPU
) -> Cluster:
    spec = ClusterSpec(node=facts, gpu=gpu, network=network, num_nodes=num_nodes, num_gpus=num_nodes * facts.num_gpus)
    return build_cluster(spec, LINKS)


def names(machine: Cluster, links: tuple[int, ...]) -> list[str]:
    return [machine.link(i).name for i in links]


def test_nvswitches_are_one_and_parallel_wires_one_link() -> None:
    """Two switches, three links to each: six times 20 GB/s into the one fabric."""
    machine = cluster(node(SWITCHED))
    route = machine.route(0, 3)
    assert route.kind == "NVL"
    assert names(machine, route.links) == ["node0.gpu0>nvswitch0", "node0.nvswitch0>gpu3"]
    assert machine.links[route.links[0]].bytes_per_s == 6 * 20e9
    assert route.latency_s == pytest.approx(0.6e-6)


def test_peers_under_one_pcie_switch_talk_directly() -> None:
    machine = cluster(node(TREE))
    route = machine.route(0, 1)
    assert (route.kind, names(machine, route.links)) == ("PIX", ["node0.gpu0>pcie-switch0", "node0.pcie-switch0>gpu1"])


def test_peers_across_sockets_meet_in_the_receivers_memory() -> None:
    """Farther than PXB: written to the memory of the receiver's socket and read from there."""
    machine = cluster(node(TREE))
    route = machine.route(0, 2)
    assert route.kind == "SYS"
    assert names(machine, route.links) == [
        "node0.gpu0>pcie-switch0",
        "node0.pcie-switch0>cpu0",
        "node0.cpu0>cpu1",
        "node0.cpu1.memory",
        "node0.cpu1.memory",
        "node0.cpu1>pcie-switch1",
        "node0.pcie-switch1>gpu2",
    ]


def test_gpus_without_peer_access_go_through_memory_even_under_one_switch() -> None:
    machine = cluster(node(TREE), gpu=replace(GPU, peer_to_peer=False))
    links = names(machine, machine.route(0, 1).links)
    assert links.count("node0.cpu0.memory") == 2
    assert machine.route(0, 1).kind == "PHB"


def test_two_gpus_with_amd_processors_talk_directly_through_sockets() -> None:
    """nccl src/graph/paths.cc: peer access up to SYS on AMD with at most two GPUs."""
    wires = (("gpu0", "cpu0", "pcie", 1), ("gpu1", "cpu1", "pcie", 1), ("cpu0", "cpu1", "upi", 1))
    amd = cluster(replace(node(wires), cpu_vendor="amd"), network=None)
    assert names(amd, amd.route(0, 1).links) == ["node0.gpu0>cpu0", "node0.cpu0>cpu1", "node0.cpu1>gpu1"]
    intel = cluster(node(wires), network=None)
    assert names(intel, intel.route(0, 1).links).count("node0.cpu1.memory") == 2


def test_gpus_without_a_wire_between_them_use_a_third_one() -> None:
    """A square of NVLinks; across the diagonal through the neighbour with the wider wires."""
    wires = (
        ("gpu0", "gpu1", "nvlink", 1),
        ("gpu1", "gpu2", "nvlink", 1),
        ("gpu2", "gpu3", "nvlink", 2),
        ("gpu3", "gpu0", "nvlink", 2),
        *((f"gpu{i}", "cpu0", "pcie", 1) for i in range(4)),
    )
    machine = cluster(node(wires), network=None)
    assert machine.route(0, 1).kind == "NVL"
    assert (machine.route(0, 2).kind, names(machine, machine.route(0, 2).links)) == (
        "NVB",
        ["node0.gpu0>gpu3", "node0.gpu3>gpu2"],
    )


def test_gpus_share_out_the_nics_beside_them() -> None:
    assert [cluster(node(TREE)).nic_of(gpu) for gpu in range(4)] == [0, 0, 1, 1]
    four = (*((f"gpu{i}", "pcie-switch0", "pcie", 1) for i in range(4)), ("pcie-switch0", "cpu0", "pcie", 1))
    machine = cluster(
        node((*four, *((f"nic{i}", "pcie-switch0", "pcie", 1) for i in range(4)))),
        network=replace(NETWORK, nics_per_node=4),
    )
    assert [machine.nic_of(gpu) for gpu in range(4)] == [0, 2, 1, 3]  # bits mirrored, as NCCL does


def test_between_nodes_by_the_receivers_rail() -> None:
    """gpu0 to gpu2 of the next node, whose NIC is nic1: over NVLink to gpu2 (the first GPU beside nic1), then out."""
    machine = cluster(node(SWITCHED), num_nodes=2)
    route = machine.route(0, 6)
    assert route.kind == "PXN"
    assert names(machine, route.links) == [
        "node0.gpu0>nvswitch0",
        "node0.nvswitch0>gpu2",
        "node0.gpu2>pcie-switch1",
        "node0.pcie-switch1>nic1",
        "node0.nic1>leaf",
        "node1.leaf>nic1",
        "node1.nic1>pcie-switch1",
        "node1.pcie-switch1>gpu2",
    ]
    assert machine.route(0, 4).kind == "NET"


def test_without_gpudirect_the_data_stops_in_host_memory_on_both_sides() -> None:
    machine = cluster(node(SWITCHED), num_nodes=2, network=replace(NETWORK, gpudirect=False))
    links = names(machine, machine.route(0, 4).links)
    assert links.count("node0.cpu0.memory") == links.count("node1.cpu0.memory") == 2
    assert [link for link in links if "nic" in link] == [
        "node0.pcie-switch0>nic0",
        "node0.nic0>leaf",
        "node1.leaf>nic0",
        "node1.nic0>pcie-switch0",
    ]


def test_leaves_join_nodes_and_the_spine_joins_leaves() -> None:
    """Two nodes a leaf. Nodes 0 and 1 share the leaf of each rail; 0 and 2 meet at the spine."""
    machine = cluster(node(SWITCHED), num_nodes=4)
    near, far = machine.route(0, 4), machine.route(0, 8)
    assert not [n for n in names(machine, near.links) if "spine" in n]
    assert [n for n in names(machine, far.links) if "spine" in n] == ["leaf0>spine", "spine>leaf2"]
    assert machine.num_leaves == 4


def test_oversubscription_narrows_the_uplinks_only() -> None:
    """Rails: two NICs of 24 GB/s below each leaf, 2:1: 24 GB/s up. Fat tree: four below, 48 GB/s up."""
    rails = cluster(node(SWITCHED), num_nodes=4, network=replace(NETWORK, oversubscription=2.0))
    assert rails.leaf_uplink_bytes_per_s == pytest.approx(24e9)
    tree = cluster(node(SWITCHED), num_nodes=4, network=replace(NETWORK, oversubscription=2.0, topology="fat-tree"))
    assert (tree.num_leaves, tree.leaf_uplink_bytes_per_s) == (2, pytest.approx(48e9))
    assert not [n for n in names(tree, tree.route(0, 6).links) if "spine" in n]


def test_copies_go_to_the_memory_of_the_own_socket() -> None:
    machine = cluster(node(TREE))
    down = machine.host_route(2, "host_to_device")
    assert names(machine, down.links) == ["node0.cpu1.memory", "node0.cpu1>pcie-switch1", "node0.pcie-switch1>gpu2"]
    assert names(machine, machine.host_route(2, "device_to_host").links)[-1] == "node0.cpu1.memory"
    assert machine.links[down.links[0]].bytes_per_s == pytest.approx(200e9)  # half of the node's


def test_a_network_with_other_nics_than_the_file() -> None:
    """Fewer: spread evenly. More: each device stands for several ports. None in the file: hung on the sockets."""
    one = cluster(node(TREE), 2, replace(NETWORK, nics_per_node=1))
    assert one.nics(0) == ("node0.nic0",)
    eight = cluster(node(TREE), 2, replace(NETWORK, nics_per_node=8))
    assert (eight.num_nics, eight.nic_bytes_per_s) == (2, 4 * 24e9)
    bare = cluster(node(tuple(w for w in TREE if "nic" not in w[0])), 2)
    assert bare.num_nics == 2
    assert [n for n in names(bare, bare.route(0, 4).links) if "leaf" in n] == ["node0.nic0>leaf", "node1.leaf>nic0"]


def test_trays_of_one_nvlink_rack_are_one_domain() -> None:
    """Two trays of four GPUs on the same switches: NVLink between them; a third and fourth are another rack."""
    machine = cluster(replace(node(SWITCHED), nvlink_domain_nodes=2), num_nodes=4)
    assert (machine.num_domains, machine.nodes_per_domain, machine.node_of(5)) == (2, 2, 1)
    assert machine.route(0, 5).kind == "NVL"
    assert machine.route(0, 12).kind in ("NET", "PXN")
    assert machine.links[machine.host_route(7, "host_to_device").links[0]].bytes_per_s == pytest.approx(200e9)


def test_every_route_is_a_walk_in_the_graph() -> None:
    """The drawing and the routes agree: consecutive links meet in a device, memory stops aside."""
    machine = cluster(node(SWITCHED), num_nodes=3)
    ends = {data["index"]: (a, b) for a, b, data in machine.graph.edges(data=True) if data["kind"] != "memory"}
    assert len(machine.links) == machine.num_links
    for source in range(12):
        for target in range(12):
            walk = [ends[i] for i in machine.route(source, target).links if i in ends]
            assert all(a[1] == b[0] for a, b in itertools.pairwise(walk))
            if source != target:
                assert walk[0][0].endswith(f"gpu{source % 4}") and walk[-1][1].endswith(f"gpu{target % 4}")


def test_links_one_by_one_are_the_links_together() -> None:
    machine = cluster(node(SWITCHED), num_nodes=4)
    assert tuple(machine.links) == tuple(machine.link(i) for i in range(machine.num_links))
    assert [link.bytes_per_s for link in machine.links] == [machine.bytes_per_s(i) for i in range(machine.num_links)]
    assert len({link.name for link in machine.links}) == machine.num_links


@pytest.mark.parametrize("name", load.names("node"))
def test_every_machine_of_the_catalogue_connects_its_gpus(name: str) -> None:
    facts = load.node(name)
    network = load.network(facts.default_network) if facts.default_network else None
    num_nodes = 2 if network else 1
    spec = ClusterSpec(
        node=facts,
        gpu=load.gpu(facts.gpu),
        network=network,
        num_nodes=num_nodes,
        num_gpus=num_nodes * facts.num_gpus,
    )
    machine = build_cluster(spec)
    for gpu in range(1, machine.num_gpus):
        assert all(machine.bytes_per_s(i) > 0 for i in machine.route(0, gpu).links)
        assert machine.route(gpu, 0).links


def test_two_thousand_nodes_are_not_built_one_by_one() -> None:
    machine = cluster(node(SWITCHED), num_nodes=2048)
    machine.route(0, 8191)
    assert "links" not in vars(machine) and "graph" not in vars(machine)


def test_networkx_is_not_imported_on_the_way_to_a_route() -> None:
    code = "import sys, sim.cluster.topology, sim.cost.nccl; sys.exit('networkx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gpu_relays_for_the_nic_that_it_uses() -> None:
    """DGX A100: GPUs 6 and 7 and NICs 6 and 7 on one switch; what goes out by NIC 7 is relayed by GPU 7, whose NIC it
    is (nccl src/graph/topo.cc, ncclTopoGetLocalGpu), and not all by GPU 6."""
    facts = load.node("dgx-a100-80gb")
    network = load.network(facts.default_network)
    spec = ClusterSpec(node=facts, gpu=load.gpu(facts.gpu), network=network, num_nodes=2, num_gpus=16)
    machine = build_cluster(spec)
    for rail in (6, 7):
        route = machine.local_nic_route(0, rail, outward=True)
        assert route.kind == "PXN"
        assert f"node0.gpu{rail}>pcie-switch3" in names(machine, route.links)
