"""The section ``megatron``: what Megatron's arguments imply and refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sim.interop.values import Problem
from sim.scenario.sections.resolution import EIGHT_BIT, Resolution, plain

_HOPPER = "Megatron-LM's script for Hopper (examples/llama/train_llama3_8b_h100_fp8.sh)"


def settle_megatron(r: Resolution, values: dict[str, Any], framework: str | None) -> None:
    """Fill in what Megatron's arguments imply of each other and of the other sections; report what it refuses."""
    if framework != "megatron":
        return
    _fsdp(r, values)
    _attention_backend(r, values)
    _distributed_optimizer(r, values)
    _overlap_from_hopper(r, values)
    _saved_elsewhere(r, values)
    _optimizer_states(r, values)
    _layers_in_16_bit(r, values)
    _cuda_graphs(r, values)
    if values.get("overlap_param_gather") and not values.get("overlap_grad_reduce"):
        r.problems.append(
            Problem(
                ("megatron", "overlap_param_gather"),
                "megatron.overlap_param_gather needs overlap_grad_reduce",
                "write megatron.overlap_grad_reduce: true",
            )
        )


def _fsdp(r: Resolution, values: dict[str, Any]) -> None:
    """ZeRO-2 and ZeRO-3 are Megatron-FSDP, which overlaps what its strategy shards (megatron_fsdp.py)."""
    d = r.draft
    if not d.knows("zero"):
        return
    given = values.get("use_megatron_fsdp")
    if given and "parallelism.zero" in r.sources:
        d.zero = 3
        r.sources["parallelism.zero"] = "megatron.use_megatron_fsdp"
    elif given is not None and given != (d.zero >= 2):
        r.problems.append(
            Problem(
                ("parallelism", "zero"),
                f"parallelism.zero = {d.zero}, but megatron.use_megatron_fsdp is {plain(given)}",
                "write zero: 3 (or 2: gradients alone)" if given else "write zero: 1, or leave the other out",
            )
        )
    if d.zero < 2:
        name = "suggested_communication_unit_size"
        if values.get(name):
            what = f"megatron.{name} is Megatron-FSDP's, and parallelism.zero is {d.zero}"
            r.problems.append(Problem(("megatron", name), what, "write parallelism.zero: 3, or leave it out"))
        return
    for name, holds in (
        ("use_megatron_fsdp", True),
        ("overlap_grad_reduce", True),
        ("overlap_param_gather", d.zero == 3),
    ):
        if holds and values.get(name) is None:
            values[name] = True
            r.sources[f"megatron.{name}"] = "parallelism.zero"


def _attention_backend(r: Resolution, values: Mapping[str, Any]) -> None:
    """What Transformer Engine runs where nothing is said, and on Blackwell also where FlashAttention-2 is.

    From Hopper on it prefers cuDNN's kernel (``get_attention_backend``, and transformer_engine/pytorch/attention.py of
    1.3 on before that: "to give FusedAttention preference on Hopper+ for performance reasons"), unless a launcher turns
    that off (NVTE_FUSED_ATTN=0): ``attention_backend: flash``. On Hopper both are common, and who names a kernel means
    it; on Blackwell FlashAttention-2 is hardly run, and its rates were not measured.
    """
    d = r.draft
    if not d.knows("attention", "gpu", "code", "precision"):
        return
    if d.code != "megatron" or values.get("transformer_impl") == "local":
        return
    nvidia, capability = d.gpu.vendor == "nvidia", d.gpu.compute_capability
    flash = values.get("attention_backend", "auto") == "flash"
    if "training.attention" in r.sources:
        fused = capability >= (8, 0) and d.precision not in ("fp32", "tf32")
        cudnn = nvidia and capability >= (9, 0) and not flash
        d.attention = ("cudnn" if cudnn else "flash-2") if fused else "math"
        r.sources["training.attention"] = "Transformer Engine's choice for this GPU"
        return
    if nvidia and (10, 0) <= capability < (12, 0) and d.attention == "flash-2" and not flash:
        d.attention = "cudnn"
        r.sources["training.attention"] = "Transformer Engine's choice on Blackwell"
        r.warnings.append(
            "attention: flash-2 under Megatron runs as cudnn: Transformer Engine prefers cuDNN's kernel on "
            "Blackwell; write megatron.attention_backend: flash for FlashAttention-2 (NVTE_FUSED_ATTN=0)"
        )


