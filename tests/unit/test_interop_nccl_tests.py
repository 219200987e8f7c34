"""Output of nccl-tests, new and old, and broken output."""

from __future__ import annotations

import pytest

from sim.errors import ScenarioError
from sim.interop.nccl_tests import read_tests

RANKS = "\n".join(
    f"#  Rank  {i} Group  0 Pid  {100 + i} on host{i // 4} device  {i % 4} [0x1b] NVIDIA H100" for i in range(8)
)
HEAD = """
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""
REDUCE = "  33554432  8388608  float   sum  -1   198.60  168.95  295.66      0   199.00  168.61  295.07      0\n"
GATHER = "  33554432  1048576  float  none  -1   140.00  239.67  209.71      0   141.00  237.97  208.22      0\n"


def test_ranks_nodes_and_times() -> None:
    (test,) = read_tests(RANKS + HEAD + REDUCE, "log.txt")
    assert (test.kind, test.num_ranks, test.num_nodes) == ("all_reduce", 8, 2)
    (row,) = test.rows
    assert row.tensor_bytes == 33554432
    assert (row.time_s, row.bus_bytes_per_s) == (pytest.approx(198.6e-6), pytest.approx(295.66e9))


@pytest.mark.parametrize(
    ("file", "before", "row", "kind"),
    [
        ("log.txt", "", REDUCE, "all_reduce"),  # 295.66 is 1.75 of 168.95: 2(n-1)/n
        ("log.txt", "", REDUCE.replace("295.66", "147.83"), "reduce_scatter"),
        ("log.txt", "", GATHER, "all_gather"),
        ("log.txt", "# Collective test starting: alltoall_perf\n", GATHER, "all_to_all"),
        ("nccl/sendrecv_perf.log", "", GATHER, "send"),
        ("log.txt", "$ ./build/all_gather_perf -b 32M -g 8\n", GATHER, "all_gather"),
    ],
)
def test_which_collective_it_was(file: str, before: str, row: str, kind: str) -> None:
    (test,) = read_tests(before + RANKS + HEAD + row, file)
    assert test.kind == kind


def test_several_runs_in_one_file() -> None:
    text = f"all_reduce_perf\n{RANKS}{HEAD}{REDUCE}\nall_gather_perf\n{RANKS}{HEAD}{GATHER}{GATHER}"
    assert [(test.kind, len(test.rows)) for test in read_tests(text, "log.txt")] == [
        ("all_reduce", 1), ("all_gather", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing here\n", "log.txt: there is no row of nccl-tests in it"),
        (HEAD + GATHER, "log.txt:5: it does not say which collective this is"),
        (HEAD + REDUCE.replace("198.60", "soon"), "log.txt:5: not a row of nccl-tests"),
        (HEAD + REDUCE.replace("198.60", "0.00"), "log.txt:5: a time of 0 us"),
    ],
)
def test_broken_output(text: str, said: str) -> None:
    with pytest.raises(ScenarioError) as wrong:
        read_tests(text, "log.txt")
    assert str(wrong.value.findings[0]).split("\n")[0] == said
    assert all(finding.remedy for finding in wrong.value.findings)
