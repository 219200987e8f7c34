"""How long kernels of NCCL take on idle wires: measured coefficients (``terms.py``), or else what NCCL expects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.cluster.topology import Cluster
from sim.cost.nccl import terms
from sim.cost.nccl.rings import RingGraph, generation_of, path_hw
from sim.cost.nccl.terms import Coefficients, Work
from sim.cost.nccl.tuning import (
    BASE_LATENCY_US,
    HW_LATENCY_US,
    MAX_NVLS_HEADS,
    NVLS_EFFICIENCY,
    PROTOCOLS,
    US,
    Choice,
    nvlink_bytes_per_s,
)


def message_latency_s(cluster: Cluster, pairs: Iterable[tuple[int, int]]) -> float:
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


def connections_s(cluster: Cluster, num_bytes: float, channels: int) -> float:
    """Return the time that connections from one node to the next need for these bytes: each channel has one.

    0 where a connection carries what its NIC does. Source: nccl src/transport/net.cc, src/transport/net_ib
    (NCCL_IB_QPS_PER_CONNECTION is 1).
    """
    network = cluster.spec.network
    rate = network.connection_bytes_per_s if network is not None else 0.0
    return num_bytes / (channels * rate) if rate else 0.0


def coefficients_for(cluster: Cluster, name: str, hw: str) -> Coefficients | None:
    """Return the measured coefficients of an algorithm over ``hw`` for this GPU, if there are any."""
    key = ("measured", name, hw)
    if key not in cluster.memo:
        found = terms.measured_by(cluster.spec.gpu, name, hw)
        cluster.memo[key] = found[1] if found else None
    coefficients: Coefficients | None = cluster.memo[key]
    return coefficients


def kernel_work(
    cluster: Cluster, graph: RingGraph, name: str, kind: str, tensor_bytes: int, channels: int
) -> tuple[str, Work]:
    """Return (``hw``, work) of a collective: what its measured coefficients are multiplied with."""
    hw = "net" if graph.num_nodes > 1 else graph.hw
    wires, part, heads = graph.local_bytes_per_s, 0.0, 0
    if name.startswith("nvls"):
        wires = nvlink_bytes_per_s(cluster, graph)
        heads = min(len(graph.nodes[0][1]), MAX_NVLS_HEADS)
        part = terms.nvls_round_bytes(tensor_bytes, channels, heads)
    return hw, Work(kind, graph.num_ranks, graph.num_nodes, tensor_bytes, channels, wires, part, heads)


def kernel_s(
    cluster: Cluster, graph: RingGraph, choice: Choice, kind: str, tensor_bytes: int, channels: int
) -> tuple[float, float]:
    """Return (latency, time of the bytes on idle wires).

    What was never measured takes as long as NCCL itself expects.
    """
    hw, work = kernel_work(cluster, graph, choice.name, kind, tensor_bytes, channels)
    coefficients = coefficients_for(cluster, choice.name, hw)
    if coefficients is None:
        return choice.latency_s, tensor_bytes / choice.algorithm_bw
    latency_s, flow_s = terms.split(choice.name, coefficients, terms.terms_of(choice.name, hw, work))
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
    return NVLS_EFFICIENCY[generation_of(cluster)] * nvlink_bytes_per_s(cluster, graph) / per_byte


def message_work(cluster: Cluster, group: Sequence[int], tensor_bytes: float, channels: int) -> tuple[str, Work]:
    """Return (``hw``, work) of an all-to-all of a group inside one node."""
    n = len(group)
    routes = [cluster.local_route(cluster.local_index(group[0]), cluster.local_index(other)) for other in group[1:]]
    hw = max((path_hw(cluster, route) for route in routes), key=("nvlink", "pci", "shm").index)
    ports = {route.links[0] for route in routes}
    wires = sum(cluster.library_bytes_per_s(port) for port in sorted(ports))
    return hw, Work("all_to_all", n, 1, tensor_bytes, channels, wires, tensor_bytes / n / channels)


def messages_s(
    cluster: Cluster, group: Sequence[int], tensor_bytes: int, channels: int, wires_s: float
) -> tuple[float, float]:
    """Return (latency, time of the bytes) of an all-to-all inside one node; ``wires_s`` if it was never measured."""
    hw, work = message_work(cluster, group, tensor_bytes, channels)
    coefficients = coefficients_for(cluster, "p2p", hw)
    if coefficients is None:
        return message_latency_s(cluster, [(group[0], other) for other in group[1:]]), wires_s
    latency_s, flow_s = terms.split("p2p", coefficients, terms.terms_of("p2p", hw, work))
    return latency_s, flow_s
