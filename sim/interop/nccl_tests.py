"""Output of nccl-tests (all_reduce_perf and the others): sizes, times, bus bandwidths.

    #                                                              out-of-place                       in-place
    #       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
          33554432       8388608     float     sum      -1    198.6  168.95  295.66      0   199.0  168.6  295.06      0

Sizes are bytes, times microseconds, bandwidths GB/s. Which collective it was the file says in newer versions; else it
follows from the reduction and from what bus bandwidth is to algorithm bandwidth (doc/PERFORMANCE.md). Older versions
have no column for the root, or for the reduction: the time is the number that gives the algorithm bandwidth beside it.
What launchers write before each line (mpirun --tag-output, srun --label, a container's time) is left out.

The file that ``-J`` writes (src/util.cu, versions 1 to 3) says the same with keys. Times of the host (``-C``) are
refused; runs of collectives that are not simulated, that failed or whose results were wrong have a remark.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sim.errors import Finding, ScenarioError

_NAMES = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all", "all_to_all": "all_to_all", "broadcast": "broadcast", "reduce": "reduce",
    "sendrecv": "send",
}  # fmt: skip
_OTHERS = ("gather", "scatter", "hypercube", "alltoallv", "alltoallv2", "bisection")
_FAILED = re.compile(r"Test (?:NCCL|CUDA|)\s?failure|^# error: ")
_WRONG = re.compile(r"^#\s*Out of bounds values\s*:\s*[1-9]")
_RANK = re.compile(r"^#?\s*Rank\s+(\d+)\s.*?\bon\s+(\S+)\s+device\s+(\d+)\s*(?:\[\S+\])?\s*(.*)$")
_ROW = re.compile(r"^\s*(\d+)\s+(\d+)\s+([a-z][\w]*)\s+(.*)$")
_PERF = re.compile(r"(?:^|[^A-Za-z0-9_])([a-z_]+)_perf(?:_mpi)?(?![A-Za-z0-9_])")
_TAG = re.compile(
    r"^\s*(?:>\s?)*"  # quoted
    r"(?:\d{4}-\d\d-\d\d[T ][\d:.,]+(?:Z|[+-]\d\d:?\d\d)?\s*(?:std(?:out|err)\s+[FP]\s)?)?"  # a container's log
    r"(?:\[\d+,\d+\]\s*(?:<std(?:out|err)>)?:?|\[\d+\][: ]|[\w.-]*[A-Za-z][\w.-]*: |\d+: ?(?=[ #\d]))?"
)
"""Tags of Open MPI (``[1,0]<stdout>:``), MPICH and Slurm (``[0] ``, ``0: ``), pdsh and pods (``node1: ``)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One size: ``time_s`` out of place, ``bus_bytes_per_s`` as nccl-tests defines it."""

    tensor_bytes: int
    time_s: float
    bus_bytes_per_s: float
    line: int


@dataclass(frozen=True, slots=True)
class NcclTest:
    """One run: the collective, its ranks and nodes (0: the file does not say), rows by size; what GPUs are called.

    ``remarks``: what is odd about it, and runs before it that are left out.
    """

    kind: str
    num_ranks: int
    num_nodes: int
    rows: tuple[Measured, ...]
    gpus: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def gpu_of(test: NcclTest, gpu: str, known: tuple[str, ...]) -> tuple[str, bool]:
    """Return (what the run calls its GPUs, whether that may be ``gpu``), both by the catalogue's names, of which
    ``known`` are all. A name that no GPU of the catalogue goes by may be any; ("", True) where the run has no names.
    """
    mine = _model(gpu)
    others = {_model(name) for name in known} - {mine}
    for name in test.gpus:
        words = re.findall(r"[a-z]*\d+[a-z]*", name.lower())
        if mine not in words and any(word in others for word in words):
            return name, False
    return next((name for name in test.gpus if mine in re.findall(r"[a-z]*\d+[a-z]*", name.lower())), ""), True


def _model(gpu: str) -> str:
    """Return the word of a GPU's name that has its number: ``h100`` of h100-sxm-80gb, ``4090`` of rtx-4090."""
    return next((word for word in gpu.split("-") if any(letter.isdigit() for letter in word)), gpu)


