"""From a collective or a message of NCCL to traffic: choice, bytes on every link, time of its kernels."""

from __future__ import annotations

from collections.abc import Sequence

from sim.cluster.topology import Cluster
from sim.cost import collective
from sim.cost.copies import plan_shift
from sim.cost.efficiency import source_of
from sim.cost.nccl import terms
from sim.cost.nccl.durations import coefficients_for, connections_s, kernel_s, message_latency_s, messages_s
from sim.cost.nccl.loads import (
    Loads,
    all_to_all_loads,
    links_s,
    nvls_loads,
    pat_loads,
    phase_of,
    ring_loads,
    tree_loads,
)
from sim.cost.nccl.messages import (
    P2P_LOCAL_CHANNEL_BYTES_PER_S,
    P2P_NET_BATCH_S,
    P2P_NET_CHANNEL_BYTES_PER_S,
    P2P_NET_PROXY_BYTES_PER_S,
    P2P_NET_SHARE,
    P2P_PER_BATCH,
    p2p_channels,
    p2p_limit,
)
from sim.cost.nccl.rings import RingGraph, path_hw, ring_graph
from sim.cost.nccl.tuning import OVER_SHARP, Algorithm, Protocol, choose, sms_of
from sim.ir.traffic import Traffic

WIRE_OVERHEAD: dict[Protocol, float] = {"LL": 2.0, "LL128": 128 / 120, "Simple": 1.0}
"""Bytes on the wire per byte of data: LL sends a 4-byte flag with 4 bytes, LL128 8 of 128 (src/include/device.h)."""


def plan_collective(cluster: Cluster, groups: Sequence[tuple[int, ...]], kind: str, tensor_bytes: int) -> Traffic:
    """Return the traffic of a collective that all ``groups`` (of GPUs; equal in size) run at the same time.

    NCCL orders the ranks of a ring itself, by node and by place on the node; only the order of the nodes follows the
    group. Roots are the first of their group. A barrier is an all-reduce of one element, as torch makes it.
    """
    n = len(groups[0])
    assert all(len(group) == n for group in groups), "groups of different sizes cannot be folded into one"
    if n <= 1:
        return Traffic("none", (), 0)
    wire_bytes = collective.wire_bytes(kind, n, tensor_bytes)
    loads: Loads = {}
    if kind == "shift":
        return plan_shift(cluster, groups, tensor_bytes)
    if kind == "all_to_all":
        return _plan_all_to_all(cluster, groups, tensor_bytes, wire_bytes)
    if kind == "barrier":
        kind, tensor_bytes = "all_reduce", max(tensor_bytes, 4)
    graphs = [ring_graph(cluster, tuple(group)) for group in groups]
    choice = choose(cluster, graphs[0], kind, tensor_bytes)
    volume = tensor_bytes * WIRE_OVERHEAD[choice.protocol]
    group_s = 0.0
    for graph, group in zip(graphs, groups, strict=True):
        _add_loads(cluster, graph, choice.algorithm, kind, volume, loads, group[0])
        group_s = group_s or links_s(cluster, loads)
    sms = sms_of(cluster, graphs[0], choice, tensor_bytes)
    latency_s, flow_s = kernel_s(cluster, graphs[0], choice, kind, tensor_bytes, sms)
    if graphs[0].num_nodes > 1:
        if choice.algorithm in OVER_SHARP:
            from sim.cost.nccl import collnet

            flow_s = max(flow_s, collnet.inside_s(cluster, graphs[0], choice.algorithm, kind, volume))
        hop_bytes = volume if choice.algorithm == "tree" else collective.ring_hop_bytes(kind, n, volume)
        flow_s = max(flow_s, connections_s(cluster, hop_bytes, sms))
    cap = tensor_bytes / flow_s if flow_s > 0 else 0.0
    phase = phase_of(latency_s, loads, group_s, float(tensor_bytes) if cap else 0.0, cap)
    return Traffic(choice.name, (phase,), wire_bytes, sms)


def _add_loads(
    cluster: Cluster, graph: RingGraph, algorithm: Algorithm, kind: str, volume: float, loads: Loads, root: int
) -> None:
    """Add one group's bytes of a collective: ``volume`` is the tensor's with the protocol's overhead."""
    if algorithm == "ring":
        ring_loads(cluster, graph, collective.ring_hop_bytes(kind, graph.num_ranks, volume), loads, kind, root)
    elif algorithm == "tree":
        tree_loads(cluster, graph, volume, loads)
    elif algorithm == "pat":
        pat_loads(cluster, graph, volume, loads)
    elif algorithm in OVER_SHARP:
        from sim.cost.nccl import collnet

        collnet.add_loads(cluster, graph, algorithm, kind, volume, loads)
    else:
        nvls_loads(cluster, graph, kind, volume, loads)


