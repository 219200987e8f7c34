"""The orders of V-Half and V-Min: pipelines in a V that hold half of 1F1B's activations, or a third.

Source: Qi et al., "Pipeline Parallelism with Controllable Memory", arXiv 2405.15362, sections 3 and 4; as in
sail-sg/zero-bubble-pipeline-parallelism, megatron/core/pipeline_parallel/zerobubble/scheduler/zbv_greedy.py.

A microbatch visits each rank four times (forward down the V and up, input gradient down and up) at offsets that say how
long its activations live; the next microbatch does the same six slots later (*building block*). Weight gradients take
the slots left over. Passes before and after the steady part are then pulled forward as far as neighbours and the
memory of the steady part let them (*squeezing*), as if all passes were of one length.

Where a step is so short that its last forward starts before its first backward is back, the authors' program leaves its
end unsqueezed; here it is squeezed like any other.
"""

from __future__ import annotations

from typing import NamedTuple

Slots = list[list[list[int]]]
"""rank -> kind -> microbatch -> slot. Kinds 0 to 3 are a microbatch's visits of a rank; 4 all weight gradients."""
DOWN, UP, BACK_DOWN, BACK_UP, WEIGHT = range(5)
"""Forward of chunk 0, of chunk 1, input gradient of chunk 1, of chunk 0. ``WEIGHT + i`` is of ``BACK_DOWN + i``."""
PERIOD = 6


class Visit(NamedTuple):
    """A pass of a rank: its kind, ``WEIGHT`` or ``WEIGHT + 1`` for weight gradients, and its microbatch."""

    kind: int
    microbatch: int


def half_block(p: int) -> list[list[int]]:
    """V-Half's building block: a microbatch goes down at half speed and up at full (``stable_pattern_v_half``)."""
    wait = 3 if p % 2 == 0 else 0  # or two passes would meet in one slot
    return [[2 * r, 3 * p - r - 2, 3 * p + wait + 2 * r - 1, 6 * p + wait - r - 2] for r in range(p)]


def least_block(p: int) -> list[list[int]]:
    """V-Min's: it goes down and up at full speed (``stable_pattern_v_min``)."""
    wait = 2 if p % 3 == 0 else 0
    return [[r, 2 * p - r - 1, 2 * p + wait + r, 4 * p + wait - r - 1] for r in range(p)]


def controllable(block: list[list[int]], m: int) -> list[list[Visit]]:
    """Return the order of each rank. Of a long step the steady part is worked out once and repeated."""
    drawn = min(m, 3 * len(block) + 4)
    orders = _drawn(block, drawn)
    return [_repeated(order, 2 * len(block), m - drawn) for order in orders] if m > drawn else orders


def _repeated(order: list[Visit], steady: int, times: int) -> list[Visit]:
    """Repeat what a rank does between two forwards of the steady part."""
    start, end = order.index(Visit(DOWN, steady)), order.index(Visit(DOWN, steady + 1))
    turn = order[start:end]
    body = [Visit(kind, i + k) for k in range(times) for kind, i in turn]
    return order[:start] + body + [Visit(kind, i + times) for kind, i in order[start:]]


def _drawn(block: list[list[int]], m: int) -> list[list[Visit]]:
    slots = [[[start + PERIOD * i for i in range(m)] for start in kinds] for kinds in block]
    squeezed = _eager(_pulled([[*kinds, _gaps(kinds, m)] for kinds in slots], m, weights=True))
    again = _pulled([kinds[:WEIGHT] for kinds in squeezed], m, weights=False)
    final = _eager([[*kinds, _gaps(kinds, m)] for kinds in again])
    return [_order(kinds[:WEIGHT], m) for kinds in final]


def _row(kinds: list[list[int]]) -> list[int]:
    """Return what is in each slot of a rank, -1 where nothing is."""
    row = [-1] * (max(slots[-1] for slots in kinds) + 1)
    for kind, slots in enumerate(kinds):
        for slot in slots:
            row[slot] = kind
    return row


def _gaps(kinds: list[list[int]], m: int) -> list[int]:
    """Return the slots of weight gradients: the free ones after input gradients, and the end (``put_w``)."""
    found: list[int] = []
    waiting = 0
    row = _row(kinds)
    for slot, kind in enumerate(row):
        if kind in (BACK_DOWN, BACK_UP):
            waiting += 1
        elif kind < 0 and waiting:
            found.append(slot)
            waiting -= 1
    return found + list(range(len(row), len(row) + waiting))


def _order(kinds: list[list[int]], m: int) -> list[Visit]:
    """Return the passes of a rank in turn; of two weight gradients that wait, chunk 1's goes first."""
    order: list[Visit] = []
    made, done = [0, 0, 0, 0], [0, 0]

    def weight() -> None:
        which = 0 if made[BACK_DOWN] > done[0] else 1
        order.append(Visit(WEIGHT + which, done[which]))
        done[which] += 1

    for kind in _row(kinds):
        if kind >= 0:
            order.append(Visit(kind, made[kind]))
            made[kind] += 1
        elif made[BACK_DOWN] + made[BACK_UP] > sum(done):
            weight()
    while sum(done) < 2 * m:
        weight()
    return order


