"""The caching allocator: sizes by hand, the ladder of failure, and answers recorded from PyTorch's own allocator."""

from __future__ import annotations

import hashlib

import pytest

from sim.memory.allocator import (
    UNMAPPED,
    AllocatorSettings,
    Block,
    CachingAllocator,
    round_size,
    segment_size,
)

MIB, GIB = 2**20, 2**30


def request(allocator: CachingAllocator, num_bytes: int, stream: str = "compute") -> Block:
    size = round_size(num_bytes, allocator.settings.roundup_power2_divisions)
    return allocator.malloc(allocator.pool(stream, size), size)


@pytest.mark.parametrize(
    ("num_bytes", "divisions", "block_bytes"),
    [
        (1, 0, 512),
        (512, 0, 512),
        (513, 0, 1024),
        (1_000_001, 0, 1954 * 512),
        (5000, 8, 5120),  # 5000 > 8 x 512; steps of 4096 / 8 = 512
        (70_000, 4, 81_920),  # steps of 65,536 / 4 = 16,384: 65,536 + 16,384
        (1200, 4, 1536),  # not more than 4 x 512: multiples of 512
        (2**20, 4, 2**20),
    ],
)
def test_round_size(num_bytes: int, divisions: int, block_bytes: int) -> None:
    assert round_size(num_bytes, divisions) == block_bytes


def test_segment_size() -> None:
    assert segment_size(512) == segment_size(MIB) == 2 * MIB
    assert segment_size(MIB + 512) == segment_size(10 * MIB - 512) == 20 * MIB
    assert segment_size(10 * MIB) == 10 * MIB
    assert segment_size(10 * MIB + 512) == 12 * MIB


def test_a_rest_of_up_to_1_mib_stays_in_a_large_block_and_counts_as_allocated() -> None:
    """12,000,000 B round up to 12,000,256 B in a segment of 6 x 2 MiB = 12,582,912 B; the rest is 582,656 B."""
    allocator = CachingAllocator(AllocatorSettings())
    block = request(allocator, 12_000_000)
    assert block.size == allocator.allocated_bytes == allocator.reserved_bytes == 12_582_912


def test_a_larger_rest_is_split_off() -> None:
    """40,000,000 B are 78,125 x 512 B; the segment of 20 x 2 MiB = 41,943,040 B leaves 1,943,040 B, over 1 MiB."""
    allocator = CachingAllocator(AllocatorSettings())
    block = request(allocator, 40_000_000)
    assert block.size == allocator.allocated_bytes == 40_000_000
    assert allocator.reserved_bytes == 41_943_040
    assert block.next.size == 1_943_040
    assert request(allocator, 1_900_000).address == block.address + 40_000_000


def test_small_and_large_requests_and_streams_do_not_share_segments() -> None:
    allocator = CachingAllocator(AllocatorSettings())
    allocator.free(request(allocator, 8 * MIB))
    request(allocator, MIB)  # small: not from the 20 MiB that are free
    assert allocator.reserved_bytes == 22 * MIB
    request(allocator, 8 * MIB, "gather")  # another stream: not from them either
    assert allocator.reserved_bytes == 42 * MIB
    request(allocator, 8 * MIB)
    assert allocator.reserved_bytes == 42 * MIB


def test_best_fit_takes_the_smallest_block_then_the_lowest_address() -> None:
    allocator = CachingAllocator(AllocatorSettings())
    first, second, third = (request(allocator, n * MIB) for n in (16, 12, 12))
    for block in (first, third, second):
        allocator.free(block)
    assert request(allocator, 11 * MIB).address == second.address
    assert request(allocator, 11 * MIB).address == third.address
    assert request(allocator, 11 * MIB).address == first.address


def test_expandable_segments_map_20_mib_at_a_time_and_grow_their_tail() -> None:
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True))
    block = request(allocator, 12_000_000)
    assert (block.size, allocator.reserved_bytes) == (12_000_256, 20 * MIB)
    tail = request(allocator, 30 * MIB)  # 12,000,256 + 31,457,280 B end in the third handle
    assert tail.address == block.address + block.size
    assert allocator.reserved_bytes == 60 * MIB
    assert len(allocator.segments) == 1
    allocator.free(tail)
    allocator.empty_cache()  # the first handle is still in use
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(block)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments) == (0, {})


