"""torchtitan's job configuration, a TOML file, to a scenario's keys.

Names and defaults: torchtitan/config/job_config.py; older names of the same settings (``training.batch_size``,
``training.tensor_parallel_degree``) are read too.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from sim.interop.imported import Imported
from sim.interop.values import Problem

_MODELS = {
    ("llama3", "8B"): "llama-3.1-8b", ("llama3", "70B"): "llama-3.1-70b", ("llama3", "405B"): "llama-3.1-405b",
    ("llama2", "7B"): "llama-2-7b", ("llama2", "13B"): "llama-2-13b", ("llama2", "70B"): "llama-2-70b",
}  # fmt: skip
"""Flavors with the sizes of a published model (torchtitan/models/llama3/__init__.py)."""
_SCHEDULES = {"1f1b": "1f1b", "gpipe": "gpipe", "interleaved1f1b": "interleaved", "zbvzerobubble": "zb-v",
              "dualpipev": "dualpipev"}  # fmt: skip
_READ_SECTIONS = (
    "model", "training", "parallelism", "experimental", "activation_checkpoint", "compile", "optimizer", "quantize",
    "float8", "activation_checkpointing",
)  # fmt: skip
_SILENT_SECTIONS = (
    "job", "profiling", "metrics", "lr_scheduler", "checkpoint", "comm", "memory_estimation", "validation",
    "fault_tolerance", "debug", "mx",
)  # fmt: skip


_READ_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("name", "flavor", "converters"),
    "training": (
        "seq_len", "local_batch_size", "batch_size", "global_batch_size", "max_norm", "mixed_precision_param",
        "compile", "enable_cpu_offload", "enable_float8_linear", "enable_fp8_linear",
    ),
    "activation_checkpoint": ("mode", "selective_ac_option"),
    "compile": ("enable", "components"),
    "optimizer": ("name", "implementation", "fused"),
    "float8": ("enable_float8_linear", "recipe_name", "enable_fsdp_float8_all_gather"),
}  # fmt: skip
_DEGREES = (
    "data_parallel_shard_degree", "data_parallel_degree", "data_parallel_replicate_degree", "tensor_parallel_degree",
    "pipeline_parallel_degree", "context_parallel_degree", "expert_parallel_degree", "fsdp_reshard_after_forward",
    "enable_cpu_offload", "enable_async_tensor_parallel", "pipeline_parallel_schedule",
    "pipeline_parallel_microbatch_size",
)  # fmt: skip
"""Read from any of ``_DEGREES_IN``, where they have stood."""
_DEGREES_IN = ("training", "parallelism", "experimental")
_SILENT_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("tokenizer_path", "hf_assets_path", "norm_type", "print_after_conversion"),
    "training": (
        "dataset", "dataset_path", "steps", "warmup_steps", "seed", "deterministic", "gc_freq", "gc_debug",
        "debug_moe_force_load_balance", "data_parallel_type",
    ),
    "experimental": ("custom_import", "custom_args_module"),
    "activation_checkpoint": ("visualize_memory_budget_pareto", "preserve_rng_state", "determinism_check", "debug"),
    "optimizer": ("lr", "beta1", "beta2", "eps", "weight_decay"),
    "float8": ("emulate",),
}  # fmt: skip
"""Keys that change neither time nor memory, or what sim has no other way for."""
_AS_TAKEN: dict[tuple[str, str], object] = {
    ("training", "mixed_precision_reduce"): "float32", ("parallelism", "disable_loss_parallel"): False,
    ("parallelism", "enable_compiled_autograd"): False, ("optimizer", "early_step_in_backward"): False,
    ("parallelism", "expert_tensor_parallel_degree"): 1, ("activation_checkpoint", "early_stop"): False,
    ("parallelism", "context_parallel_rotate_method"): "allgather",
}  # fmt: skip
"""Keys that are not read, with torchtitan's default: the scenario is as if they were not said."""


def _unread(config: Mapping[str, Any]) -> list[str]:
    """Return sections and keys that sim does not know, or cannot say in a scenario, as the file has them."""
    found = []
    for name, section in config.items():
        if name not in _READ_SECTIONS:
            found += [f"[{name}]"] if name not in _SILENT_SECTIONS else []
            continue
        if name in ("quantize", "activation_checkpointing") or not isinstance(section, Mapping):
            continue
        known = (*_READ_KEYS.get(name, ()), *_SILENT_KEYS.get(name, ()), *(_DEGREES if name in _DEGREES_IN else ()))
        for key, value in section.items():
            if key not in known and _AS_TAKEN.get((name, key), _unread) != value:
                found.append(f"{name}.{key}")
    return found


