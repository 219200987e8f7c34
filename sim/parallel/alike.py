"""Which classes of a folded world do the same after all: those whose transfers load alike links alike.

Folding (``fold``) knows where ranks are but not what travels over which wire, so where groups have several GPUs on each
of several nodes it tells the places in a node apart. Rings are laid so that every GPU of a group is one ring's first:
mostly the wires of all of them carry the same, and their classes are one. Here classes, communicators and links are
coloured together, by what is there, and refined until it is stable:

    class          its program, and what its connections hold; the communicator it has on each axis, and its copies
    communicator   its axis; what each transfer on it takes besides wires; the classes of a group; the links it loads,
                   each with its bytes
    link           its rate; the communicators that load it, each with its bytes

In a stable colouring links of a colour have the same capacity and get the same bytes of the same transfers. Then the
max-min fair rates of equal transfers are equal as well, whatever is under way, and so equal classes do the same at the
same ticks: fair shares depend on the sums of loads on each link only (``engine.network``).
Source: the colour refinement of Weisfeiler and Leman (1968); that equitable partitions carry over to what sums over
neighbours determine: Godsil, "Algebraic Combinatorics", 1993, chapter 5.
Checked by: tests/laws/test_fold_laws.py (folded is unfolded), tests/unit/test_alike.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from sim.ir.program import Collective, Communicator, Copy, Program, Recv, Send, World
from sim.ir.traffic import Link, Traffic

Transfer = Collective | Send | Recv | Copy
TrafficOf = Callable[[Transfer, Communicator | None, tuple[int, ...]], Traffic]
"""What a transfer of a class moves, all its groups together; a copy has ranks and no communicator."""

_Load = tuple[int, int, float]
"""(mover, index of its pattern, bytes)."""


class _Mover:
    """What loads links: a communicator, or the copies of a class.

    ``static``    what does not depend on where it is
    ``members``   classes of a group, in order where ``ordered``
    ``patterns``  loads that tell links apart otherwise than those before, (link, bytes) of each; ``sizes`` the
                  different bytes of each
    """

    __slots__ = ("known", "members", "ordered", "patterns", "sizes", "static")

    def __init__(self, members: Sequence[int], ordered: bool) -> None:
        self.members = members
        self.ordered = ordered
        self.static: list[Hashable] = []
        self.patterns: list[tuple[tuple[int, float], ...]] = []
        self.sizes: list[tuple[float, ...]] = []
        self.known: dict[tuple[tuple[int, int], ...], int] = {}


def alike(
    world: World, traffic_of: TrafficOf, links: Sequence[Link], apart: Sequence[Hashable] | None = None
) -> list[int]:
    """Return a colour for each class (``world.programs``): classes of one colour do the same.

    ``apart``  by class: equal only for those that are alike in what is not traffic
    """
    contents = _numbers([(id(program.step), id(program.chunks)) for program in world.programs])
    movers, of_class = _movers(world, contents, traffic_of)
    kinds, loads = _kinds(movers, links)
    classes = contents if apart is None else _numbers(list(zip(contents, apart, strict=True)))
    colours = _numbers([(tuple(mover.static), mover.ordered) for mover in movers])
    kind_colours = _numbers([kind[0] for kind in kinds])
    num_colours = 0
    while (found := max(classes) + max(colours) + max(kind_colours, default=0)) != num_colours:
        num_colours = found
        classes = _numbers([
            (own, tuple([colours[mover] for mover in of])) for own, of in zip(classes, of_class, strict=True)
        ])  # fmt: skip
        colours = _numbers([
            (
                own,
                _members(mover, classes),
                tuple(sorted({(pattern, kind_colours[kind], size) for pattern, kind, size in loaded})),
            )
            for own, mover, loaded in zip(colours, movers, loads, strict=True)
        ])  # fmt: skip
        kind_colours = _numbers([
            (own, tuple(sorted((colours[mover], pattern, size) for mover, pattern, size in kind[1])))
            for own, kind in zip(kind_colours, kinds, strict=True)
        ])  # fmt: skip
    return classes


def _numbers(keys: Sequence[Hashable]) -> list[int]:
    """Return small numbers for keys, by first appearance."""
    number: dict[Hashable, int] = {}
    return [number.setdefault(key, len(number)) for key in keys]


def _members(mover: _Mover, classes: Sequence[int]) -> tuple[int, ...]:
    found = [classes[member] for member in mover.members]
    return tuple(found if mover.ordered else sorted(found))


def _movers(world: World, contents: Sequence[int], traffic_of: TrafficOf) -> tuple[list[_Mover], list[tuple[int, ...]]]:
    """Return all movers, and the indices of each class's own, by axis."""
    class_of = {rank: index for index, program in enumerate(world.programs) for rank in program.ranks}
    movers: list[_Mover] = []
    index: dict[str, int] = {}
    told: dict[tuple[str, int], None] = {}
    transfers: dict[int, list[Transfer]] = {}
    of_class: list[tuple[int, ...]] = []
    for number, (program, content) in enumerate(zip(world.programs, contents, strict=True)):
        for axis in sorted(program.axes):
            name = program.axes[axis]
            if name not in index:
                communicator = world.communicators[name]
                mover = _Mover([class_of[rank] for rank in communicator.groups[0]], axis.endswith((".send", ".recv")))
                mover.static += [communicator.axis, communicator.num_ranks, communicator.lone]
                index[name] = len(movers)
                movers.append(mover)
        own = [index[program.axes[axis]] for axis in sorted(program.axes)]
        if content not in transfers:
            transfers[content] = _transfers(program)
        # classes of one program move the same on a communicator: the first of them tells
        fresh = {name for name in program.axes.values() if (name, content) not in told}
        told.update(((name, content), None) for name in program.axes.values())
        copies = _Mover((number,), ordered=False)
        for at, transfer in enumerate(transfers[content]):
            if isinstance(transfer, Copy):
                _tell(copies, (content, at), traffic_of(transfer, None, program.ranks))
            elif (name := program.axes[transfer.axis]) in fresh and world.communicators[name].num_ranks > 1:
                communicator = world.communicators[name]
                traffic = traffic_of(transfer, communicator, program.ranks)
                _tell(movers[index[name]], (content, at), traffic, communicator.lone)
        if copies.static:
            own.append(len(movers))
            movers.append(copies)
        of_class.append(tuple(own))
    return movers, of_class


