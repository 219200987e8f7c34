"""Stories of one step: who waits for whom, and for how long."""

from __future__ import annotations

import pytest
from engine_world import UNIT, UnitCost, collective, kernel, program, world

from sim.engine.run import run
from sim.engine.segments import LAUNCH_QUEUE_DEPTH
from sim.errors import CollectiveMismatchError, DeadlockError
from sim.ir.program import (
    Alloc,
    Call,
    Communicator,
    Copy,
    Free,
    HostCompute,
    HostWait,
    Instruction,
    Mark,
    Program,
    Record,
    Recv,
    Send,
    Storage,
    UseOn,
    Wait,
)
from sim.ir.timeline import Span, Timeline
from sim.ir.traffic import Link


def times(timeline: Timeline, rank: int = 0) -> dict[str, tuple[float, float]]:
    """Name of a span -> (start, end) in units."""
    return {s.name: (s.start / UNIT, s.end / UNIT) for s in timeline.spans if s.rank == rank}


def span(timeline: Timeline, name: str) -> Span:
    return next(s for s in timeline.spans if s.name == name)


def test_a_kernel_starts_when_it_has_been_issued() -> None:
    timeline = run(world(program((0,), kernel(10, launch=2))), UnitCost())
    assert times(timeline) == {"op": (2, 12)}
    assert timeline.end == 12 * UNIT
    assert timeline.rank_end == {0: 12 * UNIT}


def test_small_kernels_are_bound_by_their_launches() -> None:
    """Launches of 4 at 4, 8, 12; kernels of 1, 6, 1: the second holds up the third until 14."""
    timeline = run(world(program((0,), kernel(1, 4), kernel(6, 4), kernel(1, 4))), UnitCost())
    (only,) = timeline.spans
    assert only.kernels == ((0, 4 * UNIT, 5 * UNIT), (1, 8 * UNIT, 14 * UNIT), (2, 14 * UNIT, 15 * UNIT))
    assert (only.start, only.end) == (4 * UNIT, 15 * UNIT)