@dataclass(slots=True)
class _Run:
    """A run as its lines come in: its collective if that was said, devices by (rank, host), rows, what they tell.

    ``other``: the program of a collective that is not simulated. ``of_host``: its times are the host's.
    """

    kind: str
    ranks: dict[tuple[str, str], int] = field(default_factory=dict)
    gpus: dict[str, None] = field(default_factory=dict)
    rows: list[Measured] = field(default_factory=list)
    ratio: float = 0.0
    reduces: bool = False
    other: str = ""
    of_host: bool = False
    remarks: list[str] = field(default_factory=list)

    def next(self) -> _Run:
        """Return the run after this one, which has its name and ranks unless it says others."""
        return _Run(self.kind, self.ranks, self.gpus, other=self.other)


def read_tests(text: str, file: str) -> tuple[NcclTest, ...]:
    """Return the runs in some output. Raises ScenarioError with every line that is wrong.

    A run ends where another's name, command or ranks follow its rows. One whose ranks are not listed has those of the
    run before it.
    """
    if text.lstrip().startswith("{"):
        return _from_json(text, file)
    findings: list[Finding] = []
    left_out: list[Finding] = []
    tests: list[NcclTest] = []
    run = _Run(_named(file))
    listed = True
    failed = 0
    for number, tagged in enumerate(text.splitlines(), 1):
        line = _TAG.sub("", tagged, count=1)
        perf, rank, row = _PERF.search(line), _RANK.match(line), _ROW.match(line)
        program = perf[1] if perf is not None and (perf[1] in _NAMES or perf[1] in _OTHERS) else ""
        if run.rows and (program or rank):
            _close(run, file, tests, findings, left_out)
            run, listed = run.next(), False
        if program:
            run.kind, run.other = _NAMES.get(program, ""), program if program in _OTHERS else ""
        elif rank is not None:
            if not listed:
                run.ranks, run.gpus, listed = {}, {}, True
            run.gpus |= {rank[4].strip(): None} if rank[4].strip() else {}
            run.ranks[rank[1], rank[2]] = int(rank[3])
        elif row is not None and perf is None:
            _row(run, row, file, number, findings)
        else:
            failed = _odd(run, tagged, line, number) or failed
    if run.rows:
        _close(run, file, tests, findings, left_out)
    elif tests:
        _remark(tests, run.remarks)
    none = Finding(file, 0, "there is no row of nccl-tests in it", "give the output of all_reduce_perf or another")
    if failed:
        none = Finding(file, failed, "the run failed before its first row", "give the output of a run that ended")
    return _answer(tests, findings, left_out, none)


def _answer(
    tests: list[NcclTest], findings: list[Finding], left_out: list[Finding], none: Finding
) -> tuple[NcclTest, ...]:  # fmt: skip
    """Return the tests, what is left out among their remarks. Raises ScenarioError, with ``none`` where nothing is."""
    if tests:
        _remark(tests, [f"line {finding.line}: {finding.problem}: left out" for finding in left_out])
    elif not findings:
        findings = left_out or [none]
    if findings:
        raise ScenarioError(findings)
    return tuple(tests)


def _odd(run: _Run, tagged: str, line: str, number: int) -> int:
    """Note what a line that is no row tells of its run; return its number where it says that the run failed."""
    if _FAILED.search(tagged):
        run.remarks.append(f"line {number}: the run failed: {line.strip(' #')}")
        return number
    if _WRONG.match(line):
        run.remarks.append(f"line {number}: results were wrong: {line.strip(' #')}")
    elif line.startswith("#") and " cputime " in line:
        run.of_host = True
    return 0


