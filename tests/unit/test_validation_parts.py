"""Differences by category, and real memory snapshots beside the simulation."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sim.cli import app
from sim.errors import ScenarioError
from sim.validation.parts import allocated_curve, read_snapshot

MIB = 2**20
SCENARIO = {
    "model": {
        "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
        "vocab_size": 512,
    },
    "cluster": {"node": "dgx-h100", "num_gpus": 2},
    "framework": "fsdp2",
    "training": {"sequence_length": 128, "micro_batch_size": 1, "global_batch_size": 2, "precision": "bf16"},
}  # fmt: skip


def event(action: str, size: int, time: int) -> dict[str, object]:
    return {"action": action, "addr": 0, "size": size, "stream": 0, "time_us": time, "frames": []}


SNAPSHOT = {
    "segments": [
        {"device": 0, "blocks": [{"size": 3 * MIB, "requested_size": 3 * MIB, "state": "active_allocated"}]},
        {"device": 0, "blocks": [{"size": 9 * MIB, "state": "inactive"}]},
    ],
    "device_traces": [
        [event("alloc", 4 * MIB, 100), event("free_requested", 4 * MIB, 150), event("free_completed", 4 * MIB, 150),
         event("segment_alloc", 20 * MIB, 160), event("alloc", MIB, 170)],
        [],
    ],
}  # fmt: skip


def test_what_was_held_before_the_record_is_worked_out() -> None:
    """3 MiB at the end, 1 of them made in the record: 2 before it."""
    assert allocated_curve(SNAPSHOT) == [(0.0, 2 * MIB), (0.0, 6 * MIB), (50.0, 2 * MIB), (70.0, 3 * MIB)]


def test_a_pickle_that_names_code_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "evil.pickle"
    path.write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(ScenarioError, match="is no memory snapshot"):
        read_snapshot(path)


def test_the_command_breaks_the_difference_down_and_draws(tmp_path: Path) -> None:
    (tmp_path / "real.pickle").write_bytes(pickle.dumps(SNAPSHOT, protocol=4))
    file = tmp_path / "runs.yaml"
    measured = {
        "peak_allocated_bytes": 100 * MIB, "at_peak": {"parameters": 2 * MIB, "buffers": 64 * MIB},
        "snapshot": "real.pickle",
    }  # fmt: skip
    file.write_text(
        yaml.safe_dump({"source": {"title": "x"}, "runs": [{"id": "one", "scenario": SCENARIO, "measured": measured}]})
    )
    done = CliRunner().invoke(app, ["validate", str(file), "--plot", str(tmp_path / "plots")])
    assert done.exit_code == 0, done.output
    assert "most of the difference is other" in done.output
    assert (tmp_path / "plots" / "one.png").read_bytes().startswith(b"\x89PNG")