def test_kernels_on_two_streams_take_turns_and_keep_their_issue_order() -> None:
    """The first, the side's, the second: 5 each, from 0, 0 and 5 on with the host ahead; two wait for a turn of 5."""
    timeline = run(world(program((0,), kernel(5, 1), kernel(5, 1, "side"), kernel(5, 1))), UnitCost())
    assert [(s.stream, s.start // UNIT, s.end // UNIT) for s in timeline.spans] == [
        ("compute", 1, 6),
        ("compute", 6, 16),
        ("side", 2, 12),
    ]


def test_an_all_gather_overlaps_with_compute_until_an_event_joins_them() -> None:
    """The gather of layer 1 (8 units) runs beside layer 0 (10), that of layer 2 (25) does not fit beside layer 1."""
    instructions: list[Instruction] = []
    for layer, (gather, compute) in enumerate([(3, 10), (8, 10), (25, 10)]):
        instructions += [collective(f"gather{layer}", gather), Record(f"gathered{layer}", "comm")]
        instructions += [Wait(f"gathered{layer}", "compute"), kernel(compute, op=f"layer{layer}")]
    assert times(run(world(program((0, 1), *instructions)), UnitCost())) == {
        "gather0": (0, 3),
        "gather1": (3, 11),
        "gather2": (11, 36),
        "layer0": (3, 13),
        "layer1": (13, 23),
        "layer2": (36, 46),  # exposed: 36 - 23
    }


def test_a_wait_means_the_recording_that_was_the_latest_when_it_was_issued() -> None:
    timeline = run(
        world(
            program(
                (0,),
                kernel(5, op="first"),
                Record("e", "compute"),
                Wait("e", "side"),
                kernel(1, stream="side", op="after first"),
                kernel(5, op="second"),
                Record("e", "compute"),
                Wait("e", "side"),
                kernel(1, stream="side", op="after second"),
                Wait("never recorded", "side"),
            )
        ),
        UnitCost(),
    )
    assert times(timeline)["after first"] == (5, 11)  # the second has its turn before: 5 to 10
    assert times(timeline)["after second"] == (11, 12)


def test_an_event_is_forgotten_by_no_chunk() -> None:
    """The chunk of microbatch 1 waits for what microbatch 0 recorded at its end: at 8, after the side's turn of 1."""
    chunk = (Wait("done", "side"), kernel(1, stream="side"), kernel(7), Record("done", "compute"))
    calls = (Call("c", 0), Call("c", 1))
    p = Program((0,), 0, {"c": chunk}, (), calls, calls)
    side = [s for s in run(world(p), UnitCost()).spans if s.stream == "side"]
    assert [(s.start // UNIT, s.microbatch, s.position) for s in side] == [(0, 0, (0, 1)), (8, 1, (1, 1))]


def test_the_host_waits_for_an_event_and_then_goes_on_issuing() -> None:
    timeline = run(
        world(program((0,), kernel(10, 1), Record("e", "compute"), HostWait("e"), kernel(1, 3, op="late"))), UnitCost()
    )
    assert times(timeline)["late"] == (14, 15)  # 1 + 10, then 3 to launch


def test_who_waits_sees_the_end_a_little_later() -> None:
    """Only where there is something to wait for: the second event is long past."""
    step = (kernel(10, 1), Record("e", "compute"), HostWait("e"), HostWait("e"), kernel(1, 3, op="late"))
    assert times(run(world(program((0,), *step)), UnitCost(wait=2)))["late"] == (16, 17)  # 1 + 10, 2, then 3 to launch


def test_work_of_the_cpu_holds_up_what_is_issued_after_it() -> None:
    timeline = run(world(program((0,), HostCompute("adam", "cpu_adam", 20), kernel(1))), UnitCost())
    assert times(timeline) == {"adam": (0, 20), "op": (20, 21)}
    assert span(timeline, "adam").stream == "host"


def test_a_full_launch_queue_blocks_the_host() -> None:
    """Launches take no time here: launch n needs a place that kernel n - 1024 gives up, and so does what follows it.

    The side's is taken to get its turn after the first kernel, as it would with room in the queue.
    """
    extra = 10
    chain = [kernel(1) for _ in range(LAUNCH_QUEUE_DEPTH + extra)]
    timeline = run(world(program((0,), *chain, kernel(1, stream="side", op="side"))), UnitCost())
    assert times(timeline)["side"] == (extra + 1, extra + 3)
    assert timeline.end == (LAUNCH_QUEUE_DEPTH + extra + 1) * UNIT


def test_copies_share_their_link_with_collectives() -> None:
    """Both want link 0 for 10 units: each gets half until the copy of 4 is through at 8."""
    timeline = run(
        world(program((0, 1), collective("gather", 10), Copy("load", "host_to_device", 4, "copies"))), UnitCost()
    )
    assert times(timeline) == {"gather": (0, 14), "load": (0, 8)}
    (use,) = timeline.link_use
    assert (use.link, use.num_bytes, use.busy) == (0, 14.0, 14 * UNIT)


def test_a_group_of_one_takes_only_its_issue_time() -> None:
    timeline = run(world(program((0,), collective("gather", 10), kernel(1))), UnitCost(issue=2))
    assert times(timeline) == {"gather": (2, 2), "op": (2, 3)}
    assert timeline.link_use == ()


def test_ranks_wait_for_the_last_one_to_arrive() -> None:
    slow = program((0,), kernel(9, stream="comm"), collective("reduce", 4))
    fast = program((1, 2), kernel(1, stream="comm"), collective("reduce", 4))
    timeline = run(world(slow, fast), UnitCost())
    assert times(timeline, 0)["reduce"] == (9, 13)
    assert times(timeline, 1)["reduce"] == (1, 13)
    moved = [s.transfer for s in timeline.spans if s.transfer]
    assert [(t.start // UNIT, t.instance, t.num_ranks, t.communicator) for t in moved] == [(9, 0, 3, "dp")] * 2


def test_marks_name_what_is_issued_after_them() -> None:
    timeline = run(
        world(program((0,), Mark("forward", "a"), kernel(1), kernel(1), Mark("backward", "b"), kernel(1))), UnitCost()
    )
    assert [(s.phase, s.module, len(s.kernels)) for s in timeline.spans] == [("forward", "a", 2), ("backward", "b", 1)]


# --- two stages -----------------------------------------------------------------------------------


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int, forward: int, backward: int) -> list[Instruction]:
    """The passes of a stage under 1F1B, with messages of no length between the stages."""
    out: list[Instruction] = []

    def passes(kind: str, microbatch: int, units: int) -> None:
        upstream, downstream = ("f", "f") if kind == "F" else ("b", "b")
        gets = stage > 0 if kind == "F" else stage < num_stages - 1
        gives = stage < num_stages - 1 if kind == "F" else stage > 0
        if gets:
            out.append(Recv(f"{kind}{microbatch}", f"{upstream}-in", 0, "compute"))
        out.append(kernel(units, op=f"{kind}{microbatch}"))
        if gives:
            out.append(Record(f"{kind}{microbatch}", "compute"))
            out.append(Wait(f"{kind}{microbatch}", f"send-{kind}"))
            out.append(Send(f"{kind}{microbatch}", f"{downstream}-out", 0, f"send-{kind}"))

    warmup = min(num_stages - 1 - stage, num_microbatches)
    for m in range(warmup):
        passes("F", m, forward)
    for m in range(num_microbatches - warmup):
        passes("F", m + warmup, forward)
        passes("B", m, backward)
    for m in range(num_microbatches - warmup, num_microbatches):
        passes("B", m, backward)
    return out


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("num_microbatches", [4, 7])
def test_one_f_one_b_takes_its_closed_form(num_stages: int, num_microbatches: int) -> None:
    """(m + p - 1) (f + b): Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", 2.2.1."""
    forward, backward = 3, 5
    communicators = [
        Communicator(f"{kind}{p}", "pp", ((p, p + 1) if kind == "f" else (p + 1, p),), (p, p + 1))
        for p in range(num_stages - 1)
        for kind in "fb"
    ]
    programs = [
        program(
            (p,),
            *one_f_one_b(p, num_stages, num_microbatches, forward, backward),
            axes={"f-in": f"f{p - 1}", "f-out": f"f{p}", "b-in": f"b{p}", "b-out": f"b{p - 1}"},
            stage=p,
        )
        for p in range(num_stages)
    ]
    timeline = run(world(*programs, communicators=communicators), UnitCost())
    assert timeline.end == (num_microbatches + num_stages - 1) * (forward + backward) * UNIT


# --- defects of a lowering ------------------------------------------------------------------------


def test_a_collective_that_some_never_reach_is_named() -> None:
    first = program((0, 2), collective("grads.6", 1, kind="all_reduce"), collective("grads.7", 1, kind="all_reduce"))
    second = program((1,), collective("grads.6", 1, kind="all_reduce"))
    with pytest.raises(DeadlockError, match=r"^all_reduce 'grads\.7' on dp: ranks \[0, 2\] wait for ranks \[1\]$"):
        run(world(first, second), UnitCost())


def test_communicators_entered_crosswise_are_named() -> None:
    first = program((0,), collective("a", 1, axis="x"), collective("b", 1, axis="y"), axes={"x": "X", "y": "Y"})
    second = program((1,), collective("b", 1, axis="y"), collective("a", 1, axis="x"), axes={"x": "X", "y": "Y"})
    both = [Communicator(name, "dp", ((0, 1),), (0, 1)) for name in ("X", "Y")]
    with pytest.raises(DeadlockError) as raised:
        run(world(first, second, communicators=both), UnitCost())
    assert str(raised.value).splitlines() == [
        "all_gather 'a' on X: ranks [0] wait for ranks [1]",
        "all_gather 'b' on Y: ranks [1] wait for ranks [0]",
    ]


def test_a_host_that_waits_for_ever_is_named() -> None:
    first = program((0,), collective("a", 1), Record("e", "comm"), HostWait("e"))
    with pytest.raises(DeadlockError, match="the host of rank 0 waits for event 'e'"):
        run(world(first, program((1,), kernel(1))), UnitCost())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (collective("b", 5, kind="reduce_scatter"), "ranks [1] reduce_scatter 'b' of 5 bytes"),
        (collective("c", 6), "ranks [1] all_gather 'c' of 6 bytes"),
    ],
)
def test_collectives_that_differ_are_named(other: Instruction, said: str) -> None:
    with pytest.raises(CollectiveMismatchError) as raised:
        run(world(program((0,), collective("a", 5)), program((1,), other)), UnitCost())
    assert str(raised.value) == f"operation 0 on dp: ranks [0] all_gather 'a' of 5 bytes, but {said}"


def test_a_message_of_another_size_is_named() -> None:
    pair = [Communicator("pp", "pp", ((0, 1),), (0, 1))]
    with pytest.raises(
        CollectiveMismatchError, match=r"ranks \[0\] send 'x' of 4 bytes, but ranks \[1\] recv 'y' of 5"
    ):
        run(
            world(
                program((0,), Send("x", "pp", 4, "compute"), axes={"pp": "pp"}),
                program((1,), Recv("y", "pp", 5, "compute"), axes={"pp": "pp"}),
                communicators=pair,
            ),
            UnitCost(),
        )


# --- blocks used on several streams ---------------------------------------------------------------


def test_a_freed_block_comes_back_when_the_other_stream_has_got_there() -> None:
    """Freed at 1 while the gather (issued before) runs until 10: the first launch at or after 10 is the third of
    those that follow, at 1 + 3 * 3."""
    block = Storage("gathered", 1, "temporary")
    instructions = (
        Alloc(block),
        collective("gather", 10),
        UseOn(block, "comm"),
        kernel(1, launch=1),
        Free(block),
        kernel(1, launch=3),
        kernel(1, launch=3),
        Alloc(Storage("other", 1, "temporary")),
        kernel(1, launch=3),
    )
    timeline = run(world(program((0, 1), *instructions)), UnitCost())
    (release,) = timeline.releases
    assert (release.rank, release.freed_at, release.reusable_at) == (0, (0, 4), (0, 8))


def test_a_block_whose_stream_has_drained_is_free_at_once() -> None:
    block = Storage("gathered", 1, "temporary")
    instructions = (collective("gather", 2), UseOn(block, "comm"), kernel(1, launch=5), Free(block))
    assert run(world(program((0, 1), *instructions)), UnitCost()).releases == ()


def test_a_block_used_beyond_the_last_instruction_comes_back_in_the_next_step() -> None:
    block = Storage("gathered", 1, "temporary")
    timeline = run(world(program((0, 1), collective("gather", 9), UseOn(block, "comm"), Free(block))), UnitCost())
    assert [r.reusable_at for r in timeline.releases] == [(1, 0)]


def test_a_use_counts_only_since_the_block_was_allocated() -> None:
    block = Storage("gathered", 1, "temporary")
    instructions = (UseOn(block, "comm"), Alloc(block), collective("gather", 9), Free(block))
    assert run(world(program((0, 1), *instructions)), UnitCost()).releases == ()


def test_links_that_are_not_shared_do_not_slow_each_other() -> None:
    wires = (Link("a", "nvlink", 2.0**12), Link("b", "nvlink", 2.0**12))
    cost = UnitCost(links=wires, routes={"dp": (0,), "host_to_device": (1,)})
    timeline = run(world(program((0, 1), collective("gather", 10), Copy("load", "host_to_device", 4, "copies"))), cost)
    assert times(timeline) == {"gather": (0, 10), "load": (0, 4)}