def _distributed_optimizer(r: Resolution, values: dict[str, Any]) -> None:
    """Megatron's distributed optimizer is ZeRO-1: the two ways to ask for it have to agree; what else needs it."""
    d = r.draft
    if not d.knows("zero"):
        return
    sharded = values.get("use_distributed_optimizer")
    if sharded is None:
        values["use_distributed_optimizer"] = d.zero >= 1
        r.sources["megatron.use_distributed_optimizer"] = "parallelism.zero"
    elif "parallelism.zero" in r.sources:
        d.zero = int(sharded)
        r.sources["parallelism.zero"] = "megatron.use_distributed_optimizer"
    elif sharded != (d.zero >= 1):
        r.problems.append(
            Problem(
                ("parallelism", "zero"),
                f"parallelism.zero = {d.zero}, but megatron.use_distributed_optimizer is {plain(sharded)}",
                f"write zero: {int(sharded)}, or leave zero out",
            )
        )
    r.problems.extend(
        Problem(
            ("megatron", name),
            f"megatron.{name} needs the distributed optimizer, but parallelism.zero is 0",
            "write parallelism.zero: 1",
        )
        for name in ("fp8_param_gather", "use_precision_aware_optimizer", "overlap_param_gather")
        if values.get(name) and not d.zero
    )


def _overlap_from_hopper(r: Resolution, values: dict[str, Any]) -> None:
    """What the distributed optimizer exchanges runs beside backward and forward from Hopper on, if nothing is said.

    So Megatron-LM's own script for these GPUs (:data:`_HOPPER`) and the recipes of Megatron Bridge have it. On older
    GPUs the arguments keep their default, with which runs of those years were started.
    """
    d = r.draft
    if not d.knows("gpu", "zero") or d.zero != 1 or d.gpu.vendor != "nvidia" or d.gpu.compute_capability < (9, 0):
        return
    names = ("overlap_grad_reduce", "overlap_param_gather")
    if all(values.get(name) is None for name in names):
        for name in names:
            values[name] = True
            r.sources[f"megatron.{name}"] = _HOPPER


def _saved_elsewhere(r: Resolution, values: dict[str, Any]) -> None:
    """What Megatron refuses of saved tensors on the host and over tp (transformer_config.py, arguments.py)."""
    d = r.draft
    name, given = "cpu_offloading_num_layers", values.get("cpu_offloading_num_layers", 0)
    path = ("megatron", name)
    if given and d.knows("pp") and d.pp > 1:
        what = f"megatron.{name} does not go with pp {d.pp}: Megatron has no offloading in a pipeline"
        r.problems.append(Problem(path, what, f"leave {name} out, or write parallelism.pp: 1"))
    if given and d.knows("recompute") and d.recompute != "none":
        what = f"megatron.{name} does not go with recompute {d.recompute}: Megatron does one or the other"
        r.problems.append(Problem(path, what, f"leave {name} out, or write training.recompute: none"))
    if given and d.knows("model") and d.model.knows("num_hidden_layers") and given >= d.model.num_hidden_layers:
        what = f"megatron.{name} = {given}, but the model has {d.model.num_hidden_layers}, of which the last stays"
        r.problems.append(Problem(path, what, f"write at most {d.model.num_hidden_layers - 1}"))
    if not values.get("distribute_saved_activations") or not d.knows("tp", "recompute", "sp"):
        return
    for wrong, what, remedy in (
        (d.tp == 1, "tp is 1", "write parallelism.tp, or leave it out"),
        (d.recompute != "full", f"recompute is {d.recompute}", "write training.recompute: full"),
        (d.sp, "sp divides them already", "leave one of the two out"),
    ):
        if wrong:
            path = ("megatron", "distribute_saved_activations")
            r.problems.append(Problem(path, f"megatron.distribute_saved_activations, but {what}", remedy))
            return


