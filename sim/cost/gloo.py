"""What torch's ProcessGroupGloo does with a collective: gloo's algorithms over TCP, by way of the host's memory.

A collective of GPU tensors is three phases, one after the other (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp):
the tensor is copied to pinned memory, gloo runs over that, and the result is copied back. Messages over TCP go through
the kernel of each host, on one interface of a node (the first NIC; GLOO_SOCKET_IFNAME names it), between ranks of one
node over its loopback. gloo's algorithms, for n ranks and S bytes (``tensor_bytes`` as nccl-tests counts it):

    all_reduce      a ring of segments of at most 1 MiB, two for each rank at least (gloo/allreduce.cc)
    reduce_scatter  that all-reduce of the whole; each rank keeps its part (reduce_scatter_tensor_coalesced)
    all_gather      a ring of half parts into a new buffer, copied to where it belongs (gloo/allgather.cc)
    broadcast       a binomial tree of whole tensors (gloo/broadcast.cc)
    reduce          the ring's first half, which goes on for n - 1 rounds of a segment too many a rank, then each part
                    to the root (gloo/reduce.cc: ``i < numSegments - 2``)
    all_to_all      every part straight to its rank (gloo/alltoall.cc)
    barrier         dissemination (gloo/barrier.cc)

Time: ``call`` for a collective, ``message`` for each message that a rank sends in turn, and its processors' work for
the bytes: a thread that sends, one that receives. All ranks of a node share its cores (a link of seconds of them), its
memory (each copy into or out of the kernel reads and writes) and its NIC. Coefficients:
``sim/catalog/measured/gloo.yaml``, fitted by ``validation/measure/fit_gloo.py`` to torch over the loopback of one
machine.

Leaves out: ranks of one node that TCP over other interfaces could use, processors of other speed than the one that was
measured, congestion control, torch's second thread for collectives that overlap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations
from typing import NamedTuple

from sim.cluster import routing
from sim.cluster.topology import Cluster
from sim.cost.copies import plan_copy, plan_shift
from sim.ir.traffic import Link, Phase, Traffic

MAX_SEGMENT_BYTES = 2**20
"""gloo/allreduce.h, kMaxSegmentSize; likewise reduce.h."""
WIRE_PER_BYTE = 1538 / 1448
"""Bytes on an Ethernet of MTU 1500 for each byte of a TCP stream: 38 of Ethernet (IEEE 802.3: preamble, header,
checksum, gap) and 52 of IP and TCP with timestamps (RFC 7323) around 1448."""
CACHE_BYTES = 16 * 2**20
"""Of the buffers of a node's ranks, what lies in caches: about where a byte gets dearer on the machine measured."""
MAPPED_BYTES = 32 * 2**20
"""A larger buffer is mapped anew each time, and each of its pages faults (glibc malloc/malloc.c,
DEFAULT_MMAP_THRESHOLD_MAX)."""
ALGORITHMS = {"broadcast": "tree", "all_to_all": "pairwise", "barrier": "dissemination"}
"""Of a kind; else a ring."""


class Coefficients(NamedTuple):
    """``call_s`` a collective, ``message_s`` a message; the rest are seconds a byte on one core: ``near_s`` into or out
    of the kernel where the buffers of a node's ranks lie in its caches, ``far_s`` where not, ``copy_s`` copied from
    tensor to tensor, ``fault_s`` of a buffer that the C library maps anew. Adding costs nothing that could be measured
    beside: it goes on while the next segment comes in."""

    call_s: float
    message_s: float
    near_s: float
    far_s: float
    copy_s: float
    fault_s: float


class Work(NamedTuple):
    """What one rank (the busiest) does in a collective.

    ``num_messages`` it sends in turn; ``sent_bytes``, ``received_bytes`` over TCP;
    ``copied_bytes`` it copies through a buffer of its own of as many bytes; ``buffer_bytes`` the tensor.
    """

    num_messages: int
    sent_bytes: int
    received_bytes: int
    buffer_bytes: int
    copied_bytes: int = 0


@cache
def coefficients() -> Coefficients:
    """Return the measured coefficients."""
    import yaml

    from sim.cost.efficiency import MEASURED

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data = yaml.load((MEASURED / "gloo.yaml").read_text(encoding="utf-8"), Loader=loader)
    given = data["coefficients"]
    return Coefficients(*(float(given[name.removesuffix("_s")]["value"]) for name in Coefficients._fields))


