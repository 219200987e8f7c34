"""NCCL over a fabric whose switches reduce (SHARP): CollNetDirect, CollNetChain, and NVLS between nodes.

Each node reduces among its own GPUs; one GPU for each NIC, a *head*, hands its part to the network, whose switches add
the nodes' parts as they pass and send the sum down to all. So a NIC sends and receives its part once, however many
nodes there are, and a leaf switch hands one sum up. Within a node:

    collnet_direct  every GPU sends each head its part and has it back (src/device/all_reduce.h); needs NVSwitch
    collnet_chain   a chain of GPUs that ends at the head, down and up again, for each ring's channel
    nvls_sharp      the node's NVSwitches reduce and multicast (what NCCL calls NVLS on several nodes)

There is CollNet where a plugin offers it (nccl-rdma-sharp-plugins) and NCCL_COLLNET_ENABLE is 1: ``cluster.sharp`` of a
scenario (from two nodes on: NCCL_COLLNET_NODE_THRESHOLD, src/init.cc). Formulas: src/graph/tuning.cc; heads and speeds:
src/graph/search.cc, ncclTopoSearchRecNet, ncclTopoCompute; conditions: src/enqueue.cc, updateCollCostTable (NCCL 2.30).
Nothing is fitted: a collective takes as long as NCCL expects, or as its links need at the rates that NCCL counts on.
Held against published bus bandwidths of 64 H100 with NDR and SHARP (+6 % at 512 MiB, -1 % at 8 GiB:
tests/unit/test_cost_nccl_collnet.py). Of 8 NICs on A100 NVIDIA expects 110 GB/s of data (NVIDIA/nccl#320); the wires
allow 137.

Leaves out: trees of the switches that are given out to one job at a time, and their lower rates for small messages;
types that they do not add (8 bits).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from sim.cluster.topology import Cluster
from sim.cost.nccl.loads import Loads, add_load, nvls_inside
from sim.cost.nccl.rings import GB, HOPPER, MAX_CHANNELS, SPEEDS_INTER, RingGraph, generation_of
from sim.cost.nccl.tuning import (
    CHANNEL_TREE_BW,
    HW_LATENCY_US,
    NVLS_EFFICIENCY,
    PROTOCOLS,
    Candidate,
    Choice,
    NvlsGraph,
    Shape,
    nvls_channels,
)

MOST_LOCAL_RANKS = 8
"""NCCL_MAX_DIRECT_ARITY + 1, src/include/device.h: GPUs of a node that CollNet's own algorithms reach."""
INTRA_US = {"collnet_direct": 3.7, "collnet_chain": 2.8}
NET_US = {"collnet_direct": 31.0, "collnet_chain": 30.0, "nvls_sharp": 18.0}
"""hwLatencies of src/graph/tuning.cc, inside a node over NVLink and PCIe alike; their base latencies are 0."""
ARITY_US = 0.4
"""Of CollNetDirect, for each other GPU of a node."""
THREADS, THREAD_THRESHOLD = 640, 512
"""NCCL_MAX_NTHREADS; src/graph/tuning.cc: the bytes of a thread below which a channel is dropped."""


# --- the choice ----------------------------------------------------------------------------------


def num_heads(graph: RingGraph) -> int:
    """Return the GPUs of a node that hand parts to the network: one for each NIC, none twice."""
    return min(len({order[0] for order in pattern.orders}) for pattern in graph.patterns)


def speeds(cluster: Cluster, graph: RingGraph, num_channels: int, direct: bool) -> tuple[float, float]:
    """Return GB/s of a channel (inside a node, between nodes): the fastest of NCCL's list that NICs and wires carry.

    The search takes one speed for both, then tries faster ones inside until they are twice as fast. A direct exchange
    has a channel for each head. Over PCIe, whose wires chains share as rings do, chains are as fast as those.
    """
    if graph.hw != "nvlink" and not direct:
        return graph.channel_bw, graph.channel_bw
    listed = SPEEDS_INTER[max(generation_of(cluster) - 1, 0)]
    nic = cluster.nic_line_bytes_per_s / GB * len(graph.patterns[0].rails) / num_channels
    gpus, most = graph.nodes[0][1], nic
    if len(gpus) > 1:
        wires = cluster.library_bytes_per_s(cluster.local_route(gpus[0], gpus[1]).links[0]) / GB
        others = len(gpus) - 1
        # a head is sent all parts but its own, and sends its parts of the others'; a chain leaves out one of its GPUs
        most = wires / (1 + (num_channels - 1) / others) if direct else wires * len(gpus) / others / num_channels
    between = next((speed for speed in listed if speed <= min(nic, most) + 1e-6), min(nic, most))
    inside = between
    for speed in reversed(listed):
        if speed > inside and inside < 2 * between and speed <= most + 1e-6:
            inside = speed
    return inside, between


