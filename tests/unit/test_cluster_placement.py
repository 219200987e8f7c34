"""Ranks sit on GPUs in order unless told otherwise."""

from __future__ import annotations

import pytest

from sim.cluster.placement import place


def test_identity_by_default() -> None:
    assert place(4, 8) == (0, 1, 2, 3)


def test_an_explicit_map() -> None:
    assert place(3, 8, [7, 0, 4]) == (7, 0, 4)


@pytest.mark.parametrize("gpus", [[0, 0], [0, 8], [0]])
def test_a_wrong_map_is_our_own_mistake(gpus: list[int]) -> None:
    with pytest.raises(AssertionError):
        place(2, 8, gpus)
