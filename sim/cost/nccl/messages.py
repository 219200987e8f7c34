"""Channels of messages by NCCL's version, and what one of them carries."""

from __future__ import annotations

from sim.cluster.topology import Cluster
from sim.cost.nccl import terms
from sim.cost.nccl.rings import GB, ring_graph

P2P_CHANNEL_NET_BW = 14
"""GB/s of the network that one channel of a message is given: NCCL_P2P_PER_CHANNEL_NET_BW."""
P2P_PER_BATCH = 8
"""Messages that a channel works on together: NCCL_MAX_DEV_WORK_P2P_PER_BATCH, src/include/device.h."""
P2P_LOCAL_CHANNEL_BYTES_PER_S = 20.3e9
"""What one channel of a message over NVLink sends: nccl-tests sendrecv of xxrjun/nccl-tests-cluster@455de4f (H100, one
node), 128 and 256 MiB over 8 and 16 channels in 825 and 896 us."""
P2P_NET_BATCH_S = 30e-6
"""Latency of each batch of messages to other nodes: the same logs, all-to-all of 80 ranks, 31 to 127 MiB: 10 batches in
280 to 330 us beside what the NICs need; 10 ranks, 2 batches in 95 to 107 us."""
P2P_NET_SHARE = 0.93
"""Share of a NIC's bandwidth that an all-to-all reaches: the same logs at 4 GiB, 0.92 (10 ranks) to 0.94 (80 ranks)."""
P2P_NET_CHANNEL_BYTES_PER_S, P2P_NET_PROXY_BYTES_PER_S = 18.1e9, 94e9
"""What one channel of a message over the network could send alone, and what all of them share (the proxy thread):
1 / (channels x first) + 1 / second. The same logs, sendrecv over 10 nodes of 8 GPUs (1 channel): 15.2 GB/s, of 1 to 4
GPUs (2 channels): 24.9 to 26.2; pairs of nodes (4 channels): 39.7 to 43.2, predicted 40.9."""


def p2p_limit(cluster: Cluster, num_ranks: int, spans: bool) -> int:
    """Return the channels that all messages of a communicator share: those of its rings, up to a power of two.

    The rings are taken to be those of a communicator that fills its nodes as evenly as its size says. Source:
    src/graph/paths.cc, ncclTopoComputeP2pChannels.
    """
    key = ("p2p limit", num_ranks, spans)
    known: int | None = cluster.memo.get(key)
    if known is None:
        if not spans:
            group = tuple(range(min(max(num_ranks, 2), cluster.gpus_per_domain)))
        else:
            nodes = min(cluster.num_domains, num_ranks)
            each = min(max(num_ranks // nodes, 1), cluster.gpus_per_domain)
            group = tuple(d * cluster.gpus_per_domain + g for d in range(min(nodes, 2)) for g in range(each))
        channels = ring_graph(cluster, group).compute_channels if len(group) > 1 else 1
        known = cluster.memo[key] = 1 << (channels - 1).bit_length()
    return known


def _net_channels(cluster: Cluster, num_ranks: int, limit: int) -> int:
    """Return the channels of a message to another node, by NCCL's version.

    One; from 2.12 on two (NCCL_NCHANNELS_PER_NET_PEER), while those of all ranks are no more than four times what
    there are (until 2.17, and again from 2.22 on); from 2.29 on by the NIC's speed. Source: src/graph/paths.cc,
    ncclTopoGetNchannels, and src/enqueue.cc, scheduleP2pTasksToPlan, of the tags.
    """
    version = cluster.spec.nccl
    if version >= (2, 29):
        most = -int(-cluster.nic_line_bytes_per_s // (P2P_CHANNEL_NET_BW * GB))
        return 1 << (max(most, 2) - 1).bit_length()
    if version < (2, 12) or (not (2, 18) <= version < (2, 22) and 2 * num_ranks > 4 * limit):
        return 1
    return 2


def p2p_channels(cluster: Cluster, num_ranks: int, num_messages: int, num_bytes: float, spans: bool) -> int:
    """Return the channels of one of ``num_messages`` messages that a rank of a communicator sends together.

    By the NVLinks of the path, by the speed of the NIC, or 2; over the network fewer where all ranks' messages would
    not fit into one round of batches. Small messages take few; inside a node they take more as parts exceed 32 chunks.
    Source: src/graph/paths.cc, ncclTopoGetNchannels, ncclTopoComputeP2pChannels; src/enqueue.cc,
    scheduleP2pTasksToPlan, addP2pToPlan.
    """
    limit = p2p_limit(cluster, num_ranks, spans)
    if spans:
        most = _net_channels(cluster, num_ranks, limit)
        if cluster.spec.network is not None and cluster.spec.network.channels_per_peer:
            most = cluster.spec.network.channels_per_peer
        while cluster.spec.nccl >= (2, 29) and most * -(-num_ranks // P2P_PER_BATCH) > limit and most > 1:
            most //= 2
        return max(1, min(most, int(-(-num_bytes // (terms.P2P_CHUNK["net"] // 2)))))
    route = cluster.local_route(0, 1)
    fast = route.kind in ("NVL", "NVB")
    wires = min(cluster.node.wires[link].count for link in route.links) if fast else 1
    most = min(1 << (2 * wires - 1).bit_length(), limit)
    least = most
    while cluster.spec.nccl < (2, 23) and most * num_ranks > 4 * limit and most > 1:
        most //= 2
    while least * num_ranks > limit and least > 1:
        least //= 2
    chunk = terms.P2P_CHUNK["nvlink" if fast else "pci"]
    channels = max(1, min(least, int(-(-num_bytes // (chunk // 8)))))
    while num_bytes / channels > 32 * chunk and channels <= most // 2:
        channels *= 2
    return channels
