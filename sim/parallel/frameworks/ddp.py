"""torch DDP: a replica on each rank, gradients averaged in buckets while backward runs.

Source: torch/nn/parallel/distributed.py and torch/csrc/distributed/c10d/reducer.cpp of PyTorch 2.8 to 2.13.

* Buckets are flat tensors beside the gradients: a second copy of all of them, unless ``gradient_as_bucket_view``.
* The first iteration has one bucket with every parameter (without ``find_unused_parameters``); then the buckets are
  built again in the order in which gradients became ready: of ``bucket_cap_mb``, or, where that is left to torch, the
  first of 1 MiB and the others of 25 MiB.
* Each full bucket is divided by the world size as it is filled, and all-reduced on NCCL's own stream.
* ``no_sync`` on all microbatches but the last of a step: gradients only accumulate.
* The optimizer is torch's, with its states made in the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.ir.ledger import DTYPE_BYTES, DType, Layer, Pointwise
from sim.ir.program import (
    COMPUTE,
    Alloc,
    Chunk,
    Collective,
    Compute,
    Free,
    HostWait,
    Instruction,
    Mark,
    Record,
    Storage,
    Wait,
)
from sim.parallel.optimizer import clip_gradients, foreach_step, numel, state_storages
from sim.scenario.schema import DdpSettings

FIRST_BUCKET_BYTES = 1 << 20
"""``kDefaultFirstBucketBytes`` in torch/csrc/distributed/c10d/reducer.hpp."""
BUCKET_BYTES = 25 << 20
"""``bucket_cap_mb`` where it is None, in torch/nn/parallel/distributed.py."""
NCCL_STREAM = "nccl:dp"

_Key = tuple[int, str]


class Ddp:
    """Hooks, setup and optimizer step of a DDP rank. Writes chunks in host order; holds what is open in between."""

    passes_differ = True

    def __init__(
        self,
        layers: Sequence[Layer],
        gradient_order: Sequence[_Key],
        settings: DdpSettings,
        *,
        num_ranks: int,
        parameter_dtype: DType,
        loss_scaling: bool,
        optimizer: str,
        gradient_clipping: float,
    ) -> None:
        self.layers = layers
        self.settings = settings
        self.num_ranks = num_ranks
        self.dtype = parameter_dtype
        self.loss_scaling = loss_scaling
        self.optimizer = optimizer
        self.gradient_clipping = gradient_clipping
        self.order = tuple(gradient_order)
        self.sizes: dict[_Key, int] = {
            (index, p.name): p.num_elements
            for index, layer in enumerate(layers)
            for p in layer.parameters
            if p.name not in {own for own, _, _ in layer.tied}
        }
        self.gradients: dict[_Key, Storage] = {}
        self.first = self.last = True
        self.use_buckets(first_step=True)

    # setup

    def setup(self) -> Chunk:
        """Parameters and buffers on the GPU, then the reducer's first buckets."""
        out: list[Instruction] = [Mark("setup", "model")]
        element = DTYPE_BYTES[self.dtype]
        for (index, name), count in self.sizes.items():
            out.append(Alloc(Storage(f"{self.layers[index].kind}.{name}", count * element, "parameters")))
        for layer in self.layers:
            out.extend(Alloc(Storage(f"{layer.kind}.{t.name}", t.num_bytes, "buffers")) for t in layer.buffers)
        out.append(Mark("setup", "reducer"))
        out.extend(Alloc(bucket) for bucket in self.buckets)
        return tuple(out)

    def after_first_step(self) -> Chunk:
        """What the second iteration begins with: the old buckets go, new ones are made in the observed order."""
        old = self.buckets
        self.use_buckets(first_step=False)
        if self.settings.find_unused_parameters:
            return ()
        return (Mark("forward", "reducer"), *(Free(b) for b in old), *(Alloc(b) for b in self.buckets))

    def use_buckets(self, first_step: bool) -> None:
        """Assign parameters to buckets as ``compute_bucket_assignment_by_size`` does: one closes when it is full."""
        element = DTYPE_BYTES[self.dtype]
        if self.settings.find_unused_parameters and not first_step:
            return  # never built again
        if first_step and not self.settings.find_unused_parameters:
            assignment = [list(self.order)]
        else:
            given = self.settings.bucket_cap_mb
            first, cap = (FIRST_BUCKET_BYTES, BUCKET_BYTES) if given is None else (int(given * 2**20),) * 2
            assignment, open_bucket, filled = [], list[_Key](), 0
            for key in self.order:
                open_bucket.append(key)
                filled += self.sizes[key] * element
                if filled >= (cap if assignment else first):
                    assignment.append(open_bucket)
                    open_bucket, filled = [], 0
            if open_bucket:
                assignment.append(open_bucket)
        category = "gradients" if self.settings.gradient_as_bucket_view else "buffers"
        self.assignment = assignment
        self.bucket_of = {key: number for number, keys in enumerate(assignment) for key in keys}
        self.buckets = [
            Storage(f"bucket.{number}", sum(self.sizes[key] for key in keys) * element, category)  # type: ignore[arg-type]
            for number, keys in enumerate(assignment)
        ]

    # passes

    def begin_microbatch(self, first: bool, last: bool) -> None:
        """Say which microbatch is written next: gradients start with the first and are averaged in the last."""
        self.first, self.last = first, last
        self.missing = [len(keys) for keys in self.assignment]

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        if layer or module or recomputing or not self.first:
            return ()
        buffers = [t for each in self.layers for t in each.buffers]
        if not buffers or self.num_ranks == 1:
            return ()
        # broadcast_buffers: rank 0's buffers at the start of each forward that follows a synchronised backward
        total = sum(t.num_bytes for t in buffers)
        return self._on_nccl(Collective("buffers", "broadcast", "dp", total, buffers[0].dtype, NCCL_STREAM), join=True)

    def post_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        return ()

    def pre_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        return ()

    def post_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        return ()

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        key = (layer, parameter)
        out: list[Instruction] = []
        tensor = numel("gradient", self.sizes[key], self.dtype)
        if self.first:
            self.gradients[key] = gradient  # AccumulateGrad steals the first one
        else:
            out.append(Compute("accumulate gradient", Pointwise("elementwise", (tensor, tensor), (tensor,))))
            out.append(Free(gradient))
        if not self.last:
            return out
        number = self.bucket_of[key]
        out.append(Compute("copy to bucket", Pointwise("elementwise", (tensor,), (tensor,))))
        if self.settings.gradient_as_bucket_view:
            out.append(Free(self.gradients.pop(key)))  # .grad becomes a view of the bucket
        self.missing[number] -= 1
        if self.missing[number] == 0:
            reduce = Collective(
                f"bucket.{number}", "all_reduce", "dp", self.buckets[number].num_bytes, self.dtype, NCCL_STREAM
            )
            out.extend(self._on_nccl(reduce, join=False))
        return out

    def end_of_backward(self) -> Iterable[Instruction]:
        """``finalize_backward``: wait for each bucket, and copy it back where the gradients are not views of it."""
        if not self.last:
            return ()
        out: list[Instruction] = []
        for number, bucket in enumerate(self.buckets):
            if self.num_ranks > 1:
                out.append(Wait(f"bucket.{number}", COMPUTE))
            if not self.settings.gradient_as_bucket_view:
                tensor = numel("bucket", bucket.num_bytes // DTYPE_BYTES[self.dtype], self.dtype)
                out.append(Compute("copy from bucket", Pointwise("copy", (tensor,), (tensor,))))
        return out

    def _on_nccl(self, collective: Collective, join: bool) -> list[Instruction]:
        """NCCL's stream waits for the current one, and an event says when the collective is done (ProcessGroupNCCL)."""
        if self.num_ranks == 1:
            return []
        out: list[Instruction] = [
            Record("nccl ready", COMPUTE),
            Wait("nccl ready", NCCL_STREAM),
            collective,
            Record(collective.name, NCCL_STREAM),
        ]
        if join:
            out.append(Wait(collective.name, COMPUTE))
        return out

    # optimizer

    def optimizer_step(self, first_step: bool) -> Chunk:
        """Unscale and clip, step, and ``zero_grad(set_to_none=True)``."""
        out: list[Instruction] = [Mark("optimizer", "optimizer")]
        parameters = [(f"{self.layers[index].kind}.{name}", count) for (index, name), count in self.sizes.items()]
        total = sum(self.sizes.values())
        if self.loss_scaling:
            # GradScaler.unscale_: a multi-tensor kernel, then the host reads found_inf (torch/amp/grad_scaler.py)
            flat = numel("gradients", total, self.dtype)
            out.append(Compute("unscale", Pointwise("elementwise", (flat,), (flat,))))
            out += [Record("found_inf", COMPUTE), HostWait("found_inf")]
        if self.gradient_clipping:
            out.extend(clip_gradients(total, self.dtype))
        if first_step:
            out.extend(Alloc(storage) for storage in state_storages(self.optimizer, parameters, self.dtype))
        out.extend(foreach_step(self.optimizer, parameters, self.dtype, self.dtype))
        out.extend(Free(gradient) for gradient in self.gradients.values())
        return tuple(out)
