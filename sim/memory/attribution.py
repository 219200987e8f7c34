"""Whose bytes they are: the account of what is live at one moment."""

from __future__ import annotations

from collections.abc import Iterable

from sim.ir.footprint import CATEGORIES, Holder
from sim.ir.program import Storage

MAX_HOLDERS = 64
"""Holders that are listed; there is one for each name, so this is a matter of reading only."""

Owner = tuple[Storage, str, str]
"""A live storage with the phase and the module that allocated it."""


def account(owners: Iterable[Owner], allocated_bytes: int) -> dict[str, int]:
    """Return bytes by category, as requested; ``rounding`` is what the blocks hold beyond that.

    So the parts add up to ``allocated_bytes``: ``torch.cuda.memory_allocated()`` counts whole blocks.
    """
    parts = dict.fromkeys(CATEGORIES, 0)
    for storage, _, _ in owners:
        parts[storage.category] += storage.num_bytes
    parts["rounding"] = allocated_bytes - sum(parts.values())
    return parts


def holders(owners: Iterable[Owner]) -> tuple[Holder, ...]:
    """Return the names that hold most, largest first; equal ones by name.

    Storages of one name, category and phase are one holder; its module is theirs if they share it, else "".
    """
    found: dict[tuple[str, str, str], tuple[list[int], set[str]]] = {}
    for storage, phase, module in owners:
        sums, modules = found.setdefault((storage.name, storage.category, phase), ([0, 0], set()))
        sums[0] += 1
        sums[1] += storage.num_bytes
        modules.add(module)
    largest = sorted(found.items(), key=lambda item: (-item[1][0][1], item[0]))[:MAX_HOLDERS]
    return tuple(
        Holder(name, category, min(modules) if len(modules) == 1 else "", phase, *sums)
        for (name, category, phase), (sums, modules) in largest
    )
