"""Pipeline schedules, as their authors draw them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.parallel.schedule import LOOPED, SCHEDULES, TWO_WAY, V_SHAPED, Durations, Order, Pass, held, simulate_order

LETTERS = {"forward": "F", "backward": "B", "input_gradient": "I", "weight_gradient": "W"}


def drawn(order: Order) -> str:
    """Return an order as text: chunk 0 in capitals, chunk 1 in small letters, + between two issued together."""
    cells = [(LETTERS[q.kind], q) for q in order]
    text = [(c if q.chunk == 0 else c.lower()) + str(q.microbatch) + ("+" if q.with_next else " ") for c, q in cells]
    return "".join(text).strip()


def rows(name: str, p: int, m: int, v: int = 1) -> list[str]:
    return [drawn(order) for order in SCHEDULES[name].orders(p, m, v)]


def test_gpipe_runs_every_forward_first() -> None:
    assert rows("gpipe", 2, 3) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_1f1b_warms_up_with_a_forward_for_each_rank_after() -> None:
    assert rows("1f1b", 3, 4) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_interleaved_goes_depth_first_in_groups_of_p() -> None:
    """Warm-up of rank 1 of 2 with 2 chunks: 2 * 0 + 1 * 2 = 2 passes; of rank 0: 4."""
    assert rows("interleaved", 2, 4, 2) == [
        "F0 F1 f0 f1 F2 b0 F3 b1 f2 B0 f3 B1 b2 b3 B2 B3",
        "F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3",
    ]


def test_torch_makes_groups_of_one_size_where_p_does_not_divide_m() -> None:
    """10 microbatches on 4 ranks: 10 // 4 = 2 groups of 5, so 5 forwards of a chunk before the next chunk."""
    assert rows("interleaved-torch", 4, 10, 2)[0].startswith("F0 F1 F2 F3 F4 f0 f1 f2 f3 f4 F5")
    assert SCHEDULES["interleaved-torch"].refusal(4, 10, 2) is None
    assert SCHEDULES["interleaved-torch"].orders(4, 8, 2) == SCHEDULES["interleaved"].orders(4, 8, 2)


def test_looped_bfs_goes_breadth_first_and_back_from_the_last() -> None:
    assert rows("looped-bfs", 2, 2, 2) == ["F0 F1 f0 f1 b1 b0 B1 B0"] * 2


def test_zb_h1_delays_the_weight_gradient_by_the_rank() -> None:
    assert rows("zb-h1", 3, 4) == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


def test_zb_2p_fills_the_warm_up_with_forwards() -> None:
    assert rows("zb-2p", 2, 4) == ["F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3", "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"]


def test_zb_v_turns_round_at_the_last_rank() -> None:
    assert rows("zb-v", 2, 3) == [
        "F0 F1 F2 f0 i0 w0 f1 i1 w1 I0 W0 f2 i2 w2 I1 W1 I2 W2",
        "F0 f0 F1 f1 i0 w0 F2 I0 W0 f2 i1 w1 I1 i2 I2 W1 w2 W2",
    ]


def test_v_min_goes_down_and_up_at_full_speed() -> None:
    """As ``schedule_from_pattern`` of zbv_greedy.py gives it, run on its own."""
    assert rows("v-min", 2, 3) == [
        "F0 F1 f0 i0 w0 I0 W0 f1 i1 w1 F2 I1 W1 f2 i2 w2 I2 W2",
        "F0 f0 i0 I0 F1 f1 w0 W0 i1 I1 F2 f2 w1 W1 i2 I2 w2 W2",
    ]


@pytest.mark.parametrize(("name", "of_all"), [("v-half", 2), ("v-min", 3)])
def test_memory_is_controlled(name: str, of_all: int) -> None:
    """A half or a third of the 2 * 12 chunks that 1F1B holds, and two more, which squeezing does not give up."""
    assert max(map(held, SCHEDULES[name].orders(12, 48, 2))) == 24 // of_all + 2


def test_a_long_step_repeats_its_steady_part() -> None:
    """The orders of 60 microbatches are those of 50 with ten turns of six passes put in."""
    long, short = (SCHEDULES["v-half"].orders(4, m, 2) for m in (60, 50))
    for ours, theirs in zip(long, short, strict=True):
        assert len(ours) == len(theirs) + 60
        same = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        assert [(q.kind, q.chunk, q.microbatch - 10) for q in ours[same + 60 :]] == [
            (q.kind, q.chunk, q.microbatch) for q in theirs[same:]
        ]


def test_dualpipe_feeds_both_ends() -> None:
    """Microbatches 0 and 1 enter at rank 0 by chunk 0, 2 and 3 at rank 1 by chunk 1: the ranks mirror each other."""
    assert rows("dualpipe", 2, 4) == [
        "F0 f2 F1 b2 f3+B0 b3 I1 W1",
        "f2 F0 f3 B0 F1+b2 B1 i3 w3",
    ]


def test_dualpipe_v_is_the_first_half_of_dualpipe() -> None:
    """A rank of four has two after it before the turn; the other direction's microbatches are its second chunk's."""
    ours, theirs = SCHEDULES["dualpipev"].orders(2, 6, 2), SCHEDULES["dualpipe"].orders(4, 12, 2)
    shape = [[(q.kind, q.chunk, q.microbatch - 6 * q.chunk, q.with_next) for q in order] for order in theirs[:2]]
    assert [[(q.kind, q.chunk, q.microbatch, q.with_next) for q in order] for order in ours] == shape


