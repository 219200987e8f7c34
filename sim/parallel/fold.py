"""Folding: ranks that do the same, in the same place, with the same neighbours, are one class.

Classes are derived, never assumed. A rank's colour is what tells it apart (the program it runs, its GPU's speed); the
partition by colours is refined until it is stable, by

- the colours in each of its groups on every axis, and how the group lies in the machine;
- the colour of the rank it sends to and of the one it receives from;
- what looks different around its GPU, the ranks on the GPUs beside it included.

In a stable partition the ranks of a class meet the same, load links that are shared alike, and so do the same at the
same ticks: one of them stands for all. Equal groups are one communicator, with the traffic of all of them.
Source: the colour refinement of Weisfeiler and Leman (1968); Cardon and Crochemore, "Partitioning a graph in
O(|A| log2 |V|)", Theoretical Computer Science 19, 1982.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sim.cluster.symmetry import Places
from sim.ir.program import Collective, Communicator, World

Group = tuple[int, ...]


class Groups(Protocol):
    """What folding asks of a mesh."""

    @property
    def world_size(self) -> int: ...

    def groups(self, axis: str) -> Sequence[Group]: ...


@dataclass(frozen=True, slots=True)
class Folding:
    """Classes of identical ranks.

    ``classes``        ascending ranks of each; by first rank, which represents it
    ``communicators``  name -> equal groups folded into one
    ``axes``           for each class: axis -> name of its communicator. On an axis of pairs a class may have two:
                       ``<axis>.send`` to the next and ``<axis>.recv`` from the one before
    """

    classes: tuple[tuple[int, ...], ...]
    communicators: Mapping[str, Communicator]
    axes: tuple[Mapping[str, str], ...]

    def class_of(self, rank: int) -> int:
        """Return the index of the class of a rank."""
        return next(i for i, ranks in enumerate(self.classes) if rank in ranks)


def fold(
    mesh: Groups,
    colours: Sequence[Hashable],
    *,
    axes: Sequence[str],
    pairs: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    places: Places | None = None,
    folded: bool = True,
    lone: frozenset[str] = frozenset(),
    within: Mapping[str, tuple[Group, ...]] | None = None,
) -> Folding:
    """Return the classes of the ranks of ``mesh`` and the communicators among them.

    ``colours``  by rank: equal only for ranks that run the same program on GPUs of the same speed
    ``axes``     those whose groups meet in collectives
    ``pairs``    axis -> (sender, receiver): whoever sends on it has one receiver and the other way round
    ``places``   where the ranks are; without it all places are alike
    ``folded``   False: every rank is a class of its own, every group a communicator of its own
    ``lone``     axes whose transfers will share links with nothing: it makes no difference how they load them
    ``within``   axis of pairs -> the process groups in whose communicators its messages go
    """
    assert len(colours) == mesh.world_size, f"{len(colours)} colours for {mesh.world_size} ranks"
    groups = {axis: tuple(mesh.groups(axis)) for axis in axes}
    pairs = pairs or {}
    if folded:
        lies = _Lies(groups, pairs, places)
        meeting = sum(any(len(group) > 1 for group in of_axis) for of_axis in groups.values()) + len(pairs)
        if places is not None and meeting > 1:
            colours = list(zip(colours, _on_rings(groups, places, lone), strict=True))
        of_rank = _numbered(colours)
        num_colours = -1
        while num_colours != max(of_rank) + 1:
            num_colours = max(of_rank) + 1
            of_rank = _refined(of_rank, groups, pairs, lies, places)
    else:
        of_rank = list(range(mesh.world_size))
    return _folding(of_rank, groups, pairs, lone if folded else frozenset(), within or {})


@dataclass(frozen=True, slots=True)
class _Written:
    """The mesh of a world that is written already."""

    world_size: int
    of_axis: Mapping[str, tuple[Group, ...]]

    def groups(self, axis: str) -> tuple[Group, ...]:
        return self.of_axis[axis]


def refold(
    world: World,
    *,
    speeds: Mapping[int, float],
    places: Places | None,
    folded: bool = True,
    trusting: bool = False,
    alike: Callable[[World], Sequence[int]] | None = None,
) -> World:
    """Return a world with the classes that its ranks form in this machine.

    ``world`` may fold all ranks of one program, wherever they are; ``speeds`` are of the ranks that are not like the
    others. Not ``folded``: every rank by itself, every group a communicator, for those who want to compare.

    ``trusting``: what all stages of a pipeline do together once a step (the norm of the gradients, say) is taken to
    happen while nothing else moves on the links that it needs. ``engine.run`` raises ContentionError where that is not
    so, and then the world has to be folded anew without trust. ``alike``: colours of the classes of a world, equal for
    those that what travels over which wire makes one after all (``alike.alike``); asked only where ranks of one program
    are several classes.
    """
    program_of: dict[int, int] = {rank: i for i, p in enumerate(world.programs) for rank in p.ranks}
    ranks = sorted(program_of)
    assert ranks == list(range(world.world_size)), "every rank has a program"
    groups: dict[str, list[Group]] = {}
    pairs: dict[str, list[tuple[int, int]]] = {}
    named: dict[str, dict[str, bool]] = {}
    for program in world.programs:
        for axis, name in program.axes.items():
            named.setdefault(axis.removesuffix(".send").removesuffix(".recv"), {})[name] = axis.endswith(_ENDS)
    for axis, names in named.items():
        for name, is_pair in names.items():
            if is_pair:
                pairs.setdefault(axis, []).extend((a, b) for a, b in world.communicators[name].groups)
            else:
                groups.setdefault(axis, []).extend(world.communicators[name].groups)
    mesh = _Written(world.world_size, {axis: tuple(found) for axis, found in groups.items()})
    colours = [(program_of[rank], speeds.get(rank, 1.0)) for rank in ranks]
    lone = _once(world, groups, program_of) if trusting else frozenset()
    within = {c.axis: c.within for c in world.communicators.values() if c.within}
    folding = fold(
        mesh, colours, axes=tuple(groups), pairs=pairs, places=places, folded=folded, lone=lone, within=within
    )
    found = _world(world, program_of, folding)
    if alike is None or not folded or speeds or len(found.programs) == len(world.programs):
        return found
    colours_ = alike(found)
    if len(set(colours_)) == len(found.programs):
        return found
    of_rank = [0] * world.world_size
    for program, colour in zip(found.programs, colours_, strict=True):
        for rank in program.ranks:
            of_rank[rank] = colour
    return _world(world, program_of, _folding(of_rank, mesh.of_axis, pairs, lone, within))


def _world(world: World, program_of: Mapping[int, int], folding: Folding) -> World:
    """Return a world's programs for the classes of a folding."""
    programs = tuple(
        replace(world.programs[program_of[ranks[0]]], ranks=ranks, axes=axes)
        for ranks, axes in zip(folding.classes, folding.axes, strict=True)
    )
    return World(world.world_size, programs, folding.communicators)


