"""Which places of a machine are alike: what folding ranks needs to know of hardware.

Two GPUs of a domain are alike if wires, switches, sockets and NICs look the same from both, the ranks on them included:
colours of devices are refined by those of the devices that their wires lead to (Weisfeiler and Leman 1968).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from sim.cluster.topology import Cluster

_ROUNDS = 3
"""Rounds of refinement inside a domain each time: from a GPU to its switch, its socket, the other socket. What lies
farther is found as ranks are refined again and again."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where ranks are. ``domains`` and ``locals`` by rank: the domain, and the GPU's index in it.

    ``leaves`` are by rank too: the group of leaf switches; empty where it makes no difference, as the fabric never
    limits what the NICs send.
    """

    cluster: Cluster
    domains: tuple[int, ...]
    locals: tuple[int, ...]
    leaves: tuple[int, ...]
    _colours: dict[Hashable, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _names: dict[Hashable, int] = field(default_factory=dict, repr=False)
    _signatures: dict[Hashable, int] = field(default_factory=dict, repr=False)
    _local_signatures: dict[Hashable, Hashable] = field(default_factory=dict, repr=False)

    def colours(self, domain: int, of_gpus: tuple[int, ...]) -> tuple[int, ...]:
        """Return a colour for each GPU of a domain on which ranks of the given colours run (-1: none).

        Equal colours, in this domain or another: places that are alike.
        """
        key = (self.cluster.domain_faults(domain), of_gpus)
        found = self._colours.get(key)
        if found is None:
            found = self._colours[key] = self._refined(domain, of_gpus)
        return found

    def _refined(self, domain: int, of_gpus: tuple[int, ...]) -> tuple[int, ...]:
        cluster, node, name = self.cluster, self.cluster.node, self._names
        base = domain * cluster.links_per_domain
        edges: list[list[tuple[Hashable, int]]] = [[] for _ in node.devices]
        for index, wire in enumerate(node.wires):
            rate = cluster.bytes_per_s(base + index)
            edges[wire.source].append((("out", wire.kind, rate), wire.target))
            edges[wire.target].append((("in", wire.kind, rate), wire.source))
        for local, gpu in enumerate(node.gpus[: cluster.gpus_per_domain]):
            if cluster.num_nics:
                nic = node.nics[cluster.rail_of(local)]
                edges[gpu].append((("rail",), nic))
                edges[nic].append((("railed",), gpu))
        kinds: list[Hashable] = [device.kind for device in node.devices]
        for rail, nic in enumerate(node.nics[: cluster.num_nics]):
            first = base + cluster.first_nic_link + 2 * rail
            kinds[nic] = ("nic", cluster.bytes_per_s(first), cluster.bytes_per_s(first + 1))
        for socket, local in node.memory.items():
            kinds[socket] = ("cpu", cluster.bytes_per_s(base + local))
        for local, gpu in enumerate(node.gpus[: cluster.gpus_per_domain]):
            kinds[gpu] = ("gpu", of_gpus[local])
        colours = [name.setdefault((0, kind), len(name)) for kind in kinds]
        for _ in range(_ROUNDS):
            colours = [
                name.setdefault(
                    (own, tuple(sorted(_named(name, (wire, colours[end])) for wire, end in ends))), len(name)
                )
                for own, ends in zip(colours, edges, strict=True)
            ]
        return tuple(colours[gpu] for gpu in node.gpus[: cluster.gpus_per_domain])

    def signature(self, group: Sequence[int], ordered: bool = False) -> int:
        """Return a number for how a group of ranks lies in the machine; ``ordered``: from the first to the second.

        Equal for groups whose ranks lie alike: as many on each node, in the order in which the group reaches the nodes,
        by equal paths to each other and to NICs that as many of them share.
        """
        domains: dict[int, list[int]] = {}
        for rank in group:
            domains.setdefault(self.domains[rank], []).append(self.locals[rank])
        leaves: tuple[int, ...] = ()
        if self.leaves:
            seen: dict[int, int] = {}
            first = {self.domains[rank]: self.leaves[rank] for rank in group}
            leaves = tuple(seen.setdefault(first[domain], len(seen)) for domain in domains)
        several = len(domains) > 1
        key = (several, ordered, tuple([self._local(tuple(at), several, ordered) for at in domains.values()]), leaves)
        return self._signatures.setdefault(key, len(self._signatures))

    def pair_signatures(self, pairs: Sequence[tuple[int, int]]) -> list[int]:
        """Return a number for how each pair (sender, receiver) lies: equal for routes and links shared alike.

        Where all go to the same place on another node, one by one, their places say as much.
        """
        domains, locals_ = self.domains, self.locals
        if all(locals_[a] == locals_[b] and domains[a] != domains[b] for a, b in pairs):
            return [self.signature(pair, ordered=True) for pair in pairs]
        cluster, size = self.cluster, self.cluster.gpus_per_domain
        gpu = [domain * size + local for domain, local in zip(domains, locals_, strict=True)]
        routes = [cluster.route(gpu[a], gpu[b]) for a, b in pairs]
        users = Counter(link for route in routes for link in dict.fromkeys(route.links))
        keys = [(r.kind, tuple([(cluster.bytes_per_s(link), users[link]) for link in r.links])) for r in routes]
        return [self._signatures.setdefault(key, len(self._signatures)) for key in keys]

    def _local(self, gpus: tuple[int, ...], several: bool, ordered: bool) -> Hashable:
        key = (gpus if ordered else tuple(sorted(gpus)), several, ordered)
        found = self._local_signatures.get(key)
        if found is None:
            found = self._local_signatures[key] = _paths(self.cluster, key[0], several, ordered)
        return found


def _named(name: dict[Hashable, int], what: Hashable) -> int:
    return name.setdefault(what, len(name))


def _paths(cluster: Cluster, gpus: tuple[int, ...], several: bool, ordered: bool) -> Hashable:
    """Return kinds and widths of the paths among GPUs of a domain and, of ``several`` domains, to their NICs."""
    ways = [cluster.local_route(a, b) for a, b in ([gpus[:2]] if ordered and len(gpus) > 1 else permutations(gpus, 2))]
    among = sorted((way.kind, tuple(cluster.bytes_per_s(i) for i in way.links)) for way in ways)
    if not several:
        return (len(gpus), tuple(among))
    rails = Counter(cluster.rail_of(gpu) for gpu in gpus)
    out = [cluster.local_nic_route(gpu, cluster.rail_of(gpu), outward=True) for gpu in gpus]
    outside = sorted((way.kind, len(way.links)) for way in out)
    return (len(gpus), tuple(among), tuple(sorted(rails.values())), tuple(outside))


def places_of(cluster: Cluster, placement: Sequence[int] = (), num_ranks: int = 0) -> Places:
    """Return where ranks are; ``placement``: the GPU of each rank, by default rank i on GPU i."""
    gpus = tuple(placement) or range(num_ranks or cluster.num_gpus)
    size = cluster.gpus_per_domain
    domains = tuple([gpu // size for gpu in gpus])
    leaves: tuple[int, ...] = ()
    if cluster.fabric_limits:
        per_leaf = cluster.nodes_per_leaf
        leaves = tuple([domain * cluster.nodes_per_domain // per_leaf for domain in domains])
    return Places(cluster, domains, tuple([gpu % size for gpu in gpus]), leaves)