def candidates(
    cluster: Cluster, graph: RingGraph, shape: Shape, kind: str, nvls: NvlsGraph | None
) -> Iterator[Candidate]:
    """Yield what a fabric that reduces adds to NCCL's choice: ncclTopoTuneModel (src/graph/tuning.cc).

    ``nvls`` is the outcome of the NVLS search. All-gathers and reduce-scatters need a head for each GPU.
    """
    local, heads = shape.local_ranks, num_heads(graph)
    if kind not in ("all_reduce", "all_gather", "reduce_scatter"):
        return
    whole = kind == "all_reduce"
    if local <= MOST_LOCAL_RANKS and (whole or local <= heads) and _switched(cluster):
        inside, between = speeds(cluster, graph, heads, direct=True)
        bw = local * min(inside, between * 0.9)
        if whole:
            factor = local / heads
            bw = heads * inside / (factor - (factor - 1) / 2) * (0.85 if shape.generation >= HOPPER else 1.0) * 0.5
        latency = 2 * (min(1, local - 1) * INTRA_US["collnet_direct"] + (local - 1) * ARITY_US)
        yield Candidate("collnet_direct", "Simple", latency + _net_us(shape, "collnet_direct"), bw)
    if local <= MOST_LOCAL_RANKS and whole:
        inside, _ = speeds(cluster, graph, shape.channels, direct=False)
        latency = 2 * (local - 1) * INTRA_US["collnet_chain"] + _net_us(shape, "collnet_chain")
        yield Candidate("collnet_chain", "Simple", latency, shape.channels * inside * 0.5)
    if nvls is not None and (whole or local <= nvls.heads):
        heads = nvls.heads
        inside = nvls.intra * NVLS_EFFICIENCY[shape.generation] * (heads - 1) / heads
        inside *= 2 if whole else (local - 1) / local
        bw = heads * min(inside, nvls.inter)
        ratio = shape.num_ranks / (2 * (shape.num_ranks - 1)) if whole else 1.0
        latency = HW_LATENCY_US["nvlink"]["nvls"][PROTOCOLS.index("Simple")]
        yield Candidate("nvls_sharp", "Simple", latency + _net_us(shape, "nvls_sharp"), bw * ratio)


def _switched(cluster: Cluster) -> bool:
    """Whether a node's GPUs meet on NVSwitches."""
    return any(kind == "nvswitch" for _, kind in cluster.spec.node.devices)


def _net_us(shape: Shape, algorithm: str) -> float:
    """With one GPU a node the latency is that of a tree, as it is fully exposed."""
    simple = PROTOCOLS.index("Simple")
    return HW_LATENCY_US["net"]["tree"][simple] if shape.one_gpu_a_node else NET_US[algorithm]


