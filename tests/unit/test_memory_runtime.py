"""What a process holds beside PyTorch's allocator: NCCL's connections counted by hand, and published totals."""

from __future__ import annotations

import pytest

from sim.memory.runtime import (
    NET_BYTES,
    NOTHING,
    P2P_RECEIVE_BYTES,
    P2P_SEND_BYTES,
    NcclCommunicator,
    nccl_bytes,
    outside_torch,
)

MIB = 2**20


def test_the_two_ends_of_a_connection_are_the_allocations_that_nccl_logs() -> None:
    """NVIDIA/nccl issue 1685 lists allocations of 10,485,760 and 2,097,152 B."""
    assert (P2P_RECEIVE_BYTES, P2P_SEND_BYTES) == (10_485_760, 2_097_152)


@pytest.mark.parametrize(
    ("communicator", "num_bytes"),
    [
        # alone: nothing to connect
        (NcclCommunicator("dp", 1, num_channels=24), 0),
        # a ring: one end of each kind a channel
        (NcclCommunicator("dp", 8, num_channels=24), 24 * 12 * MIB),
        # a tree's chain: both ends with both neighbours, the ring's among them
        (NcclCommunicator("dp", 8, num_channels=24, algorithms=("ring/ll", "tree/simple")), 24 * 24 * MIB),
        # of two GPUs each is the other's only neighbour
        (NcclCommunicator("dp", 2, num_channels=24, algorithms=("ring", "tree")), 24 * 12 * MIB),
        # NVLS: 8 heads x 16 channels x (up and down) x 1 MiB
        (NcclCommunicator("dp", 8, num_channels=0, algorithms=("nvls/simple",)), 256 * MIB),
        # all to all in one node, as issue 1685 measured it: 32 channels x 7 peers, 1.06 -> about 4 GB
        (NcclCommunicator("ep", 8, algorithms=(), num_peers=7, num_p2p_channels=32), 32 * 7 * 12 * MIB),
        # through host memory: the buffers are there
        (NcclCommunicator("dp", 8, link="shm", num_channels=2), 0),
        # 8 nodes of 8: on 2 of 16 channels this GPU has the network's ends
        (NcclCommunicator("dp", 64, 8, num_channels=16), 14 * 12 * MIB + 2 * 2 * NET_BYTES),
        # one GPU a node: all connections go over the network
        (NcclCommunicator("dp", 8, 8, num_channels=4), 4 * 2 * NET_BYTES),
        (NcclCommunicator("dp", 8, 8, num_channels=4, gpu_direct=False), 0),
        # pipeline neighbours in other nodes: 16 slots of 128 KiB a channel and direction, whatever their number
        (
            NcclCommunicator("pp", 4, 4, algorithms=(), num_remote_peers=2, num_p2p_channels=8),
            8 * 2 * 2 * MIB,
        ),
    ],
)
def test_nccl_bytes(communicator: NcclCommunicator, num_bytes: int) -> None:
    assert nccl_bytes(communicator) == num_bytes


def test_the_sum_and_its_band() -> None:
    """Rings at least; with trees connected as well, as before NCCL 2.22, twice as much inside a node."""
    communicators = [NcclCommunicator(name, 8, num_channels=10) for name in ("dp", "world")]
    outside = outside_torch(500 * MIB, communicators, 7 * MIB, (450 * MIB, 650 * MIB))
    assert outside.total_bytes == (500 + 240 + 7) * MIB
    assert (outside.least_bytes, outside.most_bytes) == ((450 + 240 + 7) * MIB, (650 + 480 + 7) * MIB)
    assert len(outside.assumptions) == 3
    assert "240 MiB for 2 communicators" in outside.assumptions[1]


def test_an_unknown_band_is_the_value_itself() -> None:
    outside = outside_torch(500 * MIB, context_band=(0, 0))
    assert outside.least_bytes == outside.most_bytes == outside.total_bytes == 500 * MIB
    assert NOTHING.total_bytes == 0
