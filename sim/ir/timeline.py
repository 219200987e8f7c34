"""Timeline: what happened, in integer ticks (picoseconds). No opinions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sim.units import Ticks

SpanKind = Literal["compute", "collective", "send", "recv", "copy", "host"]
Position = tuple[int, int]
"""(index into ``Program.step``, index into the called chunk): the place of an instruction in a step."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a collective, send, receive or copy moved.

    ``kind`` is the collective's ("all_gather", ...), "send", "recv", "host_to_device" or "device_to_host"; ``axis`` the
    communicator's axis ("" for copies); ``instance`` numbers the meetings on one ``communicator`` (its name), so that
    the spans of one meeting can be found on all ranks; ``start`` is when the bytes began to flow (all had arrived).
    """

    kind: str
    axis: str
    num_ranks: int
    tensor_bytes: int
    wire_bytes: int
    algorithm: str
    instance: int
    start: Ticks
    communicator: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """Something occupied ``stream`` of a rank (the representative of its class) during [start, end).

    ``position`` is that of its first instruction. A run of kernels that nothing could interrupt is one
    span, with (index into the chunk, start, end) of each kernel in ``kernels``; gaps between them are the GPU
    waiting for the host. A span of a transfer starts when the stream reached it.
    """

    rank: int
    stream: str
    kind: SpanKind
    name: str
    start: Ticks
    end: Ticks
    phase: str
    module: str
    microbatch: int
    position: Position
    kernels: tuple[tuple[int, Ticks, Ticks], ...] = ()
    transfer: Transfer | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """A block freed at ``freed_at`` that another stream still used: reusable from ``reusable_at`` on."""

    rank: int
    freed_at: Position
    reusable_at: Position


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What one link (an index) carried during the step, and for how long it carried anything."""

    link: int
    num_bytes: float
    busy: Ticks


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step, from tick 0. ``end`` is when the last rank finished, ``rank_end`` when each representative did."""

    spans: tuple[Span, ...]
    end: Ticks
    rank_end: Mapping[int, Ticks]
    releases: tuple[Release, ...] = ()
    link_use: tuple[LinkUse, ...] = ()
