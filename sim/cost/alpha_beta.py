"""A plain network: every message takes ``alpha`` seconds and its bytes over ``beta``, between any two GPUs alike.

There is no topology: each GPU has one port with ``beta`` bytes per second each way, and the network between the ports
has room for all. Rounds of a collective of n ranks, and the bytes that a port carries each way (S as nccl-tests counts
``tensor_bytes``; lg n is log2 of n, rounded up):

    all_reduce                    2 lg n alpha + 2 (n-1)/n S / beta    Rabenseifner: halving, then doubling
    all_gather, reduce_scatter      lg n alpha +   (n-1)/n S / beta    recursive doubling, recursive halving
    broadcast, reduce               lg n alpha +      lg n S / beta    a binomial tree
    all_to_all                     (n-1) alpha +   (n-1)/n S / beta    pairwise
    send, shift                          alpha +           S / beta
    barrier                         lg n alpha                         dissemination

Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", Int. J. High
Perform. Comput. Appl. 19(1), 2005, pp. 49-66, whose formulas of powers of two stand for every n here.

A collective waits for its rounds, then its bytes flow; collectives on several streams of a GPU share its port as links
are shared everywhere (``sim/engine/network.py``). It takes no SM; copies to the host go over the machine's own wires.
"""

from __future__ import annotations

from collections.abc import Sequence

from sim.cluster.topology import Cluster
from sim.cost import collective
from sim.ir.traffic import Link, Phase, Traffic

NAME = "alpha-beta"


def rounds(kind: str, n: int) -> int:
    """Return how many messages follow each other in a collective of ``n`` ranks."""
    lg = (n - 1).bit_length()
    if kind == "all_reduce":
        return 2 * lg
    if kind in ("send", "shift"):
        return 1
    return n - 1 if kind == "all_to_all" else lg


def port_bytes(kind: str, n: int, tensor_bytes: int) -> float:
    """Return what the busiest port of the group carries in its busier direction."""
    if kind == "barrier" or n <= 1:
        return 0.0
    if kind in ("broadcast", "reduce"):
        return float((n - 1).bit_length() * tensor_bytes)
    return collective.bus_factor(kind, n) * tensor_bytes


def time_s(kind: str, n: int, tensor_bytes: int, alpha_s: float, beta_bytes_per_s: float) -> float:
    """Return the time of a collective by itself, in seconds: the table above."""
    return rounds(kind, n) * alpha_s + port_bytes(kind, n, tensor_bytes) / beta_bytes_per_s if n > 1 else 0.0


def links(cluster: Cluster) -> tuple[Link, ...]:
    """Return the machine's links, then two for each GPU: its port out, its port in."""
    beta = cluster.spec.beta_bytes_per_s
    ports = (Link(f"gpu{gpu}>network" if not way else f"network>gpu{gpu}", "network", beta)
             for gpu in range(cluster.num_gpus) for way in (0, 1))  # fmt: skip
    return (*cluster.links, *ports)


def _port(cluster: Cluster, gpu: int, inward: bool = False) -> int:
    return cluster.num_links + 2 * gpu + inward


def plan_collective(cluster: Cluster, groups: Sequence[tuple[int, ...]], kind: str, tensor_bytes: int) -> Traffic:
    """Return the traffic of a collective that all ``groups`` (of GPUs; equal in size) run at the same time."""
    n = len(groups[0])
    if n <= 1:
        return Traffic("none", (), 0)
    loads: dict[int, float] = {}
    for group in groups:
        for place, gpu in enumerate(group):
            out, into = _sent(kind, n, place, tensor_bytes)
            for link, num_bytes in ((_port(cluster, gpu), out), (_port(cluster, gpu, True), into)):
                loads[link] = loads.get(link, 0.0) + num_bytes
    group_s = port_bytes(kind, n, tensor_bytes) / cluster.spec.beta_bytes_per_s
    phase = _phase(cluster, rounds(kind, n), loads, group_s)
    return Traffic(NAME, (phase,), collective.wire_bytes(kind, n, tensor_bytes) if kind != "barrier" else 0)


def _sent(kind: str, n: int, place: int, tensor_bytes: int) -> tuple[float, float]:
    """Return what the rank at ``place`` of its group sends and receives. The root is the first.

    In a binomial tree rank v < 2^i sends to v + 2^i in round i; a reduction runs the other way.
    """
    if kind not in ("broadcast", "reduce"):
        num_bytes = port_bytes(kind, n, tensor_bytes)
        return num_bytes, num_bytes
    children = sum(place < 1 << i and place + (1 << i) < n for i in range((n - 1).bit_length()))
    down, up = float(children * tensor_bytes), float(tensor_bytes * (place > 0))
    return (down, up) if kind == "broadcast" else (up, down)


def plan_point_to_point(
    cluster: Cluster, pairs: Sequence[tuple[int, int]], tensor_bytes: int, num_ranks: int = 2, spans: bool = False
) -> Traffic:
    """Return the traffic of messages of ``tensor_bytes`` from the first to the second GPU of each pair, together.

    Who else is in their communicator changes nothing.
    """
    moving = [pair for pair in pairs if pair[0] != pair[1]]
    if not moving:
        return Traffic("none", (), 0)
    loads: dict[int, float] = {}
    for source, target in moving:
        for link in (_port(cluster, source), _port(cluster, target, True)):
            loads[link] = loads.get(link, 0.0) + tensor_bytes
    phase = _phase(cluster, 1, loads, tensor_bytes / cluster.spec.beta_bytes_per_s)
    return Traffic(NAME, (phase,), tensor_bytes)


def _phase(cluster: Cluster, num_rounds: int, loads: dict[int, float], group_s: float) -> Phase:
    entries = tuple((link, loads[link]) for link in sorted(loads) if loads[link] > 0)
    return Phase(num_rounds * cluster.spec.alpha_s, entries, group_s=group_s)


def assumption(cluster: Cluster, groups: Sequence[tuple[int, ...]]) -> str:
    """Return what the time of a collective rests on."""
    return "collectives by alpha and beta: no topology, no protocol, no SM" if len(groups[0]) > 1 else ""
