"""What NCCL does with a collective: rings and trees over this machine, the algorithm and protocol, the wires.

Three steps, each as in NCCL (version 2.30):

1. *Pattern*: rings over the GPUs of a group, one for each NIC of a node, and how fast the search lets each
   channel run (nccl: src/graph/search.cc, connect.cc).
2. *Choice*: latency and bandwidth of every algorithm and protocol by the formulas of src/graph/tuning.cc; the smallest
   time wins.
3. *Traffic*: bytes on every link for all the groups together. Sharing of links, by groups and within one ring (PCIe
   trees, sockets), is the network's to work out. How long the kernel takes on idle wires, by its own steps, chunks and
   channels (``sim/cost/nccl_time.py``, measured), enters as latency and cap of the phase.

``tensor_bytes`` follows nccl-tests: an all-gather's output, a reduce-scatter's input, else the buffer.

A *node* in this file is what NCCL calls one: a domain of the cluster (a node, or the trays of one NVLink rack).

Of older versions (``cluster.nccl``) the algorithms there were, relays between GPUs and the channels of messages are
theirs; the tuner's constants stay those of 2.30.

What switches that reduce add is in ``sim/cost/collnet.py``. Leaves out: the tuner's per-version quirks; rings that
differ between channels on NVSwitch (they load the wires alike).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations, product
from typing import Literal, NamedTuple

from sim.cluster.routing import PATH_KINDS, SCALE_UP, PathKind, Route
from sim.cluster.topology import Cluster
from sim.cost import collective, nccl_time
from sim.cost.efficiency import source_of
from sim.cost.nccl_time import Coefficients, Work
from sim.ir.traffic import Phase, Traffic

__all__ = ["assumption", "bus_bytes_per_s", "choose", "plan_collective", "plan_copy", "plan_point_to_point"]
bus_bytes_per_s = collective.bus_bytes_per_s

Algorithm = Literal["ring", "tree", "nvls", "nvls_tree", "pat", "collnet_direct", "collnet_chain", "nvls_sharp"]
OVER_SHARP = ("collnet_direct", "collnet_chain", "nvls_sharp")
"""What ``sim/cost/collnet.py`` adds where switches reduce."""
Protocol = Literal["LL", "LL128", "Simple"]
PROTOCOLS: tuple[Protocol, ...] = ("LL", "LL128", "Simple")
SINCE: dict[Algorithm, tuple[int, int]] = {"nvls": (2, 17), "nvls_tree": (2, 18), "pat": (2, 23), "nvls_sharp": (2, 17)}
"""Versions that brought algorithms: NCCL_ALGO_* of the tags (src/include/nccl_common.h, devcomm.h before)."""

# --- constants of nccl src/graph/tuning.cc (v2.30.7), microseconds and GB/s as there -------------

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

VOLTA, AMPERE, HOPPER, BLACKWELL = range(4)
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

WIRE_OVERHEAD: dict[Protocol, float] = {"LL": 2.0, "LL128": 128 / 120, "Simple": 1.0}
"""Bytes on the wire per byte of data: LL sends a 4-byte flag with 4 bytes, LL128 8 of 128 (src/include/device.h)."""

# --- constants of the graph search: src/graph/search.cc, connect.cc; of launches: src/enqueue.cc ---

SPEEDS_INTRA = (
    (40.0, 30.0, 20.0, 18.0, 15.0, 12.0, 10.0, 9.0, 7.0, 6.0, 5.0, 4.0, 3.0),
    (60.0, 50.0, 40.0, 30.0, 24.0, 20.0, 15.0, 12.0, 11.0, 6.0, 3.0),
    (90.0, 80.0, 70.0, 60.0, 50.0, 45.0, 40.0, 30.0, 24.0, 20.0, 19.0, 18.0),
)
SPEEDS_INTER = (
    (48.0, 30.0, 28.0, 24.0, 20.0, 18.0, 15.0, 12.0, 10.0, 9.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.4, 1.2, 0.24, 0.12),
    (48.0, 45.0, 42.0, 40.0, 30.0, 24.0, 22.0, 20.0, 17.5, 15.0, 12.0, 6.0, 3.0, 2.4, 1.2, 0.24, 0.12),
    (
        96.0,
        86.0,
        80.0,
        48.0,
        45.1,
        42.0,
        40.0,
        30.0,
        24.0,
        22.0,
        20.0,
        17.5,
        15.0,
        12.0,
        6.0,
        3.0,
        2.4,
        1.2,
        0.24,
        0.12,
    ),
)
"""Speeds of a channel (GB/s) that the search tries; rows before sm90, sm90, sm100."""
SPEED_STEP = 0.2
"""A NIC sold for 25 GB/s is searched for at 24, one for 12.5 at 12 or 10: the speed found is up to a fifth below."""
MAX_CHANNELS = 64
MESH_SEARCH_STEPS = 20_000
MAX_THREADS: dict[Protocol, int] = {"LL": 512, "LL128": 640, "Simple": 512}
THREAD_THRESHOLD: dict[Protocol, int] = {"LL": 8, "LL128": 8, "Simple": 64}
MAX_NVLS_HEADS = 32
"""NCCL_MAX_NVLS_ARITY, src/include/device.h."""
NVLS_CHANNELS = {HOPPER: (16, 16), BLACKWELL: (24, 32)}
"""One node, several nodes: src/transport/nvls.cc."""

P2P_CHANNEL_NET_BW = 14
"""GB/s of the network that one channel of a message is given: NCCL_P2P_PER_CHANNEL_NET_BW."""
P2P_PER_BATCH = 8
"""Messages that a channel works on together: NCCL_MAX_DEV_WORK_P2P_PER_BATCH, src/include/device.h."""
P2P_LOCAL_CHANNEL_BYTES_PER_S = 20.3e9
"""What one channel of a message over NVLink sends: nccl-tests sendrecv of xxrjun/nccl-tests-cluster@455de4f (H100, one
node), 128 and 256 MiB over 8 and 16 channels in 825 and 896 us."""
SHM_BYTES_PER_S = 48e9
"""What a hop through host memory is a share of, whatever the generation of PCIe: the port of the machine on which it
was measured. Its kernels and the host's memory limit it, not the port: 24.7 GB/s over eight RTX PRO 6000 on PCIe 5,
25.9 over pairs of A100 on PCIe 4 (an all_gather_perf of Azure NC A100 v4), 28 over eight RTX 5090
(NVIDIA/nccl#1639)."""
P2P_NET_BATCH_S = 30e-6
"""Latency of each batch of messages to other nodes: the same logs, all-to-all of 80 ranks, 31 to 127 MiB: 10 batches in
280 to 330 us beside what the NICs need; 10 ranks, 2 batches in 95 to 107 us."""
P2P_NET_SHARE = 0.93
"""Share of a NIC's bandwidth that an all-to-all reaches: the same logs at 4 GiB, 0.92 (10 ranks) to 0.94 (80 ranks)."""
P2P_NET_CHANNEL_BYTES_PER_S, P2P_NET_PROXY_BYTES_PER_S = 18.1e9, 94e9
"""What one channel of a message over the network could send alone, and what all of them share (the proxy thread):
1 / (channels x first) + 1 / second. The same logs, sendrecv over 10 nodes of 8 GPUs (1 channel): 15.2 GB/s, of 1 to 4
GPUs (2 channels): 24.9 to 26.2; pairs of nodes (4 channels): 39.7 to 43.2, predicted 40.9."""

GB = 1e9
US = 1e-6


# --- 1. the pattern ----------------------------------------------------------------------------


class NodePattern(NamedTuple):
    """The rings of a group on one of its nodes; links local to the node, loads per byte that crosses a ring's hop.

    ``orders`` one for each ring: local GPUs from the one that receives to the one that sends; ``rails`` the NIC of each
    (empty on a single node, where the rings are closed). ``loads`` (link, share) sums over all rings, each with an
    equal share of the data. ``nvlink``: all hops are NVLink. ``inter`` is the farthest path to a NIC. ``out_rails``:
    the NIC by which each ring leaves; that by which it came in but for rings that cross.
    """

    orders: tuple[tuple[int, ...], ...]
    rails: tuple[int, ...]
    out_rails: tuple[int, ...]
    loads: tuple[tuple[int, float], ...]
    nvlink: bool
    inter: PathKind


@dataclass(frozen=True, slots=True)
class RingGraph:
    """What the search found for one group. ``channels`` of ``channel_bw`` GB/s each; ``compute_channels`` run.

    ``hw``  what the hops inside a node are: ``nvlink``, ``pci`` (peer access) or ``shm`` (through host memory)
    ``local_bytes_per_s``  what NCCL takes them for: all NVLinks that the rings use together, or the port of a GPU
    """

    num_ranks: int
    nodes: tuple[tuple[int, tuple[int, ...]], ...]
    patterns: tuple[NodePattern, ...]
    channels: int
    channel_bw: float
    compute_channels: int
    hw: str = "nvlink"
    local_bytes_per_s: float = 0.0

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @property
    def gpus_per_node(self) -> float:
        return self.num_ranks / len(self.nodes)


def _by_node(cluster: Cluster, group: Sequence[int]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return (node, local GPUs ascending) in the order in which the group first reaches each node."""
    found: dict[int, list[int]] = {}
    for gpu in group:
        found.setdefault(cluster.domain_of(gpu), []).append(cluster.local_index(gpu))
    return tuple((node, tuple(sorted(gpus))) for node, gpus in found.items())


def _rails(cluster: Cluster, gpus: tuple[int, ...]) -> tuple[int, ...]:
    """Return the NICs that GPUs of a node use, in the order of the GPUs."""
    return tuple(dict.fromkeys(cluster.rail_of(gpu) for gpu in gpus))


def _direct_wires(cluster: Cluster, gpus: tuple[int, ...]) -> dict[tuple[int, int], int]:
    """Return how many NVLinks each GPU has straight to each other one."""
    wires: dict[tuple[int, int], int] = {}
    for a, b in permutations(gpus, 2):
        route = cluster.local_route(a, b)
        if route.kind == "NVL" and len(route.links) == 1:
            wires[a, b] = cluster.node.wires[route.links[0]].count
    return wires


def _mesh_cycles(gpus: tuple[int, ...], wires: dict[tuple[int, int], int]) -> tuple[tuple[int, ...], ...]:
    """Return rings through all GPUs over direct NVLinks, none using a wire twice; empty if there is none.

    A ring and its reverse use the two directions of the same wires, so rings are sought in pairs (two GPUs: one ring a
    wire): as many as fit, by depth-first search that goes on over the pair with the most unused wires, then to the
    lowest GPU, and gives up improving after ``MESH_SEARCH_STEPS``, as NCCL's search has its timeout.
    """
    spare = dict(wires)
    if len(gpus) == 2:
        return (gpus,) * min(spare.get(gpus, 0), MAX_CHANNELS // 2)
    most = min(min(sum(spare.get((a, b), 0) for b in gpus) for a in gpus) // 2, MAX_CHANNELS // 4)
    best: list[tuple[int, ...]] = []
    steps = 0

    def extend(path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        nonlocal steps
        steps += 1
        here = path[-1]
        if len(path) == len(gpus):
            if spare.get((here, path[0]), 0):
                yield path
            return
        ahead = [b for b in gpus if b not in path and spare.get((here, b), 0)]
        for b in sorted(ahead, key=lambda b: (-spare[here, b], b)):
            yield from extend((*path, b))

    def take(cycle: tuple[int, ...], count: int) -> None:
        for a, b in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
            spare[a, b] -= count
            spare[b, a] -= count

    def pack(found: tuple[tuple[int, ...], ...]) -> None:
        if len(found) > len(best):
            best[:] = found
        if len(best) == most:
            return
        for cycle in extend(gpus[:1]):
            take(cycle, 1)
            pack((*found, cycle))
            take(cycle, -1)
            if len(best) == most or steps > MESH_SEARCH_STEPS:
                return

    pack(())
    return tuple(ring for cycle in best for ring in (cycle, (cycle[0], *reversed(cycle[1:]))))


def _mesh_path(
    spare: dict[tuple[int, int], int], gpus: tuple[int, ...], path: tuple[int, ...], last: int
) -> tuple[int, ...]:
    """Return ``path`` continued through all other GPUs to ``last`` over unused wires; empty if there is no way."""
    if len(path) == len(gpus) - 1:
        return (*path, last) if spare.get((path[-1], last), 0) > 0 else ()
    ahead = [b for b in gpus if b != last and b not in path and spare.get((path[-1], b), 0) > 0]
    for b in sorted(ahead, key=lambda b: (-spare[path[-1], b], b)):
        if found := _mesh_path(spare, gpus, (*path, b), last):
            return found
    return ()


def _orders(cluster: Cluster, gpus: tuple[int, ...], rails: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the order of the GPUs of a node in each ring.

    With NICs, ring i starts at the GPU of ``rails[i]`` and ends at the other GPU that is nearest to that NIC. Over
    direct NVLinks rings follow the wires, unused ones first; on NVSwitch any order is as good. Over PCIe GPUs follow
    each other as they hang in the tree (by index), which crosses each switch and socket once.
    """
    if len(gpus) == 1:
        return (gpus,) * max(len(rails), 1)
    spare = _direct_wires(cluster, gpus)
    cycles = _mesh_cycles(gpus, spare) if spare else ()
    if not rails:
        return cycles or (gpus,)
    wires = dict(spare)
    orders = []
    for i, rail in enumerate(rails):
        start = next(gpu for gpu in gpus if cluster.rail_of(gpu) == rail)
        at = gpus.index(start)
        order = (*gpus[at:], *gpus[:at])
        far = {g: PATH_KINDS.index(cluster.local_nic_route(g, rail, True, gpus).kind) for g in order[1:]}
        ends = sorted(order[:0:-1], key=lambda gpu: far[gpu])
        order = (*(gpu for gpu in order if gpu != ends[0]), ends[0])
        if cycles and PATH_KINDS[far[ends[0]]] == "PXN":
            # Sent through the GPU that the ring started at: one more hop, the one that closes a cycle.
            cycle = cycles[i % len(cycles)]
            order = (*cycle[cycle.index(start) :], *cycle[: cycle.index(start)])
        elif spare:
            ways = (_mesh_path(free, gpus, (start,), end) for free in (spare, wires) for end in ends)
            order = next(filter(None, ways), order)
        for hop in pairwise(order):
            if hop in spare:
                spare[hop] -= 1
        orders.append(order)
    return tuple(orders)


def _pattern(cluster: Cluster, gpus: tuple[int, ...], rails: tuple[int, ...]) -> NodePattern:
    """Return the rings of a group over these GPUs of a node (see :class:`NodePattern`). Worked out once."""
    key = ("pattern", gpus, rails)
    known: NodePattern | None = cluster.memo.get(key)
    if known is not None:
        return known
    orders = _orders(cluster, gpus, rails)
    out_rails = rails
    if not cluster.relays and cluster.gpudirect and _slowed(cluster, gpus, rails, orders):
        out_rails = (*rails[1:], *rails[:1])
        orders = _crossing(cluster, gpus, rails)
    loads: dict[int, float] = {}
    share = 1 / len(orders)
    nvlink = True
    inter: PathKind = "PIX"
    for i, order in enumerate(orders):
        hops = [cluster.local_route(a, b) for a, b in pairwise(order)]
        nvlink = nvlink and all(hop.kind in ("NVL", "NVB") for hop in hops)
        if rails:
            ends = [
                cluster.local_nic_route(order[0], rails[i], False, gpus),
                cluster.local_nic_route(order[-1], out_rails[i], True, gpus),
            ]
            inter = max(inter, *(end.kind for end in ends), key=PATH_KINDS.index)
            hops += ends
        else:
            hops.append(cluster.local_route(order[-1], order[0]))
            nvlink = nvlink and hops[-1].kind in ("NVL", "NVB")
        for hop in hops:
            for link in hop.links:
                loads[link] = loads.get(link, 0.0) + share
    found = NodePattern(orders, rails, out_rails, tuple(sorted(loads.items())), nvlink and len(gpus) > 1, inter)
    cluster.memo[key] = found
    return found


def _slowed(
    cluster: Cluster, gpus: tuple[int, ...], rails: tuple[int, ...], orders: tuple[tuple[int, ...], ...]
) -> bool:
    """Whether a ring that left by the NIC it came in by could not run at that NIC's speed, and may cross instead.

    Without a relay the GPU at its end reaches that NIC through its socket, or another one; the search goes that way
    rather than cross, but crosses rather than go slower (src/graph/search.cc of version 2.10, ncclTopoCompute:
    typeInter, then crossNic, then a lower speed; NCCL_CROSS_NIC is 2).
    """
    if len(rails) < 2 or len(gpus) < 2 or _direct_wires(cluster, gpus):
        return False
    speed = cluster.nic_line_bytes_per_s * (1 - SPEED_STEP)
    wires = len(cluster.node.wires)
    ends = [cluster.local_nic_route(order[-1], rail, True, gpus) for order, rail in zip(orders, rails, strict=True)]
    return any(link < wires and cluster.library_bytes_per_s(link) < speed for end in ends for link in end.links)


def _crossing(cluster: Cluster, gpus: tuple[int, ...], rails: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return rings that come in by one NIC and leave by the next, each at the GPU beside it."""
    beside = [next(gpu for gpu in gpus if cluster.rail_of(gpu) == rail) for rail in rails]
    ends = zip(beside, (*beside[1:], *beside[:1]), strict=True)
    return tuple((start, *(gpu for gpu in gpus if gpu not in (start, end)), end) for start, end in ends)


def generation_of(cluster: Cluster) -> int:
    """Return the row of NCCL's tables for this GPU (other vendors: RCCL starts from the same model; Ampere's row)."""
    gpu = cluster.spec.gpu
    if gpu.vendor != "nvidia":
        return AMPERE
    major = gpu.compute_capability[0]
    return BLACKWELL if major >= 10 else HOPPER if major == 9 else AMPERE if major == 8 else VOLTA


def _channels(cluster: Cluster, num_rings: int, ring_bw: float, several_nodes: bool) -> tuple[int, float]:
    """Return how many channels of which speed the search settles on for rings that could each run at ``ring_bw`` GB/s.

    It starts from the highest speed of its table that fits and keeps the first best total. Then channels of 25 GB/s
    or more are split in two (from sm90 on only if they are few or run at 50). A ring slower than every speed of the
    table runs as fast as it can. Source: nccl src/graph/search.cc, ncclTopoCompute, ncclTopoDupChannels.
    """
    row = max(generation_of(cluster) - 1, 0)
    most = max(MAX_CHANNELS // 2 // num_rings, 1)
    best, speed = 1, 0.0
    for candidate in (SPEEDS_INTER if several_nodes else SPEEDS_INTRA)[row]:
        count = min(int(ring_bw / candidate + 1e-6), most)
        if count * candidate > best * speed + 1e-6:
            best, speed = count, candidate
    if speed == 0.0:
        speed = ring_bw
    channels = best * num_rings
    generation = generation_of(cluster)
    if speed >= 25 and not (generation >= HOPPER and speed < 50 and channels > 4):
        split = min(2 * channels, MAX_CHANNELS // 2)
        channels, speed = split, speed * channels / split
    return channels, speed


def ring_graph(cluster: Cluster, group: tuple[int, ...]) -> RingGraph:
    """Return the rings of a group and the speed NCCL expects of them. Worked out once."""
    known: RingGraph | None = cluster.memo.get(("rings", group))
    if known is None:
        known = cluster.memo["rings", group] = _ring_graph(cluster, group)
    return known


def _ring_graph(cluster: Cluster, group: tuple[int, ...]) -> RingGraph:
    nodes = _by_node(cluster, group)
    several = len(nodes) > 1
    rails = [_rails(cluster, gpus) if several else () for _, gpus in nodes]
    num_rings = min(map(len, rails))
    patterns = tuple(_pattern(cluster, gpus, r[:num_rings]) for (_, gpus), r in zip(nodes, rails, strict=True))
    key = ("channels", len(nodes) > 1, tuple(dict.fromkeys((p.orders, p.rails) for p in patterns)))
    found: tuple[int, float] | None = cluster.memo.get(key)
    if found is None:
        distinct = {(p.orders, p.rails): p for p in patterns}.values()
        total = min((cluster.library_bytes_per_s(link) / share for p in distinct for link, share in p.loads)) / GB
        rings = len(patterns[0].orders)
        found = _channels(cluster, rings, total / rings, several)
        cluster.memo[key] = found
    channels, speed = found
    # Channels are doubled when rings are connected, and again on Hopper where few fast ones span nodes (connect.cc).
    compute = min(2 * channels, MAX_CHANNELS)
    if generation_of(cluster) >= HOPPER and several and speed > 45 and compute < 16:
        compute *= 2
    hw, local = _local_wires(cluster, patterns)
    return RingGraph(len(group), nodes, patterns, channels, speed, compute, hw, local)


def _local_wires(cluster: Cluster, patterns: tuple[NodePattern, ...]) -> tuple[str, float]:
    """Return ``hw`` and ``local_bytes_per_s`` of a :class:`RingGraph` (0: one GPU a node). Worked out once."""
    key = ("local wires", tuple(dict.fromkeys((p.orders, p.rails) for p in patterns)))
    known: tuple[str, float] | None = cluster.memo.get(key)
    if known is not None:
        return known
    kinds: dict[str, float] = {}
    for pattern in {(p.orders, p.rails): p for p in patterns}.values():
        if len(pattern.orders[0]) == 1:
            continue
        if pattern.nvlink:
            wires = cluster.node.wires
            scale_up = [(i, s) for i, s in pattern.loads if i < len(wires) and wires[i].kind in SCALE_UP]
            rate = min(cluster.library_bytes_per_s(i) / share for i, share in scale_up)
            kinds["nvlink"] = min(kinds.get("nvlink", rate), rate)
            continue
        order = pattern.orders[0]
        hops = [cluster.local_route(a, b) for a, b in pairwise((*order, order[0]))]
        hw = "shm" if any(cluster.link(i).kind == "memory" for hop in hops for i in hop.links) else "pci"
        rate = SHM_BYTES_PER_S if hw == "shm" else min(cluster.library_bytes_per_s(hop.links[0]) for hop in hops)
        kinds[hw] = min(kinds.get(hw, rate), rate)
    found = next(((hw, kinds[hw]) for hw in ("shm", "pci", "nvlink") if hw in kinds), ("nvlink", 0.0))
    cluster.memo[key] = found
    return found


# --- 2. the choice -----------------------------------------------------------------------------


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


def _log2i(n: int) -> int:
    return n.bit_length() - 1


class NvlsGraph(NamedTuple):
    """Heads of the NVLS search, and GB/s of each: what it pulls over NVLink, and what it may send on."""

    heads: int
    intra: float
    inter: float


def _nvls_graph(cluster: Cluster, graph: RingGraph) -> NvlsGraph | None:
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
    limit = min(_nvlink_bytes_per_s(cluster, graph) / GB / (heads + 1), nic)
    intra = next((speed for speed in speeds if speed <= limit + 1e-6), 0.0)
    if not intra or heads < 2:
        return None
    faster = [speed for speed in reversed(speeds) if intra <= speed <= nic + 1e-6]
    return NvlsGraph(heads, intra, next((speed for speed in faster if speed >= 2 * intra), faster[-1]))


def _nvlink_bytes_per_s(cluster: Cluster, graph: RingGraph) -> float:
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
    latency = BASE_LATENCY_US["tree"][p] + 2 * (inside + _log2i(shape.num_nodes) * shape.inter_latency("tree", p))
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
        latency += 2 * _log2i(shape.num_nodes) * shape.inter_latency("nvls_tree", simple)
        return Candidate("nvls_tree", "Simple", latency, bw * n / _num_steps(kind, n))
    return None


def _pat(shape: Shape) -> Candidate:
    """Parallel aggregated trees: all-gather and reduce-scatter with one GPU a node."""
    simple = PROTOCOLS.index("Simple")
    latency = BASE_LATENCY_US["pat"][simple] + _log2i(shape.num_nodes) * shape.inter_latency("pat", simple) / 3.5
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
    nvls = _nvls_graph(cluster, graph)
    if nvls is not None:
        found.append(_nvls(shape, kind, nvls))
    if cluster.sharp and shape.num_nodes > 1:
        from sim.cost import collnet

        found += collnet.candidates(cluster, graph, shape, kind, nvls)
    return tuple(c for c in found if c is not None and cluster.spec.nccl >= SINCE.get(c.algorithm, (2, 0)))


def _at_size(cluster: Cluster, graph: RingGraph, kind: str, tensor_bytes: int, candidate: Candidate) -> Candidate:
    """Return a candidate with what depends on the size of the message: nccl ncclTopoGetAlgoTime."""
    algorithm, protocol, latency, bw = candidate
    generation = generation_of(cluster)
    size_class = _log2i(tensor_bytes >> 6) if tensor_bytes >= 64 else -1
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


def _sms(cluster: Cluster, graph: RingGraph, choice: Choice, tensor_bytes: int) -> int:
    """Return the SMs taken: one for each channel; channels are dropped while a message is too small for their threads.

    Source: nccl src/enqueue.cc, topoGetAlgoInfo.
    """
    if choice.algorithm in ("nvls", "nvls_tree"):
        return nvls_channels(cluster, graph.num_nodes)
    if choice.algorithm == "pat":  # its threads are never set, so no message is too small for them
        return graph.compute_channels
    if choice.algorithm in OVER_SHARP:
        from sim.cost import collnet

        return collnet.channels(cluster, graph, choice, tensor_bytes)
    threads = MAX_THREADS[choice.protocol]
    if choice.algorithm == "ring" and choice.protocol == "Simple" and graph.channels * graph.channel_bw <= 12.0:
        threads = 256
    threshold = THREAD_THRESHOLD[choice.protocol]
    if choice.algorithm == "ring" and choice.protocol == "LL":
        threshold *= graph.num_ranks
    return max(1, min(graph.compute_channels, tensor_bytes // (threads * threshold)))


# --- 3. the traffic ----------------------------------------------------------------------------

Loads = dict[int, float]


def add_load(loads: Loads, base: int, links: Iterable[int], num_bytes: float) -> None:
    """Add bytes to each of these links, numbered from ``base``."""
    for link in links:
        loads[base + link] = loads.get(base + link, 0.0) + num_bytes


def _ring_loads(cluster: Cluster, graph: RingGraph, hop_bytes: float, loads: Loads, kind: str, root: int) -> None:
    """Add a ring's bytes: every hop carries ``hop_bytes``, split over the rings. A chain leaves out the hop that would
    close the circle at the root."""
    stride = cluster.links_per_domain
    nodes, patterns = graph.nodes, graph.patterns
    for (node, _), pattern in zip(nodes, patterns, strict=True):
        base = node * stride
        for link, share in pattern.loads:
            loads[base + link] = loads.get(base + link, 0.0) + hop_bytes * share
    if len(nodes) > 1:
        each = hop_bytes / len(patterns[0].rails)
        for i, (node, _) in enumerate(nodes):
            j = (i + 1) % len(nodes)
            for rail, to_rail in zip(patterns[i].out_rails, patterns[j].rails, strict=True):
                add_load(loads, 0, cluster.fabric(node, rail, nodes[j][0], to_rail), each)
    if kind in ("broadcast", "reduce"):
        each = -hop_bytes / len(patterns[0].orders)
        at = next(i for i, (node, _) in enumerate(nodes) if node == cluster.domain_of(root))
        local = cluster.local_index(root)
        for r, order in enumerate(patterns[at].orders):
            place = order.index(local) + (0 if kind == "broadcast" else 1)
            if 0 < place < len(order):
                add_load(loads, nodes[at][0] * stride, cluster.local_route(order[place - 1], order[place]).links, each)
            elif len(nodes) == 1:
                add_load(loads, nodes[at][0] * stride, cluster.local_route(order[-1], order[0]).links, each)
            else:
                before = (at - 1) % len(nodes) if place == 0 else at
                _between(cluster, graph, before, (before + 1) % len(nodes), r, each, loads)


def _between(cluster: Cluster, graph: RingGraph, i: int, j: int, ring: int, num_bytes: float, loads: Loads) -> None:
    """Add bytes from the last GPU of ring ``ring`` on the group's i-th node to the first on its j-th."""
    stride = cluster.links_per_domain
    source, target = graph.patterns[i], graph.patterns[j]
    out = cluster.local_nic_route(source.orders[ring][-1], source.out_rails[ring], True, graph.nodes[i][1])
    into = cluster.local_nic_route(target.orders[ring][0], target.rails[ring], False, graph.nodes[j][1])
    add_load(loads, graph.nodes[i][0] * stride, out.links, num_bytes)
    fabric = cluster.fabric(graph.nodes[i][0], source.out_rails[ring], graph.nodes[j][0], target.rails[ring])
    add_load(loads, 0, fabric, num_bytes)
    add_load(loads, graph.nodes[j][0] * stride, into.links, num_bytes)


def _tree_between(cluster: Cluster, graph: RingGraph, tensor_bytes: float, loads: Loads) -> None:
    """Add a double binary tree between the nodes, for each rail: half of its share goes up and down each tree.

    Both ends are the GPU beside the NIC (the first of the ring).
    """
    stride = cluster.links_per_domain
    rings = len(graph.patterns[0].rails)
    each = tensor_bytes / rings / 2
    for parents in collective.double_binary_tree(graph.num_nodes):
        for child, parent in enumerate(parents):
            if parent < 0:
                continue
            for i, j in ((child, parent), (parent, child)):
                a, b = graph.patterns[i], graph.patterns[j]
                for r in range(rings):
                    out = cluster.local_nic_route(a.orders[r][0], a.rails[r], outward=True)
                    into = cluster.local_nic_route(b.orders[r][0], b.rails[r], outward=False)
                    add_load(loads, graph.nodes[i][0] * stride, out.links, each)
                    add_load(
                        loads, 0, cluster.fabric(graph.nodes[i][0], a.rails[r], graph.nodes[j][0], b.rails[r]), each
                    )
                    add_load(loads, graph.nodes[j][0] * stride, into.links, each)


def _tree_loads(cluster: Cluster, graph: RingGraph, tensor_bytes: float, loads: Loads) -> None:
    """Add a tree: within a node a chain that ends at the GPU beside the NIC, up and down; trees between nodes."""
    for (node, _), pattern in zip(graph.nodes, graph.patterns, strict=True):
        each = tensor_bytes / len(pattern.orders)
        for order in pattern.orders:
            for a, b in pairwise(order):
                add_load(loads, node * cluster.links_per_domain, cluster.local_route(a, b).links, each)
                add_load(loads, node * cluster.links_per_domain, cluster.local_route(b, a).links, each)
    if graph.num_nodes > 1:
        _tree_between(cluster, graph, tensor_bytes, loads)


def _nvls_loads(cluster: Cluster, graph: RingGraph, kind: str, tensor_bytes: float, loads: Loads) -> None:
    """Add NVLS: in each node its switches reduce and multicast, between nodes the heads' parts go along trees."""
    nvls_inside(cluster, graph, kind, tensor_bytes, loads)
    if graph.num_nodes > 1:
        _tree_between(cluster, graph, tensor_bytes, loads)


def nvls_inside(cluster: Cluster, graph: RingGraph, kind: str, tensor_bytes: float, loads: Loads) -> None:
    """Add what GPUs and switches exchange when switches reduce and multicast.

    Reducing: each head reads its part (S/heads), the switch fetches it from every GPU and adds: every GPU sends S and
    every head receives S/heads. Multicast: each head writes its part once, every GPU receives S.
    """
    for at, (node, gpus) in enumerate(graph.nodes):
        heads = gpus[:MAX_NVLS_HEADS] if graph.num_nodes == 1 else tuple(o[0] for o in graph.patterns[at].orders)
        base = node * cluster.links_per_domain
        for i, gpu in enumerate(gpus):
            up, down = cluster.local_route(gpu, gpus[i - 1]).links[0], cluster.local_route(gpus[i - 1], gpu).links[-1]
            part = tensor_bytes / len(heads) if gpu in heads else 0.0
            reduces, spreads = kind != "all_gather", kind != "reduce_scatter"
            add_load(loads, base, (up,), tensor_bytes * reduces + part * spreads)
            add_load(loads, base, (down,), part * reduces + tensor_bytes * spreads)


def _pat_loads(cluster: Cluster, graph: RingGraph, tensor_bytes: float, loads: Loads) -> None:
    """Add parallel aggregated trees: rank i exchanges with ranks at distances 1, 2, 4, ..., most with the nearest.

    Each rank's part runs down a binomial tree: what is s ranks ahead of its own came over a distance of s's lowest set
    bit, so a distance d is that of every odd multiple of d below n. Every rank sends (n-1)/n S in all. Source: nccl
    src/include/collectives.h, PatAGAlgorithm (``sendDim = firstBitSet(s)``); Jeaugey, "PAT: a new algorithm for
    all-gather and reduce-scatter operations at scale", arXiv:2506.20252.
    """
    n = graph.num_nodes
    distance = 1
    while distance < n:
        each = ((n - 1) // distance + 1) // 2 * tensor_bytes / n / len(graph.patterns[0].rails)
        for i in range(n):
            for ring in range(len(graph.patterns[0].rails)):
                _between(cluster, graph, i, (i + distance) % n, ring, each, loads)
        distance *= 2


def _all_to_all_loads(cluster: Cluster, group: Sequence[int], tensor_bytes: float, loads: Loads) -> None:
    """Add S/n between every two ranks of a group, straight (the routes of ``Cluster.route``).

    Counted by what routes share, not pair by pair: what a GPU sends by one rail, what it receives, and what goes from
    a NIC of one domain to a NIC of another.
    """
    stride = cluster.links_per_domain
    each = tensor_bytes / len(group)
    domains = _by_node(cluster, group)
    for domain, gpus in domains:
        for a, b in permutations(gpus, 2):
            add_load(loads, domain * stride, cluster.local_route(a, b).links, each)
    if len(domains) == 1:
        return
    rails = [Counter(cluster.rail_of(gpu) for gpu in gpus) for _, gpus in domains]
    on_rail = sum(rails, Counter())
    for (domain, gpus), own in zip(domains, rails, strict=True):
        senders: Counter[tuple[int, int]] = Counter()
        for (rail, num), gpu in product(sorted(on_rail.items()), gpus):
            out_rail = cluster.rail_out(gpu, rail)
            senders[out_rail, rail] += 1
            out = cluster.local_nic_route(gpu, out_rail, outward=True)
            add_load(loads, domain * stride, out.links, (num - own[rail]) * each)
        for ((out_rail, rail), num), ((to_domain, _), theirs) in product(
            senders.items(), zip(domains, rails, strict=True)
        ):
            if to_domain != domain:
                add_load(loads, 0, cluster.fabric(domain, out_rail, to_domain, rail), num * theirs[rail] * each)
        for gpu in gpus:
            into = cluster.local_nic_route(gpu, cluster.rail_of(gpu), outward=False)
            add_load(loads, domain * stride, into.links, (len(group) - len(gpus)) * each)


def _message_latency_s(cluster: Cluster, pairs: Iterable[tuple[int, int]]) -> float:
    """Return the latency of messages that start together: NCCL's for one Simple step over the farthest of them."""
    simple = PROTOCOLS.index("Simple")
    worst = 0.0
    for source, target in pairs:
        if cluster.domain_of(source) != cluster.domain_of(target):
            hw = "net"
        else:
            route = cluster.local_route(cluster.local_index(source), cluster.local_index(target))
            hw = "nvlink" if route.kind in ("NVL", "NVB") else "pci"
        worst = max(worst, HW_LATENCY_US[hw]["ring"][simple])
        if hw == "net":
            break
    return (BASE_LATENCY_US["ring"][simple] + worst) * US


def _path_hw(cluster: Cluster, route: Route) -> str:
    """Return what a route inside a node is: ``nvlink``, ``pci`` (peer access) or ``shm`` (through host memory)."""
    if route.kind in ("NVL", "NVB"):
        return "nvlink"
    return "shm" if any(cluster.link(link).kind == "memory" for link in route.links) else "pci"


def p2p_limit(cluster: Cluster, num_ranks: int, spans: bool) -> int:
    """Return the channels that all messages of a communicator share: those of its rings, up to a power of two.

    The rings are taken to be those of a communicator that fills its nodes as evenly as its size says. Source:
    src/graph/paths.cc, ncclTopoComputeP2pChannels.
    """
    key = ("p2p limit", num_ranks, spans)
    known: int | None = cluster.memo.get(key)
    if known is None:
        if not spans:
            group = tuple(range(min(max(num_ranks, 2), cluster.gpus_per_domain)))
        else:
            nodes = min(cluster.num_domains, num_ranks)
            each = min(max(num_ranks // nodes, 1), cluster.gpus_per_domain)
            group = tuple(d * cluster.gpus_per_domain + g for d in range(min(nodes, 2)) for g in range(each))
        channels = ring_graph(cluster, group).compute_channels if len(group) > 1 else 1
        known = cluster.memo[key] = 1 << (channels - 1).bit_length()
    return known


def _net_channels(cluster: Cluster, num_ranks: int, limit: int) -> int:
    """Return the channels of a message to another node, by NCCL's version.

    One; from 2.12 on two (NCCL_NCHANNELS_PER_NET_PEER), while those of all ranks are no more than four times what
    there are (until 2.17, and again from 2.22 on); from 2.29 on by the NIC's speed. Source: src/graph/paths.cc,
    ncclTopoGetNchannels, and src/enqueue.cc, scheduleP2pTasksToPlan, of the tags.
    """
    version = cluster.spec.nccl
    if version >= (2, 29):
        most = -int(-cluster.nic_line_bytes_per_s // (P2P_CHANNEL_NET_BW * GB))
        return 1 << (max(most, 2) - 1).bit_length()
    if version < (2, 12) or (not (2, 18) <= version < (2, 22) and 2 * num_ranks > 4 * limit):
        return 1
    return 2


def p2p_channels(cluster: Cluster, num_ranks: int, num_messages: int, num_bytes: float, spans: bool) -> int:
    """Return the channels of one of ``num_messages`` messages that a rank of a communicator sends together.

    By the NVLinks of the path, by the speed of the NIC, or 2; over the network fewer where all ranks' messages would
    not fit into one round of batches. Small messages take few; inside a node they take more as parts exceed 32 chunks.
    Source: src/graph/paths.cc, ncclTopoGetNchannels, ncclTopoComputeP2pChannels; src/enqueue.cc,
    scheduleP2pTasksToPlan, addP2pToPlan.
    """
    limit = p2p_limit(cluster, num_ranks, spans)
    if spans:
        most = _net_channels(cluster, num_ranks, limit)
        if cluster.spec.network is not None and cluster.spec.network.channels_per_peer:
            most = cluster.spec.network.channels_per_peer
        while cluster.spec.nccl >= (2, 29) and most * -(-num_ranks // P2P_PER_BATCH) > limit and most > 1:
            most //= 2
        return max(1, min(most, int(-(-num_bytes // (nccl_time.P2P_CHUNK["net"] // 2)))))
    route = cluster.local_route(0, 1)
    fast = route.kind in ("NVL", "NVB")
    wires = min(cluster.node.wires[link].count for link in route.links) if fast else 1
    most = min(1 << (2 * wires - 1).bit_length(), limit)
    least = most
    while cluster.spec.nccl < (2, 23) and most * num_ranks > 4 * limit and most > 1:
        most //= 2
    while least * num_ranks > limit and least > 1:
        least //= 2
    chunk = nccl_time.P2P_CHUNK["nvlink" if fast else "pci"]
    channels = max(1, min(least, int(-(-num_bytes // (chunk // 8)))))
    while num_bytes / channels > 32 * chunk and channels <= most // 2:
        channels *= 2
    return channels


def _phase(
    latency_s: float, loads: Loads, group_s: float, stream_bytes: float = 0.0, max_bytes_per_s: float = 0.0
) -> Phase:
    entries = tuple([(link, loads[link]) for link in sorted(loads) if loads[link] > 0])
    return Phase(latency_s, entries, stream_bytes, max_bytes_per_s, group_s)


def _links_s(cluster: Cluster, loads: Loads) -> float:
    """Return the time that the links need for these loads, with nothing else on them."""
    return max([num_bytes / cluster.bytes_per_s(link) for link, num_bytes in loads.items()], default=0.0)


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
        return _plan_shift(cluster, groups, tensor_bytes)
    if kind == "all_to_all":
        return _plan_all_to_all(cluster, groups, tensor_bytes, wire_bytes)
    if kind == "barrier":
        kind, tensor_bytes = "all_reduce", max(tensor_bytes, 4)
    graphs = [ring_graph(cluster, tuple(group)) for group in groups]
    choice = choose(cluster, graphs[0], kind, tensor_bytes)
    volume = tensor_bytes * WIRE_OVERHEAD[choice.protocol]
    group_s = 0.0
    for graph, group in zip(graphs, groups, strict=True):
        if choice.algorithm == "ring":
            _ring_loads(cluster, graph, collective.ring_hop_bytes(kind, n, volume), loads, kind, group[0])
        elif choice.algorithm == "tree":
            _tree_loads(cluster, graph, volume, loads)
        elif choice.algorithm == "pat":
            _pat_loads(cluster, graph, volume, loads)
        elif choice.algorithm in OVER_SHARP:
            from sim.cost import collnet

            collnet.add_loads(cluster, graph, choice.algorithm, kind, volume, loads)
        else:
            _nvls_loads(cluster, graph, kind, volume, loads)
        group_s = group_s or _links_s(cluster, loads)
    sms = _sms(cluster, graphs[0], choice, tensor_bytes)
    latency_s, flow_s = _kernel_s(cluster, graphs[0], choice, kind, tensor_bytes, sms)
    if graphs[0].num_nodes > 1:
        if choice.algorithm in OVER_SHARP:
            from sim.cost import collnet

            flow_s = max(flow_s, collnet.inside_s(cluster, graphs[0], choice.algorithm, kind, volume))
        hop_bytes = volume if choice.algorithm == "tree" else collective.ring_hop_bytes(kind, n, volume)
        flow_s = max(flow_s, _connections_s(cluster, hop_bytes, sms))
    cap = tensor_bytes / flow_s if flow_s > 0 else 0.0
    phase = _phase(latency_s, loads, group_s, float(tensor_bytes) if cap else 0.0, cap)
    return Traffic(choice.name, (phase,), wire_bytes, sms)


def _connections_s(cluster: Cluster, num_bytes: float, channels: int) -> float:
    """Return the time that connections from one node to the next need for these bytes: each channel has one.

    0 where a connection carries what its NIC does. Source: nccl src/transport/net.cc, src/transport/net_ib
    (NCCL_IB_QPS_PER_CONNECTION is 1).
    """
    network = cluster.spec.network
    rate = network.connection_bytes_per_s if network is not None else 0.0
    return num_bytes / (channels * rate) if rate else 0.0


def _measured(cluster: Cluster, name: str, hw: str) -> Coefficients | None:
    """Return the measured coefficients of an algorithm over ``hw`` for this GPU, if there are any."""
    key = ("measured", name, hw)
    if key not in cluster.memo:
        found = nccl_time.measured_by(cluster.spec.gpu, name, hw)
        cluster.memo[key] = found[1] if found else None
    coefficients: Coefficients | None = cluster.memo[key]
    return coefficients


def nvls_channels(cluster: Cluster, num_nodes: int) -> int:
    """Return the channels of NVLS: src/transport/nvls.cc, ncclNvlsTuning."""
    return NVLS_CHANNELS.get(generation_of(cluster), (16, 16))[num_nodes > 1]


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
    found = nccl_time.measured_by(gpu, "ring/Simple", graph.hw)
    own = source_of(gpu)
    if found is None or (own.same and found[0] == own.name):
        return ""
    return f"collectives on {gpu.name}: times of NCCL's kernels assumed to be those of {found[0]}"


def kernel_work(
    cluster: Cluster, graph: RingGraph, name: str, kind: str, tensor_bytes: int, channels: int
) -> tuple[str, Work]:
    """Return (``hw``, work) of a collective: what its measured coefficients are multiplied with."""
    hw = "net" if graph.num_nodes > 1 else graph.hw
    wires, part, heads = graph.local_bytes_per_s, 0.0, 0
    if name.startswith("nvls"):
        wires = _nvlink_bytes_per_s(cluster, graph)
        heads = min(len(graph.nodes[0][1]), MAX_NVLS_HEADS)
        part = nccl_time.nvls_round_bytes(tensor_bytes, channels, heads)
    return hw, Work(kind, graph.num_ranks, graph.num_nodes, tensor_bytes, channels, wires, part, heads)


def _kernel_s(
    cluster: Cluster, graph: RingGraph, choice: Choice, kind: str, tensor_bytes: int, channels: int
) -> tuple[float, float]:
    """Return (latency, time of the bytes on idle wires).

    What was never measured takes as long as NCCL itself expects.
    """
    hw, work = kernel_work(cluster, graph, choice.name, kind, tensor_bytes, channels)
    coefficients = _measured(cluster, choice.name, hw)
    if coefficients is None:
        return choice.latency_s, tensor_bytes / choice.algorithm_bw
    latency_s, flow_s = nccl_time.split(choice.name, coefficients, nccl_time.terms(choice.name, hw, work))
    if kind in ("broadcast", "reduce") and choice.algorithm == "ring":
        # The coefficients are those of rings; a chain's steps cost what NCCL expects of them.
        base_s = BASE_LATENCY_US["ring"][PROTOCOLS.index(choice.protocol)] * US
        latency_s = coefficients[0] + choice.latency_s - base_s
    if choice.algorithm == "nvls":
        rounds = tensor_bytes / work.part
        round_s = (latency_s + flow_s) / (rounds + 2)
        limit = _nvls_bytes_per_s(cluster, graph, kind)
        latency_s, flow_s = 2 * round_s, max(rounds * round_s, tensor_bytes / limit)
    return latency_s, flow_s


def _nvls_bytes_per_s(cluster: Cluster, graph: RingGraph, kind: str) -> float:
    """Return the algorithm bandwidth that NVLS can reach on one node: NVLinks at NVLS's efficiency carry S + S/heads
    each way. NCCL's own figure is for choosing only; it takes no account of how reads and multicasts share the links.
    """
    heads = min(len(graph.nodes[0][1]), MAX_NVLS_HEADS)
    per_byte = 1 + 1 / heads if kind == "all_reduce" else 1.0
    return NVLS_EFFICIENCY[generation_of(cluster)] * _nvlink_bytes_per_s(cluster, graph) / per_byte


SHIFT_S = 5e-6
"""Time of a copy between GPUs beside its bytes and wires: assumed. The copy engine starts after 2 to 3 us (what the
matrix of latencies of cuda-samples' p2pBandwidthLatencyTest has on A100 and H100), a kernel sets the flag that the
other rank waits for."""


SHIFT_SMS = 1
"""A block that sets flags and waits for them: ``num_sm`` of a ring exchange in Transformer Engine's initialize_ub."""


def _plan_shift(cluster: Cluster, groups: Sequence[tuple[int, ...]], tensor_bytes: int) -> Traffic:
    """Return the traffic of copies of ``tensor_bytes`` from every rank of a group to the next, by the copy engines."""
    loads: Loads = {}
    latency_s = group_s = 0.0
    for group in groups:
        for source, target in zip(group, (*group[1:], group[0]), strict=True):
            route = cluster.route(source, target)
            latency_s = max(latency_s, route.latency_s)
            for link in route.links:
                loads[link] = loads.get(link, 0.0) + tensor_bytes
        group_s = group_s or _links_s(cluster, loads)
    return Traffic("copy", (_phase(SHIFT_S + latency_s, loads, group_s),), tensor_bytes, SHIFT_SMS)


def _plan_all_to_all(
    cluster: Cluster, groups: Sequence[tuple[int, ...]], tensor_bytes: int, wire_bytes: int
) -> Traffic:
    """Return the traffic of an all-to-all: messages of S/n between all, in batches (see :func:`p2p_channels`)."""
    loads: Loads = {}
    group, n = groups[0], len(groups[0])
    group_s = nics_s = 0.0
    for members in groups:
        _all_to_all_loads(cluster, members, tensor_bytes, loads)
        group_s = group_s or _links_s(cluster, loads)
        nics_s = nics_s or max((b / cluster.bytes_per_s(i) for i, b in loads.items() if cluster.is_nic(i)), default=0.0)
    channels = p2p_channels(cluster, n, n, tensor_bytes / n, nics_s > 0)
    sms = min(channels * n, p2p_limit(cluster, n, nics_s > 0))
    if nics_s > 0:
        latency_s = _message_latency_s(cluster, [(group[0], group[-1])]) + -(-n // P2P_PER_BATCH) * P2P_NET_BATCH_S
        flow_s = max(group_s, nics_s / P2P_NET_SHARE)
    else:
        latency_s, flow_s = _messages_s(cluster, group, n, tensor_bytes, channels, group_s)
    cap = tensor_bytes / flow_s if flow_s > 0 else 0.0
    return Traffic("pairwise/Simple", (_phase(latency_s, loads, group_s, float(tensor_bytes), cap),), wire_bytes, sms)


def message_work(cluster: Cluster, group: Sequence[int], tensor_bytes: float, channels: int) -> tuple[str, Work]:
    """Return (``hw``, work) of an all-to-all of a group inside one node."""
    n = len(group)
    routes = [cluster.local_route(cluster.local_index(group[0]), cluster.local_index(other)) for other in group[1:]]
    hw = max((_path_hw(cluster, route) for route in routes), key=("nvlink", "pci", "shm").index)
    ports = {route.links[0] for route in routes}
    wires = sum(cluster.library_bytes_per_s(port) for port in sorted(ports))
    return hw, Work("all_to_all", n, 1, tensor_bytes, channels, wires, tensor_bytes / n / channels)


def _messages_s(
    cluster: Cluster, group: Sequence[int], n: int, tensor_bytes: int, channels: int, links_s: float
) -> tuple[float, float]:
    """Return (latency, time of the bytes) of an all-to-all inside one node."""
    hw, work = message_work(cluster, group, tensor_bytes, channels)
    coefficients = _measured(cluster, "p2p", hw)
    if coefficients is None:
        return _message_latency_s(cluster, [(group[0], other) for other in group[1:]]), links_s
    latency_s, flow_s = nccl_time.split("p2p", coefficients, nccl_time.terms("p2p", hw, work))
    return latency_s, flow_s


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
        group_s = group_s or _links_s(cluster, loads)
    source, target = moving[0]
    crosses = any(cluster.domain_of(a) != cluster.domain_of(b) for a, b in moving)
    channels = p2p_channels(cluster, max(num_ranks, 2), 1, tensor_bytes, spans or crosses)
    latency_s = _message_latency_s(cluster, moving)
    rate = P2P_LOCAL_CHANNEL_BYTES_PER_S * channels
    if crosses:
        rate = 1 / (1 / (channels * P2P_NET_CHANNEL_BYTES_PER_S) + 1 / P2P_NET_PROXY_BYTES_PER_S)
        if connections_s := _connections_s(cluster, tensor_bytes, channels):
            rate = min(rate, tensor_bytes / connections_s)
        if cluster.domain_of(source) == cluster.domain_of(target):
            source, target = next((a, b) for a, b in moving if cluster.domain_of(a) != cluster.domain_of(b))
    else:
        route = cluster.local_route(cluster.local_index(source), cluster.local_index(target))
        hw = _path_hw(cluster, route)
        coefficients = _measured(cluster, "p2p", hw)
        if coefficients is not None:
            start, peer, simple, _, _, chunk = coefficients
            ring = _measured(cluster, "ring/Simple", hw)
            share = 1 / ring[3] if ring is not None and ring[3] else 1.0
            part = tensor_bytes / channels
            latency_s = start + peer + chunk * min(part, nccl_time.P2P_CHUNK["net" if spans else hw])
            latency_s += simple if part > nccl_time.P2P_LL_BYTES else 0.0
            rate = min(rate, min(cluster.library_bytes_per_s(link) for link in route.links) * share)
    phase = _phase(latency_s, loads, group_s, float(tensor_bytes), rate)
    return Traffic("direct/Simple", (phase,), tensor_bytes, channels)


def plan_copy(cluster: Cluster, gpus: Sequence[int], direction: str, num_bytes: int) -> Traffic:
    """Return the traffic of a ``host_to_device`` or ``device_to_host`` copy of ``num_bytes`` on each GPU, together.

    The copy engines move pinned memory of the GPU's own socket; GPUs behind one switch or socket share its wires.
    """
    loads: Loads = {}
    latency_s = group_s = 0.0
    for gpu in gpus:
        route = cluster.host_route(gpu, direction)
        latency_s = max(latency_s, route.latency_s)
        for link in route.links:
            loads[link] = loads.get(link, 0.0) + num_bytes
        group_s = group_s or _links_s(cluster, loads)
    return Traffic("copy", (_phase(latency_s, loads, group_s),), num_bytes)