_ENDS = (".send", ".recv")


def _once(world: World, groups: Mapping[str, Sequence[Group]], program_of: Mapping[int, int]) -> frozenset[str]:
    """Return the axes on which different programs meet, in chunks that each of them calls once a step."""
    crossing = [
        axis for axis, of_axis in groups.items() if all(len({program_of[r] for r in group}) > 1 for group in of_axis)
    ]
    often: dict[str, None] = {}
    looked_at: dict[int, None] = {}
    for program in world.programs if crossing else ():
        calls = Counter(call.chunk for call in program.step)
        for name, times in calls.items():
            chunk = program.chunks[name]
            if times > 1 and id(chunk) not in looked_at:
                looked_at[id(chunk)] = None
                often.update((step.axis, None) for step in chunk if isinstance(step, Collective))
    return frozenset(axis for axis in crossing if axis not in often)


class _Lies:
    """How each group lies in the machine: (axis, index of the group) -> number; the same for all without places."""

    def __init__(
        self,
        groups: Mapping[str, Sequence[Group]],
        pairs: Mapping[str, Sequence[tuple[int, int]]],
        places: Places | None,
    ) -> None:
        if places is None:
            self.groups = {axis: [0] * len(of_axis) for axis, of_axis in groups.items()}
            self.pairs = {axis: [0] * len(of_axis) for axis, of_axis in pairs.items()}
        else:
            self.groups = {axis: [places.signature(g) for g in of_axis] for axis, of_axis in groups.items()}
            self.pairs = {axis: places.pair_signatures(of_axis) for axis, of_axis in pairs.items()}


