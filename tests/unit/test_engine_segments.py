"""A chunk becomes runs of kernels, and what stands between them."""

from __future__ import annotations

from engine_world import UNIT, UnitCost, collective, kernel
from hypothesis import given
from hypothesis import strategies as st

from sim.engine.segments import MAX_KERNELS, Prices, Segment, compile_chunk, execute, shared_storages
from sim.ir.program import Alloc, Call, Free, Instruction, Mark, Program, Record, Storage, UseOn

PLAIN = Storage("plain", 1, "temporary")
SHARED = Storage("shared", 1, "temporary")


def compiled(*chunk: Instruction) -> list[tuple[int, str]]:
    """(index, name of the run with its number of kernels, or the type of what stands there)."""
    found = compile_chunk(chunk, Prices(UnitCost(), 0), frozenset({SHARED}))
    return [
        (index, f"{step.stream} {len(step.kernels)}" if isinstance(step, Segment) else type(step).__name__)
        for index, step in found
    ]


def test_memory_does_not_break_a_run() -> None:
    assert compiled(kernel(1), Alloc(PLAIN), kernel(1), Free(PLAIN), kernel(1)) == [(0, "compute 3")]


def test_what_can_interact_breaks_a_run() -> None:
    side = kernel(1, stream="side")
    assert compiled(kernel(1), Record("e", "compute"), kernel(1), collective("g", 1), kernel(1), side) == [
        (0, "compute 1"),
        (1, "Record"),
        (2, "compute 1"),
        (3, "Collective"),
        (4, "compute 1"),
        (5, "side 1"),
    ]


def test_a_mark_breaks_a_run_only_where_it_changes_something() -> None:
    a, b = Mark("forward", "a"), Mark("forward", "b")
    assert compiled(a, kernel(1), a, kernel(1), b, kernel(1)) == [
        (0, "Mark"),
        (1, "compute 2"),
        (4, "Mark"),
        (5, "compute 1"),
    ]


def test_only_blocks_used_on_other_streams_are_followed() -> None:
    chunk = (Alloc(PLAIN), Alloc(SHARED), UseOn(SHARED, "comm"), UseOn(SHARED, "compute"), Free(SHARED), Free(PLAIN))
    assert compiled(*chunk) == [(1, "Alloc"), (2, "UseOn"), (4, "Free")]
    program = Program((0,), 0, {"c": (*chunk, UseOn(PLAIN, "compute"))}, (), (), (Call("c"),))
    assert shared_storages(program) == {SHARED}


def test_a_run_is_shorter_than_the_launch_queue() -> None:
    assert compiled(*[kernel(1)] * (MAX_KERNELS + 1)) == [(0, f"compute {MAX_KERNELS}"), (MAX_KERNELS, "compute 1")]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_a_run_ends_as_max_plus_algebra_says(times: list[tuple[int, int]], free: int, began: int) -> None:
    """end = max(free + D, began + M), D = sum of d_i, M = max over i of (launches up to i + d_i + ... + d_n)."""
    chunk = [kernel(gpu, launch) for launch, gpu in times]
    ((_, segment),) = compile_chunk(tuple(chunk), Prices(UnitCost(), 0), frozenset())
    assert isinstance(segment, Segment)
    ends: list[int] = []
    done = execute(segment, free * UNIT, began * UNIT, ends)
    launches, durations = zip(*times, strict=True)
    m = max(sum(launches[: i + 1]) + sum(durations[i:]) for i in range(len(times)))
    assert done[-1][2] == max(free + sum(durations), began + m) * UNIT
    assert ends == [end for _, _, end in done]
    assert segment.host == sum(launches) * UNIT


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9), st.integers(0, 60))
def test_issuing_kernel_by_kernel_is_the_same(times: list[tuple[int, int]], free: int) -> None:
    chunk = [kernel(gpu, launch) for launch, gpu in times]
    ((_, segment),) = compile_chunk(tuple(chunk), Prices(UnitCost(), 0), frozenset())
    assert isinstance(segment, Segment)
    issued = [offset for _, offset, _ in segment.kernels]
    assert execute(segment, free * UNIT, 0, []) == execute(segment, free * UNIT, issued, [])