def assumption(cluster: Cluster, groups: Sequence[tuple[int, ...]]) -> str:
    """Return what the time of a collective of ``groups`` rests on, where that was measured on another machine."""
    group = groups[0]
    if len(group) < 2:
        return ""
    gpu, network = cluster.spec.gpu, cluster.spec.network
    if network is not None and any(cluster.domain_of(a) != cluster.domain_of(group[0]) for a in group):
        same = gpu.name.startswith("h100") and network.fabric == "infiniband"
        return "" if same else f"collectives between nodes ({network.name}): latencies of H100 over InfiniBand assumed"
    graph = ring_graph(cluster, tuple(group))
    found = terms.measured_by(gpu, "ring/Simple", graph.hw)
    own = source_of(gpu)
    if found is None or (own.same and found[0] == own.name):
        return ""
    return f"collectives on {gpu.name}: times of NCCL's kernels assumed to be those of {found[0]}"


def _plan_all_to_all(
    cluster: Cluster, groups: Sequence[tuple[int, ...]], tensor_bytes: int, wire_bytes: int
) -> Traffic:
    """Return the traffic of an all-to-all: messages of S/n between all, in batches (see :func:`p2p_channels`)."""
    loads: Loads = {}
    group, n = groups[0], len(groups[0])
    group_s = nics_s = 0.0
    for members in groups:
        all_to_all_loads(cluster, members, tensor_bytes, loads)
        group_s = group_s or links_s(cluster, loads)
        nics_s = nics_s or max((b / cluster.bytes_per_s(i) for i, b in loads.items() if cluster.is_nic(i)), default=0.0)
    channels = p2p_channels(cluster, n, n, tensor_bytes / n, nics_s > 0)
    sms = min(channels * n, p2p_limit(cluster, n, nics_s > 0))
    if nics_s > 0:
        latency_s = message_latency_s(cluster, [(group[0], group[-1])]) + -(-n // P2P_PER_BATCH) * P2P_NET_BATCH_S
        flow_s = max(group_s, nics_s / P2P_NET_SHARE)
    else:
        latency_s, flow_s = messages_s(cluster, group, tensor_bytes, channels, group_s)
    cap = tensor_bytes / flow_s if flow_s > 0 else 0.0
    return Traffic("pairwise/Simple", (phase_of(latency_s, loads, group_s, float(tensor_bytes), cap),), wire_bytes, sms)


def plan_point_to_point(
    cluster: Cluster, pairs: Sequence[tuple[int, int]], tensor_bytes: int, num_ranks: int = 2, spans: bool = False
) -> Traffic:
    """Return the traffic of messages of ``tensor_bytes`` from the first to the second GPU of each pair, together.

    ``num_ranks`` of the communicator: the more there are, the fewer channels a message gets. ``spans`` nodes: then a
    message inside a node gets no more channels than one to another (src/graph/paths.cc, ncclTopoComputeP2pChannels,
    which takes the fewest of all peers).
    """
    moving = [(source, target) for source, target in pairs if source != target]
    if not moving:
        return Traffic("none", (), 0)
    loads: Loads = {}
    group_s = 0.0
    for source, target in moving:
        for link in cluster.route(source, target).links:
            loads[link] = loads.get(link, 0.0) + tensor_bytes
        group_s = group_s or links_s(cluster, loads)
    crosses = any(cluster.domain_of(a) != cluster.domain_of(b) for a, b in moving)
    channels = p2p_channels(cluster, max(num_ranks, 2), 1, tensor_bytes, spans or crosses)
    if crosses:
        latency_s = message_latency_s(cluster, moving)
        rate = 1 / (1 / (channels * P2P_NET_CHANNEL_BYTES_PER_S) + 1 / P2P_NET_PROXY_BYTES_PER_S)
        if needed_s := connections_s(cluster, tensor_bytes, channels):
            rate = min(rate, tensor_bytes / needed_s)
    else:
        latency_s, rate = _local_message(cluster, moving, tensor_bytes, channels, spans)
    phase = phase_of(latency_s, loads, group_s, float(tensor_bytes), rate)
    return Traffic("direct/Simple", (phase,), tensor_bytes, channels)


def _local_message(
    cluster: Cluster, pairs: Sequence[tuple[int, int]], tensor_bytes: int, channels: int, spans: bool
) -> tuple[float, float]:
    """Return (latency, the most bytes per second) of messages inside nodes, by the first of them."""
    rate = P2P_LOCAL_CHANNEL_BYTES_PER_S * channels
    source, target = pairs[0]
    route = cluster.local_route(cluster.local_index(source), cluster.local_index(target))
    hw = path_hw(cluster, route)
    coefficients = coefficients_for(cluster, "p2p", hw)
    if coefficients is None:
        return message_latency_s(cluster, pairs), rate
    start, peer, simple, _, _, chunk = coefficients
    ring = coefficients_for(cluster, "ring/Simple", hw)
    share = 1 / ring[3] if ring is not None and ring[3] else 1.0
    part = tensor_bytes / channels
    latency_s = start + peer + chunk * min(part, terms.P2P_CHUNK["net" if spans else hw])
    latency_s += simple if part > terms.P2P_LL_BYTES else 0.0
    return latency_s, min(rate, min(cluster.library_bytes_per_s(link) for link in route.links) * share)
