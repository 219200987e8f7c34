"""The account at the peak."""

from __future__ import annotations

from sim.ir.footprint import CATEGORIES
from sim.ir.program import Storage
from sim.memory.attribution import MAX_HOLDERS, account, holders


def test_rounding_is_what_blocks_hold_beyond_the_requests() -> None:
    owners = [(Storage("w", 1000, "parameters"), "setup", ""), (Storage("x", 24, "activations"), "forward", "m")]
    parts = account(owners, 1024 + 512)
    assert parts == {**dict.fromkeys(CATEGORIES, 0), "parameters": 1000, "activations": 24, "rounding": 512}
    assert tuple(parts) == CATEGORIES


def test_storages_of_one_name_are_one_holder_largest_first() -> None:
    same = [(Storage("hidden", 100, "activations"), "forward", f"layers.{i % 2}") for i in range(4)]
    one = [(Storage("flat", 300, "optimizer"), "setup", "model")]
    assert [(h.name, h.module, h.count, h.num_bytes) for h in holders(same + one)] == [
        ("hidden", "", 4, 400),
        ("flat", "model", 1, 300),
    ]


def test_only_the_largest_are_listed() -> None:
    owners = [(Storage(f"s{i}", i + 1, "buffers"), "setup", "") for i in range(2 * MAX_HOLDERS)]
    listed = holders(owners)
    assert len(listed) == MAX_HOLDERS
    assert min(h.num_bytes for h in listed) == MAX_HOLDERS + 1
