"""A calibration file: what ``sim calibrate`` measured on a user's own machine, with its provenance.

One YAML file: a mapping ``provenance`` and lists of measurements. Times carry their unit ("123.4 us"); each row says
the shape as the ledger counts it. How the rows are used is in ``sim/cost/calibrated.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sim import units
from sim.errors import Finding, ScenarioError
from sim.interop.values import Key, Problem, boolean, choice, integer, measured, read_mapping, size, text
from sim.scenario.document import Document, UnreadableError, parse_yaml, read_text

VERSION = 1
MAX_FILE_BYTES = 4_000_000
MAX_VALUES = 100_000
_DTYPES = ("fp32", "tf32", "fp16", "bf16", "fp8")
FAMILIES = ("elementwise", "norm", "softmax", "reduce", "amax", "gather", "copy", "optimizer")
"""Families of kernels bound by memory that are measured; not scatters, which depend on which rows meet, nor transposes
and columns, which no kernel of eager torch stands for."""
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "send")


@dataclass(frozen=True, slots=True)
class GemmRow:
    """One matrix product: C[batch, m, n] = A[batch, m, k] B[batch, k, n]. ``over_tokens``: the gradient of a weight."""

    m: int
    n: int
    k: int
    dtype: str
    time: float
    batch: int = 1
    over_tokens: bool = False


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One fused attention, forward or backward, under the name that a scenario gives it."""

    kernel: str
    direction: str
    batch: int
    heads: int
    kv_heads: int
    query: int
    key: int
    head_dim: int
    dtype: str
    time: float
    causal: bool = True


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One kernel bound by memory: ``bytes`` are read and written together."""

    family: str
    bytes: int
    time: float


@dataclass(frozen=True, slots=True)
class CopyRow:
    """One copy between pinned host memory and the GPU, alone."""

    direction: str
    bytes: int
    time: float


@dataclass(frozen=True, slots=True)
class HostTimes:
    """Host time a kernel of a small GPT block, forward and backward, without the driver; ``driver``: of a launch.

    Seconds; 0 where it was not measured.
    """

    forward: float = 0.0
    backward: float = 0.0
    driver: float = 0.0


@dataclass(frozen=True, slots=True)
class NcclCurve:
    """Times of one collective by size, out of place: ``rows`` are (bytes, seconds), sizes as nccl-tests counts them."""

    collective: str
    ranks: int
    nodes: int
    rows: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything of one file. ``provenance`` is told as it stands; ``gpu`` is the catalogue's name ("": no GPU)."""

    file: str
    gpu: str
    provenance: tuple[tuple[str, str], ...]
    gemm: tuple[GemmRow, ...] = ()
    attention: tuple[AttentionRow, ...] = ()
    memory: tuple[MemoryRow, ...] = ()
    copies: tuple[CopyRow, ...] = ()
    host: HostTimes = HostTimes()
    nccl: tuple[NcclCurve, ...] = ()

    @property
    def words(self) -> str:
        """Return which file, machine and day this is: "calibration.yaml (NVIDIA H100 80GB HBM3, 2026-11-21)"."""
        known = dict(self.provenance)
        of = ", ".join(known[key] for key in ("gpu_model", "processor", "date") if known.get(key))
        return f"{Path(self.file).name} ({of})" if of else Path(self.file).name


_MANY = 2**50
_TIME = measured(units.parse_duration, "a time", "123.4 us")
_COUNT = integer(1, _MANY, 4096, required=True)


def _must(key: Key) -> Key:
    return key._replace(required=True)


_TABLES: dict[str, tuple[type, dict[str, Key]]] = {
    "gemm": (
        GemmRow,
        {
            "m": _COUNT, "n": _COUNT, "k": _COUNT, "batch": integer(1, _MANY, 1), "over_tokens": boolean(),
            "dtype": choice(_DTYPES, "a dtype", required=True), "time": _must(_TIME),
        },
    ),
    "attention": (
        AttentionRow,
        {
            "kernel": text("a kernel", "flash-2", required=True),
            "direction": choice(("forward", "backward"), "a direction", required=True),
            **dict.fromkeys(("batch", "heads", "kv_heads", "query", "key", "head_dim"), _COUNT),
            "causal": boolean(), "dtype": choice(_DTYPES, "a dtype", required=True), "time": _must(_TIME),
        },
    ),
    "memory": (
        MemoryRow,
        {
            "family": choice(FAMILIES, "a family of kernels", required=True), "bytes": _must(size()),
            "time": _must(_TIME),
        },
    ),
    "copies": (
        CopyRow,
        {
            "direction": choice(("host_to_device", "device_to_host"), "a direction", required=True),
            "bytes": _must(size()), "time": _must(_TIME),
        },
    ),
}  # fmt: skip
_HOST: dict[str, Key] = dict.fromkeys(("forward", "backward", "driver"), _TIME)
_CURVE: dict[str, Key] = {
    "collective": choice(COLLECTIVES, "a collective", required=True),
    "ranks": integer(2, 2**20, 8, required=True),
    "nodes": integer(1, 2**20, 1, required=True),
    "rows": Key(lambda value: value, {}, required=True),
}
_HINTS = {
    name: f"every row says {', '.join(key for key, spec in table.items() if spec.required)}"
    for name, table in (*((name, table) for name, (_, table) in _TABLES.items()), ("nccl", _CURVE))
}
_TOP = ("calibration", "provenance", *_TABLES, "host", "nccl")


