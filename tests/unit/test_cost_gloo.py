"""gloo's algorithms over TCP, by hand and against what real processes sent (validation/measure/gloo_loopback.tsv)."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from sim.catalog import load
from sim.cluster.topology import Cluster, build_cluster
from sim.cost import gloo
from sim.report.explain import explanation, given_document
from sim.scenario.load import load_scenario
from sim.scenario.schema import ClusterSpec

ROOT = Path(__file__).parents[2]
MIB = 2**20
HEADER_BYTES = 48


def machine(num_nodes: int = 1, name: str = "dgx-h100") -> Cluster:
    node = load.node(name)
    network = load.network(node.default_network) if num_nodes > 1 else None
    return build_cluster(
        ClusterSpec(node=node, gpu=load.gpu(node.gpu), network=network, num_nodes=num_nodes,
                    num_gpus=num_nodes * node.num_gpus, backend="gloo")
    )  # fmt: skip


def test_segments_are_two_a_rank_or_more_of_a_mebibyte() -> None:
    assert gloo.segments(4, 8 * 1024) == (8, 1024)
    assert gloo.segments(4, 64 * MIB) == (64, MIB)
    assert gloo.segments(3, 64 * MIB) == (66, 1_016_804)  # 22 for each, of whole elements


def test_a_reduction_passes_more_round_the_ring_than_it_has_to() -> None:
    """64 MiB, two ranks: 62 of 64 segments go round where 32 had to, then 32 to the root (94 MiB of the other rank)."""
    assert gloo.work("reduce", 2, 64 * MIB).sent_bytes == 94 * MIB
    assert gloo.work("all_reduce", 2, 64 * MIB).sent_bytes == 64 * MIB


def rows() -> list[tuple[str, int, int, int, int]]:
    found = []
    for line in (ROOT / "validation/measure/gloo_loopback.tsv").read_text().splitlines():
        if not line.startswith(("#", "kind")):
            kind, ranks, size, most, every, _, _ = line.split("\t")
            found.append((kind, int(ranks), int(size), int(most), int(every)))
    return found


def test_real_processes_sent_these_bytes() -> None:
    """What is beside the tensors are headers, three a message at most."""
    for kind, n, size, most, every in rows():
        if kind == "send":
            continue
        sent = Counter[int]()
        for source, _, num_bytes in gloo.sends(kind, n, size):
            sent[source] += num_bytes
        headers = 3 * HEADER_BYTES * (gloo.work(kind, n, size).num_messages + n)
        assert 0 <= most - max(sent.values()) <= headers, (kind, n, size)
        assert 0 <= every - sum(sent.values()) <= n * headers, (kind, n, size)


def test_times_are_near_those_of_the_processes_that_they_were_fitted_to() -> None:
    pytest.importorskip("numpy")
    sys.path.insert(0, str(ROOT))
    from validation.measure.fit_gloo import CORES, model_s, read

    measured = [row for row in read(ROOT / "validation/measure/gloo_loopback.tsv") if row.ranks == CORES]
    off = [model_s(row, gloo.coefficients()) / row.best_s - 1 for row in measured]
    assert len(off) == 70
    assert median(map(abs, off)) < 0.15
    assert abs(median(off)) < 0.05


def test_between_nodes_the_first_nic_carries_everything() -> None:
    """2 DGX H100, all-gather of 16 x 1 MB: a ring leaves each node once, 15 MB over one port and what frames add."""
    cluster = machine(2)
    traffic = gloo.plan_collective(cluster, [tuple(range(16))], "all_gather", 16_000_000)
    assert traffic.algorithm == "ring/TCP"
    assert len(traffic.phases) == 3
    every = gloo.links(cluster)
    loads = dict(traffic.phases[1].loads)
    ports = [link for link in loads if cluster.is_nic(link)]
    assert {cluster.link(link).name for link in ports} == {
        f"node{node}.{way}" for node in (0, 1) for way in ("nic0>leaf", "leaf>nic0")
    }
    seconds = 15_000_000 * 1538 / 1448 / cluster.nic_line_bytes_per_s
    assert [loads[link] / cluster.bytes_per_s(link) for link in ports] == pytest.approx([seconds] * 4)
    memory = sum(load for link, load in loads.items() if every[link].kind == "memory")
    assert memory == pytest.approx(15_000_000 * (14 * 4 + 2 * 6))  # each hop in a node 4 times, between nodes 6


def test_ranks_share_the_cores_of_their_node() -> None:
    """All-gather of 8 x 8 MiB: each rank sends and receives 56 MiB, and copies 64 MiB that are mapped anew. Two such
    groups need twice the cores' seconds."""
    cluster, c = machine(2), gloo.coefficients()
    one = gloo.work("all_gather", 8, 64 * MIB)
    assert one.sent_bytes == one.received_bytes == 56 * MIB
    cached = 16 / (8 * 64)
    a_byte = cached * c.near_s + (1 - cached) * c.far_s
    seconds = 8 * (112 * MIB * a_byte + 64 * MIB * (c.copy_s + c.fault_s))
    groups = [tuple(range(8)), tuple(range(8, 16))]
    loads = dict(gloo.plan_collective(cluster, groups, "all_gather", 64 * MIB).phases[1].loads)
    assert [loads[cluster.num_links + node] for node in (0, 1)] == pytest.approx([seconds] * 2)
    assert [link.name for link in gloo.links(cluster)[-2:]] == ["node0.cores", "node1.cores"]
    assert gloo.links(cluster)[-1].bytes_per_s == cluster.spec.node.num_cpu_cores


def test_gpu_tensors_are_copied_to_the_host_and_back() -> None:
    cluster = machine()
    group = tuple(range(8))
    for kind, before, after in (("all_reduce", 8, 8), ("all_gather", 1, 8), ("reduce_scatter", 8, 8)):
        out, _, back = gloo.plan_collective(cluster, [group], kind, 8 * MIB).phases
        first = cluster.host_route(0, "device_to_host").links[0]
        last = cluster.host_route(0, "host_to_device").links[-1]
        assert dict(out.loads)[first] == before * MIB
        assert dict(back.loads)[last] == after * MIB
    out, _, back = gloo.plan_collective(cluster, [group], "broadcast", MIB).phases
    assert sum(cluster.link(link).kind == "pcie" for link, _ in out.loads) < sum(
        cluster.link(link).kind == "pcie" for link, _ in back.loads
    )


def test_trays_of_a_rack_meet_over_their_nics() -> None:
    """GB200: 8 GPUs on two trays of one NVLink domain; TCP knows no NVLink."""
    cluster = machine(2, "gb200-nvl72")
    every = gloo.links(cluster)
    kinds = {
        every[i].kind for i, _ in gloo.plan_collective(cluster, [tuple(range(8))], "all_reduce", MIB).phases[1].loads
    }
    assert "nic" in kinds
    assert "nvlink" not in kinds


def test_explain_says_what_gloos_times_rest_on() -> None:
    file = ROOT / "scenarios" / "gpt2_gloo.yaml"
    content = explanation(load_scenario(file), given_document(file, ()))
    families = {entry["family"]: entry for entry in content["cost"]}
    assert "nccl" not in families
    assert families["gloo"]["file"] == "sim/catalog/measured/gloo.yaml"
    values = [fit["value"] for fit in families["gloo"]["fits"]]
    assert values == list(gloo.coefficients())