def _optimizer_states(r: Resolution, values: Mapping[str, Any]) -> None:
    """``__post_init__`` of megatron/core/optimizer/optimizer_config.py: whose states may be of few bits."""
    d = r.draft
    if not values.get("use_precision_aware_optimizer"):
        r.problems.extend(
            Problem(
                ("megatron", name),
                f"megatron.{name} is {values[name]}, but Megatron's usual optimizer keeps its states in fp32",
                "write megatron.use_precision_aware_optimizer: true, or leave it out",
            )
            for name in ("exp_avg_dtype", "exp_avg_sq_dtype")
            if values.get(name, "fp32") != "fp32"
        )
    elif d.knows("optimizer") and d.optimizer not in ("adam", "adamw"):
        r.problems.append(
            Problem(
                ("megatron", "use_precision_aware_optimizer"),
                f"megatron.use_precision_aware_optimizer is of Adam, but the optimizer is {d.optimizer}",
                "write optimizer: adam, or leave it out",
            )
        )


def _layers_in_16_bit(r: Resolution, values: Mapping[str, Any]) -> None:
    """``__post_init__`` of megatron/core/transformer/transformer_config.py: which layers may stay in 16 bit."""
    d, names = r.draft, ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    if not d.knows("precision"):
        return
    # 1 is what a resolved scenario has there
    idle = [n for n in names if values.get(n, 1) != 1 and not values.get("first_last_layers_bf16")]
    why = "first_last_layers_bf16 is false"
    if d.precision not in EIGHT_BIT:
        idle = [n for n in ("fp8_param_gather", "first_last_layers_bf16") if values.get(n)]
        idle, why = [*idle, *(n for n in names if values.get(n, 1) != 1)], f"precision is {d.precision}"
    r.warnings.extend(f"megatron.{name} {plain(values[name])} changes nothing: {why}" for name in idle)
    if d.precision not in EIGHT_BIT or not values.get("first_last_layers_bf16"):
        return
    if d.precision == "fp8" and values.get("fp8_recipe", "delayed") == "delayed":
        r.problems.append(
            Problem(
                ("megatron", "first_last_layers_bf16"),
                "megatron.first_last_layers_bf16 does not go with fp8_recipe delayed: all layers share its scales",
                "write megatron.fp8_recipe: tensorwise or blockwise, or leave it out",
            )
        )
    if not (d.knows("model", "pp") and d.model.knows("num_hidden_layers")):
        return
    most = d.model.num_hidden_layers // d.pp
    r.problems.extend(
        Problem(
            ("megatron", name),
            f"megatron.{name} = {values[name]} is more than the {most} layers of a stage",
            f"write at most {most}",
        )
        for name in names
        if values.get(name, 0) > most
    )


def _cuda_graphs(r: Resolution, values: Mapping[str, Any]) -> None:
    """What cannot be captured (megatron/training/arguments.py, megatron/core/transformer/transformer_config.py).

    A graph of all passes waits for nothing; a block's cannot run a block again, nor move its saved tensors.
    """
    d, scope = r.draft, values.get("cuda_graph_scope", "full")
    graphs, whole = values.get("cuda_graph_impl", "none"), scope == "full_iteration"
    for wrong, key, what, remedy in (
        (
            whole and graphs != "local",
            "cuda_graph_scope",
            "megatron.cuda_graph_scope full_iteration is of cuda_graph_impl local",
            "write megatron.cuda_graph_impl: local, or scope full",
        ),
        (
            whole and values.get("check_for_nan_in_grad", True),
            "cuda_graph_scope",
            "megatron.check_for_nan_in_grad waits for the GPU, which a graph of the full iteration cannot",
            "write megatron.check_for_nan_in_grad: false",
        ),
        (
            graphs != "none" and d.knows("launch_blocking") and d.launch_blocking,
            "cuda_graph_impl",
            "CUDA_LAUNCH_BLOCKING does not wait for what a CUDA graph launches",
            "write training.launch_blocking: false, or no graphs",
        ),
        (
            graphs != "none" and not whole and d.knows("recompute") and d.recompute == "full",
            "cuda_graph_impl",
            "megatron.cuda_graph_impl does not go with recompute full: Megatron captures no block that runs again",
            "write training.recompute: selective, or megatron.cuda_graph_scope: full_iteration",
        ),
        (
            graphs != "none" and values.get("cpu_offloading_num_layers"),
            "cuda_graph_impl",
            "megatron.cuda_graph_impl does not go with cpu_offloading_num_layers: Megatron does one or the other",
            "leave one of the two out",
        ),
    ):
        if wrong:
            r.problems.append(Problem(("megatron", key), what, remedy))
            return
