"""What repeats is skipped: how much of it, and that what does not repeat is not."""

from __future__ import annotations

import pytest
from engine_world import UNIT, UnitCost, collective, kernel, program, world

from sim.engine import steady
from sim.engine.run import run
from sim.errors import CollectiveMismatchError, DeadlockError
from sim.ir.program import Call, Communicator, HostWait, Program, Record, Recv, Send, Wait, World
from sim.ir.timeline import Timeline


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[steady.Cut]:
    """The cuts of the runs of a test."""
    found: list[steady.Cut] = []
    count = steady.Watch.count

    def noted(self: steady.Watch) -> None:
        found.extend(self.cuts)
        count(self)

    monkeypatch.setattr(steady.Watch, "count", noted)
    return found


def accumulating(num_microbatches: int) -> World:
    """One class that computes 3 units for each microbatch, which the host waits for, and reduces at the end."""
    one = program((0, 1), kernel(1, 1), kernel(1, 1), Record("done", "compute"), HostWait("done"))
    chunks = {"pass": one.chunks["all"], "end": (Record("e", "compute"), Wait("e", "comm"), collective("c", 5))}
    step = (*(Call("pass", i) for i in range(num_microbatches)), Call("end"))
    return world(Program((0, 1), 0, chunks, (), step, step, {"dp": "dp"}))


def pipelined(num_microbatches: int) -> World:
    """Two stages of 1 and 3 units that hand each microbatch on, 1 unit a message; each host waits for its GPU."""
    wait = (Record("done", "compute"), HostWait("done"))
    first = (kernel(1, 1), Record("e", "compute"), Wait("e", "p2p"), Send("s", "to", 1, "p2p"),
             Record("sent", "p2p"), HostWait("sent"))  # fmt: skip
    second = (Recv("r", "from", 1, "p2p"), Record("e", "p2p"), Wait("e", "compute"), kernel(3, 0), *wait)
    step = tuple(Call("pass", i) for i in range(num_microbatches))
    programs = (
        Program((0,), 0, {"pass": first}, (), step, step, {"to": "pp"}),
        Program((1,), 1, {"pass": second}, (), step, step, {"from": "pp"}),
    )
    return World(2, programs, {"pp": Communicator("pp", "pp", ((0, 1),), (0, 1))})


PASS = (kernel(1, 1), collective("c", 1), Record("met", "comm"), HostWait("met"))


def same(a: Timeline, b: Timeline) -> bool:
    return (tuple(a.spans), a.end, a.rank_end, a.link_use) == (tuple(b.spans), b.end, b.rank_end, b.link_use)


def test_a_thousand_microbatches_are_a_handful(cuts: list[steady.Cut]) -> None:
    timeline = run(accumulating(1000), UnitCost())
    (cut,) = cuts
    assert cut.period == 3 * UNIT
    assert cut.times > 990
    assert timeline.end == (3 * 1000 + 5) * UNIT
    assert same(timeline, run(accumulating(1000), UnitCost(), skipping=False))


def test_a_pipeline_repeats_itself_once_it_is_full(cuts: list[steady.Cut]) -> None:
    """The second stage takes its message, 1 unit, and computes 3; the first has long waited to send."""
    timeline = run(pipelined(200), UnitCost())
    assert sum(cut.times for cut in cuts) > 150
    assert timeline.end == (2 + (1 + 3) * 200) * UNIT
    assert same(timeline, run(pipelined(200), UnitCost(), skipping=False))


def test_microbatches_keep_their_numbers() -> None:
    spans = list(run(accumulating(50), UnitCost()).spans)
    assert [span.microbatch for span in spans if span.stream == "compute"] == list(range(50))


def test_nothing_is_cut_out_of_what_never_repeats(cuts: list[steady.Cut]) -> None:
    """The faster of two classes that do not meet gets ever farther ahead."""
    chunks = [{"pass": (kernel(units, 1),)} for units in (2, 3)]
    step = tuple(Call("pass", i) for i in range(100))
    programs = [Program((rank,), 0, chunks[rank], (), step, step, {}) for rank in (0, 1)]
    timeline = run(World(2, tuple(programs), {}), UnitCost())
    assert not cuts
    assert timeline.rank_end == {0: (1 + 200) * UNIT, 1: (1 + 300) * UNIT}


def test_figures_of_many_periods_are_those_of_few() -> None:
    """A run of equal periods: 3 units each."""
    timeline = run(accumulating(1000), UnitCost())
    (found,) = timeline.runs(0)
    short = timeline.shortened(0, [found.at_least])
    assert timeline.end - short.end == (found.times - found.at_least) * 3 * UNIT
    assert len(list(short.spans)) == len(timeline.spans) - (found.times - found.at_least)


def test_a_mismatch_is_told_by_its_real_number() -> None:
    """The 41st collective differs; the forty before it repeat."""
    step = (*(Call("pass", i) for i in range(40)), Call("end"))
    programs = tuple(
        Program((rank,), 0, {"pass": PASS, "end": (collective("d", 2 + rank),)}, (), step, step, {"dp": "dp"})
        for rank in (0, 1)
    )
    with pytest.raises(CollectiveMismatchError, match="operation 40 on dp"):
        run(world(*programs), UnitCost())


def test_a_deadlock_is_found_behind_what_repeats() -> None:
    step = (*(Call("pass", i) for i in range(40)), Call("end"))
    ends = ((collective("d", 1), collective("e", 1)), (collective("d", 1),))
    programs = tuple(
        Program((rank,), 0, {"pass": PASS, "end": ends[rank]}, (), step, step, {"dp": "dp"}) for rank in (0, 1)
    )
    with pytest.raises(DeadlockError, match="'e'"):
        run(world(*programs), UnitCost())
