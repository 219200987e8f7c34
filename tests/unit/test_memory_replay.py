"""A replay: peaks and their account, repetition that is skipped, streams, host memory, running out, the record."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sim.ir.footprint import CATEGORIES
from sim.ir.program import (
    Alloc,
    Call,
    Chunk,
    Collective,
    Free,
    Instruction,
    Mark,
    Program,
    Storage,
    UseOn,
    World,
)
from sim.ir.timeline import Release, Timeline
from sim.memory.allocator import AllocatorSettings
from sim.memory.replay import MAX_SAMPLES, _repeats, _Replay, footprints, replay
from sim.memory.runtime import Outside
from sim.units import Ticks

MIB = 2**20
DEFAULT = AllocatorSettings()


def program(
    chunks: dict[str, Sequence[Instruction]],
    step: Sequence[Call],
    first_step: Sequence[Call] | None = None,
    setup: Sequence[Call] = (),
    ranks: tuple[int, ...] = (0,),
) -> Program:
    frozen: dict[str, Chunk] = {name: tuple(chunk) for name, chunk in chunks.items()}
    first = tuple(step if first_step is None else first_step)
    return Program(ranks, 0, frozen, tuple(setup), first, tuple(step))


def simple() -> Program:
    weight = Storage("weight", 12_000_000, "parameters")
    hidden = Storage("hidden", 3 * MIB, "activations", per_microbatch=True)
    gradient = Storage("gradient", 40_000_000, "gradients")
    chunks = {
        "setup": [Mark("setup", "model"), Alloc(weight)],
        "forward": [Mark("forward", "layers.0"), Alloc(hidden)],
        "backward": [Mark("backward", "layers.0"), Alloc(gradient), Free(hidden), Free(gradient)],
    }
    return program(chunks, [Call("forward"), Call("backward")], setup=[Call("setup")])


def test_the_peak_its_place_and_its_account() -> None:
    """12,000,000 takes a block of 12,582,912 B, 40,000,000 one of its own size, 3 MiB a part of a segment of 20 MiB."""
    footprint = replay(simple(), DEFAULT)
    assert footprint.peak_allocated_bytes == 12_582_912 + 3 * MIB + 40_000_000
    assert footprint.peak_reserved_bytes == 12_582_912 + 20 * MIB + 41_943_040
    assert dict(footprint.at_peak) == {
        **dict.fromkeys(CATEGORIES, 0),
        "parameters": 12_000_000,
        "activations": 3 * MIB,
        "gradients": 40_000_000,
        "rounding": 582_912,
    }
    assert (footprint.peak_step, footprint.peak_position) == ("steady", (1, 1))
    assert (footprint.peak_phase, footprint.peak_module) == ("backward", "layers.0")
    assert [(h.name, h.phase, h.module, h.count, h.num_bytes) for h in footprint.holders] == [
        ("gradient", "backward", "layers.0", 1, 40_000_000),
        ("weight", "setup", "model", 1, 12_000_000),
        ("hidden", "forward", "layers.0", 1, 3 * MIB),
    ]


def test_a_first_step_that_peaks_higher_is_the_peak() -> None:
    lazy = Storage("state", 2 * MIB, "optimizer")
    temporary = Storage("copy", 64 * MIB, "temporary")
    chunks = {"first": [Alloc(lazy), Alloc(temporary), Free(temporary)], "later": [Mark("optimizer", "")]}
    footprint = replay(program(chunks, [Call("later")], [Call("first")]), DEFAULT)
    assert footprint.peak_step == "first"
    assert footprint.peak_allocated_bytes == 66 * MIB


def test_reserved_bytes_are_those_of_all_steps() -> None:
    """The second step finds its cache split up by what the first left, and reserves more than the first did."""
    left = Storage("left", 8 * MIB, "optimizer")
    wide = Storage("wide", 18 * MIB, "temporary")
    chunks = {"wide": [Alloc(wide), Free(wide)], "keep": [Alloc(left)]}
    footprint = replay(program(chunks, [Call("wide")], [Call("wide"), Call("keep")]), DEFAULT)
    assert footprint.peak_reserved_bytes == (18 + 18) * MIB
    assert footprint.peak_allocated_bytes == 26 * MIB


def accumulating(num_microbatches: int) -> Program:
    gradients = [Storage(f"gradient.{i}", MIB * (i + 1), "gradients") for i in range(3)]
    hidden = [Storage(f"hidden.{i}", 700_000 * (i + 1), "activations", per_microbatch=True) for i in range(5)]
    chunks = {
        "zero": [Alloc(g) for g in gradients],
        "forward": [Mark("forward", "layer"), *map(Alloc, hidden)],
        "backward": [Mark("backward", "layer"), *map(Free, reversed(hidden))],
        "step": [Mark("optimizer", ""), *map(Free, gradients)],
    }
    # two microbatches are always in flight
    calls = [Call("zero"), Call("forward", 0)]
    for microbatch in range(1, num_microbatches):
        calls += [Call("forward", microbatch), Call("backward", microbatch - 1)]
    calls += [Call("backward", num_microbatches - 1), Call("step")]
    return program(chunks, calls)


def test_identical_microbatches_cost_nothing_and_change_nothing() -> None:
    """A few rounds of forward and backward show that the state comes back; the rest of 512 are skipped in each step."""
    folded = accumulating(512)
    run = _Replay(folded, DEFAULT, ())
    run.run()
    assert sum(isinstance(entry, tuple) for entry in run.executed) < 80
    # every call under a name of its own: nothing is equal, nothing skipped
    calls = [Call(f"{call.chunk}.{index}", call.microbatch) for index, call in enumerate(folded.step)]
    unfolded = program({call.chunk: folded.chunks[call.chunk.split(".")[0]] for call in calls}, calls)
    all_of_it = _Replay(unfolded, DEFAULT, ())
    all_of_it.run()
    assert sum(isinstance(entry, tuple) for entry in all_of_it.executed) > len(calls)
    assert run.footprint() == all_of_it.footprint()


def test_repeats_are_found_by_chunk_microbatch_and_releases() -> None:
    calls = [Call("f", 0), *(Call(c, m) for m in range(4) for c in ("a", "b")), Call("c")]
    assert _repeats(calls, {}) == {1: (2, 4, 1)}
    assert _repeats(calls, {3: {0: 3 << 24}}) == {}
    layers = [Call("embed"), *[Call("block")] * 10]
    assert _repeats(layers, {}) == {}  # the same microbatch: layers, not repetitions


def test_no_repetition_is_skipped_while_memory_grows() -> None:
    hidden = Storage("hidden", 5 * MIB, "activations", per_microbatch=True)
    chunks = {"forward": [Alloc(hidden)], "backward": [Free(hidden)]}
    calls = [Call("forward", m) for m in range(16)] + [Call("backward", m) for m in range(16)]
    assert replay(program(chunks, calls), DEFAULT).peak_allocated_bytes == 80 * MIB


def gathered(releases: Sequence[Release]) -> int:
    """Two parameters gathered on their own stream one after the other; return what is reserved for that."""
    full = [Storage(f"full.{i}", 16 * MIB, "buffers", stream="gather") for i in range(2)]
    chunk: list[Instruction] = []
    for storage in full:
        gather = Collective("gather", "all_gather", "dp", 16 * MIB, "bf16", "gather")
        chunk += [Alloc(storage), gather, UseOn(storage, "compute"), Free(storage)]
    return replay(program({"step": chunk}, [Call("step")]), DEFAULT, releases).peak_reserved_bytes


def test_a_block_in_use_elsewhere_is_not_reused_before_its_release() -> None:
    """Freed by instruction 3; the next allocation is instruction 4. A release in the next step counts from that on."""
    assert gathered([]) == 16 * MIB
    assert gathered([Release(0, (0, 3), (0, 4))]) == 16 * MIB
    assert gathered([Release(0, (0, 3), (0, 5)), Release(0, (0, 7), (0, 8))]) == 32 * MIB
    assert gathered([Release(0, (0, 3), (1, 1)), Release(0, (0, 7), (1, 5))]) == 48 * MIB


def test_host_memory_is_counted_apart() -> None:
    """Pinned blocks are powers of two and are kept: 5 MiB take 8. Pageable ones are as large as asked for."""
    pinned = [Storage(f"pinned.{i}", 5 * MIB, "optimizer", stream="pinned", place="host") for i in range(2)]
    pageable = Storage("pageable", 3 * MIB, "optimizer", place="host")
    chunks = {"step": [Alloc(pinned[0]), Free(pinned[0]), Alloc(pinned[1]), Alloc(pageable), Free(pageable)]}
    footprint = replay(program({"idle": [], **chunks}, [Call("idle")], [Call("step")]), DEFAULT)
    assert footprint.host_bytes == 11 * MIB
    assert footprint.peak_allocated_bytes == footprint.peak_reserved_bytes == 0


def test_running_out_of_memory_is_noted_and_the_full_peak_still_known() -> None:
    settings = AllocatorSettings(capacity_bytes=40 * MIB)
    footprint = replay(simple(), settings)
    failure = footprint.out_of_memory
    assert failure is not None
    assert (failure.step, failure.position, failure.name) == ("first", (1, 1), "gradient")
    assert (failure.phase, failure.module, failure.requested_bytes) == ("backward", "layers.0", 40_000_000)
    # 12,582,912 + 20 MiB are in use, 41,943,040 are asked for
    assert failure.short_bytes == 12_582_912 + 20 * MIB + 41_943_040 - 40 * MIB
    assert footprint.peak_allocated_bytes == replay(simple(), DEFAULT).peak_allocated_bytes
    assert footprint.num_alloc_retries == 1


def test_empty_storages_hold_nothing() -> None:
    empty = Storage("empty", 0, "activations")
    assert replay(program({"step": [Alloc(empty), Free(empty)]}, [Call("step")]), DEFAULT).peak_reserved_bytes == 0


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        ([Free(Storage("ghost", 512, "buffers"))], "frees 'ghost', which is not allocated"),
        ([Alloc(s := Storage("twice", 512, "buffers")), Alloc(s)], "allocates what is already allocated"),
    ],
)
def test_a_wrong_program_is_named(chunk: list[Instruction], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        replay(program({"step": chunk}, [Call("step")]), DEFAULT)


def test_samples_hold_the_peak_and_stay_few() -> None:
    storages = [Storage(f"s{i}", 512 * (1 + i % 7), "temporary") for i in range(4000)]
    chunk = [instruction for s in storages for instruction in (Alloc(s), Free(s))]
    footprint = replay(program({"step": chunk}, [Call("step")]), DEFAULT, samples=True)
    assert 2 < len(footprint.samples) <= MAX_SAMPLES + 2
    assert max(s.allocated_bytes for s in footprint.samples) == footprint.peak_allocated_bytes
    positions = [s.position for s in footprint.samples]
    assert positions == sorted(positions)
    assert footprint.events == footprint.segments == ()


@pytest.mark.parametrize("expandable", [False, True])
def test_the_record_can_be_replayed_to_the_segments_at_the_end(expandable: bool) -> None:
    """Events as PyTorch names them: alloc, free_requested, free_completed move blocks; segment events move segments."""
    footprint = replay(simple(), AllocatorSettings(expandable), record=True)
    live: dict[int, int] = {}
    reserved = 0
    for event in footprint.events:
        if event.action == "alloc":
            live[event.address] = event.num_bytes
        elif event.action == "free_completed":
            assert live.pop(event.address) == event.num_bytes
        elif event.action in {"segment_alloc", "segment_map"}:
            reserved += event.num_bytes
    blocks = [block for segment in footprint.segments for block in segment.blocks]
    assert {address: requested for address, _, requested, state, _ in blocks if state != "inactive"} == live
    assert sum(segment.num_bytes for segment in footprint.segments) == reserved == footprint.peak_reserved_bytes
    for segment in footprint.segments:
        address = segment.address
        for start, size, *_ in segment.blocks:
            assert start == address
            address += size
        assert address == segment.address + segment.num_bytes
    assert {event.step for event in footprint.events} == {"setup", "first", "steady"}
    first = next(event for event in footprint.events if event.action == "alloc")
    assert (first.name, first.category, first.module, first.phase) == ("weight", "parameters", "model", "setup")


def test_footprints_of_a_world() -> None:
    """Classes that do the same are replayed once; what the process holds beside differs."""
    one = simple()
    two = Program((1, 2), 1, one.chunks, one.setup, one.first_step, one.step)
    timeline = Timeline((), Ticks(0), {})
    outside = {0: Outside(500 * MIB, 300 * MIB, 10 * MIB), 1: Outside(500 * MIB)}
    first, second = footprints(World(3, (one, two), {}), timeline, DEFAULT, outside)
    assert (first.ranks, first.stage, second.ranks, second.stage) == ((0,), 0, (1, 2), 1)
    assert first.at_peak is second.at_peak
    assert dict(first.beside) == {
        "fragmentation": first.peak_reserved_bytes - first.peak_allocated_bytes,
        "cuda_context": 500 * MIB,
        "nccl": 300 * MIB,
        "libraries": 10 * MIB,
    }
    for footprint in (first, second):
        assert footprint.peak_device_bytes == footprint.peak_allocated_bytes + sum(footprint.beside.values())
    assert second.peak_device_bytes == second.peak_reserved_bytes + 500 * MIB


def test_a_class_with_less_memory_is_replayed_again_only_where_it_matters() -> None:
    """75 MiB are reserved at the peak; 80 or 90 of capacity make no difference, 60 do."""
    base = simple()
    programs = tuple(Program((rank,), 0, base.chunks, base.setup, base.first_step, base.step) for rank in range(3))
    settings = {rank: AllocatorSettings(capacity_bytes=mib * MIB) for rank, mib in enumerate((90, 80, 60))}
    large, enough, short = footprints(World(3, programs, {}), None, settings, {})
    assert enough.at_peak is large.at_peak
    assert short.at_peak is not large.at_peak
    assert large.out_of_memory is None
    assert short.out_of_memory is not None