def _transfers(program: Program) -> list[Transfer]:
    """Return the different transfers of a step, in the order of its chunks."""
    chunks = {id(program.chunks[call.chunk]): program.chunks[call.chunk] for call in program.step}
    kinds = (Collective, Send, Recv, Copy)
    return list({id(step): step for chunk in chunks.values() for step in chunk if isinstance(step, kinds)}.values())


def _tell(mover: _Mover, which: tuple[int, int], traffic: Traffic, lone: bool = False) -> None:
    """Note a transfer. Loads that tell links apart as others did that are noted already differ by their sizes only.

    Nothing shares links with a ``lone`` one: how it loads them makes no difference.
    """
    mover.static.append((which, traffic.algorithm, traffic.wire_bytes, traffic.sms, len(traffic.phases)))
    for phase in traffic.phases if not lone else ():
        sizes = dict.fromkeys(size for _, size in phase.loads)
        number = {size: at for at, size in enumerate(sizes)}
        pattern = tuple([(link, number[size]) for link, size in phase.loads])
        at = mover.known.get(pattern)
        if at is None:
            at = mover.known[pattern] = len(mover.patterns)
            mover.patterns.append(phase.loads)
            mover.sizes.append(tuple(sizes))
        scale = tuple(sorted(zip(mover.sizes[at], sizes, strict=True)))
        mover.static.append((at, scale, phase.latency_s, phase.stream_bytes, phase.max_bytes_per_s, phase.group_s))


def _kinds(
    movers: Sequence[_Mover], links: Sequence[Link]
) -> tuple[list[tuple[float, list[_Load]]], list[list[tuple[int, int, float]]]]:
    """Return kinds of links, which all movers load alike: (bytes per second, loads) of each; and for each mover its
    loads: (pattern, kind, bytes)."""
    on_link: dict[int, list[_Load]] = {}
    for number, mover in enumerate(movers):
        for at, pattern in enumerate(mover.patterns):
            for link, size in pattern:
                on_link.setdefault(link, []).append((number, at, size))
    rate_of = getattr(links, "bytes_per_s", None) or (lambda link: links[link].bytes_per_s)
    distinct = dict.fromkeys((rate_of(link), tuple(loads)) for link, loads in on_link.items())
    kinds = [(rate, list(loads)) for rate, loads in distinct]
    of_mover: list[list[tuple[int, int, float]]] = [[] for _ in movers]
    for kind, (_, loads) in enumerate(kinds):
        for number, at, size in loads:
            of_mover[number].append((at, kind, size))
    return kinds, of_mover
