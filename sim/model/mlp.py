"""The MLP: gated (silu, gelu) and plain (gelu, relu), in three codes.

Shapes: x[batch, seq, hidden], the inner ones [batch, seq, ffn].
"""

from __future__ import annotations

from dataclasses import dataclass

from sim.ir.ledger import Shape
from sim.model.huggingface import gelu_new
from sim.model.tape import Tape, Value, dropout, linear, pointwise

MLP_ACTIVATION = "mlp_activation"


@dataclass(frozen=True, slots=True)
class Mlp:
    """What an MLP is: its module paths, sizes, activation, biases, and the dropout after it."""

    gate: str
    up: str
    act: str
    down: str
    activation: str
    hidden: Shape
    ffn: Shape
    bias: bool
    dropout: float

    @property
    def module(self) -> str:
        return self.down.rpartition(".")[0]


def gated(tape: Tape, mlp: Mlp, x: Value, out: str) -> Value:
    """down(act(gate(x)) * up(x)): keeps gate's output (act), act's result and up's output (product), the product."""
    gate = linear(tape, mlp.gate, x, mlp.ffn, mlp.hidden, bias=mlp.bias, out="gate")
    # silu and erf-gelu each save their input
    acted = pointwise(
        tape, mlp.act, (gate,), "gate.activated", grads=((gate.name,),), module=mlp.act, region=MLP_ACTIVATION
    )  # fmt: skip
    up = linear(tape, mlp.up, x, mlp.ffn, mlp.hidden, bias=mlp.bias, out="up")
    product = pointwise(
        tape, f"{mlp.module}.product", (acted, up), "activated", grads=((up.name,), (acted.name,)), module=mlp.module,
        region=MLP_ACTIVATION,
    )  # fmt: skip
    return _down(tape, mlp, product, out)


def plain(tape: Tape, mlp: Mlp, x: Value, out: str) -> Value:
    """down(act(up(x))). gelu saves its input, relu its result."""
    up = linear(tape, mlp.up, x, mlp.ffn, mlp.hidden, bias=mlp.bias, out="up")
    return _down(tape, mlp, activate(tape, mlp.act, mlp.activation, up), out)


def _down(tape: Tape, mlp: Mlp, x: Value, out: str) -> Value:
    p = mlp.dropout
    y = linear(tape, mlp.down, x, mlp.hidden, mlp.ffn, bias=mlp.bias, out=f"{out}.linear" if p else out)
    module = f"{mlp.module}.dropout".lstrip(".")
    return dropout(tape, module, y, p, out=out, module=module)


def activate(tape: Tape, module: str, activation: str, x: Value) -> Value:
    """Write one activation. ``gelu`` and ``silu`` save the input, ``relu`` the result, ``gelu_new`` more."""
    if activation == "gelu_new":
        return gelu_new(tape, module, x, region=MLP_ACTIVATION)
    saved = "activated" if activation == "relu" else x.name
    return pointwise(
        tape, module, (x,), "activated", grads=((saved,),), module=module, region=MLP_ACTIVATION
    )  # fmt: skip
