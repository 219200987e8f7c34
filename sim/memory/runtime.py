"""What a training process holds on the GPU outside of PyTorch's allocator: CUDA context, NCCL's buffers, libraries.

``torch.cuda.memory_reserved()`` knows nothing of it, nvidia-smi and ``cudaMemGetInfo`` count it. NCCL's part is counted
from the communicators that exist and the connections that each of them makes; sizes and rules are those of NCCL 2.30
(src/init.cc, src/transport/p2p.cc, net.cc, nvls.cc, src/channel.cc), default settings.

cuBLAS workspaces are not here: PyTorch takes them from its own allocator, so a program allocates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

KIB, MIB = 2**10, 2**20

LL_BYTES = 8 * 512 * 8 * 16
"""src/include/device.h: NCCL_STEPS x lines per thread and threads of the LL protocol x 16 B lines: 512 KiB."""
LL128_BYTES = 8 * 120 * 640 * 8
"""NCCL_STEPS x 120 elements x 640 threads x 8 B: 4.69 MiB."""
SIMPLE_BYTES = 4 * MIB
"""NCCL_BUFFSIZE, default."""
P2P_ALIGN_BYTES = 2 * MIB
"""Granularity of cuMemCreate, by which src/transport/p2p.cc allocates."""
P2P_RECEIVE_BYTES = -(-(LL_BYTES + LL128_BYTES + SIMPLE_BYTES) // P2P_ALIGN_BYTES) * P2P_ALIGN_BYTES
"""What the receiving end of a connection between GPUs allocates: 10 MiB. With NVLink reads (sm80) the Simple buffer is
at the sender instead, and the two ends together are the same."""
P2P_SEND_BYTES = P2P_ALIGN_BYTES
"""What the sending end allocates, its head and counters: one unit, 2 MiB."""
NET_BYTES = LL128_BYTES + SIMPLE_BYTES
"""One end of a connection over the network with GPUDirect RDMA (src/transport/net.cc; the LL buffer is on the host)."""
NET_SHARED_BYTES = 16 * 128 * KIB
"""Send and receive over the network share, for each channel, 16 slots of the network's chunk (src/transport/net.cc)."""
NVLS_SLOT_BYTES = 8 * 128 * KIB
"""NCCL_STEPS x NCCL_NVLS_CHUNKSIZE; one up, one down, for each head and channel (src/transport/nvls.cc)."""
COLLNET_BYTES = 2 * SIMPLE_BYTES
"""Of each channel on a GPU that hands its node's part to switches that reduce: one to send, one to receive, made with
the communicator (src/transport/coll_net.cc, sharedBuffersInit)."""
MAX_TREE_PEERS = 3
"""NCCL_MAX_TREE_ARITY of a node's head: one up, two down (src/include/device.h)."""


@dataclass(frozen=True, slots=True)
class NcclCommunicator:
    """A communicator of one rank, as NCCL has connected it.

    ``num_ranks``       of the group; ``num_nodes`` that it spans, evenly
    ``link``            between GPUs of a node: ``p2p`` (NVLink, PCIe with peer access) or ``shm`` (through the host)
    ``num_channels``    channels of its collectives
    ``algorithms``      those in use ("ring", "tree", "nvls", "nvls_tree", "pat", "collnet_direct", "collnet_chain",
                        "nvls_sharp"; "pairwise", "direct": messages, counted by their peers; a protocol after a slash
                        is ignored): from NCCL 2.22 on, an algorithm's connections are made when it is first used
    ``nvls_channels``   channels of NVLS, where in use
    ``num_peers``       ranks of the same node to which it sends or from which it receives, ``num_remote_peers`` of
                        other nodes, with ``num_p2p_channels`` channels to each
    ``num_heads``       GPUs of a node that hand parts to switches that reduce (SHARP): one for each NIC; 0: none
    ``gpu_direct``      whether the NIC reads and writes GPU memory; else network buffers are in host memory
    """

    name: str
    num_ranks: int
    num_nodes: int = 1
    link: Literal["p2p", "shm"] = "p2p"
    num_channels: int = 0
    algorithms: tuple[str, ...] = ("ring",)
    nvls_channels: int = 16
    num_peers: int = 0
    num_remote_peers: int = 0
    num_p2p_channels: int = 0
    num_heads: int = 0
    gpu_direct: bool = True


@dataclass(frozen=True, slots=True)
class Outside:
    """GPU memory of a rank's process beside PyTorch's allocator, and in words what that rests on.

    ``least_bytes`` and ``most_bytes`` are the band of the sum.
    """

    cuda_context_bytes: int = 0
    nccl_bytes: int = 0
    library_bytes: int = 0
    least_bytes: int = 0
    most_bytes: int = 0
    assumptions: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return self.cuda_context_bytes + self.nccl_bytes + self.library_bytes


NOTHING = Outside()