def _named(words: str) -> str:
    """Return the collective of the program that a command or the file's name names, or nothing."""
    return next((kind for word, kind in _NAMES.items() if re.search(rf"\b{word}_perf(?:_mpi)?\b", words)), "")


def _remark(tests: list[NcclTest], remarks: list[str]) -> None:
    """Add remarks to the last test."""
    tests[-1] = replace(tests[-1], remarks=(*tests[-1].remarks, *dict.fromkeys(remarks)))


def _from_json(text: str, file: str) -> tuple[NcclTest, ...]:
    """Return the run of a file that ``-J`` wrote: one program, its devices, a list of results."""
    what = "give the file that `-J` writes when the run has ended, or what the program prints"
    try:
        said = json.loads(text)
    except json.JSONDecodeError as error:
        raise ScenarioError([Finding(file, error.lineno, f"is broken JSON: {error.msg}", what)]) from None
    results = said.get("results")
    if not isinstance(results, list) or not all(isinstance(row, dict) for row in results):
        raise ScenarioError([Finding(file, 1, "is JSON without the results of nccl-tests", what)])
    findings: list[Finding] = []
    left_out: list[Finding] = []
    tests: list[NcclTest] = []
    program = next((str(word) for word in _list(said.get("args"))), "")
    perf = _PERF.search(program)
    run = _Run(_named(program) or _named(file), other=perf[1] if perf and perf[1] in _OTHERS else "")
    _devices(run, said.get("config"))
    run.remarks += [f"the run failed: {words}" for words in _list(said.get("errors")) if words]
    wrong = said.get("out_of_bounds")
    if isinstance(wrong, dict) and wrong.get("count"):
        run.remarks.append("results were wrong")
    for number, row in enumerate(results, 1):
        figures = row.get("out_of_place") or row.get("in_place") or {}
        run.of_host |= "cpu_time" in figures
        try:
            size = int(row["size"])
            found = [float(figures["cpu_time" if run.of_host else "time"])]
            found += [float(figures[key]) for key in ("alg_bw", "bus_bw")]
        except (KeyError, OverflowError, TypeError, ValueError):
            findings.append(Finding(file, 1, f"result {number} lacks size, time, alg_bw or bus_bw", what))
            continue
        run.reduces = row.get("redop") not in (None, "", "none")
        _measured(run, size, found[0], found[1], found[2], file, 1, findings)
    if run.rows:
        _close(run, file, tests, findings, left_out)
    return _answer(tests, findings, left_out, Finding(file, 1, "there is no result of a size above zero in it", what))


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _devices(run: _Run, config: Any) -> None:
    """Note ranks and GPUs: one device a process, which has as many ranks as threads times GPUs from that device on."""
    config = config if isinstance(config, dict) else {}
    each = [config.get(key) for key in ("nthreads", "ngpus")]
    many = math.prod(n if isinstance(n, int) and 0 < n <= 1024 else 1 for n in each)
    for process, device in enumerate(_list(config.get("devices"))):
        if isinstance(device, dict):
            first = device.get("device")
            for i in range(many):
                place = str(process * many + i), str(device.get("hostname"))
                run.ranks[place] = (first if isinstance(first, int) else 0) + i
            if name := str(device.get("device_info") or "").strip():
                run.gpus[name] = None


def _row(run: _Run, row: re.Match[str], file: str, line: int, findings: list[Finding]) -> None:
    """Add a row to its run, or what is wrong with it to the findings."""
    words, size = row[4].split(), int(row[1])
    try:
        time_us, algbw, busbw = _figures(words[words[:1] != [] and not _is_number(words[0]) :], size)
    except ValueError:
        remedy = "paste the line whole: size count type redop root time algbw busbw ..."
        findings.append(Finding(file, line, "not a row of nccl-tests", remedy))
        return
    run.reduces = words[0] in ("sum", "prod", "max", "min", "avg", "mulsum", "all")
    _measured(run, size, time_us, algbw, busbw, file, line, findings)


