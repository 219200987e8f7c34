"""Megatron-FSDP: units of one transformer layer, flat shards, gathers and reductions a few units ahead.

Source: megatron/core/distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py and param_and_grad_buffer.py of Megatron-LM
(``--use-megatron-fsdp``), version 1 of the two there.

* A transformer layer is a unit. What no unit owns (embedding, final norm, output layer) is sharded too, but once
  gathered in a step it stays, in storage that is never given back.
* Bits of one unit travel together, coalesced: one gather, one reduce-scatter. A bucket is padded so that each rank's
  part is whole rows (``chunk_size_factor``).
* Forward and backward gather the unit at hand and those after it, until half the communication size is under way; the
  gather's stream waits for the compute stream and owns what it gathers into. Nothing is cast or copied: a gathered
  bucket is what the modules read.
* A unit is let go after its forward and after its backward; while it is run again for backward no other is gathered.
* Weight gradients are written into one bucket a unit, which exists from the first of them until it has been
  reduce-scattered in place and its shard added to the sharded gradients; before another is reduced, those before it are
  waited for, oldest first, down to the communication size. Every microbatch reduces.
* Parameters, their fp32 master, gradients and optimizer states are shards; with ``optim_grads`` (``zero: 2``) the
  parameters are whole and gathered in the first microbatch alone.
* ``--fp8-param-gather``: the weights of quantised linears are 8-bit shards, made from the master after each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import lcm

from sim.ir.ledger import DTYPE_BYTES, Kernel
from sim.ir.program import COMPUTE, Alloc, Compute, Free, Instruction, Mark, Storage
from sim.parallel.frameworks.flat import (
    Communicator,
    Key,
    accumulate,
    copy,
    flat_storage,
    in_place,
    padded,
    record,
    wait,
    wait_stream,
)
from sim.parallel.frameworks.fsdp2 import dim0
from sim.parallel.frameworks.megatron import Bucket, MegatronChunk, MegatronPlan, MegatronStage
from sim.parallel.quantise import cast_kernels
from sim.scenario.schema import MegatronSettings

GATHER_STREAM = "param_gather"
REDUCE_STREAM = "grad_reduce"
LEAST_COMMUNICATION = 1_000_000_000
"""Elements: ``suggested_communication_unit_size = max(1_000_000_000, 2 * elements of an average unit)``."""


@dataclass(slots=True, eq=False)
class Unit:
    """A bucket: parameters that travel together, and where they stand.

    ``num_elements``  padded over all ranks; ``low`` of them are gathered in 8 bits
    ``reshards``      a unit of its own, let go after each pass
    ``gathered``      what the modules read; ``gradients`` what backward writes
    ``missing``       parameters whose gradient is not there yet in this microbatch
    """

    name: str
    keys: tuple[Key, ...]
    num_elements: int
    low: int
    reshards: bool
    gathered: Storage
    gradients: Storage
    is_pending: bool = False
    is_here: bool = False
    has_gradients: bool = False
    is_reduced: bool = False
    missing: int = 0


def bucket_elements(shapes: Sequence[tuple[int, int]], dp: int) -> int:
    """Return the elements of a bucket of parameters of (rows, width), padded as ``build_data_parallel_buffer_index``.

    Parameters of which no row holds the least common multiple of all widths fill gaps behind the others.
    """
    factor = 1
    for rows, width in sorted(shapes, key=lambda shape: -shape[1]):
        fits = factor % width == 0 and rows * width % factor == 0
        if not fits and rows * width >= factor:
            factor = lcm(factor, width)
    filled = gaps = 0
    for rows, width in shapes:
        count = rows * width
        if count >= factor:
            filled += padded(count, factor)
            gaps += padded(count, factor) - count
    fragments = sum(rows * width for rows, width in shapes if rows * width < factor)
    return padded(filled + max(0, fragments - gaps), dp * factor)


class FsdpChunk(MegatronChunk):
    """Hooks of a model that Megatron-FSDP shards. Writes instructions in host order."""

    def __init__(
        self, number: int, stage: MegatronStage, settings: MegatronSettings, plan: MegatronPlan, nccl: Communicator
    ) -> None:
        super().__init__(number, stage, settings, plan, nccl)
        self.shards_parameters = plan.shards_parameters
        self.low_gather = settings.fp8_param_gather and plan.recipe is not None
        self._make_units()
        self.num_elements = sum(unit.num_elements for unit in self.units)
        self.buckets = tuple(Bucket(unit.keys, unit.num_elements) for unit in self.units)
        blocks = [unit.num_elements for unit in self.units if unit.reshards]
        largest = 2 * sum(blocks) // max(1, len(blocks)) if self.shards_parameters else 0
        unit_size = settings.suggested_communication_unit_size or max(LEAST_COMMUNICATION, largest)
        self.reduce_limit, self.gather_ahead_limit = unit_size, unit_size // 2
        self.queue: list[Unit] = []

    def _make_units(self) -> None:
        """Buckets in the order of ``_get_parameter_groups``: what no unit owns first, then the layers.

        The head's norm and weight are one bucket; a tied embedding is one of its own, as every embedding is that fills
        a bucket alone.
        """
        members = [[i] for i, layer in enumerate(self.stage.layers) if layer.kind != "block"]
        members += [[i] for i, layer in enumerate(self.stage.layers) if layer.kind == "block"]
        known: dict[int, tuple[int, int]] = {}
        self.units: list[Unit] = []
        self.unit_of: dict[int, Unit] = {}
        for number, indices in enumerate(members):
            layer = self.stage.layers[indices[0]]
            keys = tuple(key for key in self.sizes if key[0] in indices)
            if not keys:
                continue
            if id(layer) not in known:
                names = {name for _, name in keys}
                shapes = [(dim0(p), p.num_elements // dim0(p)) for p in layer.parameters if p.name in names]
                low = sum(count for count, _ in self.low.get(id(layer), {}).values()) if self.low_gather else 0
                known[id(layer)] = (bucket_elements(shapes, self.plan.dp), low)
            count, low = known[id(layer)]
            name = f"{layer.kind}.{number}"
            gathered = Storage(
                f"parameters.{layer.kind}", self._gathered_bytes(count, low), "parameters", stream=GATHER_STREAM
            )
            unit = Unit(
                name, keys, count, low, layer.kind == "block", gathered,
                flat_storage(f"gradients.{layer.kind}", count, self.grad_dtype, "gradients"),
            )  # fmt: skip
            self.units.append(unit)
            for index in indices:
                self.unit_of[index] = unit
        self.place = {id(unit): i for i, unit in enumerate(self.units)}

    def _gathered_bytes(self, num_elements: int, low: int) -> int:
        low_bytes = self.plan.recipe.num_bytes(low) if low and self.plan.recipe is not None else 0
        return (num_elements - low) * DTYPE_BYTES[self.dtype] + low_bytes

    @property
    def gathers_ahead(self) -> bool:
        return False

    @property
    def reduces_itself(self) -> bool:
        return True

    @property
    def gathers_after_step(self) -> bool:
        return False

    @property
    def gradient_elements(self) -> int:
        return self.num_elements // self.plan.dp

    def partial_elements(self) -> int:
        """A shard of what each tensor-parallel rank has a part of (``_allreduce_non_tensor_model_parallel_grads``)."""
        return -(-super().partial_elements() // self.plan.dp)

    def setup(self) -> list[Instruction]:
        out: list[Instruction] = [Mark("setup", "model")]
        dp = self.plan.dp
        for unit in self.units:
            share = dp if self.shards_parameters else 1
            held = Storage(f"{unit.name}.shard", unit.gathered.num_bytes // share, "parameters")
            out.append(Alloc(held))
            if self.shards_parameters and not unit.reshards:
                out.append(Alloc(unit.gathered))
        for layer in self.stage.layers:
            out.extend(Alloc(Storage(f"{layer.kind}.{t.name}", t.num_bytes, "buffers")) for t in layer.buffers)
            if not self.low_gather:
                out.extend(
                    Alloc(Storage(f"{layer.kind}.{module}.weight.low", num_bytes, "buffers"))
                    for module, (_, num_bytes) in self.low.get(id(layer), {}).items()
                )
        out.append(Alloc(flat_storage("gradients.flat", self.gradient_elements, self.grad_dtype, "gradients")))
        return out

    # passes

    def begin(self, first: bool, last: bool) -> None:
        self.first, self.last = first, last
        for unit in self.units:
            unit.missing = len(unit.keys)
            unit.is_reduced = unit.has_gradients = False
            if first:  # the optimizer has written the shards
                unit.is_here = False
        self.nccl.reset()

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        out: list[Instruction] = []
        if not module:
            out.extend(self._unshard(layer, 0 if recomputing else 1))
        if self.first and not recomputing and not self.low_gather:
            low = self.low.get(id(self.stage.layers[layer]), {}).get(module)
            if low is not None:
                out.extend(Compute(f"{module}.weight.quantise", kernel) for kernel in self._weight_casts(low[0]))
        return out

    def post_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        unit = self.unit_of.get(layer)
        released = self._release(unit) if unit is not None and not module and not recomputing else ()
        return (*released, *super().post_forward(layer, module, recomputing))

    def pre_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        return self._unshard(layer, -1) if not module else ()

    def post_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        unit = self.unit_of.get(layer)
        # the hook hangs on the gradient of a unit's input: what no unit owns waits for the end of backward
        if unit is None or module or not unit.reshards or unit.missing or unit.is_reduced:
            return ()
        return [*self._release(unit), *self._reduce_unit(unit)]

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        """``_grad_acc``: what the matmul has not written into the bucket is copied there."""
        key = self.owner_of(layer, parameter)
        unit = self.unit_of[key[0]]
        out: list[Instruction] = []
        again = key != (layer, parameter)  # a tied weight's second use
        if not unit.has_gradients:
            unit.has_gradients = True
            out.append(Alloc(unit.gradients))
        if gradient.num_bytes and again:
            out.append(accumulate("accumulate gradient", self.sizes[key], self.dtype, self.grad_dtype))
        elif gradient.num_bytes:
            out.append(copy("gradient to bucket", self.sizes[key], self.dtype, self.grad_dtype))
        elif not self.keeps_dummies(self.stage.layers[layer]):
            dummy = flat_storage(f"dummy_wgrad.{self.names[key]}", self.sizes[key], self.dtype, "gradients")
            out.extend((Alloc(dummy), Free(dummy)))
        out.append(Free(gradient))
        if not again:
            unit.missing -= 1
        return out

    def end_of_backward(self) -> Iterable[Instruction]:
        """``_root_post_backward``: reduce what is left, then wait for all reductions."""
        out: list[Instruction] = []
        for unit in self.units:
            if not unit.is_reduced and unit.has_gradients:
                out.extend(self._reduce_unit(unit))
        out.extend(self._drain(0))
        return out

    # parameters

    def _unshard(self, layer: int, direction: int) -> list[Instruction]:
        """``all_gather_and_wait_parameters_ready``: this unit, and those that come next until enough is under way."""
        out: list[Instruction] = []
        unit = self.unit_of.get(layer)
        if unit is None or self.plan.dp == 1:
            return out
        self._gather(unit, out)
        ahead, position = 0, self.place[id(unit)]
        while direction and ahead < self.gather_ahead_limit:
            position += direction
            if not 0 <= position < len(self.units):
                break
            ahead += self.units[position].num_elements
            self._gather(self.units[position], out)
        if unit.is_pending:
            unit.is_pending, unit.is_here = False, True
            out.append(wait(f"gathered.{unit.name}", COMPUTE))
        return out

    def _gather(self, unit: Unit, out: list[Instruction]) -> None:
        if unit.is_here or unit.is_pending:
            return
        unit.is_pending = True
        if self.shards_parameters and unit.reshards:
            out.append(Alloc(unit.gathered))
        out.extend(wait_stream(GATHER_STREAM, COMPUTE))
        size = unit.gathered.num_bytes
        out.extend(self.nccl.blocking(unit.name, "all_gather", size, self.dtype, GATHER_STREAM))
        out.append(record(f"gathered.{unit.name}", GATHER_STREAM))

    def _release(self, unit: Unit) -> list[Instruction]:
        if not (self.shards_parameters and unit.reshards and unit.is_here):
            return []
        unit.is_here = False
        return [Free(unit.gathered)]

    # gradients

    def _reduce_unit(self, unit: Unit) -> list[Instruction]:
        """``_bucket_group_gradient_reduce``: scale, reduce-scatter into its own shard, add that to the gradients."""
        out = self._drain(self.reduce_limit)
        unit.is_reduced = True
        count, dtype = unit.num_elements, self.grad_dtype
        out.extend(wait_stream(REDUCE_STREAM, COMPUTE))
        if dtype == "bf16":  # NCCL scales other dtypes as it adds (``gradient_reduce_div_fusion``)
            out.append(in_place("scale gradients", count, dtype, REDUCE_STREAM))
        if self.plan.dp > 1:
            size = count * DTYPE_BYTES[dtype]
            out.extend(self.nccl.blocking("gradients", "reduce_scatter", size, dtype, REDUCE_STREAM))
        out.append(accumulate("accumulate gradient", count // self.plan.dp, dtype, dtype, REDUCE_STREAM))
        out.append(record(f"reduced.{unit.name}", REDUCE_STREAM))
        self.queue.append(unit)
        return out

    def _drain(self, limit: int) -> list[Instruction]:
        """``wait_for_previous_grad_reduce``: the oldest first, until no more than ``limit`` elements are in flight."""
        out: list[Instruction] = []
        while self.queue and sum(unit.num_elements for unit in self.queue) > limit:
            unit = self.queue.pop(0)
            out += [wait(f"reduced.{unit.name}", COMPUTE), Free(unit.gradients)]
        return out

    def finish_reductions(self) -> list[Instruction]:
        return []

    def after_update(self) -> list[Instruction]:
        """8-bit shards are made anew of the master (``copy_main_weights_to_model_weights``)."""
        if not self.low_gather or self.plan.recipe is None:
            return []
        share = sum(unit.low for unit in self.units) // self.plan.dp
        kernels: tuple[Kernel, ...] = cast_kernels(self.plan.recipe, share, 1)
        return [Compute("weights.quantise", kernel) for kernel in kernels]