def _in_turn(slots: Slots) -> list[tuple[int, int, int, int]]:
    """Return (slot, rank, kind, microbatch) of all passes by slot; none needs a later one's."""
    return sorted(
        (slot, rank, kind, i)
        for rank, kinds in enumerate(slots)
        for kind, of_kind in enumerate(kinds)
        for i, slot in enumerate(of_kind)
    )


def _eager(slots: Slots) -> Slots:
    """Start every pass as soon as it can, in the same order on each rank (``eager_execution_time``)."""
    p = len(slots)
    found: Slots = [[[0] * len(of_kind) for of_kind in kinds] for kinds in slots]
    clock = [0] * p
    for _, rank, kind, i in _in_turn(slots):
        begin = max(clock[rank], _after(found, rank, kind, i) + 1)
        found[rank][kind][i] = begin
        clock[rank] = begin + 1
    return found


def _after(slots: Slots, rank: int, kind: int, i: int) -> int:
    """Return the slot of the last pass that one waits for, -1 if none: the neighbour's, and the same rank's before."""
    last = -1
    if kind in (DOWN, BACK_DOWN) and rank > 0:
        last = slots[rank - 1][kind][i]
    elif kind in (UP, BACK_UP) and rank + 1 < len(slots):
        last = slots[rank + 1][kind][i]
    if 0 < kind < WEIGHT:
        last = max(last, slots[rank][kind - 1][i])
    return max(last, slots[rank][kind][i - 1]) if i else last


class _Memory:
    """What a rank holds in each slot: +1 a forward, -1 a weight gradient.

    ``weights`` False: weight gradients are not placed; they take the free slots while any waits (``mem_of_stage``).
    """

    def __init__(self, kinds: list[list[int]], length: int, *, weights: bool) -> None:
        self.row = _row(kinds) + [-1] * length
        self.weights = weights
        self.held: list[int] = [0]
        """Before each slot, and after the last."""
        self.waiting: list[int] = [0]
        held = waiting = 0
        for kind in self.row:
            held, waiting = self._next(kind, held, waiting)
            self.held.append(held)
            self.waiting.append(waiting)

    def _next(self, kind: int, held: int, waiting: int) -> tuple[int, int]:
        if kind in (DOWN, UP):
            return held + 1, waiting
        if kind in (BACK_DOWN, BACK_UP):
            return held, waiting + 1
        if kind == WEIGHT or (kind < 0 and not self.weights and waiting):
            return held - 1, waiting - 1
        return held, waiting

    def move(self, old: int, new: int, limit: int) -> bool:
        """Move a pass to an earlier, empty slot if no more than the limit is then held; return whether it was."""
        row = self.row
        row[new], row[old] = row[old], -1
        held, waiting = self.held[new], self.waiting[new]
        states: list[tuple[int, int]] = []
        for slot in range(new, len(row)):
            held, waiting = self._next(row[slot], held, waiting)
            if held > limit:
                row[new], row[old] = -1, row[new]
                return False
            if slot >= old and held == self.held[slot + 1] and waiting == self.waiting[slot + 1]:
                break
            states.append((held, waiting))
        for slot, (held, waiting) in enumerate(states, new + 1):
            self.held[slot], self.waiting[slot] = held, waiting
        return True


def _pulled(slots: Slots, m: int, *, weights: bool) -> Slots:
    """Pull passes to earlier free slots, before the first backward has come back and after the last forward.

    With weight gradients placed, both ends are; without, the end alone (``reorder``).
    """
    rows = [_Memory(kinds, 2 * m, weights=weights) for kinds in slots]
    limit = max(max(memory.held) for memory in rows)
    taken: list[set[int]] = [set() for _ in slots]
    gradients: list[list[int]] = [[] for _ in slots]
    """Slots of input gradients, final ones; each weight gradient in turn follows the one of its number."""
    ramp, steady, fed = True, False, False
    found: Slots = [[list(of_kind) for of_kind in kinds] for kinds in slots]
    for slot, rank, kind, i in _in_turn(slots):
        if ramp and kind == BACK_UP and rank == 0:
            ramp, steady = False, not fed
        last_forward = kind == DOWN and i == m - 1
        fed = fed or last_forward
        if steady and last_forward:
            steady = False
            taken[rank].add(slot)
            continue
        if steady or (ramp and not weights):
            taken[rank].add(slot)
            if kind in (BACK_DOWN, BACK_UP):
                gradients[rank].append(slot)
            continue
        after = _after(found, rank, kind, i)
        if kind == WEIGHT:
            after = max(after, sorted(gradients[rank])[i])
        free = (s for s in range(after + 1, slot) if s not in taken[rank])
        place = next((s for s in free if rows[rank].move(slot, s, limit)), slot)
        found[rank][kind][i] = place
        taken[rank].add(place)
        if kind in (BACK_DOWN, BACK_UP):
            gradients[rank].append(place)
    return found
