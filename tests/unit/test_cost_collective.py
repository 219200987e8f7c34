"""The closed forms equal the time of the rounds that they summarise."""

from __future__ import annotations

import pytest

from sim.cost import collective
from sim.cost.collective import ALGORITHMS, Rounds


def rounds_s(rounds: Rounds, chunk_bytes: float, alpha_s: float, beta_bytes_per_s: float) -> float:
    """Each round lasts as long as the busiest pair: one latency and its chunks one after the other."""
    total = 0.0
    for round_ in rounds:
        pairs: dict[tuple[int, int], int] = {}
        for t in round_:
            pairs[t.src, t.dst] = pairs.get((t.src, t.dst), 0) + 1
        total += alpha_s + max(pairs.values()) * chunk_bytes / beta_bytes_per_s
    return total


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce"])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_ring_closed_form_is_the_time_of_its_rounds(kind: str, n: int) -> None:
    tensor_bytes, alpha_s, beta = 64 * 2**20, 5e-6, 50e9
    by_rounds = rounds_s(ALGORITHMS[kind]["ring"](n), tensor_bytes / n, alpha_s, beta)
    assert collective.ring_s(kind, n, tensor_bytes, alpha_s, beta) == pytest.approx(by_rounds)


def test_hierarchical_closed_form_is_the_time_of_its_rounds() -> None:
    """16 ranks: 4 nodes of 4. Inside (3 + 3 rounds) and between (6 rounds) with equal wires."""
    tensor_bytes, alpha_s, beta = 64 * 2**20, 5e-6, 50e9
    by_rounds = rounds_s(collective.hierarchical_all_reduce(16), tensor_bytes / 16, alpha_s, beta)
    closed = collective.hierarchical_all_reduce_s(tensor_bytes, 4, 4, (alpha_s, alpha_s), (beta, beta))
    assert closed == pytest.approx(by_rounds)


def test_volumes_by_hand() -> None:
    """Eight ranks, 80 bytes: an all-reduce sends 2 x 7/8 x 80 = 140, a gather 70; 81 bytes round up."""
    assert collective.wire_bytes("all_reduce", 8, 80) == 140
    assert collective.wire_bytes("all_gather", 8, 80) == 70
    assert collective.wire_bytes("reduce_scatter", 8, 81) == 71
    assert collective.wire_bytes("broadcast", 8, 80) == 80
    assert collective.wire_bytes("all_reduce", 1, 80) == 0


def test_bus_bandwidth_by_hand() -> None:
    """nccl-tests: 1 GB all-reduced over 8 GPUs in 5 ms is 200 GB/s, times 2 x 7/8: 350 GB/s of bus bandwidth."""
    assert collective.bus_bytes_per_s("all_reduce", 8, 10**9, 5e-3) == pytest.approx(350e9)
    assert collective.bus_bytes_per_s("all_gather", 8, 10**9, 5e-3) == pytest.approx(175e9)


def test_trees_of_eight_are_nccls() -> None:
    """Drawn in nccl src/graph/trees.cc (0-14 there): odd ranks hang below, 0 is the root with one child, 4."""
    assert collective.binary_tree(8) == (-1, 2, 4, 2, 0, 6, 4, 6)
    assert collective.double_binary_tree(8)[1] == (1, 3, 1, 7, 5, 3, 5, -1)
