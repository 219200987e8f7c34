"""DeepSpeed's BF16_Optimizer: ZeRO 1 of bf16 parameters whose gradients accumulate in fp32.

Source: deepspeed/runtime/bf16_optimizer.py, engine.py (``_do_optimizer_sanity_check``, ``buffered_allreduce_fallback``)
and pipe/engine.py (``_exec_backward_pass``) of DeepSpeed 0.19.8.

* ``data_types.grad_accum_dtype: fp32`` with stage 1, bf16 and no offload to the host.
* A flat fp32 buffer holds all gradients on every rank, from the start: 4 bytes a parameter that no rank shares.
* The 16-bit gradients stay too: they are set to zero before each backward, and added to the fp32 ones after it
  (``immediate_grad_update`` is off by default).
* At the end of the batch the fp32 gradients are all-reduced in flat copies of up to 5e8 elements and more, then the
  norm of all of them is taken and all are clipped; the partition's are a view, of which Adam steps the master.

Leaves out: ``immediate_grad_update``; the order of groups with and without weight decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.interop.deepspeed_config import DeepSpeedSettings
from sim.ir.ledger import DTYPE_BYTES, Layer
from sim.ir.program import COMPUTE, Alloc, Chunk, Free, Instruction, Mark, Storage
from sim.parallel.frameworks.deepspeed_stage12 import Stage12
from sim.parallel.frameworks.flat import accumulate, copy, flat_storage, host_sync, in_place, pointwise
from sim.parallel.frameworks.plan import Plan

REDUCED_ELEMENTS = 500_000_000
"""``MEMORY_OPT_ALLREDUCE_SIZE`` (engine.py): a bucket closes when it has more."""


class Bf16Optimizer(Stage12):
    """Hooks, setup and optimizer step of ZeRO 1 with fp32 gradients of bf16 parameters."""

    def __init__(self, layers: Sequence[Layer], settings: DeepSpeedSettings, plan: Plan) -> None:
        super().__init__(layers, settings, plan)
        self.bucket_sizes = _buckets([p.num_elements for p in self.parameters])

    def setup(self) -> Chunk:
        """As ZeRO 1, and the gradients: the 16-bit ones come with the first backward, which holds less than later."""
        return (
            *super().setup(),
            Alloc(flat_storage("gradients.flat", self.flat, "fp32", "gradients")),
            *(Alloc(Storage(f"grad:{p.name}", p.num_elements * self.element, "gradients")) for p in self.parameters),
        )

    def begin_microbatch(self, first: bool, last: bool) -> None:
        super().begin_microbatch(first, last)
        self.is_cleared = False

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        """Autograd adds to the gradient that is there, which was set to zero."""
        trained = self.owner[layer, parameter]
        out: list[Instruction] = []
        if not self.is_cleared:
            self.is_cleared = True
            out.append(pointwise("clear gradients", "elementwise", (), ((self.num_elements, self.dtype),)))
        out.append(accumulate("accumulate gradient", trained.num_elements, self.dtype, self.dtype))
        out.append(Free(gradient))
        return out

    def end_of_backward(self) -> Iterable[Instruction]:
        """``update_hp_grads``; with the last microbatch the all-reduces."""
        out: list[Instruction] = [
            accumulate("update fp32 gradients", p.num_elements, self.dtype, "fp32") for p in self.parameters
        ]
        if not self.last or self.plan.dp == 1:
            return out
        for count in self.bucket_sizes:
            flat = flat_storage("bucket.flat", count, "fp32", "buffers")
            out += [Alloc(flat), copy("bucket.flatten", count, "fp32", "fp32")]
            out.extend(self.nccl.blocking("gradients", "all_reduce", flat.num_bytes, "fp32", COMPUTE))
            out.append(in_place("bucket.average", count, "fp32"))
            out += [copy("bucket.copy back", count, "fp32", "fp32"), Free(flat)]
        return out

    def optimizer_step(self, first_step: bool) -> Chunk:
        self.nccl.reset()
        out: list[Instruction] = [Mark("optimizer", "norm")]
        out.append(pointwise("norm", "reduce", ((self.num_elements, "fp32"),), ()))
        out.extend(self.nccl.blocking("norm", "all_reduce", DTYPE_BYTES["fp32"], "fp32", COMPUTE))
        out.extend(host_sync("norm"))
        if self.clipping:
            out.append(in_place("clip", self.num_elements, "fp32"))
        out.append(Mark("optimizer", "step"))
        stepped = [("partition", self.partition)]
        if first_step:
            out.extend(Alloc(s) for s in self.steps.states(stepped))
        out.extend(self.steps.update(stepped))
        out.append(copy("update parameters", self.partition, "fp32", self.dtype))
        out.append(Mark("optimizer", "gather"))
        out.extend(self.nccl.blocking("parameters", "all_gather", self.flat * self.element, self.dtype, COMPUTE))
        out.append(pointwise("clear fp32 gradients", "elementwise", (), ((self.flat, "fp32"),)))
        return tuple(out)


def _buckets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the elements of each bucket (``allreduce_no_retain``)."""
    found: list[int] = []
    filled = 0
    for size in sizes:
        filled += size
        if filled > REDUCED_ELEMENTS:
            found.append(filled)
            filled = 0
    return (*found, filled) if filled else tuple(found)
