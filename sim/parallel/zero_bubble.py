"""The order that the zero-bubble runtime itself finds for ZB-2p: a greedy search under a limit of memory.

Source: Qi et al., arXiv 2401.10241, section 3.1; sail-sg/zero-bubble-pipeline-parallelism at f68d3879 (branch arxiv),
megatron/core/pipeline_parallel/auto_schedule.py (``Graph.manual_order``, ``initial_solution``) and zb_schedules.py
(``get_zero_bubble_forward_backward_func``). Its integer programme is turned off there.

A rank may hold ``limit`` microbatches whole. Of one whose input gradient is done it keeps ``kept`` of that, what the
matmuls of its weight gradients read. Orders are found for passes of one length and messages of a thousandth of it: what
the runtime trains its first hundred steps with. Leaves out the second search, with the lengths it has measured by then:
a rank then holds up to half a microbatch more.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

Step = tuple[Literal["forward", "input_gradient", "weight_gradient"], int]
"""A pass, and of which microbatch."""

FORWARD, INPUT, WEIGHT = 0, 1, 2
KINDS: tuple[Literal["forward", "input_gradient", "weight_gradient"], ...] = (
    "forward", "input_gradient", "weight_gradient",
)  # fmt: skip
LENGTHS, MESSAGE = (1000, 1000, 1000), 1
"""``update_schedule(scheduler, 1, 1, 1, 0)``: times a thousand, at least one."""


def kept_share(hidden_size: int, heads: int, sequence_length: int) -> float:
    """Return what the runtime takes a microbatch to keep until its weight gradient: 32 h of 34 h + 5 a s bytes."""
    return 32 * hidden_size / (34 * hidden_size + 5 * heads * sequence_length)


def searched(p: int, m: int, kept: float, limit: int) -> tuple[tuple[Step, ...], ...]:
    """Return the greedy order that idles least, one for each rank; the first where several do."""
    best = _Greedy(p, m, kept, limit, True, True, True)
    best.write(None)
    for early, backward, eager in (ways for ways in product((True, False), repeat=3) if not all(ways)):
        other = _Greedy(p, m, kept, limit, early, backward, eager)
        if other.write(best.worst):
            best = other
    return tuple(map(tuple, best.written))


class _Greedy:
    """One order, written for all ranks together in time.

    ``early``     forwards before the first backward end when that can begin; else one may begin while it could
    ``backward``  a forward that would keep the next rank's backward waiting is left for later
    ``eager``     a weight gradient fills every gap, also one that is too short for it; else that only where the gap
                  would make the longest bubble longer
    """

    def __init__(self, p: int, m: int, kept: float, limit: int, early: bool, backward: bool, eager: bool) -> None:
        self.p, self.m = p, m
        self.grows = (1.0, kept - 1.0, -kept)
        self.limit = limit + 1e-9
        self.early, self.backward, self.eager = early, backward, eager
        self.done = [[0, 0, 0] for _ in range(p)]
        self.clock, self.held, self.bubble, self.worst = [0] * p, [0.0] * p, [0] * p, 0
        self.ends = [[[0] * m for _ in range(p)] for _ in KINDS]
        self.written: list[list[Step]] = [[] for _ in range(p)]

    def write(self, beat: int | None) -> bool:
        """Write all orders; return False, and stop, once a rank idles as long as ``beat``."""
        self.warm_up()
        for microbatch in range(1, self.m):
            if beat is not None and self.worst >= beat:
                return False
            self.forwards()
            self.inputs(microbatch)
        for rank in range(self.p):
            while self.done[rank][WEIGHT] < self.m:
                self.put(rank, WEIGHT)
        return beat is None or self.worst < beat

    def arrives(self, rank: int, kind: int) -> int:
        """Return when what the next pass of a kind needs from another rank is there; 0: it needs nothing."""
        other = rank - 1 if kind == FORWARD else rank + 1
        if not 0 <= other < self.p:
            return 0
        return self.ends[kind][other][self.done[rank][kind]] + MESSAGE

    def put(self, rank: int, kind: int) -> None:
        index, begin = self.done[rank][kind], self.clock[rank]
        if kind != WEIGHT:
            begin = max(begin, self.arrives(rank, kind))
        if self.done[rank][FORWARD]:
            self.bubble[rank] += begin - self.clock[rank]
            self.worst = max(self.worst, self.bubble[rank])
        self.clock[rank] = self.ends[kind][rank][index] = begin + LENGTHS[kind]
        self.held[rank] += self.grows[kind]
        self.done[rank][kind] += 1
        self.written[rank].append((KINDS[kind], index))

    def warm_up(self) -> None:
        """As many forwards as there is time and memory for before the first backward is back."""
        for rank in range(self.p):
            self.put(rank, FORWARD)
        more = [0] * self.p
        back = self.clock[-1] + LENGTHS[INPUT]
        for rank in range(self.p - 2, -1, -1):
            held, clock, back = self.held[rank], self.clock[rank], back + MESSAGE
            while 1 + more[rank] < self.m and held + self.grows[FORWARD] <= self.limit:
                if clock + LENGTHS[FORWARD] > back if self.early else clock >= back:
                    break
                held, clock = held + self.grows[FORWARD], clock + LENGTHS[FORWARD]
                more[rank] += 1
            back = max(clock, back) + LENGTHS[INPUT]
        for rank in range(1, self.p):
            while 0 < more[rank] >= more[rank - 1] and 1 + more[rank] < self.m:
                more[rank] -= 1
        for rank in range(self.p - 1, -1, -1):
            for _ in range(more[rank]):
                self.put(rank, FORWARD)
            self.put(rank, INPUT)

    def forwards(self) -> None:
        """At most one forward more on each rank, none where the ranks after it do none."""
        wants = [self.done[rank][FORWARD] < self.m and not self.leaves(rank) for rank in range(self.p)]
        for rank in range(self.p - 2, -1, -1):
            wants[rank] = wants[rank] and wants[rank + 1]
        for rank in range(self.p):
            if wants[rank]:
                self.make_room(rank, FORWARD)
                if rank > 0:
                    self.fill(rank, self.arrives(rank, FORWARD))
                self.put(rank, FORWARD)

    def leaves(self, rank: int) -> bool:
        """Whether the next forward would come in the way of a backward that the next rank's could let begin."""
        done = self.done[rank][FORWARD]
        if not self.backward or rank + 1 == self.p or done < self.done[rank + 1][FORWARD] + 2:
            return False
        back = self.clock[rank + 1] + LENGTHS[FORWARD] + LENGTHS[INPUT] + MESSAGE
        if self.clock[rank] >= back:
            return True
        held, weights, ready = self.held[rank] + self.grows[FORWARD], 0, self.waiting(rank)
        while held > self.limit and weights < ready:
            held, weights = held + self.grows[WEIGHT], weights + 1
        if self.clock[rank] + LENGTHS[FORWARD] + weights * LENGTHS[WEIGHT] <= back:
            return False
        return back - self.clock[rank] <= self.worst - self.bubble[rank]

    def inputs(self, microbatch: int) -> None:
        """The input gradient of a microbatch on every rank, last rank first."""
        for rank in range(self.p - 1, -1, -1):
            self.make_room(rank, INPUT)
            if rank + 1 < self.p:
                self.fill(rank, self.arrives(rank, INPUT))
            if rank == 0 and self.done[rank][FORWARD] == self.m:
                while self.waiting(rank):
                    self.put(rank, WEIGHT)
            self.put(rank, INPUT)

    def waiting(self, rank: int) -> int:
        return self.done[rank][INPUT] - self.done[rank][WEIGHT]

    def make_room(self, rank: int, kind: int) -> None:
        while self.held[rank] + self.grows[kind] > self.limit:
            assert self.waiting(rank), "one microbatch fits whole"
            self.put(rank, WEIGHT)

    def fill(self, rank: int, until: int) -> None:
        """Weight gradients while the rank would wait."""
        while self.waiting(rank) and self.clock[rank] + LENGTHS[WEIGHT] <= until:
            self.put(rank, WEIGHT)
        gap = until - self.clock[rank]
        if self.waiting(rank) and gap > 0 and (self.eager or gap > self.worst - self.bubble[rank]):
            self.put(rank, WEIGHT)
