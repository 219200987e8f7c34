"""``sim calibrate``: which kernels of a scenario are worth measuring, who measures them, and the file that comes of it.

The kernels are those of the scenario's programs, the ones first that its step spends most time on. What measures them
is ``programs/measure_gpu.py``, a program of its own under a Python that has torch: it is started, handed rows and read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sim.catalog import load
from sim.cost.calibrated import row_of
from sim.errors import Finding, ScenarioError
from sim.interop.nccl_tests import NcclTest, gpu_of, read_tests
from sim.ir.ledger import Attention, Gemm, Kernel, Pointwise
from sim.ir.program import Compute
from sim.pipeline import Simulation, simulate
from sim.scenario.calibration import (
    COLLECTIVES,
    FAMILIES,
    AttentionRow,
    CopyRow,
    GemmRow,
    HostTimes,
    MemoryRow,
    NcclCurve,
    calibration_text,
)
from sim.scenario.schema import Scenario
from sim.units import format_duration

MOST_GEMMS, MOST_ATTENTIONS, MOST_OF_A_FAMILY = 32, 12, 4
COPY_BYTES = (2**20, 2**24, 2**28)
TIMEOUT_S = 3600
DEVICES = ("auto", "cuda", "cpu", "none")
_MEASURED_DTYPES = ("fp32", "tf32", "fp16", "bf16")
"""Products that torch runs as they are; those of 8 and 4 bits are Transformer Engine's or torchao's, and are not."""
_ROWS: dict[str, type] = {"gemm": GemmRow, "attention": AttentionRow, "memory": MemoryRow, "copies": CopyRow}


@dataclass(frozen=True, slots=True)
class Calibrating:
    """What came of it: the file's text, and in words what it holds and lacks."""

    text: str
    notes: tuple[str, ...]


def program_path() -> Path:
    """Return the program that measures: inside the package where installed, beside it in a checkout."""
    here = Path(__file__).parent
    inside = here / "programs" / "measure_gpu.py"
    return inside if inside.exists() else here.parent / "programs" / "measure_gpu.py"


def calibrate(
    scenario: Scenario,
    device: str,
    tests: Sequence[Path],
    python: str = "",
    step: Callable[[str], None] = lambda words: None,
) -> Calibrating:
    """Measure, and return the calibration file's text. Raises ScenarioError where nothing can be measured."""
    curves, named, remarks = curves_of(tests, scenario.cluster.gpu.name)
    notes: list[str] = []
    answer: Mapping[str, Any] = {}
    wanted = device
    if device == "auto":
        wanted = "cuda"
    if wanted != "none":
        rows: dict[str, list[dict[str, Any]]] = {}
        if wanted == "cuda":
            step("choosing kernels")
            rows, notes = chosen(simulate(scenario))
        step(f"measuring {sum(map(len, rows.values()))} kernels and the host" if rows else "measuring the host")
        try:
            answer = _ask({"device": wanted, **rows}, python or sys.executable)
        except _CannotMeasureError as error:
            if device != "auto" or not curves:
                raise ScenarioError([Finding("--device", 0, error.problem, error.remedy)]) from None
            notes = [f"nothing was measured: {error.problem}; the file has what nccl-tests say"]
    if not answer and not curves:
        raise ScenarioError(
            [Finding("--device", 0, "nothing is measured", "give --nccl-tests FILE, or another device")]
        )
    if wanted == "cuda" and answer:
        _check_gpu(scenario, answer["machine"])
    return _written(scenario, answer, curves, named, tests, [*notes, *remarks])


# --- what is worth measuring -----------------------------------------------------------------------