def _measured(
    run: _Run, size: int, time_us: float, algbw: float, busbw: float, file: str, line: int, findings: list[Finding]
) -> None:  # fmt: skip
    """Add the figures of a size to its run, or what is wrong with them to the findings."""
    if not 0 < time_us < math.inf:
        findings.append(Finding(file, line, f"a time of {time_us:g} us", "times are above zero"))
    elif run.of_host:
        problem = "its times are the host's (-C), not the GPU's"
        if problem not in (finding.problem for finding in findings):
            findings.append(Finding(file, line, problem, "run it without -C"))
    elif size and algbw:
        run.ratio = busbw / algbw if algbw > 1 else run.ratio or busbw / algbw
        run.rows.append(Measured(size, time_us * 1e-6, busbw * 1e9, line))


def _close(
    run: _Run, file: str, tests: list[NcclTest], findings: list[Finding], left_out: list[Finding]
) -> None:  # fmt: skip
    """Add a run that has ended to the tests, or what is wrong with it to the findings; those not simulated apart."""
    num_ranks, num_nodes = _ranks_and_nodes(run.ranks)
    line = run.rows[0].line
    if run.other:
        problem = f"{run.other}_perf is not simulated"
        left_out.append(Finding(file, line, problem, "give the output of all_reduce_perf or another"))
        return
    if len(run.ranks) > len({rank for rank, _ in run.ranks}):
        problem, remedy = "several hosts have the same ranks: they ran by themselves", "build nccl-tests with MPI=1"
        findings.append(Finding(file, line, problem, remedy))
    elif kind := run.kind or _guess(run.ratio, run.reduces, num_ranks):
        tests.append(
            NcclTest(kind, num_ranks, num_nodes, tuple(run.rows), tuple(run.gpus), tuple(dict.fromkeys(run.remarks)))
        )
    else:
        problem, remedy = "it does not say which collective this is", "name the file all_reduce_perf.txt"
        findings.append(Finding(file, line, problem, remedy))


def _ranks_and_nodes(ranks: Mapping[tuple[str, str], int]) -> tuple[int, int]:
    """Return how many ranks and nodes ran, of the devices of (rank, host). Where ranks are left out of the list, a
    node has as many as devices are named."""
    if not ranks:
        return 0, 0
    num_ranks = max(int(rank) for rank, _ in ranks) + 1
    num_nodes = len({host for _, host in ranks})
    if len({rank for rank, _ in ranks}) < num_ranks:
        each = max(ranks.values()) + 1
        num_nodes = num_ranks // each if num_ranks % each == 0 else 0
    return num_ranks, num_nodes


def _figures(words: list[str], size: int) -> tuple[float, float, float]:
    """Return (time in us, algorithm bandwidth, bus bandwidth) of a row, whose ``words`` may begin with the root.

    Algorithm bandwidth is the size over the time, in GB/s with two digits. Raises ValueError where there are none.
    """
    for skip in (0, 1):
        try:
            time_us, algbw, busbw = (float(word) for word in words[skip : skip + 3])
        except ValueError:
            continue
        if time_us > 0 and abs(size * 1e-3 / time_us - algbw) <= 0.02 * algbw + 0.011:
            return time_us, algbw, busbw
    time_us, algbw, busbw = (float(word) for word in words[1:4])
    return time_us, algbw, busbw


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", word) is not None


def _guess(ratio: float, reduces: bool, num_ranks: int) -> str:
    """Return the collective whose bus bandwidth is ``ratio`` times its algorithm bandwidth, or nothing."""
    if not num_ranks:
        return "all_reduce" if reduces and ratio > 1.01 else ""
    part = (num_ranks - 1) / num_ranks
    if reduces:
        return "all_reduce" if abs(ratio - 2 * part) < abs(ratio - part) else "reduce_scatter"
    return "all_gather" if abs(ratio - part) < 0.02 and num_ranks > 1 else ""
