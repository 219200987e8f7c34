"""Which algorithm and protocol NCCL chooses: latency and bandwidth of each by the formulas of its src/graph/tuning.cc.

Constants are those of version 2.30.7; of older versions (``cluster.nccl``) the algorithms that there were are theirs.
Leaves out: the tuner's per-version quirks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sim.cluster.routing import PATH_KINDS, PathKind
from sim.cluster.topology import Cluster
from sim.cost.nccl.rings import (
    AMPERE,
    BLACKWELL,
    GB,
    HOPPER,
    SPEEDS_INTER,
    SPEEDS_INTRA,
    VOLTA,
    RingGraph,
    generation_of,
)

Algorithm = Literal["ring", "tree", "nvls", "nvls_tree", "pat", "collnet_direct", "collnet_chain", "nvls_sharp"]
OVER_SHARP = ("collnet_direct", "collnet_chain", "nvls_sharp")
"""What ``sim/cost/nccl/collnet.py`` adds where switches reduce."""
Protocol = Literal["LL", "LL128", "Simple"]
PROTOCOLS: tuple[Protocol, ...] = ("LL", "LL128", "Simple")
SINCE: dict[Algorithm, tuple[int, int]] = {"nvls": (2, 17), "nvls_tree": (2, 18), "pat": (2, 23), "nvls_sharp": (2, 17)}
"""Versions that brought algorithms: NCCL_ALGO_* of the tags (src/include/nccl_common.h, devcomm.h before)."""

BASE_LATENCY_US: dict[Algorithm, tuple[float, float, float]] = {
    "tree": (6.8, 14.0, 8.4),
    "ring": (6.6, 14.0, 8.4),
    "nvls": (0.0, 0.0, 0.0),
    "nvls_tree": (0.0, 0.0, 0.0),
    "pat": (8.0, 8.0, 8.0),
}
"""Per protocol LL, LL128, Simple."""

HW_LATENCY_US: dict[str, dict[Algorithm, tuple[float, float, float]]] = {
    "nvlink": {
        "tree": (0.6, 1.25, 4.0),
        "ring": (0.6, 1.9, 3.4),
        "nvls": (0, 0, 25),
        "nvls_tree": (0, 0, 25),
        "pat": (0, 0, 4.0),
    },
    "pci": {
        "tree": (1.0, 1.9, 4.0),
        "ring": (1.0, 2.5, 5.7),
        "nvls": (0, 0, 0),
        "nvls_tree": (0, 0, 0),
        "pat": (0, 0, 4.0),
    },
    "net": {
        "tree": (5.0, 8.5, 14.0),
        "ring": (2.7, 4.0, 14.0),
        "nvls": (0, 0, 18),
        "nvls_tree": (0, 0, 20.9),
        "pat": (0, 0, 14.0),
    },
}

NET_OVERHEAD_US = {"amd": 2.0, "other": 1.0}
"""What the processor takes to post to a NIC; three times for Simple."""
LL_MAX_BW = ((39.0, 39.0, 20.4), (87.7, 22.5, 19.0), (141.0, 45.0, 35.0), (282.0, 90.0, 70.0))
"""Rows by architecture (several nodes: Ampere's row with AMD processors, else Volta's); columns 1, 2, more nodes."""
CHANNEL_RING_LL128_BW = ((20.0, 20.0, 20.0), (20.0, 20.0, 20.0), (36.7, 36.7, 36.7), (40.0, 40.0, 40.0))
CHANNEL_TREE_LL128_BW = ((20.0, 20.0, 20.0), (20.0, 20.0, 20.0), (36.7, 36.7, 29.0), (55.6, 31.67, 20.0))
CHANNEL_TREE_BW = ((26.5, 18.5, 10.0), (24.0, 23.6, 17.8), (38.7, 41.4, 36.0), (70.0, 42.8, 24.0))
CHANNEL_NVLS_TREE_BW = ((26.5, 18.5, 10.0), (24.0, 23.6, 17.8), (0.0, 57.7, 45.5), (0.0, 96.0, 80.0))
NVLS_EFFICIENCY = (0.0, 0.0, 0.85, 0.74)

TREE_CORRECTION: dict[Protocol, tuple[float, ...]] = {
    "LL": (1, 1, 1, 1, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1, 1, 1),
    "LL128": (1, 1, 1, 1, 1, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 1, 1, 1),
    "Simple": (
        *(0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.7, 0.6, 0.6, 0.5),
        *(0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.7, 0.7, 0.8, 0.9, 0.9, 0.9),
    ),
}
"""Share of a tree's bandwidth that is reached, for messages of 64 B, 128 B, ... 512 MiB."""
MAX_THREADS: dict[Protocol, int] = {"LL": 512, "LL128": 640, "Simple": 512}
THREAD_THRESHOLD: dict[Protocol, int] = {"LL": 8, "LL128": 8, "Simple": 64}
MAX_NVLS_HEADS = 32
"""NCCL_MAX_NVLS_ARITY, src/include/device.h."""
NVLS_CHANNELS = {HOPPER: (16, 16), BLACKWELL: (24, 32)}
"""One node, several nodes: src/transport/nvls.cc."""
US = 1e-6
"""Seconds of the microseconds that NCCL's tables are in."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An algorithm with a protocol, and what NCCL's model expects: ``algorithm_bw`` is bytes of message per second."""

    algorithm: Algorithm
    protocol: Protocol
    latency_s: float
    algorithm_bw: float
    time_s: float

    @property
    def name(self) -> str:
        return f"{self.algorithm}/{self.protocol}"


