"""Paths inside one node: who reaches whom over which wires, and what NCCL calls such a path.

Everything here is about one node, by index: devices and directed links of a :class:`NodeGraph`. All nodes of a
cluster are alike, so ``topology`` works these paths out once and shifts link indices by arithmetic.

Ties are broken in this order: fewest links, then the widest narrowest link, then the smallest device indices.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

PathKind = Literal["LOC", "NVL", "NVB", "C2C", "PIX", "PXB", "P2C", "PXN", "PHB", "SYS", "NET"]
PATH_KINDS: tuple[PathKind, ...] = ("LOC", "NVL", "NVB", "C2C", "PIX", "PXB", "P2C", "PXN", "PHB", "SYS", "NET")
"""NCCL's path types, best first (nccl: src/include/graph.h, PATH_*)."""
_RANK: dict[PathKind, int] = {kind: i for i, kind in enumerate(PATH_KINDS)}

SCALE_UP = ("nvlink", "xgmi")
"""Kinds of wires that GPUs have among themselves."""


@dataclass(frozen=True, slots=True)
class Device:
    """Something that wires end in: ``gpu``, ``nvswitch``, ``pcie-switch``, ``cpu`` (a socket) or ``nic``."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Wire:
    """One direction between two devices: ``count`` equal wires together, rates of all of them.

    ``bytes_per_s`` is the most that was seen to get through, ``library_bytes_per_s`` what NCCL takes it for.
    """

    source: int
    target: int
    kind: str
    count: int
    bytes_per_s: float
    latency_s: float
    library_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Route:
    """Links that a transfer crosses, in order (twice where it passes twice), and the sum of their latencies.

    ``kind`` is NCCL's path type. For routes inside a :class:`NodeGraph` the indices are local to the node.
    """

    links: tuple[int, ...]
    latency_s: float
    kind: PathKind


@dataclass(frozen=True)
class NodeGraph:
    """One node: devices, directed wires, and the memory of each socket.

    ``wires[i]`` for even i is one direction and ``wires[i + 1]`` the other. ``memory`` maps a socket (device index)
    to its link, whose one capacity reads and writes share; memory links come after the wires.
    """

    devices: tuple[Device, ...]
    wires: tuple[Wire, ...]
    memory: dict[int, int]
    gpus: tuple[int, ...]
    nics: tuple[int, ...]
    gpu_peer_to_peer: bool
    p2p_across_sockets: bool
    """NCCL lets two GPUs of a machine with AMD processors use peer access however far apart they are."""

    out: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    """Wires that leave each device."""
    _found: dict[tuple[int, bool], dict[int, tuple[int, ...]]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        out: list[list[int]] = [[] for _ in self.devices]
        for index, wire in enumerate(self.wires):
            out[wire.source].append(index)
        object.__setattr__(self, "out", tuple(map(tuple, out)))


def worse(a: PathKind, b: PathKind) -> bool:
    """Whether path type ``a`` is farther than ``b``."""
    return _RANK[a] > _RANK[b]


def search(node: NodeGraph, source: int, scale_up: bool) -> dict[int, tuple[int, ...]]:
    """Return the best path (wire indices) from a device to every other that can be reached.

    With ``scale_up`` only over NVLink and its switches; else only over the rest (PCIe, sockets, C2C). Nothing passes
    through a GPU or a NIC. Breadth first; see the order of ties above.
    """
    known = node._found.get((source, scale_up))
    if known is not None:
        return known
    best: dict[int, tuple[float, tuple[int, ...], tuple[int, ...]]] = {source: (float("inf"), (), ())}
    frontier = [source]
    while frontier:
        found: dict[int, tuple[float, tuple[int, ...], tuple[int, ...]]] = {}
        for device in frontier:
            if device != source and node.devices[device].kind in ("gpu", "nic"):
                continue
            width, via, path = best[device]
            for index in node.out[device]:
                wire = node.wires[index]
                if wire.target in best or (wire.kind in SCALE_UP) != scale_up:
                    continue
                reached = (min(width, wire.bytes_per_s), (*via, wire.target), (*path, index))
                old = found.get(wire.target)
                if old is None or reached[0] > old[0] or (reached[0] == old[0] and reached[1] < old[1]):
                    found[wire.target] = reached
        best.update(found)
        frontier = sorted(found)
    paths = {device: path for device, (_, _, path) in best.items()}
    node._found[source, scale_up] = paths
    return paths


def path_kind(node: NodeGraph, path: tuple[int, ...]) -> PathKind:
    """Return NCCL's type of a path that uses no NVLink (nccl: src/graph/paths.cc, ncclTopoSetPaths).

    One PCIe switch: PIX. Two switches in a row: PXB. A socket: PHB, or P2C where the GPU hangs on it by C2C.
    Two sockets: SYS. A GPU and its own socket by C2C: C2C.
    """
    if not path:
        return "LOC"
    wires = [node.wires[i] for i in path]
    if any(w.kind in SCALE_UP for w in wires):
        return "NVL"
    kinds = [node.devices[wires[0].source].kind, *(node.devices[w.target].kind for w in wires)]
    if any(a == "cpu" and b == "cpu" for a, b in itertools.pairwise(kinds)):
        return "SYS"
    if "cpu" in kinds:
        by_c2c = [w.kind == "c2c" for w in wires]
        return "C2C" if all(by_c2c) else "P2C" if any(by_c2c) else "PHB"
    return "PXB" if any(a == b == "pcie-switch" for a, b in itertools.pairwise(kinds)) else "PIX"


def _route(node: NodeGraph, path: tuple[int, ...], kind: PathKind) -> Route:
    return Route(path, sum(node.wires[i].latency_s for i in path), kind)


def _bounce(node: NodeGraph, socket: int, to_socket: tuple[int, ...], onward: tuple[int, ...], kind: PathKind) -> Route:
    """A transfer that is written to a socket's memory and read from there: both cross its memory link."""
    memory = node.memory[socket]
    latency_s = sum(node.wires[i].latency_s for i in (*to_socket, *onward))
    return Route((*to_socket, memory, memory, *onward), latency_s, kind)


