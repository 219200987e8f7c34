"""The trace: valid, nested, and no two kernels of one stream at once."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict

import pytest
from report_scenarios import answered

from sim.report.trace import trace_bytes

PS_PER_US = 10**6


def trace(name):
    simulation = answered(name)
    content = trace_bytes(simulation.world, simulation.timeline, simulation.footprints)
    return json.loads(gzip.decompress(content))["traceEvents"]


def spans(events):
    """Return (start, end, name) in picoseconds of each thread's complete events."""
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            start = round(event["ts"] * PS_PER_US)
            threads[event["pid"], event["tid"]].append((start, start + round(event["dur"] * PS_PER_US), event["name"]))
    return threads


@pytest.mark.parametrize("name", ["zero_3", "zero_2", "ddp"])
def test_events_of_a_thread_nest_and_end_with_the_step(name):
    end = answered(name).timeline.end
    for events in spans(trace(name)).values():
        stack = []
        for start, stop, _ in sorted(events, key=lambda e: (e[0], -e[1])):
            assert 0 <= start <= stop <= end
            while stack and stack[-1] <= start:
                stack.pop()
            assert not stack or stop <= stack[-1]
            stack.append(stop)


@pytest.mark.parametrize("name", ["zero_3", "zero_2", "ddp"])
def test_kernels_of_the_compute_stream_do_not_overlap_and_are_all_there(name):
    events = trace(name)
    (compute,) = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name" and e["args"]["name"] == "compute"}
    last = 0
    for start, stop, what in sorted(spans(events)[compute]):
        assert start >= last, what
        last = stop
    timeline = answered(name).timeline
    on_compute = [span for span in timeline.spans if span.stream == "compute"]
    waits = sum(e["name"] == "waits for a rank" and e["tid"] == compute[1] for e in events)
    assert len(spans(events)[compute]) - waits == sum(max(1, len(span.kernels)) for span in on_compute)


def test_counters_show_the_peak_and_run_forward_in_time():
    events = [e for e in trace("zero_3") if e["ph"] == "C"]
    allocated = [sum(e["args"].values()) for e in events if e["name"] == "allocated bytes"]
    assert max(allocated) == answered("zero_3").report.fullest.peak_allocated_bytes
    times = [e["ts"] for e in events if e["name"] == "allocated bytes"]
    assert times == sorted(times)


def test_processes_and_threads_have_names():
    events = trace("zero_3")
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M" and "name" in e["args"]}
    assert names[0, None] == "rank 0 (16 ranks alike)"
    assert all((e["pid"], e["tid"]) in names for e in events if e["ph"] == "X")


def test_the_same_bytes_each_time():
    simulation = answered("ddp")
    first, second = (trace_bytes(simulation.world, simulation.timeline, simulation.footprints) for _ in range(2))
    assert first == second
    assert first[4:8] == b"\0\0\0\0"  # gzip's time stamp