def test_a_block_used_on_another_stream_waits_for_it() -> None:
    allocator = CachingAllocator(AllocatorSettings())
    block = request(allocator, 2 * MIB)
    address = block.address
    allocator.use_on(block, "compute")  # its own stream: nothing
    assert not block.used_elsewhere
    allocator.use_on(block, "gather")
    allocator.free_later(block, ready_at=5)
    assert allocator.allocated_bytes == 0
    allocator.process_events(4)
    assert request(allocator, 2 * MIB).address != address
    assert (allocator.awaiting_bytes, allocator.reserved_bytes) == (2 * MIB, 20 * MIB)
    allocator.process_events(5)
    assert request(allocator, 2 * MIB).address == address
    assert (allocator.awaiting_bytes, allocator.peak_awaiting_bytes) == (0, 2 * MIB)


def test_cached_segments_are_released_before_giving_up() -> None:
    """30 MiB of 40 are cached for another stream; 20 more only fit once these are back with the driver."""
    allocator = CachingAllocator(AllocatorSettings(capacity_bytes=40 * MIB))
    allocator.free(request(allocator, 30 * MIB, "gather"))
    request(allocator, 20 * MIB)
    assert allocator.num_alloc_retries == 1
    assert allocator.out_of_memory is None
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (20 * MIB, 30 * MIB)


def test_a_partly_used_segment_cannot_be_released() -> None:
    """The free 18 MiB of a 20 MiB segment are lost to another stream: 24 MiB are missing 4."""
    allocator = CachingAllocator(AllocatorSettings(capacity_bytes=40 * MIB))
    request(allocator, 2 * MIB)
    request(allocator, 24 * MIB, "gather")
    assert allocator.out_of_memory == (24 * MIB, 4 * MIB)
    assert allocator.reserved_bytes == 44 * MIB  # from here on there is no limit