def nccl_bytes(communicator: NcclCommunicator) -> int:
    """Return the GPU memory that one communicator's connections hold on one rank.

        channels x (10 MiB x receiving + 2 MiB x sending ends in the node) + 9.1 MB x ends over the network
        + 2 MiB x heads x NVLS channels + 12 MiB x p2p channels x peers + 2 MiB x p2p channels, over the network
        + 8 MiB x channels, with CollNet

    A connection is one channel, one peer, one direction; algorithms share it (src/transport.cc: connected ones are
    skipped). A ring has one receiving and one sending end, a tree and CollNet's chain both with each of its neighbours,
    of which there are two in the chain inside a node, and CollNet's direct exchange two of each with every head, and of
    a head with every GPU (src/transport/coll_net.cc, ncclCollNetDirectBufferSetup). With several nodes one of a node's
    GPUs has a channel's network ends, in turn; of PAT each rank, to and from the ranks 1, 2, 4, ... before and after
    it (src/transport/generic.cc, ncclTransportPatConnect). Leaves out: the work queue and other structures of some MiB,
    registered user buffers.
    """
    c = communicator
    if c.num_ranks < 2:
        return 0
    algorithms = {algorithm.split("/")[0].lower() for algorithm in c.algorithms}
    local_ranks = -(-c.num_ranks // c.num_nodes)
    tree = bool(algorithms & {"tree"})
    chain = bool(algorithms & {"collnet_chain"})
    ring = bool(algorithms - _NO_RING)
    neighbours = min(2 if tree or chain else 1, local_ranks - 1) if ring or tree or chain else 0
    # channels on which this GPU has the node's network end; there a ring has no neighbour inside
    outer = -(-c.num_channels // local_ranks) if c.num_nodes > 1 and (ring or tree) else 0
    inner_ends = c.num_channels * neighbours - (outer if ring and not (tree or chain) and neighbours else 0)
    if "collnet_direct" in algorithms:
        inner_ends += c.num_channels * (c.num_heads - 1 + local_ranks - 1)
    total = 0
    if c.link == "p2p":
        total += inner_ends * (P2P_RECEIVE_BYTES + P2P_SEND_BYTES)
        total += c.num_peers * c.num_p2p_channels * (P2P_RECEIVE_BYTES + P2P_SEND_BYTES)
        if algorithms & {"nvls", "nvls_tree", "nvls_sharp"}:
            total += local_ranks * c.nvls_channels * 2 * NVLS_SLOT_BYTES
    if c.gpu_direct and c.num_nodes > 1:
        net_peers = (1 if ring else 0) + (min(MAX_TREE_PEERS, c.num_nodes - 1) if tree else 0)
        if "nvls_tree" in algorithms:
            net_peers += min(MAX_TREE_PEERS, c.num_nodes - 1)
            outer = max(outer, -(-c.nvls_channels // local_ranks))
        total += outer * net_peers * 2 * NET_BYTES
        if "pat" in algorithms:
            total += c.num_channels * _pat_ends(c.num_nodes, ring) * NET_BYTES
        if c.num_heads:
            total += c.num_channels * COLLNET_BYTES
        if c.num_remote_peers:
            total += c.num_p2p_channels * 2 * NET_SHARED_BYTES
    return total


_NO_RING = {"tree", "nvls", "nvls_tree", "pairwise", "direct", "pat", "collnet_direct", "collnet_chain", "nvls_sharp"}


def _pat_ends(num_nodes: int, ring: bool) -> int:
    """Return the network ends of PAT on one channel: two to send, two to receive for each power of two below the number
    of nodes; one each where before and after are the same rank. A ring has two of those to its neighbours."""
    distances = [1 << k for k in range((num_nodes - 1).bit_length())]
    ends = sum(2 if 2 * distance == num_nodes else 4 for distance in distances)
    return ends - (2 if ring else 0)


def outside_torch(
    cuda_context_bytes: int,
    communicators: Sequence[NcclCommunicator] = (),
    library_bytes: int = 0,
    context_band: tuple[int, int] | None = None,
) -> Outside:
    """Return what one rank's process holds beside PyTorch's allocator.

    ``cuda_context_bytes`` is the context with the kernels that are loaded into it, ``library_bytes`` what libraries
    allocate for themselves, ``context_band`` the range of the context (zeros: unknown). NCCL's band is from rings alone
    to every algorithm of the communicator connected, as before NCCL 2.22.
    """
    counted = least = most = 0
    for communicator in communicators:
        used = nccl_bytes(communicator)
        eager = ("ring", "tree", *(a for a in communicator.algorithms if a.lower().startswith("nvls")))
        counted += used
        least += min(used, nccl_bytes(_with(communicator, ("ring",))))
        most += max(used, nccl_bytes(_with(communicator, eager)))
    low, high = context_band if context_band and any(context_band) else (cuda_context_bytes, cuda_context_bytes)
    words = [f"CUDA context of {_mib(cuda_context_bytes)}, with lazily loaded kernels ({_mib(low)} to {_mib(high)})"]
    if most:
        number = "1 communicator" if len(communicators) == 1 else f"{len(communicators)} communicators"
        words.append(
            f"NCCL buffers of {_mib(counted)} for {number}, counted from their connections "
            f"at NCCL's default buffer sizes ({_mib(least)} to {_mib(most)}, by the algorithms that are connected)"
        )
    if library_bytes:
        words.append(f"{_mib(library_bytes)} allocated by libraries themselves")
    return Outside(
        cuda_context_bytes=cuda_context_bytes,
        nccl_bytes=counted,
        library_bytes=library_bytes,
        least_bytes=low + least + library_bytes,
        most_bytes=high + most + library_bytes,
        assumptions=tuple(words),
    )


def _with(communicator: NcclCommunicator, algorithms: tuple[str, ...]) -> NcclCommunicator:
    return replace(communicator, algorithms=algorithms)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.0f} MiB"