def log2i(n: int) -> int:
    """Return the whole part of the binary logarithm, as NCCL's function of that name does."""
    return n.bit_length() - 1


class NvlsGraph(NamedTuple):
    """Heads of the NVLS search, and GB/s of each: what it pulls over NVLink, and what it may send on."""

    heads: int
    intra: float
    inter: float


def nvls_graph(cluster: Cluster, graph: RingGraph) -> NvlsGraph | None:
    """Return the outcome of the NVLS search, or None where NVLS cannot be used.

    It needs switches that multicast and more than two GPUs a node. Every GPU is a head on one node (32 at most), every
    GPU with a NIC of its own on several. For each head every GPU's NVLinks carry its speed, the head's own twice. Once
    there is a solution ``inter`` is raised as far as NICs let it, on one node until it is twice ``intra``.
    Source: nccl src/graph/search.cc, ncclTopoSearchTryNvls and the passes of ncclTopoCompute; src/transport/nvls.cc,
    ncclNvlsInit.
    """
    local = min(len(gpus) for _, gpus in graph.nodes)
    if not cluster.spec.node.nvswitch_multicast or generation_of(cluster) < HOPPER or local <= 2:
        return None
    if not all(p.nvlink for p in graph.patterns):
        return None
    several = graph.num_nodes > 1
    heads = len(graph.patterns[0].rails) if several else min(local, MAX_NVLS_HEADS)
    nic = cluster.nic_line_bytes_per_s / GB if several else math.inf
    speeds = (SPEEDS_INTER if several else SPEEDS_INTRA)[generation_of(cluster) - 1]
    limit = min(nvlink_bytes_per_s(cluster, graph) / GB / (heads + 1), nic)
    intra = next((speed for speed in speeds if speed <= limit + 1e-6), 0.0)
    if not intra or heads < 2:
        return None
    faster = [speed for speed in reversed(speeds) if intra <= speed <= nic + 1e-6]
    return NvlsGraph(heads, intra, next((speed for speed in faster if speed >= 2 * intra), faster[-1]))


def nvlink_bytes_per_s(cluster: Cluster, graph: RingGraph) -> float:
    """Return what a GPU of the group can send over NVLink."""
    gpus = graph.nodes[0][1]
    return cluster.bytes_per_s(cluster.local_route(gpus[0], gpus[1]).links[0])


class Candidate(NamedTuple):
    """Latency (us) and algorithm bandwidth (GB/s: message bytes over time) of an algorithm with a protocol."""

    algorithm: Algorithm
    protocol: Protocol
    latency_us: float
    bw: float


