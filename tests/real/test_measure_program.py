"""The program that measures: its file of measured runs, its fake world, and what it makes of a GPU's profile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from configurations import LLAMA, deepspeed, scenario
from simulated import load, simulated

from sim.validation.runs import read_runs

pytestmark = pytest.mark.real


SMALL = scenario("fsdp2", 2, LLAMA, precision="bf16")


def measured(tmp_path: Path, *options: str, asked: dict[str, Any] = SMALL) -> dict[str, Any]:
    """Return the one run of the file that the program writes for a small scenario."""
    given, out = tmp_path / "small.yaml", tmp_path / "runs.yaml"
    given.write_text(yaml.safe_dump(asked))
    command = [sys.executable, "-m", "validation.real.measure", str(given), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [run.id for file in read_runs([out]) for run in file.runs] == ["small"]
    (run,) = yaml.safe_load(out.read_text())["runs"]
    found: dict[str, Any] = run
    return found


def test_a_fake_world_is_as_real_processes(tmp_path: Path) -> None:
    """Neither messages that do not travel nor tensors without bytes change what a rank holds and issues.

    Named cause: gloo's threads let go of what they carried a moment after the rank does, so that a real peak may be
    higher; what is held at the borders of passes is not.
    """
    real = measured(tmp_path)["exact"]["ranks"]
    assert [rank["rank"] for rank in real] == [0, 1]
    fake = measured(tmp_path, "--fake-world", "2", "--rank", "1")["exact"]["ranks"]
    shapes = measured(tmp_path, "--fake-world", "2", "--rank", "1", "--fake-tensors")["exact"]["ranks"]
    assert fake == shapes
    peaks, real_peaks = taken_out(fake, "peak_live_bytes"), taken_out(real[1:], "peak_live_bytes")
    assert fake == real[1:]
    assert len(peaks) == len(real_peaks) > 1
    assert all(most >= alone for most, alone in zip(real_peaks, peaks, strict=True))


def taken_out(value: Any, key: str) -> list[int]:
    """Remove every ``key`` from nested mappings and lists, and return what stood there, in order."""
    if isinstance(value, list):
        return [found for one in value for found in taken_out(one, key)]
    if not isinstance(value, dict):
        return []
    here = [value.pop(key)] if key in value else []
    return here + [found for one in value.values() for found in taken_out(one, key)]


@pytest.mark.parametrize("framework", ["fsdp2", "deepspeed"])
def test_one_rank_of_64_is_as_simulated(framework: str, tmp_path: Path) -> None:
    """FSDP2 and ZeRO-3 on eight nodes: states, what is held between steps, and collectives of a rank.

    Wide enough that a rank's shard of a norm is no scalar: 16 elements of 4 bytes.
    """
    wide = LLAMA | {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2}
    asked = deepspeed(3, 64, bucket=20_000, model=wide) if framework == "deepspeed" else scenario("fsdp2", 64, wide)
    asked["cluster"] = {"node": "dgx-h100", "num_nodes": 8}
    (real,) = measured(tmp_path, "--fake-world", "64", "--rank", "3", asked=asked)["exact"]["ranks"]
    (ours,) = simulated(load(tmp_path, "asked", asked))
    assert {name: real["states_bytes"][name] for name in ours.states} == ours.states
    mesh_on_host = 64 * 4 if framework == "fsdp2" else 0  # DeviceMesh keeps its ranks as int32
    assert real["borders"][-1]["live_bytes"] == ours.marks[-1][2] + mesh_on_host
    totals: dict[tuple[str, int], tuple[int, int]] = {}
    for kind, size, ranks in ours.collectives:
        count, total = totals.get((kind, ranks), (0, 0))
        totals[kind, ranks] = count + 1, total + size
    found = {(c["kind"], c["ranks"]): (c["count"], c["tensor_bytes"]) for c in real["collectives"]}
    assert found == totals


def test_communication_is_exposed_where_no_other_kernel_runs() -> None:
    """NCCL from 0 to 10 and 8 to 20 us, kernels from 2 to 5 and 12 to 14: 20 us of communication, 15 exposed."""
    from validation.real import gpu

    spans = [(True, 0.0, 10.0), (True, 8.0, 20.0), (False, 2.0, 5.0), (False, 12.0, 14.0)]
    found = gpu.exposed(spans)
    assert found == pytest.approx({"communication_s": 20e-6, "exposed_communication_s": 15e-6})


def test_a_run_of_gpus_has_the_fullest_rank_and_the_slowest_steps() -> None:
    from validation.real import measure

    def rank(allocated: int, reserved: int, times: list[float]) -> dict[str, Any]:
        memory = {"peak_allocated_bytes": allocated, "peak_reserved_bytes": reserved, "device_bytes": reserved + 5}
        exact = {"setup": 0, "states": {}, "marks": [("end", 0, 1, 2)], "collectives": [("all_reduce", 8, 2)] * 3}
        return exact | {"device": {"memory": memory, "step_times_s": times}}

    found = measure.row("run", {}, [rank(10, 30, [1.0, 2.0, 9.0]), rank(20, 25, [3.0, 1.0, 8.0])])
    assert found["measured"] == {
        "peak_allocated_bytes": 20, "peak_reserved_bytes": 30, "peak_device_bytes": 35, "step_time_s": 3.0
    }  # fmt: skip
    assert found["exact"]["ranks"][0]["collectives"] == [
        {"kind": "all_reduce", "ranks": 2, "count": 3, "tensor_bytes": 24}
    ]


def test_what_it_does_not_train_is_said_before_a_rank_starts(tmp_path: Path) -> None:
    lion = tmp_path / "lion.yaml"
    lion.write_text(yaml.safe_dump(scenario("ddp", 2, LLAMA, optimizer="lion")))
    done = subprocess.run(
        [sys.executable, "-m", "validation.real.measure", str(lion), str(tmp_path / "none.yaml"), "--fake-world", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "does not train optimizer lion, DDP under --fake-world" in done.stderr
    assert "none.yaml: no such file" in done.stderr
    assert "Traceback" not in done.stderr
