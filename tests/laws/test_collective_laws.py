"""Every collective algorithm obeys one set of laws, whatever the number of ranks."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.catalog import load
from sim.cluster.topology import Cluster, build_cluster
from sim.cost import collective
from sim.cost.collective import ALGORITHMS, Rounds, num_chunks
from sim.cost.nccl.plan import plan_collective
from sim.scenario.schema import ClusterSpec

Held = dict[tuple[int, int], frozenset[int]]
"""(rank, chunk) -> the ranks whose contributions it holds."""

ALL = [(kind, name) for kind, algorithms in ALGORITHMS.items() for name in algorithms]
ranks = st.integers(min_value=1, max_value=24)


def start(kind: str, n: int, chunks: int) -> Held:
    """What each rank holds before: its part, or its own whole contribution, or nothing."""
    everyone = range(n)
    if kind == "all_gather":
        return {(r, r): frozenset({r}) for r in everyone}
    if kind in ("broadcast", "send"):
        return {(0, c): frozenset({0}) for c in range(chunks)}
    if kind == "all_to_all":
        return {(c // n, c): frozenset({c // n}) for c in range(chunks)}
    return {(r, c): frozenset({r}) for r in everyone for c in range(chunks)}


def promised(kind: str, n: int, chunks: int) -> Held:
    """What the collective promises to have done at the end, at least."""
    everyone = frozenset(range(n))
    places = [(r, c) for r in range(n) for c in range(chunks)]
    return {
        "all_gather": {(r, c): frozenset({c}) for r, c in places},
        "reduce_scatter": {(r, c): everyone for r, c in places if r == c},
        "all_reduce": dict.fromkeys(places, everyone),
        "broadcast": dict.fromkeys(places, frozenset({0})),
        "reduce": {(r, c): everyone for r, c in places if r == 0},
        "all_to_all": {(r, c): frozenset({c // n}) for r, c in places if r == c % n},
        "send": {(n - 1, 0): frozenset({0})},
    }[kind]


def play(rounds: Rounds, held: Held) -> Held:
    """Play rounds; a round reads what was held before it. A reducing transfer may add nothing twice."""
    held = dict(held)
    for round_ in rounds:
        sent = [(t, held.get((t.src, t.chunk))) for t in round_]
        for transfer, what in sent:
            assert what is not None, f"{transfer} sends what its rank does not have"
            place = (transfer.dst, transfer.chunk)
            if transfer.reduces:
                assert not held[place] & what, f"{transfer} adds something twice"
                held[place] |= what
            else:
                held[place] = what
    return held


@pytest.mark.parametrize(("kind", "name"), ALL)
@settings(max_examples=24, deadline=None)
@given(n=ranks)
def test_every_algorithm_keeps_its_promise(kind: str, name: str, n: int) -> None:
    chunks = num_chunks(kind, name, n)
    end = play(ALGORITHMS[kind][name](n), start(kind, n, chunks))
    for place, contributions in promised(kind, n, chunks).items():
        assert end[place] == contributions


@pytest.mark.parametrize(("kind", "name"), ALL)
@settings(max_examples=24, deadline=None)
@given(n=ranks)
def test_nobody_talks_to_itself(kind: str, name: str, n: int) -> None:
    assert all(t.src != t.dst for round_ in ALGORITHMS[kind][name](n) for t in round_)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce", "all_to_all"])
@settings(max_examples=24, deadline=None)
@given(n=ranks, scale=st.integers(min_value=1, max_value=10**6))
def test_the_busiest_rank_sends_the_wire_bytes(kind: str, n: int, scale: int) -> None:
    """``wire_bytes`` is what the first algorithm's busiest rank sends: rounds times the bytes of a chunk.

    An all-to-all's tensor is one rank's buffer of n chunks; all others' is cut in ``num_chunks``.
    """
    name, algorithm = next(iter(ALGORITHMS[kind].items()))
    chunks = num_chunks(kind, name, n) if kind != "all_to_all" else n
    sent = [0] * n
    for round_ in algorithm(n):
        for transfer in round_:
            sent[transfer.src] += scale
    assert max(sent) == collective.wire_bytes(kind, n, scale * chunks)


@settings(max_examples=24, deadline=None)
@given(n=ranks)
def test_all_all_reduces_move_the_least_or_the_trees_volume(n: int) -> None:
    """Ring and hierarchical: 2(n-1)/n S from each rank, n of them; trees: (n-1) edges up and down on each half."""
    for name, algorithm in ALGORITHMS["all_reduce"].items():
        total = sum(len(round_) for round_ in algorithm(n))
        chunks = num_chunks("all_reduce", name, n)
        assert total == 2 * (n - 1) * chunks


@given(n=st.integers(min_value=1, max_value=600))
def test_the_two_trees_span_and_complement(n: int) -> None:
    """Both reach their one root from everywhere in O(log n) hops; nobody has two children in both."""
    for parents in collective.double_binary_tree(n):
        assert list(parents).count(-1) == 1
        assert all(collective.depth(parents, rank) <= n.bit_length() for rank in range(n))
    first, second = collective.double_binary_tree(n)
    for rank in range(n):
        assert first.count(rank) <= 2 and second.count(rank) <= 2
        if n % 2 == 0:
            assert min(first.count(rank), second.count(rank)) <= 1


@given(
    n=st.integers(min_value=2, max_value=64),
    tensor_bytes=st.integers(min_value=1, max_value=2**34),
    time_s=st.floats(min_value=1e-6, max_value=10),
)
def test_bus_bandwidth_is_wire_bytes_over_time(n: int, tensor_bytes: int, time_s: float) -> None:
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        rate = collective.bus_bytes_per_s(kind, n, tensor_bytes, time_s)
        assert rate * time_s <= collective.wire_bytes(kind, n, tensor_bytes) * (1 + 1e-12)
        assert rate * time_s > collective.wire_bytes(kind, n, tensor_bytes) - 1 - 1e-6 * tensor_bytes


# --- on machines -------------------------------------------------------------------------------


@cache
def machine(name: str, num_nodes: int) -> Cluster:
    node = load.node(name)
    network = load.network(node.default_network)
    num_gpus = num_nodes * node.num_gpus
    return build_cluster(
        ClusterSpec(node=node, gpu=load.gpu(node.gpu), network=network, num_nodes=num_nodes, num_gpus=num_gpus)
    )


MACHINES = ["dgx-h100", "dgx-a100-80gb", "dgx-1", "mi300x-8", "hgx-a100-4-80gb", "pcie-8x-4090", "p4d", "gb200-nvl72"]
kinds = st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all"])
sizes = st.integers(min_value=8, max_value=2**32)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(MACHINES), kind=kinds, tensor_bytes=sizes)
def test_wires_balance_and_carry_the_whole_volume(data: st.DataObject, name: str, kind: str, tensor_bytes: int) -> None:
    """For any group on any machine: what enters a switch, NIC or leaf leaves it, and the wires out of all GPUs carry
    no less than n times what an ideal algorithm sends (a broadcast's chain: n-1 times).
    """
    cluster = machine(name, data.draw(st.integers(min_value=1, max_value=3), label="nodes"))
    some = st.lists(st.integers(0, cluster.num_gpus - 1), min_size=2, max_size=cluster.num_gpus, unique=True)
    group = tuple(data.draw(some, label="group"))
    traffic = plan_collective(cluster, [group], kind, tensor_bytes)
    loads = dict(traffic.phases[0].loads)
    ends = {d["index"]: (a, b) for a, b, d in cluster.graph.edges(data=True) if d["kind"] != "memory"}
    devices = dict(cluster.graph.nodes(data="kind"))
    into: Counter[str] = Counter()
    out: Counter[str] = Counter()
    for link, num_bytes in loads.items():
        if link in ends:
            out[ends[link][0]] += num_bytes
            into[ends[link][1]] += num_bytes
    nvls = traffic.algorithm.startswith("nvls")
    for device in [*into, *out]:
        if devices[device] in ("pcie-switch", "nic", "leaf", "spine") or (devices[device] == "nvswitch" and not nvls):
            assert into[device] == pytest.approx(out[device])
    sent = sum(num_bytes for device, num_bytes in out.items() if devices[device] == "gpu")
    n = len(group)
    parts = n - 1 if kind in ("broadcast", "reduce") else n
    ideal = collective.bus_factor(kind, n) * tensor_bytes * parts
    if not nvls:
        assert sent >= ideal * (1 - 1e-9)
    assert traffic.wire_bytes == collective.wire_bytes(kind, n, tensor_bytes)


@settings(max_examples=30, deadline=None)
@given(kind=kinds, tensor_bytes=sizes, shift=st.integers(min_value=1, max_value=3))
def test_moving_a_group_to_other_nodes_moves_its_traffic(kind: str, tensor_bytes: int, shift: int) -> None:
    """A symmetry of the cluster changes nothing: the same group ``shift`` nodes further, the same loads there
    (and on the leaves, which all eight nodes share)."""
    cluster = machine("dgx-h100", 8)
    group = tuple(range(4, 20))
    moved = tuple(gpu + 8 * shift for gpu in group)
    here = plan_collective(cluster, [group], kind, tensor_bytes)
    there = plan_collective(cluster, [moved], kind, tensor_bytes)
    nodes, offset = 8 * cluster.links_per_domain, shift * cluster.links_per_domain
    shifted = {link + offset if link < nodes else link: b for link, b in here.phases[0].loads}
    assert shifted == pytest.approx(dict(there.phases[0].loads))
    assert (here.algorithm, here.phases[0].latency_s) == (there.algorithm, there.phases[0].latency_s)


@settings(max_examples=30, deadline=None)
@given(kind=kinds, tensor_bytes=sizes)
def test_groups_together_carry_the_sum_of_groups_alone(kind: str, tensor_bytes: int) -> None:
    cluster = machine("dgx-a100-80gb", 3)
    groups = [tuple(range(i, 24, 8)) for i in range(8)]
    together = dict(plan_collective(cluster, groups, kind, tensor_bytes).phases[0].loads)
    total: Counter[int] = Counter()
    for group in groups:
        total.update(dict(plan_collective(cluster, [group], kind, tensor_bytes).phases[0].loads))
    assert together == pytest.approx(dict(total))
