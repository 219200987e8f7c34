"""The mesh: rank <-> coordinates on the axes, and the process groups along one axis or several.

``megatron`` is Megatron-Core's order "tp-cp-ep-dp-pp", fastest varying first (``initialize_model_parallel`` in
megatron/core/parallel_state.py). ``torch`` is torch's DeviceMesh as torchtitan lays it out: (pp, dp_replicate,
dp_shard, cp, tp), last fastest (torchtitan/distributed/parallel_dims.py). ``deepspeed`` is its own topology, (pipe,
data, model), last fastest (``PipeModelDataParallelTopology`` in deepspeed/runtime/pipe/topology.py). On the axes that
they share they agree: tensor groups are neighbours, pipeline neighbours furthest apart. A scenario may write any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

AXES = ("tp", "cp", "dp", "pp")
"""Fastest varying first: Megatron's default order "tp-cp-ep-dp-pp" (megatron/core/parallel_state.py)."""

ORDERS: dict[str, tuple[str, ...]] = {
    "megatron": ("tp", "cp", "dp", "pp"),
    "torch": ("tp", "cp", "dp_shard", "dp_replicate", "pp"),
    "deepspeed": ("tp", "cp", "dp", "pp"),
}
"""Fastest varying first. ``dp_shard`` and ``dp_replicate`` together are ``dp``."""

COMBINED: dict[str, tuple[str, ...]] = {
    "dp": ("dp_shard", "dp_replicate"),
    "dp_cp": ("cp", "dp_shard", "dp_replicate", "dp"),
    "dp_shard_cp": ("cp", "dp_shard"),
    "model": ("tp", "pp"),
    "world": ("tp", "cp", "dp_shard", "dp_replicate", "dp", "pp"),
}
"""Groups along several axes at once: ``dp_cp`` are the ranks that hold the same parameters, whose gradients are added;
``model`` those that hold one replica together."""


def within(axis: str, size: int) -> str:
    """Return the name of the axis of ``size`` neighbours along another: "dp.within.8"."""
    return f"{axis}.within.{size}"


def across(axis: str, size: int) -> str:
    """Return the name of the axis of those with the same place within ``size`` neighbours: "dp.across.8"."""
    return f"{axis}.across.{size}"


def mirrored(axis: str) -> str:
    """Return the name of the axis of stages r and p-1-r together, which hold copies of each other's layers."""
    return f"{axis}.mirrored"


@dataclass(frozen=True, slots=True)
class Mesh:
    """``sizes`` of the axes, fastest varying first."""

    sizes: tuple[tuple[str, int], ...]

    @property
    def world_size(self) -> int:
        return prod(size for _, size in self.sizes)

    def size(self, axis: str) -> int:
        """Return the ranks of one group of an axis, or of a combined one."""
        own = dict(self.sizes)
        if axis.endswith(".mirrored"):
            return 2 * self.size(axis.removesuffix(".mirrored"))
        return own[axis] if axis in own else prod(own.get(part, 1) for part in COMBINED.get(axis, ()))

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
        """Return the process groups of an axis, each with its ranks in ascending order, by first rank.

        ``axis`` is one of the mesh, one of ``COMBINED``, a part of these (``within``, ``across``), two of them
        (``mirrored``), or ``embedding``: the first and the last pipeline stage, which share tied embeddings.
        """
        if axis == "embedding":
            stages = self.size("pp")
            return tuple(tuple(sorted({group[0], group[stages - 1]})) for group in self.groups("pp"))
        if axis.endswith(".mirrored"):
            return self._mirrored(axis.removesuffix(".mirrored"))
        if axis.count(".") == 2:
            return self._parts(*axis.split("."))
        own = {name for name, _ in self.sizes}
        along = (axis,) if axis in own else COMBINED.get(axis, ())
        offsets, starts = self._offsets(along), self._offsets([name for name, _ in self.sizes if name not in along])
        return tuple(tuple(start + offset for offset in offsets) for start in starts)

    def _parts(self, axis: str, how: str, text: str) -> tuple[tuple[int, ...], ...]:
        """Return the groups of ``within`` or ``across``: stretches of an axis' groups, or one rank of each stretch."""
        size = int(text)
        parts: list[tuple[int, ...]] = []
        for group in self.groups(axis):
            assert len(group) % size == 0, f"groups of {size} do not divide {len(group)} ranks"
            if how == "within":
                parts.extend(group[at : at + size] for at in range(0, len(group), size))
            else:
                parts.extend(group[at::size] for at in range(size))
        return tuple(sorted(parts))

    def _mirrored(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Return each group of the first half of the stages with its like on the other side of the middle."""
        last = self.size("pp") - 1
        found = []
        for group in self.groups(axis):
            stage = self.coordinates(group[0])["pp"]
            if stage < last - stage:
                others = (self.rank({**self.coordinates(rank), "pp": last - stage}) for rank in group)
                found.append(tuple(sorted((*group, *others))))
        return tuple(sorted(found))

    def _offsets(self, axes: Sequence[str]) -> list[int]:
        """Return the ranks that lie along some axes at the origin of the others, ascending."""
        strides, stride = [], 1
        for axis, size in self.sizes:
            if axis in axes:
                strides.append([stride * index for index in range(size)])
            stride *= size
        return sorted(sum(place) for place in product(*strides))

    def neighbours(self, axis: str, step: int, *, around: bool) -> tuple[tuple[int, int], ...]:
        """Return the (sender, receiver) pairs ``step`` (+1 or -1) along an axis, by sender.

        ``around``: the last also sends to the first, as in the interleaved schedule. A rank alone sends nothing.
        """
        pairs = []
        for group in self.groups(axis):
            count = len(group)
            for index, sender in enumerate(group):
                other = index + step
                if count > 1 and (around or 0 <= other < count):
                    pairs.append((sender, group[other % count]))
        return tuple(sorted(pairs))


def mesh_of(sizes: Mapping[str, int], order: Sequence[str] = AXES) -> Mesh:
    """Return the mesh with the given axis sizes in ``order``, fastest varying first; absent axes have size 1."""
    unknown = [axis for axis in sizes if axis not in order]
    assert not unknown, f"axes {unknown} are not in the order {list(order)}"
    return Mesh(tuple((axis, sizes.get(axis, 1)) for axis in order))
