"""The search of the zero-bubble runtime, under its limit of memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sim.parallel.schedule import SCHEDULES, Durations, simulate_order, zb_2p_found
from sim.parallel.zero_bubble import Step, kept_share, searched

LETTERS = {"forward": "F", "input_gradient": "I", "weight_gradient": "W"}
shapes = settings(max_examples=60, deadline=None)


def drawn(order: tuple[Step, ...]) -> str:
    return " ".join(f"{LETTERS[kind]}{index}" for kind, index in order)


def most_held(order: tuple[Step, ...], kept: float) -> float:
    """Return the most that a rank holds, in microbatches; one that waits for its weights' gradient is ``kept``."""
    held = most = 0.0
    for kind, _ in order:
        held += {"forward": 1, "input_gradient": kept - 1, "weight_gradient": -kept}[kind]
        most = max(most, held)
    return most


def test_the_share_kept_is_what_the_weights_matmuls_read() -> None:
    """h 4096, 32 heads, 1024 tokens: 32 * 4096 of 34 * 4096 + 5 * 32 * 1024 bytes."""
    assert kept_share(4096, 32, 1024) == pytest.approx(131072 / 303104)


def test_orders_are_those_of_the_runtime() -> None:
    """As ``initial_solution`` of auto_schedule.py gives them, run on its own for 2 stages and 4 microbatches."""
    assert [drawn(order) for order in searched(2, 4, 131072 / 303104, 4)] == [
        "F0 F1 F2 F3 I0 W0 I1 W1 I2 W2 I3 W3",
        "F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3",
    ]


@shapes
@given(p=st.integers(2, 12), m=st.integers(1, 40), kept=st.floats(0.1, 0.9), factor=st.integers(1, 2))
@example(p=8, m=24, kept=131072 / 303104, factor=2)
def test_orders_are_whole_and_within_their_memory(p: int, m: int, kept: float, factor: int) -> None:
    for order in searched(p, m, kept, factor * p):
        assert Counter(order) == Counter((kind, index) for kind in LETTERS for index in range(m))
        for kind in LETTERS:
            assert [index for name, index in order if name == kind] == list(range(m))
        place = {step: i for i, step in enumerate(order)}
        assert all(place["forward", i] < place["input_gradient", i] < place["weight_gradient", i] for i in range(m))
        assert most_held(order, kept) <= factor * p + 1e-6


@shapes
@given(p=st.integers(2, 12), m=st.integers(1, 40), kept=st.floats(0.1, 0.9))
def test_orders_never_wait_for_each_other_for_ever(p: int, m: int, kept: float) -> None:
    """And with passes of one length no rank idles longer than with ZB-H1's, which holds half as much."""
    spec = replace(SCHEDULES["zb-2p"], orders=lambda p, m, v: zb_2p_found(p, m, kept))
    even = Durations(1, 1, 1)
    found, handmade = simulate_order(spec, p, m, 1, even), simulate_order(SCHEDULES["zb-h1"], p, m, 1, even)
    assert found.bubble <= handmade.bubble


def test_more_memory_holds_more_microbatches_ahead() -> None:
    """Rank 1 of 8 holds 15.16 microbatches with room for 16, where ZB-H2 (made by hand) holds 13 and a part."""
    kept = 131072 / 303104
    assert most_held(searched(8, 24, kept, 16)[1], kept) == pytest.approx(15.16, abs=0.01)
    assert most_held(searched(8, 24, kept, 8)[1], kept) == pytest.approx(7.43, abs=0.01)
