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


def test_holders_are_grouped_by_name_and_place_largest_first() -> None:
    same = [(Storage("hidden", 100, "activations"), "forward", f"layers.{i % 2}") for i in range(4)]
    one = [(Storage("flat", 200, "optimizer"), "setup", "")]
    assert [(h.name, h.module, h.count, h.num_bytes) for h in holders(same + one)] == [
        ("flat", "", 1, 200),
        ("hidden", "layers.0", 2, 200),
        ("hidden", "layers.1", 2, 200),
    ]


def test_only_the_largest_are_listed() -> None:
    owners = [(Storage(f"s{i}", i + 1, "buffers"), "setup", "") for i in range(2 * MAX_HOLDERS)]
    listed = holders(owners)
    assert len(listed) == MAX_HOLDERS
    assert min(h.num_bytes for h in listed) == MAX_HOLDERS + 1
