"""Collectives as rounds of transfers, their volumes and closed forms. No hardware.

An algorithm is a function from the number of ranks to rounds; a round is transfers that happen together. Data is
``num_chunks`` equal chunks. One set of laws holds them all (tests/laws/test_collective_laws.py): a rank sends only
what it has, nothing is added twice, all end with what the collective promises, and the volumes are those stated here.

``tensor_bytes`` (S) follows nccl-tests: an all-gather's output, a reduce-scatter's input, else the buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Transfer(NamedTuple):
    """Rank ``src`` sends chunk ``chunk`` to ``dst``, which adds it to its own (``reduces``) or replaces it."""

    src: int
    dst: int
    chunk: int
    reduces: bool = False


Rounds = tuple[tuple[Transfer, ...], ...]
Algorithm = Callable[[int], Rounds]


# --- rounds ------------------------------------------------------------------------------------


def ring_all_gather(n: int) -> Rounds:
    """Round k: each rank passes on the chunk it received in round k-1. Rank i starts with chunk i."""
    return tuple(tuple(Transfer(i, (i + 1) % n, (i - k) % n) for i in range(n)) for k in range(n - 1))


def ring_reduce_scatter(n: int) -> Rounds:
    """Round k: each rank passes on the partial sum it received in round k-1. Rank i ends with chunk i."""
    return tuple(tuple(Transfer(i, (i + 1) % n, (i - k - 1) % n, True) for i in range(n)) for k in range(n - 1))


def ring_all_reduce(n: int) -> Rounds:
    """Reduce-scatter, then all-gather.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
    J. Parallel Distrib. Comput. 69(2), 2009, pp. 117-124.
    """
    return ring_reduce_scatter(n) + ring_all_gather(n)


def ring_broadcast(n: int) -> Rounds:
    """The root's n chunks flow down the chain 0, 1, ..., n-1: chunk c is at rank r after round c + r - 1."""
    return tuple(
        tuple(Transfer(r, r + 1, k - r) for r in range(n - 1) if 0 <= k - r < n)
        for k in range(2 * n - 2 if n > 1 else 0)
    )


def ring_reduce(n: int) -> Rounds:
    """The chain n-1, ..., 1, 0, each adding its own: broadcast played backwards. The sum is at rank 0."""
    return tuple(tuple(Transfer(t.dst, t.src, t.chunk, True) for t in round_) for round_ in reversed(ring_broadcast(n)))


def tree_all_reduce(n: int) -> Rounds:
    """Reduce up two complementary binary trees, half of the data (chunks 0 and 1) on each, and broadcast down them.

    Source: Sanders, Speck and Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan",
    Parallel Computing 35(12), 2009; nccl src/graph/trees.cc.
    """
    up: dict[int, list[Transfer]] = {}
    for chunk, parents in enumerate(double_binary_tree(n)):
        for rank, parent in enumerate(parents):
            if parent >= 0:
                up.setdefault(-depth(parents, rank), []).append(Transfer(rank, parent, chunk, True))
    rounds = tuple(tuple(up[level]) for level in sorted(up))
    down = tuple(tuple(Transfer(t.dst, t.src, t.chunk) for t in round_) for round_ in reversed(rounds))
    return rounds + down


def hierarchical_all_reduce(n: int) -> Rounds:
    """On nodes of the largest g that divides n with g*g <= n: reduce-scatter inside each node, ring all-reduce of
    each shard between the nodes, all-gather inside. Rank r is GPU r % g of node r // g.

    Source: Jia et al., "Highly scalable deep learning training system with mixed-precision", 2018 (section 3.3).
    """
    g = max(d for d in range(1, n + 1) if n % d == 0 and d * d <= n)
    nodes = n // g

    def inside(rounds: Rounds) -> Rounds:
        return tuple(
            tuple(
                Transfer(node * g + t.src, node * g + t.dst, t.chunk * nodes + part, t.reduces)
                for node in range(nodes)
                for t in round_
                for part in range(nodes)
            )
            for round_ in rounds
        )

    between = tuple(
        tuple(
            Transfer(t.src * g + local, t.dst * g + local, local * nodes + t.chunk, t.reduces)
            for local in range(g)
            for t in round_
        )
        for round_ in ring_all_reduce(nodes)
    )
    return inside(ring_reduce_scatter(g)) + between + inside(ring_all_gather(g))


def pairwise_all_to_all(n: int) -> Rounds:
    """Round k: rank i sends straight to rank i + k what it has for it. Chunk ``i * n + j`` goes from i to j."""
    return tuple(tuple(Transfer(i, (i + k) % n, i * n + (i + k) % n) for i in range(n)) for k in range(1, n))


def send(n: int) -> Rounds:
    """Rank 0 sends its only chunk to the last rank."""
    return ((Transfer(0, n - 1, 0),),) if n > 1 else ()


ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "all_gather": {"ring": ring_all_gather},
    "reduce_scatter": {"ring": ring_reduce_scatter},
    "all_reduce": {"ring": ring_all_reduce, "tree": tree_all_reduce, "hierarchical": hierarchical_all_reduce},
    "broadcast": {"ring": ring_broadcast},
    "reduce": {"ring": ring_reduce},
    "all_to_all": {"pairwise": pairwise_all_to_all},
    "send": {"direct": send},
}
"""kind -> name -> rounds. Roots are rank 0."""


def num_chunks(kind: str, name: str, n: int) -> int:
    """Return into how many equal chunks an algorithm cuts the data."""
    if kind == "all_to_all":
        return n * n
    if kind == "send":
        return 1
    return 2 if name == "tree" else n


