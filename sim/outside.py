"""What a process holds on the GPU outside PyTorch's allocator: from cluster and step to memory's plain values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

from sim.catalog.schema import GpuFacts
from sim.cluster.topology import Cluster
from sim.cost.nccl.messages import p2p_channels
from sim.cost.nccl.rings import RingGraph, ring_graph
from sim.cost.nccl.tuning import nvls_channels
from sim.ir.program import Collective, Program, Recv, Send, World
from sim.ir.timeline import Timeline
from sim.memory.runtime import NcclCommunicator, Outside, outside_torch

_PEER_TO_PEER = ("NVL", "NVB", "C2C", "PIX", "PXB")
"""Paths on which NCCL writes into the peer's memory; on longer ones it goes through shared host memory (paths.cc)."""


_ENDS = (".send", ".recv")


def outside_of(world: World, timeline: Timeline, cluster: Cluster, gpu: GpuFacts) -> dict[int, Outside]:
    """Return, for each representative rank, CUDA context and the NCCL buffers of the communicators that it uses.

    gloo's buffers and a plain network's are not on the GPU.
    """
    used = _algorithms(timeline) if cluster.spec.backend == "nccl" else None
    return {
        program.rank: outside_torch(
            gpu.cuda_context_bytes,
            tuple(_communicators(world, program, _of_rank(used, program.rank), cluster)) if used is not None else (),
            context_band=gpu.cuda_context_band_bytes,
        )
        for program in world.programs
    }


def _algorithms(timeline: Timeline) -> dict[tuple[int, str], list[str]]:
    """Return what each rank used on each axis: NCCL connects an algorithm when it first runs."""
    found: dict[tuple[int, str], dict[str, None]] = {}
    for span in timeline.distinct():
        transfer = span.transfer
        if transfer is None or transfer.num_ranks < 2:
            continue
        if span.kind == "collective":
            found.setdefault((span.rank, transfer.axis), {})[transfer.algorithm] = None
        elif span.kind in ("send", "recv"):
            found.setdefault((span.rank, f"{transfer.axis}.{span.kind}"), {})[transfer.algorithm] = None
    return {key: list(names) for key, names in found.items()}


def _of_rank(used: dict[tuple[int, str], list[str]], rank: int) -> Callable[[str], Sequence[str]]:
    return lambda axis: used.get((rank, axis), ())


def connections(world: World, cluster: Cluster) -> list[Hashable]:
    """Return, for each class, what the buffers of its communicators depend on beside the algorithms.

    Equal for classes that hold as much if they run the same.
    """
    if cluster.spec.backend != "nccl":
        return [()] * len(world.programs)
    known: dict[int, dict[str, None]] = {}
    found: list[Hashable] = []
    for program in world.programs:
        if (sending := known.get(id(program.chunks))) is None:
            sending = known[id(program.chunks)] = dict.fromkeys(_sending(program))
        run = {
            axis: ("pairwise",) if axis in sending else () if axis.endswith(_ENDS) else ("ring",)
            for axis in program.axes
        }
        held = _communicators(world, program, run.__getitem__, cluster)
        found.append(tuple([replace(communicator, name="") for communicator in held]))
    return found


def _sending(program: Program) -> Iterator[str]:
    """Yield the axes on which a program sends to, or receives from, one rank by itself."""
    for chunk in {id(chunk): chunk for chunk in program.chunks.values()}.values():
        for step in chunk:
            if isinstance(step, (Send, Recv)) or (isinstance(step, Collective) and step.kind == "all_to_all"):
                yield step.axis


def _communicators(
    world: World, program: Program, algorithms_on: Callable[[str], Sequence[str]], cluster: Cluster
) -> Iterator[NcclCommunicator]:
    """Yield the communicators of a class's first rank; ``algorithms_on`` an axis: what ran there, nothing if none."""
    peers: dict[int, None] = {}
    together: tuple[int, ...] = ()
    for axis, name in program.axes.items():
        algorithms = algorithms_on(axis)
        if not algorithms:
            continue
        if axis.endswith(_ENDS):
            communicator = world.communicators[name]
            together = together or next((g for g in communicator.within if program.rank in g), ())
            own, other = (0, 1) if axis.endswith(".send") else (1, 0)  # one name may be of what it sends and receives
            peers[next(g[other] for g in communicator.groups if g[own] == program.rank)] = None
            continue
        group = next(g for g in world.communicators[name].groups if program.rank in g)
        graph = ring_graph(cluster, group)
        local = max((gpus for _, gpus in graph.nodes), key=len)
        near = len(local) < 2 or cluster.route(local[0], local[1]).kind in _PEER_TO_PEER
        sends = any(algorithm.startswith("pairwise") for algorithm in algorithms)
        channels, heads = _collnet(cluster, graph)
        yield NcclCommunicator(
            name=name,
            num_ranks=len(group),
            num_nodes=graph.num_nodes,
            link="p2p" if near else "shm",
            num_channels=channels,
            nvls_channels=nvls_channels(cluster, graph.num_nodes),
            algorithms=tuple(algorithms),
            num_heads=heads,
            gpu_direct=cluster.gpudirect,
            **(
                _messages(cluster, program.rank, tuple(g for g in group if g != program.rank), len(group))
                if sends
                else {}
            ),
        )
    if peers:
        near = all(cluster.route(program.rank, peer).kind in (*_PEER_TO_PEER, "NET", "PXN") for peer in peers)
        yield NcclCommunicator(
            name="pipeline",
            num_ranks=1 + len(peers),
            num_nodes=len({cluster.domain_of(rank) for rank in (program.rank, *peers)}),
            link="p2p" if near else "shm",
            algorithms=("direct",),
            gpu_direct=cluster.gpudirect,
            **_messages(cluster, program.rank, tuple(peers), max(len(together), 2), together),
        )


def _collnet(cluster: Cluster, graph: RingGraph) -> tuple[int, int]:
    """Return the channels of a communicator, and the GPUs of a node that have buffers for switches that reduce: those
    are made whatever runs, where there are such switches."""
    if not cluster.sharp or graph.num_nodes < 2:
        return graph.compute_channels, 0
    from sim.cost.nccl.collnet import num_channels, num_heads

    return num_channels(cluster, graph), num_heads(graph)


def _messages(
    cluster: Cluster, rank: int, peers: tuple[int, ...], num_ranks: int, together: tuple[int, ...] = ()
) -> dict[str, int]:
    """Return to how many ranks of its node and of others a rank sends, and over how many channels each: all that a peer
    may get are connected when the first message goes (nccl src/enqueue.cc, p2pTaskAppend). ``together``: the ranks of
    their communicator, where those are more than the peers; on several nodes it has few channels for any of them."""
    near = sum(cluster.domain_of(peer) == cluster.domain_of(rank) for peer in peers)
    spans = any(cluster.domain_of(other) != cluster.domain_of(rank) for other in (*peers, *together))
    channels = p2p_channels(cluster, num_ranks, 1, 2**40, spans)
    return {"num_peers": near, "num_remote_peers": len(peers) - near, "num_p2p_channels": channels}
