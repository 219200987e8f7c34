"""The mesh: rank <-> coordinates on the axes, and the process groups along each axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

AXES = ("tp", "cp", "dp", "pp")
"""Fastest varying first, Megatron's default order "tp-cp-ep-dp-pp" (megatron/core/parallel_state.py)."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """``sizes`` of the axes, fastest varying first."""

    sizes: tuple[tuple[str, int], ...]

    @property
    def world_size(self) -> int:
        return prod(size for _, size in self.sizes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the rank's place on each axis."""
        place = {}
        for axis, size in self.sizes:
            rank, place[axis] = divmod(rank, size)
        return place

    def rank(self, place: Mapping[str, int]) -> int:
        """Return the rank at that place. The inverse of :meth:`coordinates`."""
        rank, stride = 0, 1
        for axis, size in self.sizes:
            rank += place[axis] * stride
            stride *= size
        return rank

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Return the process groups of an axis, each with its ranks in ascending order, by first rank."""
        stride, length = 1, 1
        for name, size in self.sizes:
            if name == axis:
                length = size
                break
            stride *= size
        starts = (r for r in range(self.world_size) if (r // stride) % length == 0)
        return tuple(tuple(range(start, start + stride * length, stride)) for start in starts)


def mesh_of(sizes: Mapping[str, int]) -> Mesh:
    """Return the mesh with the given axis sizes in the order of ``AXES``; axes that are absent have size 1."""
    return Mesh(tuple((axis, sizes.get(axis, 1)) for axis in AXES))
