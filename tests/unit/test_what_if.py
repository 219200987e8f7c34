"""Changes are tried by simulation; the largest batch fits, the next one does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.errors import ScenarioError
from sim.pipeline import simulate
from sim.scenario.load import load_scenario
from sim.what_if import check_changes, largest, what_if

TEXT = """
model: {num_hidden_layers: 4, hidden_size: 1024, intermediate_size: 4096, num_attention_heads: 8, vocab_size: 32000}
cluster: {node: dgx-h100, num_gpus: 2, gpu: {memory: 8 GiB}}
framework: fsdp2
training: {sequence_length: 512, micro_batch_size: 1, global_batch_size: 2, precision: bf16}
"""


def test_answers_are_those_of_the_changed_scenario(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(TEXT)
    simulation = simulate(load_scenario(file, ()))
    recomputed, nonsense = what_if(file, (), ["training.recompute=full", "training.recompute=half"], simulation, print)
    changed = simulate(load_scenario(file, ["training.recompute=full"])).report
    assert recomputed.peak_allocated_bytes == changed.fullest.peak_allocated_bytes
    assert recomputed.to_dict()["set"] == ["training.recompute=full"]
    assert "problem" in nonsense.to_dict()


def test_the_largest_fits_and_the_next_does_not(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(TEXT)
    simulation = simulate(load_scenario(file, ()))
    fits, too_large = largest(file, (), "micro_batch_size", simulation, print)
    sizes = [int(answer.overrides[0].partition("=")[2]) for answer in (fits, too_large)]
    assert fits.fits
    assert not too_large.fits
    assert sizes[1] == sizes[0] + 1


def test_changes_that_are_no_scenario_are_all_said_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(TEXT)
    check_changes(file, (), ["training.recompute=full"])
    with pytest.raises(ScenarioError) as wrong:
        check_changes(file, (), ["training.recomput=full", "training.recompute=full", "parallelism.tp=3"])
    said = [str(finding) for finding in wrong.value.findings]
    assert said[-1].startswith("--what-if 'training.recomput=full': unknown key training.recomput\n")
    assert all(text.startswith("--what-if 'parallelism.tp=3': ") for text in said[:-1])
    assert len(said) > 1
    assert all(finding.remedy for finding in wrong.value.findings)