# --- trees -------------------------------------------------------------------------------------


def binary_tree(n: int) -> tuple[int, ...]:
    """Return the parent of each rank (-1 for the root, rank 0) in a tree where odd ranks are leaves.

    A rank's height is its lowest set bit b; its parent has b cleared and the next bit set,
    or, where that is past the end, b cleared only. Source: nccl src/graph/trees.cc, ncclGetBtree.
    """
    parents = [-1]
    for rank in range(1, n):
        bit = rank & -rank
        parent = (rank ^ bit) | (bit << 1)
        parents.append(parent if parent < n else rank ^ bit)
    return tuple(parents)


def double_binary_tree(n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return two trees (parents) in which no rank is inner in both: the second is the first mirrored, or shifted by
    one where n is odd. Source: nccl src/graph/trees.cc, ncclGetDtree."""
    first = binary_tree(n)
    second = [-1] * n
    for rank in range(n):
        if n % 2:
            other = first[(rank - 1) % n]
            second[rank] = (other + 1) % n if other >= 0 else -1
        else:
            other = first[n - 1 - rank]
            second[rank] = n - 1 - other if other >= 0 else -1
    return first, tuple(second)


def depth(parents: tuple[int, ...], rank: int) -> int:
    """Return the number of hops from a rank to the root."""
    hops = 0
    while parents[rank] >= 0:
        rank, hops = parents[rank], hops + 1
    return hops


# --- volumes -----------------------------------------------------------------------------------


def bus_factor(kind: str, n: int) -> float:
    """Return bus bandwidth over algorithm bandwidth, as nccl-tests defines it (doc/PERFORMANCE.md):
    2(n-1)/n for all-reduce, (n-1)/n for all-gather, reduce-scatter and all-to-all, else 1."""
    if n <= 1:
        return 0.0
    if kind in ("all_reduce", "barrier"):
        return 2 * (n - 1) / n
    if kind in ("all_gather", "reduce_scatter", "all_to_all"):
        return (n - 1) / n
    return 1.0


def wire_bytes(kind: str, n: int, tensor_bytes: int) -> int:
    """Return what a rank sends at the least possible volume (a ring's), rounded up: ``bus_factor`` S."""
    if n <= 1:
        return 0
    if kind in ("all_reduce", "barrier"):
        return -(-2 * (n - 1) * tensor_bytes // n)
    if kind in ("all_gather", "reduce_scatter", "all_to_all"):
        return -(-(n - 1) * tensor_bytes // n)
    return tensor_bytes


def bus_bytes_per_s(kind: str, n: int, tensor_bytes: int, time_s: float) -> float:
    """Return the bus bandwidth: the rate at which an ideal ring's busiest wire would have run."""
    return bus_factor(kind, n) * tensor_bytes / time_s if time_s > 0 else 0.0


def ring_hop_bytes(kind: str, n: int, tensor_bytes: float) -> float:
    """Return what crosses one hop (rank to next rank) of a ring during the whole collective.

    2(n-1)/n S for all-reduce, (n-1)/n S for all-gather and reduce-scatter, S for broadcast and reduce (whose chain
    leaves one hop of the circle unused).
    """
    return bus_factor(kind, n) * tensor_bytes


# --- closed forms ------------------------------------------------------------------------------


def ring_s(kind: str, n: int, tensor_bytes: float, alpha_s: float, beta_bytes_per_s: float) -> float:
    """Return the time of a ring collective, in seconds, on otherwise idle and equal hops.

        all-reduce                   T = 2 (n-1) alpha + 2 (n-1)/n S / beta
        all-gather, reduce-scatter   T =   (n-1) alpha +   (n-1)/n S / beta
        broadcast, reduce            T = (2n-2) (alpha + S/n / beta)      cut in n chunks; tends to S/beta in a long one

    ``alpha_s`` is the latency of one hop, ``beta_bytes_per_s`` the bandwidth of one direction of one hop.
    Source: Patarasuk and Yuan 2009 (see ``ring_all_reduce``). Leaves out: the arithmetic, protocols, channels.
    Checked by: tests/unit/test_cost_collective.py, which times the rounds.
    """
    if n <= 1:
        return 0.0
    if kind in ("broadcast", "reduce"):
        return (2 * n - 2) * (alpha_s + tensor_bytes / n / beta_bytes_per_s)
    num_rounds = 2 * (n - 1) if kind in ("all_reduce", "barrier") else n - 1
    return num_rounds * (alpha_s + tensor_bytes / n / beta_bytes_per_s)


def hierarchical_all_reduce_s(
    tensor_bytes: float,
    gpus_per_node: int,
    num_nodes: int,
    alpha_s: tuple[float, float],
    beta_bytes_per_s: tuple[float, float],
) -> float:
    """Return the time of reduce-scatter inside nodes, ring all-reduce of the shards between them, all-gather inside.

        T = 2 ring(g, S; alpha_0, beta_0) + all_reduce(N, S/g; alpha_1, beta_1)

    Index 0 is inside a node, 1 between nodes (bandwidth of one GPU's share of the network).
    Source: Jia et al. 2018 (see ``hierarchical_all_reduce``).
    """
    inside = 2 * ring_s("all_gather", gpus_per_node, tensor_bytes, alpha_s[0], beta_bytes_per_s[0])
    between = ring_s("all_reduce", num_nodes, tensor_bytes / gpus_per_node, alpha_s[1], beta_bytes_per_s[1])
    return inside + between
