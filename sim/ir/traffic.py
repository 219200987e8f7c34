"""Traffic: what a collective puts on the wires. Written by the cost layer, run by the engine's network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of one wire. ``bytes_per_s`` is what payload can reach; ``kind`` is ``nvlink``, ``pcie``,
    ``cpu``, ``nic``, ``network``, ``memory`` ... as in the topology file."""

    name: str
    kind: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a collective that moves as one fluid.

    It first waits ``latency_s``; then all its bytes flow together: when the phase is a fraction x
    done, each link has carried x times its load. ``loads`` are (index of the link, bytes), one entry
    a link; ``max_bytes_per_s`` of ``stream_bytes`` caps how fast it can go with idle links (a protocol's or a copy
    engine's own limit); 0 bytes: no cap. ``group_s``: of several equal groups, the time that the links of one need for
    its own bytes; 0: there is one group. It says what the groups' fair part is where others use their links too.
    """

    latency_s: float
    loads: tuple[tuple[int, float], ...] = ()
    stream_bytes: float = 0.0
    max_bytes_per_s: float = 0.0
    group_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """The phases of one collective, in order, for all groups of its communicator at once.

    ``wire_bytes`` is what one rank sends; ``algorithm`` names what was chosen ("ring", "tree", "nvls", ...,
    with the protocol after a slash where it matters); ``sms`` SMs are taken on each GPU while it runs.
    """

    algorithm: str
    phases: tuple[Phase, ...]
    wire_bytes: int
    sms: int = 0
