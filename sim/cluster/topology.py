"""The machine: nodes of one kind, the network between them, and the links that a transfer crosses.

Nodes are alike, so there is one :class:`~sim.cluster.routing.NodeGraph` and a little arithmetic, whatever their number:

    links of domain k  [k * L, (k + 1) * L)   the L of a domain: wires, then its sockets' memories, then two for each
                                              NIC (to the leaf, from the leaf)
    links of the fabric  num_domains * L and on  two for each leaf switch (to the spine, from the spine)

A *domain* is what one scale-up fabric joins, and what NCCL calls a node: a node, or the trays of an NVL72 rack.
GPU g is GPU ``g % gpus_per_domain`` of domain ``g // gpus_per_domain``. The list of devices and links is the one
source; ``Cluster.graph`` draws it as a networkx graph, ``Cluster.route`` walks it without.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from sim.catalog.schema import LinkFacts, NodeFacts
from sim.cluster import routing
from sim.cluster.routing import Device, NodeGraph, PathKind, Route, Wire
from sim.ir.traffic import Link

if TYPE_CHECKING:
    import networkx

    from sim.scenario.schema import ClusterSpec, DegradedLink


@dataclass(frozen=True, eq=False)
class Cluster:
    """GPUs, links and routes. Built by :func:`build_cluster`.

    ``node``  one domain: ``nodes_per_domain`` nodes, nearly always 1
    ``nic_bytes_per_s``  payload of one NIC device and direction (0 without a network)
    ``leaf_uplink_bytes_per_s``  capacity between one leaf switch and the spine, each direction
    """

    spec: ClusterSpec
    node: NodeGraph
    num_nodes: int
    gpus_per_node: int
    nodes_per_domain: int
    nic_bytes_per_s: float
    leaf_uplink_bytes_per_s: float
    network_latency_s: float
    rail_optimised: bool
    gpudirect: bool
    nodes_per_leaf: int
    degraded: Mapping[int, float] = field(default_factory=dict)
    """link -> factor on its capacity, where it is not as good as its like"""
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """What the cost layer has derived from this machine (patterns of rings), kept with it."""
    _routes: dict[tuple[int, ...], Route] = field(default_factory=dict, repr=False)

    # --- counting ------------------------------------------------------------------------------

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @cached_property
    def num_domains(self) -> int:
        return self.num_nodes // self.nodes_per_domain

    @cached_property
    def gpus_per_domain(self) -> int:
        return self.gpus_per_node * self.nodes_per_domain

    @cached_property
    def num_nics(self) -> int:
        """NICs of one domain that lead into the network (none on a single node without one)."""
        return len(self.node.nics) if self.nic_bytes_per_s else 0

    @cached_property
    def links_per_domain(self) -> int:
        return self._nic_base + 2 * self.num_nics

    @cached_property
    def _nic_base(self) -> int:
        return len(self.node.wires) + len(self.node.memory)

    @cached_property
    def num_leaves(self) -> int:
        if not self.num_nics:
            return 0
        groups = -(-self.num_nodes // self.nodes_per_leaf)
        return groups * (self.num_nics // self.nodes_per_domain if self.rail_optimised else 1)

    @property
    def num_links(self) -> int:
        return self.num_domains * self.links_per_domain + 2 * self.num_leaves

    @property
    def relays(self) -> bool:
        """Whether a GPU may send by another one's NIC, over NVLink (PXN): from NCCL 2.12 on."""
        return self.spec.nccl >= (2, 12)

    @property
    def sharp(self) -> bool:
        """Whether the fabric's switches reduce for NCCL."""
        return self.spec.network is not None and self.spec.network.sharp

    @property
    def first_nic_link(self) -> int:
        """Where the links of the NICs begin among those of a domain: for each NIC out, then in."""
        return self._nic_base

    @property
    def fabric_limits(self) -> bool:
        """Whether a leaf's links to the spine may carry less than the NICs below them send."""
        network = self.spec.network
        if not self.num_nics or self.num_nodes <= self.nodes_per_leaf or network is None:
            return False
        first = self.num_domains * self.links_per_domain
        return network.oversubscription > 1 or any(link >= first for link in self.degraded)

    @cached_property
    def _faults(self) -> dict[int, tuple[tuple[int, float], ...]]:
        found: dict[int, list[tuple[int, float]]] = {}
        for link in sorted(self.degraded):
            domain, local = divmod(link, self.links_per_domain)
            found.setdefault(domain, []).append((local, self.degraded[link]))
        return {domain: tuple(faults) for domain, faults in found.items()}

    def domain_faults(self, domain: int) -> tuple[tuple[int, float], ...]:
        """Return (local link, factor) of what is degraded in a domain."""
        return self._faults.get(domain, ()) if self.degraded else ()

    def node_of(self, gpu: int) -> int:
        return gpu // self.gpus_per_node

    def domain_of(self, gpu: int) -> int:
        return gpu // self.gpus_per_domain

    def local_index(self, gpu: int) -> int:
        """Return the place of a GPU in its domain."""
        return gpu % self.gpus_per_domain

    # --- links ---------------------------------------------------------------------------------

    @cached_property
    def _local_links(self) -> tuple[Link, ...]:
        """The links of one domain, without its name."""
        names = [device.name for device in self.node.devices]
        links = [Link(f"{names[w.source]}>{names[w.target]}", w.kind, w.bytes_per_s) for w in self.node.wires]
        each = self.spec.node.host_memory_bytes_per_s * self.nodes_per_domain / max(len(self.node.memory), 1)
        links += [Link(f"{names[socket]}.memory", "memory", each) for socket in self.node.memory]
        for nic in self.node.nics[: self.num_nics]:
            links.append(Link(f"{names[nic]}>leaf", "nic", self.nic_bytes_per_s))
            links.append(Link(f"leaf>{names[nic]}", "nic", self.nic_bytes_per_s))
        return tuple(links)

    def link(self, index: int) -> Link:
        """Return one link without building the others."""
        domain, local = divmod(index, self.links_per_domain)
        if domain < self.num_domains:
            found = self._local_links[local]
            return Link(f"node{domain}.{found.name}", found.kind, self.bytes_per_s(index))
        leaf, down = divmod(index - self.num_domains * self.links_per_domain, 2)
        assert leaf < self.num_leaves, f"no link {index}"
        name = f"spine>leaf{leaf}" if down else f"leaf{leaf}>spine"
        return Link(name, "network", self.bytes_per_s(index))

    @cached_property
    def links(self) -> Sequence[Link]:
        """All links; routes and ``Phase.loads`` index into it. Each is made when asked for."""
        return _Links(self)

    def links_between(self, a: str, b: str) -> tuple[int, ...]:
        """Return the links, both ways, between two devices by the names that the graph gives them.

        ``node3.gpu0`` and ``node3.nvswitch0``; a NIC and its ``leaf``; ``leaf2`` and the ``spine``. Nothing: no wire.
        """
        ends = {a, b}
        if "spine" in ends:
            leaf = next((int(end[4:]) for end in (a, b) if end.startswith("leaf") and end[4:].isdigit()), -1)
            first = self.num_domains * self.links_per_domain + 2 * leaf
            return (first, first + 1) if 0 <= leaf < self.num_leaves else ()
        node, _, device = (b if a.startswith("leaf") else a).partition(".")
        other = (a if a.startswith("leaf") else b).removeprefix(f"{node}.")
        other = "leaf" if other.startswith("leaf") else other
        domain = int(node[4:]) if node.startswith("node") and node[4:].isdigit() else -1
        if not 0 <= domain < self.num_domains:
            return ()
        kinds = dict(self.spec.node.devices)
        stands = {device.kind: device.name for device in self.node.devices if device.kind == "nvswitch"}
        device, other = (stands.get(kinds.get(name, ""), name) for name in (device, other))
        wanted = (f"{device}>{other}", f"{other}>{device}")
        base = domain * self.links_per_domain
        return tuple(base + i for i, link in enumerate(self._local_links) if link.name in wanted)

    @cached_property
    def _library_bytes_per_s(self) -> tuple[float, ...]:
        """What NCCL takes each link of a domain for: a NIC for the speed of its port, a wire for its constant."""
        rates = [link.bytes_per_s for link in self._local_links]
        rates[: len(self.node.wires)] = [wire.library_bytes_per_s for wire in self.node.wires]
        rates[self._nic_base :] = [self.nic_line_bytes_per_s] * (2 * self.num_nics)
        return tuple(rates)

    @property
    def nic_line_bytes_per_s(self) -> float:
        """What a NIC's port is sold as."""
        network = self.spec.network
        if network is None or not network.line_bytes_per_s:
            return self.nic_bytes_per_s
        return self.nic_bytes_per_s * network.line_bytes_per_s / network.nic_bytes_per_s

    def is_nic(self, index: int) -> bool:
        """Whether a link is a NIC's port."""
        return index < self.num_domains * self.links_per_domain and index % self.links_per_domain >= self._nic_base

    def library_bytes_per_s(self, index: int) -> float:
        """Return what NCCL takes a link inside a domain for, when it plans."""
        return self._library_bytes_per_s[index % self.links_per_domain]

    def bytes_per_s(self, index: int) -> float:
        """Return the capacity of a link."""
        domain, local = divmod(index, self.links_per_domain)
        rate = self._local_links[local].bytes_per_s if domain < self.num_domains else self.leaf_uplink_bytes_per_s
        return rate * self.degraded.get(index, 1.0) if self.degraded else rate

    # --- NICs ----------------------------------------------------------------------------------

    def nics(self, domain: int) -> tuple[str, ...]:
        """Return the names of the NICs of a domain (a node)."""
        return tuple(f"node{domain}.{self.node.devices[nic].name}" for nic in self.node.nics[: self.num_nics])

    @cached_property
    def _nic_of(self) -> tuple[int, ...]:
        """NIC (index among the domain's) of each GPU of a domain.

        The nearest; GPUs that share several share them out: GPU i takes the one at i modulo their number, with the
        bits of i mirrored where that number is a power of two. Source: nccl src/graph/topo.cc, ncclTopoGetLocalNet.
        """
        chosen = []
        for i, gpu in enumerate(self.node.gpus):
            near = routing.nearest_nics(self.node, gpu)
            bits = len(near).bit_length() - 1
            at = int(f"{i % len(near):0{bits}b}"[::-1], 2) if bits and len(near) == 1 << bits else i % len(near)
            chosen.append(self.node.nics.index(near[at]))
        return tuple(chosen)

    def nic_of(self, gpu: int) -> int:
        """Return the rail of a GPU: the index, among its domain's NICs, of the one it uses."""
        return self._nic_of[self.local_index(gpu)]

    def rail_of(self, local: int) -> int:
        """Return the rail of a GPU by its place in its domain."""
        return self._nic_of[local]

    # --- routes --------------------------------------------------------------------------------

    def local_route(self, source: int, target: int) -> Route:
        """Return the route between two GPUs of one domain, by index there; links local to it."""
        key = (0, source, target)
        if key not in self._routes:
            self._routes[key] = routing.gpu_route(self.node, self.node.gpus[source], self.node.gpus[target])
        return self._routes[key]

    def local_nic_route(self, gpu: int, rail: int, outward: bool, among: tuple[int, ...] | None = None) -> Route:
        """Return the route between a GPU and the network through NIC ``rail``; links local to its domain.

        ``among`` the GPUs of a communicator in this domain: none but these relay for it, as NCCL's picture of the node
        has no others (nccl src/graph/topo.cc, ncclTopoGetSystem).
        """
        key: tuple[int, ...] = (1 if outward else 2, gpu, rail)
        if among is not None and key in self._routes and self._routes[key].kind == "PXN":
            key = (*key, *among)
        if key not in self._routes:
            relays = None if among is None or len(key) == 3 else tuple(self.node.gpus[i] for i in among)
            users = tuple(device for device, nic in zip(self.node.gpus, self._nic_of, strict=True) if nic == rail)
            found = routing.nic_route(
                self.node,
                self.node.gpus[gpu],
                self.node.nics[rail],
                outward,
                self.gpudirect,
                users,
                relays if self.relays else (),
            )
            port = self._nic_base + 2 * rail + (0 if outward else 1)
            links = (*found.links, port) if outward else (port, *found.links)
            self._routes[key] = Route(links, found.latency_s, found.kind)
            if among is not None and len(key) == 3 and found.kind == "PXN":
                return self.local_nic_route(gpu, rail, outward, among)
        return self._routes[key]

    def leaf_of(self, domain: int, rail: int) -> int:
        """Return the leaf switch that NIC ``rail`` of a domain is plugged into."""
        nics = self.num_nics // self.nodes_per_domain
        group = (domain * self.nodes_per_domain + rail // nics) // self.nodes_per_leaf
        return group * nics + rail % nics if self.rail_optimised else group

    def fabric(self, domain: int, rail: int, to_domain: int, to_rail: int) -> tuple[int, ...]:
        """Return the links between two NICs' leaves: none on one leaf, else up to the spine and down."""
        up, down = self.leaf_of(domain, rail), self.leaf_of(to_domain, to_rail)
        if up == down:
            return ()
        first = self.num_domains * self.links_per_domain
        return (first + 2 * up, first + 2 * down + 1)

    def rail_out(self, source: int, to_rail: int) -> int:
        """Return the NIC by which a GPU (index in its domain) sends to a GPU whose NIC is ``to_rail``.

        The same rail, through NVLink and the GPU beside that NIC if need be (PXN; nccl src/graph/search.cc,
        ncclTopoGetNetDev with NCCL_P2P_PXN_LEVEL 2); its own NIC where that would lead through a socket.
        """
        if not self.relays:
            return self._nic_of[source]
        far = routing.worse(self.local_nic_route(source, to_rail, outward=True).kind, "PXN")
        return self._nic_of[source] if far else to_rail

    def route(self, source: int, target: int, rail: int | None = None) -> Route:
        """Return the route between two GPUs; between nodes by NIC ``rail`` of both, by default the receiver's own."""
        domain, to_domain = self.domain_of(source), self.domain_of(target)
        local, to_local = self.local_index(source), self.local_index(target)
        if domain == to_domain:
            found = self.local_route(local, to_local)
            return self._shifted(found, domain)
        to_rail = self.nic_of(target) if rail is None else rail
        out_rail = self.rail_out(local, to_rail) if rail is None else rail
        out = self.local_nic_route(local, out_rail, outward=True)
        into = self.local_nic_route(to_local, to_rail, outward=False)
        base, to_base = domain * self.links_per_domain, to_domain * self.links_per_domain
        links = (
            *(base + i for i in out.links),
            *self.fabric(domain, out_rail, to_domain, to_rail),
            *(to_base + i for i in into.links),
        )
        kind: PathKind = "PXN" if "PXN" in (out.kind, into.kind) else "NET"
        return Route(links, out.latency_s + self.network_latency_s + into.latency_s, kind)

    def host_route(self, gpu: int, direction: str) -> Route:
        """Return the route of a ``host_to_device`` or ``device_to_host`` copy: a GPU and its socket's memory."""
        to_gpu = direction == "host_to_device"
        key = (3 if to_gpu else 4, self.local_index(gpu))
        if key not in self._routes:
            self._routes[key] = routing.host_route(self.node, self.node.gpus[self.local_index(gpu)], to_gpu)
        return self._shifted(self._routes[key], self.domain_of(gpu))

    def _shifted(self, route: Route, domain: int) -> Route:
        base = domain * self.links_per_domain
        return Route(tuple([base + i for i in route.links]), route.latency_s, route.kind) if base else route

    # --- drawing -------------------------------------------------------------------------------

    @cached_property
    def graph(self) -> networkx.DiGraph:
        """The machine as a graph: devices with ``kind``, links with ``index, kind, bytes_per_s, latency_s, count``."""
        import networkx

        graph = networkx.DiGraph()
        names = [device.name for device in self.node.devices]
        for domain in range(self.num_domains):
            base = domain * self.links_per_domain
            for device in self.node.devices:
                graph.add_node(f"node{domain}.{device.name}", kind=device.kind, domain=domain)
            for i, w in enumerate(self.node.wires):
                graph.add_edge(
                    f"node{domain}.{names[w.source]}",
                    f"node{domain}.{names[w.target]}",
                    index=base + i,
                    kind=w.kind,
                    bytes_per_s=w.bytes_per_s,
                    latency_s=w.latency_s,
                    count=w.count,
                )
            for socket, local in self.node.memory.items():
                memory = f"node{domain}.{names[socket]}.memory"
                graph.add_node(memory, kind="memory", domain=domain)
                self._add_pair(graph, f"node{domain}.{names[socket]}", memory, base + local, base + local)
            for rail, nic in enumerate(self.node.nics[: self.num_nics]):
                leaf = f"leaf{self.leaf_of(domain, rail)}"
                graph.add_node(leaf, kind="leaf")
                port = base + self._nic_base + 2 * rail
                self._add_pair(graph, f"node{domain}.{names[nic]}", leaf, port, port + 1)
        for leaf_index in range(self.num_leaves):
            graph.add_node("spine", kind="spine")
            first = self.num_domains * self.links_per_domain + 2 * leaf_index
            self._add_pair(graph, f"leaf{leaf_index}", "spine", first, first + 1)
        return graph

    def _add_pair(self, graph: networkx.DiGraph, a: str, b: str, forth: int, back: int) -> None:
        for source, target, index in ((a, b, forth), (b, a, back)):
            link = self.link(index)
            graph.add_edge(
                source, target, index=index, kind=link.kind, bytes_per_s=link.bytes_per_s, latency_s=0.0, count=1
            )


class _Links(Sequence[Link]):
    """The links of a cluster by index."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __len__(self) -> int:
        return self._cluster.num_links

    @overload
    def __getitem__(self, index: int) -> Link: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Link, ...]: ...
    def __getitem__(self, index: int | slice) -> Link | tuple[Link, ...]:
        if isinstance(index, slice):
            return tuple(self._cluster.link(i) for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._cluster.link(index % len(self))

    def bytes_per_s(self, index: int) -> float:
        """Return the capacity of one link without making it."""
        return self._cluster.bytes_per_s(index)


def _switch_groups(facts: NodeFacts) -> dict[str, str]:
    """Return for each NVSwitch the one that stands for it: those that share a GPU or a wire are one.

    Every transfer is striped over all planes of switches, so they act as one, as in nccl src/graph/topo.cc, where a
    node has a single NVS.
    """
    kind = dict(facts.devices)
    stands = {name: name for name, k in facts.devices if k == "nvswitch"}

    def find(name: str) -> str:
        while stands[name] != name:
            name = stands[name]
        return name

    seen: dict[str, str] = {}
    for a, b, _, _ in facts.wires:
        ends = [d for d in (a, b) if kind[d] == "nvswitch"]
        if len(ends) == 2:
            stands[find(ends[1])] = find(ends[0])
        elif ends:
            other = b if ends[0] == a else a
            first = seen.setdefault(other, ends[0])
            stands[find(ends[0])] = find(first)
    return {name: find(name) for name in stands}


def _trays(facts: NodeFacts, num: int) -> NodeFacts:
    """Return ``num`` nodes of one NVLink domain as one: their devices side by side, their NVSwitches the same."""

    def named(name: str, tray: int) -> str:
        return name if kind[name] == "nvswitch" else f"tray{tray}.{name}"

    kind = dict(facts.devices)
    devices = dict.fromkeys((named(name, tray), k) for tray in range(num) for name, k in facts.devices)
    wires = tuple((named(a, tray), named(b, tray), k, c) for tray in range(num) for a, b, k, c in facts.wires)
    return replace(facts, devices=tuple(devices), wires=wires, num_gpus=num * facts.num_gpus)


def _nodes_per_domain(spec: ClusterSpec) -> int:
    """Return how many nodes share an NVLink fabric: as few racks as hold them all equally filled."""
    if spec.gpus_per_node < spec.node.num_gpus:
        return 1
    racks = -(-spec.num_nodes // spec.node.nvlink_domain_nodes)
    while spec.num_nodes % racks:
        racks += 1
    return spec.num_nodes // racks


def build_node(facts: NodeFacts, links: Mapping[str, LinkFacts], peer_to_peer: bool, num_nics: int = 0) -> NodeGraph:
    """Return the graph of one node.

    ``links`` are the facts of each kind of wire that the node names. Parallel wires become one, NVSwitches one switch.
    ``num_nics`` NICs are kept: the file's own, spread evenly if fewer are asked for; if the file has none they are
    hung on the sockets in turn, by a wire that limits nothing.
    """
    stands = _switch_groups(facts)
    names = [n for n, kind in facts.devices if stands.get(n, n) == n]
    own_nics = [n for n, kind in facts.devices if kind == "nic"]
    kept = own_nics
    if num_nics and num_nics < len(own_nics):
        kept = [own_nics[i * len(own_nics) // num_nics] for i in range(num_nics)]
    names = [n for n in names if n not in own_nics or n in kept]
    kinds = dict(facts.devices)
    wires: dict[tuple[str, str, str], int] = {}
    for a, b, kind, count in facts.wires:
        ends = (stands.get(a, a), stands.get(b, b))
        if ends[0] == ends[1] or any(kinds[d] == "nic" and d not in kept for d in ends):
            continue
        key = (*ends, kind) if (ends[1], ends[0], kind) not in wires else (ends[1], ends[0], kind)
        wires[key] = wires.get(key, 0) + count
    index = {name: i for i, name in enumerate(names)}
    devices = [Device(name, kinds[name]) for name in names]
    directed: list[Wire] = []
    for (a, b, kind), count in wires.items():
        fact = links[kind]
        rate = fact.bytes_per_s * count
        most = max(rate, fact.copy_bytes_per_s * count)
        directed.append(Wire(index[a], index[b], fact.kind, count, most, fact.latency_s, rate))
        directed.append(Wire(index[b], index[a], fact.kind, count, most, fact.latency_s, rate))
    sockets = [i for i, device in enumerate(devices) if device.kind == "cpu"]
    if num_nics and not own_nics and sockets:
        for i in range(num_nics):
            socket = sockets[i * len(sockets) // num_nics]
            devices.append(Device(f"nic{i}", "nic"))
            directed.append(Wire(len(devices) - 1, socket, "pcie", 1, float("inf"), 0.0, float("inf")))
            directed.append(Wire(socket, len(devices) - 1, "pcie", 1, float("inf"), 0.0, float("inf")))
    gpus = tuple(i for i, device in enumerate(devices) if device.kind == "gpu")
    return NodeGraph(
        devices=tuple(devices),
        wires=tuple(directed),
        memory={socket: len(directed) + i for i, socket in enumerate(sockets)},
        gpus=gpus,
        nics=tuple(i for i, device in enumerate(devices) if device.kind == "nic"),
        gpu_peer_to_peer=peer_to_peer,
        p2p_across_sockets=facts.cpu_vendor == "amd" and len(gpus) <= 2,
    )


def degrade(cluster: Cluster, links: Sequence[DegradedLink]) -> Cluster:
    """Return the machine with some wires, both ways, at a part of their bytes per second."""
    degraded = dict(cluster.degraded)
    for fault in links:
        for link in cluster.links_between(*fault.between):
            degraded[link] = degraded.get(link, 1.0) * fault.factor
    return replace(cluster, degraded=degraded, memo={}, _routes={})


def build_cluster(spec: ClusterSpec, links: Mapping[str, LinkFacts] | None = None) -> Cluster:
    """Return the machine of a specification. ``links`` (kind of wire -> facts) default to the catalogue's."""
    if links is None:
        from sim.catalog import load

        links = {kind: load.link(kind) for kind in dict.fromkeys(wire[2] for wire in spec.node.wires)}
    network = spec.network
    trays = _nodes_per_domain(spec)
    facts = spec.node if trays == 1 else _trays(spec.node, trays)
    node = build_node(facts, links, spec.gpu.peer_to_peer, network.nics_per_node * trays if network else 0)
    assert node.gpus, f"node {spec.node.name} has no GPU"
    nic_bytes_per_s = uplink = 0.0
    if network is not None and node.nics:
        # A NIC device of the file may stand for several ports (p5 has four 100 Gbit/s ports a GPU).
        nic_bytes_per_s = network.nic_bytes_per_s * network.nics_per_node * trays / len(node.nics)
        below = min(network.nodes_per_leaf, spec.num_nodes)
        ports = below if network.topology == "rail-optimised" else below * len(node.nics) // trays
        uplink = ports * nic_bytes_per_s / network.oversubscription
    return Cluster(
        spec=spec,
        node=node,
        num_nodes=spec.num_nodes,
        gpus_per_node=spec.gpus_per_node,
        nodes_per_domain=trays,
        nic_bytes_per_s=nic_bytes_per_s,
        leaf_uplink_bytes_per_s=uplink,
        network_latency_s=network.latency_s if network else 0.0,
        rail_optimised=network is None or network.topology == "rail-optimised",
        gpudirect=network is not None and network.gpudirect,
        nodes_per_leaf=network.nodes_per_leaf if network else spec.num_nodes,
    )
