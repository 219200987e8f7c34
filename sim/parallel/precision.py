"""Which dtype a framework stores parameters in, which one its matmuls run in, and what quantises them further."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sim.ir.ledger import DType, Ledger
from sim.parallel.emit import Recompute
from sim.scenario.schema import Scenario

if TYPE_CHECKING:
    from sim.parallel.quantise import Recipe

LOW = ("fp8", "mxfp8", "nvfp4")
"""Precisions of the products of the blocks' linears only; all else is then bf16."""


@dataclass(frozen=True, slots=True)
class Dtypes:
    """``autocast``: parameters keep their dtype and matmuls cast on the fly (torch.autocast)."""

    parameter: DType
    compute: DType
    autocast: bool


def dtypes_of(scenario: Scenario) -> Dtypes:
    """Return the dtypes of a scenario.

    DeepSpeed's bf16 and fp16 modes convert the module itself (``module.bfloat16()`` in deepspeed/runtime/engine.py);
    DDP's users train under autocast over fp32 parameters, unless ``ddp.mixed_precision`` is ``pure``.
    FSDP gathers parameters in ``param_dtype``, and that is what the passes read and autograd hands gradients over in;
    the shards stay in fp32. Where it gathers fp32, 16-bit training is autocast's (Composer's ``amp_bf16`` with FULL).
    """
    precision = scenario.training.precision
    if precision in LOW:
        precision = "bf16"
    if precision == "fp32":
        return Dtypes("fp32", "fp32", False)
    if precision == "tf32":
        return Dtypes("fp32", "tf32", False)
    assert precision in ("fp16", "bf16"), f"no lowering for precision {precision}"
    if scenario.framework == "fsdp2":
        gathered: DType = scenario.fsdp2.param_dtype or precision
        return Dtypes(gathered, precision, gathered == "fp32")
    if scenario.framework == "fsdp1" and scenario.fsdp1.mixed_precision == "FULL":
        return Dtypes("fp32", precision, True)
    if scenario.framework == "ddp" and scenario.ddp.mixed_precision == "autocast":
        return Dtypes("fp32", precision, True)
    return Dtypes(precision, precision, False)


def recipe_of(scenario: Scenario) -> Recipe | None:
    """Return how the linears of the blocks are quantised; None: not at all."""
    if scenario.training.precision not in LOW:
        return None
    from sim.parallel import quantise

    gpu = scenario.cluster.gpu
    return quantise.recipe_of(scenario.training.precision, scenario.megatron.fp8_recipe, gpu.compute_capability)


def is_torchao(scenario: Scenario) -> bool:
    """Whether FP8 is torchao's: in plain torch modules. Transformer Engine's modules have their own."""
    return scenario.training.precision == "fp8" and scenario.training.code == "torch"


def keeps_low_weights(scenario: Scenario) -> bool:
    """Whether weights are quantised once a step: Megatron-Core says which microbatch is the first."""
    return scenario.framework == "megatron"


def transformed(ledger: Ledger, scenario: Scenario) -> Ledger:
    """Return the sharded ledger as the precision and the compiler change it."""
    recipe = recipe_of(scenario)
    if recipe is not None and is_torchao(scenario):
        from sim.parallel.float8 import float8_ledger

        settings = scenario.fsdp2
        low = scenario.framework == "fsdp2" and settings.float8_all_gather
        compiled = scenario.training.compile
        sms = scenario.cluster.gpu.num_sms if compiled else 0
        ledger = float8_ledger(ledger, settings.float8_recipe, gathered_low=low, shared=compiled, num_sms=sms)
    elif recipe is not None:
        from sim.parallel.quantise import quantise_ledger

        blocks = sum(layer.kind == "block" for layer in ledger.layers)
        megatron = scenario.megatron
        ends: frozenset[int] = frozenset()
        if megatron.first_last_layers_bf16:
            start, end = megatron.num_layers_at_start_in_bf16, megatron.num_layers_at_end_in_bf16
            ends = frozenset([*range(min(start, blocks)), *range(max(0, blocks - end), blocks)])
        ledger = quantise_ledger(ledger, recipe, cached_weights=keeps_low_weights(scenario), in_16_bit=ends)
    if scenario.training.compile:
        from sim.parallel.fuse import compile_ledger

        ledger = compile_ledger(ledger, recompute_of(scenario), loss=scenario.training.loss == "compiled")
    if (way := overlaps_tp(scenario)) is not None:
        from sim.parallel.overlap_tp import overlapped

        ledger = overlapped(ledger, scenario.parallelism.tp, way)
    return ledger


def overlaps_tp(scenario: Scenario) -> Literal["userbuffers", "symmetric"] | None:
    """Return how exchanges over tp run beside products in pieces, if they do."""
    if scenario.parallelism.tp == 1:
        return None
    if scenario.framework == "megatron" and scenario.megatron.tp_comm_overlap:
        return "userbuffers"
    return "symmetric" if scenario.framework == "fsdp2" and scenario.fsdp2.async_tensor_parallel else None


def exchange_sms_of(scenario: Scenario) -> int:
    """Return the SMs that exchanges over tp take where Transformer Engine's user buffers make them; 0: NCCL's."""
    if overlaps_tp(scenario) != "userbuffers":
        return 0
    from sim.parallel.overlap_tp import MARGIN

    return MARGIN


def recompute_of(scenario: Scenario) -> Recompute:
    """Hugging Face, DeepSpeed and Megatron use the reentrant form, torch's own examples and torchtitan the other."""
    mode = scenario.training.recompute
    reentrant = scenario.training.code != "torch" and mode != "selective-op"
    return Recompute(mode, reentrant, scenario.training.recompute_interval)
