"""Output of nccl-tests (all_reduce_perf and the others): sizes, times, bus bandwidths.

    #                                                              out-of-place                       in-place
    #       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
          33554432       8388608     float     sum      -1    198.6  168.95  295.66      0   199.0  168.6  295.06      0

Sizes are bytes, times microseconds, bandwidths GB/s. Which collective it was the file says in newer versions; else it
follows from the reduction and from what bus bandwidth is to algorithm bandwidth (doc/PERFORMANCE.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sim.errors import Finding, ScenarioError

_NAMES = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all", "all_to_all": "all_to_all", "broadcast": "broadcast", "reduce": "reduce",
    "sendrecv": "send",
}  # fmt: skip
_RANK = re.compile(r"^#?\s*Rank\s+(\d+)\s.*?\bon\s+(\S+)\s+device", re.MULTILINE)
_ROW = re.compile(r"^\s*(\d+)\s+(\d+)\s+([a-z][\w]*)\s+(.*)$")


@dataclass(frozen=True, slots=True)
class Measured:
    """One size: ``time_s`` out of place, ``bus_bytes_per_s`` as nccl-tests defines it."""

    tensor_bytes: int
    time_s: float
    bus_bytes_per_s: float
    line: int


@dataclass(frozen=True, slots=True)
class NcclTest:
    """One run: the collective, its ranks and nodes (0: the file does not say), rows by size."""

    kind: str
    num_ranks: int
    num_nodes: int
    rows: tuple[Measured, ...]


def read_tests(text: str, file: str) -> tuple[NcclTest, ...]:
    """Return the runs in some output. Raises ScenarioError with every line that is wrong."""
    ranks = _RANK.findall(text)
    num_ranks = len({rank for rank, _ in ranks})
    num_nodes = len({host for _, host in ranks})
    findings: list[Finding] = []
    tests: list[NcclTest] = []
    named = next((kind for word, kind in _NAMES.items() if re.search(rf"\b{word}_perf\b", file)), "")
    rows: list[Measured] = []
    ratio, reduces = 0.0, False

    def close() -> None:
        nonlocal rows
        if rows:
            kind = named or _guess(ratio, reduces, num_ranks)
            if kind:
                tests.append(NcclTest(kind, num_ranks, num_nodes, tuple(rows)))
            else:
                line = rows[0].line
                findings.append(
                    Finding(file, line, "it does not say which collective this is", "name the file all_reduce_perf.txt")
                )
        rows = []

    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search(r"\b(\w+)_perf\b", line):
            if found[1] in _NAMES:
                close()
                named = _NAMES[found[1]]
            continue
        row = _ROW.match(line)
        if row is None:
            continue
        words = row[4].split()
        reduces = bool(words) and words[0] in ("sum", "prod", "max", "min", "avg")
        numbers = words[2:] if len(words) > 2 and not _is_time(words[0]) else words
        try:
            time_us, algbw, busbw = (float(word) for word in numbers[:3])
        except ValueError:
            findings.append(
                Finding(file, number, "not a row of nccl-tests", "size count type redop root time algbw busbw ...")
            )
            continue
        size = int(row[1])
        if time_us <= 0:
            findings.append(Finding(file, number, f"a time of {time_us:g} us", "times are above zero"))
        elif size and algbw:
            ratio = busbw / algbw if algbw > 1 else ratio or busbw / algbw
            rows.append(Measured(size, time_us * 1e-6, busbw * 1e9, number))
    close()
    if not tests and not findings:
        findings.append(
            Finding(file, 0, "there is no row of nccl-tests in it", "give the output of all_reduce_perf or another")
        )
    if findings:
        raise ScenarioError(findings)
    return tuple(tests)


def _is_time(word: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?", word) is not None


def _guess(ratio: float, reduces: bool, num_ranks: int) -> str:
    """Return the collective whose bus bandwidth is ``ratio`` times its algorithm bandwidth, or nothing."""
    if not num_ranks:
        return "all_reduce" if reduces and ratio > 1.01 else ""
    part = (num_ranks - 1) / num_ranks
    if reduces:
        return "all_reduce" if abs(ratio - 2 * part) < abs(ratio - part) else "reduce_scatter"
    return "all_gather" if abs(ratio - part) < 0.02 and num_ranks > 1 else ""
