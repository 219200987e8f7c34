"""ds_config.json as found in the wild: what it says, what DeepSpeed adds, what is not modelled."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from sim.interop.deepspeed_config import (
    DeepSpeedReading,
    DeepSpeedSettings,
    read_deepspeed_config,
    settings_of,
    write_deepspeed_config,
)
from sim.interop.values import Problem


def read(config: dict[str, Any], hidden: int | None = None) -> DeepSpeedReading:
    problems: list[Problem] = []
    reading = read_deepspeed_config(config, (), problems, hidden)
    assert problems == []
    return reading


def mistakes(config: dict[str, Any]) -> list[str]:
    problems: list[Problem] = []
    read_deepspeed_config(config, (), problems)
    return [problem.problem for problem in problems]


def test_an_empty_config_is_deepspeeds_defaults() -> None:
    assert settings_of(read({}), 0, 1.0) == DeepSpeedSettings()  # it clips gradients to norm 1 unless told not to


@pytest.mark.parametrize(("stage", "overlap"), [(0, False), (1, False), (2, False), (3, True)])
def test_overlap_comm_is_on_by_default_for_stage_3_alone(stage: int, overlap: bool) -> None:
    assert settings_of(None, stage, 0.0).overlap_comm is overlap


def test_the_example_of_hugging_faces_documentation() -> None:
    config = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    reading = read(config, hidden=1000)
    assert reading.warnings == []
    assert (reading.precision, reading.precision_given, reading.optimizer) == (None, True, "adamw")
    assert (reading.train_batch_size, reading.micro_batch_size, reading.gradient_clipping) == (None, None, None)
    assert reading.fields["reduce_bucket_size"] == 1000 * 1000
    assert reading.fields["prefetch_bucket_size"] == 900_000
    assert reading.fields["param_persistence_threshold"] == 10 * 1000
    assert set(reading.sources) == {"reduce_bucket_size", "prefetch_bucket_size", "param_persistence_threshold"}
    assert reading.fields["sub_group_size"] == 10**9


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "fp16"),
        ({"fp16": {"enabled": False}}, "fp32"),
        ({}, "fp32"),
        ({"bf16": {"enabled": "auto"}}, None),
    ],
)
def test_precision(config: dict[str, Any], precision: str | None) -> None:
    assert read(config).precision == precision


def test_old_forms() -> None:
    assert read({"zero_optimization": True}).fields["stage"] == 1
    assert read({"zero_optimization": {"stage": 2, "cpu_offload": True}}).fields["offload_optimizer"] == "cpu"
    assert read({"zero_optimization": {"prefetch_bucket_size": 5}}).fields["prefetch_bucket_size"] == 5


def test_offload() -> None:
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "pin_memory": False},
        "offload_param": {"device": "none"},
    }
    fields = read({"zero_optimization": zero}).fields
    assert (fields["offload_optimizer"], fields["offload_param"], fields["pin_memory"]) == ("nvme", "none", False)
    part = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}, "offload_param": {"pin_memory": False}}
    settings = settings_of(read({"zero_optimization": part}), 3, 1.0)
    assert (settings.offload_ratio, settings.pin_memory, settings.offload_param_pin_memory) == (0.3, True, False)
    assert mistakes({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 2}}}) == [
        "zero_optimization.offload_optimizer.ratio: 2 is out of range"
    ]


def test_what_is_not_modelled_says_what_it_would_do() -> None:
    warnings = read(
        {"zero_optimization": {"stage": 3, "mics_shard_size": 8, "mics_hierarchical_params_gather": False},
         "amp": {"enabled": False}, "bf16": {"enabled": True, "bf16_optimizer_states": True},
         "activation_checkpointing": {"cpu_checkpointing": True, "profile": True, "partition_activation": True}}
    ).warnings  # fmt: skip
    assert warnings == [
        "activation_checkpointing.profile is not modelled: the host would wait around each checkpoint",
        "DeepSpeed has no key activation_checkpointing.partition_activation; did you mean partition_activations?",
        "bf16.bf16_optimizer_states is not modelled: Adam's moments would take half the memory",
        "zero_optimization.mics_shard_size is not modelled: DeepSpeed has removed MiCS; zero_hpz_partition_size keeps "
        "gathers inside the node",
    ]


def test_settings_of_checkpoints_are_read_and_written() -> None:
    given = {"cpu_checkpointing": True, "number_checkpoints": None, "profile": False}
    reading = read({"activation_checkpointing": given})
    assert (reading.fields, reading.warnings) == ({"cpu_checkpointing": True}, [])
    settings = settings_of(reading, 3, 1.0)
    assert write_deepspeed_config(settings)["activation_checkpointing"] == {"cpu_checkpointing": True}
    assert mistakes({"activation_checkpointing": {"number_checkpoints": 0}}) == [
        "activation_checkpointing.number_checkpoints: 0 is too small"
    ]


def test_an_unknown_key_is_a_warning_with_its_neighbour() -> None:
    assert read({"gradient_cliping": 1.0, "zero_optimization": {"stage3_max_live_params": 1}}).warnings == [
        "DeepSpeed has no key zero_optimization.stage3_max_live_params; did you mean stage3_max_live_parameters?",
        "DeepSpeed has no key gradient_cliping; did you mean gradient_clipping?",
    ]


def test_one_mistake_one_problem() -> None:
    assert mistakes({"fp16": {"enabled": True}, "bf16": {"enabled": True}}) == ["bf16 and fp16 are both enabled"]
    assert mistakes({"zero_optimization": {"stage": 4}}) == ["zero_optimization.stage: 4 is out of range"]
    assert mistakes({"optimizer": {"type": "OneBitAdam"}}) == [
        "optimizer.type: 'OneBitAdam' is not an optimizer that sim knows"
    ]


def test_what_is_written_reads_back() -> None:
    settings = DeepSpeedSettings(
        stage=3, overlap_comm=False, reduce_bucket_size=7, prefetch_bucket_size=8, param_persistence_threshold=9,
        offload_optimizer="cpu", pin_memory=False, offload_ratio=0.25, grad_accum_dtype="fp32",
        communication_data_type="bf16", gradient_clipping=0.5,
    )  # fmt: skip
    reading = read(write_deepspeed_config(settings))
    assert settings_of(reading, 3, 0.5) == settings


@pytest.mark.real
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_defaults_are_deepspeeds_own(stage: int) -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    theirs = zero.DeepSpeedZeroConfig(stage=stage)
    ours = asdict(settings_of(read({"zero_optimization": {"stage": stage}}), stage, 0.0))
    elsewhere = {
        "offload_optimizer", "offload_param", "pin_memory", "offload_ratio", "offload_param_pin_memory",
        "grad_accum_dtype", "communication_data_type", "gradient_clipping",
    }  # fmt: skip
    checkpointing = pytest.importorskip("deepspeed.runtime.activation_checkpointing.config").ACT_CHKPT_DEFAULT
    timer = pytest.importorskip("deepspeed.utils.config").DeepSpeedThroughputTimerConfig()
    known = checkpointing | {"throughput_timer_waits": timer.enabled and timer.synchronized}
    for name in ours.keys() - elsewhere:
        assert ours[name] == (known[name] if name in known else getattr(theirs, name)), name
    constants = pytest.importorskip("deepspeed.runtime.constants")
    assert DeepSpeedSettings().gradient_clipping == constants.GRADIENT_CLIPPING_DEFAULT
