"""Pipeline schedules as data: for each rank of a pipeline, the order of its passes. One function a schedule, one table.

    p  ranks of the pipeline            r  a rank, 0 .. p-1
    m  microbatches of a step           v  chunks (virtual stages) that a rank holds
    F  forward of one microbatch on one rank, all its chunks together
    B  the full backward likewise; W its part that makes the gradients of weights, I = B - W the rest

A *chunk* is a run of layers; a *stage* is a chunk's place in the model. Orders only: what a pass computes, sends and
keeps is for others to say, and so is how long it takes. What the table promises of each schedule (passes done once, no
deadlock, bubble and microbatches held as in its closed forms) is checked by ``tests/laws/test_schedule_laws.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward", "input_gradient", "weight_gradient"]
"""``backward`` is ``input_gradient`` and ``weight_gradient`` in one."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One microbatch through one chunk of a rank. Equal passes of a step are one object.

    ``with_next``: issued together with the pass that follows in the order, each filling what the other leaves idle
    (DualPipe's F&B): both start when both can, and what they make is there when both are done.
    """

    kind: Kind
    chunk: int
    microbatch: int
    with_next: bool = False


Order = tuple[Pass, ...]
Orders = tuple[Order, ...]
"""One order a rank."""


# --- placement: which stage of the model a chunk of a rank is -------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """``stage_of(rank, chunk, p, v)`` and its way around.

    ``neighbour(rank, chunk, step, p, v)``  (rank, chunk) that holds the stage ``step`` (+1 or -1) further for the
    microbatches of this chunk, or None past either end of the model
    """

    name: str
    stage_of: Callable[[int, int, int, int], int]
    num_stages: Callable[[int, int], int]
    neighbour: Callable[[int, int, int, int, int], tuple[int, int] | None]


def _looped_stage(rank: int, chunk: int, p: int, v: int) -> int:
    return chunk * p + rank


def _looped_neighbour(rank: int, chunk: int, step: int, p: int, v: int) -> tuple[int, int] | None:
    stage = chunk * p + rank + step
    return (stage % p, stage // p) if 0 <= stage < p * v else None


def _v_stage(rank: int, chunk: int, p: int, v: int) -> int:
    return rank if chunk == 0 else 2 * p - 1 - rank


def _v_neighbour(rank: int, chunk: int, step: int, p: int, v: int) -> tuple[int, int] | None:
    stage = _v_stage(rank, chunk, p, v) + step
    if not 0 <= stage < 2 * p:
        return None
    return (stage, 0) if stage < p else (2 * p - 1 - stage, 1)


def _two_way_stage(rank: int, chunk: int, p: int, v: int) -> int:
    return rank if chunk == 0 else p - 1 - rank


def _two_way_neighbour(rank: int, chunk: int, step: int, p: int, v: int) -> tuple[int, int] | None:
    other = rank + step if chunk == 0 else rank - step
    return (other, chunk) if 0 <= other < p else None


LOOPED = Placement("looped", _looped_stage, lambda p, v: p * v, _looped_neighbour)
"""Round and round the ranks, as Megatron-LM and torch's ``generate_stage_to_rank_mapping(style="loop")``."""
V_SHAPED = Placement("v-shaped", _v_stage, lambda p, v: 2 * p, _v_neighbour)
"""Down the ranks and back, so that the last stage is beside the first (arXiv 2401.10241, section 6)."""
TWO_WAY = Placement("two-way", _two_way_stage, lambda p, v: p, _two_way_neighbour)
"""Two copies of the model, the second the other way round. The first half of the microbatches goes through chunk 0 of
the ranks, the second half through chunk 1; the two copies of a stage add their gradients up (deepseek-ai/DualPipe)."""


# --- the orders ---------------------------------------------------------------------------------


def _passes(kind: Kind, chunk: int, m: int) -> list[Pass]:
    return [Pass(kind, chunk, i) for i in range(m)]


def _woven(first: list[Pass], second: list[Pass]) -> list[Pass]:
    """Return first[0], second[0], first[1], second[1], ... of two lists of one length."""
    woven = first + second
    woven[0::2], woven[1::2] = first, second
    return woven


def gpipe(p: int, m: int, v: int) -> Orders:
    """All forwards, then all backwards, first microbatch first.

    Source: torch/distributed/pipelining/schedules.py, ``ScheduleGPipe``; Huang et al., arXiv 1811.06965.
    """
    return (tuple(_passes("forward", 0, m) + _passes("backward", 0, m)),) * p


def one_f_one_b(p: int, m: int, v: int) -> Orders:
    """Forwards until the first gradient can be back, then one forward and one backward in turn.

    Source: megatron/core/pipeline_parallel/schedules.py, ``forward_backward_pipelining_without_interleaving``
    (p-r-1 forwards, then forward and backward in turn; torch's ``Schedule1F1B`` names the same order differently).
    """
    forward, backward = _passes("forward", 0, m), _passes("backward", 0, m)
    return tuple(_warmed(forward, backward, min(p - r - 1, m)) for r in range(p))


def _warmed(forward: list[Pass], backward: list[Pass], warmup: int) -> Order:
    """Return ``warmup`` forwards, a forward and a backward in turn, then the backwards that are left."""
    steady = len(forward) - warmup
    return tuple(forward[:warmup] + _woven(forward[warmup:], backward[:steady]) + backward[steady:])


def _grouped(kind: Kind, m: int, v: int, group: int, *, last_chunk_first: bool) -> list[Pass]:
    """Return the passes of a rank, depth first: ``group`` microbatches through each chunk, then the next ``group``."""
    table = [_passes(kind, chunk, m) for chunk in range(v)]
    if last_chunk_first:
        table.reverse()
    return [pass_ for start in range(0, m, group) for column in table for pass_ in column[start : start + group]]


def _interleaved(p: int, m: int, v: int, group: int) -> Orders:
    forward = _grouped("forward", m, v, group, last_chunk_first=False)
    backward = _grouped("backward", m, v, group, last_chunk_first=True)
    return tuple(_warmed(forward, backward, min(2 * (p - r - 1) + (v - 1) * group, m * v)) for r in range(p))


def interleaved(p: int, m: int, v: int) -> Orders:
    """Megatron's interleaved 1F1B, with its default group of p microbatches.

    Source: megatron/core/pipeline_parallel/schedules.py, ``forward_backward_pipelining_with_interleaving``,
    ``get_schedule_table`` and ``get_pp_rank_microbatches`` (warm-up of 2 (p-r-1) + (v-1) p passes).
    """
    return _interleaved(p, m, v, p)


def _torch_group(p: int, m: int) -> int:
    return m // max(1, m // p)


def interleaved_torch(p: int, m: int, v: int) -> Orders:
    """Torch's interleaved 1F1B: Megatron's where p divides m, else larger or smaller groups, all of one size.

    Source: torch/distributed/pipelining/schedules.py, ``ScheduleInterleaved1F1B``, ``_get_1f1b_rank_ops``.
    """
    return _interleaved(p, m, v, _torch_group(p, m))


def looped_bfs(p: int, m: int, v: int) -> Orders:
    """All microbatches through a chunk before the next chunk; backwards with the last microbatch first.

    Source: torch/distributed/pipelining/schedules.py, ``ScheduleLoopedBFS``; Lamy-Poirier, arXiv 2211.05953.
    """
    forward = [pass_ for chunk in range(v) for pass_ in _passes("forward", chunk, m)]
    backward = [pass_ for chunk in reversed(range(v)) for pass_ in reversed(_passes("backward", chunk, m))]
    return (tuple(forward + backward),) * p


def _delayed(forward: list[Pass], inputs: list[Pass], weights: list[Pass], warmup: int, delay: int) -> Order:
    """Return ``warmup`` forwards, then forward, input gradient, and the weight gradient of ``delay`` backwards ago."""
    order = forward[:warmup]
    num_passes = len(forward)
    for k in range(num_passes):
        if warmup + k < num_passes:
            order.append(forward[warmup + k])
        order.append(inputs[k])
        if k >= delay:
            order.append(weights[k - delay])
    return tuple(order + weights[max(0, num_passes - delay) :])


def interleaved_zero_bubble(p: int, m: int, v: int) -> Orders:
    """ZB-H1 with v chunks a rank: as interleaved 1F1B, p-r-1 forwards fewer ahead, W delayed by r passes instead.

    Source: torch/distributed/pipelining/schedules.py, ``ScheduleInterleavedZeroBubble``.
    """
    group = _torch_group(p, m)
    forward = _grouped("forward", m, v, group, last_chunk_first=False)
    inputs = _grouped("input_gradient", m, v, group, last_chunk_first=True)
    weights = _grouped("weight_gradient", m, v, group, last_chunk_first=True)
    return tuple(_delayed(forward, inputs, weights, min((v - 1) * group + p - r - 1, m * v), r) for r in range(p))


def zb_h1(p: int, m: int, v: int) -> Orders:
    """1F1B with W delayed by r passes on rank r: every rank holds p microbatches, and W fills the end.

    Source: Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 2.1; as in
    sail-sg/zero-bubble-pipeline-parallelism, branch zb-h1-quick-start ("delay W by rank").
    """
    forward, inputs, weights = (_passes(k, 0, m) for k in ("forward", "input_gradient", "weight_gradient"))
    return tuple(_delayed(forward, inputs, weights, min(p - r - 1, m), r) for r in range(p))


def zb_2p(p: int, m: int, v: int) -> Orders:
    """2 (p-r) - 1 forwards fill the warm-up; W is delayed by 2r passes, so that ranks end as staggered as they start.

    Source: Qi et al., arXiv 2401.10241, section 2.2 and figure 3 (the handcrafted schedule ZB-H2, which holds 2p - 1).
    Where a microbatch is held whole until W, as autograd does. Where I frees a part of it: :func:`zb_2p_found`.
    """
    forward, inputs, weights = (_passes(k, 0, m) for k in ("forward", "input_gradient", "weight_gradient"))
    return tuple(_delayed_after(forward, inputs, weights, min(2 * (p - r) - 1, m), 2 * r) for r in range(p))


def zb_2p_found(p: int, m: int, kept: float) -> Orders:
    """The automatic ZB-2p: 2p microbatches held, of which those between I and W count for the share ``kept``."""
    from sim.parallel.zero_bubble import searched

    kinds: tuple[Kind, ...] = ("forward", "input_gradient", "weight_gradient")
    table = {kind: _passes(kind, 0, m) for kind in kinds}
    return tuple(tuple([table[kind][i] for kind, i in order]) for order in searched(p, m, kept, 2 * p))


def _delayed_after(forward: list[Pass], inputs: list[Pass], weights: list[Pass], warmup: int, delay: int) -> Order:
    """As :func:`_delayed` with the forward last: input gradient, delayed weight gradient, forward."""
    order = forward[:warmup]
    num_passes = len(forward)
    for k in range(num_passes):
        order.append(inputs[k])
        if k >= delay:
            order.append(weights[k - delay])
        if warmup + k < num_passes:
            order.append(forward[warmup + k])
    return tuple(order + weights[max(0, num_passes - delay) :])


class _Row:
    """The order of one rank while it is written: each append takes the next microbatch of that chunk."""

    def __init__(self, passes: dict[str, tuple[list[Pass], list[Pass]]]) -> None:
        self.order: list[Pass] = []
        self._waiting: list[Pass] = []
        self._passes = passes
        self._forwards, self._backwards = [0, 0], [0, 0]

    def forward(self, chunk: int, *, how: str = "forward") -> None:
        self.order.append(self._passes[how][chunk][self._forwards[chunk]])
        self._forwards[chunk] += 1

    def backward(self, chunk: int, *, split: bool = False) -> None:
        """Append a full backward; or, split, its input gradient, and let the weight gradient wait."""
        index = self._backwards[chunk]
        self._backwards[chunk] += 1
        self.order.append(self._passes["input_gradient" if split else "backward"][chunk][index])
        if split:
            self._waiting.append(self._passes["weight_gradient"][chunk][index])

    def weight(self) -> None:
        """Append the weight gradient that has waited longest."""
        self.order.append(self._waiting.pop(0))

    def both(self, forward_chunk: int, backward_chunk: int) -> None:
        """Append a forward and a full backward that are issued together."""
        self.forward(forward_chunk, how="paired")
        self.backward(backward_chunk)


def zb_v(p: int, m: int, v: int) -> Orders:
    """Two chunks a rank in a V: the backward starts on the rank where the forward began, W fills the rest.

    Source: Qi et al., arXiv 2401.10241, section 6; the handcrafted order for F = I = W that torch has
    (torch/distributed/pipelining/schedules.py, ``ScheduleZBVZeroBubble``). It is drawn for at least 2p - 1
    microbatches; of a shorter step those in excess are left out.
    """
    drawn = max(2 * p - 1, m)
    tables: dict[Kind, list[list[Pass]]] = {
        k: [_passes(k, chunk, drawn) for chunk in (0, 1)] for k in ("forward", "input_gradient", "weight_gradient")
    }
    return tuple(tuple([pass_ for pass_ in _zb_v_rank(p, r, drawn, tables) if pass_.microbatch < m]) for r in range(p))


def _zb_v_rank(p: int, r: int, m: int, tables: dict[Kind, list[list[Pass]]]) -> list[Pass]:
    forward, inputs, weights = tables["forward"], tables["input_gradient"], tables["weight_gradient"]
    ahead = 2 * p - r - 1  # forwards of chunk 0 before its first backward
    order = forward[0][: 2 * (p - r) - 1]
    order += _woven(forward[1][:r], forward[0][2 * (p - r) - 1 : ahead])
    for k in range(p - r):
        order += (forward[1][r + k], inputs[1][k], weights[1][k])
    for k in range(m - p):
        if ahead + k < m:
            order.append(forward[0][ahead + k])
        order += (inputs[0][k], weights[0][k], forward[1][p + k], inputs[1][p - r + k], weights[1][p - r + k])
    done = m - p, m - r  # backwards of each chunk so far
    order += _woven(inputs[0][done[0] : done[0] + r], inputs[1][done[1] :])
    last = done[0] + r
    order += _woven(inputs[0][last:], weights[0][done[0] : done[0] + p - r])
    return order + weights[1][done[1] :] + weights[0][done[0] + p - r :]


def dualpipe(p: int, m: int, v: int) -> Orders:
    """Two copies of the model fed from both ends; a forward of one direction hides behind a backward of the other.

    Source: deepseek-ai/DualPipe, dualpipe/dualpipe.py, ``DualPipe.step``.
    """
    half = m // 2
    passes = _of_two_chunks(range(half), range(half, m))
    return tuple(_dualpipe_rank(p // 2, min(r, p - 1 - r), half, passes, near=int(r >= p // 2)) for r in range(p))


def dualpipe_v(p: int, m: int, v: int) -> Orders:
    """DualPipe cut in half: one copy of the model in a V, each rank as a rank of DualPipe's first half.

    Source: deepseek-ai/DualPipe, dualpipe/dualpipev.py, ``DualPipeV.step``; torch's ``ScheduleDualPipeV``.
    """
    passes = _of_two_chunks(range(m), range(m))
    return tuple(_dualpipe_rank(p, r, m, passes, near=0) for r in range(p))


def v_half(p: int, m: int, v: int) -> Orders:
    """A V whose microbatches go down at half speed, so that a rank holds half of what it holds in 1F1B."""
    from sim.parallel.controllable import half_block

    return _controllable(half_block(p), m)


def v_min(p: int, m: int, v: int) -> Orders:
    """A V whose microbatches go down and up at full speed, so that a rank holds a third of what it holds in 1F1B."""
    from sim.parallel.controllable import least_block

    return _controllable(least_block(p), m)


def _controllable(block: list[list[int]], m: int) -> Orders:
    """Source: Qi et al., arXiv 2405.15362 (``sim/parallel/controllable.py``)."""
    from sim.parallel.controllable import controllable

    kinds: tuple[tuple[Kind, int], ...] = (
        ("forward", 0), ("forward", 1), ("input_gradient", 1), ("input_gradient", 0),
        ("weight_gradient", 1), ("weight_gradient", 0),
    )  # fmt: skip
    table = [_passes(kind, chunk, m) for kind, chunk in kinds]
    return tuple(tuple([table[kind][i] for kind, i in order]) for order in controllable(block, m))


def _of_two_chunks(first: range, second: range) -> dict[str, tuple[list[Pass], list[Pass]]]:
    """Return the passes of the microbatches of two chunks by kind, and forwards with ``with_next`` as "paired"."""
    kinds: tuple[Kind, ...] = ("forward", "backward", "input_gradient", "weight_gradient")
    passes: dict[str, tuple[list[Pass], list[Pass]]] = {
        k: ([Pass(k, 0, i) for i in first], [Pass(k, 1, i) for i in second]) for k in kinds
    }
    passes["paired"] = [Pass("forward", 0, i, True) for i in first], [Pass("forward", 1, i, True) for i in second]
    return passes


def _dualpipe_rank(half: int, r: int, m: int, passes: dict[str, tuple[list[Pass], list[Pass]]], *, near: int) -> Order:
    """Return the eight steps of a rank, as DualPipe's source numbers them.

    The rank is r ranks from the end where the microbatches of chunk ``near`` enter; those of the other chunk turn back,
    or meet the other half of the ranks, after ``half`` ranks. ``m`` counts the microbatches of one chunk.
    """
    row, far, after = _Row(passes), 1 - near, half - r - 1
    for _ in range(2 * after):  # 1
        row.forward(near)
    for _ in range(r + 1):  # 2
        row.forward(near)
        row.forward(far)
    for _ in range(after):  # 3
        row.backward(far, split=True)
        row.weight()
        row.forward(far)
    for k in range(m - 2 * half + r + 1):  # 4
        if k == 0 and after == 0:  # the innermost ranks do not overlap here: that makes the bubble smaller
            row.forward(near)
            row.backward(far)
        else:
            row.both(near, far)
        row.both(far, near)
    for _ in range(after):  # 5
        row.backward(far)
        row.both(far, near)
    middle = (r + 1) // 2
    for k in range(r + 1):  # 6: the second half of these backwards is split
        row.backward(far, split=k > middle or (k == middle and r % 2 == 1))
        row.backward(near, split=k >= middle)
    for _ in range(after):  # 7
        row.weight()
        row.backward(near, split=True)
    for _ in range(r + 1):  # 8
        row.weight()
    return tuple(row.order)


# --- the table ----------------------------------------------------------------------------------

Refusal = tuple[str, str]
"""What is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A pipeline schedule and what its authors promise of it.

    ``orders(p, m, v)``   one order a rank; only where :meth:`refusal` is None
    ``num_chunks``        chunks of a rank, where the schedule fixes them; None: as many as asked for
    ``copies``            copies of the model's parameters that the pipeline holds
    ``splits_backward``   needs the gradients of inputs and of weights in passes of their own
    ``post_validates``    its bubble counts from a rank's first pass to its last: ranks end one after another, and can
                          start the next step so only if the optimizer does not wait for all of them (it steps on the
                          norm and overflow known so far, and takes the step back if they prove wrong; arXiv
                          2401.10241, section 4)
    ``bubble_s(F, B, W, p, m, v)``        idle time of the rank that idles longest: uniform stages, free communication
    ``is_exact(F, B, W, p, m, v)``        whether ``bubble_s`` is that time. Elsewhere, if W <= F and W <= I, it is less
                                          than that; more for DualPipe and DualPipeV with F < I
    ``microbatches_held(p, m, v, rank)``  most microbatches of a chunk between forward and the end of backward at once,
                                          over the rank's chunks together; each is the activations of one chunk
    ``found(p, m, kept)`` what the runtime's own search makes of it where the input gradient frees all of a microbatch
                          but the share ``kept``: runs instead of ``orders`` there
    """

    orders: Callable[[int, int, int], Orders]
    placement: Placement
    bubble_s: Callable[[float, float, float, int, int, int], float]
    is_exact: Callable[[float, float, float, int, int, int], bool]
    microbatches_held: Callable[[int, int, int, int], int]
    num_chunks: int | None = 1
    copies: int = 1
    splits_backward: bool = False
    post_validates: bool = False
    refuses: Callable[[int, int, int], Refusal | None] = lambda p, m, v: None
    found: Callable[[int, int, float], Orders] | None = None

    def refusal(self, p: int, m: int, v: int) -> Refusal | None:
        """Return why the schedule cannot run m microbatches on p ranks with v chunks each; None if it can."""
        if self.num_chunks is not None and v != self.num_chunks:
            chunks = "chunk" if self.num_chunks == 1 else "chunks"
            return f"it has {self.num_chunks} {chunks} a rank, not {v}", f"give each rank {self.num_chunks} {chunks}"
        return self.refuses(p, m, v)


def _around(m: int, unit: int, least: int = 1) -> str:
    """Return the multiples of ``unit`` on either side of m, none below ``least``, as a choice in words."""
    least = -(-least // unit) * unit
    below, above = m // unit * unit, m // unit * unit + unit
    near = sorted({max(least, below), max(least, above)})
    return " or ".join(map(str, near)) + " microbatches"


def _whole_groups(p: int, m: int, v: int) -> Refusal | None:
    if m % p == 0:
        return None
    return f"{m} microbatches do not fill groups of {p}, one a rank", f"use {_around(m, p)}"


def _equal_groups(p: int, m: int, v: int) -> Refusal | None:
    rounds = max(1, m // p)
    if m % rounds == 0:
        return None
    return f"{m} microbatches do not make {rounds} groups of one size", f"use {_around(m, p)}"


def _two_way(p: int, m: int, v: int) -> Refusal | None:
    if p % 2:
        return f"it feeds the pipeline from both ends: {p} ranks have no two halves", f"use {p + 1} ranks"
    if m % 2 or m < 2 * p:
        what = f"{m} microbatches" if m >= 2 * p else f"{m} microbatches, fewer than {2 * p}, two a rank,"
        return f"{what} do not fill both directions alike", f"use {_around(m, 2, 2 * p)}"
    return None


def _two_a_rank(p: int, m: int, v: int) -> Refusal | None:
    if m >= 2 * p:
        return None
    return f"{m} microbatches are fewer than {2 * p}, two a rank", f"use {2 * p} microbatches or more"


def _idle_1f1b(f: float, b: float, w: float, p: int, m: int, v: int) -> float:
    """(p-1) (F + B): Huang et al., arXiv 1811.06965; Narayanan et al., arXiv 2104.04473, section 2.2.1."""
    return (p - 1) * (f + b)


def _idle_interleaved(f: float, b: float, w: float, p: int, m: int, v: int) -> float:
    """(p-1) (F + B) / v: Narayanan et al., arXiv 2104.04473, section 2.2.2.

    With fewer microbatches than ranks, the first is back for its next chunk p - m turns after the last has left:
    (v-1) (p-m) (F + B) / v more.
    """
    return (p - 1 + (v - 1) * max(0, p - m)) * (f + b) / v


def _idle_zb_h1(f: float, b: float, w: float, p: int, m: int, v: int) -> float:
    """(p-1) (F + B - 2W) / v: arXiv 2401.10241, table 2 (its T_B is our B - W); deepseek-ai/DualPipe, README, "ZB1P".

    A step of m < p has p - m weight gradients too few to fill the end.
    """
    return ((p - 1) * (f + b - 2 * w) + max(0, p - m) * w) / v


def _idle_zb_2p(f: float, b: float, w: float, p: int, m: int, v: int) -> float:
    """(p-1) (F + B - 3W): arXiv 2401.10241, table 2 (its T_B is our B - W); none where F = I = W.

    A step of m < 2p - 1 has 2p - 1 - m weight gradients too few.
    """
    return (p - 1) * (f + b - 3 * w) + max(0, 2 * p - 1 - m) * w


def _idle_zb_v(f: float, b: float, w: float, p: int, m: int, v: int) -> float:
    """None where F = I = W: arXiv 2401.10241, section 6. A step of m < 2p - 1 has 2p - 1 - m W too few."""
    return max(0, 2 * p - 1 - m) * w


def _idle_dualpipe(f: float, b: float, w: float, p: int, m: int, v: int) -> float:
    """(p/2-1) (F&B + B - 3W): deepseek-ai/DualPipe, README; F&B as long as F and B one after the other.

    F, B and W of one of the rank's two stages: a microbatch passes a rank once.
    """
    return (p / 2 - 1) * (f + b + b - 3 * w)


def _idle_dualpipe_v(f: float, b: float, w: float, p: int, m: int, v: int) -> float:
    """As DualPipe with 2p stages, of half a rank's work each."""
    return (p - 1) * (f + b + b - 3 * w) / 2


def _idle_v_half(f: float, b: float, w: float, p: int, m: int, v: int) -> float:
    """(3p - 7) (F + B) / 6 of an even number of ranks, (3p - 4) (F + B) / 6 of an odd one: about half of 1F1B's.

    sail-sg/zero-bubble-pipeline-parallelism, README: "B/2". The rest is what squeezing gains at the ends of a step.
    """
    return abs(3 * p - (4 if p % 2 else 7)) * (f + b) / 6


def _idle_v_min(f: float, b: float, w: float, p: int, m: int, v: int) -> float:
    """(4p - 5) (F + B) / 6, or (4p - 7) (F + B) / 6 where 3 divides p: about two thirds of 1F1B's.

    sail-sg/zero-bubble-pipeline-parallelism, README: "2B/3 + O(n)".
    """
    return (4 * p - (5 if p % 3 else 7)) * (f + b) / 6


def _always(f: float, b: float, w: float, p: int, m: int, v: int) -> bool:
    return True


def _short_w(f: float, b: float, w: float, p: int, m: int, v: int) -> bool:
    """A weight gradient must fit where it is put: beside a forward or an input gradient of a neighbour."""
    return w <= min(f, b - w)


def _short_w_full_turn(f: float, b: float, w: float, p: int, m: int, v: int) -> bool:
    return _short_w(f, b, w, p, m, v) and (v == 1 or m >= p)


def _all_alike(f: float, b: float, w: float, p: int, m: int, v: int) -> bool:
    """F = I = W, for which the order is drawn."""
    return f == b - w == w


def _all_alike_and_full(f: float, b: float, w: float, p: int, m: int, v: int) -> bool:
    """A step with more microbatches than ranks has a steady part. In a shorter one the ends meet, each in its way."""
    return _all_alike(f, b, w, p, m, v) and m > p > 1


def _mirrored(f: float, b: float, w: float, p: int, m: int, v: int) -> bool:
    """F = I >= W: the two halves of an F&B pair then last as long on both sides. Longer if F > I, shorter if F < I."""
    return f == b - w >= w


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule(gpipe, LOOPED, _idle_1f1b, _always, lambda p, m, v, r: m),
    "1f1b": Schedule(one_f_one_b, LOOPED, _idle_1f1b, _always, lambda p, m, v, r: min(m, p - r)),
    "interleaved": Schedule(
        interleaved,
        LOOPED,
        _idle_interleaved,
        _always,
        lambda p, m, v, r: min(v * m, 2 * (p - r - 1) + (v - 1) * p + 1),
        num_chunks=None,
        refuses=_whole_groups,
    ),
    "interleaved-torch": Schedule(
        interleaved_torch,
        LOOPED,
        _idle_interleaved,
        _always,
        lambda p, m, v, r: min(v * m, 2 * (p - r - 1) + (v - 1) * _torch_group(p, m) + 1),
        num_chunks=None,
        refuses=_equal_groups,
    ),
    "looped-bfs": Schedule(looped_bfs, LOOPED, _idle_interleaved, _always, lambda p, m, v, r: v * m, num_chunks=None),
    "zb-h1": Schedule(zb_h1, LOOPED, _idle_zb_h1, _short_w, lambda p, m, v, r: min(m, p), splits_backward=True),
    "interleaved-zb": Schedule(
        interleaved_zero_bubble,
        LOOPED,
        _idle_zb_h1,
        _short_w_full_turn,
        lambda p, m, v, r: min(v * m, (v - 1) * _torch_group(p, m) + p),
        num_chunks=None,
        splits_backward=True,
        refuses=_equal_groups,
    ),
    "zb-2p": Schedule(
        zb_2p,
        LOOPED,
        _idle_zb_2p,
        _short_w,
        lambda p, m, v, r: min(m, 2 * p - 1),
        splits_backward=True,
        post_validates=True,
        found=zb_2p_found,
    ),
    "zb-v": Schedule(
        zb_v,
        V_SHAPED,
        _idle_zb_v,
        _all_alike,
        lambda p, m, v, r: min(2 * m, m + r + 1, 2 * p),
        num_chunks=2,
        splits_backward=True,
        post_validates=True,
    ),
    "v-half": Schedule(
        v_half,
        V_SHAPED,
        _idle_v_half,
        _all_alike_and_full,
        lambda p, m, v, r: min(2 * m, m + r + 1, p // 2 * 2 + 2),
        num_chunks=2,
        splits_backward=True,
    ),
    "v-min": Schedule(
        v_min,
        V_SHAPED,
        _idle_v_min,
        _all_alike_and_full,
        lambda p, m, v, r: min(2 * m, m + r + 1, (p + 1) // 3 * 2 + 2 - (r == 0 and p % 3 == 2)),
        num_chunks=2,
        splits_backward=True,
    ),
    "dualpipe": Schedule(
        dualpipe,
        TWO_WAY,
        _idle_dualpipe,
        _mirrored,
        lambda p, m, v, r: p + 1,
        num_chunks=2,
        copies=2,
        splits_backward=True,
        refuses=_two_way,
    ),
    "dualpipev": Schedule(
        dualpipe_v,
        V_SHAPED,
        _idle_dualpipe_v,
        _mirrored,
        lambda p, m, v, r: 2 * p + 1,
        num_chunks=2,
        splits_backward=True,
        refuses=_two_a_rank,
    ),
}
"""By the name that a scenario says."""


# --- playing a schedule ---------------------------------------------------------------------------


class Durations(NamedTuple):
    """Of one microbatch through one chunk, in any unit of whole numbers; a full backward takes both gradients' time."""

    forward: int
    input_gradient: int
    weight_gradient: int

    def of(self, kind: Kind) -> int:
        if kind == "backward":
            return self.input_gradient + self.weight_gradient
        return int(getattr(self, kind))


class Played(NamedTuple):
    """What came of playing the orders. ``start`` and ``end`` of each rank's first and last pass; ``busy`` between."""

    makespan: int
    bubble: int
    held: tuple[int, ...]
    busy: tuple[int, ...]
    start: tuple[int, ...]
    end: tuple[int, ...]


def held(order: Order) -> int:
    """Return the most forwards of an order whose backward, its weight gradient if split, is still to come, at once."""
    now = most = 0
    for pass_ in order:
        if pass_.kind == "forward":
            now += 1
            most = max(most, now)
        elif pass_.kind != "input_gradient":
            now -= 1
    return most


def _steps(order: Order) -> Iterator[Order]:
    """Yield what a rank starts as one: a pass, or a pass and the one issued with it."""
    passes = iter(order)
    for pass_ in passes:
        yield (pass_, next(passes)) if pass_.with_next else (pass_,)


def simulate_order(schedule: Schedule, p: int, m: int, v: int, durations: Durations) -> Played:
    """Play the orders exactly: uniform stages, free communication, a rank does one pass (or pair) at a time, in order.

    A forward waits for that of the stage before, a backward for the input gradient of the stage after and for its own
    forward, a weight gradient for its input gradient. ``bubble`` is of the rank that idles longest: over the makespan,
    or from its first pass to its last if the schedule ``post_validates``.
    """
    orders = schedule.orders(p, m, v)
    stage_of, last = schedule.placement.stage_of, schedule.placement.num_stages(p, v) - 1
    done: dict[tuple[str, int, int], int] = {}
    """(forward, input_gradient or weight_gradient; stage; microbatch) -> when"""
    sleepers: dict[tuple[str, int, int], list[int]] = {}
    clock, start, rows = [0] * p, [-1] * p, [list(_steps(order)) for order in orders]
    position = [0] * p
    awake = list(range(p))
    while awake:
        rank = awake.pop()
        while position[rank] < len(rows[rank]):
            step = rows[rank][position[rank]]
            needs = [key for pass_ in step for key in _needs(pass_, stage_of(rank, pass_.chunk, p, v), last)]
            missing = next((key for key in needs if key not in done), None)
            if missing is not None:
                sleepers.setdefault(missing, []).append(rank)
                break
            begin = max([clock[rank], *(done[key] for key in needs)])
            start[rank] = begin if start[rank] < 0 else start[rank]
            clock[rank] = begin + sum(durations.of(pass_.kind) for pass_ in step)
            position[rank] += 1
            for pass_ in step:
                for kind in ("input_gradient", "weight_gradient") if pass_.kind == "backward" else (pass_.kind,):
                    key = kind, stage_of(rank, pass_.chunk, p, v), pass_.microbatch
                    assert key not in done, f"{key} twice"
                    done[key] = clock[rank]
                    awake += sleepers.pop(key, [])
    stuck = [rank for rank in range(p) if position[rank] < len(rows[rank])]
    assert not stuck, f"ranks {stuck} wait for ever"
    busy = tuple(sum(durations.of(pass_.kind) for pass_ in order) for order in orders)
    makespan = max(clock) - min(start)
    whole = [clock[r] - start[r] if schedule.post_validates else makespan for r in range(p)]
    bubble = max(whole[r] - busy[r] for r in range(p))
    return Played(makespan, bubble, tuple(map(held, orders)), busy, tuple(start), tuple(clock))


def _needs(pass_: Pass, stage: int, last: int) -> list[tuple[str, int, int]]:
    """Return the (kind, stage, microbatch) that must be done before."""
    if pass_.kind == "weight_gradient":
        return [("input_gradient", stage, pass_.microbatch)]
    if pass_.kind == "forward":
        return [("forward", stage - 1, pass_.microbatch)] if stage > 0 else []
    own = ("forward", stage, pass_.microbatch)
    return [own, ("input_gradient", stage + 1, pass_.microbatch)] if stage < last else [own]