def read_torchtitan(text: str) -> Imported:
    """Return the scenario of a torchtitan job."""
    said = Imported()
    try:
        config: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said.problems.append(Problem((), f"is not TOML: {error}", "name the job's .toml file"))
        return said
    if "model" not in config and "training" not in config:
        said.problems.append(Problem((), "has neither [model] nor [training]", "name a torchtitan job's .toml file"))
        return said
    said.say("framework", "fsdp2", "torchtitan's data parallelism")
    _model(said, _section(config, "model"))
    _parallelism(said, {**_section(config, "experimental"), **_section(config, "training"),
                        **_section(config, "parallelism")})  # fmt: skip
    _training(said, config)
    said.unread += _unread(config)
    return said


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _model(said: Imported, model: Mapping[str, Any]) -> None:
    name, flavor = str(model.get("name", "llama3")), str(model.get("flavor", "debugmodel"))
    if known := _MODELS.get((name, flavor)):
        said.say("model", known, f"model.name {name}, flavor {flavor}")
        return
    said.problems.append(
        Problem(
            ("model",),
            f"the sizes of {name} {flavor} stand in torchtitan's code, not in the job's file",
            "say the model: --set model=llama-3.1-8b, or the path of a config.json",
        )
    )


def _parallelism(said: Imported, given: Mapping[str, Any]) -> None:
    def degree(*names: str) -> int:
        for name in names:
            if isinstance(value := given.get(name), int):
                return value
        return 1

    names = ("data_parallel_shard_degree", "data_parallel_degree")  # the second before HSDP, in 2024
    name = next((name for name in names if name in given), names[0])
    shard = degree(name) if name in given else -1
    replicas = degree("data_parallel_replicate_degree")
    for axis, keys in (
        ("tp", ("tensor_parallel_degree",)),
        ("pp", ("pipeline_parallel_degree",)),
        ("cp", ("context_parallel_degree",)),
        ("ep", ("expert_parallel_degree",)),
    ):
        if (size := degree(*keys)) > 1:
            said.say(f"parallelism.{axis}", size, keys[0])
    if shard > 0:
        said.say("parallelism.dp", shard * replicas, f"{name} x data_parallel_replicate_degree")
    said.say("parallelism.zero", 3, "torchtitan shards with fully_shard")
    if replicas > 1 and shard > 0:
        said.say("fsdp2.shard_size", shard, "data_parallel_shard_degree")
    elif replicas > 1:
        said.notes.append(
            f"data_parallel_replicate_degree {replicas}: add fsdp2.shard_size, the ranks that hold one copy"
        )
    if degree("tensor_parallel_degree") > 1:
        said.say("parallelism.sp", True, "torchtitan's tensor parallel plan")
    if degree("pipeline_parallel_degree") > 1:
        _pipeline(said, given)
    policy = given.get("fsdp_reshard_after_forward", "default")
    if policy in ("always", "never"):
        said.say("fsdp2.reshard_after_forward", policy == "always", "fsdp_reshard_after_forward")
    if given.get("enable_cpu_offload") is True:
        said.say("fsdp2.cpu_offload", True, "enable_cpu_offload")
    if given.get("enable_async_tensor_parallel") is True:
        said.say("fsdp2.async_tensor_parallel", degree("tensor_parallel_degree") > 1, "enable_async_tensor_parallel")
    said.say("fsdp2.wrap", "torchtitan", "torchtitan's apply_fsdp")


def _pipeline(said: Imported, given: Mapping[str, Any]) -> None:
    schedule = str(given.get("pipeline_parallel_schedule", "1F1B"))
    ours = _SCHEDULES.get(schedule.lower())
    if ours is None:
        said.notes.append(f"pipeline_parallel_schedule {schedule}: taken as 1f1b")
    said.say("parallelism.schedule", ours or "1f1b", "pipeline_parallel_schedule")
    if isinstance(size := given.get("pipeline_parallel_microbatch_size"), int):
        said.say("training.micro_batch_size", size, "pipeline_parallel_microbatch_size")


