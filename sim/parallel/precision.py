"""Which dtype a framework stores parameters in, and which one its matmuls run in."""

from __future__ import annotations

from dataclasses import dataclass

from sim.ir.ledger import DType
from sim.scenario.schema import Scenario


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
