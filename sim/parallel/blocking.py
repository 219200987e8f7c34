"""``CUDA_LAUNCH_BLOCKING=1``: the host waits for each kernel before it goes on.

CUDA C++ Programming Guide, "Concurrent Execution between Host and Device": the variable disables asynchronous kernel
launches. What the host takes for a kernel is then hidden behind nothing, and nothing overlaps with the kernels of
collectives, which are waited for too. Copies stay asynchronous.

Leaves out: that sends and receives between pipeline stages hold the
host as well (what is computed from a message waits for it anyway).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sim.ir.program import Chunk, Collective, Compute, Copy, HostWait, Instruction, Program, Record, Recv, Send, Wait

EVENT = "launched"
_DISTURB = (Wait, Send, Recv, Copy)
"""After which a stream may be busy although the host has seen it empty."""


def blocking(programs: Sequence[Program]) -> list[Program]:
    """Return the programs with a wait behind every kernel and collective; chunks that are one stay one."""
    known: dict[int, tuple[Chunk, Chunk]] = {}

    def of(chunk: Chunk) -> Chunk:
        if id(chunk) not in known:
            known[id(chunk)] = (chunk, waited_for(chunk))
        return known[id(chunk)][1]

    return [replace(p, chunks={name: of(chunk) for name, chunk in p.chunks.items()}) for p in programs]


def waited_for(chunk: Chunk) -> Chunk:
    """Return the chunk with an event and a wait for it behind each kernel and collective.

    Where the host has seen a stream empty and gave it nothing else since, the kernel says itself that it is waited for
    (``Compute.blocking``): the same times with fewer events.
    """
    found: list[Instruction] = []
    empty: dict[str, None] = {}
    for step in chunk:
        if isinstance(step, Compute) and step.stream in empty:
            found.append(replace(step, blocking=True))
            continue
        found.append(step)
        if isinstance(step, Compute | Collective):
            found += (Record(EVENT, step.stream), HostWait(EVENT))
            empty[step.stream] = None
        elif isinstance(step, _DISTURB):
            empty.pop(step.stream, None)
    return tuple(found)
