"""What leads from cluster and step to the buffers that NCCL holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cost_nccl import machine

from sim.memory.runtime import NcclCommunicator, nccl_bytes
from sim.outside import _messages
from sim.pipeline import Simulation, simulate
from sim.scenario.load import load_scenario, load_scenario_text

MIB = 2**20


def test_an_all_to_all_connects_every_channel_to_every_peer() -> None:
    """8 H100: 32 channels to 7 peers, a receiving end of 10 MiB and a sending one of 2 MiB each, as NVIDIA/nccl#1685
    lists them; the process grows there from 1.06 to 4.34 GB, other connections included."""
    messages = _messages(machine("dgx-h100"), 0, tuple(range(1, 8)), 8)
    assert messages == {"num_peers": 7, "num_remote_peers": 0, "num_p2p_channels": 32}
    held = nccl_bytes(NcclCommunicator("a2a", 8, num_channels=24, algorithms=("pairwise/Simple",), **messages))
    assert held == 32 * 7 * 12 * MIB
    assert held == pytest.approx(4.34e9 - 1.06e9, rel=0.15)


def test_messages_to_other_nodes_share_the_networks_buffers() -> None:
    """Two ranks, 400 Gbit/s: four channels, each 16 slots of 128 KiB to send and as many to receive."""
    messages = _messages(machine("dgx-h100", 2), 0, (8,), 2)
    assert messages == {"num_peers": 0, "num_remote_peers": 1, "num_p2p_channels": 4}
    held = nccl_bytes(NcclCommunicator("pipeline", 2, 2, algorithms=("direct",), **messages))
    assert held == 4 * 2 * 16 * 128 * 1024


def test_a_communicator_on_several_nodes_has_few_channels_inside_one_too() -> None:
    """16 stages on two nodes of 8 A100: two channels for a NIC of 25 GB/s, and for the neighbour beside it."""
    cluster = machine("dgx-a100-80gb", 2)
    assert _messages(cluster, 3, (2, 4), 16, tuple(range(16)))["num_p2p_channels"] == 2
    assert _messages(cluster, 3, (2, 4), 2)["num_p2p_channels"] == 32


def test_a_stage_in_the_middle_has_two_neighbours(tmp_path: Path) -> None:
    """Four stages in a node: the inner ones have one neighbour more, over 32 channels; the outer ones a ring of 24
    channels between the two ends of the tied embedding."""
    (tmp_path / "pp.yaml").write_text(
        "model: gpt2\ncluster: {node: dgx-h100, num_nodes: 1, num_gpus: 4}\nframework: megatron\n"
        "parallelism: {pp: 4}\n"
        "training: {sequence_length: 512, micro_batch_size: 1, global_batch_size: 4, precision: bf16}\n",
        encoding="utf-8",
    )
    outside = simulate(load_scenario(tmp_path / "pp.yaml", ())).outside
    by_rank = [outside[rank].nccl_bytes for rank in sorted(outside)]
    inner = (32 - 24) * 12 * MIB
    assert [held - by_rank[0] for held in by_rank] == [0, inner, inner, 0]


def folded_and_not(text: str) -> tuple[Simulation, Simulation]:
    """Return the simulation of a scenario with its ranks folded, and with each by itself."""
    scenario = load_scenario_text(text, "cp.yaml")
    return simulate(scenario, fold=True), simulate(scenario, fold=False)


def test_a_rank_of_a_ring_has_two_neighbours_however_it_is_folded() -> None:
    """Four ranks pass keys and values on: each sends to the next, receives from the one before, and is one class."""
    folded, unfolded = folded_and_not(
        "model: gpt2\ncluster: {node: dgx-h100, num_nodes: 1, num_gpus: 4}\nframework: megatron\n"
        "parallelism: {cp: 4, cp_comm: p2p}\n"
        "training: {sequence_length: 512, micro_batch_size: 1, global_batch_size: 1, precision: bf16}\n"
    )
    assert len(folded.world.programs) == 1
    assert {held.nccl_bytes for held in unfolded.outside.values()} == {folded.outside[0].nccl_bytes}
    assert folded.outside[0].nccl_bytes >= 2 * 32 * 12 * MIB  # 32 channels to either of them


def test_ranks_with_other_peers_beside_them_hold_otherwise() -> None:
    """Two groups of three on nodes of two, which exchange heads: a rank has a peer beside it, or both on other nodes.

    A peer on the same node takes 4 channels of 12 MiB, as few as go to the other nodes.
    """
    folded, unfolded = folded_and_not(
        "model: gpt2\ncluster: {node: dgx-h100, num_nodes: 3, num_gpus: 6, network: ib-ndr-400-4}\n"
        "framework: megatron\nparallelism: {cp: 3, cp_comm: a2a}\n"
        "training: {sequence_length: 768, micro_batch_size: 1, global_batch_size: 2, precision: bf16}\n"
    )
    held = {rank: folded.outside[p.rank].nccl_bytes for p in folded.world.programs for rank in p.ranks}
    assert held == {rank: beside.nccl_bytes for rank, beside in unfolded.outside.items()}
    beside = held[0] - held[2]
    assert [held[rank] - held[2] for rank in range(6)] == [beside, beside, 0, 0, beside, beside]
    assert beside == 4 * 12 * MIB
