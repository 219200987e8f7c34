"""ZeRO++: ZeRO 3 whose parameters are gathered within a node, and whose wires carry 8 and 4 bits.

Source: deepspeed/runtime/zero/partition_parameters.py, runtime/comm/coalesced_collectives.py and utils/groups.py of
DeepSpeed 0.19.8; Wang et al., "ZeRO++: Extremely Efficient Collective Communication for Giant Model Training", 2023.

* hpZ (``zero_hpz_partition_size``): a parameter that is let go leaves a secondary partition behind, cut by the ranks of
  its group; until the end of the step it is gathered from there. The host waits each time that one is made.
* qwZ (``zero_quantized_weights``): a gather moves 8-bit codes and one fp32 scale for each group of numbers.
* qgZ (``zero_quantized_gradients``): each matrix is reduced alone, as 4-bit codes: an all-to-all within a node, a sum,
  an all-to-all between nodes, a sum. Vectors, and matrices that do not divide, are reduce-scattered, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import ceil

from sim.interop.deepspeed_config import DeepSpeedSettings
from sim.ir.ledger import DTYPE_BYTES, Layer
from sim.ir.program import COMPUTE, Alloc, Chunk, Free, Instruction, Storage
from sim.parallel.frameworks.deepspeed_stage3 import Stage3, _Handle
from sim.parallel.frameworks.flat import (
    Communicator,
    Trained,
    accumulate,
    copy,
    flat_storage,
    host_sync,
    in_place,
    pointwise,
    wait,
)
from sim.parallel.frameworks.plan import Plan
from sim.parallel.mesh import across, within

TARGET_GROUP_SIZE = 8000
"""``CUDAQuantizer.target_group_size``: a scale for at most so many weights, where the numbers divide."""


class Stage3Plus(Stage3):
    """Stage 3 with any of ZeRO++'s three parts."""

    def __init__(self, layers: Sequence[Layer], settings: DeepSpeedSettings, plan: Plan) -> None:
        super().__init__(layers, settings, plan)
        self.near = min(settings.zero_hpz_partition_size, plan.dp)
        self.nearby = Communicator(within(plan.dp_axis, self.near), self.near)
        per_node = min(plan.num_gpus_per_node, plan.dp)
        self.num_nodes = plan.dp // per_node
        self.in_node = Communicator(within(plan.dp_axis, per_node), per_node)
        self.between_nodes = Communicator(across(plan.dp_axis, per_node), self.num_nodes)
        shares = [count * plan.dp // self.near for count in self.partitions]
        self.secondary = [
            flat_storage(f"{p.name} (secondary)", share, self.dtype, "parameters")
            for p, share in zip(self.parameters, shares, strict=True)
        ]
        self.kept = [False] * len(self.parameters)
        self.matrices = {
            self.owner[index, p.name].index: (p.shape[0].size, p.num_elements // p.shape[0].size)
            for index, layer in enumerate(self.layers)
            for p in layer.parameters
            if len(p.shape) > 1
        }

    def begin_microbatch(self, first: bool, last: bool) -> None:
        super().begin_microbatch(first, last)
        for communicator in (self.nearby, self.in_node, self.between_nodes):
            communicator.reset()
        if first:  # invalidate_secondary_tensor(), at the end of the last step
            self.kept = [False] * len(self.parameters)

    # hpZ and qwZ: gathers

    def _gather(self, group: list[int], out: list[Instruction]) -> None:
        if self.near == 1:
            super()._gather(group, out)
            return
        for kept in (True, False):
            part = [index for index in group if self.kept[index] is kept]
            if part:
                super()._gather(part, out)

    def _launch(self, group: list[int], out: list[Instruction]) -> _Handle:
        near = self.kept[group[0]]
        if self.plan.dp == 1 or not (near or self.settings.zero_quantized_weights):
            self.moved = True
            return super()._launch(group, out)
        stream, alone = self.gather_stream, len(group) == 1
        nccl, ranks = (self.nearby, self.near) if near else (self.nccl, self.plan.dp)
        event = f"gather.{self.num_gathers}"
        self.num_gathers += 1
        count = sum(self.partitions[index] for index in group) * self.plan.dp // ranks
        name = self.parameters[group[0]].name if alone else "parameters"
        self.moved = True
        if self.settings.zero_quantized_weights:
            return self._launch_quantized(group, count, ranks, nccl, name, event, out)
        held: tuple[Storage, ...] = ()
        if alone:
            out.append(self.allocs[group[0]])
        else:
            held = (flat_storage("gathered", count * ranks, self.dtype, "buffers", stream),)
            out += [Alloc(held[0]), copy("gather.flatten", count, self.dtype, self.dtype, stream)]
        size = count * ranks * self.element
        out.extend(nccl.asynchronous(name, "all_gather", size, self.dtype, stream, event))
        return _Handle(group, held, event, alone)

    def _launch_quantized(
        self,
        group: list[int],
        count: int,
        ranks: int,
        nccl: Communicator,
        name: str,
        event: str,
        out: list[Instruction],
    ) -> _Handle:
        """``CUDAQuantizer.quantize``: its kernel reads fp16, so bf16 is cast before and after."""
        stream, alone = self.gather_stream, len(group) == 1
        codes = flat_storage("gathered.int8", count * ranks, "uint8", "buffers", stream)
        out.append(Alloc(codes))
        passing: list[Storage] = []
        if not alone:
            passing.append(flat_storage("partitions", count, self.dtype, "buffers", stream))
            out += [Alloc(passing[-1]), copy("gather.flatten", count, self.dtype, self.dtype, stream)]
        if self.dtype != "fp16":
            passing.append(flat_storage("partitions.half", count, "fp16", "buffers", stream))
            out += [Alloc(passing[-1]), copy("quantize.cast", count, self.dtype, "fp16", stream)]
        scales = quantization_groups(count)
        own = flat_storage("partitions.int8", count, "uint8", "buffers", stream)
        own_scales = flat_storage("partitions.scales", scales, "fp32", "buffers", stream)
        every = flat_storage("gathered.scales", scales * ranks, "fp32", "buffers", stream)
        kernel = pointwise("quantize", "elementwise", ((count, "fp16"),), ((count, "uint8"), (scales, "fp32")), stream)
        out += [Alloc(own_scales), Alloc(own), kernel, *(Free(s) for s in passing), Alloc(every)]
        out.extend(nccl.asynchronous(name, "all_gather", codes.num_bytes, "uint8", stream, f"{event}.int8"))
        out.extend(nccl.asynchronous("scales", "all_gather", every.num_bytes, "fp32", stream, event))
        return _Handle(group, (codes, every), event, alone, (own, own_scales))

    def _arrive(self, handle: _Handle, out: list[Instruction]) -> None:
        if not handle.held or handle.held[0].name != "gathered.int8":
            super()._arrive(handle, out)
            return
        stream = self.gather_stream
        self.moved = True
        total, scales = handle.held[0].num_bytes, handle.held[1].num_bytes // DTYPE_BYTES["fp32"]
        out.append(wait(handle.event, stream))
        kernel = pointwise(
            "dequantize", "elementwise", ((total, "uint8"), (scales, "fp32")), ((total, "fp16"),), stream
        )
        half = flat_storage("dequantized", total, "fp16", "buffers", stream)
        if handle.alone and self.dtype == "fp16":
            out += [self.allocs[handle.group[0]], kernel]
            return
        out += [Alloc(half), kernel]
        if handle.alone:
            out += [
                self.allocs[handle.group[0]],
                copy("dequantize.cast", total, "fp16", self.dtype, stream),
                Free(half),
            ]
            return
        handle.held = (*handle.held, half)
        for index in handle.group:
            size = self.sizes[index]
            if self.dtype == "fp16":
                out += [self.allocs[index], copy("gather.unflatten", size, "fp16", "fp16", stream)]
                continue
            piece = flat_storage("unflattened", size, "fp16", "buffers", stream)
            out += [Alloc(piece), copy("gather.unflatten", size, "fp16", "fp16", stream), self.allocs[index]]
            out += [copy("dequantize.cast", size, "fp16", self.dtype, stream), Free(piece)]

    def _drop(self, index: int, out: list[Instruction]) -> None:
        if self.near > 1 and not self.kept[index]:
            self._keep(index, out)
        super()._drop(index, out)

    def _keep(self, index: int, out: list[Instruction]) -> None:
        """``_partition_param_sec``: zeros, the rank's part, and the host waits until it is there."""
        self.kept[index] = True
        secondary = self.secondary[index]
        count = secondary.num_bytes // self.element
        out.append(Alloc(secondary))
        out.append(pointwise("secondary.zero", "elementwise", (), ((count, self.dtype),)))
        out.append(copy("secondary", count, self.dtype, self.dtype))
        out.extend(host_sync("secondary", COMPUTE))

    def optimizer_step(self, first_step: bool) -> Chunk:
        """Small parameters leave secondary partitions too; all go when the step is over.

        DeepSpeed also makes them when it cuts the model for the first time, so the very first forward gathers nearby.
        """
        if self.near == 1:
            return super().optimizer_step(first_step)
        before: list[Instruction] = []
        kept = list(self.kept)
        for index, keeps in enumerate(self.persistent):
            if keeps and not kept[index]:
                self._keep(index, before)
        after = [Free(self.secondary[index]) for index, made in enumerate(self.kept) if made]
        self.kept = kept  # the step may be written once more
        return (*before, *super().optimizer_step(first_step), *after)

    # qgZ: reductions

    def _scatter(
        self,
        bucket: Sequence[tuple[Trained, Storage | None]],
        total: int,
        temporary: list[Storage],
        out: list[Instruction],
    ) -> None:
        """``all_to_all_quant_reduce``, where there is more than one node."""
        if not self.settings.zero_quantized_gradients or self.num_nodes == 1:
            super()._scatter(bucket, total, temporary, out)
            return
        for trained, _ in bucket:
            if trained.index in self.matrices and trained.num_elements % (2 * self.plan.dp) == 0:
                self._all_to_all(trained, temporary, out)
            else:
                super()._scatter([(trained, None)], trained.num_elements, temporary, out)

    def _all_to_all(self, trained: Trained, temporary: list[Storage], out: list[Instruction]) -> None:
        """Two all-to-alls of 4-bit codes and their scales; what is left is the rank's partition, in fp16."""
        stream, count, dtype = self.reduce_stream, trained.num_elements, self.communication_dtype
        per_node = self.plan.dp // self.num_nodes
        groups = max(*self.matrices[trained.index], self.plan.dp)

        def buffer(name: str, num_elements: int, kind: str) -> Storage:
            storage = flat_storage(name, num_elements, "fp32" if kind == "scales" else "uint8", "buffers", stream)
            out.append(Alloc(storage))
            return storage

        def exchange(communicator: Communicator, codes: Storage, scales: Storage) -> tuple[Storage, Storage]:
            taken = buffer("int4.received", codes.num_bytes, "codes")
            with_scales = buffer("scales.received", scales.num_bytes // 4, "scales")
            for name, storage in (("gradients", codes), ("scales", scales)):
                kind = "uint8" if storage is codes else "fp32"
                out.extend(communicator.blocking(name, "all_to_all", storage.num_bytes, kind, stream))  # type: ignore[arg-type]
            return taken, with_scales

        scales = buffer("scales", groups, "scales")
        codes = buffer("int4", count // 2, "codes")
        reads, writes = (count, dtype), ((count // 2, "uint8"), (groups, "fp32"))
        out.append(pointwise("quantize", "elementwise", (reads,), writes, stream))
        taken, with_scales = exchange(self.in_node, codes, scales)
        part, fewer = count // per_node, max(1, groups // per_node)
        sums_scales = buffer("scales.summed", fewer, "scales")
        sums = buffer("int4.summed", part // 2, "codes")
        out.append(
            pointwise(
                "quantized reduction",
                "elementwise",
                ((count // 2, "uint8"), (groups, "fp32")),
                ((part // 2, "uint8"), (fewer, "fp32")),
                stream,
            )
        )
        last, last_scales = exchange(self.between_nodes, sums, sums_scales)
        whole = flat_storage("dequantized", part, "fp16", "buffers", stream)
        mine = flat_storage("summed", part // self.num_nodes, "fp16", "buffers", stream)
        out += [
            Alloc(whole),
            pointwise("dequantize", "elementwise", ((part // 2, "uint8"), (fewer, "fp32")), ((part, "fp16"),), stream),
            Alloc(mine),
            *(
                accumulate("sum of nodes", part // self.num_nodes, "fp16", "fp16", stream)
                for _ in range(self.num_nodes)
            ),
            in_place("average", part // self.num_nodes, "fp16", stream),
        ]
        out += [Free(s) for s in (whole, last_scales, last, sums, sums_scales, with_scales, taken, codes, scales)]
        temporary.append(mine)


@cache
def quantization_groups(num_elements: int) -> int:
    """Return how many scales ``CUDAQuantizer.quantize`` makes of so many numbers.

    The fewest groups of at most 8000 that divide them into multiples of 8, halved while that keeps them above 8000.
    Numbers that nothing divides, which DeepSpeed refuses, take groups of 8000.
    """
    least = ceil(num_elements / TARGET_GROUP_SIZE)
    groups = least
    while groups < num_elements and num_elements % (8 * groups):
        groups += 1
    if groups >= num_elements:
        return least
    while num_elements % (16 * groups) == 0 and num_elements / groups > TARGET_GROUP_SIZE:
        groups *= 2
    return groups