def num_channels(cluster: Cluster, graph: RingGraph) -> int:
    """Return the channels of a communicator: half as many more where chains are faster inside nodes than between them
    (src/graph/connect.cc, ncclTopoPostset)."""
    inside, between = speeds(cluster, graph, graph.channels, direct=False)
    more = graph.num_ranks > graph.num_nodes and inside > between
    return min(MAX_CHANNELS, graph.compute_channels * 3 // 2) if more else graph.compute_channels


def channels(cluster: Cluster, graph: RingGraph, choice: Choice, tensor_bytes: int) -> int:
    """Return the SMs taken: src/enqueue.cc, topoGetAlgoInfo."""
    count = num_channels(cluster, graph)
    if choice.algorithm == "nvls_sharp":
        return min(nvls_channels(cluster, graph.num_nodes), count)
    if choice.algorithm == "collnet_chain":
        return max(1, min(count, tensor_bytes // (THREADS * THREAD_THRESHOLD)))
    heads, threshold, switch = num_heads(graph), THREAD_THRESHOLD, 16
    while switch >= 1 and tensor_bytes < count * THREADS * heads * threshold:
        while tensor_bytes < count * THREADS * heads * threshold and count > switch:
            if count == switch + switch // 2:
                threshold //= 2
            count -= 1
        switch //= 2
    return count


# --- the traffic ---------------------------------------------------------------------------------


def add_loads(cluster: Cluster, graph: RingGraph, algorithm: str, kind: str, tensor_bytes: float, loads: Loads) -> None:
    """Add the bytes of one group: in each node, on its NICs, and up and down the leaf switches."""
    {"collnet_direct": _direct, "collnet_chain": _chain, "nvls_sharp": nvls_inside}[algorithm](
        cluster, graph, kind, tensor_bytes, loads
    )
    _switches(cluster, graph, kind, tensor_bytes, loads)


def _heads(graph: RingGraph, at: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(order[0] for order in graph.patterns[at].orders))


def _direct(cluster: Cluster, graph: RingGraph, kind: str, tensor_bytes: float, loads: Loads) -> None:
    for at, (node, gpus) in enumerate(graph.nodes):
        heads, base = _heads(graph, at), node * cluster.links_per_domain
        part = tensor_bytes / len(heads)
        for head in heads:
            for gpu in gpus:
                if gpu != head and kind != "all_gather":
                    add_load(loads, base, cluster.local_route(gpu, head).links, part)
                if gpu != head and kind != "reduce_scatter":
                    add_load(loads, base, cluster.local_route(head, gpu).links, part)


def _chain(cluster: Cluster, graph: RingGraph, kind: str, tensor_bytes: float, loads: Loads) -> None:
    for (node, _), pattern in zip(graph.nodes, graph.patterns, strict=True):
        each, base = tensor_bytes / len(pattern.orders), node * cluster.links_per_domain
        for order in pattern.orders:
            for a, b in pairwise(order):
                add_load(loads, base, cluster.local_route(b, a).links, each)
                add_load(loads, base, cluster.local_route(a, b).links, each)


def _switches(cluster: Cluster, graph: RingGraph, kind: str, tensor_bytes: float, loads: Loads) -> None:
    """A head sends its part (of an all-gather only its node's of it) and receives the sum (of a reduce-scatter only
    its node's of it); each leaf hands up one sum and gets one down, where there are several."""
    each = tensor_bytes / len(graph.patterns[0].rails)
    own = each / graph.num_nodes
    out, back = (own if kind == "all_gather" else each), (own if kind == "reduce_scatter" else each)
    first = cluster.num_domains * cluster.links_per_domain
    leaves: dict[tuple[int, int], int] = {}
    for (node, _), pattern in zip(graph.nodes, graph.patterns, strict=True):
        base = node * cluster.links_per_domain
        for ring, (order, rail) in enumerate(zip(pattern.orders, pattern.rails, strict=True)):
            add_load(loads, base, cluster.local_nic_route(order[0], rail, outward=True).links, out)
            add_load(loads, base, cluster.local_nic_route(order[0], rail, outward=False).links, back)
            leaf = (ring, cluster.leaf_of(node, rail))
            leaves[leaf] = leaves.get(leaf, 0) + 1
    for (_, index), nodes in leaves.items():
        if nodes < graph.num_nodes:
            add_load(loads, 0, (first + 2 * index,), own * nodes if kind == "all_gather" else each)
            add_load(loads, 0, (first + 2 * index + 1,), own * nodes if kind == "reduce_scatter" else each)


def inside_s(cluster: Cluster, graph: RingGraph, algorithm: str, kind: str, tensor_bytes: float) -> float:
    """Return the time that a node needs for its part of one group, at the rates that NCCL counts on for its wires.

    A channel of a chain does what one of a tree over two nodes does, which crosses the network once too. NVLS's own
    part is in NCCL's expectation, by its efficiency.
    """
    if algorithm == "nvls_sharp":
        return 0.0
    loads: Loads = {}
    {"collnet_direct": _direct, "collnet_chain": _chain}[algorithm](cluster, graph, kind, tensor_bytes, loads)
    wires_s = max((load / cluster.library_bytes_per_s(link) for link, load in loads.items()), default=0.0)
    if algorithm == "collnet_direct":
        return wires_s
    each = CHANNEL_TREE_BW[generation_of(cluster)][1] * GB  # of two nodes
    searched = graph.channels * num_channels(cluster, graph) / graph.compute_channels
    return max(wires_s, tensor_bytes / (searched * each * 0.5))
