"""Hugging Face accelerate's configuration, a YAML file, to a scenario's keys.

Names: accelerate/utils/dataclasses.py (FullyShardedDataParallelPlugin, DeepSpeedPlugin, MegatronLMPlugin) and
accelerate/commands/config. The batch, the sequence and the model stand in the training script, so they are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sim.interop.imported import Imported
from sim.interop.values import Problem, show

_STRATEGIES = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD",
               "5": "_HYBRID_SHARD_ZERO2", "HYBRID_SHARD_ZERO2": "_HYBRID_SHARD_ZERO2"}  # fmt: skip
_PREFETCH = {"NO_PREFETCH": "NONE", "1": "BACKWARD_PRE", "2": "BACKWARD_POST"}


def read_accelerate(config: Mapping[str, Any]) -> Imported:
    """Return what of a scenario an accelerate configuration says."""
    said = Imported()
    kind = str(config.get("distributed_type", "NO"))
    processes = config.get("num_processes")
    if isinstance(processes, int):
        said.say("cluster.num_gpus", processes, "num_processes")
    precision = str(config.get("mixed_precision", "no"))
    names = {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "fp8"}
    if precision in names:
        said.say("training.precision", names[precision], "mixed_precision")
    if _mapping(config, "dynamo_config") and str(
        _mapping(config, "dynamo_config").get("dynamo_backend")
    ).lower() not in (
        "no",
        "none",
    ):
        said.say("training.compile", True, "dynamo_config")
    if kind != "MEGATRON_LM":
        said.say("training.code", "huggingface", "accelerate trains transformers' models")
        said.say("training.attention", "sdpa", "transformers' default")
    if kind == "FSDP":
        _fsdp(said, _mapping(config, "fsdp_config"))
    elif kind == "DEEPSPEED":
        _deepspeed(said, _mapping(config, "deepspeed_config"))
    elif kind == "MEGATRON_LM":
        _megatron(said, _mapping(config, "megatron_lm_config"))
    elif kind in ("MULTI_GPU", "NO"):
        said.say("framework", "ddp", f"distributed_type {kind}")
    else:
        said.problems.append(
            Problem(
                ("distributed_type",),
                f"distributed_type {show(kind)} is not one that sim knows",
                "FSDP, DEEPSPEED, MEGATRON_LM and MULTI_GPU are read",
            )
        )
    return said


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _fsdp(said: Imported, given: Mapping[str, Any]) -> None:
    version = 2 if str(given.get("fsdp_version", 1)) == "2" else 1
    section = f"fsdp{version}"
    said.say("framework", section, "distributed_type FSDP")
    recompute = given.get("fsdp_activation_checkpointing") is True
    said.say("training.recompute", "full" if recompute else "none", "fsdp_activation_checkpointing")
    offload = given.get("fsdp_offload_params") is True
    if offload:
        said.say(f"{section}.cpu_offload", True, "fsdp_offload_params")
    strategy = str(given.get("fsdp_sharding_strategy", "FULL_SHARD"))
    strategy = _STRATEGIES.get(strategy, strategy)
    if version == 2:
        reshard = given.get("fsdp_reshard_after_forward", True)
        said.say("parallelism.zero", 3 if reshard not in (False, "false", "SHARD_GRAD_OP") else 2,
                 "fsdp_reshard_after_forward")  # fmt: skip
        return
    said.say("parallelism.zero", {"FULL_SHARD": 3, "HYBRID_SHARD": 3, "NO_SHARD": 0}.get(strategy, 2),
             "fsdp_sharding_strategy")  # fmt: skip
    said.say("fsdp1.sharding_strategy", strategy, "fsdp_sharding_strategy")
    if prefetch := given.get("fsdp_backward_prefetch"):
        said.say("fsdp1.backward_prefetch", _PREFETCH.get(str(prefetch), str(prefetch)), "fsdp_backward_prefetch")
    for theirs, ours in (("fsdp_forward_prefetch", "forward_prefetch"), ("fsdp_use_orig_params", "use_orig_params"),
                         ("fsdp_limit_all_gathers", "limit_all_gathers")):  # fmt: skip
        if isinstance(value := given.get(theirs), bool):
            said.say(f"fsdp1.{ours}", value, theirs)


def _deepspeed(said: Imported, given: Mapping[str, Any]) -> None:
    said.say("framework", "deepspeed", "distributed_type DEEPSPEED")
    # _validate_launch_command of accelerate/commands/launch.py
    said.say("training.cpu_threads", 1, "accelerate launch sets OMP_NUM_THREADS=1")
    if path := given.get("deepspeed_config_file"):
        said.say("deepspeed", str(path), "deepspeed_config_file")
        return
    stage = given.get("zero_stage", 2)
    zero: dict[str, Any] = {"stage": stage}
    for device in ("optimizer", "param"):
        where = given.get(f"offload_{device}_device")
        if where in ("cpu", "nvme"):
            zero[f"offload_{device}"] = {"device": where}
    said.say("parallelism.zero", stage, "zero_stage")
    settings: dict[str, Any] = {"zero_optimization": zero}
    if isinstance(clip := given.get("gradient_clipping"), int | float):
        settings["gradient_clipping"] = float(clip)
    said.say("deepspeed", settings, "deepspeed_config")
    if isinstance(steps := given.get("gradient_accumulation_steps"), int) and steps > 1:
        said.notes.append(
            f"gradient_accumulation_steps {steps}: global_batch_size is to be {steps} x micro_batch_size x ranks"
        )


def _megatron(said: Imported, given: Mapping[str, Any]) -> None:
    said.say("framework", "megatron", "distributed_type MEGATRON_LM")
    for theirs, ours in (("megatron_lm_tp_degree", "tp"), ("megatron_lm_pp_degree", "pp")):
        if isinstance(value := given.get(theirs), int):
            said.say(f"parallelism.{ours}", value, theirs)
    if given.get("megatron_lm_sequence_parallelism") is True:
        said.say("parallelism.sp", True, "megatron_lm_sequence_parallelism")
    if given.get("megatron_lm_use_distributed_optimizer") is True:
        said.say("parallelism.zero", 1, "megatron_lm_use_distributed_optimizer")
    if given.get("megatron_lm_recompute_activations") is True:
        said.say("training.recompute", "selective", "megatron_lm_recompute_activations")
    if isinstance(clip := given.get("megatron_lm_gradient_clipping"), int | float):
        said.say("training.gradient_clipping", float(clip), "megatron_lm_gradient_clipping")
    if isinstance(many := given.get("megatron_lm_num_micro_batches"), int) and many > 1:
        said.notes.append(
            f"megatron_lm_num_micro_batches {many}: global_batch_size is to be {many} x micro_batch_size x dp"
        )
