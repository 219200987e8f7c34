"""Who meets whom on a communicator."""

from __future__ import annotations

import pytest
from engine_world import UNIT, UnitCost, collective, kernel, program, world

from sim.engine.run import run
from sim.errors import DeadlockError
from sim.ir.program import Communicator, Recv, Send


def test_meetings_are_matched_in_the_order_of_issue_whatever_the_stream() -> None:
    """Rank 0 issues "a" first, but reaches it last: it still meets rank 1's first."""
    first = program((0,), kernel(9, stream="x"), collective("a", 2, "x"), collective("b", 3, "y"))
    second = program((1,), collective("a", 2, "z"), collective("b", 3, "z"))
    spans = run(world(first, second), UnitCost()).spans
    moved = [(s.rank, s.name, s.transfer.instance, s.end // UNIT) for s in spans if s.transfer]
    assert moved == [(0, "a", 0, 11), (0, "b", 1, 14), (1, "a", 0, 11), (1, "b", 1, 14)]


def test_each_communicator_counts_its_own_meetings() -> None:
    axes = {"x": "X", "y": "Y"}
    p = program((0, 1), *(collective(n, 1, axis=a) for n, a in (("a", "x"), ("b", "y"), ("c", "x"))), axes=axes)
    both = [Communicator(name, "dp", ((0, 1),), (0,)) for name in ("X", "Y")]
    spans = run(world(p, communicators=both), UnitCost()).spans
    assert [(s.transfer.communicator, s.transfer.instance) for s in spans if s.transfer] == [
        ("X", 0),
        ("Y", 0),
        ("X", 1),
    ]


def test_ranks_of_one_class_send_to_each_other() -> None:
    """A ring inside one class: each sends to the next while it receives from the one before."""
    ring = Communicator("ring", "cp", ((0, 1), (1, 2), (2, 0)), (0,))
    p = program((0, 1, 2), kernel(5), Send("kv", "cp", 4, "out"), Recv("kv", "cp", 4, "in"), axes={"cp": "ring"})
    spans = run(world(p, communicators=[ring]), UnitCost()).spans
    assert [(s.kind, s.stream, s.start, s.end // UNIT) for s in spans if s.transfer] == [
        ("send", "out", 0, 4),
        ("recv", "in", 0, 4),
    ]


def test_a_pair_of_columns_waits_for_every_class_of_both() -> None:
    """Two classes send, one receives: the slower sender decides."""
    pair = Communicator("pp", "pp", ((0, 2), (1, 3)), (0, 1, 2))
    axes = {"pp": "pp"}
    send, recv = Send("h", "pp", 4, "compute"), Recv("h", "pp", 4, "compute")
    programs = [
        program((0,), kernel(1), send, axes=axes),
        program((1,), kernel(7), send, axes=axes),
        program((2, 3), recv, axes=axes),
    ]
    assert run(world(*programs, communicators=[pair]), UnitCost()).end == 11 * UNIT


def test_a_send_without_a_receive_is_named() -> None:
    pair = Communicator("pp", "pp", ((0, 1),), (0, 1))
    first = program((0,), Send("h", "pp", 4, "compute"), axes={"pp": "pp"})
    with pytest.raises(DeadlockError, match=r"send 'h' on pp: ranks \[0\] wait for ranks \[1\]"):
        run(world(first, program((1,), kernel(1)), communicators=[pair]), UnitCost())


def test_many_ranks_are_named_briefly() -> None:
    first, second = program((0,), collective("a", 1)), program(tuple(range(1, 65)), kernel(1))
    with pytest.raises(DeadlockError, match=r"ranks \[0\] wait for ranks \[1, 2, 3, \.\.\., 64\] \(64\)$"):
        run(world(first, second), UnitCost())
