"""ZeRO 1 and 2: flat 16-bit parameters on every rank, fp32 master and optimizer states in partitions.

Source: deepspeed/runtime/zero/stage_1_and_2.py and runtime/utils.py of DeepSpeed 0.19.8.

* The flat group is aligned to twice the ranks; a rank's partition may begin and end inside a parameter.
* Gradients are copied into a bucket (IPG) as they become ready, and the bucket is reduced when the next does not fit.
  Stage 2 does so in every microbatch, stage 1 in the last (without ``overlap_comm``: after it, in module order).
* A bucket is all-reduced whole (``use_multi_rank_bucket_allreduce``), or each partition's part is reduced to its owner.
* Of what was reduced the rank copies out the gradients of its partition, those at the borders in full.
* The step flattens them, casts to fp32, steps, and gathers the flat group with one all-gather.
* ``offload_optimizer``: gradients of the partition go straight from the bucket to the host, master, moments and fp32
  gradients live there, DeepSpeedCPUAdam steps, and the 16-bit partition comes back before the all-gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.interop.deepspeed_config import DeepSpeedSettings
from sim.ir.ledger import DTYPE_BYTES, DType, Layer
from sim.ir.program import (
    COMPUTE,
    Alloc,
    Chunk,
    CollectiveKind,
    Free,
    HostCompute,
    HostWait,
    Instruction,
    Mark,
    Storage,
)
from sim.parallel.frameworks.deepspeed_base import DeepSpeed, communication_dtype, named_dtype
from sim.parallel.frameworks.flat import (
    NORM_BYTES,
    Trained,
    accumulate,
    copy,
    flat_group,
    flat_storage,
    fullest_rank,
    host_alloc,
    host_cast,
    host_storage,
    host_sync,
    host_update,
    in_place,
    owned,
    pointwise,
    record,
    slices,
    to_gpu,
    to_host,
    wait_stream,
)
from sim.parallel.frameworks.plan import Plan

REDUCTION_STREAM = "reduction"


class Stage12(DeepSpeed):
    """Hooks, setup and optimizer step of ZeRO 1 and 2."""

    def __init__(self, layers: Sequence[Layer], settings: DeepSpeedSettings, plan: Plan) -> None:
        super().__init__(layers, settings, plan)
        sizes = [p.num_elements for p in self.parameters]
        self.flat = flat_group(self.num_elements, plan.dp)
        self.partition = self.flat // plan.dp
        self.rank = fullest_rank(sizes, self.partition, plan.dp) if plan.dp_rank is None else plan.dp_rank
        self.mine, self.whole = owned(sizes, self.partition, self.rank)
        self.offsets: list[int] = []
        offset = 0
        for count in sizes:
            self.offsets.append(offset)
            offset += count
        self.pieces = dict(zip(self.mine, self._my_slices(), strict=True))
        self.offload = settings.offload_optimizer == "cpu"
        self.contiguous = settings.contiguous_gradients or self.offload
        self.copies_pending = False
        self.partitions_gradients = settings.stage == 2
        self.stream = REDUCTION_STREAM if settings.overlap_comm else COMPUTE
        self.communication_dtype = communication_dtype(settings, plan.parameter_dtype)
        accumulation = named_dtype(settings.grad_accum_dtype) or plan.parameter_dtype
        # fp32 accumulation of 16-bit gradients: the partition is one fp32 buffer that reduced slices are added to
        self.compact = accumulation == "fp32" and plan.parameter_dtype != "fp32" and settings.stage == 2
        self.accumulation_dtype: DType = accumulation if self.compact else plan.parameter_dtype
        self.buckets: list[Storage] = []
        self.filled: list[tuple[Trained, Storage | None]] = []
        self.elements = 0
        self.averaged: Storage | None = None
        self.reduced: Storage | None = None

    # setup

    def setup(self) -> Chunk:
        """The model, its flat copy in place of it, the fp32 partition; states come with the first step."""
        out: list[Instruction] = [Mark("setup", "model")]
        model = self.model_storages()
        out.extend(Alloc(s) for s in model.values())
        out.extend(self.model_buffers())
        out.append(Mark("setup", "optimizer"))
        out.extend(self._flatten(list(model.values())))
        if self.offload:
            out.extend(self._setup_offload())
            return tuple(out)
        master = flat_storage("master.partition", self.partition, "fp32", "optimizer")
        if self.dtype == "fp32":
            out.append(Alloc(master))  # a copy all the same: .clone() before .to(float32)
        else:
            clone = flat_storage("clone", self.partition, self.dtype, "temporary")
            out += [Alloc(clone), Alloc(master), copy("master", self.partition, self.dtype, "fp32"), Free(clone)]
        zeros = flat_storage("grad.partition", self.partition, "fp32", "temporary")
        out += [Alloc(zeros), Free(zeros)]
        return tuple(out)

    def _setup_offload(self) -> list[Instruction]:
        """What ``cpu_offload`` makes: master, 16-bit partition, gradients; on both sides a buffer for the largest one.

        With several microbatches stage 2 also keeps each gradient of the partition, in full, in 16 bit. DeepSpeed makes
        these in the first backward.
        """
        pinned, count = self.settings.pin_memory, self.partition
        clone = flat_storage("clone", count, self.dtype, "temporary")
        out: list[Instruction] = [Alloc(clone)]
        staged = host_storage("clone", count * self.element)  # a blocking copy is cast on the CPU
        if self.dtype != "fp32":
            out.append(Alloc(staged))
        out += host_alloc("master.partition", 4 * count, pinned)[1]
        if self.dtype != "fp32":
            out.append(Free(staged))
        out += host_alloc("parameters.partition", self.element * count, pinned, "parameters")[1]
        out.append(Free(clone))
        largest = self.element * max((p.num_elements for p in self.parameters), default=0)
        out += host_alloc("grad.largest", largest, pinned, "buffers")[1]
        out.append(Alloc(Storage("grad.largest", largest, "buffers")))
        out += host_alloc("grad.partition", 4 * count, pinned, "gradients")[1]
        if self._accumulates_on_host:
            for index in self.mine:
                size = self.parameters[index].num_elements * self.element
                out += host_alloc("grad.accumulated", size, pinned, "gradients")[1]
        return out

    @property
    def _accumulates_on_host(self) -> bool:
        return self.offload and self.partitions_gradients and not self.compact and self.plan.num_microbatches > 1

    def _flatten(self, model: Sequence[Storage]) -> list[Instruction]:
        """``flatten_on_accelerator``: on the GPU where the flat copy fits beside the model, else on the CPU.

        On the CPU each parameter leaves the GPU before the flat copy, made there, comes back whole. NCCL's buffers are
        not counted: what is free is the GPU less its context, the model and its buffers.
        """
        flat = flat_storage("parameters.flat", self.flat, self.dtype, "parameters")
        held = sum(s.num_bytes for s in model) + sum(t.num_bytes for layer in self.layers for t in layer.buffers)
        if not self.plan.gpu_memory_bytes or self.plan.gpu_memory_bytes - held >= flat.num_bytes:
            out: list[Instruction] = [Alloc(flat), copy("flatten", self.flat, self.dtype, self.dtype)]
            out.extend(Free(s) for s in model)
            return out
        out = []
        ones = []
        aside = [host_storage(s.name, s.num_bytes) for s in model]
        for storage, host in zip(model, aside, strict=True):
            ones.append(flat_storage("one", 1, "fp32", "temporary"))  # param.data = torch.empty(1)
            out += [Alloc(host), Alloc(ones[-1]), Free(storage)]
        whole = host_storage("parameters.flat", flat.num_bytes)
        out.append(Alloc(whole))
        out.extend(Free(host) for host in aside)
        out += [Alloc(flat), Free(whole)]
        out.extend(Free(one) for one in ones)
        return out

    # passes

    def begin_microbatch(self, first: bool, last: bool) -> None:
        super().begin_microbatch(first, last)
        if first:
            self.copies_pending = False
            self.gradients = {}
            self.averaged = None
            self.buckets = []
        self.filled = []
        self.elements = 0
        self.reduced = None

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        trained = self.owner[layer, parameter]
        out = self._open_buckets()
        if self.partitions_gradients or (self.settings.overlap_comm and self.last):
            if not self.first and not self.partitions_gradients:
                out += self.keep(trained, gradient)
                gradient = self.gradients.pop(trained.index)
            out.extend(self._fill(trained, gradient))
            return out
        if self.first and self.last:
            self.gradients[trained.index] = gradient
            return out
        return out + self.keep(trained, gradient)

    def end_of_backward(self) -> Iterable[Instruction]:
        """``independent_gradient_partition_epilogue``."""
        if not (self.partitions_gradients or self.last):
            return ()
        out: list[Instruction] = []
        if self.gradients:  # stage 1 without overlap: all of them now, in module order
            for trained in self.parameters:
                out.extend(self._fill(trained, self.gradients.pop(trained.index)))
        out.extend(self._reduce())
        if self.settings.overlap_comm:
            out.extend(wait_stream(COMPUTE, self.stream))
            out.extend(host_sync("reduced"))
        if self.reduced is not None:
            if self.averaged is None:
                self.averaged = self.reduced
            else:
                for index in self.mine:
                    count = self.parameters[index].num_elements
                    out.append(accumulate("accumulate partition", count, self.dtype, self.dtype))
                out.append(Free(self.reduced))
            self.reduced = None
        out.extend(Free(s) for s in self.buckets)
        self.buckets = []
        return out

    def _open_buckets(self) -> list[Instruction]:
        """``setup_buckets``, with the first gradient: they stay until an epilogue drops them."""
        if self.buckets or not self.contiguous:
            return []
        size = self.settings.reduce_bucket_size
        number = 2 if self.settings.overlap_comm else 1
        self.buckets = [flat_storage(f"ipg.{index}", size, self.dtype, "buffers") for index in range(number)]
        return [Alloc(bucket) for bucket in self.buckets]

    def _fill(self, trained: Trained, gradient: Storage) -> list[Instruction]:
        """``reduce_independent_p_g_buckets_and_remove_grads``."""
        out: list[Instruction] = []
        count, size = trained.num_elements, self.settings.reduce_bucket_size
        if self.elements + count > size:
            out.extend(self._reduce())
        if self.contiguous and count <= size:
            out.append(copy("gradient to bucket", count, self.dtype, self.dtype))
            out.append(Free(gradient))
            self.filled.append((trained, None))
        else:
            self.filled.append((trained, gradient))
        self.elements += count
        return out

    def _reduce(self) -> list[Instruction]:
        """``reduce_ipg_grads``: reduce what is in the bucket, copy out what is this rank's."""
        filled, total = self.filled, self.elements
        if not filled:
            return []
        self.filled, self.elements = [], 0
        stream = self.stream
        # the reduction waits for the copies, and the next copies for the reductions before this one
        out: list[Instruction] = [*wait_stream(stream, COMPUTE), *wait_stream(COMPUTE, stream)]
        if not self.contiguous:
            out.extend(self._all_reduce([t.num_elements for t, _ in filled], total, stream, average=True))
        elif self.settings.reduce_scatter:
            out.append(in_place("bucket.average", total, self.dtype, stream))
            out.extend(self._reduce_slices(filled, stream))
        else:
            out.extend(self._cast_and_reduce("all_reduce", "gradients", total, stream))
            if self.plan.dp > 1:
                out.append(in_place("bucket.average", total, self.dtype, stream))
        if not (self.contiguous and self.settings.reduce_scatter):
            runs = slices(((self.offsets[t.index], t.num_elements) for t, _ in filled), self.partition)
            out.extend(self._add_compact(sum(count for rank, count in runs if rank == self.rank), stream))
        for trained, gradient in filled:
            out.extend(self._copy_out(trained, stream))
            if gradient is not None:
                out.append(Free(gradient))
        return out

    def _reduce_slices(self, filled: Sequence[tuple[Trained, Storage | None]], stream: str) -> list[Instruction]:
        """``average_tensor``: the bucket's runs, reduced together or by destination."""
        runs = slices(((self.offsets[t.index], t.num_elements) for t, _ in filled), self.partition)
        groups: dict[int, list[tuple[int, int]]] = {}
        for partition, count in runs:
            destination = -1 if self.settings.use_multi_rank_bucket_allreduce else partition
            groups.setdefault(destination, []).append((partition, count))
        out: list[Instruction] = []
        for destination, members in groups.items():
            group: list[tuple[int, int]] = []
            for member in members:
                group.append(member)
                if sum(count for _, count in group) > self.settings.reduce_bucket_size:
                    out.extend(self._reduce_group(group, destination, stream))
                    group = []
            if group:
                out.extend(self._reduce_group(group, destination, stream))
        return out

    def _reduce_group(self, group: Sequence[tuple[int, int]], destination: int, stream: str) -> list[Instruction]:
        out: list[Instruction] = []
        if destination >= 0 and self.settings.overlap_comm:
            out += [*wait_stream(COMPUTE, stream), *host_sync("reduced")]  # accelerator.synchronize()
        total = sum(count for _, count in group)
        kept = sum(count for partition, count in group if partition == self.rank)
        flat = flat_storage("bucket.flat", total, self.dtype, "buffers", stream) if len(group) > 1 else None
        if flat is not None:
            out += [Alloc(flat), copy("bucket.flatten", total, self.dtype, self.dtype, stream)]
        kind: CollectiveKind = "all_reduce" if destination < 0 else "reduce"
        out.extend(self._cast_and_reduce(kind, "gradients", total, stream))
        if kept:
            out.extend(self._add_compact(kept, stream))
            out.append(copy("bucket.copy back", kept, self.dtype, self.dtype, stream))
        if flat is not None:
            out.append(Free(flat))
        return out

    def _add_compact(self, count: int, stream: str) -> list[Instruction]:
        """With fp32 accumulation: add what was reduced of this rank's partition to its one fp32 buffer."""
        if not self.compact or not count:
            return []
        out: list[Instruction] = []
        if self.averaged is None:
            self.averaged = flat_storage("grad.partition", self.partition, "fp32", "gradients", stream)
            out.append(Alloc(self.averaged))
        cast = flat_storage("grad.cast", count, "fp32", "temporary", stream)
        out += [Alloc(cast), copy("grad.cast", count, self.dtype, "fp32", stream)]
        out += [accumulate("accumulate partition", count, "fp32", "fp32", stream), Free(cast)]
        return out

    def _cast_and_reduce(self, kind: CollectiveKind, name: str, count: int, stream: str) -> list[Instruction]:
        """One collective in the communication dtype; where that is not the gradients', through a cast copy."""
        dtype = self.communication_dtype
        collective = self.nccl.blocking(name, kind, count * DTYPE_BYTES[dtype], dtype, stream)
        if dtype == self.dtype:
            return collective
        cast = flat_storage("bucket.cast", count, dtype, "buffers", stream)
        return [
            Alloc(cast),
            copy("bucket.cast", count, self.dtype, dtype, stream),
            *collective,
            copy("bucket.cast back", count, dtype, self.dtype, stream),
            Free(cast),
        ]

    def _all_reduce(self, bucket: Sequence[int], total: int, stream: str, average: bool) -> list[Instruction]:
        """``buffered_reduce_fallback``: without contiguous gradients the bucket is flattened and copied back."""
        flat = flat_storage("bucket.flat", total, self.dtype, "buffers", stream)
        out: list[Instruction] = []
        if len(bucket) > 1:
            out += [Alloc(flat), copy("bucket.flatten", total, self.dtype, self.dtype, stream)]
        if average:
            out.append(in_place("bucket.average", total, self.dtype, stream))
        out.extend(self._cast_and_reduce("all_reduce", "gradients", total, stream))
        out.extend(copy("bucket.copy back", count, self.dtype, self.dtype, stream) for count in bucket)
        if len(bucket) > 1:
            out.append(Free(flat))
        return out

    def _copy_out(self, trained: Trained, stream: str) -> list[Instruction]:
        """``copy_grads_in_partition``: one buffer for all gradients that touch the partition, in full."""
        if trained.index not in self.mine:
            return []
        if self.offload:
            return self._copy_to_host(trained, stream)
        if self.compact:
            return []
        out: list[Instruction] = []
        if self.reduced is None:
            self.reduced = flat_storage("grad.partition", self.whole, self.dtype, "gradients", stream)
            out.append(Alloc(self.reduced))
        out.append(copy("gradient to partition", trained.num_elements, self.dtype, self.dtype, stream))
        return out

    def _copy_to_host(self, trained: Trained, stream: str) -> list[Instruction]:
        """``copy_grads_in_partition`` with ``cpu_offload``: from the bucket, on the stream of the reduction.

        In between, the gradient goes to the host and back to be added to (``async_accumulate_grad_in_cpu_via_gpu``). At
        the boundary its norm is taken, the host reads whether it is finite, and it leaves in fp32.
        """
        count, piece = trained.num_elements, self.pieces[trained.index]
        dtype = self.accumulation_dtype
        out: list[Instruction] = []
        if self._accumulates_on_host:
            if self.copies_pending:
                out.append(HostWait("offloaded"))
            if not self.first:
                out.append(to_gpu("gradient from host", count * self.element, stream))
                out.append(accumulate("accumulate gradient", count, dtype, dtype, stream))
            out.append(to_host("gradient to host", count * self.element, stream))
            out.append(record("offloaded", stream))
            self.copies_pending = True
        if not self.last:
            return out
        double = Storage("norm.double", NORM_BYTES * piece, "temporary", stream=stream)
        out += [
            Alloc(double),
            pointwise("norm.cast", "elementwise", ((piece, dtype),), ((piece, "int64"),), stream),
            pointwise("norm", "reduce", ((piece, "int64"),), (), stream),
            Free(double),
            pointwise("overflow", "reduce", ((piece if self.compact else count, dtype),), (), stream),
            *host_sync("overflow", stream),
        ]
        size = DTYPE_BYTES["fp32"] * piece
        if dtype == "fp32":
            out.append(to_host("gradient to host", size, stream))
        else:
            cast = flat_storage("grad.cast", piece, "fp32", "temporary", stream)
            out += [Alloc(cast), copy("grad.cast", piece, dtype, "fp32", stream)]
            out += [to_host("gradient to host", size, stream), Free(cast)]
        out.append(record("offloaded", stream))
        self.copies_pending = True
        return out

    # optimizer

    def optimizer_step(self, first_step: bool) -> Chunk:
        self.nccl.reset()
        if self.offload:
            return self._step_on_host(first_step)
        out: list[Instruction] = [Mark("optimizer", "norm")]
        mine = self._my_slices()
        if self.dtype != "fp32":  # bf16 too: bf16.check_grad_overflow is on by default
            out.extend(self.steps.finite(mine, self.accumulation_dtype, each_on_host=False))
            out.extend(self.nccl.blocking("overflow", "all_reduce", 1, "uint8", COMPUTE))
            out.extend(host_sync("overflow"))
        out.extend(self.steps.norm(mine, self.accumulation_dtype))
        out.extend(self.nccl.blocking("norm", "all_reduce", DTYPE_BYTES["fp32"], "fp32", COMPUTE))
        out.extend(host_sync("norm"))
        out.append(Mark("optimizer", "gradients"))
        gradient = self._fp32_gradient(mine, out)
        if self.clipping or self.plan.loss_scaling:
            out.append(in_place("unscale", self.partition, "fp32"))
        out.append(Mark("optimizer", "step"))
        stepped = [("partition", self.partition)]
        if first_step:
            out.extend(Alloc(s) for s in self.steps.states(stepped))
        out.extend(self.steps.update(stepped))
        out.append(Free(gradient))
        out.append(copy("update parameters", self.partition, "fp32", self.dtype))
        out.append(Mark("optimizer", "gather"))
        out.extend(self.nccl.blocking("parameters", "all_gather", self.flat * self.element, self.dtype, COMPUTE))
        return tuple(out)

    def _step_on_host(self, first_step: bool) -> Chunk:
        """The step with ``cpu_offload``: the host waits for the gradients, reads each one's norm, and updates."""
        count = self.partition
        out: list[Instruction] = [Mark("optimizer", "norm")]
        if self.copies_pending:
            out.append(HostWait("offloaded"))
        if self.dtype != "fp32":
            out.extend(self.nccl.blocking("overflow", "all_reduce", 1, "uint8", COMPUTE))
            out.extend(host_sync("overflow"))
        for _ in self.mine:  # param_norm.item()
            out.append(to_host("norm", NORM_BYTES))
            out.extend(host_sync("norm"))
        out.extend(self.nccl.blocking("norm", "all_reduce", DTYPE_BYTES["fp32"], "fp32", COMPUTE))
        out.extend(host_sync("norm"))
        out.append(Mark("optimizer", "gradients"))
        if self.clipping or self.plan.loss_scaling:
            out.append(HostCompute("unscale", "cpu_scale", count))
        out.append(Mark("optimizer", "step"))
        if first_step:
            out.extend(Alloc(s) for s in self.steps.states([("partition", count)], on_host=True))
        out.append(host_update(self.plan.optimizer, count))
        out.append(host_cast(count, self.dtype))
        out.append(to_gpu("parameters from host", count * self.element))
        if self.averaged is not None:
            out.append(Free(self.averaged))
        out.append(Mark("optimizer", "gather"))
        out.extend(self.nccl.blocking("parameters", "all_gather", self.flat * self.element, self.dtype, COMPUTE))
        return tuple(out)

    def _fp32_gradient(self, mine: Sequence[int], out: list[Instruction]) -> Storage:
        """Flatten the partition's gradients and cast them to fp32; what they were goes. One tensor alone is a view."""
        if self.compact:
            assert self.averaged is not None
            return self.averaged
        gradient = flat_storage("grad.fp32", self.partition, "fp32", "gradients")
        several = len(mine) != 1 or mine[0] < self.partition
        if self.dtype == "fp32":
            if not several:
                assert self.averaged is not None
                return self.averaged
            out += [Alloc(gradient), copy("grad.flatten", self.partition, "fp32", "fp32")]
        else:
            flat = flat_storage("grad.flat", self.partition, self.dtype, "gradients")
            if several:
                out += [Alloc(flat), copy("grad.flatten", self.partition, self.dtype, self.dtype)]
            out += [Alloc(gradient), copy("grad.cast", self.partition, self.dtype, "fp32")]
            if several:
                out.append(Free(flat))
        if self.averaged is not None:
            out.append(Free(self.averaged))
        return gradient

    def _my_slices(self) -> list[int]:
        """Return the elements of each gradient that lie in this rank's partition."""
        start, stop = self.rank * self.partition, (self.rank + 1) * self.partition
        return [
            min(stop, self.offsets[i] + self.parameters[i].num_elements) - max(start, self.offsets[i])
            for i in self.mine
        ]
