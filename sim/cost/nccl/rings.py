"""Rings of a group over this machine, one for each NIC of a node, and how fast the search lets each channel run.

Source: nccl src/graph/search.cc, connect.cc (2.30). A *node* here is what NCCL calls one: a domain of the cluster (a
node, or the trays of one NVLink rack). Leaves out: rings that differ between channels on NVSwitch (they load the wires
alike).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import NamedTuple

from sim.cluster.routing import PATH_KINDS, SCALE_UP, PathKind, Route
from sim.cluster.topology import Cluster

VOLTA, AMPERE, HOPPER, BLACKWELL = range(4)
"""Rows of NCCL's tables."""

SPEEDS_INTRA = (
    (40.0, 30.0, 20.0, 18.0, 15.0, 12.0, 10.0, 9.0, 7.0, 6.0, 5.0, 4.0, 3.0),
    (60.0, 50.0, 40.0, 30.0, 24.0, 20.0, 15.0, 12.0, 11.0, 6.0, 3.0),
    (90.0, 80.0, 70.0, 60.0, 50.0, 45.0, 40.0, 30.0, 24.0, 20.0, 19.0, 18.0),
)
SPEEDS_INTER = (
    (48.0, 30.0, 28.0, 24.0, 20.0, 18.0, 15.0, 12.0, 10.0, 9.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.4, 1.2, 0.24, 0.12),
    (48.0, 45.0, 42.0, 40.0, 30.0, 24.0, 22.0, 20.0, 17.5, 15.0, 12.0, 6.0, 3.0, 2.4, 1.2, 0.24, 0.12),
    (
        *(96.0, 86.0, 80.0, 48.0, 45.1, 42.0, 40.0, 30.0, 24.0, 22.0),
        *(20.0, 17.5, 15.0, 12.0, 6.0, 3.0, 2.4, 1.2, 0.24, 0.12),
    ),
)
"""Speeds of a channel (GB/s) that the search tries; rows before sm90, sm90, sm100."""
SPEED_STEP = 0.2
"""A NIC sold for 25 GB/s is searched for at 24, one for 12.5 at 12 or 10: the speed found is up to a fifth below."""
MAX_CHANNELS = 64
"""MAXCHANNELS, src/include/device.h."""
MESH_SEARCH_STEPS = 20_000
"""Paths looked at before the best set of rings over a mesh so far is taken."""
SHM_BYTES_PER_S = 48e9
"""What a hop through host memory is a share of, whatever the generation of PCIe: the port of the machine on which it
was measured. Its kernels and the host's memory limit it, not the port: 24.7 GB/s over eight RTX PRO 6000 on PCIe 5,
25.9 over pairs of A100 on PCIe 4 (an all_gather_perf of Azure NC A100 v4), 28 over eight RTX 5090
(NVIDIA/nccl#1639)."""

GB = 1e9


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


def by_node(cluster: Cluster, group: Sequence[int]) -> tuple[tuple[int, tuple[int, ...]], ...]:
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
    nodes = by_node(cluster, group)
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


def path_hw(cluster: Cluster, route: Route) -> str:
    """Return what a route inside a node is: ``nvlink``, ``pci`` (peer access) or ``shm`` (through host memory)."""
    if route.kind in ("NVL", "NVB"):
        return "nvlink"
    return "shm" if any(cluster.link(link).kind == "memory" for link in route.links) else "pci"