def test_max_split_size_keeps_large_blocks_whole() -> None:
    """A request below the limit takes no block above it; one above takes a block up to 20 MiB larger, whole."""
    allocator = CachingAllocator(AllocatorSettings(max_split_size_bytes=32 * MIB))
    large = request(allocator, 64 * MIB)
    allocator.free(large)
    request(allocator, 16 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    request(allocator, 40 * MIB)  # 64 >= 40 + 20: not this one
    assert allocator.reserved_bytes == 120 * MIB
    assert request(allocator, 50 * MIB) is large
    assert large.size == 64 * MIB


@pytest.mark.parametrize(("threshold", "reserved_mib"), [(0.5, 50), (0.0, 80)])
def test_garbage_collection_releases_whole_blocks_that_lie_idle(threshold: float, reserved_mib: int) -> None:
    """100 MiB allowed, 60 reserved, 30 of them idle on stream a: above the threshold these go before 20 more come."""
    settings = AllocatorSettings(garbage_collection_threshold=threshold, allowed_bytes=100 * MIB)
    allocator = CachingAllocator(settings)
    idle, other = request(allocator, 30 * MIB, "a"), request(allocator, 30 * MIB, "b")
    allocator.free(idle)
    allocator.free(other)
    request(allocator, 20 * MIB, "b")  # splits that one: it cannot be released
    request(allocator, 20 * MIB, "c")
    assert allocator.reserved_bytes == reserved_mib * MIB


def test_trace_names_what_happens_to_segments() -> None:
    allocator = CachingAllocator(AllocatorSettings(capacity_bytes=20 * MIB))
    allocator.trace = []
    allocator.free(request(allocator, 2 * MIB))
    request(allocator, 15 * MIB, "gather")
    request(allocator, 15 * MIB, "gather")
    assert [action for action, *_ in allocator.trace] == [
        "segment_alloc",
        "segment_free",
        "segment_alloc",
        "oom",
        "segment_alloc",
    ]


# --- recorded answers --------------------------------------------------------------------------------


def recorded_trace(num_ops: int) -> list[tuple[str, int, int, str]]:
    """Return a fixed sequence of (malloc | free | use | events | empty, number, bytes, stream)."""
    state = 1

    def draw(below: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % below

    special = (512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 12_000_000, 40_000_000, 3 * MIB, 20 * MIB, 21 * MIB)
    streams = ("0", "0", "0", "256", "512")
    ops: list[tuple[str, int, int, str]] = []
    live: list[int] = []
    number = 0
    for _ in range(num_ops):
        kind = draw(1000)
        if kind < 520 or not live:
            size = special[draw(len(special))] if draw(10) < 3 else 1 + draw(2 ** (9 + draw(19)))
            ops.append(("malloc", number, size, streams[draw(5)]))
            live.append(number)
            number += 1
        elif kind < 950:
            ops.append(("free", live.pop(draw(len(live))), 0, ""))
        elif kind < 985:
            ops.append(("use", live[draw(len(live))], 0, streams[2 + draw(3)]))
        else:
            ops.append(("events" if kind < 995 else "empty", 0, 0, ""))
    return ops


def answers(settings: AllocatorSettings) -> list[str]:
    """Return "address allocated reserved retries" after each operation, up to the first that runs out of memory."""
    allocator = CachingAllocator(settings)
    live: dict[int, Block] = {}
    now, base, lines = 0, -1, []
    for kind, number, num_bytes, stream in recorded_trace(3000):
        address = -1
        if kind == "malloc":
            allocator.process_events(now)
            block = live[number] = request(allocator, num_bytes, stream)
            base = block.address if base < 0 else base
            address = block.address - base
        elif kind == "free":
            block = live.pop(number)
            if block.used_elsewhere:
                allocator.free_later(block, now + 1)
            else:
                allocator.free(block)
        elif kind == "use":
            allocator.use_on(live[number], stream)
        elif kind == "events":
            now += 1
        else:
            allocator.empty_cache()
        if allocator.out_of_memory:
            return [*lines, "oom"]
        lines.append(f"{address} {allocator.allocated_bytes} {allocator.reserved_bytes} {allocator.num_alloc_retries}")
    return lines


@pytest.mark.parametrize(
    ("settings", "num_lines", "digest"),
    [
        (AllocatorSettings(capacity_bytes=40 * GIB), 3000, "9e7da1273106808b"),
        (AllocatorSettings(capacity_bytes=1 * GIB), 1075, "755aae9479e481b5"),
        (AllocatorSettings(expandable_segments=True, capacity_bytes=40 * GIB), 3000, "2872b2a00338732d"),
        (AllocatorSettings(expandable_segments=True, capacity_bytes=1 * GIB), 1071, "ee5624e6a97a7b2d"),
        (AllocatorSettings(max_split_size_bytes=20 * MIB, capacity_bytes=1 * GIB), 1124, "0677f3275f656e33"),
        (AllocatorSettings(max_split_size_bytes=20 * MIB, capacity_bytes=40 * GIB), 3000, "e41f507383c179f7"),
        (AllocatorSettings(max_split_size_bytes=64 * MIB, capacity_bytes=2 * GIB), 2701, "c9e1b68f427abca6"),
        (AllocatorSettings(roundup_power2_divisions=4, capacity_bytes=2 * GIB), 2648, "a2c4aa8d0dbc60eb"),
        (AllocatorSettings(True, None, 8, capacity_bytes=2 * GIB), 2692, "8780c8ba3652342c"),
        (AllocatorSettings(False, None, 0, 0.5, 2 * GIB, 1 * GIB), 1119, "7e08b48f552eceae"),
    ],
)
def test_answers_are_those_of_pytorchs_own_allocator(settings: AllocatorSettings, num_lines: int, digest: str) -> None:
    """Recorded from libc10_cuda.so of torch 2.14.1, run over a CUDA runtime that hands out ascending addresses.

    Each line is one operation: the address relative to the first, allocated and reserved bytes, retries. The digest is
    that of all lines, so one address that differs fails the test.
    """
    lines = answers(settings)
    assert len(lines) == num_lines
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


def test_no_block_stays_unmapped_in_a_classic_segment() -> None:
    allocator = CachingAllocator(AllocatorSettings())
    request(allocator, 5 * MIB)
    states = [b.state for head in allocator.segments.values() for b in allocator.blocks(head)]
    assert UNMAPPED not in states


@pytest.mark.real
def test_torch_names_the_same_options() -> None:
    """The CPU build has no allocator, but it parses the options: the limits are the ones that the settings assume."""
    import torch

    apply = torch._C._accelerator_setAllocatorSettings
    apply("max_split_size_mb:21,garbage_collection_threshold:0.8,roundup_power2_divisions:4,expandable_segments:False")
    with pytest.raises((RuntimeError, ValueError)):
        apply("max_split_size_mb:19")  # not below the large segment of 20 MiB
    apply("expandable_segments:False")
