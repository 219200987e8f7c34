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


OLD = """
#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
     1048576        262144   float     sum    100.0   10.49   18.35  0e+00    101.0   10.38   18.17  0e+00
"""
OLD_BROADCAST = "  134217728  33554432  float  0  3298.6  40.69  40.69  0e+00  3070.3  43.71  43.71  0e+00\n"
TIMES = REDUCE.rstrip() + "  2026-09-26 10:00:00\n"


@pytest.mark.parametrize(
    ("row", "microseconds"),
    [
        (OLD, 100.0),
        ("broadcast_perf\n" + OLD_BROADCAST, 3298.6),
        (TIMES, 198.6),
        (REDUCE.replace("198.60", "198.6"), 198.6),
    ],
)
def test_columns_of_older_versions_and_with_timestamps(row: str, microseconds: float) -> None:
    """nccl-tests before 2.0.9 has no root, broadcast none of the reduction; -T ends lines with the time of day."""
    (test,) = read_tests(f"{RANKS}\n{row}", "log.txt")
    assert test.rows[0].time_s == pytest.approx(microseconds * 1e-6)


@pytest.mark.parametrize(
    "tag",
    ["[1,0]<stdout>:", "    [1,0]<stdout>:", "[0] ", "0: ", "> ", "node-1: ", "2025-05-21T09:40:05.1234Z stdout F "],
)
def test_what_launchers_write_before_a_line(tag: str) -> None:
    text = "# Collective test starting: all_reduce_perf_mpi\n" + RANKS + HEAD + REDUCE + GATHER
    (plain,), (tagged,) = read_tests(text, "a"), read_tests("".join(f"{tag}{x}\n" for x in text.splitlines()), "a")
    assert plain == tagged
    assert (plain.kind, plain.num_ranks, len(plain.rows)) == ("all_reduce", 8, 2)


def test_runs_of_different_sizes_in_one_file() -> None:
    """Each run has the ranks that were listed before it; where some are left out, as many as the last one's number."""
    one = "\n".join(RANKS.splitlines()[:4])
    many = "\n".join(["#  Rank  0 Group 0 Pid 1 on a device  0 [0x1] H100", "...",
                      "#  Rank 31 Group 0 Pid 9 on d device  7 [0x9] H100"])  # fmt: skip
    text = f"all_reduce_perf\n{one}{HEAD}{REDUCE}{RANKS}{HEAD}{REDUCE}all_gather_perf\n{many}{HEAD}{GATHER}"
    tests = read_tests(text, "log.txt")
    assert [(test.kind, test.num_ranks, test.num_nodes) for test in tests] == [
        ("all_reduce", 4, 1), ("all_reduce", 8, 2), ("all_gather", 32, 4),
    ]  # fmt: skip


def test_processes_that_ran_without_mpi_and_json() -> None:
    alone = "\n".join(f"#  Rank  0 Group  0 Pid  {i} on host{i} device  0 [0x1b] NVIDIA H100" for i in range(4))
    with pytest.raises(ScenarioError, match="several hosts have the same ranks"):
        read_tests(f"all_reduce_perf\n{alone}{HEAD}{REDUCE}", "log.txt")
    with pytest.raises(ScenarioError, match="is JSON"):
        read_tests('{"version": 1}', "log.json")
