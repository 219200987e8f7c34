"""Settings of FSDP that do not fit each other are refused, each with what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.errors import ScenarioError
from sim.parallel.precision import Dtypes, dtypes_of
from sim.scenario.load import load_scenario

TEXT = """
model: llama-3-8b
cluster: {{node: dgx-h100, num_nodes: 2}}
framework: {framework}
{framework}: {settings}
training: {{sequence_length: 8192, micro_batch_size: 1, global_batch_size: 32, precision: bf16}}
"""


def written(folder: Path, framework: str, settings: str) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(TEXT.format(framework=framework, settings=settings))
    return path


@pytest.mark.parametrize(
    ("framework", "settings", "words"),
    [
        ("fsdp2", "{shard_size: 5}", "fsdp2.shard_size = 5 does not divide dp 16"),
        ("fsdp2", "{reshard_after_forward: 16}", "is no part of a shard group of 16 ranks"),
        ("fsdp2", "{shard_size: 4, reshard_after_forward: 3}", "is no part of a shard group of 4 ranks"),
        ("fsdp2", "{reshard_after_forward: 1}", "1 is neither true, false nor a number of ranks"),
        ("fsdp2", "{param_dtype: fp64}", "'fp64' is not a dtype"),
        ("fsdp1", "{shard_size: 8}", "but FULL_SHARD shards over all data-parallel ranks"),
        ("fsdp1", "{sharding_strategy: ZERO3}", "'ZERO3' is not a sharding strategy"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, framework: str, settings: str, words: str) -> None:
    with pytest.raises(ScenarioError) as refused:
        load_scenario(written(tmp_path, framework, settings), ())
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("framework", "settings", "dtypes"),
    [
        ("fsdp2", "{}", Dtypes("bf16", "bf16", False)),
        ("fsdp2", "{param_dtype: fp32}", Dtypes("fp32", "bf16", True)),
        ("fsdp1", "{mixed_precision: PURE}", Dtypes("bf16", "bf16", False)),
        ("fsdp1", "{mixed_precision: FULL}", Dtypes("fp32", "bf16", True)),
    ],
)
def test_the_passes_read_the_gathered_dtype(tmp_path: Path, framework: str, settings: str, dtypes: Dtypes) -> None:
    scenario = load_scenario(written(tmp_path, framework, settings), (), simulate=False)
    assert dtypes_of(scenario) == dtypes


@pytest.mark.parametrize(
    ("framework", "code", "recompute"),
    [
        ("fsdp2", "torch", "selective-op"),
        ("fsdp1", "torch", "selective-op"),
        ("fsdp2", "megatron", "selective"),
        ("fsdp2", "huggingface", "selective"),
    ],
)
def test_selective_is_by_op_for_plain_torch_modules(tmp_path: Path, framework: str, code: str, recompute: str) -> None:
    path = written(tmp_path, framework, "{}")
    path.write_text(path.read_text().replace("precision: bf16", f"code: {code}, recompute: selective"))
    scenario = load_scenario(path)
    assert scenario.training.recompute == recompute
    assert any("taken as selective-op" in warning for warning in scenario.warnings) == (recompute == "selective-op")


def test_a_compiled_models_loss_is_eager(tmp_path: Path) -> None:
    path = written(tmp_path, "fsdp2", "{}")
    path.write_text(path.read_text().replace("precision: bf16", "compile: true"))
    assert load_scenario(path).training.loss == "eager"
