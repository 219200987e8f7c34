"""Real torch processes on the CPU run the passes of a pipeline in the order that our schedules say."""

from __future__ import annotations

from functools import cache

import pytest

from sim.parallel.schedule import SCHEDULES
from validation.real import pipelining

pytestmark = pytest.mark.real


@cache
def measured(num_ranks: int) -> dict[str, list[list[tuple[str, int, int]]]]:
    found: dict[str, list[list[tuple[str, int, int]]]] = pipelining.measure(num_ranks)
    return found


@pytest.mark.parametrize(("num_ranks", "name"), [(n, name) for n, cases in pipelining.CASES.items() for name in cases])
def test_order_of_passes(num_ranks: int, name: str) -> None:
    """Each rank, all passes: kind, stage of the model, microbatch."""
    _, chunks, num_microbatches, _ = pipelining.CASES[num_ranks][name]
    schedule = SCHEDULES[name]
    assert schedule.refusal(num_ranks, num_microbatches, chunks) is None
    ours = [
        [(q.kind, schedule.placement.stage_of(rank, q.chunk, num_ranks, chunks), q.microbatch) for q in order]
        for rank, order in enumerate(schedule.orders(num_ranks, num_microbatches, chunks))
    ]
    assert measured(num_ranks)[name] == ours