class Shape(NamedTuple):
    """What the formulas of tuning.cc look at: ``bus`` GB/s of all ``channels``, hardware inside and between nodes.

    ``tree_bus`` is what trees have inside the nodes: more than ``bus`` between two.
    """

    num_ranks: int
    num_nodes: int
    local_ranks: int
    one_gpu_a_node: bool
    generation: int
    column: int
    amd: bool
    intra_hw: str
    ll128: bool
    channels: int
    bus: float
    tree_bus: float
    same_channels: bool

    @property
    def hw(self) -> str:
        return "net" if self.num_nodes > 1 else self.intra_hw

    def inter_latency(self, algorithm: Algorithm, p: int) -> float:
        """Return the latency of the network; with one GPU a node the tree's, as it is fully exposed."""
        return HW_LATENCY_US["net"]["tree" if self.one_gpu_a_node else algorithm][p]


def _shape(cluster: Cluster, graph: RingGraph) -> Shape:
    generation = generation_of(cluster)
    several = graph.num_nodes > 1
    local = graph.num_ranks // graph.num_nodes
    nvlink = all(p.nvlink for p in graph.patterns)
    inter = max((p.inter for p in graph.patterns), key=PATH_KINDS.index)
    reach: PathKind = "PXN" if generation >= HOPPER else "PXB"
    near = not several or PATH_KINDS.index(inter) <= PATH_KINDS.index(reach)
    return Shape(
        num_ranks=graph.num_ranks,
        num_nodes=graph.num_nodes,
        local_ranks=local,
        one_gpu_a_node=graph.num_ranks == graph.num_nodes,
        generation=generation,
        column=min(graph.num_nodes, 3) - 1,
        amd=cluster.spec.node.cpu_vendor == "amd",
        intra_hw="nvlink" if nvlink else "pci",
        ll128=(local == 1 or nvlink) and near,
        channels=graph.channels,
        bus=graph.channels * graph.channel_bw,
        tree_bus=graph.channels * _tree_speed(cluster, graph, nvlink),
        same_channels=len(set(graph.patterns[0].orders)) == 1,
    )


def _tree_speed(cluster: Cluster, graph: RingGraph, nvlink: bool) -> float:
    """Return the GB/s of a tree's channel. Between two nodes a tree's bytes cross the network once each way and not
    almost twice as a ring's: once there is a solution the search raises the speed inside, up to twice the network's, as
    far as NVLinks carry it on all channels.

    Source: nccl src/graph/search.cc, ncclTopoCompute ("increase bwIntra for trees"); src/graph/tuning.cc takes bwIntra
    up to two nodes. So two nodes of an A100 with sixteen NICs of 100 Gbit/s reach 223 GB/s (Oracle's tutorial of
    nccl-tests on BM.GPU4.8), where their NICs carry 200.
    """
    speed = graph.channel_bw
    if graph.num_nodes != 2 or not nvlink or any(len(gpus) < 2 for _, gpus in graph.nodes):
        return speed
    room = min(cluster.library_bytes_per_s(cluster.local_route(*gpus[:2]).links[0]) for _, gpus in graph.nodes)
    for faster in reversed(SPEEDS_INTER[max(generation_of(cluster) - 1, 0)]):
        if speed < faster and speed < 2 * graph.channel_bw and graph.channels * faster <= room / GB + 1e-6:
            speed = faster
    return speed


def _num_steps(kind: str, n: int) -> int:
    """Return the steps of a ring of ``n`` ranks; a chain (broadcast, reduce) has as many as ranks."""
    return 2 * (n - 1) if kind == "all_reduce" else n - 1 if kind in ("all_gather", "reduce_scatter") else n


def _ll_max_bw(shape: Shape) -> float:
    row = shape.generation if shape.num_nodes == 1 else AMPERE if shape.amd else VOLTA
    return LL_MAX_BW[row][shape.column]


