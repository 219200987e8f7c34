"""FSDP1: ``FullyShardedDataParallel`` around every block and the root, one flat parameter each.

Source: torch/distributed/fsdp/_runtime_utils.py, _flat_param.py, _limiter_utils.py, fully_sharded_data_parallel.py of
PyTorch 2.13.

* The parameters of a unit are one flat tensor of the model's own dtype, cut evenly into shards. With mixed precision a
  shard is cast into a tensor of its own (``_mp_shard``) before the gather, and freed after it.
* FULL_SHARD frees the gathered parameter after forward (the root's stays) and gathers again in backward, one unit ahead
  (BACKWARD_PRE). SHARD_GRAD_OP keeps it. NO_SHARD never shards; the hybrid strategies shard among fewer ranks.
* Rate limiter: frees are queued as events, and when two are in the queue the host waits for the oldest before the next
  gather, so that the allocator can reuse what the gathers before took.
* What one stream allocates and another uses is recorded with the allocator (``record_stream``).
* Backward: the gradients of a unit's parameters are parts of one flat gradient: the node of ``torch.split`` puts them
  together once all are there. Then it is cast to ``reduce_dtype``, reduce-scattered and cast to the shards' dtype.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sim.ir.ledger import DTYPE_BYTES, DType, Layer
from sim.ir.program import COMPUTE, Alloc, Chunk, Copy, Free, HostWait, Instruction, Mark, Storage, UseOn
from sim.parallel.frameworks.exit import exit_module
from sim.parallel.frameworks.flat import (
    Communicator,
    accumulate,
    copy,
    flat_storage,
    host_sync,
    host_torch_update,
    in_place,
    padded,
    pointwise,
    record,
    wait_stream,
)
from sim.parallel.frameworks.plan import Plan
from sim.parallel.frameworks.torch_step import torch_states, torch_update
from sim.scenario.schema import Fsdp1Settings

UNSHARD_STREAM = "unshard"
PRE_UNSHARD_STREAM = "pre_unshard"
POST_BACKWARD_STREAM = "post_backward"
ALL_REDUCE_STREAM = "all_reduce"
MAX_GATHERS_IN_FLIGHT = 2
"""``_max_num_inflight_all_gathers`` of _limiter_utils.py: "empirically chosen"."""
ALIGNMENT_BYTES = 16
"""``_get_aligned_numel`` of _flat_param.py: where original parameters are used, each starts at a multiple of it."""
NORM_BYTES = 4
MASTER: DType = "fp32"


@dataclass(slots=True, eq=False)
class Unit:
    """A flat parameter, its storages, and where it stands. Sizes are elements.

    ``total``   the flat parameter, ``whole`` padded to the ranks; ``shard`` that of one rank
    ``locals``  (name, elements) of what the optimizer sees on this rank
    """

    name: str
    total: int
    whole: int
    shard: int
    locals: tuple[tuple[str, int], ...]
    is_root: bool
    low_shard: Storage
    full: Storage
    flat_gradient: Storage
    cast_gradient: Storage
    padded_gradient: Storage
    reduced: Storage
    gradient: Storage
    fresh: Storage
    low_gradient: Storage
    cpu_gradient: Storage
    is_unsharded: bool = False
    prefetched: bool = False
    needs_backward_unshard: bool = False
    before_backward: bool = False
    after_backward: bool = False
    has_unsharded_gradient: bool = False
    pieces: list[Storage] = field(default_factory=list)


def flat_numel(numels: Sequence[int], dtype: DType, ranks: int, use_orig_params: bool) -> tuple[int, tuple[int, ...]]:
    """Return (elements of the flat parameter, where each parameter starts in it): ``_init_flat_param_and_metadata``."""
    total, offsets = 0, []
    aligned = ALIGNMENT_BYTES // DTYPE_BYTES[dtype] if use_orig_params else 1
    for count in numels:
        total = padded(total, aligned)
        offsets.append(total)
        total += count
    return (padded(total, ranks) if use_orig_params else total), tuple(offsets)


def divide_factors(ranks: int) -> tuple[int, float]:
    """Return what gradients are divided by before and after the reduction.

    ``_get_gradient_predivide_factor`` of torch/distributed/algorithms/_comm_hooks/default_hooks.py.
    """
    factor = 1
    while ranks % factor == 0 and ranks / factor > factor:
        factor *= 2
    return factor, ranks / factor


def fsdp1(layers: Sequence[Layer], settings: Fsdp1Settings, plan: Plan) -> Fsdp1:
    """Return the hooks, setup and optimizer step of FSDP1.

    ``plan.dp`` are the ranks of one shard group (of all ranks for NO_SHARD), ``plan.replicas`` the groups of a hybrid
    strategy. ``plan.parameter_dtype`` is the dtype of the gathered parameters.
    """
    return Fsdp1(layers, settings, plan)


class Fsdp1:
    """Hooks of an FSDP1 rank. Writes chunks in host order; holds what is open in between."""

    passes_differ = False

    def __init__(self, layers: Sequence[Layer], settings: Fsdp1Settings, plan: Plan) -> None:
        self.layers = tuple(layers)
        self.settings = settings
        self.plan = plan
        self.param_dtype: DType = plan.parameter_dtype
        self.orig_dtype: DType = settings.orig_dtype
        self.reduce_dtype: DType = plan.parameter_dtype if settings.mixed_precision == "PURE" else MASTER
        self.casts = self.param_dtype != self.orig_dtype
        # a shard group of one rank becomes NO_SHARD (_init_utils.py)
        self.shards = settings.sharding_strategy != "NO_SHARD" and plan.dp > 1
        self.frees_after_forward = settings.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD")
        self.offload = settings.cpu_offload
        self.nccl = Communicator(plan.dp_axis, plan.dp)
        self.nccl_replicate = Communicator(plan.replicate_axis, plan.replicas)
        self.hybrid = plan.replicas > 1
        self.predivide, self.postdivide = divide_factors(plan.dp * plan.replicas)
        self.exit = (len(self.layers) - 1, exit_module(self.layers[-1]))
        self.free_events: deque[str] = deque()
        self._make_units()
        self.begin_microbatch(first=True, last=True)

    def _make_units(self) -> None:
        """Each block is a unit, and what no block owns is the root's."""
        root = [i for i, layer in enumerate(self.layers) if layer.kind != "block"]
        members = ([root] if root else []) + [[i] for i in range(len(self.layers)) if i not in root]
        known: dict[int, tuple[tuple[str, int], ...]] = {}
        self.units: list[Unit] = []
        self.unit_of: list[Unit] = [None] * len(self.layers)  # type: ignore[list-item]
        self.missing_at_start: list[int] = []
        for layer in self.layers:
            if id(layer) not in known:
                elsewhere = {own for own, _, _ in layer.tied}
                known[id(layer)] = tuple(
                    (f"{layer.kind}.{p.name}", p.num_elements) for p in layer.parameters if p.name not in elsewhere
                )
            self.missing_at_start.append(len(known[id(layer)]))
        for number, indices in enumerate(members):
            is_root = bool(root) and number == 0
            name = "root" if is_root else f"{self.layers[indices[0]].kind}.{number}"
            unit = self._unit(name, [each for i in indices for each in known[id(self.layers[i])]], is_root)
            for index in indices:
                self.unit_of[index] = unit
            self.units.append(unit)
        self.root = self.units[0] if root else None
        self.by_layer = [None if unit is self.root else unit for unit in self.unit_of]

    def _unit(self, name: str, parameters: Sequence[tuple[str, int]], is_root: bool) -> Unit:
        ranks = self.plan.dp if self.shards else 1
        orig = self.settings.use_orig_params
        total, offsets = flat_numel([count for _, count in parameters], self.param_dtype, ranks, orig)
        shard = -(-total // ranks)
        start = shard * (self.plan.dp_rank or 0) if self.shards else 0
        mine: tuple[tuple[str, int], ...] = ((f"{name}.flat_param", shard),)
        if orig:
            mine = tuple(
                (own, max(0, min(start + shard, offset + count) - max(start, offset)))
                for (own, count), offset in zip(parameters, offsets, strict=True)
            )
        low, reduce, post = self.param_dtype, self.reduce_dtype, POST_BACKWARD_STREAM
        final = ALL_REDUCE_STREAM if self.hybrid else post
        keeps = reduce == self.orig_dtype
        return Unit(
            name,
            total,
            shard * ranks,
            shard,
            mine,
            is_root,
            flat_storage(f"{name}.mp_shard", shard, low, "parameters", PRE_UNSHARD_STREAM),
            flat_storage(f"{name}.flat_param", shard * ranks, low, "parameters", UNSHARD_STREAM),
            flat_storage(f"grad.{name}", total, low, "gradients"),
            flat_storage(f"grad.{name}.cast", total, reduce, "buffers", post),
            flat_storage(f"grad.{name}.padded", shard * ranks, reduce, "buffers", post),
            flat_storage(f"grad.{name}.reduced", shard, reduce, "buffers", post),
            flat_storage(f"grad.{name}.shard", shard, self.orig_dtype, "gradients", post if keeps else final),
            flat_storage(f"grad.{name}.new", shard, self.orig_dtype, "buffers", post if keeps else final),
            flat_storage(f"grad.{name}.low", shard, low, "gradients"),
            Storage(f"grad.{name}", shard * DTYPE_BYTES[self.orig_dtype], "gradients", stream="pinned", place="host"),
        )

    # setup

    def setup(self) -> Chunk:
        """Each unit's parameters are materialised one unit at a time, put into one flat tensor, and sharded."""
        out: list[Instruction] = [Mark("setup", "model")]
        for unit in reversed(self.units):  # wrapped from the inside out
            parameters = flat_storage(f"{unit.name}.parameters", unit.total, self.orig_dtype, "temporary")
            whole = flat_storage(f"{unit.name}.flat_param", unit.total, self.orig_dtype, "temporary")
            shard = Storage(
                f"{unit.name}.flat_param",
                unit.shard * DTYPE_BYTES[self.orig_dtype],
                "parameters",
                stream="pinned" if self.offload else COMPUTE,
                place="host" if self.offload else "gpu",
            )
            if self.shards or self.offload:
                out += [Alloc(parameters), Alloc(whole), Free(parameters), Alloc(shard), Free(whole)]
            else:
                out += [Alloc(parameters), Alloc(shard), Free(parameters)]
            if self.offload:
                out.append(Alloc(unit.cpu_gradient))
        for layer in self.layers:
            out.extend(Alloc(Storage(f"{layer.kind}.{t.name}", t.num_bytes, "buffers")) for t in layer.buffers)
        return tuple(out)

    def after_first_step(self) -> Chunk:
        return ()

    # passes

    def begin_microbatch(self, first: bool, last: bool) -> None:
        """Say which microbatch of a step is written next."""
        self.first, self.last = first, last
        self.nccl.reset()
        self.nccl_replicate.reset()
        self.syncs = last or self.settings.gradient_sync == "every"
        self.adds = not first and self.settings.gradient_sync == "every"
        self.order: list[Unit] = []
        self.missing = list(self.missing_at_start)
        self.num_frees = 0
        for unit in self.units:
            unit.before_backward = unit.after_backward = unit.prefetched = False
            unit.needs_backward_unshard = False
        if first:
            self.free_events.clear()  # whatever a step before left there has happened long ago

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        if module:
            return ()
        out: list[Instruction] = []
        if recomputing:
            self._enter_backward(layer, out)  # a checkpointed block runs again when its output's gradient is there
            return out
        if layer == 0:
            out.extend(wait_stream(UNSHARD_STREAM, COMPUTE))
            out.extend(wait_stream(PRE_UNSHARD_STREAM, COMPUTE))
            if self.root is not None:
                self._before_forward(0, self.root, out)
        unit = self.by_layer[layer]
        if unit is not None:
            self._before_forward(self.units.index(unit), unit, out)
        return out

    def _before_forward(self, number: int, unit: Unit, out: list[Instruction]) -> None:
        if not unit.prefetched:
            self._unshard(unit, out)
        out.extend(wait_stream(COMPUTE, UNSHARD_STREAM))
        if self.settings.forward_prefetch and number + 1 < len(self.units):
            following = self.units[number + 1]
            if not following.prefetched:
                self._unshard(following, out)
                following.prefetched = True

    def post_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        if recomputing:
            return ()
        out: list[Instruction] = []
        ends = (layer, module) == self.exit
        unit = self.by_layer[layer]
        if unit is not None and (ends or (not module and layer != self.exit[0])):
            self._after_forward(unit, out)
        if ends and self.root is not None:
            self._after_forward(self.root, out)
        return out

    def _after_forward(self, unit: Unit, out: list[Instruction]) -> None:
        self._reshard(unit, self.shards and not unit.is_root and self.frees_after_forward, out)
        self.order.append(unit)
        unit.needs_backward_unshard = True

    def pre_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        # on the last layer the loss comes first: the model's output has no gradient yet
        if module != (self.exit[1] if layer == self.exit[0] else ""):
            return ()
        out: list[Instruction] = []
        self._enter_backward(layer, out)
        return out

    def _enter_backward(self, layer: int, out: list[Instruction]) -> None:
        if layer == self.exit[0] and self.root is not None and not self.root.before_backward:
            self._before_backward(self.root, out)
        unit = self.by_layer[layer]
        if unit is not None and not unit.before_backward:
            self._before_backward(unit, out)

    def _before_backward(self, unit: Unit, out: list[Instruction]) -> None:
        """``_pre_backward_hook``."""
        unit.before_backward = True
        if unit.needs_backward_unshard:
            if not unit.prefetched:
                self._unshard(unit, out)
            out.extend(wait_stream(COMPUTE, UNSHARD_STREAM))
        unit.needs_backward_unshard = False
        if self.settings.backward_prefetch == "BACKWARD_PRE":
            self._prefetch_before(unit, out)

    def _prefetch_before(self, unit: Unit, out: list[Instruction]) -> None:
        """Gather the unit that finished forward before this one, which is next in backward."""
        position = self.order.index(unit)
        if position == 0:
            return
        target = self.order[position - 1]
        if target.needs_backward_unshard and not target.prefetched:
            self._unshard(target, out)
            target.prefetched = True

    def post_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        unit = self.by_layer[layer]
        if module or unit is None or unit.after_backward or self.missing[layer]:
            return ()
        out: list[Instruction] = []
        self._after_backward(unit, out)
        return out

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        """A part of the flat gradient: it waits for the others in the node of ``torch.split``."""
        self.missing[layer] -= 1
        self.unit_of[layer].pieces.append(gradient)
        return ()

    def end_of_backward(self) -> Iterable[Instruction]:
        """The root's gradient is complete with the embedding's; then ``_post_backward_final_callback``."""
        out: list[Instruction] = []
        for unit in self.units:
            if not unit.after_backward and unit.pieces:
                self._after_backward(unit, out)
        if not self.syncs:
            return out
        out.extend(wait_stream(COMPUTE, POST_BACKWARD_STREAM))
        if self.hybrid:
            out.extend(wait_stream(COMPUTE, ALL_REDUCE_STREAM))
        if self.offload:
            out.extend(host_sync("fsdp.offloaded"))
            out.extend(Free(unit.gradient) for unit in self.units)  # _saved_grad_shard goes, the CPU has a copy
        elif self.settings.keep_low_precision_grads and self.casts and self.last:
            for unit in self.units:  # prepare_gradient_for_optim
                out += [Alloc(unit.low_gradient), copy("fsdp.low", unit.shard, self.orig_dtype, self.param_dtype)]
                out.append(Free(unit.gradient))
        return out

    # gather and free

    def _unshard(self, unit: Unit, out: list[Instruction]) -> None:
        """``_unshard``: cast, wait as the rate limiter says, gather."""
        low = self.param_dtype
        missing = not unit.is_unsharded
        arrived: Storage | None = None
        if missing and (self.casts or self.offload):
            if self.offload:
                arrived = flat_storage("fsdp.arrived", unit.shard, self.orig_dtype, "buffers", PRE_UNSHARD_STREAM)
                size = unit.shard * DTYPE_BYTES[self.orig_dtype]
                out += [Alloc(arrived), Copy(unit.name, "host_to_device", size, PRE_UNSHARD_STREAM)]
            if self.casts:
                out += [Alloc(unit.low_shard), copy("fsdp.cast", unit.shard, self.orig_dtype, low, PRE_UNSHARD_STREAM)]
                if arrived is not None:
                    out.append(Free(arrived))
                    arrived = None
            out.extend(wait_stream(UNSHARD_STREAM, PRE_UNSHARD_STREAM))
        if self.settings.limit_all_gathers and len(self.free_events) >= MAX_GATHERS_IN_FLIGHT:
            out.append(HostWait(self.free_events.popleft()))
        if missing and self.shards:
            out.append(Alloc(unit.full))
            size = unit.whole * DTYPE_BYTES[low]
            out.extend(self.nccl.blocking(unit.name, "all_gather", size, low, UNSHARD_STREAM))
            if self.casts:
                out += [UseOn(unit.low_shard, UNSHARD_STREAM), Free(unit.low_shard)]
        if arrived is not None:
            out += [UseOn(arrived, UNSHARD_STREAM), Free(arrived)]
        unit.is_unsharded = True

    def _reshard(self, unit: Unit, free: bool, out: list[Instruction]) -> None:
        if free and unit.is_unsharded:
            out += [UseOn(unit.full, COMPUTE), Free(unit.full)]
            unit.is_unsharded = False
        if free and self.settings.limit_all_gathers:
            event = f"fsdp.free.{self.num_frees}"
            self.num_frees += 1
            out.append(record(event, COMPUTE))
            self.free_events.append(event)
        if not self.shards and unit.is_unsharded:
            if self.casts:  # the low-precision copy is the whole parameter
                out += [UseOn(unit.low_shard, COMPUTE), Free(unit.low_shard)]
            unit.is_unsharded = False
        unit.prefetched = False

    # reduce

    def _after_backward(self, unit: Unit, out: list[Instruction]) -> None:
        """The flat gradient is put together and accumulated; then ``_post_backward_hook``."""
        unit.after_backward = True
        low = self.param_dtype
        flat = unit.flat_gradient
        if unit.has_unsharded_gradient:
            new = flat_storage(f"grad.{unit.name}.new", unit.total, low, "gradients")
            out += [Alloc(new), copy("fsdp.split.backward", unit.total, low, low)]
            out.extend(Free(piece) for piece in unit.pieces)
            out += [accumulate("accumulate gradient", unit.total, low, low), Free(new)]
        else:
            out += [Alloc(flat), copy("fsdp.split.backward", unit.total, low, low)]
            out.extend(Free(piece) for piece in unit.pieces)
        unit.pieces.clear()
        self._reshard(unit, self.shards and (self.syncs or self.frees_after_forward), out)
        if self.settings.backward_prefetch == "BACKWARD_POST":
            self._prefetch_before(unit, out)
        unit.has_unsharded_gradient = not self.syncs
        if self.syncs:
            out.extend(wait_stream(POST_BACKWARD_STREAM, COMPUTE))
            self._reduce(unit, out)
            out += [UseOn(flat, POST_BACKWARD_STREAM), Free(flat)]

    def _reduce(self, unit: Unit, out: list[Instruction]) -> None:
        """``_reduce_grad`` and ``_reduce_grad_no_shard``: the flat gradient to the shard that is kept."""
        low, dtype, stream = self.param_dtype, self.reduce_dtype, POST_BACKWARD_STREAM
        spent: list[Storage] = []
        if dtype != low:
            out += [Alloc(unit.cast_gradient), copy("fsdp.grad.cast", unit.total, low, dtype, stream)]
            spent.append(unit.cast_gradient)
        if self.shards and unit.whole != unit.total:
            out += [Alloc(unit.padded_gradient), copy("fsdp.grad.pad", unit.total, dtype, dtype, stream)]
            spent.append(unit.padded_gradient)
        same = dtype == self.orig_dtype
        target = unit.fresh if self.adds and not self.offload else unit.gradient
        reduced = target if same else unit.reduced
        out.append(Alloc(reduced))
        if self.predivide > 1:
            out.append(in_place("fsdp.predivide", unit.whole, dtype, stream))
        size = unit.whole * DTYPE_BYTES[dtype]
        if self.shards:
            out.extend(self.nccl.blocking(unit.name, "reduce_scatter", size, dtype, stream))
        else:
            # the gradient itself is reduced; ours is a copy that outlives the unsharded one
            out.append(copy("fsdp.reduce", unit.total, dtype, dtype, stream))
            out.extend(self.nccl.blocking(unit.name, "all_reduce", size, dtype, stream))
        if self.hybrid:
            out.extend(wait_stream(ALL_REDUCE_STREAM, stream))
            stream = ALL_REDUCE_STREAM
            out.append(UseOn(reduced, stream))
            size = unit.shard * DTYPE_BYTES[dtype]
            out.extend(self.nccl_replicate.blocking(unit.name, "all_reduce", size, dtype, stream))
        if self.postdivide > 1:
            out.append(in_place("fsdp.postdivide", unit.shard, dtype, stream))
        if not same:
            out += [Alloc(target), copy("fsdp.grad.master", unit.shard, dtype, self.orig_dtype, stream), Free(reduced)]
        if target is not unit.gradient:
            out += [
                accumulate("accumulate gradient", unit.shard, self.orig_dtype, self.orig_dtype, stream),
                Free(target),
            ]
        if self.offload:
            out.append(Copy(f"grad.{unit.name}", "device_to_host", unit.shard * DTYPE_BYTES[self.orig_dtype], stream))
            if stream != POST_BACKWARD_STREAM:
                out.append(UseOn(unit.gradient, POST_BACKWARD_STREAM))
        out.extend(Free(storage) for storage in reversed(spent))

    # optimizer

    def optimizer_step(self, first_step: bool) -> Chunk:
        """Unscale and clip, step on the shards, and ``zero_grad(set_to_none=True)``."""
        out: list[Instruction] = [Mark("optimizer", "optimizer")]
        plan, settings = self.plan, self.settings
        params = [each for unit in self.units for each in unit.locals]
        total = sum(count for _, count in params)
        keeps_low = settings.keep_low_precision_grads and self.casts and not self.offload
        dtype = self.param_dtype if keeps_low else self.orig_dtype
        if plan.loss_scaling:
            out.append(in_place("unscale", total, dtype))
            out.extend(host_sync("found_inf"))
        if plan.gradient_clipping:
            out.append(pointwise("clip.norm", "reduce", ((total, dtype),), ()))
            if self.shards:
                out.extend(self.nccl.blocking("gradient norm", "all_reduce", NORM_BYTES, MASTER, COMPUTE))
            out.append(in_place("clip.scale", total, dtype))
        if self.offload:
            if first_step:
                states = torch_states(plan.optimizer, params, self.orig_dtype)
                out.extend(Alloc(Storage(s.name, s.num_bytes, s.category, place="host")) for s in states)
            out.append(host_torch_update(plan.optimizer, settings.optimizer_implementation, total))
            return tuple(out)
        if first_step:
            out.extend(Alloc(storage) for storage in torch_states(plan.optimizer, params, self.orig_dtype))
        out.extend(torch_update(plan.optimizer, params, self.orig_dtype, settings.optimizer_implementation, dtype))
        out.extend(Free(unit.low_gradient if keeps_low else unit.gradient) for unit in self.units)
        return tuple(out)
