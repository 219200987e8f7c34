"""Parameters as a framework sees them: one list in module order, flattened, cut into partitions and buckets.

What DeepSpeed's stages share: the arithmetic of partitions, kernels over flat tensors, and the streams and events of
collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from sim.ir.ledger import DTYPE_BYTES, Dim, DType, Layer, Pointwise, Tensor
from sim.ir.program import (
    COMPUTE,
    Alloc,
    Category,
    Collective,
    CollectiveKind,
    Compute,
    Copy,
    Free,
    HostCompute,
    HostWait,
    Instruction,
    Record,
    Storage,
    Wait,
)
from sim.parallel.frameworks.plan import Plan
from sim.parallel.optimizer import foreach_step, state_storages

Key = tuple[int, str]
"""(index of the layer in the stage, name of the parameter in the layer)."""
Flat = tuple[int, DType]
"""A flat tensor: elements and dtype."""

NCCL_START_ALIGNMENT = 2
"""``nccl_start_alignment_factor`` in deepspeed/runtime/zero/stage_1_and_2.py: 4 bytes in 16-bit elements."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A parameter that this rank trains. ``index`` counts in the order in which torch registers modules."""

    index: int
    key: Key
    name: str
    module: str
    num_elements: int


def trained_parameters(layers: Sequence[Layer]) -> tuple[tuple[Trained, ...], dict[Key, Trained]]:
    """Return the parameters in module order, and a map from every (layer, name) to its owner's, tied ones included."""
    listed: list[Trained] = []
    owner: dict[Key, Trained] = {}
    first_of: dict[str, int] = {}
    shapes: dict[int, list[tuple[str, str, str, int]]] = {}
    for index, layer in enumerate(layers):
        first_of.setdefault(layer.name, index)
        known = shapes.get(id(layer))
        if known is None:
            elsewhere = {own for own, _, _ in layer.tied}
            known = shapes[id(layer)] = [
                (p.name, f"{layer.kind}.{p.name}", p.module, p.num_elements)
                for p in layer.parameters
                if p.name not in elsewhere
            ]
        for name, label, module, count in known:
            parameter = Trained(len(listed), (index, name), label, module, count)
            listed.append(parameter)
            owner[index, name] = parameter
    for index, layer in enumerate(layers):
        for own, layer_name, name in layer.tied:
            owner[index, own] = owner[first_of[layer_name], name]
    return tuple(listed), owner


# --- arithmetic --------------------------------------------------------------------------------