def _ring(shape: Shape, kind: str, p: int) -> Candidate:
    """Rings. Every step inside a node costs at least what it takes to post to the network, if there is one."""
    protocol = PROTOCOLS[p]
    bw = shape.bus
    if protocol == "LL":
        bw = min(_ll_max_bw(shape), shape.bus * 0.5)
    elif protocol == "LL128":
        bw = min(0.92 * shape.bus, shape.channels * CHANNEL_RING_LL128_BW[shape.generation][shape.column])
    steps = _num_steps(kind, shape.num_ranks)
    latency = BASE_LATENCY_US["ring"][p]
    if kind in ("broadcast", "reduce"):
        if shape.same_channels:
            latency += HW_LATENCY_US[shape.hw]["ring"][p]
        else:
            latency += steps * HW_LATENCY_US[shape.hw]["tree" if protocol == "Simple" else "ring"][p]
    else:
        post = 0.0
        if shape.num_nodes > 1:
            post = NET_OVERHEAD_US["amd" if shape.amd else "other"] * (3 if protocol == "Simple" else 1)
        crossings = (2 if kind == "all_reduce" else 1) * (shape.num_nodes - 1)
        inside = max(HW_LATENCY_US[shape.intra_hw]["ring"][p], post)
        latency += (steps - crossings) * inside + crossings * shape.inter_latency("ring", p)
    return Candidate("ring", protocol, latency, bw * shape.num_ranks / steps)


def _tree(shape: Shape, p: int) -> Candidate:
    """Trees between nodes, chains inside; all-reduce only."""
    protocol = PROTOCOLS[p]
    bw = min(0.92 * shape.tree_bus, shape.channels * CHANNEL_TREE_BW[shape.generation][shape.column])
    if protocol == "LL":
        bw = min(bw / 3.8, _ll_max_bw(shape))
    elif protocol == "LL128":
        cap = shape.channels * CHANNEL_TREE_LL128_BW[shape.generation][shape.column]
        bw = min(bw * (120 / 128 if shape.num_nodes > 1 else 7 / 9), cap)
    if shape.one_gpu_a_node:
        bw *= 0.85
    inside = (shape.local_ranks - 1) * HW_LATENCY_US[shape.intra_hw]["tree"][p]
    latency = BASE_LATENCY_US["tree"][p] + 2 * (inside + log2i(shape.num_nodes) * shape.inter_latency("tree", p))
    return Candidate("tree", protocol, latency, bw * 0.5)


def _nvls(shape: Shape, kind: str, found: NvlsGraph) -> Candidate | None:
    """NVLS on one node; on several NVLSTree, all-reduce only (NVLS itself needs CollNet there: collnet.py)."""
    simple = PROTOCOLS.index("Simple")
    n, local = shape.num_ranks, shape.num_ranks / shape.num_nodes
    heads = found.heads
    inside = found.intra * NVLS_EFFICIENCY[shape.generation] * (heads - 1) / heads
    inside *= 2 if kind == "all_reduce" else (local - 1) / local
    latency = HW_LATENCY_US["nvlink"]["nvls"][simple]
    if shape.num_nodes == 1 and kind in ("all_reduce", "all_gather", "reduce_scatter"):
        bw = heads * min(inside, found.inter)
        ratio = n / _num_steps(kind, n) if kind == "all_reduce" else 1.0
        return Candidate("nvls", "Simple", latency, bw * ratio)
    if shape.num_nodes > 1 and kind == "all_reduce":
        between = found.inter * (2 if shape.num_nodes <= 2 else 1)
        bw = heads * min(inside, between, CHANNEL_NVLS_TREE_BW[shape.generation][shape.column])
        latency += 2 * log2i(shape.num_nodes) * shape.inter_latency("nvls_tree", simple)
        return Candidate("nvls_tree", "Simple", latency, bw * n / _num_steps(kind, n))
    return None


def _pat(shape: Shape) -> Candidate:
    """Parallel aggregated trees: all-gather and reduce-scatter with one GPU a node."""
    simple = PROTOCOLS.index("Simple")
    latency = BASE_LATENCY_US["pat"][simple] + log2i(shape.num_nodes) * shape.inter_latency("pat", simple) / 3.5
    return Candidate("pat", "Simple", latency + shape.num_ranks * 2.8, shape.bus * 0.75)


