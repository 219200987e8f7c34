"""The memory snapshot has PyTorch's schema, and its figures are the allocator's."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from report_scenarios import answered

from sim.report.snapshot import snapshot_bytes

# torch/cuda/memory.py: _snapshot; torch/csrc/cuda/memory_snapshot.cpp
SEGMENT = "device address total_size allocated_size active_size requested_size stream segment_type segment_pool_id "
SEGMENT += "is_expandable frames blocks"
BLOCK = "address size requested_size state frames"
TRACE = "action size stream time_us frames"
ACTIONS = "alloc free_requested free_completed segment_alloc segment_free segment_map segment_unmap oom snapshot"


def snapshot(name):
    return pickle.loads(snapshot_bytes(answered(name).report.fullest))


@pytest.mark.parametrize("name", ["zero_3", "too_large"])
def test_the_schema_is_that_of_pytorch(name):
    content = snapshot(name)
    assert {"segments", "device_traces"} <= set(content)
    for segment in content["segments"]:
        assert set(SEGMENT.split()) <= set(segment)
        assert segment["segment_type"] in ("small", "large")
        for block in segment["blocks"]:
            assert set(BLOCK.split()) <= set(block)
            assert block["state"] in ("active_allocated", "active_pending_free", "inactive", "active_awaiting_free")
    (trace,) = content["device_traces"]
    for entry in trace:
        assert set(TRACE.split()) <= set(entry)
        assert entry["action"] in ACTIONS.split()
        assert ("device_free" if entry["action"] == "oom" else "addr") in entry
        assert all({"filename", "line", "name"} <= set(frame) for frame in entry["frames"])


def test_blocks_tile_their_segments():
    for segment in snapshot("zero_3")["segments"]:
        at = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == at
            at += block["size"]
        assert at == segment["address"] + segment["total_size"]
        active = [block for block in segment["blocks"] if block["state"] == "active_allocated"]
        assert segment["allocated_size"] == sum(block["size"] for block in active)


def test_replaying_the_trace_gives_the_peaks_of_the_report():
    footprint = answered("zero_3").report.fullest
    allocated = reserved = most_allocated = most_reserved = 0
    (trace,) = snapshot("zero_3")["device_traces"]
    for entry in trace:
        size = entry["size"]
        allocated += {"alloc": size, "free_requested": -size}.get(entry["action"], 0)
        reserved += {"segment_alloc": size, "segment_free": -size}.get(entry["action"], 0)
        most_allocated, most_reserved = max(most_allocated, allocated), max(most_reserved, reserved)
    # an event has the size that was asked for, as PyTorch's have; what blocks are larger is rounding
    assert most_allocated == footprint.peak_allocated_bytes - footprint.at_peak["rounding"]
    assert most_reserved == footprint.peak_reserved_bytes


def test_blocks_say_whose_they_are():
    named = [entry for entry in snapshot("zero_3")["device_traces"][0] if entry["action"] == "alloc"]
    assert named
    assert all(entry["frames"] and entry["frames"][0]["name"] for entry in named)


@pytest.mark.real
@pytest.mark.parametrize("command", ["trace_plot", "segment_plot", "stats", "trace"])
def test_pytorchs_own_viewer_opens_it(tmp_path, command):
    path = tmp_path / "memory_snapshot.pickle"
    path.write_bytes(snapshot_bytes(answered("zero_3").report.fullest))
    made = ["-o", str(tmp_path / "made")] if command not in ("stats", "trace") else []
    done = subprocess.run(
        [sys.executable, "-m", "torch.cuda._memory_viz", command, str(path), *made],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made").stat().st_size > 1000 if made else len(done.stdout) > 100


@pytest.mark.real
def test_the_snapshot_of_a_run_opens_in_pytorchs_viewer(tmp_path):
    """The whole road: ``sim run --out DIR``, then ``python -m torch.cuda._memory_viz trace_plot`` on what it wrote."""
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: {num_hidden_layers: 2, hidden_size: 256, intermediate_size: 512, num_attention_heads: 4, "
        "vocab_size: 512}\ncluster: {node: dgx-h100, num_gpus: 2}\nframework: fsdp2\n"
        "training: {sequence_length: 128, micro_batch_size: 1, global_batch_size: 2, precision: bf16}\n"
    )
    out, page = tmp_path / "out", tmp_path / "page.html"
    ran = subprocess.run(
        [sys.executable, "-m", "sim", "run", str(file), "--out", str(out)], capture_output=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    command = [sys.executable, "-m", "torch.cuda._memory_viz", "trace_plot", str(out / "memory_snapshot.pickle")]
    done = subprocess.run([*command, "-o", str(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MemoryViz" in page.read_text()
