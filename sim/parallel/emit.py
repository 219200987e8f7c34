"""From a stage's layers to instructions: the passes of one microbatch, with every storage's life.

A framework (``frameworks/``) supplies :class:`Hooks`: what it does before and after each module's
forward and backward, and when a parameter's gradient is ready. The order of ops, the storages, recompute
and the moments at which autograd lets go are the same for all of them and live here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from sim.ir.program import Instruction, Storage


class Hooks(Protocol):
    """What a framework does around the model's own ops. Called in host order while a chunk is written.

    ``layer`` is the index of the layer in the stage; ``module`` the path of a torch module in it, "" for the
    layer itself. Containers are entered before the modules inside them, as torch's hooks are. During
    recompute the forward hooks run again (``recomputing`` is True), inside the backward hooks of the layer.
    """

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]: ...

    def post_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]: ...

    def pre_backward(self, layer: int, module: str) -> Iterable[Instruction]: ...

    def post_backward(self, layer: int, module: str) -> Iterable[Instruction]: ...

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        """``gradient`` has just been written (its Alloc is emitted already). Whoever keeps it frees it."""
        ...

    def end_of_backward(self) -> Iterable[Instruction]:
        """Autograd's final callbacks: what is left in a bucket is reduced, the streams join."""
        ...