def _on_rings(groups: Mapping[str, Sequence[Group]], places: Places, lone: frozenset[str]) -> list[int]:
    """Return the places of ranks whose groups have several GPUs on each of several nodes; -1 for the others.

    NCCL's rings enter and leave a node at certain GPUs, so that their wires carry more than others': it matters to
    what else these GPUs send meanwhile, unless the group's transfers are ``lone``.
    """
    found = [-1] * len(places.domains)
    for of_axis in [of_axis for axis, of_axis in groups.items() if axis not in lone]:
        for group in of_axis:
            num_domains = len({places.domains[rank] for rank in group})
            if 1 < num_domains < len(group):
                for rank in group:
                    found[rank] = places.locals[rank]
    return found


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    """Return small numbers for keys, by first appearance."""
    number: dict[Hashable, int] = {}
    return [number.setdefault(key, len(number)) for key in keys]


def _refined(
    of_rank: Sequence[int],
    groups: Mapping[str, Sequence[Group]],
    pairs: Mapping[str, Sequence[tuple[int, int]]],
    lies: _Lies,
    places: Places | None,
) -> list[int]:
    """Return the colours of one round more."""
    columns: list[Sequence[Hashable]] = [of_rank]
    for axis, of_axis in groups.items():
        if len(of_axis) == len(of_rank):  # groups of one
            continue
        column = [-1] * len(of_rank)
        number: dict[Hashable, int] = {}
        for group, lie in zip(of_axis, lies.groups[axis], strict=True):
            colours = [of_rank[rank] for rank in group]
            colours.sort()
            key = (lie, *colours)
            colour = number.setdefault(key, len(number))
            for rank in group:
                column[rank] = colour
        columns.append(column)
    for axis, between in pairs.items():
        ahead: list[Hashable] = [None] * len(of_rank)
        behind: list[Hashable] = [None] * len(of_rank)
        for (sender, receiver), lie in zip(between, lies.pairs[axis], strict=True):
            ahead[sender] = (lie, of_rank[receiver])
            behind[receiver] = (lie, of_rank[sender])
        columns += [ahead, behind]
    if places is not None:
        columns.append(_by_place(of_rank, places))
    return _numbered(list(zip(*columns, strict=True)))


def _by_place(of_rank: Sequence[int], places: Places) -> list[Hashable]:
    size = places.cluster.gpus_per_domain
    on_gpus: dict[int, list[int]] = {}
    for rank, domain in enumerate(places.domains):
        on_gpus.setdefault(domain, [-1] * size)[places.locals[rank]] = of_rank[rank]
    around = {domain: places.colours(domain, tuple(on)) for domain, on in on_gpus.items()}
    found = [around[domain][local] for domain, local in zip(places.domains, places.locals, strict=True)]
    if not places.leaves:
        return list(found)
    below: dict[int, list[int]] = {}
    for leaf, colour in zip(places.leaves, found, strict=True):
        below.setdefault(leaf, []).append(colour)
    leaves = {leaf: tuple(sorted(colours)) for leaf, colours in below.items()}
    number: dict[Hashable, int] = {}
    of_leaf = {leaf: number.setdefault(key, len(number)) for leaf, key in leaves.items()}
    return [(colour, of_leaf[leaf]) for colour, leaf in zip(found, places.leaves, strict=True)]


def _folding(
    of_rank: Sequence[int],
    groups: Mapping[str, Sequence[Group]],
    pairs: Mapping[str, Sequence[tuple[int, int]]],
    lone: frozenset[str],
    within: Mapping[str, tuple[Group, ...]],
) -> Folding:
    """Return classes in the order of their first ranks and communicators in that of axes and first groups."""
    classes: dict[int, list[int]] = {}
    for rank, colour in enumerate(of_rank):
        classes.setdefault(colour, []).append(rank)
    index = {colour: i for i, colour in enumerate(classes)}
    communicators: dict[str, Communicator] = {}
    axes: list[dict[str, str]] = [{} for _ in classes]
    for axis, of_axis in (*groups.items(), *pairs.items()):
        alike: dict[Group, list[Group]] = {}
        for group in of_axis:
            colours = [of_rank[rank] for rank in group]
            alike.setdefault(tuple(colours if axis in pairs else sorted(colours)), []).append(group)
        for colours_, found in alike.items():
            name = axis if len(alike) == 1 else f"{axis}@{found[0][0]}"
            members = tuple(sorted({index[colour] for colour in colours_}))
            of_messages = within.get(axis, ())
            communicators[name] = Communicator(name, axis, tuple(found), members, axis in lone, of_messages)
            if axis in pairs:
                sender, receiver = (index[colour] for colour in colours_)
                axes[sender][f"{axis}.send"] = name
                axes[receiver][f"{axis}.recv"] = name
            else:
                for member in members:
                    axes[member][axis] = name
    return Folding(tuple(map(tuple, classes.values())), communicators, tuple(axes))
