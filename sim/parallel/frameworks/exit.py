"""Where a model's output leaves it: torch hooks a module's output, and the loss is computed outside."""

from __future__ import annotations

from sim.ir.ledger import Layer


def exit_module(layer: Layer) -> str:
    """Return the outermost module of the last layer that the model's output comes from; "" is the layer itself.

    The ops of a head that belong to no module are the loss.
    """
    if layer.kind != "head":
        return ""
    modules = [op.module for op in layer.forward if op.module]
    return modules[-1].partition(".")[0] if modules else ""
