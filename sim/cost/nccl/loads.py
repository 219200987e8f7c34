"""Bytes that an algorithm of NCCL puts on every link: all of a group's, added to those of the groups beside it.

Sharing of links, by groups and within one ring (PCIe trees, sockets), is the network's to work out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise, permutations, product

from sim.cluster.topology import Cluster
from sim.cost import collective
from sim.cost.nccl.rings import RingGraph, by_node
from sim.cost.nccl.tuning import MAX_NVLS_HEADS
from sim.ir.traffic import Phase

Loads = dict[int, float]
"""Number of a link in the cluster -> bytes."""


def add_load(loads: Loads, base: int, links: Iterable[int], num_bytes: float) -> None:
    """Add bytes to each of these links, numbered from ``base``."""
    for link in links:
        loads[base + link] = loads.get(base + link, 0.0) + num_bytes


def ring_loads(cluster: Cluster, graph: RingGraph, hop_bytes: float, loads: Loads, kind: str, root: int) -> None:
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


def tree_loads(cluster: Cluster, graph: RingGraph, tensor_bytes: float, loads: Loads) -> None:
    """Add a tree: within a node a chain that ends at the GPU beside the NIC, up and down; trees between nodes."""
    for (node, _), pattern in zip(graph.nodes, graph.patterns, strict=True):
        each = tensor_bytes / len(pattern.orders)
        for order in pattern.orders:
            for a, b in pairwise(order):
                add_load(loads, node * cluster.links_per_domain, cluster.local_route(a, b).links, each)
                add_load(loads, node * cluster.links_per_domain, cluster.local_route(b, a).links, each)
    if graph.num_nodes > 1:
        _tree_between(cluster, graph, tensor_bytes, loads)


def nvls_loads(cluster: Cluster, graph: RingGraph, kind: str, tensor_bytes: float, loads: Loads) -> None:
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


def pat_loads(cluster: Cluster, graph: RingGraph, tensor_bytes: float, loads: Loads) -> None:
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


def all_to_all_loads(cluster: Cluster, group: Sequence[int], tensor_bytes: float, loads: Loads) -> None:
    """Add S/n between every two ranks of a group, straight (the routes of ``Cluster.route``).

    Counted by what routes share, not pair by pair: what a GPU sends by one rail, what it receives, and what goes from
    a NIC of one domain to a NIC of another.
    """
    stride = cluster.links_per_domain
    each = tensor_bytes / len(group)
    domains = by_node(cluster, group)
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


def phase_of(
    latency_s: float, loads: Loads, group_s: float, stream_bytes: float = 0.0, max_bytes_per_s: float = 0.0
) -> Phase:
    """Return the phase of loads that flow together, in the order of the links whatever the order they were added in.

    The rest as in :class:`Phase`.
    """
    entries = tuple([(link, loads[link]) for link in sorted(loads) if loads[link] > 0])
    return Phase(latency_s, entries, stream_bytes, max_bytes_per_s, group_s)


def links_s(cluster: Cluster, loads: Loads) -> float:
    """Return the time that the links need for these loads, with nothing else on them."""
    return max([num_bytes / cluster.bytes_per_s(link) for link, num_bytes in loads.items()], default=0.0)
