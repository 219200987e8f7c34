"""torch's own optimizers over the tensors of a rank: foreach, fused, or one parameter after the other.

Source: torch/optim/adam.py and sgd.py. ``foreach`` is the default on CUDA (``_default_to_fused_or_foreach`` in
torch/optim/optimizer.py); DTensors take the same paths over their local tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sim.ir.ledger import DType, Shape
from sim.ir.program import Instruction, Storage
from sim.parallel.frameworks.flat import Flat, pointwise
from sim.parallel.optimizer import FUSED, OPTIMIZERS, Shapes, foreach_step, looped_step, state_storages

Implementation = Literal["foreach", "fused", "for-loop"]


def torch_states(
    optimizer: str, parameters: Sequence[tuple[str, int]], dtype: DType, shapes: Shapes | None = None
) -> tuple[Storage, ...]:
    """Return the states of (name, elements) parameters; a rank without a part of a parameter has none."""
    return state_storages(optimizer, [(name, count) for name, count in parameters if count], dtype, shapes)


def torch_update(
    optimizer: str,
    parameters: Sequence[tuple[str, int]],
    dtype: DType,
    implementation: Implementation,
    gradient_dtype: DType | None = None,
    shapes: Shapes | None = None,
) -> list[Instruction]:
    """Return the step over (name, elements) parameters whose states have their dtype; gradients too, if not given."""
    low = gradient_dtype or dtype
    held = [(name, count) for name, count in parameters if count]
    if implementation == "foreach" or optimizer == "muon" or (implementation == "fused" and optimizer not in FUSED):
        return foreach_step(optimizer, held, dtype, low, shapes)
    spec = OPTIMIZERS[optimizer]
    if implementation == "fused":  # one multi-tensor kernel without temporaries (_fused_adamw_)
        total = sum(count for _, count in held)
        kept: tuple[Flat, ...] = ((total, dtype),) * (1 + len(spec.states))
        return [pointwise(f"fused_{optimizer}", "optimizer", (*kept, (total, low)), kept)]
    return looped_step(optimizer, held, dtype, low)


def matrix_columns(shape: Shape) -> int:
    """Return the columns of a weight [out, in]: named dimensions of one side of a projection are one to torch.

    Only ``linear_proj`` and its like have two dimensions on the inner side: [hidden][heads, head_dim].
    """
    inner = shape[-2:] if shape[-1].name == "head_dim" and len(shape) > 2 else shape[-1:]
    columns = 1
    for dim in inner:
        columns *= dim.size
    return columns
