"""torch's own optimizers over the tensors of a rank: foreach, fused, or one parameter after the other.

Source: torch/optim/adam.py and sgd.py. ``foreach`` is the default on CUDA (``_default_to_fused_or_foreach`` in
torch/optim/optimizer.py); DTensors take the same paths over their local tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sim.ir.ledger import DTYPE_BYTES, DType
from sim.ir.program import Alloc, Free, Instruction, Storage
from sim.parallel.frameworks.flat import Flat, pointwise
from sim.parallel.optimizer import OPTIMIZERS, foreach_step, state_storages

Implementation = Literal["foreach", "fused", "for-loop"]


def torch_states(optimizer: str, parameters: Sequence[tuple[str, int]], dtype: DType) -> tuple[Storage, ...]:
    """Return the states of (name, elements) parameters; a rank without a part of a parameter has none."""
    return state_storages(optimizer, [(name, count) for name, count in parameters if count], dtype)


def torch_update(
    optimizer: str,
    parameters: Sequence[tuple[str, int]],
    dtype: DType,
    implementation: Implementation,
    gradient_dtype: DType | None = None,
) -> list[Instruction]:
    """Return the step over (name, elements) parameters whose states have their dtype; gradients too, if not given."""
    low = gradient_dtype or dtype
    held = [(name, count) for name, count in parameters if count]
    if implementation == "foreach":
        return foreach_step(optimizer, held, dtype, low)
    spec = OPTIMIZERS[optimizer]
    if implementation == "fused":  # one multi-tensor kernel without temporaries (_fused_adamw_)
        total = sum(count for _, count in held)
        kept: tuple[Flat, ...] = ((total, dtype),) * (1 + len(spec.states))
        return [pointwise(f"fused_{optimizer}", "optimizer", (*kept, (total, low)), kept)]
    out: list[Instruction] = []
    for name, count in held:
        flat: Flat = (count, dtype)
        temporary = Storage(f"exp_avg_sq_sqrt.{name}", count * DTYPE_BYTES[dtype], "temporary")
        for kernel, reads, writes in spec.kernels:
            if kernel == "sqrt":
                out.append(Alloc(temporary))
            out.append(pointwise(f"{optimizer}.{kernel}", "optimizer", (flat,) * len(reads), (flat,) * len(writes)))
        if spec.has_temporary:
            out.append(Free(temporary))
    return out
