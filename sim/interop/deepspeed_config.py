"""DeepSpeed's ``ds_config.json``, as it is found in the wild."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sim.interop.values import (
    Key,
    Path,
    Problem,
    WrongValueError,
    boolean,
    dotted,
    integer,
    number,
    show,
    suggest,
)


@dataclass(frozen=True, slots=True)
class DeepSpeedSettings:
    """What of a ds_config changes memory or time. Defaults are DeepSpeed's own; sizes in elements unless said.

    Source of defaults: deepspeed/runtime/zero/config.py and offload_config.py of DeepSpeed 0.19.8.
    """

    stage: int = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    round_robin_gradients: bool = False
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int = 2**63 - 1
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    memory_efficient_linear: bool = True
    offload_optimizer: str = "none"
    """none | cpu | nvme"""
    offload_param: str = "none"
    pin_memory: bool = True
    """Of offload_optimizer: its host memory is page-locked."""
    offload_ratio: float = 1.0
    """Share of the sub groups whose states are on the CPU; the others are stepped on the GPU (Twin-Flow)."""
    offload_param_pin_memory: bool = True
    zero_hpz_partition_size: int = 1
    """ZeRO++: ranks that share a secondary partition of the parameters."""
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False
    grad_accum_dtype: str | None = None
    communication_data_type: str | None = None
    gradient_clipping: float = 1.0
    """Largest norm; 0 is no clipping. DeepSpeed clips unless told not to (deepspeed/runtime/constants.py)."""
    partition_activations: bool = False
    """Of ``activation_checkpointing``: inputs of checkpoints are kept in parts on the tensor-parallel ranks."""
    cpu_checkpointing: bool = False
    contiguous_memory_optimization: bool = False
    number_checkpoints: int | None = None
    synchronize_checkpoint_boundary: bool = False
    throughput_timer_waits: bool = True
    """The host waits for the GPU before each forward (``timers.throughput``: ``enabled`` and ``synchronized``)."""


Keys = dict[str, Any]

_SIZE_LIMIT = 2**63 - 1
_ZERO: dict[str, tuple[str, Key]] = {
    "stage": ("stage", integer(0, 3, 0)),
    "contiguous_gradients": ("contiguous_gradients", boolean()),
    "reduce_scatter": ("reduce_scatter", boolean()),
    "reduce_bucket_size": ("reduce_bucket_size", integer(1, _SIZE_LIMIT, 500_000_000)),
    "use_multi_rank_bucket_allreduce": ("use_multi_rank_bucket_allreduce", boolean()),
    "allgather_partitions": ("allgather_partitions", boolean()),
    "allgather_bucket_size": ("allgather_bucket_size", integer(0, _SIZE_LIMIT, 500_000_000)),
    "overlap_comm": ("overlap_comm", boolean()),
    "round_robin_gradients": ("round_robin_gradients", boolean()),
    "stage3_prefetch_bucket_size": ("prefetch_bucket_size", integer(0, _SIZE_LIMIT, 50_000_000)),
    "stage3_param_persistence_threshold": ("param_persistence_threshold", integer(0, _SIZE_LIMIT, 100_000)),
    "stage3_model_persistence_threshold": ("model_persistence_threshold", integer(0, _SIZE_LIMIT, _SIZE_LIMIT)),
    "stage3_max_live_parameters": ("max_live_parameters", integer(0, _SIZE_LIMIT, 1_000_000_000)),
    "stage3_max_reuse_distance": ("max_reuse_distance", integer(0, _SIZE_LIMIT, 1_000_000_000)),
    "sub_group_size": ("sub_group_size", integer(1, _SIZE_LIMIT, 1_000_000_000)),
    "memory_efficient_linear": ("memory_efficient_linear", boolean()),
    "zero_hpz_partition_size": ("zero_hpz_partition_size", integer(1, _SIZE_LIMIT, 8)),
    "zero_quantized_weights": ("zero_quantized_weights", boolean()),
    "zero_quantized_gradients": ("zero_quantized_gradients", boolean()),
}
"""Key of ``zero_optimization`` -> our field and how it is read."""
for _name in ("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold",
              "max_live_parameters", "max_reuse_distance"):  # fmt: skip
    _ZERO[_name] = _ZERO[f"stage3_{_name}"]  # pydantic accepts the field's name beside its alias

_CHECKPOINTS: dict[str, Key] = {
    "partition_activations": boolean(),
    "cpu_checkpointing": boolean(),
    "contiguous_memory_optimization": boolean(),
    "number_checkpoints": integer(1, 10**6, 32),
    "synchronize_checkpoint_boundary": boolean(),
}
"""Keys of ``activation_checkpointing`` (deepspeed/runtime/activation_checkpointing/config.py) and how they are read."""

_ZERO_SILENT = frozenset((
    "load_from_fp32_weights", "elastic_checkpoint", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "gather_16bit_weights_on_model_save", "ignore_unused_parameters",
    "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
    "cpu_offload_use_pin_memory", "save_muon_momentum_buffer_in_memory", "compute_grad_norm",
))  # fmt: skip
_ZERO_NOT_MODELLED = {
    "zero_quantized_nontrainable_weights": (False, "frozen weights would take half the memory"),
    "mics_shard_size": (-1, "DeepSpeed has removed MiCS; zero_hpz_partition_size keeps gathers inside the node"),
    "mics_hierarchical_params_gather": (False, "DeepSpeed has removed MiCS"),
    "stage3_module_granularity_threshold": (0, "small modules would be gathered together"),
    "module_granularity_threshold": (0, "small modules would be gathered together"),
    "stage3_use_all_reduce_for_fetch_params": (False, "parameters would be fetched by all-reduce"),
    "use_all_reduce_for_fetch_params": (False, "parameters would be fetched by all-reduce"),
    "stage3_allgather_sequential": (False, "gathers would run one by one, with less temporary memory"),
    "allgather_sequential": (False, "gathers would run one by one, with less temporary memory"),
    "parameter_alignment": (False, "flat buffers would be a little larger"),
    "legacy_stage1": (False, "stage 1 would run DeepSpeed's old code"),
    "leaf_module": (None, "the modules named would be gathered as one"),
    "zenflow": (None, "the optimizer step would overlap with the next ones"),
}
"""Key -> (its value where it does nothing, what it would change)."""
_ZERO_OFFLOAD = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param")

_SILENT = frozenset((
    "steps_per_print", "wall_clock_breakdown", "dump_state", "scheduler", "tensorboard", "wandb", "comet",
    "csv_monitor", "flops_profiler", "comms_logger", "checkpoint", "memory_breakdown", "log_level",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients", "gradient_predivide_factor",
    "gradient_allreduce_op", "dataloader_drop_last", "disable_python_gc", "autotuning", "elasticity", "aio", "timers",
    "managed_gradient_accumulation", "use_data_before_expert_parallelism", "vocabulary_size", "seed",
    "data_sampling", "nebula", "load_universal_checkpoint", "seq_parallel_communication_data_type",
    "datastates_ckpt", "monitor_config", "train_steps", "checkpoint_config",
))  # fmt: skip
_NOT_MODELLED = {
    "amp": "Apex would keep copies of its own",
    "torch_autocast": "parameters would stay fp32 and be cast where they are used",
    "compression_training": "weights would be quantised or pruned",
    "sparse_attention": "attention would skip blocks",
    "hybrid_engine": "inference kernels would hold memory of their own",
    "compile": "kernels would be fused: training.compile says so here",
    "tensor_parallel": "tensor parallelism is what parallelism.tp says",
    "autotp_size": "tensor parallelism is what parallelism.tp says",
    "expert_parallel": "expert parallelism is what parallelism.ep says",
    "pipeline": "the pipeline is what parallelism.pp says",
    "progressive_layer_drop": "steps would skip layers",
    "eigenvalue": "extra passes would measure curvature",
    "quantize_training": "weights would be quantised",
    "weight_quantization": "weights would be quantised",
    "data_efficiency": "sequences would vary in length",
    "curriculum_learning": "sequences would vary in length",
    "sparse_gradients": "embedding gradients would be reduced as indices and rows",
    "disable_allgather": "updated parameters would be broadcast",
    "sequence_parallel_size": "sequence parallelism is what parallelism.cp says",
    "zenflow": "the optimizer step would overlap with the next ones",
}
_SECTION_NOT_MODELLED = {
    ("fp16", "auto_cast"): "inputs would be cast at the first layer",
    ("fp16", "fp16_master_weights_and_grads"): "master weights and gradients would take half the memory",
    ("bf16", "bf16_master_weights_and_grads"): "master weights and gradients would take half the memory",
    ("bf16", "bf16_optimizer_states"): "Adam's moments would take half the memory",
    ("bf16", "immediate_grad_update"): "fp32 gradients would be updated in backward",
}
_DTYPES = {"fp32": "fp32", "float32": "fp32", "fp16": "fp16", "float16": "fp16", "half": "fp16", "bf16": "bf16",
           "bfloat16": "bf16", "bfp16": "bf16", "float": "fp32"}  # fmt: skip
_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd", "lion": "lion"}

_BATCH = integer(1, 10**7, 1)
_CLIPPING = number(0, 1e9, "1.0")
_RATIO = number(0, 1, "0.5")
_ENABLED = boolean()


@dataclass(slots=True)
class DeepSpeedReading:
    """What a ds_config says. Fields that it leaves out or gives as "auto" are absent or None.

    ``fields``    fields of DeepSpeedSettings that it gives
    ``sources``   fields that ``"auto"`` was filled in for -> how
    ``precision`` bf16, fp16, fp32 (neither is enabled), None ("auto")
    """

    fields: Keys = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    train_batch_size: int | None = None
    micro_batch_size: int | None = None
    accumulation_steps: int | None = None
    precision: str | None = None
    precision_given: bool = False
    optimizer: str | None = None
    gradient_clipping: float | None = None
    warnings: list[str] = field(default_factory=list)


def read_deepspeed_config(
    config: Mapping[str, Any], path: Path, problems: list[Problem], hidden_size: int | None = None
) -> DeepSpeedReading:
    """Read a ds_config. ``path`` is where it stands in its document; mistakes are added to ``problems``.

    ``hidden_size`` fills in the sizes that Hugging Face's Trainer fills in for ``"auto"``.
    """
    reading = DeepSpeedReading()

    def one(at: Path, key: Key, value: object) -> Any:
        if value is None or value == "auto":
            return None
        try:
            return key.read(value)
        except WrongValueError as error:
            problems.append(Problem(at, f"{dotted(at)}: {error.problem}", error.remedy))
            return None

    def section(name: str) -> Mapping[str, Any]:
        value = config.get(name)
        if value is None or isinstance(value, Mapping):
            return value or {}
        problems.append(
            Problem((*path, name), f"{dotted((*path, name))}: {show(value)} is not a mapping", "write {...}")
        )
        return {}

    reading.train_batch_size = one((*path, "train_batch_size"), _BATCH, config.get("train_batch_size"))
    name = "train_micro_batch_size_per_gpu"
    reading.micro_batch_size = one((*path, name), _BATCH, config.get(name))
    name = "gradient_accumulation_steps"
    reading.accumulation_steps = one((*path, name), _BATCH, config.get(name))
    name = "gradient_clipping"
    reading.gradient_clipping = one((*path, name), _CLIPPING, config.get(name))

    _read_timers(section("timers").get("throughput"), (*path, "timers", "throughput"), reading, one)
    _read_checkpoints(section("activation_checkpointing"), (*path, "activation_checkpointing"), reading, one)
    _read_precision(config, path, problems, reading, one, section)
    _read_optimizer(section("optimizer"), (*path, "optimizer"), problems, reading)
    data_types = section("data_types")
    for given, ours, at in (
        (data_types.get("grad_accum_dtype"), "grad_accum_dtype", (*path, "data_types", "grad_accum_dtype")),
        (config.get("communication_data_type"), "communication_data_type", (*path, "communication_data_type")),
    ):
        if given is None or given == "auto":
            continue
        if not isinstance(given, str) or given.lower() not in _DTYPES:
            problems.append(Problem(at, f"{dotted(at)}: {show(given)} is not a data type", "write fp32, fp16 or bf16"))
        else:
            reading.fields[ours] = _DTYPES[given.lower()]

    zero = config.get("zero_optimization")
    if isinstance(zero, bool):  # DeepSpeed's oldest form: true is stage 1
        zero = {"stage": int(zero)}
    if zero is not None and not isinstance(zero, Mapping):
        at = (*path, "zero_optimization")
        problems.append(Problem(at, f"{dotted(at)}: {show(zero)} is not a mapping", 'write {"stage": 3}'))
        zero = None
    _read_zero(zero or {}, (*path, "zero_optimization"), problems, reading, one, hidden_size)

    known = {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
        "optimizer", "bf16", "bfloat16", "fp16", "data_types", "communication_data_type", "zero_optimization",
        "activation_checkpointing",
    }  # fmt: skip
    for key, value in config.items():
        if key in known or key in _SILENT:
            continue
        if key in _NOT_MODELLED:
            if _is_on(value):
                reading.warnings.append(f"{dotted((*path, key))} is not modelled: {_NOT_MODELLED[key]}")
            continue
        remedy = suggest(key, known | _SILENT | set(_NOT_MODELLED), most=0)
        hint = f"; {remedy}" if remedy.startswith("did") else ""
        reading.warnings.append(f"DeepSpeed has no key {dotted((*path, key))}{hint}")
    return reading


def _is_on(value: Any) -> bool:
    """Whether a setting does something: a section that is disabled, false or empty does not."""
    if isinstance(value, Mapping):
        return bool(value) and value.get("enabled") is not False
    return bool(value)


_One = Callable[[Path, Key, object], Any]
_Section = Callable[[str], Mapping[str, Any]]


def _read_timers(throughput: Any, path: Path, reading: DeepSpeedReading, one: _One) -> None:
    for name in ("enabled", "synchronized") if isinstance(throughput, Mapping) else ():
        if one((*path, name), _ENABLED, throughput.get(name)) is False:
            reading.fields["throughput_timer_waits"] = False


def _read_checkpoints(given: Mapping[str, Any], path: Path, reading: DeepSpeedReading, one: _One) -> None:
    for key, value in given.items():
        at = (*path, key)
        if key in _CHECKPOINTS:
            if (read := one(at, _CHECKPOINTS[key], value)) is not None:
                reading.fields[key] = read
        elif key == "profile":
            if value is True:
                reading.warnings.append(f"{dotted(at)} is not modelled: the host would wait around each checkpoint")
        else:
            remedy = suggest(key, [*_CHECKPOINTS, "profile"], most=0)
            hint = f"; {remedy}" if remedy.startswith("did") else ""
            reading.warnings.append(f"DeepSpeed has no key {dotted(at)}{hint}")


def _read_precision(
    config: Mapping[str, Any],
    path: Path,
    problems: list[Problem],
    reading: DeepSpeedReading,
    one: _One,
    section: _Section,
) -> None:
    enabled: dict[str, bool | None] = {}
    for name in ("bf16", "bfloat16", "fp16"):
        if config.get(name) is None:
            continue
        if isinstance(config[name], bool):
            at = (*path, name)
            word = "true" if config[name] else "false"
            problems.append(Problem(at, f"{dotted(at)}: {word} is not a mapping", f'write {{"enabled": {word}}}'))
            continue
        given = section(name)
        on = given.get("enabled", False)
        enabled["fp16" if name == "fp16" else "bf16"] = one((*path, name, "enabled"), _ENABLED, on)
        for key, value in given.items():
            effect = _SECTION_NOT_MODELLED.get(("fp16" if name == "fp16" else "bf16", key))
            if effect and value is True:
                reading.warnings.append(f"{dotted((*path, name, key))} is not modelled: {effect}")
    if enabled.get("bf16") and enabled.get("fp16"):
        at = (*path, "fp16", "enabled")
        problems.append(
            Problem(at, f"{dotted((*path, 'bf16'))} and {dotted((*path, 'fp16'))} are both enabled",
                    f"set {dotted(at)} to false")
        )  # fmt: skip
    reading.precision_given = bool(enabled)
    if enabled.get("bf16"):
        reading.precision = "bf16"
    elif enabled.get("fp16"):
        reading.precision = "fp16"
    elif None not in enabled.values():
        reading.precision = "fp32"


def _read_optimizer(given: Mapping[str, Any], path: Path, problems: list[Problem], reading: DeepSpeedReading) -> None:
    kind = given.get("type")
    if kind is None or kind == "auto":
        return
    if isinstance(kind, str) and kind.lower() in _OPTIMIZERS:
        params = given.get("params")
        plain = isinstance(params, Mapping) and params.get("adam_w_mode") is False
        reading.optimizer = "adam" if kind.lower() == "adam" and plain else _OPTIMIZERS[kind.lower()]
        if reading.optimizer == "sgd" and isinstance(params, Mapping) and params.get("momentum"):
            reading.optimizer = "sgd-momentum"
        return
    at = (*path, "type")
    problems.append(
        Problem(at, f"{dotted(at)}: {show(kind)} is not an optimizer that sim knows", "write AdamW, Adam, SGD or Lion")
    )


def _read_zero(
    zero: Mapping[str, Any], path: Path, problems: list[Problem], reading: DeepSpeedReading, one: _One,
    hidden_size: int | None,
) -> None:  # fmt: skip
    for key, value in zero.items():
        at = (*path, key)
        if key in _ZERO:
            ours, spec = _ZERO[key]
            if value == "auto" and hidden_size is not None and (filled := _filled_in(ours, hidden_size)):
                reading.fields[ours], reading.sources[ours] = filled
            elif (read := one(at, spec, value)) is not None:
                reading.fields[ours] = read
        elif key in _ZERO_OFFLOAD:
            _read_offload(key, value, at, problems, reading)
        elif key in _ZERO_NOT_MODELLED:
            idle, effect = _ZERO_NOT_MODELLED[key]
            if value not in (idle, None, "auto") and not (isinstance(value, Mapping) and not value):
                reading.warnings.append(f"{dotted(at)} is not modelled: {effect}")
        elif key not in _ZERO_SILENT:
            remedy = suggest(key, [*_ZERO, *_ZERO_OFFLOAD, *_ZERO_SILENT, *_ZERO_NOT_MODELLED], most=0)
            hint = f"; {remedy}" if remedy.startswith("did") else ""
            reading.warnings.append(f"DeepSpeed has no key {dotted(at)}{hint}")


def _filled_in(ours: str, hidden_size: int) -> tuple[int, str] | None:
    """Return what Hugging Face's Trainer writes for "auto". Source: transformers/integrations/deepspeed.py,
    HfTrainerDeepSpeedConfig.trainer_config_finalize."""
    by = {
        "reduce_bucket_size": (hidden_size * hidden_size, "hidden_size squared"),
        "prefetch_bucket_size": (int(0.9 * hidden_size * hidden_size), "0.9 x hidden_size squared"),
        "param_persistence_threshold": (10 * hidden_size, "10 x hidden_size"),
    }
    if ours not in by:
        return None
    value, words = by[ours]
    return value, f'"auto": {words}, as Hugging Face\'s Trainer fills it in (transformers/integrations/deepspeed.py)'


def _read_offload(key: str, value: Any, at: Path, problems: list[Problem], reading: DeepSpeedReading) -> None:
    ours = "offload_param" if key.endswith("param") else "offload_optimizer"
    if key.startswith("cpu_"):
        if value is True:
            reading.fields[ours] = "cpu"
        return
    if value is None or value == "auto":
        return
    if not isinstance(value, Mapping):
        problems.append(Problem(at, f"{dotted(at)}: {show(value)} is not a mapping", 'write {"device": "cpu"}'))
        return
    device = value.get("device", "none")
    if device == "auto" or device is None:
        device = "none"
    if device not in ("none", "cpu", "nvme"):
        problems.append(
            Problem(
                (*at, "device"), f"{dotted((*at, 'device'))}: {show(device)} is not a place", "write none, cpu or nvme"
            )
        )
        return
    reading.fields[ours] = device
    if isinstance(value.get("pin_memory"), bool):
        reading.fields["pin_memory" if ours == "offload_optimizer" else "offload_param_pin_memory"] = value[
            "pin_memory"
        ]
    if ours == "offload_optimizer" and value.get("ratio") is not None:
        try:
            reading.fields["offload_ratio"] = float(_RATIO.read(value["ratio"]))
        except WrongValueError as error:
            there = (*at, "ratio")
            problems.append(Problem(there, f"{dotted(there)}: {error.problem}", error.remedy))
    if value.get("super_offload") is True:
        reading.warnings.append(
            f"{dotted((*at, 'super_offload'))} is not modelled: the CPU would step while the GPU still computes"
        )


def settings_of(reading: DeepSpeedReading | None, stage: int, gradient_clipping: float) -> DeepSpeedSettings:
    """Return complete settings: what the config gives, DeepSpeed's defaults for the rest."""
    fields = dict(reading.fields) if reading else {}
    fields["stage"], fields["gradient_clipping"] = stage, gradient_clipping
    # deepspeed/runtime/zero/config.py, overlap_comm_valid: None becomes True for stage 3 only
    fields.setdefault("overlap_comm", stage == 3)
    return DeepSpeedSettings(**fields)


def write_deepspeed_config(settings: DeepSpeedSettings) -> dict[str, Any]:
    """Return a ds_config that reads as these settings."""
    names = {ours: key for key, (ours, _) in reversed(list(_ZERO.items()))}
    names.update({ours: key for key, (ours, _) in _ZERO.items() if key.startswith("stage3_")})
    zero: dict[str, Any] = {key: getattr(settings, ours) for ours, key in sorted(names.items(), key=lambda x: x[1])}
    zero["offload_optimizer"] = {
        "device": settings.offload_optimizer, "pin_memory": settings.pin_memory, "ratio": settings.offload_ratio,
    }  # fmt: skip
    zero["offload_param"] = {"device": settings.offload_param, "pin_memory": settings.offload_param_pin_memory}
    config: dict[str, Any] = {"gradient_clipping": settings.gradient_clipping, "zero_optimization": zero}
    if kept := {key: getattr(settings, key) for key in _CHECKPOINTS if getattr(settings, key)}:
        config["activation_checkpointing"] = kept
    if settings.grad_accum_dtype:
        config["data_types"] = {"grad_accum_dtype": settings.grad_accum_dtype}
    if settings.communication_data_type:
        config["communication_data_type"] = settings.communication_data_type
    return config
