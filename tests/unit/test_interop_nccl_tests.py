"""Output of nccl-tests, new and old, and broken output."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    with pytest.raises(ScenarioError, match="is JSON without the results"):
        read_tests('{"version": 1}', "log.json")


def test_runs_that_are_not_simulated_are_left_out_and_named() -> None:
    """Their rows belong to no run before them."""
    text = f"all_reduce_perf\n{RANKS}{HEAD}{REDUCE}gather_perf\n{RANKS}{HEAD}{GATHER}"
    (test,) = read_tests(text, "log.txt")
    assert (test.kind, len(test.rows)) == ("all_reduce", 1)
    assert test.remarks == ("line 26: gather_perf is not simulated: left out",)
    assert said(f"gather_perf\n{RANKS}{HEAD}{GATHER}") == ["log.txt:13: gather_perf is not simulated"]


def said(text: str) -> list[str]:
    with pytest.raises(ScenarioError) as wrong:
        read_tests(text, "log.txt")
    assert all(finding.remedy for finding in wrong.value.findings)
    return [str(finding).split("\n")[0] for finding in wrong.value.findings]


def test_times_of_the_host_rows_that_end_early_and_no_numbers() -> None:
    assert said(HEAD.replace("    time ", " cputime ") + REDUCE) == [
        "log.txt:5: its times are the host's (-C), not the GPU's"
    ]
    assert said(HEAD + REDUCE + "    16777216       4194304     float     \n") == ["log.txt:6: not a row of nccl-tests"]
    assert said(HEAD + REDUCE.replace("198.60", "nan").replace("168.95", "nan")) == ["log.txt:5: a time of nan us"]


def test_runs_that_failed() -> None:
    failure = "host0: Test NCCL failure common.cu:958 'unhandled cuda error / '\n"
    (test,) = read_tests(RANKS + HEAD + REDUCE + failure, "log.txt")
    assert test.remarks == ("line 13: the run failed: Test NCCL failure common.cu:958 'unhandled cuda error / '",)
    assert said(RANKS + HEAD + failure) == ["log.txt:12: the run failed before its first row"]
    (test,) = read_tests(RANKS + HEAD + REDUCE + "# Out of bounds values : 3 FAILED\n", "log.txt")
    assert test.remarks == ("line 13: results were wrong: Out of bounds values : 3 FAILED",)


def written(**changes: Any) -> str:
    """Return what ``-J`` writes of one all-reduce of 2 processes with 4 GPUs each (nccl-tests, src/util.cu)."""
    figures = {"time": 198.6, "alg_bw": 168.95, "bus_bw": 295.66, "nwrong": 0.0}
    device = {"rank": 0, "hostname": "a", "device": 0, "device_hex": "0000:1b:00", "device_info": "NVIDIA H100"}
    row = {"size": 33554432, "count": 8388608, "type": "float", "redop": "sum", "root": "    -1"}
    return json.dumps({
        "version": 3, "args": ["./build/all_reduce_perf", "-g", "4"],
        "config": {"nthreads": 1, "ngpus": 4, "devices": [device, device | {"hostname": "b", "rank": 4}]},
        "results": [row | {"out_of_place": figures, "in_place": figures}], "errors": [], **changes,
    })  # fmt: skip


def test_the_file_of_json_says_what_the_table_says() -> None:
    (table,) = read_tests(f"all_reduce_perf\n{RANKS}{HEAD}{REDUCE}", "log.txt")
    (test,) = read_tests(written(), "log.json")
    assert (test.kind, test.num_ranks, test.num_nodes, test.gpus) == ("all_reduce", 8, 2, ("NVIDIA H100",))
    assert [(r.tensor_bytes, r.time_s, r.bus_bytes_per_s) for r in test.rows] == [
        (r.tensor_bytes, r.time_s, r.bus_bytes_per_s) for r in table.rows
    ]


def test_broken_json() -> None:
    row = json.loads(written())["results"][0]
    assert said(written()[:-20]) == ["log.txt:1: is broken JSON: Expecting ',' delimiter"]
    assert said(written(results=[row | {"out_of_place": None, "in_place": None}])) == [
        "log.txt:1: result 1 lacks size, time, alg_bw or bus_bw"
    ]
    cpu = {"cpu_time": 9.0, "alg_bw": 3728.27, "bus_bw": 6524.5}
    assert said(written(results=[row | {"out_of_place": cpu}])) == [
        "log.txt:1: its times are the host's (-C), not the GPU's"
    ]
    assert said(written(args=["./build/scatter_perf"])) == ["log.txt:1: scatter_perf is not simulated"]
    assert said(written(results=[])) == ["log.txt:1: there is no result of a size above zero in it"]
    (test,) = read_tests(written(errors=["unhandled cuda error"]), "log.json")
    assert test.remarks == ("the run failed: unhandled cuda error",)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANYTHING = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@given(st.sampled_from(["args", "config", "results", "errors", "out_of_bounds"]), st.data())
def test_any_json_is_an_answer_or_a_finding(key: str, data: st.DataObject) -> None:
    """Whatever stands under a key, and under one key of what is right there."""
    value = data.draw(ANYTHING)
    given_there = json.loads(written()).get(key)
    inside = given_there[0] if isinstance(given_there, list) and given_there else given_there
    if isinstance(inside, dict) and data.draw(st.booleans()):
        value = inside | {data.draw(st.sampled_from(sorted(inside))): value}
        value = [value] if isinstance(given_there, list) else value
    try:
        read_tests(written(**{key: value}), "log.json")
    except ScenarioError as error:
        assert error.findings