def _training(said: Imported, config: Mapping[str, Any]) -> None:
    training = _section(config, "training")
    length = training.get("seq_len", 2048)
    said.say(
        "training.sequence_length", length, "training.seq_len" if "seq_len" in training else "torchtitan's default"
    )
    local = training.get("local_batch_size", training.get("batch_size", 8))
    if not said.has("training.micro_batch_size"):
        said.say("training.micro_batch_size", local, "training.local_batch_size")
    batch = training.get("global_batch_size")
    if isinstance(batch, int) and batch > 0:
        said.say("training.global_batch_size", batch, "training.global_batch_size")
    if _float8(config):
        said.say("training.precision", "fp8", "model.converters float8")
        _float8_settings(said, config)
    elif {"mx", "quantize.linear.mx"} & set(_converters(config)):
        said.say("training.precision", "mxfp8", "model.converters mx")
    else:
        dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(str(training.get("mixed_precision_param")), "bf16")
        said.say("training.precision", dtype, "training.mixed_precision_param")
    checkpoint = _section(config, "activation_checkpoint")
    mode, option = checkpoint.get("mode", "selective"), str(checkpoint.get("selective_ac_option", "2"))
    by_layer = mode == "selective" and option.isdigit()
    recompute = {"none": "none", "full": "full", "selective": "selective-op"}.get(str(mode), "none")
    said.say("training.recompute", "full" if by_layer else recompute, "activation_checkpoint.mode")
    if by_layer:
        said.say("training.recompute_interval", int(option), "activation_checkpoint.selective_ac_option")
    compiled = _section(config, "compile").get("enable", training.get("compile", False)) is True
    if compiled:
        said.say("training.compile", True, "compile.enable")
        # training.compile, of 2024, compiled the blocks alone
        parts = _section(config, "compile").get("components", ["model", "loss"] if "compile" in config else ["model"])
        if isinstance(parts, list) and "loss" in parts:
            said.say("training.loss", "compiled", "compile.components")
    optimizer = _section(config, "optimizer")
    if (name := str(optimizer.get("name", "AdamW"))) not in ("Adam", "AdamW"):
        said.notes.append(f"optimizer {name}: taken as AdamW")
    said.say("training.optimizer", "adam" if name == "Adam" else "adamw", "optimizer.name")
    implementation = optimizer.get("implementation", "foreach" if optimizer.get("fused") is False else "fused")
    if implementation in ("fused", "foreach", "for-loop"):
        said.say("fsdp2.optimizer_implementation", implementation, "optimizer.implementation")
    norm = training.get("max_norm", 1.0)
    said.say("training.gradient_clipping", norm, "training.max_norm")
    said.say("training.attention", "sdpa", "torchtitan's attention")


def _converters(config: Mapping[str, Any]) -> list[str]:
    found = _section(config, "model").get("converters", [])
    if isinstance(found, str):
        found = found.split(",")
    return [str(name) for name in found] if isinstance(found, list) else []


def _float8(config: Mapping[str, Any]) -> bool:
    """Whether linears are torchao's: by a converter; in 2024 by a switch. The settings' section alone is not enough."""
    switches = ("enable_float8_linear", "enable_fp8_linear")
    said = any(_section(config, name).get(switch) is True for name in ("float8", "training") for switch in switches)
    return said or bool({"float8", "quantize.linear.float8"} & set(_converters(config)))


def _float8_settings(said: Imported, config: Mapping[str, Any]) -> None:
    found = {**_section(config, "float8"), **_section(_section(_section(config, "quantize"), "linear"), "float8")}
    recipe = found.get("recipe_name")
    if recipe in ("tensorwise", "rowwise"):
        said.say("fsdp2.float8_recipe", recipe, "float8.recipe_name")
    elif recipe is not None:
        said.say("fsdp2.float8_recipe", "rowwise", f"float8.recipe_name {recipe}")
        said.notes.append(f"float8.recipe_name {recipe}: taken as rowwise")
    if found.get("enable_fsdp_float8_all_gather") is True and recipe in (None, "tensorwise"):
        said.say("fsdp2.float8_all_gather", True, "float8.enable_fsdp_float8_all_gather")
