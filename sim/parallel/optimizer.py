"""What an optimizer keeps for each parameter, and the kernels and temporaries of its step.

torch's ``foreach`` implementations, the default on CUDA (``_default_to_fused_or_foreach`` in torch/optim/optimizer.py):
each line below is one multi-tensor kernel over all parameters, in the order of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sim.ir.ledger import DTYPE_BYTES, Dim, DType, Pointwise, Tensor
from sim.ir.program import Alloc, Compute, Free, Instruction, Storage


@dataclass(frozen=True, slots=True)
class Optimizer:
    """``states`` are tensors like the parameter that persist; ``kernels`` (name, reads, writes) letters name them.

    Letters: p parameter, g gradient, t a temporary copy for all parameters, others a state of that letter.
    """

    states: tuple[str, ...]
    kernels: tuple[tuple[str, str, str], ...]

    @property
    def has_temporary(self) -> bool:
        return any("t" in reads + writes for _, reads, writes in self.kernels)


_ADAM = (
    ("lerp_ (first moment)", "mg", "m"),
    ("mul_ (second moment)", "v", "v"),
    ("addcmul_ (second moment)", "vg", "v"),
    ("sqrt", "v", "t"),
    ("div_ (bias correction)", "t", "t"),
    ("add_ (epsilon)", "t", "t"),
    ("addcdiv_", "pmt", "p"),
)
"""torch/optim/adam.py, _multi_tensor_adam, without decay (adam's own adds to the gradient, and is 0 by default)."""

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(("m", "v"), (("mul_ (weight decay)", "p", "p"), *_ADAM)),
    "adam": Optimizer(("m", "v"), _ADAM),
    # torch/optim/sgd.py, _multi_tensor_sgd without momentum
    "sgd": Optimizer((), (("add_", "pg", "p"),)),
}

STATE_NAMES = {"m": "exp_avg", "v": "exp_avg_sq"}


def numel(name: str, num_elements: int, dtype: DType) -> Tensor:
    """Return a flat tensor: how frameworks see parameters."""
    return Tensor(name, (Dim("numel", num_elements),), dtype)


def state_storages(optimizer: str, parameters: Sequence[tuple[str, int]], dtype: DType) -> tuple[Storage, ...]:
    """Return the storages of the states of (name, elements) parameters, in the order in which step() makes them."""
    letters = OPTIMIZERS[optimizer].states
    return tuple(
        Storage(f"{STATE_NAMES[letter]}.{name}", count * DTYPE_BYTES[dtype], "optimizer")
        for name, count in parameters
        for letter in letters
    )


def foreach_step(
    optimizer: str, parameters: Sequence[tuple[str, int]], parameter_dtype: DType, gradient_dtype: DType
) -> list[Instruction]:
    """Return the step of torch's foreach optimizer over (name, elements) parameters.

    Its temporary is one more copy of every parameter: ``_foreach_sqrt`` returns new tensors (torch/optim/adam.py).
    """
    spec = OPTIMIZERS[optimizer]
    total = sum(count for _, count in parameters)
    tensors = {letter: numel(letter, total, gradient_dtype if letter == "g" else parameter_dtype) for letter in "pgtmv"}
    temporaries = [
        Storage(f"exp_avg_sq_sqrt.{name}", count * DTYPE_BYTES[parameter_dtype], "temporary")
        for name, count in parameters
        if spec.has_temporary
    ]
    out: list[Instruction] = []
    for name, reads, writes in spec.kernels:
        if name == "sqrt":
            out.extend(Alloc(storage) for storage in temporaries)
        kernel = Pointwise("optimizer", tuple(tensors[r] for r in reads), tuple(tensors[w] for w in writes))
        out.append(Compute(f"{optimizer}.{name}", kernel))
    out.extend(Free(storage) for storage in temporaries)
    return out


def clip_gradients(num_elements: int, dtype: DType) -> list[Instruction]:
    """Return ``clip_grad_norm_`` (torch/nn/utils/clip_grad.py): a norm over all gradients, then a multiplication."""
    gradients = numel("gradients", num_elements, dtype)
    return [
        Compute("clip.norm", Pointwise("reduce", (gradients,), ())),
        Compute("clip.scale", Pointwise("elementwise", (gradients,), (gradients,))),
    ]
