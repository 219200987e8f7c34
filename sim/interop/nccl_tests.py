"""Output of nccl-tests (all_reduce_perf and the others): sizes, times, bus bandwidths.

    #                                                              out-of-place                       in-place
    #       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
          33554432       8388608     float     sum      -1    198.6  168.95  295.66      0   199.0  168.6  295.06      0

Sizes are bytes, times microseconds, bandwidths GB/s. Which collective it was the file says in newer versions; else it
follows from the reduction and from what bus bandwidth is to algorithm bandwidth (doc/PERFORMANCE.md). Older versions
have no column for the root, or for the reduction: the time is the number that gives the algorithm bandwidth beside it.
What launchers write before each line (mpirun --tag-output, srun --label, a container's time) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sim.errors import Finding, ScenarioError

_NAMES = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all", "all_to_all": "all_to_all", "broadcast": "broadcast", "reduce": "reduce",
    "sendrecv": "send",
}  # fmt: skip
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
    """One run: the collective, its ranks and nodes (0: the file does not say), rows by size; what GPUs are called."""

    kind: str
    num_ranks: int
    num_nodes: int
    rows: tuple[Measured, ...]
    gpus: tuple[str, ...] = ()


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
    """A run as its lines come in: its collective if that was said, devices by (rank, host), rows, what they tell."""

    kind: str
    ranks: dict[tuple[str, str], int] = field(default_factory=dict)
    gpus: dict[str, None] = field(default_factory=dict)
    rows: list[Measured] = field(default_factory=list)
    ratio: float = 0.0
    reduces: bool = False


def read_tests(text: str, file: str) -> tuple[NcclTest, ...]:
    """Return the runs in some output. Raises ScenarioError with every line that is wrong.

    A run ends where another's name, command or ranks follow its rows. One whose ranks are not listed has those of the
    run before it.
    """
    findings: list[Finding] = []
    tests: list[NcclTest] = []
    run = _Run(next((kind for word, kind in _NAMES.items() if re.search(rf"\b{word}_perf(?:_mpi)?\b", file)), ""))
    listed = True
    for number, tagged in enumerate(text.splitlines(), 1):
        line = _TAG.sub("", tagged, count=1)
        perf, rank, row = _PERF.search(line), _RANK.match(line), _ROW.match(line)
        known = perf is not None and perf[1] in _NAMES
        if run.rows and (known or rank):
            _close(run, file, tests, findings)
            run, listed = _Run(run.kind, run.ranks, run.gpus), False
        if perf is not None and known:
            run.kind = _NAMES[perf[1]]
        elif rank is not None:
            if not listed:
                run.ranks, run.gpus, listed = {}, {}, True
            run.gpus |= {rank[4].strip(): None} if rank[4].strip() else {}
            run.ranks[rank[1], rank[2]] = int(rank[3])
        elif row is not None and perf is None:
            _row(run, row, file, number, findings)
    if run.rows:
        _close(run, file, tests, findings)
    if not tests and not findings:
        problem, remedy = "there is no row of nccl-tests in it", "give the output of all_reduce_perf or another"
        if text.lstrip().startswith("{"):
            problem, remedy = "is JSON, not a table", "give what the program prints; `-J` writes the JSON beside it"
        findings.append(Finding(file, 0, problem, remedy))
    if findings:
        raise ScenarioError(findings)
    return tuple(tests)


def _row(run: _Run, row: re.Match[str], file: str, line: int, findings: list[Finding]) -> None:
    """Add a row to its run, or what is wrong with it to the findings."""
    words, size = row[4].split(), int(row[1])
    run.reduces = words[:1] != [] and words[0] in ("sum", "prod", "max", "min", "avg", "mulsum", "all")
    try:
        time_us, algbw, busbw = _figures(words[0 if _is_number(words[0]) else 1 :], size)
    except ValueError:
        remedy = "size count type redop root time algbw busbw ..."
        findings.append(Finding(file, line, "not a row of nccl-tests", remedy))
        return
    if time_us <= 0:
        findings.append(Finding(file, line, f"a time of {time_us:g} us", "times are above zero"))
    elif size and algbw:
        run.ratio = busbw / algbw if algbw > 1 else run.ratio or busbw / algbw
        run.rows.append(Measured(size, time_us * 1e-6, busbw * 1e9, line))


def _close(run: _Run, file: str, tests: list[NcclTest], findings: list[Finding]) -> None:
    """Add a run that has ended to the tests, or what is wrong with it to the findings."""
    num_ranks, num_nodes = _ranks_and_nodes(run.ranks)
    line = run.rows[0].line
    if len(run.ranks) > len({rank for rank, _ in run.ranks}):
        problem, remedy = "several hosts have the same ranks: they ran by themselves", "build nccl-tests with MPI=1"
        findings.append(Finding(file, line, problem, remedy))
    elif kind := run.kind or _guess(run.ratio, run.reduces, num_ranks):
        tests.append(NcclTest(kind, num_ranks, num_nodes, tuple(run.rows), tuple(run.gpus)))
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