def chosen(simulation: Simulation) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Return rows without times by kind, and what is left out.

    Of each kind those that all ranks together spend most time on; of a family bound by memory so many sizes, spread
    over those that the step has.
    """
    spent = kernel_times(simulation)
    order = sorted(spent, key=lambda kernel: -spent[kernel])
    gemms = [k for k in order if isinstance(k, Gemm)]
    plain = [k for k in gemms if k.dtype in _MEASURED_DTYPES]
    attentions = [k for k in order if isinstance(k, Attention)]
    kernels: dict[str, list[Kernel]] = {
        "gemm": list(_distinct(plain)[:MOST_GEMMS]), "attention": list(_distinct(attentions)[:MOST_ATTENTIONS]),
        "memory": [],
    }  # fmt: skip
    pointwise = [k for k in order if isinstance(k, Pointwise)]
    for family in FAMILIES:
        sizes = sorted({k.moved_bytes for k in pointwise if k.kind == family and k.moved_bytes > 2**14})
        picked = (
            sorted({sizes[i * (len(sizes) - 1) // (MOST_OF_A_FAMILY - 1)] for i in range(MOST_OF_A_FAMILY)})
            if sizes
            else []
        )
        by_size = {k.moved_bytes: k for k in pointwise if k.kind == family}
        kernels["memory"] += [by_size[size] for size in picked]
    rows = {
        name: [{key: value for key, value in asdict(row_of(k, 0.0)).items() if key != "time"} for k in found]
        for name, found in kernels.items()
    }
    rows["copies"] = [
        {"direction": way, "bytes": size} for way in ("host_to_device", "device_to_host") for size in COPY_BYTES
    ]
    notes = []
    if others := sorted({k.dtype for k in gemms} - set(_MEASURED_DTYPES)):
        notes.append(f"products in {', '.join(others)} are not measured: their kernels are not torch's own")
    return rows, notes


def kernel_times(simulation: Simulation) -> dict[Kernel, float]:
    """Return the modelled seconds of each different kernel in a step, over all ranks; in the order of the programs."""
    spent: dict[Kernel, float] = {}
    for program in simulation.world.programs:
        calls: dict[str, int] = {}
        for call in program.step:
            calls[call.chunk] = calls.get(call.chunk, 0) + 1
        for chunk, count in calls.items():
            for instruction in program.chunks[chunk]:
                if isinstance(instruction, Compute):
                    kernel = instruction.kernel
                    time_s = simulation.cost.kernel_s(kernel, program.ranks[0])
                    spent[kernel] = spent.get(kernel, 0.0) + time_s * count * len(program.ranks)
    return spent


def _distinct(kernels: Sequence[Any]) -> list[Any]:
    """Return kernels without those of a shape that came before; their dimensions may have other names."""
    return list({row_of(kernel, 0.0): kernel for kernel in reversed(kernels)}.values())[::-1]


# --- who measures ----------------------------------------------------------------------------------


class _CannotMeasureError(Exception):
    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


def _ask(request: Mapping[str, Any], python: str) -> dict[str, Any]:
    """Run the program that measures and return its answer."""
    try:
        done = subprocess.run(
            [python, str(program_path())],
            input=json.dumps(request), capture_output=True, text=True, check=False,
            timeout=TIMEOUT_S,
        )  # fmt: skip
    except OSError as error:
        raise _CannotMeasureError(f"{python} does not start: {error.strerror}", "write --python PATH") from None
    except subprocess.TimeoutExpired:
        raise _CannotMeasureError(f"measuring took longer than {TIMEOUT_S // 60} minutes", "is the GPU busy?") from None
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
    last = (done.stderr.strip().splitlines() or ["no message"])[-1].lstrip(".")
    if last.startswith("no torch"):
        raise _CannotMeasureError(
            f"{python} has no torch, which measures",
            "write --python PATH of the Python that trains, or pip install torch",
        )
    if last.startswith("no GPU"):
        raise _CannotMeasureError(
            "torch finds no GPU on this machine",
            "run it where the GPU is; --device cpu measures the host alone, --nccl-tests FILE reads what was measured",
        )
    raise _CannotMeasureError(
        f"the measuring program ended with: {last}", f"try: {python} {program_path()} < request.json"
    )


def _check_gpu(scenario: Scenario, machine: Mapping[str, Any]) -> None:
    """Refuse to file one GPU's figures under another's name."""
    gpu = scenario.cluster.gpu
    ours = (".".join(map(str, gpu.compute_capability)), gpu.num_sms)
    theirs = (machine["compute_capability"], machine["num_sms"])
    if ours != theirs:
        problem = (
            f"this machine has {machine['gpu_model']} (compute capability {theirs[0]}, {theirs[1]} SMs), the "
            f"scenario's GPU is {gpu.name} ({ours[0]}, {ours[1]} SMs)"
        )
        raise ScenarioError([Finding("--device", 0, problem, "calibrate with a scenario of this machine's GPU")])


# --- nccl-tests ------------------------------------------------------------------------------------


def curves_of(files: Sequence[Path], gpu: str) -> tuple[list[NcclCurve], str, list[str]]:
    """Return (curves, what they call the GPU, what is odd about them) of outputs of nccl-tests.

    Raises ScenarioError with every finding, runs on another GPU than ``gpu`` among them.
    """
    curves: list[NcclCurve] = []
    named = ""
    remarks: list[str] = []
    findings: list[Finding] = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            words = (error.strerror or "not a usable path").lower()
            findings.append(Finding(str(file), 0, f"cannot be read: {words}", "give the output of all_reduce_perf"))
            continue
        try:
            for test in read_tests(text, str(file)):
                name, same = gpu_of(test, gpu, load.names("gpu"))
                if not same:
                    problem = f"it ran on {name}, and the scenario's GPU is {gpu}"
                    findings.append(Finding(str(file), test.rows[0].line, problem, "give what ran on such GPUs"))
                named = named or name
                remarks += [f"{file}: {remark}" for remark in test.remarks]
                curves += _curve(test, str(file), findings)
        except ScenarioError as error:
            findings += error.findings
    if findings:
        raise ScenarioError(findings)
    return curves, named, remarks


def _curve(test: NcclTest, file: str, findings: list[Finding]) -> list[NcclCurve]:
    line = test.rows[0].line
    if test.num_ranks < 2 or not test.num_nodes:
        problem = "it does not say how many ranks on which nodes it ran"
        findings.append(
            Finding(file, line, problem, "keep the lines '#  Rank  0 ... on HOST device ...' of the output")
        )
        return []
    if test.kind not in COLLECTIVES:
        return []
    sizes: dict[int, list[float]] = {}
    for row in test.rows:
        sizes.setdefault(row.tensor_bytes, []).append(row.time_s)
    rows = tuple((size, sum(times) / len(times)) for size, times in sorted(sizes.items()))
    return [NcclCurve(test.kind, test.num_ranks, test.num_nodes, rows)]


# --- the file --------------------------------------------------------------------------------------


def _written(
    scenario: Scenario, answer: Mapping[str, Any], curves: Sequence[NcclCurve], named: str, tests: Sequence[Path],
    notes: list[str],
) -> Calibrating:  # fmt: skip
    rows: dict[str, list[Any]] = {}
    for name, kind in _ROWS.items():
        for row in answer.get(name, ()):
            if row["time_s"] is None:
                shape = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("time_s", "why"))
                notes.append(f"not measured: {name} {shape}: {row['why']}")
                continue
            fields = {key: value for key, value in row.items() if key != "time_s"}
            rows.setdefault(name, []).append(kind(**fields, time=row["time_s"]))
    host = HostTimes(**answer.get("host", {}))
    machine = dict(answer.get("machine", {}))
    counts = {name: len(found) for name, found in rows.items()}
    if host != HostTimes():
        counts["host"] = sum(1 for value in asdict(host).values() if value)
    if curves:
        counts["nccl"] = sum(len(curve.rows) for curve in curves)
    provenance: dict[str, Any] = {
        "date": date.today().isoformat(),
        **({"gpu": scenario.cluster.gpu.name} if "gpu_model" in machine or named else {}),
        **machine,
        "scenario": scenario.name,
        **({"nccl_tests": [str(path) for path in tests]} if tests else {}),
        "counts": counts,
    }
    words = {"host": "of the host", "nccl": "of collectives", "gemm": "products", "memory": "kernels bound by memory"}
    said = [f"{count} {words.get(name, name)}" for name, count in counts.items()]
    if host.forward:
        said.append(f"the host takes {format_duration(host.forward)} a kernel of the reference block")
    return Calibrating(calibration_text(provenance, rows, host, curves), (f"measured: {', '.join(said)}", *notes))
