"""DeepSpeed ZeRO: which stage, and what of the settings is not modelled."""

from __future__ import annotations

from collections.abc import Sequence

from sim.interop.deepspeed_config import DeepSpeedSettings
from sim.ir.ledger import Layer
from sim.parallel.frameworks.deepspeed_base import Stage0
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
    return Stage12(layers, settings, plan)


def is_plus(settings: DeepSpeedSettings) -> bool:
    """Whether any part of ZeRO++ is on."""
    return settings.stage == 3 and (
        settings.zero_hpz_partition_size > 1 or settings.zero_quantized_weights or settings.zero_quantized_gradients
    )


def warnings(settings: DeepSpeedSettings, half: bool = True) -> tuple[str, ...]:
    """Return what of these settings changes memory or time in reality and not here, in words.

    ``half``: parameters are bf16 or fp16.
    """
    found = []
    if settings.round_robin_gradients and settings.stage in (1, 2):
        found.append("deepspeed: round_robin_gradients is not modelled; parameters keep the order of the model")
    if not settings.contiguous_gradients and settings.stage in (1, 2) and settings.offload_optimizer == "none":
        found.append("deepspeed: with contiguous_gradients false the gradients of a partition count as one copy")
    fp32 = (settings.grad_accum_dtype or "") in ("fp32", "float32", "float")
    if settings.stage == 1 and fp32 and half:
        found.append("deepspeed: fp32 gradient accumulation in stage 1 is not modelled; gradients accumulate in 16 bit")
    if is_plus(settings) and settings.offload_param == "cpu":
        found.append("deepspeed: with offload_param, what ZeRO++ gathers from is counted on the GPU and not copied")
    return tuple(found)
