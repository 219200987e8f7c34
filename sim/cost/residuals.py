"""How far the time of a kernel, a collective or the host may be off, from what was measured of it.

Of each time two standard deviations of the logarithm: *shared*, by which all of a family are off at once (another
machine than the one that was measured, other coefficients that stand in, an assumed share), and *own*, by which a
single shape is off by itself (the residuals of the fit on rows that it did not see). A fit states the error within
which nine in ten of its rows are; its standard deviation is that of a normal distribution with the same nine in ten.

What is not in the fits' own files stands in ``sim/catalog/measured/residuals.yaml``, with sources; what whole runs were
off beyond all of this in ``whole_runs.yaml``. Combined in ``sim/report/certainty.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import TYPE_CHECKING, Any

from sim.cost import efficiency
from sim.cost.nccl.terms import residuals_of
from sim.cost.roofline import peak_of
from sim.ir.ledger import Attention, Gemm, Kernel
from sim.ir.program import Communicator

if TYPE_CHECKING:
    from sim.cost.model import CostModel

NINE_IN_TEN = 1.645
"""Standard deviations within which nine in ten of a normal distribution are."""
LEAST_ROWS = 8
"""Fewer rows say nothing of their spread."""


@dataclass(frozen=True, slots=True)
class Residual:
    """Of one family: its name, ``shared`` and ``own`` as standard deviations of the logarithm, and the source."""

    family: str
    shared: float
    own: float
    source: str


@dataclass(frozen=True, slots=True)
class WholeRuns:
    """By how much published runs were shorter and longer than their parts explain: logarithms, and the source."""

    below: float
    above: float
    source: str


def whole_runs() -> WholeRuns:
    """Return what ``sim/catalog/measured/whole_runs.yaml`` holds for any run."""
    data = efficiency.read("whole_runs.yaml")
    found = data["beyond_parts"]
    words = f"{data['runs']} published runs of {data['sources']} sources, each weighing the same ({data['date']})"
    return WholeRuns(float(found["below"]), float(found["above"]), words)


def _value(name: str) -> float:
    return float(efficiency.read("residuals.yaml")[name]["value"])


def _source(name: str) -> str:
    return str(efficiency.read("residuals.yaml")[name]["source"])


def _own(stated: Mapping[str, Any] | None, otherwise: float) -> float:
    if not stated or stated.get("count", 0) < LEAST_ROWS:
        return otherwise
    return float(stated["p90_abs"]) / NINE_IN_TEN


class Residuals:
    """The residuals behind one cost model. Each family is worked out once."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._gpu = cost.gpu
        self._source = efficiency.source_of(cost.gpu)
        self._found: dict[tuple[str, ...], Residual] = {}

    def kernel(self, kernel: Kernel) -> Residual:
        """Return what is known of a kernel's error."""
        own = self._cost.calibrated
        how = own.ratio(kernel)[1] if own is not None else ""
        key: tuple[str, ...]
        if isinstance(kernel, Gemm):
            key = ("gemm", kernel.dtype, how)
        elif isinstance(kernel, Attention):
            key = ("attention", kernel.kernel, kernel.direction, how)
        else:
            key = ("memory", kernel.kind, how)
        found = self._found.get(key)
        if found is None:
            if isinstance(kernel, Gemm):
                found = self._gemm(kernel.dtype)
            elif isinstance(kernel, Attention):
                found = self._attention(kernel.kernel, kernel.direction)
            else:
                found = self._memory(kernel.kind)
            if how:
                found = self._calibrated(found, kernel, how)
            self._found[key] = found
        return found

    def _machine(self) -> tuple[float, str]:
        """What all shapes share: no two machines are alike, and some were not measured."""
        index = efficiency.read("index.yaml")
        capability = next(
            (entry["capability"] for entry in index["measured"] if entry["name"] == self._source.name), ""
        )
        alike = self._source.same or capability.split(".")[0] == str(self._gpu.compute_capability[0])
        name = "same_machine" if alike else "next_generation"
        return _value(name), _source(name)

    def _gemm(self, dtype: str) -> Residual:
        shared, why = self._machine()
        rate = peak_of(self._gpu, dtype)[1]
        data = efficiency.gemm_data(self._source, rate)
        stated = data.get("residuals_m_from_64")
        return Residual(f"matmuls in {dtype}", shared, _own(stated, shared), f"{_rows(stated)}; all together: {why}")

    def _attention(self, name: str, direction: str) -> Residual:
        shared, why = self._machine()
        kernel = efficiency.sdpa_kernel(self._gpu)[0] if name == "sdpa" else name
        stated = efficiency.attention_residuals(self._source, kernel, direction == "backward")
        own = _own(stated, _value("attention_backward"))
        assumed = efficiency.attention_coefficients(self._source, kernel, direction == "backward")[1]
        words = _rows(stated)
        if "slower" in assumed:
            shared = (shared**2 + _value("assumed_attention") ** 2) ** 0.5
            words, why = f"{kernel} assumed {assumed}", _source("assumed_attention")
        return Residual(f"attention {direction}", shared, own, f"{words}; all together: {why}")

    def _memory(self, kind: str) -> Residual:
        memory = efficiency.memory_coefficients(self._gpu)
        measured = kind in ("elementwise", "norm", "softmax", "copy") and kind not in memory.assumed
        name = kind if measured else "assumed_family"
        words = f"share of the bandwidth {'measured' if measured else 'assumed'}: {_source(name)}"
        return Residual(f"{kind} kernels", _value(name), _value("memory_kernel"), words)

    def _calibrated(self, found: Residual, kernel: Kernel, how: str) -> Residual:
        """Measured on this machine: what is left is the run-to-run drift, for other shapes the spread of the ratios."""
        own = self._cost.calibrated
        assert own is not None
        drift, name = _value("calibrated"), own.calibration.words
        if how == "measured":
            return Residual(found.family, drift, drift, f"measured: {name}")
        ratios = own.ratios_of(kernel)
        spread = _spread([log(ratio) for ratio in ratios]) if len(ratios) >= LEAST_ROWS else found.own
        return Residual(found.family, drift, spread, f"{len(ratios)} measured shapes of the family: {name}")

    def collectives(self, communicator: Communicator) -> Residual:
        """Return what is known of a communicator's transfers: within a node or between nodes."""
        num_nodes, assumed = self._cost.wires_of(communicator)
        several = num_nodes > 1
        key = (self._cost.library, str(several), assumed)
        found = self._found.get(key)
        if found is None:
            words = "collectives between nodes" if several else "collectives within a node"
            if self._cost.library != "nccl":
                name = self._cost.library.replace("-", "_")
                found = self._found[key] = Residual(words, _value(name), 0.0, _source(name))
                return found
            name = "nccl_other" if assumed else "nccl_own"
            stated = residuals_of(self._gpu, several)
            why = f"{_rows(stated)}; all together: {_source(name)}"
            found = Residual(words, _value(name), _own(stated, _value(name)), why)
            own = self._cost.calibrated
            if own is not None and any((curve.nodes > 1) == several for curve, _ in own.curves()):
                drift = _value("calibrated")
                found = Residual(words, drift, drift, f"measured: {own.calibration.words}")
            self._found[key] = found
        return found

    def waiting(self) -> Residual:
        """Return what is known of the time that slower ranks take: as sure as their kernels."""
        shared, why = self._machine()
        return Residual("waiting for slower ranks", shared, 0.0, why)

    def host(self) -> Residual:
        """Return what is known of the thread that issues."""
        own = self._cost.calibrated
        if own is not None and (own.calibration.host.forward or own.calibration.host.backward):
            words = f"measured: {own.calibration.words}; {_source('host_measured')}"
            return Residual("host", _value("host_measured"), 0.0, words)
        name = "host_unknown" if self._cost.host_assumed else "host"
        return Residual("host", _value(name), 0.0, _source(name))

    def copies(self) -> Residual:
        """Return what is known of copies to host memory and of work of the CPU's own."""
        return Residual("copies and CPU work", _value("cpu_work"), 0.0, _source("cpu_work"))


def _rows(stated: Mapping[str, Any] | None) -> str:
    if not stated or stated.get("count", 0) < LEAST_ROWS:
        return "too few rows held out"
    return f"nine in ten of {stated['count']} rows within {stated['p90_abs']:.0%}"


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation of some values."""
    mean = sum(values) / len(values)
    return sqrt(sum((value - mean) ** 2 for value in values) / len(values))
