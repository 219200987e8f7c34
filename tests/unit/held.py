"""What a rank holds after chunks of its program."""

from __future__ import annotations

from collections.abc import Iterable

from sim.ir.program import Alloc, Chunk, Free, Storage


def live(chunks: Iterable[Chunk]) -> dict[int, Storage]:
    """Return what is held after these chunks; nothing is held twice, nothing freed that is not held."""
    held: dict[int, Storage] = {}
    for chunk in chunks:
        for each in chunk:
            if isinstance(each, Alloc):
                assert id(each.storage) not in held, each.storage
                held[id(each.storage)] = each.storage
            elif isinstance(each, Free):
                assert id(each.storage) in held, each.storage
                del held[id(each.storage)]
    return held


def live_bytes(chunks: Iterable[Chunk]) -> int:
    return sum(storage.num_bytes for storage in live(chunks).values())
