"""torch DDP: a replica on each rank, gradients averaged in buckets while backward runs.

Source: torch/nn/parallel/distributed.py and torch/csrc/distributed/c10d/reducer.cpp of PyTorch 2.8 to 2.13.

* Buckets are flat tensors beside the gradients: a second copy of all of them, unless ``gradient_as_bucket_view``.
* The first iteration has one bucket with every parameter; then the buckets are built again in the order in which
  gradients became ready: of ``bucket_cap_mb``, or, where that is left to torch, the first of 1 MiB and the others of
  25 MiB. The ranks take rank 0's: its indices and sizes are broadcast. Under ``static_graph`` this happens one
  iteration later (here: as without it), and the first iteration also reduces which parameters were used.
* ``find_unused_parameters`` (of a graph that is not static) fills buckets in the order of registration, reverses their
  list, and never builds them again; each synchronised backward ends with an all-reduce of which parameters were used.
* Each full bucket is divided by the world size as it is filled, and all-reduced on NCCL's own stream when those before
  it have been: buckets go strictly in their order.
* ``no_sync`` on all microbatches but the last of a step: gradients only accumulate. A static graph cannot start with
  it: its first backward has to synchronise (reducer.cpp asserts so).
* Registered buffers are broadcast before a forward that follows a synchronised backward, coalesced by dtype.
* One rank alone is not wrapped, as Accelerate, Lightning Fabric and the Hugging Face Trainer leave it: no buckets.
* The optimizer is torch's, with its states made in the first step.

Leaves out: the host's walk through the autograd graph under ``find_unused_parameters``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.ir.ledger import DTYPE_BYTES, DType, Layer, Pointwise, Tensor
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
from sim.parallel.frameworks.torch_step import matrix_columns, torch_states, torch_update
from sim.parallel.optimizer import OF_MATRICES, Shapes, clip_gradients, numel
from sim.scenario.schema import DdpSettings

FIRST_BUCKET_BYTES = 1 << 20
"""``kDefaultFirstBucketBytes`` in torch/csrc/distributed/c10d/reducer.hpp."""
BUCKET_BYTES = 25 << 20
"""``bucket_cap_mb`` where it is None, in torch/nn/parallel/distributed.py."""
BROADCAST_BYTES = 250 << 20
"""``broadcast_bucket_size`` in torch/nn/parallel/distributed.py."""
REGISTERED = ("freqs_cis", "rotary_emb.inv_freq")
"""Tensors of a ledger's ``buffers`` that modules register as buffers; masks and such are made in forward."""
INDEX_BYTES = 4
"""Bucket indices, sizes, and the map of used parameters are int32 (reducer.cpp)."""
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
        self.finds_unused = settings.find_unused_parameters and not settings.static_graph
        self.is_first_step = True
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
        if self.num_ranks > 1 and (self.settings.find_unused_parameters or self.settings.static_graph):
            out.append(Alloc(Storage("used parameters", INDEX_BYTES * len(self.sizes), "buffers")))
        return tuple(out)

    def after_first_step(self) -> Chunk:
        """What the second iteration begins with: the old buckets go, new ones are made in the observed order.

        ``sync_bucket_indices``: the indices of all parameters with their number, then the sizes of the buckets; the
        host reads both.
        """
        self.is_first_step = False
        if self.finds_unused or self.num_ranks == 1:
            return ()
        old = self.buckets
        self.use_buckets(first_step=False)
        out: list[Instruction] = [Mark("forward", "reducer")]
        for name, count in (("bucket indices", len(self.sizes) + 1), ("bucket sizes", len(self.buckets))):
            storage = Storage(name, INDEX_BYTES * count, "temporary")
            told = Collective(name, "broadcast", "dp", storage.num_bytes, "int32", NCCL_STREAM)
            out += [Alloc(storage), *self._on_nccl(told, join=True)]
            out += [Record(f"{name} read", COMPUTE), HostWait(f"{name} read"), Free(storage)]
        return (*out, *(Free(b) for b in old), *(Alloc(b) for b in self.buckets))

    def use_buckets(self, first_step: bool) -> None:
        """Assign parameters to buckets."""
        element = DTYPE_BYTES[self.dtype]
        given = self.settings.bucket_cap_mb
        first, cap = (FIRST_BUCKET_BYTES, BUCKET_BYTES) if given is None else (int(given * 2**20),) * 2
        if self.num_ranks == 1:
            assignment: list[list[_Key]] = []
        elif self.finds_unused:
            assignment = self._filled(tuple(self.sizes), first, cap)[::-1]
        elif first_step:
            assignment = [list(self.order)]
        else:
            assignment = self._filled(self.order, first, cap)
        category = "gradients" if self.settings.gradient_as_bucket_view else "buffers"
        self.assignment = assignment
        self.bucket_of = {key: number for number, keys in enumerate(assignment) for key in keys}
        self.buckets = [
            Storage(f"bucket.{number}", sum(self.sizes[key] for key in keys) * element, category)  # type: ignore[arg-type]
            for number, keys in enumerate(assignment)
        ]

    def _filled(self, order: Sequence[_Key], first: int, cap: int) -> list[list[_Key]]:
        """Return buckets as ``compute_bucket_assignment_by_size`` fills them: one closes when it has so many bytes."""
        element = DTYPE_BYTES[self.dtype]
        full: list[list[_Key]] = []
        open_bucket, filled = list[_Key](), 0
        for key in order:
            open_bucket.append(key)
            filled += self.sizes[key] * element
            if filled >= (cap if full else first):
                full.append(open_bucket)
                open_bucket, filled = [], 0
        return [*full, open_bucket] if open_bucket else full

    # passes

    def begin_microbatch(self, first: bool, last: bool) -> None:
        """Say which microbatch is written next: gradients start with the first and are averaged in the last."""
        self.first, self.last = first, last
        self.missing = [len(keys) for keys in self.assignment]
        self.next_bucket = 0

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        if layer or module or recomputing or not self.first or self.num_ranks == 1:
            return ()
        return self._broadcast_buffers()

    def _broadcast_buffers(self) -> list[Instruction]:
        """``_sync_buffers``: rank 0's buffers, flattened in pieces of one dtype (``broadcast_coalesced``, comm.cpp)."""
        pieces: list[list[Tensor]] = []
        open_piece: dict[str, list[Tensor]] = {}
        for tensor in (t for layer in self.layers for t in layer.buffers if t.name in REGISTERED):
            piece = open_piece.setdefault(tensor.dtype, [])
            if not piece:
                pieces.append(piece)
            piece.append(tensor)
            if sum(t.num_bytes for t in piece) >= BROADCAST_BYTES:
                del open_piece[tensor.dtype]
        out: list[Instruction] = []
        for number, piece in enumerate(pieces):
            total, dtype = sum(t.num_bytes for t in piece), piece[0].dtype
            told = Collective(f"buffers.{number}", "broadcast", "dp", total, dtype, NCCL_STREAM)
            if len(piece) == 1:  # flattening one tensor is a view
                out += self._on_nccl(told, join=True)
                continue
            flat = numel("buffers", total // DTYPE_BYTES[dtype], dtype)
            copied = Compute("copy buffers", Pointwise("copy", (flat,), (flat,)))
            storage = Storage(f"buffers.{number}", total, "temporary")
            out += [Alloc(storage), copied, *self._on_nccl(told, join=True), copied, Free(storage)]
        return out

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
        if not self.last or self.num_ranks == 1:
            return out
        number = self.bucket_of[key]
        out.append(Compute("copy to bucket", Pointwise("elementwise", (tensor,), (tensor,))))
        if self.settings.gradient_as_bucket_view:
            out.append(Free(self.gradients.pop(key)))  # .grad becomes a view of the bucket
        self.missing[number] -= 1
        while self.next_bucket < len(self.buckets) and not self.missing[self.next_bucket]:
            bucket = self.buckets[self.next_bucket]
            reduce = Collective(bucket.name, "all_reduce", "dp", bucket.num_bytes, self.dtype, NCCL_STREAM)
            out.extend(self._on_nccl(reduce, join=False))
            self.next_bucket += 1
            if self.next_bucket == len(self.buckets) and self._reduces_used():
                size = INDEX_BYTES * len(self.sizes)
                used = Collective("used parameters", "all_reduce", "dp", size, "int32", NCCL_STREAM)
                out.extend(self._on_nccl(used, join=False))
        return out

    def _reduces_used(self) -> bool:
        """``all_reduce_local_used_map``: in each synchronised backward, under a static graph in the first."""
        return self.finds_unused or (self.settings.static_graph and self.is_first_step)

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
        if self.num_ranks > 1 and self._reduces_used():
            out.append(Wait("used parameters", COMPUTE))
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
            out.extend(clip_gradients(list(self.sizes.values()), self.dtype))
        shapes = self._matrices()
        if first_step:
            out.extend(Alloc(storage) for storage in torch_states(self.optimizer, parameters, self.dtype, shapes))
        kind = self.settings.optimizer_implementation
        out.extend(torch_update(self.optimizer, parameters, self.dtype, kind, shapes=shapes))
        out.extend(Free(gradient) for gradient in self.gradients.values())
        return tuple(out)

    def _matrices(self) -> Shapes:
        """Return (rows, columns) of what the optimizer treats as matrices: for Muon those of the blocks alone."""
        if self.optimizer not in OF_MATRICES:
            return {}
        whole = self.optimizer == "adafactor"
        return {
            f"{layer.kind}.{p.name}": (p.num_elements // columns, columns)
            for layer in self.layers
            if whole or layer.kind == "block"
            for p in layer.parameters
            if len(p.shape) > 1 and (columns := matrix_columns(p.shape))
        }
