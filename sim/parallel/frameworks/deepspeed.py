"""DeepSpeed ZeRO: which stage, and what of the settings is not modelled."""

from __future__ import annotations

from collections.abc import Sequence

from sim.interop.deepspeed_config import DeepSpeedSettings
from sim.ir.ledger import Layer
from sim.parallel.frameworks.deepspeed_base import Stage0, named_dtype
from sim.parallel.frameworks.deepspeed_stage3 import Stage3
from sim.parallel.frameworks.deepspeed_stage12 import Stage12
from sim.parallel.frameworks.plan import Plan


def deepspeed(layers: Sequence[Layer], settings: DeepSpeedSettings, plan: Plan) -> Stage0 | Stage12 | Stage3:
    """Return the hooks, setup and optimizer step of the settings' stage.

    Call ``setup()`` once; for each role of a microbatch (first, in between, last) ``begin_microbatch(first, last)`` and
    then the passes, in the order of a step; then ``optimizer_step(first_step)``. Stage 3 follows a record of modules:
    give it one with ``use_trace(emitter)``, or the first microbatch written is the one that records.
    """
    if settings.stage == 0:
        return Stage0(layers, settings, plan)
    if settings.stage == 3:
        if is_plus(settings):
            from sim.parallel.frameworks.deepspeed_plus import Stage3Plus

            return Stage3Plus(layers, settings, plan)
        return Stage3(layers, settings, plan)
    if accumulates_in_fp32(settings) and plan.parameter_dtype == "bf16":
        from sim.parallel.frameworks.deepspeed_bf16 import Bf16Optimizer

        return Bf16Optimizer(layers, settings, plan)
    return Stage12(layers, settings, plan)


def accumulates_in_fp32(settings: DeepSpeedSettings) -> bool:
    """Whether ZeRO 1 of bf16 parameters runs with ``BF16_Optimizer`` (engine.py, ``_do_optimizer_sanity_check``)."""
    fp32 = named_dtype(settings.grad_accum_dtype) == "fp32"
    return settings.stage == 1 and fp32 and settings.offload_optimizer == "none"


def is_plus(settings: DeepSpeedSettings) -> bool:
    """Whether any part of ZeRO++ is on."""
    return settings.stage == 3 and (
        settings.zero_hpz_partition_size > 1 or settings.zero_quantized_weights or settings.zero_quantized_gradients
    )


def warnings(settings: DeepSpeedSettings, half: bool = True, bf16: bool = True) -> tuple[str, ...]:
    """Return what of these settings changes memory or time in reality and not here, in words.

    ``half``: parameters are bf16 or fp16; ``bf16`` which.
    """
    found = []
    if settings.round_robin_gradients and settings.stage in (1, 2):
        found.append("deepspeed: round_robin_gradients is not modelled; parameters keep the order of the model")
    if not settings.contiguous_gradients and settings.stage in (1, 2) and settings.offload_optimizer == "none":
        found.append("deepspeed: with contiguous_gradients false the gradients of a partition count as one copy")
    fp32 = settings.stage == 1 and named_dtype(settings.grad_accum_dtype) == "fp32"
    if fp32 and half and not (bf16 and accumulates_in_fp32(settings)):
        found.append("deepspeed: fp32 gradient accumulation in stage 1 is modelled for bf16 without offload alone")
    if is_plus(settings) and settings.offload_param == "cpu":
        found.append("deepspeed: with offload_param, what ZeRO++ gathers from is counted on the GPU and not copied")
    return tuple(found)
