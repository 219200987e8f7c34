"""What the allocator asks of the driver in every step, as instructions: so that the engine takes time for it.

Most trainings ask for memory in their first steps and never again. Near the end of a GPU's memory the allocator does
not find what it needs in its cache, gives the cache back and asks anew (``release_cached_blocks`` of
c10/cuda/CUDACachingAllocator.cpp): it waits for the events of blocks that other streams use, then calls ``cudaFree``
for each segment, which waits for all that the GPU was given to do (c10's ``unmapHandles`` waits for the stream of an
expandable segment). So the GPU runs dry, stands still while the driver unmaps and maps pages, and then waits for the
host, whose lead is gone: the next collectives are not issued ahead either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sim.ir.footprint import DriverCalls, Footprint
from sim.ir.program import (
    Call,
    Chunk,
    Collective,
    Compute,
    Copy,
    HostCompute,
    HostWait,
    Instruction,
    Program,
    Record,
    Recv,
    Send,
    Wait,
)
from sim.ir.timeline import Position

PAGE_BYTES = 2**21
"""Pages of the GPU's memory that the driver maps; ``cuMemGetAllocationGranularity`` says the same."""


def with_driver_calls(program: Program, asked: Sequence[DriverCalls]) -> Program:
    """Return the program with what its step asks of the driver, before the ``Alloc`` that needs it.

    The chunks of such calls are chunks of their own, one for all that ask the same. The first step takes them where it
    has the same calls.
    """
    if not asked:
        return program
    streams = _streams(program)
    by_call: dict[int, list[DriverCalls]] = {}
    for calls in asked:
        by_call.setdefault(calls.position[0], []).append(calls)
    names: dict[tuple[str, tuple[DriverCalls, ...]], str] = {}
    chunks: dict[str, Chunk] = dict(program.chunks)
    step: list[Call] = []
    for index, call in enumerate(program.step):
        here = tuple(replace(calls, position=(0, calls.position[1])) for calls in by_call.get(index, ()))
        if not here:
            step.append(call)
            continue
        name = names.get((call.chunk, here))
        if name is None:
            name = names[call.chunk, here] = f"{call.chunk} flush {len(names)}"
            chunks[name] = _inserted(program.chunks[call.chunk], here, streams)
        step.append(Call(name, call.microbatch))
    first_step = tuple(step) if program.first_step == program.step else _alike(program, step)
    return replace(program, chunks=chunks, step=tuple(step), first_step=first_step)


def moved(footprint: Footprint, program: Program) -> Footprint:
    """Return the footprint of a program with its places in the step as they are :func:`with_driver_calls`."""
    if not footprint.driver:
        return footprint
    streams = _streams(program)
    inserted: dict[int, list[tuple[int, int]]] = {}
    for calls in footprint.driver:
        index, at = calls.position
        inserted.setdefault(index, []).append((at, len(_instructions(calls, streams))))

    def place(position: Position) -> Position:
        index, at = position
        return index, at + sum(count for before, count in inserted.get(index, ()) if before <= at)

    like_a_step = ("steady", "first") if program.first_step == program.step else ("steady",)
    failure = footprint.out_of_memory
    if failure is not None and failure.step in like_a_step:
        failure = replace(failure, position=place(failure.position))
    in_step = footprint.peak_step in like_a_step
    return replace(
        footprint,
        peak_position=place(footprint.peak_position) if in_step else footprint.peak_position,
        samples=tuple(
            replace(sample, position=place(sample.position)) if in_step else sample for sample in footprint.samples
        ),
        events=tuple(
            replace(event, position=place(event.position)) if event.step in like_a_step else event
            for event in footprint.events
        ),
        out_of_memory=failure,
    )


def _alike(program: Program, step: Sequence[Call]) -> tuple[Call, ...]:
    """Return the first step, its calls those that ``step`` has in their place."""
    places: dict[tuple[Call, int], Call] = {}
    counts: dict[Call, int] = {}
    for before, after in zip(program.step, step, strict=True):
        counts[before] = nth = counts.get(before, -1) + 1
        places[before, nth] = after
    counts = {}
    calls = []
    for call in program.first_step:
        counts[call] = nth = counts.get(call, -1) + 1
        calls.append(places.get((call, nth), call))
    return tuple(calls)


def _inserted(chunk: Chunk, asked: Iterable[DriverCalls], streams: Sequence[str]) -> Chunk:
    """Return the chunk with the calls before the instructions at their positions."""
    before: Mapping[int, list[Instruction]] = _by_place(asked, streams)
    out: list[Instruction] = []
    for index, instruction in enumerate(chunk):
        out += before.get(index, ())
        out.append(instruction)
    return tuple(out)


def _by_place(asked: Iterable[DriverCalls], streams: Sequence[str]) -> dict[int, list[Instruction]]:
    found: dict[int, list[Instruction]] = {}
    for calls in asked:
        found.setdefault(calls.position[1], []).extend(_instructions(calls, streams))
    return found


def _instructions(calls: DriverCalls, streams: Sequence[str]) -> list[Instruction]:
    """Return what the host does: it waits for every stream if memory goes back, then the driver gives and takes."""
    out: list[Instruction] = []
    if calls.given:
        out += [Record(f"flush {stream}", stream) for stream in streams]
        out += [HostWait(f"flush {stream}") for stream in streams]
    for count, num_bytes, plain, handles in (
        (calls.given, calls.given_bytes, "cuda_free", "unmap_handle"),
        (calls.taken, calls.taken_bytes, "cuda_malloc", "map_handle"),
    ):
        if not count:
            continue
        if calls.expandable:
            out.append(HostCompute(handles, handles, count))
        else:
            out.append(HostCompute(plain, plain, count))
            out.append(HostCompute(plain, f"{plain}_page", num_bytes // PAGE_BYTES))
    return out


def _streams(program: Program) -> tuple[str, ...]:
    """Return the streams that a step uses, in the order of its instructions."""
    found: dict[str, None] = {}
    kinds = (Compute, Collective, Send, Recv, Copy, Record, Wait)
    for name in dict.fromkeys(call.chunk for call in program.step):
        for instruction in program.chunks[name]:
            if isinstance(instruction, kinds):
                found[instruction.stream] = None
    return tuple(found)