def segments(n: int, tensor_bytes: int, element_bytes: int = 4) -> tuple[int, int]:
    """Return (segments of the tensor, bytes of one) in gloo's rings: as many for each rank, two at least."""
    most = max(MAX_SEGMENT_BYTES // element_bytes, 1) * element_bytes
    count = max(-(-tensor_bytes // most), 2 * n)
    count = -(-count // n) * n
    each = -(-tensor_bytes // count)
    return count, -(-each // element_bytes) * element_bytes


def work(kind: str, n: int, tensor_bytes: int) -> Work:
    """Return what the busiest rank of ``n`` does."""
    rounds, part = (n - 1).bit_length(), tensor_bytes // n
    straight = {
        "send": Work(1, tensor_bytes, 0, tensor_bytes),
        "barrier": Work(rounds, 0, 0, 0),
        "broadcast": Work(rounds, rounds * tensor_bytes, 0, tensor_bytes),
        "all_to_all": Work(n - 1, (n - 1) * part, (n - 1) * part, tensor_bytes),
        "all_gather": Work(2 * (n - 1), (n - 1) * part, (n - 1) * part, tensor_bytes, copied_bytes=tensor_bytes),
    }
    if kind in straight:
        return straight[kind]
    count, each = segments(n, tensor_bytes)
    if kind == "reduce":
        went = min((count - 2) * each, (count - 2) * tensor_bytes // count)
        return Work(count - 2 + 1, went + part, went, tensor_bytes)
    assert kind in ("all_reduce", "reduce_scatter"), f"gloo has no {kind}"
    half = (n - 1) * -(-tensor_bytes // n)
    return Work(2 * (count - count // n), 2 * half, 2 * half, tensor_bytes)


def sends(kind: str, n: int, tensor_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield (place, place, bytes) of what ranks of a group send each other. The root is the first."""
    one = work(kind, n, tensor_bytes)
    if kind == "broadcast":
        for i in range((n - 1).bit_length()):
            yield from ((v, v + (1 << i), tensor_bytes) for v in range(1 << i) if v + (1 << i) < n)
    elif kind == "all_to_all":
        yield from ((i, j, tensor_bytes // n) for i, j in permutations(range(n), 2))
    elif kind == "all_gather":
        yield from ((i, (i + 1) % n, one.sent_bytes) for i in range(n))
    elif kind != "barrier":
        yield from ((i, (i - 1) % n, one.received_bytes) for i in range(n))
        if kind == "reduce":
            yield from ((i, 0, tensor_bytes // n) for i in range(1, n))


def staged(kind: str, n: int, tensor_bytes: int) -> tuple[int, int]:
    """Return the bytes that a rank's GPU tensors take to pinned memory before, and from there after.

    ``AsyncAllreduceCUDAWork`` and its like. A broadcast is copied from the root's GPU alone, a reduction back to all.
    """
    if kind == "barrier":
        return 0, 0
    return tensor_bytes // n if kind == "all_gather" else tensor_bytes, tensor_bytes


# --- time ----------------------------------------------------------------------------------------


def byte_s(one: Work, ranks: int, c: Coefficients) -> float:
    """Return what a byte into or out of the kernel costs a core, where so many ranks of a node have such buffers."""
    cached = min(1.0, CACHE_BYTES / max(ranks * one.buffer_bytes, 1))
    return cached * c.near_s + (1 - cached) * c.far_s


def copy_s(one: Work, c: Coefficients) -> float:
    """Return the time of a rank's copies from buffer to buffer."""
    return one.copied_bytes * (c.copy_s + (c.fault_s if one.copied_bytes > MAPPED_BYTES else 0.0))


def thread_s(one: Work, ranks: int, c: Coefficients) -> float:
    """Return the time of the busiest rank's busier thread: one sends, one receives; copies go before and after."""
    return max(one.sent_bytes, one.received_bytes) * byte_s(one, ranks, c) + copy_s(one, c)


def latency_s(one: Work, ranks: int, cores: int, c: Coefficients, network_s: float = 0.0) -> float:
    """Return the time of a collective beside its bytes: ``network_s`` of the network for each message both ways."""
    return (c.call_s + one.num_messages * c.message_s) * max(1.0, ranks / cores) + one.num_messages * 2 * network_s


# --- the wires -----------------------------------------------------------------------------------


def _process_route(cluster: Cluster, source: int, target: int) -> tuple[tuple[int, float], ...]:
    """Return (link, bytes on it for a byte of the stream) between the processes of two GPUs.

    A process's memory is that of its GPU's socket. Into the kernel and out of it a byte is read and written; a NIC
    reads it once more on one side and writes it on the other.
    """
    key = ("tcp", source, target)
    known: tuple[tuple[int, float], ...] | None = cluster.memo.get(key)
    if known is not None:
        return known
    loads: dict[int, float] = {}
    node, remote = cluster.node, cluster.node_of(source) != cluster.node_of(target)

    def add(links: Sequence[int], gpu: int, each: float) -> None:
        base = cluster.domain_of(gpu) * cluster.links_per_domain
        for link in links:
            loads[base + link] = loads.get(base + link, 0.0) + each

    sockets = [routing.socket_of(node, node.gpus[cluster.local_index(gpu)]) for gpu in (source, target)]
    for gpu, socket in zip((source, target), sockets, strict=True):
        add((node.memory[socket],), gpu, 3.0 if remote else 2.0)
    if remote:
        rails = [_rail(cluster, gpu) for gpu in (source, target)]
        add(routing.search(node, sockets[0], scale_up=False)[node.nics[rails[0]]], source, 1.0)
        add(routing.search(node, node.nics[rails[1]], scale_up=False)[sockets[1]], target, 1.0)
        frame = WIRE_PER_BYTE * cluster.nic_bytes_per_s / cluster.nic_line_bytes_per_s
        add((cluster.first_nic_link + 2 * rails[0],), source, frame)
        add((cluster.first_nic_link + 2 * rails[1] + 1,), target, frame)
        for link in cluster.fabric(cluster.domain_of(source), rails[0], cluster.domain_of(target), rails[1]):
            loads[link] = loads.get(link, 0.0) + frame
    elif sockets[0] != sockets[1]:
        add(routing.search(node, sockets[0], scale_up=False)[sockets[1]], source, 1.0)
    found = cluster.memo[key] = tuple(sorted(loads.items()))
    return found


def _rail(cluster: Cluster, gpu: int) -> int:
    """Return the NIC of a node whose address its host name has: the first."""
    tray = cluster.node_of(gpu) % cluster.nodes_per_domain
    return tray * (cluster.num_nics // cluster.nodes_per_domain)


def links(cluster: Cluster) -> tuple[Link, ...]:
    """Return the machine's links, then one for each node: its cores, of which processes need seconds."""
    cores = float(cluster.spec.node.num_cpu_cores)
    return (*cluster.links, *(Link(f"node{node}.cores", "cores", cores) for node in range(cluster.num_nodes)))


def _tcp_phase(cluster: Cluster, groups: Sequence[tuple[int, ...]], kind: str, tensor_bytes: int) -> Phase:
    """Return gloo's own part: over the memory and the cores of hosts, their loopbacks and the network."""
    first, n, c, one = groups[0], len(groups[0]), coefficients(), work(kind, len(groups[0]), tensor_bytes)
    ranks, cores = max(Counter(map(cluster.node_of, first)).values()), cluster.spec.node.num_cpu_cores
    each_s, own_s = byte_s(one, ranks, c), copy_s(one, c)
    loads: dict[int, float] = {}
    group_s = 0.0
    for group in groups:
        for i, j, num_bytes in sends(kind, n, tensor_bytes):
            for link, share in _process_route(cluster, group[i], group[j]):
                loads[link] = loads.get(link, 0.0) + share * num_bytes
            for gpu in (group[i], group[j]):
                link = cluster.num_links + cluster.node_of(gpu)
                loads[link] = loads.get(link, 0.0) + each_s * num_bytes
        for gpu in group:
            link = cluster.num_links + cluster.node_of(gpu)
            loads[link] = loads.get(link, 0.0) + own_s
        group_s = group_s or max(
            (load / (cluster.bytes_per_s(link) if link < cluster.num_links else cores) for link, load in loads.items()),
            default=0.0,
        )
    spans = any(cluster.node_of(gpu) != cluster.node_of(first[0]) for gpu in first)
    waits_s = latency_s(one, ranks, cores, c, cluster.network_latency_s if spans else 0.0)
    flow_s = thread_s(one, ranks, c)
    entries = tuple((link, loads[link]) for link in sorted(loads) if loads[link] > 0)
    rate = tensor_bytes / flow_s if flow_s else 0.0
    return Phase(waits_s, entries, float(tensor_bytes) if flow_s else 0.0, rate, group_s)


def plan_collective(cluster: Cluster, groups: Sequence[tuple[int, ...]], kind: str, tensor_bytes: int) -> Traffic:
    """Return the traffic of a collective of GPU tensors that all ``groups`` (equal in size) run at the same time.

    A ``shift`` is no collective of a library: its copies between GPUs are NCCL's module's to plan.
    """
    n = len(groups[0])
    if n <= 1:
        return Traffic("none", (), 0)
    if kind == "shift":
        return plan_shift(cluster, groups, tensor_bytes)
    before, after = staged(kind, n, tensor_bytes)
    gpus = tuple(gpu for group in groups for gpu in group)
    out_of = tuple(group[0] for group in groups) if kind == "broadcast" else gpus
    phases = [_tcp_phase(cluster, groups, kind, tensor_bytes)]
    if before:
        phases.insert(0, plan_copy(cluster, out_of, "device_to_host", before).phases[0])
        phases.append(plan_copy(cluster, gpus, "host_to_device", after).phases[0])
    name = f"{ALGORITHMS.get(kind, 'ring')}/TCP"
    return Traffic(name, tuple(phases), work(kind, n, tensor_bytes).sent_bytes)


def plan_point_to_point(
    cluster: Cluster, pairs: Sequence[tuple[int, int]], tensor_bytes: int, num_ranks: int = 2, spans: bool = False
) -> Traffic:
    """gloo sends no GPU tensors: scenarios that would need it are refused."""
    raise AssertionError("gloo has no messages of GPU tensors")


def assumption(cluster: Cluster, groups: Sequence[tuple[int, ...]]) -> str:
    """Return what the time of a collective rests on."""
    if len(groups[0]) < 2:
        return ""
    words = "collectives over gloo: times of its processes are those of 2 cores of an AMD EPYC over the loopback"
    if any(cluster.node_of(gpu) != cluster.node_of(groups[0][0]) for gpu in groups[0]):
        return f"{words}; between nodes by TCP on the first NIC of each, at an MTU of 1500"
    return words