def socket_of(node: NodeGraph, device: int) -> int:
    """Return the socket nearest to a device (a device index)."""
    paths = search(node, device, scale_up=False)
    reached = [d for d in node.memory if d in paths]
    assert reached, f"{node.devices[device].name} reaches no socket"
    return min(reached, key=lambda d: (len(paths[d]), d))


def host_route(node: NodeGraph, gpu: int, to_gpu: bool) -> Route:
    """Return the route between a GPU and the memory of its socket."""
    socket = socket_of(node, gpu)
    source, target = (socket, gpu) if to_gpu else (gpu, socket)
    path = search(node, source, scale_up=False)[target]
    kind = path_kind(node, path)
    latency_s = sum(node.wires[i].latency_s for i in path)
    links = (node.memory[socket], *path) if to_gpu else (*path, node.memory[socket])
    return Route(links, latency_s, kind)


def gpu_route(node: NodeGraph, source: int, target: int) -> Route:
    """Return the route that NCCL takes between two GPUs of a node.

    NVLink, directly or through switches (NVL) or through one other GPU (NVB); else PCIe with peer access where the
    path is at most PXB; else through the memory of the receiver's socket, written by one GPU and read by the other.
    Source: nccl src/graph/paths.cc (ncclTopoCheckP2p, ncclTopoComputePaths), src/transport/shm.cc (the buffer
    is the receiver's).
    """
    if source == target:
        return Route((), 0.0, "LOC")
    fast = search(node, source, scale_up=True)
    if target in fast:
        return _route(node, fast[target], "NVL")
    between = [
        (-min(node.wires[i].bytes_per_s for i in (*fast[gpu], *onward)), gpu, (*fast[gpu], *onward))
        for gpu in node.gpus
        if gpu in fast and gpu != source and (onward := search(node, gpu, scale_up=True).get(target))
    ]
    if between:
        return _route(node, min(between)[2], "NVB")
    paths = search(node, source, scale_up=False)
    kind = path_kind(node, paths[target]) if target in paths else "SYS"
    near = not worse(kind, "PXB") or node.p2p_across_sockets
    if node.gpu_peer_to_peer and near and target in paths:
        return _route(node, paths[target], kind)
    socket = socket_of(node, target)
    onward = search(node, socket, scale_up=False)[target]
    return _bounce(node, socket, paths[socket], onward, kind if worse(kind, "PXN") else "PHB")


def nic_route(
    node: NodeGraph,
    gpu: int,
    nic: int,
    to_nic: bool,
    gpudirect: bool,
    users: tuple[int, ...] = (),
    relays: tuple[int, ...] | None = None,
) -> Route:
    """Return the route between a GPU and a NIC of its node.

    The NIC reads and writes GPU memory where the path is at most PXB (P2C where the GPU is on C2C); else a GPU
    that has NVLink to this one and is that near to the NIC relays (PXN), one of the ``users`` of that NIC before
    others and of ``relays`` only, if these are given; else the data stops in the memory of the GPU's socket. Without
    GPUDirect it always does. Source: nccl src/graph/paths.cc (ncclTopoCheckGdr, ncclTopoComputePaths),
    src/graph/topo.cc (ncclTopoGetLocalGpu).
    """
    down = search(node, gpu, scale_up=False)
    kind = path_kind(node, down[nic]) if nic in down else "SYS"
    if gpudirect and not worse(kind, "P2C"):
        return _route(node, down[nic] if to_nic else search(node, nic, scale_up=False)[gpu], kind)
    if gpudirect:
        fast = search(node, gpu, scale_up=True)
        found = []
        for relay in node.gpus if relays is None else relays:
            if relay == gpu or relay not in fast:
                continue
            path = search(node, relay, scale_up=False).get(nic)
            if path is not None and not worse(path_kind(node, path), "P2C"):
                found.append((relay not in users, len(path), relay, path))
        if found:
            *_, relay, path = min(found)
            if to_nic:
                return _route(node, (*fast[relay], *path), "PXN")
            path = search(node, nic, scale_up=False)[relay]
            return _route(node, (*path, *search(node, relay, scale_up=True)[gpu]), "PXN")
    socket = socket_of(node, gpu)
    if to_nic:
        to_socket, onward = down[socket], search(node, socket, scale_up=False)[nic]
    else:
        to_socket, onward = search(node, nic, scale_up=False)[socket], search(node, socket, scale_up=False)[gpu]
    return _bounce(node, socket, to_socket, onward, kind if worse(kind, "PXN") else "PHB")


def nearest_nics(node: NodeGraph, gpu: int) -> tuple[int, ...]:
    """Return the NICs (device indices) that are equally near to a GPU, nearest by type of path and then width.

    Source: nccl src/graph/topo.cc, ncclTopoGetLocal.
    """
    paths = search(node, gpu, scale_up=False)
    ranked = [
        (_RANK[path_kind(node, paths[nic])], -min(node.wires[i].bytes_per_s for i in paths[nic]), nic)
        for nic in node.nics
        if nic in paths
    ]
    if not ranked:
        return node.nics
    best = min(ranked)[:2]
    return tuple(nic for *rank, nic in ranked if tuple(rank) == best)
