"""Classes are one where wires carry the same, and apart where they do not."""

from __future__ import annotations

import pytest

from sim.ir.program import Call, Collective, Communicator, Program, World
from sim.ir.traffic import Link, Phase, Traffic
from sim.parallel.alike import alike
from sim.pipeline import simulate
from sim.scenario.load import load_scenario

GATHER = Collective("gather", "all_gather", "dp", 8, "bf16", "dp")
SUM = Collective("sum", "all_reduce", "tp", 8, "bf16", "tp")
CHUNKS = {"pass": (GATHER, SUM)}
CALLS = (Call("pass"),)


def world(lone: bool = False) -> World:
    """Four classes of a rank each, on two axes: (0, 1) and (2, 3) sum, (0, 2) and (1, 3) gather."""
    names = [("dp@0", "tp@0"), ("dp@1", "tp@0"), ("dp@0", "tp@2"), ("dp@1", "tp@2")]
    programs = [
        Program((rank,), 0, CHUNKS, (), CALLS, CALLS, {"dp": dp, "tp": tp}) for rank, (dp, tp) in enumerate(names)
    ]
    communicators = {
        "dp@0": Communicator("dp@0", "dp", ((0, 2),), (0, 2), lone),
        "dp@1": Communicator("dp@1", "dp", ((1, 3),), (1, 3), lone),
        "tp@0": Communicator("tp@0", "tp", ((0, 1),), (0, 1)),
        "tp@2": Communicator("tp@2", "tp", ((2, 3),), (2, 3)),
    }
    return World(4, tuple(programs), communicators)


def colours(
    loads: dict[str, tuple[tuple[int, float], ...]],
    rates: tuple[float, ...],
    lone: bool = False,
    apart: tuple[int, ...] | None = None,
) -> list[int]:
    links = [Link(str(number), "nvlink", rate) for number, rate in enumerate(rates)]

    def traffic_of(transfer, communicator, ranks):
        return Traffic("ring", (Phase(0.0, loads[communicator.name]),), 4)

    return alike(world(lone), traffic_of, links, apart)


EQUAL = {"dp@0": ((0, 4.0),), "dp@1": ((1, 4.0),), "tp@0": ((0, 2.0), (1, 2.0)), "tp@2": ((2, 2.0), (3, 2.0))}


def test_what_loads_alike_links_alike_is_one() -> None:
    """Both gathers load a link that a sum of the first two ranks loads too; the other sum has its links to itself."""
    assert colours(EQUAL, (1.0, 1.0, 1.0, 1.0)) == [0, 0, 1, 1]
    both = {**EQUAL, "dp@0": ((0, 4.0), (2, 4.0)), "dp@1": ((1, 4.0), (3, 4.0))}
    assert colours(both, (1.0, 1.0, 1.0, 1.0)) == [0, 0, 0, 0]


def test_what_is_apart_stays_apart_and_so_does_who_meets_it() -> None:
    """The first rank sums with the second and gathers with the third: none is like the fourth, nor like another."""
    both = {**EQUAL, "dp@0": ((0, 4.0), (2, 4.0)), "dp@1": ((1, 4.0), (3, 4.0))}
    assert colours(both, (1.0, 1.0, 1.0, 1.0), apart=(7, 7, 7, 7)) == [0, 0, 0, 0]
    assert len(set(colours(both, (1.0, 1.0, 1.0, 1.0), apart=(1, 0, 0, 0)))) == 4


@pytest.mark.parametrize("change", [
    {"dp@1": ((1, 5.0), (3, 4.0))},  # more bytes
    {"dp@1": ((1, 4.0),)},  # fewer links
    {"dp@1": ((1, 4.0), (2, 4.0))},  # a link that the other gather loads as well
])  # fmt: skip
def test_other_loads_are_told_apart(change: dict[str, tuple[tuple[int, float], ...]]) -> None:
    both = {**EQUAL, "dp@0": ((0, 4.0), (2, 4.0)), "dp@1": ((1, 4.0), (3, 4.0))}
    assert len(set(colours({**both, **change}, (1.0, 1.0, 1.0, 1.0)))) > 1


def test_a_slower_link_is_told_apart() -> None:
    both = {**EQUAL, "dp@0": ((0, 4.0), (2, 4.0)), "dp@1": ((1, 4.0), (3, 4.0))}
    assert colours(both, (1.0, 0.5, 1.0, 0.5)) == [0, 1, 0, 1]
    assert colours(both, (1.0, 0.5, 1.0, 1.0)) == [0, 1, 2, 3]


def test_how_lone_transfers_load_links_makes_no_difference() -> None:
    both = {**EQUAL, "dp@0": ((0, 4.0), (2, 4.0)), "dp@1": ((1, 5.0), (3, 4.0))}
    assert colours(both, (1.0, 1.0, 1.0, 1.0), lone=True) == [0, 0, 0, 0]


def test_tensor_parallel_groups_smaller_than_a_node_are_one_class_a_stage() -> None:
    """Rings of two ranks a node go through both of them and leave it at either: all wires carry the same."""
    scenario = load_scenario("scenarios/7b_ddp.yaml", [
        "framework=megatron", "parallelism={tp: 4, pp: 2, sp: true}", "cluster.num_nodes=4", "cluster.num_gpus=32",
        "training.global_batch_size=16", "training.micro_batch_size=1",
        "model={config: llama-2-7b, num_hidden_layers: 2, vocab_size: 512}",
    ])  # fmt: skip
    assert [len(program.ranks) for program in simulate(scenario).world.programs] == [16, 16]