def test_the_step_of_1f1b_is_as_long_as_published() -> None:
    """(m + p - 1) (F + B) = (8 + 3) * (1 + 2); rank r first waits r forwards, and ends r backwards before rank 0."""
    played = simulate_order(SCHEDULES["1f1b"], 4, 8, 1, Durations(1, 1, 1))
    assert (played.makespan, played.bubble, played.held) == (33, 9, (4, 3, 2, 1))
    assert played.start == (0, 1, 2, 3)
    assert played.end == (33, 31, 29, 27)
    assert played.busy == (24,) * 4


@pytest.mark.parametrize(
    ("name", "chunks", "peaks"),
    [
        ("gpipe", 1, (8, 8, 8, 8)),
        ("1f1b", 1, (4, 3, 2, 1)),
        ("interleaved", 2, (11, 9, 7, 5)),
        ("looped-bfs", 2, (16, 16, 16, 16)),
        ("interleaved-zb", 2, (8, 8, 8, 8)),
        ("zb-v", 2, (8, 8, 8, 8)),
        ("dualpipev", 2, (9, 9, 9, 9)),
    ],
)
def test_as_many_microbatches_are_held_as_in_torch(name: str, chunks: int, peaks: tuple[int, ...]) -> None:
    """Counted in torch 2.13 processes, 4 ranks and 8 microbatches: graphs alive between forward and backward."""
    assert tuple(map(held, SCHEDULES[name].orders(4, 8, chunks))) == peaks


def test_a_pair_starts_when_both_can_and_ends_as_one() -> None:
    """F = 1, B = 2. Rank 1: F0 [1, 2], B0 [2, 4]. F1+B0 waits for B0, so it takes [4, 7] on rank 0, and rank 1 has
    F1 [7, 8], B1 [8, 10]; B1 on rank 0 ends at 12. Not a pair, F1 would have run in [1, 2] on rank 0."""
    rank_0 = (Pass("forward", 0, 0), Pass("forward", 0, 1, True), Pass("backward", 0, 0), Pass("backward", 0, 1))
    rank_1 = SCHEDULES["1f1b"].orders(2, 2, 1)[1]
    paired = replace(SCHEDULES["1f1b"], orders=lambda p, m, v: (rank_0, rank_1))
    assert simulate_order(paired, 2, 2, 1, Durations(1, 1, 1)).end == (12, 10)


def test_orders_that_wait_for_each_other_are_found() -> None:
    """Rank 0 wants B0 before F1, rank 1 F1 before B0."""
    f0, f1, b0, b1 = Pass("forward", 0, 0), Pass("forward", 0, 1), Pass("backward", 0, 0), Pass("backward", 0, 1)
    rank_0, rank_1 = (f0, b0, f1, b1), (f0, f1, b0, b1)
    stuck = replace(SCHEDULES["1f1b"], orders=lambda p, m, v: (rank_0, rank_1))
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] wait for ever"):
        simulate_order(stuck, 2, 2, 1, Durations(1, 1, 1))


def test_placements() -> None:
    assert [[LOOPED.stage_of(rank, chunk, 4, 2) for chunk in (0, 1)] for rank in range(4)] == [
        [0, 4],
        [1, 5],
        [2, 6],
        [3, 7],
    ]
    assert [[V_SHAPED.stage_of(rank, chunk, 4, 2) for chunk in (0, 1)] for rank in range(4)] == [
        [0, 7],
        [1, 6],
        [2, 5],
        [3, 4],
    ]
    assert [[TWO_WAY.stage_of(rank, chunk, 4, 2) for chunk in (0, 1)] for rank in range(4)] == [
        [0, 3],
        [1, 2],
        [2, 1],
        [3, 0],
    ]
    assert LOOPED.neighbour(3, 0, 1, 4, 2) == (0, 1)
    assert V_SHAPED.neighbour(3, 0, 1, 4, 2) == (3, 1)
    assert TWO_WAY.neighbour(2, 1, 1, 4, 2) == (1, 1)


def test_refusals_say_what_to_do() -> None:
    assert SCHEDULES["interleaved"].refusal(4, 6, 2) == (
        "6 microbatches do not fill groups of 4, one a rank",
        "use 4 or 8 microbatches",
    )
    assert SCHEDULES["interleaved-torch"].refusal(2, 7, 2) == (
        "7 microbatches do not make 3 groups of one size",
        "use 6 or 8 microbatches",
    )
    assert SCHEDULES["1f1b"].refusal(4, 8, 2) == ("it has 1 chunk a rank, not 2", "give each rank 1 chunk")
    assert SCHEDULES["zb-v"].refusal(4, 8, 1) == ("it has 2 chunks a rank, not 1", "give each rank 2 chunks")
    assert SCHEDULES["dualpipe"].refusal(3, 8, 2) == (
        "it feeds the pipeline from both ends: 3 ranks have no two halves",
        "use 4 ranks",
    )
    assert SCHEDULES["dualpipe"].refusal(4, 6, 2) == (
        "6 microbatches, fewer than 8, two a rank, do not fill both directions alike",
        "use 8 microbatches",
    )
    assert SCHEDULES["dualpipev"].refusal(4, 6, 2) == (
        "6 microbatches are fewer than 8, two a rank",
        "use 8 microbatches or more",
    )


def test_equal_passes_of_a_long_step_are_one_object() -> None:
    orders = SCHEDULES["interleaved"].orders(16, 256, 8)
    assert len({id(pass_) for order in orders for pass_ in order}) == 2 * 8 * 256
