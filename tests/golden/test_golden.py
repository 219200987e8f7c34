"""Nothing moves unnoticed: the whole answer to every scenario of the library.

``pytest tests/golden --update`` writes today's answers; the diff is reviewed and named in CHANGELOG.md.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sim.ir.footprint import CATEGORIES
from sim.pipeline import simulate
from sim.scenario.load import load_scenario

ROOT = Path(__file__).parents[2]
SCENARIOS = sorted((ROOT / "scenarios").glob("*.yaml"))
PARTS = ("compute_s", "exposed_communication_s", "bubble_s", "optimizer_s", "other_s")


@pytest.fixture(autouse=True)
def _as_the_command_line_runs_it() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_answer_is_the_one_that_was_reviewed(path, update):
    report = simulate(load_scenario(path)).report
    answer = json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n"
    golden = Path(__file__).parent / f"{path.stem}.json"
    if update:
        golden.write_text(answer, encoding="utf-8")
    assert answer == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_parts_add_up_exactly(path):
    answer = json.loads((Path(__file__).parent / f"{path.stem}.json").read_text(encoding="utf-8"))
    step = answer["step"]
    assert sum(step[part] for part in PARTS) == step["time_s"]
    assert sum(ticks for part, ticks in step["ticks"].items() if part != "time") == step["ticks"]["time"]
    for rank in answer["memory"]["ranks"]:
        assert tuple(rank["at_peak"]) == CATEGORIES
        assert sum(rank["at_peak"].values()) == rank["peak_allocated_bytes"]
        beside = rank["beside"]
        assert rank["peak_allocated_bytes"] + beside["fragmentation"] == rank["peak_reserved_bytes"]
        assert rank["peak_allocated_bytes"] + sum(beside.values()) == rank["peak_device_bytes"]
    assert sum(rank["num_ranks"] for rank in answer["memory"]["ranks"]) == answer["world_size"]