def _candidates(cluster: Cluster, graph: RingGraph, kind: str) -> tuple[Candidate, ...]:
    """Return everything NCCL may choose from, by nccl ncclTopoTuneModel (src/graph/tuning.cc)."""
    shape = _shape(cluster, graph)
    protocols = [p for p, protocol in enumerate(PROTOCOLS) if protocol != "LL128" or shape.ll128]
    found: list[Candidate | None] = [_ring(shape, kind, p) for p in protocols]
    if kind == "all_reduce":
        found += [_tree(shape, p) for p in protocols]
    if kind in ("all_gather", "reduce_scatter") and shape.num_nodes > 1 and shape.one_gpu_a_node:
        found.append(_pat(shape))
    nvls = nvls_graph(cluster, graph)
    if nvls is not None:
        found.append(_nvls(shape, kind, nvls))
    if cluster.sharp and shape.num_nodes > 1:
        from sim.cost.nccl import collnet

        found += collnet.candidates(cluster, graph, shape, kind, nvls)
    return tuple(c for c in found if c is not None and cluster.spec.nccl >= SINCE.get(c.algorithm, (2, 0)))


def _at_size(cluster: Cluster, graph: RingGraph, kind: str, tensor_bytes: int, candidate: Candidate) -> Candidate:
    """Return a candidate with what depends on the size of the message: nccl ncclTopoGetAlgoTime."""
    algorithm, protocol, latency, bw = candidate
    generation = generation_of(cluster)
    size_class = log2i(tensor_bytes >> 6) if tensor_bytes >= 64 else -1
    x86 = cluster.spec.node.cpu_vendor in ("intel", "amd")
    dips = (algorithm == "tree" and 0 <= size_class < 23) or (
        algorithm == "nvls_tree" and 0 <= size_class < 24 and generation >= BLACKWELL and x86
    )
    if dips:
        bw *= TREE_CORRECTION[protocol][size_class]
    spans = graph.num_nodes > 1 and tensor_bytes / (graph.compute_channels * graph.num_ranks) >= 64
    if algorithm == "ring" and protocol == "Simple" and kind == "all_reduce" and spans:
        latency *= 1.4 if generation >= AMPERE else 1.9
    return Candidate(algorithm, protocol, latency, bw)


def choose(cluster: Cluster, graph: RingGraph, kind: str, tensor_bytes: int) -> Choice:
    """Return what NCCL would run: the smallest time by its own model, the first of equals."""
    key = ("candidates", kind, graph.patterns[0], graph.num_ranks, graph.num_nodes, graph.channels, graph.channel_bw)
    candidates: tuple[Candidate, ...] | None = cluster.memo.get(key)
    if candidates is None:
        candidates = cluster.memo[key] = _candidates(cluster, graph, kind)
    best: Choice | None = None
    for candidate in candidates:
        c = _at_size(cluster, graph, kind, tensor_bytes, candidate)
        time_s = c.latency_us * US + tensor_bytes / (c.bw * GB)
        if best is None or time_s < best.time_s:
            best = Choice(c.algorithm, c.protocol, c.latency_us * US, c.bw * GB, time_s)
    assert best is not None
    return best


def sms_of(cluster: Cluster, graph: RingGraph, choice: Choice, tensor_bytes: int) -> int:
    """Return the SMs taken: one for each channel; channels are dropped while a message is too small for their threads.

    Source: nccl src/enqueue.cc, topoGetAlgoInfo.
    """
    if choice.algorithm in ("nvls", "nvls_tree"):
        return nvls_channels(cluster, graph.num_nodes)
    if choice.algorithm == "pat":  # its threads are never set, so no message is too small for them
        return graph.compute_channels
    if choice.algorithm in OVER_SHARP:
        from sim.cost.nccl import collnet

        return collnet.channels(cluster, graph, choice, tensor_bytes)
    threads = MAX_THREADS[choice.protocol]
    if choice.algorithm == "ring" and choice.protocol == "Simple" and graph.channels * graph.channel_bw <= 12.0:
        threads = 256
    threshold = THREAD_THRESHOLD[choice.protocol]
    if choice.algorithm == "ring" and choice.protocol == "LL":
        threshold *= graph.num_ranks
    return max(1, min(graph.compute_channels, tensor_bytes // (threads * threshold)))


def nvls_channels(cluster: Cluster, num_nodes: int) -> int:
    """Return the channels of NVLS: src/transport/nvls.cc, ncclNvlsTuning."""
    return NVLS_CHANNELS.get(generation_of(cluster), (16, 16))[num_nodes > 1]
