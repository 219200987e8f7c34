"""What a user's own measurements change: a factor on the model's time, by the nearest measured shape.

A row of a calibration file (``sim/scenario/calibration.py``) is a time of one shape. Its *ratio* is that time over what
the model says of the same shape on the same GPU. A kernel takes the model's time times a ratio, beside collectives too:

* a shape that was measured takes its own, so that the measured time stands;
* another takes that of the nearest measured shape of its family, if one is near: the sum of the doublings by which its
  dimensions differ is at most ``NEAR``. The family is matrix products of the precision (fp16 and bf16 are one), one
  attention kernel in one direction, or one family of memory-bound kernels;
* farther from all of them, the median ratio of its family; without a row of its family it stays as the model has it.

Collectives and copies take the ratio interpolated in the logarithm of the size, its ends held beyond them, from the
curve of the same collective that is nearest in ranks and nodes; curves of one node and of several do not stand for each
other. A ratio of 1.1 makes all of a transfer's latency, bytes on its links and cap 1.1 times as slow: so what shares
its links is slowed as well.

Host times: ``sim/cost/host.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import exp, log, log2
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from sim.cost.copies import plan_copy
from sim.cost.nccl.plan import plan_collective, plan_point_to_point
from sim.ir.ledger import Attention, Dim, Gemm, Kernel, Pointwise, Tensor, size
from sim.ir.traffic import Phase, Traffic
from sim.scenario.calibration import AttentionRow, Calibration, GemmRow, MemoryRow, NcclCurve

if TYPE_CHECKING:
    from sim.cluster.topology import Cluster

NEAR = 2.0
"""Doublings, all dimensions together, up to which a shape's ratio holds for another. Kernels choose tiles by shape: two
doublings move a product by a tile or a wave, more by another regime."""
_OTHER = 1.0
"""Doublings that another layout of the operands (a weight's gradient) or another mask counts as."""
_SAME_UNITS = {"fp16": "bf16"}
TOKENS = ("batch", "seq")
"""Dimensions that count tokens: a product that contracts over them is the gradient of a weight."""

Family = tuple[str, ...]
Row = GemmRow | AttentionRow | MemoryRow


class Shape(NamedTuple):
    """A kernel as a point: its family, the logarithms of its dimensions, and what else tells kernels apart."""

    family: Family
    at: tuple[float, ...]
    mark: bool


class Known(NamedTuple):
    """One measured shape: measured over modelled time."""

    shape: Shape
    ratio: float


def shape_of(kernel: Kernel) -> Shape:
    """Return where a kernel stands among those of its family."""
    if isinstance(kernel, Gemm):
        over_tokens = any(dim.name in TOKENS for dim in kernel.k)
        dtype = _SAME_UNITS.get(kernel.dtype, kernel.dtype)
        at = tuple(log2(max(1, size(s))) for s in (kernel.m, kernel.n, kernel.k, kernel.batch))
        return Shape(("gemm", dtype), at, over_tokens)
    if isinstance(kernel, Pointwise):
        return Shape(("memory", kernel.kind), (log2(max(1, kernel.moved_bytes)),), False)
    shapes = (kernel.batch, kernel.heads, kernel.kv_heads, kernel.query, kernel.key, kernel.head_dim)
    at = tuple(log2(max(1, size(s))) for s in shapes)
    dtype = _SAME_UNITS.get(kernel.dtype, kernel.dtype)
    return Shape(("attention", kernel.kernel, kernel.direction, dtype), at, kernel.causal)


def distance(a: Shape, b: Shape) -> float:
    """Return the doublings between two shapes of one family."""
    return sum(abs(x - y) for x, y in zip(a.at, b.at, strict=True)) + (_OTHER if a.mark != b.mark else 0.0)


def kernel_of(row: Row) -> Kernel:
    """Return the kernel that a row measured."""
    if isinstance(row, GemmRow):
        contracted = (Dim("seq" if row.over_tokens else "k", row.k),)
        batch = (Dim("group", row.batch),) if row.batch > 1 else ()
        return Gemm((Dim("m", row.m),), (Dim("n", row.n),), contracted, row.dtype, batch)  # type: ignore[arg-type]
    if isinstance(row, MemoryRow):
        moved = Tensor("moved", (Dim("bytes", row.bytes),), "uint8")
        return Pointwise(row.family, (moved,), (), 0)
    batch, heads, kv_heads, query, key, head_dim = (
        (Dim(name, getattr(row, name)),) for name in ("batch", "heads", "kv_heads", "query", "key", "head_dim")
    )
    return Attention(
        row.kernel, row.direction, batch, heads, kv_heads, query, key, head_dim, row.causal,  # type: ignore[arg-type]
        row.dtype,  # type: ignore[arg-type]
    )  # fmt: skip


def row_of(kernel: Kernel, time_s: float) -> Row:
    """Return a kernel with its time as a row of a calibration file."""
    if isinstance(kernel, Gemm):
        m, n, k, batch = (size(s) for s in (kernel.m, kernel.n, kernel.k, kernel.batch))
        return GemmRow(m, n, k, kernel.dtype, time_s, batch, any(dim.name in TOKENS for dim in kernel.k))
    if isinstance(kernel, Pointwise):
        return MemoryRow(kernel.kind, kernel.moved_bytes, time_s)
    shapes = (kernel.batch, kernel.heads, kernel.kv_heads, kernel.query, kernel.key, kernel.head_dim)
    batch, heads, kv_heads, query, key, head_dim = (size(s) for s in shapes)
    return AttentionRow(
        kernel.kernel, kernel.direction, batch, heads, kv_heads, query, key, head_dim, kernel.dtype, time_s,
        kernel.causal,
    )  # fmt: skip


class Calibrated:
    """The ratios of one calibration file on one cluster. ``model_s`` is the model's own time of a kernel."""

    def __init__(self, calibration: Calibration, cluster: Cluster, model_s: Callable[[Kernel], float]) -> None:
        self.calibration = calibration
        self._cluster = cluster
        self._families: dict[Family, list[Known]] = {}
        rows: tuple[Row, ...] = (*calibration.gemm, *calibration.attention, *calibration.memory)
        for row in rows:
            kernel = kernel_of(row)
            shape = shape_of(kernel)
            self._families.setdefault(shape.family, []).append(Known(shape, row.time / model_s(kernel)))
        self._curves: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
        self._copies: dict[str, list[tuple[float, float]]] = {}
        for copy in calibration.copies:
            modelled_s = alone_s(cluster, plan_copy(cluster, (0,), copy.direction, copy.bytes))
            self._copies.setdefault(copy.direction, []).append((log2(copy.bytes), log(copy.time / modelled_s)))
        self.used: dict[tuple[str, str], int] = {}
        """(family, "measured" | "nearest" | "median") -> different kernels or transfers."""

    def families(self) -> dict[Family, list[float]]:
        """Return the ratios of each family, in the order of the file."""
        return {family: [known.ratio for known in rows] for family, rows in self._families.items()}

    def curves(self) -> list[tuple[NcclCurve, list[float]]]:
        """Return each curve of collectives that this cluster has room for, with its ratios by size."""
        return [(c, [exp(r) for _, r in self._curve(c)]) for c in self.calibration.nccl if self._fits(c)]

    def ratio(self, kernel: Kernel) -> tuple[float, str]:
        """Return the factor on the model's time, and how it was found ("" where there is none)."""
        shape = shape_of(kernel)
        rows = self._families.get(shape.family)
        if rows is None:
            return 1.0, ""
        nearest = min(rows, key=lambda known: distance(known.shape, shape))
        far = distance(nearest.shape, shape)
        if far <= NEAR:
            return nearest.ratio, "nearest" if far else "measured"
        return median([known.ratio for known in rows]), "median"

    def ratios_of(self, kernel: Kernel) -> list[float]:
        """Return the ratios of a kernel's family."""
        return [known.ratio for known in self._families.get(shape_of(kernel).family, ())]

    def note(self, what: str, how: str) -> None:
        """Count a use, for the account."""
        self.used[what, how] = self.used.get((what, how), 0) + 1

    # --- transfers -----------------------------------------------------------------------------

    def collective(self, traffic: Traffic, kind: str, groups: Sequence[tuple[int, ...]], tensor_bytes: int) -> Traffic:
        """Return the traffic of a collective as slow as the nearest measured curve says."""
        num_ranks = len(groups[0])
        nodes = len({self._cluster.node_of(gpu) for gpu in groups[0]})
        fit = [
            curve
            for curve in self.calibration.nccl
            if curve.collective == kind and (curve.nodes > 1) == (nodes > 1) and self._fits(curve)
        ]
        if not fit or not traffic.phases:
            return traffic
        curve = min(fit, key=lambda c: abs(log2(c.ranks / num_ranks)) + abs(log2(c.nodes / nodes)))
        self.note(f"{kind} ({curve.ranks} ranks on {curve.nodes} node{'s' if curve.nodes > 1 else ''})", "curve")
        return slower(traffic, _interpolated(self._curve(curve), tensor_bytes))

    def copy(self, traffic: Traffic, direction: str, num_bytes: int) -> Traffic:
        """Return the traffic of a copy as slow as was measured."""
        points = self._copies.get(direction)
        if not points:
            return traffic
        self.note(direction, "curve")
        return slower(traffic, _interpolated(sorted(points), num_bytes))

    def _fits(self, curve: NcclCurve) -> bool:
        each, left = divmod(curve.ranks, curve.nodes)
        return not left and each <= self._cluster.gpus_per_node and curve.nodes <= self._cluster.num_nodes

    def _curve(self, curve: NcclCurve) -> list[tuple[float, float]]:
        key = (curve.collective, curve.ranks, curve.nodes)
        found = self._curves.get(key)
        if found is None:
            each = curve.ranks // curve.nodes
            group = tuple(n * self._cluster.gpus_per_node + g for n in range(curve.nodes) for g in range(each))
            found = self._curves[key] = [
                (log2(num_bytes), log(time_s / self._alone_s(curve.collective, group, num_bytes)))
                for num_bytes, time_s in curve.rows
            ]
        return found

    def _alone_s(self, kind: str, group: tuple[int, ...], num_bytes: int) -> float:
        if kind == "send":
            pairs = [(gpu, group[(i + 1) % len(group)]) for i, gpu in enumerate(group)]
            return alone_s(self._cluster, plan_point_to_point(self._cluster, pairs, num_bytes, len(group)))
        return alone_s(self._cluster, plan_collective(self._cluster, [group], kind, num_bytes))

    # --- the account ---------------------------------------------------------------------------

    def words(self, num_kernels: int) -> str:
        """Return what of an answer rests on the file."""
        count = {
            how: sum(n for (_, h), n in self.used.items() if h == how) for how in ("measured", "nearest", "median")
        }
        parts = []
        if any(count.values()):
            parts.append(
                f"of {num_kernels} different kernels {count['measured']} take the measured time, {count['nearest']} "
                f"the ratio of the nearest measured shape, {count['median']} the median of their family"
            )
        curves = [what for what, how in self.used if how == "curve"]
        if curves:
            parts.append(f"{', '.join(curves)} as measured, by size")
        host = self.calibration.host
        if host.forward or host.backward or host.driver:
            parts.append("the host's times")
        return f"calibrated by {self.calibration.words}: {'; '.join(parts) if parts else 'nothing of it applies'}"


def slower(traffic: Traffic, ratio: float) -> Traffic:
    """Return the same transfer, ``ratio`` times as slow on idle links."""
    phases = tuple(
        Phase(
            phase.latency_s * ratio,
            tuple((link, num_bytes * ratio) for link, num_bytes in phase.loads),
            phase.stream_bytes,
            phase.max_bytes_per_s / ratio,
            phase.group_s * ratio,
        )
        for phase in traffic.phases
    )
    return replace(traffic, phases=phases)


def alone_s(cluster: Cluster, traffic: Traffic) -> float:
    """Return the time of a transfer on idle links, in seconds."""
    total = 0.0
    for phase in traffic.phases:
        slowest = max((num_bytes / cluster.bytes_per_s(link) for link, num_bytes in phase.loads), default=0.0)
        if phase.max_bytes_per_s:
            slowest = max(slowest, phase.stream_bytes / phase.max_bytes_per_s)
        total += phase.latency_s + slowest
    return total


def _interpolated(points: Sequence[tuple[float, float]], num_bytes: int) -> float:
    """Return the ratio at a size from (log2 of a size, log of its ratio), ascending; the ends are held beyond them."""
    at = log2(max(1, num_bytes))
    if at <= points[0][0]:
        return exp(points[0][1])
    for (x0, y0), (x1, y1) in pairwise(points):
        if at <= x1:
            return exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0)) if x1 > x0 else exp(y1)
    return exp(points[-1][1])