def padded(num_elements: int, multiple: int) -> int:
    """Return the smallest multiple that holds them."""
    return -(-num_elements // multiple) * multiple


def flat_group(num_elements: int, dp: int) -> int:
    """Return the elements of a flat parameter group, aligned to twice the ranks (stage_1_and_2.py)."""
    return padded(num_elements, NCCL_START_ALIGNMENT * dp)


def partition_elements(num_elements: int, dp: int) -> int:
    """Return the elements of one rank's partition of one parameter (partition_parameters.py: padded to the ranks)."""
    return -(-num_elements // dp)


def owned(sizes: Sequence[int], partition_size: int, rank: int) -> tuple[range, int]:
    """Return which parameters of a flat group touch a rank's partition, and the elements of these parameters in full.

    A gradient that straddles the border is kept whole by both ranks (``get_partition_info``).
    """
    start, stop = rank * partition_size, (rank + 1) * partition_size
    offset, first, last, whole = 0, len(sizes), len(sizes), 0
    for index, count in enumerate(sizes):
        if offset < stop and offset + count > start:
            first = min(first, index)
            last = index + 1
            whole += count
        offset += count
    return range(first, last) if whole else range(0), whole


def fullest_rank(sizes: Sequence[int], partition_size: int, dp: int) -> int:
    """Return the rank whose partition's gradients, kept whole at the borders, are the most elements; ties: the first.

    One sweep over parameters and partitions together.
    """
    totals = [0] * dp
    offset = 0
    for count in sizes:
        if count:
            for rank in range(offset // partition_size, min(dp - 1, (offset + count - 1) // partition_size) + 1):
                totals[rank] += count
        offset += count
    return max(range(dp), key=lambda rank: (totals[rank], -rank))


def slices(bucket: Iterable[tuple[int, int]], partition_size: int, merge: bool = True) -> list[tuple[int, int]]:
    """Return (partition, elements) of a bucket's runs that belong to one partition, in order.

    ``bucket`` holds (offset in the flat group, elements) of each gradient in the order in which they were copied in.
    Neighbours of one partition are one run (``average_tensor`` in stage_1_and_2.py).
    """
    runs: list[tuple[int, int]] = []
    for offset, count in bucket:
        position, end = offset, offset + count
        while position < end:
            partition = position // partition_size
            step = min(end, (partition + 1) * partition_size) - position
            if merge and runs and runs[-1][0] == partition:
                runs[-1] = (partition, runs[-1][1] + step)
            else:
                runs.append((partition, step))
            position += step
    return runs


def sub_groups(partitions: Sequence[int], sub_group_size: int) -> list[range]:
    """Return the parameters that are stepped together (``_create_fp16_sub_groups`` in stage3.py)."""
    if sub_group_size >= sum(partitions):
        return [range(len(partitions))] if partitions else []
    groups, start, filled = [], 0, 0
    for index, count in enumerate(partitions):
        filled += count
        if filled >= sub_group_size or index == len(partitions) - 1:
            groups.append(range(start, index + 1))
            start, filled = index + 1, 0
    return groups


# --- instructions ------------------------------------------------------------------------------


@cache
def flat_tensor(num_elements: int, dtype: DType) -> Tensor:
    return Tensor("flat", (Dim("numel", num_elements),), dtype)


@lru_cache(maxsize=4096)
def pointwise(op: str, kind: str, reads: tuple[Flat, ...], writes: tuple[Flat, ...], stream: str = COMPUTE) -> Compute:
    """Return a kernel over flat tensors; equal ones are the same object."""
    kernel = Pointwise(kind, tuple(flat_tensor(*r) for r in reads), tuple(flat_tensor(*w) for w in writes))
    return Compute(op, kernel, stream)


@lru_cache(maxsize=4096)
def copy(op: str, num_elements: int, source: DType, target: DType, stream: str = COMPUTE) -> Compute:
    return pointwise(op, "copy", ((num_elements, source),), ((num_elements, target),), stream)


@lru_cache(maxsize=4096)
def in_place(op: str, num_elements: int, dtype: DType, stream: str = COMPUTE) -> Compute:
    return pointwise(op, "elementwise", ((num_elements, dtype),), ((num_elements, dtype),), stream)


@lru_cache(maxsize=4096)
def accumulate(op: str, num_elements: int, source: DType, target: DType, stream: str = COMPUTE) -> Compute:
    """``target += source``."""
    return pointwise(
        op, "elementwise", ((num_elements, source), (num_elements, target)), ((num_elements, target),), stream
    )


@lru_cache(maxsize=4096)
def record(event: str, stream: str) -> Record:
    return Record(event, stream)


@lru_cache(maxsize=4096)
def wait(event: str, stream: str) -> Wait:
    return Wait(event, stream)


@cache
def wait_stream(waiter: str, other: str) -> tuple[Instruction, ...]:
    """``waiter.wait_stream(other)``: an event recorded now; nothing where both are one stream."""
    if waiter == other:
        return ()
    event = f"{waiter} after {other}"
    return record(event, other), wait(event, waiter)


@cache
def host_sync(event: str, stream: str = COMPUTE) -> tuple[Instruction, ...]:
    """The host reads a value or synchronises with a stream: it goes on when all issued there is done."""
    return record(event, stream), HostWait(event)


class Communicator:
    """Collectives of the data-parallel group, on the streams that torch and NCCL put them on.

    A call with ``async_op`` runs on the process group's own stream, which first waits for the current one; a blocking
    call runs on the current stream (ProcessGroupNCCL.cpp since PyTorch 2.8). NCCL launches the operations of one
    communicator through its device stream, so they run in order whatever streams they are on (``ncclLaunchPrepare`` and
    ``ncclLaunchFinish`` in NCCL's src/enqueue.cc): a change of stream waits for the last one's event.
    """

    def __init__(self, axis: str, num_ranks: int) -> None:
        self.axis = axis
        self.alone = num_ranks == 1
        self.stream = f"nccl:{axis}"
        self.last: tuple[str, str] | None = None

    def reset(self) -> None:
        """Forget the order: at a chunk's start everything before is done or ordered by the host."""
        self.last = None

    def blocking(self, name: str, kind: CollectiveKind, num_bytes: int, dtype: DType, stream: str) -> list[Instruction]:
        if self.alone:
            return []
        event = f"{self.axis} {stream}"
        out: list[Instruction] = self._order(stream)
        out.append(Collective(name, kind, self.axis, num_bytes, dtype, stream))
        out.append(record(event, stream))
        self.last = (event, stream)
        return out

    def asynchronous(
        self, name: str, kind: CollectiveKind, num_bytes: int, dtype: DType, current: str, event: str
    ) -> list[Instruction]:
        """``event`` is what the handle's ``wait()`` waits for."""
        if self.alone:
            return []
        out: list[Instruction] = [*wait_stream(self.stream, current), *self._order(self.stream)]
        out.append(Collective(name, kind, self.axis, num_bytes, dtype, self.stream))
        out.append(record(event, self.stream))
        self.last = (event, self.stream)
        return out

    def _order(self, stream: str) -> list[Instruction]:
        if self.last is None or self.last[1] == stream:
            return []
        return [wait(self.last[0], stream)]


# --- pieces of optimizer steps -----------------------------------------------------------------

NORM_BYTES = 8
"""Norms accumulate in fp64 (``get_norm_dtype`` in deepspeed/runtime/zero/utils.py)."""


class Steps:
    """Pieces of the optimizer step that the stages share. Keeps temporaries of one size as one storage."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.norms: dict[tuple[int, DType], tuple[Instruction, ...]] = {}

    def norm(self, gradients: Iterable[int], dtype: DType) -> list[Instruction]:
        """Return ``g.to(double).norm()`` for each gradient, then the sum over the rank (``get_grad_norm_direct``)."""
        out: list[Instruction] = []
        count = 0
        for num_elements in gradients:
            piece = self.norms.get((num_elements, dtype))
            if piece is None:
                double = Storage("norm.double", NORM_BYTES * num_elements, "temporary")
                piece = self.norms[num_elements, dtype] = (
                    Alloc(double),
                    pointwise("norm.cast", "elementwise", ((num_elements, dtype),), ((num_elements, "int64"),)),
                    pointwise("norm", "reduce", ((num_elements, "int64"),), ()),
                    Free(double),
                )
            out.extend(piece)
            count += 1
        out.append(pointwise("norm.sum", "reduce", ((count, "int64"),), ()))
        return out

    def finite(self, gradients: Iterable[int], dtype: DType, each_on_host: bool) -> list[Instruction]:
        """Return ``has_inf_or_nan`` of each gradient (deepspeed/runtime/utils.py: a minimum and maximum, no temporary).

        ``each_on_host``: the host reads every answer, as stage 0's ``CheckOverflow`` does.
        """
        out: list[Instruction] = []
        sync = host_sync("overflow")
        for num_elements in gradients:
            out.append(pointwise("overflow", "reduce", ((num_elements, dtype),), ()))
            if each_on_host:
                out.extend(sync)
        return out

    def states(self, parameters: Sequence[tuple[str, int]], on_host: bool = False) -> tuple[Storage, ...]:
        """Return the optimizer states of fp32 tensors; on the host they are pageable (``torch.zeros_like``)."""
        found = state_storages(self.plan.optimizer, parameters, "fp32")
        if on_host:
            return tuple(host_storage(s.name, s.num_bytes, category="optimizer") for s in found)
        return found

    def update(self, parameters: Sequence[tuple[str, int]]) -> list[Instruction]:
        """Return the optimizer's own step over fp32 tensors with fp32 gradients.

        FusedAdam is one multi-tensor kernel without temporaries (deepspeed/ops/adam/fused_adam.py).
        """
        if not self.plan.fused or self.plan.optimizer not in ("adam", "adamw", "lion"):
            return foreach_step(self.plan.optimizer, parameters, "fp32", "fp32")
        total = sum(count for _, count in parameters)
        one: Flat = (total, "fp32")
        if self.plan.optimizer == "lion":  # deepspeed/ops/lion/fused_lion.py
            return [pointwise("fused_lion", "optimizer", (one, one, one), (one, one))]
        return [pointwise("fused_adam", "optimizer", (one, one, one, one), (one, one, one))]


def flat_storage(name: str, num_elements: int, dtype: DType, category: Category, stream: str = COMPUTE) -> Storage:
    return Storage(name, num_elements * DTYPE_BYTES[dtype], category, stream=stream)


# --- host memory -------------------------------------------------------------------------------


def host_storage(name: str, num_bytes: int, pinned: bool = False, category: Category = "temporary") -> Storage:
    """Return memory of the node: page-locked by torch's ``CachingHostAllocator``, or pageable."""
    return Storage(name, num_bytes, category, stream="pinned" if pinned else "pageable", place="host")


def host_alloc(
    name: str, num_bytes: int, pinned: bool, category: Category = "optimizer"
) -> tuple[Storage, list[Instruction]]:
    """Return memory of the node that stays, and how it comes about: ``tensor.pin_memory()`` copies a pageable one."""
    kept = host_storage(name, num_bytes, pinned, category)
    if not pinned:
        return kept, [Alloc(kept)]
    pageable = host_storage(name, num_bytes)
    return kept, [Alloc(pageable), Alloc(kept), Free(pageable)]


@lru_cache(maxsize=4096)
def to_host(name: str, num_bytes: int, stream: str = COMPUTE) -> Copy:
    return Copy(name, "device_to_host", num_bytes, stream)


@lru_cache(maxsize=4096)
def to_gpu(name: str, num_bytes: int, stream: str = COMPUTE) -> Copy:
    return Copy(name, "host_to_device", num_bytes, stream)


def host_update(optimizer: str, num_elements: int) -> HostCompute:
    """Return the optimizer's step on the CPU: DeepSpeedCPUAdam (deepspeed/ops/adam/cpu_adam.py), torch's own SGD."""
    kind = "cpu_adam" if optimizer in ("adam", "adamw") else "cpu_sgd"
    return HostCompute(f"{kind} step", kind, num_elements)


def host_torch_update(optimizer: str, implementation: str, num_elements: int) -> HostCompute:
    """Return the step of torch's own optimizer on the CPU, where foreach is a loop over tensors, unless it is fused.

    foreach is for parameters on accelerators only (``_default_to_fused_or_foreach``, torch/optim/optimizer.py); the
    fused AdamW of the CPU is one pass (aten/src/ATen/native/cpu/FusedAdamKernel.cpp), as DeepSpeed's is.
    """
    if optimizer.startswith("sgd"):
        return HostCompute(optimizer, "cpu_sgd", num_elements)
    return HostCompute(optimizer, "cpu_adam" if implementation == "fused" else "cpu_torch_adam", num_elements)


def host_cast(num_elements: int, dtype: DType) -> HostCompute:
    """Return the copy of fp32 numbers into the model's dtype, on the CPU."""
    return HostCompute("update parameters", "cpu_copy" if dtype == "fp32" else "cpu_cast", num_elements)
