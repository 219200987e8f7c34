"""Footprint: what one rank's allocator held, when, and whose it was. Written by memory, read by report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sim.ir.timeline import Position

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "buffers", "temporary", "rounding")
"""The parts that add up to allocated bytes. ``rounding`` is what the allocator adds to requests."""


@dataclass(frozen=True, slots=True)
class Sample:
    """State after the allocator acted at ``position``; ``by_category`` in the order of ``CATEGORIES``."""

    position: Position
    allocated_bytes: int
    reserved_bytes: int
    by_category: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Holder:
    """Storages of one name that were live at the peak: how many, their bytes together, where they came from."""

    name: str
    category: str
    module: str
    phase: str
    count: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """One action of the allocator, as PyTorch's memory snapshot names them.

    ``action``: alloc, free_requested, free_completed, segment_alloc, segment_free, segment_map, segment_unmap, oom.
    """

    action: str
    address: int
    num_bytes: int
    stream: str
    name: str
    category: str
    module: str
    phase: str
    step: str
    position: Position


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment at the end of the record, with its blocks (address, bytes, requested, state, name)."""

    address: int
    num_bytes: int
    stream: str
    small: bool
    expandable: bool
    blocks: tuple[tuple[int, int, int, str, str], ...]


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """The first request that could not be met, even after releasing every cached segment."""

    position: Position
    step: str
    phase: str
    module: str
    name: str
    requested_bytes: int
    short_bytes: int


@dataclass(frozen=True, slots=True)
class DriverCalls:
    """What the allocator asked of the driver for one request, at the position of its ``Alloc``.

    ``taken``, ``given``  how often it took memory (``cudaMalloc``) and gave some back (``cudaFree``); of expandable
                          segments (``expandable``) the handles that it mapped and unmapped
    ``retried``           it emptied its cache, as there was not enough
    """

    position: Position
    taken: int
    taken_bytes: int
    given: int
    given_bytes: int
    retried: bool
    expandable: bool


@dataclass(frozen=True, slots=True)
class Footprint:
    """``allocated``, ``reserved`` and ``device`` bytes of the ranks of one class, and the account at the peak.

    ``at_peak`` adds up to ``peak_allocated_bytes``; ``beside`` (fragmentation, cuda_context, nccl, libraries) is what
    ``peak_device_bytes`` adds to it. ``peak_step`` is "setup", "first" or "steady". ``samples`` are of the step of
    the peak, steady unless the first step peaks higher. ``events`` and ``segments`` are filled on request only.
    ``peak_awaiting_bytes`` is the most that was freed but still in use on another stream: the cache grows by that.
    ``driver``: what every step asks of the driver once the state of the allocator repeats; nothing as a rule.
    """

    ranks: tuple[int, ...]
    stage: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_device_bytes: int
    host_bytes: int
    at_peak: Mapping[str, int]
    beside: Mapping[str, int]
    peak_step: str
    peak_position: Position
    peak_phase: str
    peak_module: str
    holders: tuple[Holder, ...]
    samples: tuple[Sample, ...]
    num_alloc_retries: int = 0
    out_of_memory: OutOfMemory | None = None
    events: tuple[BlockEvent, ...] = ()
    segments: tuple[Segment, ...] = ()
    peak_awaiting_bytes: int = 0
    driver: tuple[DriverCalls, ...] = ()
