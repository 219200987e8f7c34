"""The allocator without objects for blocks, and the scripts it plays; tests/laws holds it equal to the other one."""

from __future__ import annotations

from sim.ir.program import Alloc, Free, Instruction, Mark, Storage, UseOn
from sim.memory.allocator import AllocatorSettings
from sim.memory.plain import PlainAllocator
from sim.memory.script import MICROBATCH, OWN, USE, Compiler, Scripts

MIB = 2**20


def storage(name: str, mib: int, own: bool = False) -> Storage:
    return Storage(name, mib * MIB, "activations", own)


def test_chunks_that_ask_the_same_are_one_script() -> None:
    """Registers count from 0 in each chunk; a free is the complement of its register."""
    scripts = Scripts(0)
    compiler = Compiler(scripts)
    first, second = ([storage("a", 3), storage("b", 5)] for _ in range(2))
    codes = [compiler.compile((Mark("forward", "x"), Alloc(a), Alloc(b), Free(a))) for a, b in (first, second)]
    assert codes[0].script is codes[1].script
    assert codes[0].script.actions == (0, 1, ~0)
    assert codes[0].script.sizes == (3 * MIB, 5 * MIB)
    assert (codes[0].script.inputs, codes[0].script.outputs) == ((), (1,))
    assert codes[0].outputs != codes[1].outputs
    assert codes[0].positions == [1, 2, 3]


def test_what_comes_from_elsewhere_is_an_input() -> None:
    compiler = Compiler(Scripts(0))
    kept, used = storage("kept", 3, own=True), storage("used", 3)
    chunk: tuple[Instruction, ...] = (UseOn(used, "comm"), Free(kept))
    code = compiler.compile(chunk)
    assert code.script.actions == (USE, ~1)
    assert (code.script.inputs, code.script.outputs) == ((0, 1), (0,))
    assert code.inputs[1] & OWN


def test_blocks_split_merge_and_are_found_again() -> None:
    """3 and 5 MiB are of one segment of 20 MiB; freed, they are one block of 20 again, which 18 MiB then take."""
    scripts = Scripts(0)
    compiler = Compiler(scripts)
    a, b, c = storage("a", 3, own=True), storage("b", 5, own=True), storage("c", 18)
    allocator = PlainAllocator(AllocatorSettings(), scripts)
    forward, backward = compiler.compile((Alloc(a), Alloc(b))), compiler.compile((Free(a), Free(b), Alloc(c)))
    most = allocator.play(forward, 0, 1 << MICROBATCH, None)
    assert (most.allocated_bytes, most.action) == (8 * MIB, 1)
    assert sorted(allocator.live.values()) == [0, 3 * MIB]
    assert not allocator.alone(forward.outputs[0] + (1 << MICROBATCH), 3 * MIB)
    allocator.play(backward, 1, 1 << MICROBATCH, None)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (18 * MIB, 20 * MIB)
    assert list(allocator.live.values()) == [0]


def test_a_limit_that_is_met_empties_the_cache_first() -> None:
    """10 MiB free are given back for 12, which then fit 16; 6 more (a segment of 20 MiB) lack 12 + 20 - 16."""
    scripts = Scripts(0)
    compiler = Compiler(scripts)
    a, b, c = storage("a", 10), storage("b", 12), storage("c", 6)
    allocator = PlainAllocator(AllocatorSettings(capacity_bytes=16 * MIB), scripts)
    short: list[tuple[int, int, int]] = []
    allocator.on_out_of_memory = lambda at, size, lacks: short.append((at, size, lacks))
    allocator.play(compiler.compile((Alloc(a), Free(a), Alloc(b))), 0, 0, None)
    assert (allocator.num_alloc_retries, allocator.reserved_bytes, short) == (1, 12 * MIB, [])
    allocator.play(compiler.compile((Alloc(c),)), 1, 0, None)
    assert (allocator.num_alloc_retries, short) == (2, [(0, 6 * MIB, 16 * MIB)])
