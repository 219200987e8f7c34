"""Copies by a GPU's copy engines: to and from the host, and to the next GPU of a group."""

from __future__ import annotations

from collections.abc import Sequence

from sim.cluster.topology import Cluster
from sim.cost.nccl.loads import Loads, links_s, phase_of
from sim.ir.traffic import Traffic

SHIFT_S = 5e-6
"""Time of a copy between GPUs beside its bytes and wires: assumed. The copy engine starts after 2 to 3 us (what the
matrix of latencies of cuda-samples' p2pBandwidthLatencyTest has on A100 and H100), a kernel sets the flag that the
other rank waits for."""

SHIFT_SMS = 1
"""A block that sets flags and waits for them: ``num_sm`` of a ring exchange in Transformer Engine's initialize_ub."""


def plan_shift(cluster: Cluster, groups: Sequence[tuple[int, ...]], tensor_bytes: int) -> Traffic:
    """Return the traffic of copies of ``tensor_bytes`` from every rank of a group to the next, by the copy engines."""
    loads: Loads = {}
    latency_s = group_s = 0.0
    for group in groups:
        for source, target in zip(group, (*group[1:], group[0]), strict=True):
            route = cluster.route(source, target)
            latency_s = max(latency_s, route.latency_s)
            for link in route.links:
                loads[link] = loads.get(link, 0.0) + tensor_bytes
        group_s = group_s or links_s(cluster, loads)
    return Traffic("copy", (phase_of(SHIFT_S + latency_s, loads, group_s),), tensor_bytes, SHIFT_SMS)


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
        group_s = group_s or links_s(cluster, loads)
    return Traffic("copy", (phase_of(latency_s, loads, group_s),), num_bytes)
