"""Each instant of a step belongs to one part, and the parts add up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim.ir.timeline import Span, SpanKind, Timeline, Transfer
from sim.report.metrics import communication, length, merge, slowest_rank, step_parts, subtract
from sim.units import Ticks


def span(kind: SpanKind, start: int, end: int, *, phase: str = "forward", began: int | None = None) -> Span:
    transfer = None
    if began is not None:
        transfer = Transfer("all_gather", "dp", 4, 400, 300, "ring", 0, Ticks(began))
    stream = "compute" if kind == "compute" else "comm"
    return Span(0, stream, kind, kind, Ticks(start), Ticks(end), phase, "", 0, (0, 0), (), transfer)


def timeline(*spans: Span) -> Timeline:
    end = Ticks(max(s.end for s in spans))
    return Timeline(spans, end, {0: end})


def test_communication_under_compute_is_not_exposed():
    parts = step_parts(timeline(span("compute", 0, 100), span("collective", 20, 80, began=20)), 0)
    assert parts == {"compute": 100, "exposed_communication": 0, "bubble": 0, "optimizer": 0, "other": 0}


def test_what_sticks_out_is_exposed_and_gaps_are_other():
    parts = step_parts(
        timeline(span("compute", 0, 50), span("collective", 40, 70, began=40), span("compute", 90, 100)), 0
    )
    assert parts == {"compute": 60, "exposed_communication": 20, "bubble": 0, "optimizer": 0, "other": 20}


def test_a_message_that_was_not_sent_yet_is_a_bubble():
    parts = step_parts(timeline(span("recv", 0, 50, began=30), span("compute", 50, 60)), 0)
    assert parts == {"compute": 10, "exposed_communication": 20, "bubble": 30, "optimizer": 0, "other": 0}


def test_a_collective_that_waits_for_a_slower_rank_is_communication():
    parts = step_parts(timeline(span("collective", 0, 50, began=30), span("compute", 50, 60)), 0)
    assert parts["exposed_communication"] == 50
    assert parts["bubble"] == 0


def test_optimizer_kernels_are_their_own_part():
    parts = step_parts(timeline(span("compute", 0, 10), span("compute", 10, 15, phase="optimizer")), 0)
    assert (parts["compute"], parts["optimizer"]) == (10, 5)


def test_totals_by_kind_and_axis():
    line = timeline(span("compute", 0, 50), span("collective", 40, 70, began=40), span("collective", 70, 80, began=75))
    (total,) = communication(line, 0)
    assert (total.count, total.tensor_bytes, total.wire_bytes) == (2, 800, 600)
    assert total.time == 30 + 5
    assert total.exposed == 20 + 5


def test_the_slowest_rank_is_the_lowest_of_those_that_tie():
    line = Timeline((), Ticks(9), {4: Ticks(9), 2: Ticks(9), 0: Ticks(8)})
    assert slowest_rank(line) == 2


intervals = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda p: (min(p), max(p))), max_size=12)


@given(intervals, intervals)
def test_intervals_are_sets_of_instants(left, right):
    def instants(pairs):
        return {t for start, end in pairs for t in range(start, end)}

    assert instants(merge(left)) == instants(left)
    assert length(merge(left)) == len(instants(left))
    assert instants(subtract(merge(left), merge(right))) == instants(left) - instants(right)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["compute", "collective", "recv", "copy", "host"]), st.integers(0, 99), st.integers(1, 50)
        ),
        min_size=1, max_size=15,
    ),
    st.sampled_from(["forward", "optimizer"]),
)  # fmt: skip
def test_the_parts_add_up_to_the_step(pieces, phase):
    spans = [
        span(
            kind, start, start + size, phase=phase, began=start + size // 2 if kind in ("collective", "recv") else None
        )
        for kind, start, size in pieces
    ]
    line = timeline(*spans)
    assert sum(step_parts(line, 0).values()) == line.end