def read_calibration(path: Path, shown: str) -> Calibration:
    """Return what a calibration file holds. Raises ScenarioError with every finding, each with its line."""
    what = "a calibration (sim calibrate writes one)"
    findings: list[Finding] = []
    try:
        document = parse_yaml(read_text(path, shown, what, MAX_FILE_BYTES), shown, findings, what, MAX_VALUES)
    except UnreadableError as error:
        raise ScenarioError([*findings, error.finding]) from None
    problems: list[Problem] = []
    found = _read(document, problems)
    findings += [document.finding(problem) for problem in problems]
    if findings:
        raise ScenarioError(list(dict.fromkeys(findings)))
    return found


def _read(document: Document, problems: list[Problem]) -> Calibration:
    data = document.data
    if data.get("calibration") != VERSION:
        given = f"is {data['calibration']!r}" if "calibration" in data else "is missing"
        problems.append(
            Problem(
                ("calibration",), f"calibration {given}: this is no calibration file", f"write calibration: {VERSION}"
            )
        )
        return Calibration(document.file, "", ())
    problems += [
        Problem((key,), f"unknown key {key}", f"keys here: {', '.join(_TOP)}") for key in data if key not in _TOP
    ]
    provenance = data.get("provenance")
    if not isinstance(provenance, Mapping) or not provenance.get("date"):
        problems.append(
            Problem(("provenance",), "provenance does not say when this was measured", "write provenance: {date: ...}")
        )
        provenance = {}
    rows: dict[str, Any] = {name: _rows(name, data.get(name), problems) for name in _TABLES}
    host, _ = read_mapping(data.get("host"), _HOST, ("host",), problems)
    return Calibration(
        file=document.file,
        gpu=str(provenance.get("gpu") or ""),
        provenance=tuple((key, _words(value)) for key, value in provenance.items()),
        host=HostTimes(**host),
        nccl=_curves(data.get("nccl"), problems),
        **rows,
    )


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(below)}" for key, below in value.items())
    return ", ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _entries(name: str, given: object, problems: list[Problem]) -> list[Any]:
    if given is None:
        return []
    if not isinstance(given, list):
        problems.append(Problem((name,), f"{name} is not a list", "write one measurement a line, each after '- '"))
        return []
    return given


def _rows(name: str, given: object, problems: list[Problem]) -> tuple[Any, ...]:
    kind, table = _TABLES[name]
    found = []
    for number, entry in enumerate(_entries(name, given, problems)):
        before = len(problems)
        values, _ = read_mapping(entry, table, (name, str(number)), problems)
        _hint(problems, before, name)
        if len(problems) == before:
            found.append(kind(**values))
    return tuple(found)


def _hint(problems: list[Problem], since: int, name: str) -> None:
    """Say what a row needs where something of it is missing."""
    problems[since:] = [p if p.remedy else p._replace(remedy=_HINTS[name]) for p in problems[since:]]


def _curves(given: object, problems: list[Problem]) -> tuple[NcclCurve, ...]:
    found = []
    for number, entry in enumerate(_entries("nccl", given, problems)):
        at = ("nccl", str(number))
        before = len(problems)
        values, _ = read_mapping(entry, _CURVE, at, problems)
        _hint(problems, before, "nccl")
        rows = _points(values["rows"], (*at, "rows"), problems) if "rows" in values else ()
        if len(problems) == before:
            found.append(NcclCurve(values["collective"], values["ranks"], values["nodes"], rows))
    return tuple(found)


def _points(given: object, at: tuple[str, ...], problems: list[Problem]) -> tuple[tuple[int, float], ...]:
    remedy = "write [bytes, time], such as [67108864, 412.5 us]"
    points: dict[int, float] = {}
    if not isinstance(given, list) or not given:
        problems.append(Problem(at, "rows is not a list of sizes and times", remedy))
        return ()
    for number, row in enumerate(given):
        try:
            num_bytes, time = row
            if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 1:
                raise ValueError
            points[num_bytes] = units.parse_duration(time)
            if points[num_bytes] <= 0:
                raise ValueError
        except (TypeError, ValueError):
            problems.append(Problem((*at, str(number)), f"row {number + 1} is not a size and a time", remedy))
    return tuple(sorted(points.items()))


# --- writing ---------------------------------------------------------------------------------------


def calibration_text(
    provenance: Mapping[str, Any],
    rows: Mapping[str, Sequence[Any]],
    host: HostTimes,
    curves: Sequence[NcclCurve],
) -> str:
    """Return the file: read back, it is the same to the digits that are written (five)."""
    import yaml

    def flow(value: Any) -> str:
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True).strip()

    lines = [
        "# What sim calibrate measured on one machine. Use: sim run SCENARIO --calibration FILE.",
        f"calibration: {VERSION}",
        "provenance:",
        *(f"  {key}: {flow({'x': value})[4:-1]}" for key, value in provenance.items()),
    ]
    for name in _TABLES:
        if rows.get(name):
            lines.append(f"{name}:")
            lines += [f"- {flow(_plain(row))}" for row in rows[name]]
    measured_host = {key: value for key, value in _plain(host).items() if not value.startswith("0 ")}
    if measured_host:
        lines.append(f"host: {flow(measured_host)}")
    if curves:
        lines.append("nccl:")
    for curve in curves:
        lines.append(f"- collective: {curve.collective}")
        lines += [f"  ranks: {curve.ranks}", f"  nodes: {curve.nodes}", "  rows:"]
        lines += [f"  - [{num_bytes}, {_time(time)}]" for num_bytes, time in curve.rows]
    return "\n".join(lines) + "\n"


def _plain(row: Any) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    for key, value in values.items():
        if key == "bytes":
            values[key] = f"{value} B"
        elif isinstance(value, float):
            values[key] = _time(value)
    return values


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.5g} us"
