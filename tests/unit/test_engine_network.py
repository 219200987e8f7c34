"""Flows that share links: closed forms of small cases."""

from __future__ import annotations

import pytest
import simpy

from sim.engine.network import Network, fair_shares, flow_of
from sim.ir.traffic import Link, Phase, Traffic
from sim.units import ticks

LINKS = (Link("a", "nvlink", 100.0), Link("b", "nvlink", 50.0), Link("c", "nvlink", 100.0))


def traffic(*phases: Phase) -> Traffic:
    return Traffic("ring", phases, 0)


def ends(*jobs: tuple[float, Traffic]) -> tuple[list[int], Network]:
    """Start each transfer at its second; return the ticks at which they end."""
    env = simpy.Environment()
    network = Network(env, LINKS)
    found = [0] * len(jobs)

    def job(number: int, start: float, what: Traffic):  # type: ignore[no-untyped-def]
        yield env.timeout(ticks(start))
        yield network.start(what)
        found[number] = env.now

    for number, (start, what) in enumerate(jobs):
        env.process(job(number, start, what))
    env.run()
    return found, network


def test_alone_the_slowest_link_decides() -> None:
    """200 B over 100 B/s, 150 B over 50 B/s."""
    found, network = ends((0, traffic(Phase(0.0, ((0, 200.0), (1, 150.0))))))
    assert found == [ticks(3.0)]
    assert [(use.link, use.num_bytes, use.busy) for use in network.link_use()] == [
        (0, 200.0, ticks(3.0)),
        (1, 150.0, ticks(3.0)),
    ]


def test_phases_follow_each_other_each_after_its_latency() -> None:
    found, network = ends((0, traffic(Phase(1.0, ((0, 100.0),)), Phase(0.5), Phase(2.0, ((0, 300.0),)))))
    assert found == [ticks(1 + 1 + 0.5 + 2 + 3)]
    assert network.link_use()[0].busy == ticks(4.0)


def test_a_transfer_of_nothing_ends_at_once() -> None:
    assert ends((1, traffic()))[0] == [ticks(1.0)]


def test_a_cap_of_its_own_holds_with_idle_links() -> None:
    phase = Phase(0.0, ((0, 100.0),), stream_bytes=100.0, max_bytes_per_s=20.0)
    assert ends((0, traffic(phase)))[0] == [ticks(5.0)]


def test_a_copy_that_loads_no_link_takes_its_cap() -> None:
    assert ends((0, traffic(Phase(0.0, (), stream_bytes=100.0, max_bytes_per_s=20.0))))[0] == [ticks(5.0)]


def test_two_on_one_link_get_the_same_bytes_per_second() -> None:
    """Both at 50 B/s: 100 B are through at 2 s; of 300 B then 200 are left, at 100 B/s."""
    big, small = traffic(Phase(0.0, ((0, 300.0),))), traffic(Phase(0.0, ((0, 100.0),)))
    found, network = ends((0, big), (0, small))
    assert found == [ticks(4.0), ticks(2.0)]
    assert network.link_use()[0].num_bytes == 400.0
    assert network.link_use()[0].busy == ticks(4.0)


def test_one_that_comes_later_slows_only_what_is_left() -> None:
    """200 B alone for 1 s; then both at 50 B/s until the first is through at 3 s; the second then has
    100 B left, at 100 B/s."""
    one, two = traffic(Phase(0.0, ((0, 200.0),))), traffic(Phase(0.0, ((0, 200.0),)))
    assert ends((0, one), (1, two))[0] == [ticks(3.0), ticks(4.0)]


def test_what_one_cannot_use_goes_to_the_other() -> None:
    """The capped one takes 20 B/s of link a, the other 80."""
    capped = traffic(Phase(0.0, ((0, 20.0),), stream_bytes=20.0, max_bytes_per_s=20.0))
    assert ends((0, capped), (0, traffic(Phase(0.0, ((0, 80.0),)))))[0] == [ticks(1.0), ticks(1.0)]


def test_max_min_over_three_links() -> None:
    """Link a (100): long and first; link b (50): long and second. Long and second halve b (25 each); first gets 75."""
    long = flow_of(Phase(0.0, ((0, 1.0), (1, 1.0))), LINKS)
    first = flow_of(Phase(0.0, ((0, 1.0),)), LINKS)
    second = flow_of(Phase(0.0, ((1, 1.0),)), LINKS)
    assert fair_shares([long, first, second]) == pytest.approx([0.5, 0.75, 0.5])


def test_flows_on_other_links_are_left_alone() -> None:
    a, c = traffic(Phase(0.0, ((0, 100.0),))), traffic(Phase(0.0, ((2, 50.0),)))
    assert ends((0, a), (0, c))[0] == [ticks(1.0), ticks(0.5)]


def test_what_begins_as_another_ends_has_the_link_to_itself() -> None:
    one = traffic(Phase(0.0, ((0, 100.0),)))
    assert ends((0, one), (1, one))[0] == [ticks(1.0), ticks(2.0)]


def end_of_the_long_one(long: float, short: float, waits: tuple[int, ...]) -> tuple[int, int]:
    """Two start on link a; a third, as long as the second, after those waits. Return the ends of the first two."""
    env = simpy.Environment()
    network = Network(env, LINKS)
    ends: list[int] = []

    def job(num_bytes: float, waits: tuple[int, ...] = ()):  # type: ignore[no-untyped-def]
        for wait in waits:
            yield env.timeout(wait)
        yield network.start(traffic(Phase(0.0, ((0, num_bytes),))))
        ends.append(env.now)

    both = [env.process(job(long)), env.process(job(short))]
    if waits:
        env.process(job(short, waits))
    times = []
    for process in both:
        process.callbacks.append(lambda _: times.append(env.now))
    env.run()
    return max(times), min(times)


def test_a_start_at_the_tick_of_an_end_changes_nothing_for_a_third() -> None:
    """Whether the end or the start is seen first, the long one goes on at half the link: not one tick of difference."""
    for n in range(60):
        long, short = 100.0 + n * 7 / 3, 20.0 + n / 7
        _, end = end_of_the_long_one(long, short, ())
        start_first = end_of_the_long_one(long, short, (end,))
        assert end_of_the_long_one(long, short, (end - 1, 1)) == start_first
