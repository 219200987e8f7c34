"""FSDP2: ``fully_shard`` on every block and on the root, dim-0 shards of each parameter.

Source: torch/distributed/fsdp/_fully_shard/ of PyTorch 2.13 (_fsdp_state.py, _fsdp_param_group.py, _fsdp_param.py,
_fsdp_collectives.py).

* A group is a block, or the root with what no block owns. Each parameter is cut along its first dimension, padded to
  the ranks; the shards stay in the original dtype, the gathered parameters are in ``param_dtype``.
* Gather: the shards are cast into one flat tensor, copied into this rank's slice of the output, gathered, and copied
  out into one tensor a parameter. In forward the output lives until the next group has been copied out, so that the
  next gather, which the host issues before this group's kernels have run, never writes what is still read.
* Torch's pipelines of several stages a rank gather a stage whole, and while those before it are at work.
* Backward gathers one group ahead, in reverse of the order in which groups finished forward.
* Reduce: the gradients of a group are copied into one flat tensor in ``reduce_dtype``, which lives until the next
  group's gradients are there; the output is cast back to the original dtype, and the sharded gradients are views of it.
* HSDP all-reduces the shard over the replicas on a stream of its own, and keeps its input to the end of backward.
* Events order the streams; nothing is recorded on a stream with the allocator (``record_stream``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sim.ir.ledger import DTYPE_BYTES, DType, Gemm, Layer, Parameter
from sim.ir.program import COMPUTE, Alloc, Chunk, Copy, Free, HostCompute, HostWait, Instruction, Mark, Storage
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
    wait,
    wait_stream,
)
from sim.parallel.frameworks.plan import Plan
from sim.parallel.frameworks.torch_step import torch_states, torch_update
from sim.scenario.schema import Fsdp2Settings

COPY_IN_STREAM = "all_gather_copy_in"
GATHER_STREAM = "all_gather"
REDUCE_STREAM = "reduce_scatter"
ALL_REDUCE_STREAM = "all_reduce"
NORM_BYTES = 4


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a group. ``num_elements`` whole, ``padded`` over all ranks, ``local`` what this rank owns of it.

    Each rank stores ``padded // ranks`` elements, whatever it owns. ``low``: it is gathered in 8 bits.
    """

    name: str
    num_elements: int
    padded: int
    local: int
    low: bool = False


@dataclass(slots=True, eq=False)
class Group:
    """Parameters that travel together, their storages, and where they stand.

    ``shard``        elements of one rank, padding included; ``whole`` of all; ``gathered_elements`` what travels,
                     counted in ``param_dtype``
    ``cast``         the shards in ``param_dtype``; ``output`` of the gather
    ``unsharded``    one storage a parameter, as the passes read it
    ``kept``         (a number for ``reshard_after_forward``) the slices that remain after forward
    ``gradient``     the sharded gradients, one flat tensor that they are views of; ``fresh`` what is added to them
    ``accumulated``  whole gradients in ``reduce_dtype``, where not every microbatch is reduced
    ``pending``      a gather is under way, and ``gathered`` its event
    ``grads``        slot of a parameter -> its whole gradient
    """

    name: str
    params: tuple[Param, ...]
    reshard: bool
    shard: int
    whole: int
    gathered_elements: int
    cast: Storage
    output: Storage
    unsharded: tuple[Storage, ...]
    kept: tuple[Storage, ...]
    reduce_input: Storage
    reduce_output: Storage
    gradient: Storage
    fresh: Storage
    accumulated: tuple[Storage, ...]
    allocs: tuple[Instruction, ...]
    frees: tuple[Instruction, ...]
    is_unsharded: bool = False
    is_kept: bool = False
    pending: bool = False
    gathered: str = ""
    before_backward: bool = False
    after_backward: bool = False
    has_accumulated: bool = False
    grads: dict[int, Storage] = field(default_factory=dict)


def dim0(parameter: Parameter) -> int:
    """Return the rows of a parameter as torch has it: heads and their width are one dimension of a projection."""
    shape = parameter.shape
    rows = shape[0].size
    if shape[0].name in ("heads", "kv_heads", "gate_up"):
        for dim in shape[1:]:
            if dim.name not in ("group", "head_dim", "ffn"):
                break
            rows *= dim.size
    return rows


def shard_of(parameter: Parameter, ranks: int, rank: int) -> tuple[int, int]:
    """Return (elements of the whole padded to the ranks, elements of it that are this rank's).

    ``_chunk_with_empty`` of _fsdp_common.py: ``torch.chunk`` gives ceil(rows / ranks) rows to each rank, as far as
    they go.
    """
    rows = dim0(parameter)
    width = parameter.num_elements // rows
    each = -(-rows // ranks)
    mine = min(each, max(0, rows - rank * each))
    return padded(rows, ranks) * width, mine * width


def _gathered_low(layer: Layer) -> frozenset[str]:
    """Return the weights of linears that compute in FP8, which are gathered so (torchao/float8/fsdp_utils.py)."""
    return frozenset(
        name
        for op in layer.forward
        if any(isinstance(kernel, Gemm) and kernel.dtype == "fp8" for kernel in op.kernels)
        for name in op.parameters
        if name.endswith(".weight")
    )


def fsdp2(layers: Sequence[Layer], settings: Fsdp2Settings, plan: Plan) -> Fsdp2:
    """Return the hooks, setup and optimizer step of FSDP2.

    ``plan.dp`` are the ranks of one shard group, ``plan.replicas`` those that hold the same shard (HSDP).
    ``plan.parameter_dtype`` is the dtype of the gathered parameters, ``param_dtype``.
    """
    return Fsdp2(layers, settings, plan)


class Fsdp2:
    """Hooks of an FSDP2 rank. Writes chunks in host order; holds what is open in between."""

    passes_differ = False

    def __init__(self, layers: Sequence[Layer], settings: Fsdp2Settings, plan: Plan) -> None:
        self.layers = tuple(layers)
        self.settings = settings
        self.plan = plan
        self.param_dtype: DType = plan.parameter_dtype
        self.orig_dtype: DType = settings.orig_dtype
        self.reduce_dtype: DType = settings.reduce_dtype or plan.parameter_dtype
        self.offload = settings.cpu_offload
        resharded = settings.reshard_after_forward
        self.reshard_ranks = resharded if not isinstance(resharded, bool) and resharded != plan.dp else 0
        self.nccl = Communicator(plan.dp_axis, plan.dp)
        self.nccl_reshard = Communicator(plan.reshard_axis, self.reshard_ranks or 1)
        self.nccl_replicate = Communicator(plan.replicate_axis, plan.replicas)
        self.nccl_tp = Communicator("tp", plan.tp)
        self.copy_in_stream = COMPUTE if plan.gathers_ahead else COPY_IN_STREAM
        self.first = self.last = True
        self._make_groups()
        self.partial: dict[str, list[int]] = {}
        for index, name in plan.partial:
            self.partial.setdefault(self.group_of[index].name, []).append(self.slot[index, name])
        self.exit = (len(self.layers) - 1, exit_module(self.layers[-1]))

    # groups

    def _make_groups(self) -> None:
        """``fully_shard`` of every block, then of the root; torchtitan's code shards embedding and head by themselves.

        A tied weight must be in one group with its twin (``_validate_no_duplicate_params``).
        """
        resharded = self.settings.reshard_after_forward
        blocks = resharded is not False and not self.plan.pipeline
        tied = any(layer.tied for layer in self.layers)
        separate = self.settings.wrap == "torchtitan" and not tied
        known: dict[int, tuple[tuple[tuple[str, Param], ...], dict[str, int]]] = {}
        owned: list[tuple[tuple[str, Param], ...]] = []
        rank = self.plan.dp_rank or 0
        for layer in self.layers:
            mine = known.get(id(layer))
            if mine is None:
                elsewhere = {own for own, _, _ in layer.tied}
                listed = []
                low = _gathered_low(layer) if self.settings.float8_all_gather else frozenset()
                for p in layer.parameters:
                    if p.name not in elsewhere:
                        whole, local = shard_of(p, self.plan.dp, rank)
                        listed.append(
                            (p.name, Param(f"{layer.kind}.{p.name}", p.num_elements, whole, local, p.name in low))
                        )
                mine = known[id(layer)] = (tuple(listed), {name: i for i, (name, _) in enumerate(listed)})
            owned.append(mine[0])
        members: list[list[int]] = []
        self.root: Group | None = None
        root = [i for i, layer in enumerate(self.layers) if layer.kind != "block" and not separate]
        if root:
            members.append(root)
        members += [[i] for i in range(len(self.layers)) if i not in root]
        self.groups: list[Group] = []
        self.group_of: list[Group] = [None] * len(self.layers)  # type: ignore[list-item]
        self.slot: dict[tuple[int, str], int] = {}
        self.missing_at_start = [len(params) for params in owned]
        for number, indices in enumerate(members):
            kind = self.layers[indices[0]].kind
            is_root = bool(root) and number == 0
            # torchtitan keeps the head: it would be gathered again at once
            reshard = self.settings.reshard_root if is_root else blocks and kind != "head"
            name = "root" if is_root else f"{kind}.{number}"
            params: list[Param] = []
            for index in indices:
                for own, param in owned[index]:
                    self.slot[index, own] = len(params)
                    params.append(param)
            group = self._group(name, tuple(params), reshard)
            if is_root:
                self.root = group
            for index in indices:
                self.group_of[index] = group
            self.groups.append(group)
        self.by_layer = [None if group is self.root else group for group in self.group_of]

    def _group(self, name: str, params: tuple[Param, ...], reshard: bool) -> Group:
        ranks, dtype = self.plan.dp, self.param_dtype
        whole = sum(p.padded for p in params)
        shard = whole // ranks
        # torchao's fsdp_pre_all_gather hands over bytes: the group is gathered as bytes
        element = DTYPE_BYTES[dtype]
        gathered = sum(p.padded // element if p.low else p.padded for p in params)
        parts = self.reshard_ranks or 1
        kept = tuple(
            flat_storage(f"{p.name}.resharded", p.padded // parts, dtype, "parameters")
            for p in params
            if self.reshard_ranks
        )
        unsharded = tuple(flat_storage(p.name, p.padded, "fp8" if p.low else dtype, "parameters") for p in params)
        replicated = self.plan.replicas > 1
        post = ALL_REDUCE_STREAM if replicated else REDUCE_STREAM
        place = "host" if self.offload else "gpu"
        size = shard * DTYPE_BYTES[self.orig_dtype]
        same = self.reduce_dtype == self.orig_dtype
        gradient = Storage(
            f"grad.{name}", size, "gradients", stream="pinned" if self.offload else REDUCE_STREAM if same else post,
            place=place,  # type: ignore[arg-type]
        )  # fmt: skip
        return Group(
            name,
            params,
            reshard,
            shard,
            whole,
            gathered,
            flat_storage("all_gather.input", gathered // ranks, dtype, "buffers", self.copy_in_stream),
            flat_storage("all_gather.output", gathered, dtype, "buffers", self.copy_in_stream),
            unsharded,
            kept,
            flat_storage("reduce_scatter.input", whole, self.reduce_dtype, "buffers"),
            flat_storage("reduce_scatter.output", shard, self.reduce_dtype, "buffers", REDUCE_STREAM),
            gradient,
            flat_storage(f"grad.{name}.new", shard, self.orig_dtype, "buffers", REDUCE_STREAM if same else post),
            tuple(flat_storage(f"grad.{p.name}", p.num_elements, self.reduce_dtype, "gradients") for p in params),
            tuple(Alloc(s) for s in unsharded),
            tuple(Free(s) for s in unsharded),
        )

    # setup

    def setup(self) -> Chunk:
        """The model is made on the meta device, sharded, and only its shards are materialised (``to_empty``)."""
        out: list[Instruction] = [Mark("setup", "model")]
        element = DTYPE_BYTES[self.orig_dtype]
        ranks = self.plan.dp
        for group in self.groups:
            for p in group.params:
                size = p.padded // ranks * element
                out.append(
                    Alloc(
                        Storage(p.name, size, "parameters", stream="pinned", place="host")
                        if self.offload
                        else Storage(p.name, size, "parameters")
                    )
                )
        for layer in self.layers:
            out.extend(Alloc(Storage(f"{layer.kind}.{t.name}", t.num_bytes, "buffers")) for t in layer.buffers)
        return tuple(out)

    def after_first_step(self) -> Chunk:
        return ()

    # passes

    def begin_microbatch(self, first: bool, last: bool) -> None:
        """Say which microbatch of a step is written next."""
        self.first, self.last = first, last
        for communicator in (self.nccl, self.nccl_reshard, self.nccl_replicate, self.nccl_tp):
            communicator.reset()
        self.reduces = last or (self.settings.gradient_sync == "every" and not self.plan.pipeline)
        # the first reduction of a step makes the sharded gradients, later ones add to them
        self.adds = not first and self.settings.gradient_sync == "every" and not self.plan.pipeline
        self.reshards = last or (self.settings.reshard_after_backward and not self.plan.pipeline)
        self.held: Group | None = None
        self.order: list[Group] = []
        self.reducing: Group | None = None
        self.post_streams: dict[str, str] = {}
        self.retained: list[Storage] = []
        self.missing = list(self.missing_at_start)
        for group in self.groups:
            group.before_backward = group.after_backward = False

    def gather_ahead(self) -> Iterable[Instruction]:
        """``UNSHARD`` of a stage: ``unshard(async_op=True)`` of every module of it that is wrapped, root first.

        The copies are the current stream's and the gathers the process group's, so that they wait for nothing that the
        stage itself waits for (torch/distributed/pipelining/schedules.py, ``_PipelineScheduleRuntime``;
        ``get_all_gather_streams`` in _fsdp_param_group.py).
        """
        if not self.plan.gathers_ahead:
            return ()
        self.nccl.reset()
        out: list[Instruction] = [Mark("forward", "unshard")]
        for group in self.groups:
            self._unshard(group, out)
        return out if len(out) > 1 else ()

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        if module:
            return ()
        out: list[Instruction] = []
        if recomputing:
            # a checkpointed block runs again when the gradient of its output is there: its hook came first
            self._enter_backward(layer, out)
            return out
        if layer == 0 and self.plan.gathers_ahead:  # ``_assert_unsharded``: the stage waits for all its handles
            for each in self.groups:
                self._unshard(each, out)
                self._await(each, out, forward=False)
        elif layer == 0:
            if self.plan.dp > 1:
                out.extend(wait_stream(COPY_IN_STREAM, COMPUTE))
                out.extend(wait_stream(GATHER_STREAM, COMPUTE))
            if self.root is not None:
                self._unshard(self.root, out)
                self._await(self.root, out, forward=True)
        group = self.by_layer[layer]
        if group is not None:
            self._unshard(group, out)
            self._await(group, out, forward=True)
        return out

    def post_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        if recomputing:
            return ()
        out: list[Instruction] = []
        group = self.by_layer[layer]
        ends = (layer, module) == self.exit
        if group is not None and (ends or (not module and layer != self.exit[0])):
            self._after_forward(group, out)
        if ends:
            if self.root is not None:
                self._after_forward(self.root, out)
            if self.held is not None:
                self._drop_output(self.held, out)
                self.held = None
        return out

    def _after_forward(self, group: Group, out: list[Instruction]) -> None:
        if group.reshard and group.is_unsharded:
            if self.reshard_ranks:
                # _to_sharded_post_forward: a clone of this rank's slice of each parameter
                for storage, p in zip(group.kept, group.params, strict=True):
                    out.append(Alloc(storage))
                    size = p.padded // self.reshard_ranks
                    out.append(copy("fsdp.reshard", size, self.param_dtype, self.param_dtype))
                out.append(record(f"fsdp.resharded.{group.name}", COMPUTE))
                group.is_kept = True
            self._reshard(group, out)
        self.order.append(group)

    def pre_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        # on the last layer the loss comes first: the model's output has no gradient yet
        if module != (self.exit[1] if layer == self.exit[0] else ""):
            return ()
        out: list[Instruction] = []
        self._enter_backward(layer, out)
        return out

    def _enter_backward(self, layer: int, out: list[Instruction]) -> None:
        """The hooks on the gradient of a group's output, and of the model's output on the last layer."""
        group = self.by_layer[layer]
        if group is not None and not group.before_backward:
            self._before_backward(group, out)
        if layer == self.exit[0] and self.root is not None and not self.root.before_backward:
            self._before_backward(self.root, out)

    def _before_backward(self, group: Group, out: list[Instruction]) -> None:
        """``pre_backward``: gather unless it is there, wait, then gather what backward needs next."""
        group.before_backward = True
        if self.plan.pipeline:
            return
        self._unshard(group, out)
        self._await(group, out, forward=False)
        position = self.order.index(group)
        if position > 0:
            self._unshard(self.order[position - 1], out)

    def post_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        group = self.by_layer[layer]
        # the hook on the gradient of a group's input; token ids have none (selective recompute leaves a layer twice)
        if module or group is None or self.missing[layer] or self.layers[layer].kind == "embedding":
            return ()
        if group.after_backward:
            return ()
        out: list[Instruction] = []
        self._after_backward(group, out)
        return out

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        """AccumulateGrad: the unsharded parameter's ``.grad`` is stolen, or added to where it is kept."""
        group, slot = self.group_of[layer], self.slot[layer, parameter]
        self.missing[layer] -= 1
        kept = group.grads.get(slot)
        if kept is None:
            group.grads[slot] = gradient
            return ()
        count = group.params[slot].num_elements
        return (accumulate("accumulate gradient", count, self.param_dtype, self.param_dtype), Free(gradient))

    def end_of_backward(self) -> Iterable[Instruction]:
        """``_root_post_backward_final_callback``: what no hook has reduced, root first; then the streams join."""
        out: list[Instruction] = []
        for group in self.groups:
            if not group.after_backward:
                self._after_backward(group, out)
        if self.plan.pipeline and self.last:
            # the stage's backward has run without hooks that reduce (torch/distributed/pipelining/stage.py)
            for group in self.groups:
                self._reshard(group, out)
                self._reduce(group, out)
        out.extend(wait(event, COMPUTE) for event in self.post_streams.values())
        if self.offload and self.post_streams:
            out.extend(HostWait(event) for event in self.post_streams.values())
        out.extend(Free(storage) for storage in self.retained)
        if self.reducing is not None:
            out.append(wait(f"fsdp.reduced.{self.reducing.name}", COMPUTE))
            out.append(Free(self.reducing.reduce_input))
        self.reducing = None
        self.retained = []
        return out

    # gather

    def _unshard(self, group: Group, out: list[Instruction]) -> None:
        """``unshard`` and ``foreach_all_gather``: nothing where the group is there or under way."""
        if group.is_unsharded or group.pending:
            return
        group.pending = True
        dtype = self.param_dtype
        nccl, ranks = (self.nccl_reshard, self.reshard_ranks) if group.is_kept else (self.nccl, self.plan.dp)
        if ranks == 1:
            return
        mine = group.whole // ranks
        if group.is_kept:
            event = f"fsdp.resharded.{group.name}"
            out += [wait(event, self.copy_in_stream), wait(event, GATHER_STREAM)]
        casts = dtype != self.orig_dtype
        temporaries: list[Storage] = []
        if self.offload and not group.is_kept:
            # a copy to the device for each parameter, and its cast
            for p in group.params:
                count = p.padded // ranks
                arrived = flat_storage("all_gather.arrived", count, self.orig_dtype, "buffers", self.copy_in_stream)
                out += [
                    Alloc(arrived),
                    Copy(p.name, "host_to_device", count * DTYPE_BYTES[self.orig_dtype], self.copy_in_stream),
                ]
                if casts:
                    cast = flat_storage("all_gather.input", count, dtype, "buffers", self.copy_in_stream)
                    out += [Alloc(cast), copy("fsdp.cast", count, self.orig_dtype, dtype, self.copy_in_stream)]
                    out.append(Free(arrived))
                    arrived = cast
                temporaries.append(arrived)
        elif casts:
            source = dtype if group.is_kept else self.orig_dtype
            cast = group.cast
            if group.is_kept:
                cast = flat_storage("all_gather.input", mine, dtype, "buffers", self.copy_in_stream)
            out += [Alloc(cast), copy("fsdp.cast", mine, source, dtype, self.copy_in_stream)]
            temporaries.append(cast)
        mine = group.gathered_elements // ranks
        out += [Alloc(group.output), copy("fsdp.all_gather.copy_in", mine, dtype, dtype, self.copy_in_stream)]
        size = group.gathered_elements * DTYPE_BYTES[dtype]
        group.gathered = f"fsdp.gathered.{group.name}"
        if self.plan.gathers_ahead:
            out.extend(nccl.asynchronous(group.name, "all_gather", size, dtype, COMPUTE, group.gathered))
        else:
            out.extend(wait_stream(GATHER_STREAM, COPY_IN_STREAM))
            out.extend(nccl.blocking(group.name, "all_gather", size, dtype, GATHER_STREAM))
            out.append(record(group.gathered, GATHER_STREAM))
        out.extend(Free(storage) for storage in temporaries)

    def _await(self, group: Group, out: list[Instruction], *, forward: bool) -> None:
        """``wait_for_unshard``: copy out and drop the gather's output; in forward, that of the group before."""
        if not group.pending:
            return
        group.pending = False
        dtype = self.param_dtype
        if forward and self.held is not None:
            self._drop_output(self.held, out)
            self.held = None
        alone = (self.reshard_ranks if group.is_kept else self.plan.dp) == 1
        if alone:
            self._unshard_alone(group, out)
        else:
            out.append(wait(group.gathered, COMPUTE))
            out.extend(group.allocs)
            out.append(copy("fsdp.all_gather.copy_out", group.gathered_elements, dtype, dtype))
        if group.is_kept:
            out.extend(Free(storage) for storage in group.kept)
            group.is_kept = False
        group.is_unsharded = True
        out.append(record(f"fsdp.copied.{group.name}", COMPUTE))
        if alone:
            return
        if forward:
            self.held = group
        else:
            self._drop_output(group, out)

    def _unshard_alone(self, group: Group, out: list[Instruction]) -> None:
        """One rank: each parameter is cast and copied (``wait_for_unshard`` with a world size of one)."""
        dtype = self.param_dtype
        for p, alloc in zip(group.params, group.allocs, strict=True):
            if dtype == self.orig_dtype:
                out += [alloc, copy("fsdp.unshard", p.padded, dtype, dtype)]
                continue
            cast = flat_storage("unshard.cast", p.padded, dtype, "buffers")
            out += [Alloc(cast), copy("fsdp.cast", p.padded, self.orig_dtype, dtype)]
            out += [alloc, copy("fsdp.unshard", p.padded, dtype, dtype), Free(cast)]

    def _drop_output(self, group: Group, out: list[Instruction]) -> None:
        """The gather streams wait until the copy-out has read; then the memory is theirs again."""
        event = f"fsdp.copied.{group.name}"
        if not self.plan.gathers_ahead:  # else it is the compute stream's own
            out += [wait(event, COPY_IN_STREAM), wait(event, GATHER_STREAM)]
        out.append(Free(group.output))

    def _reshard(self, group: Group, out: list[Instruction]) -> None:
        if group.is_unsharded:
            group.is_unsharded = False
            out.extend(group.frees)

    # reduce

    def _after_backward(self, group: Group, out: list[Instruction]) -> None:
        """``post_backward``: let go of the parameters, then reduce the gradients or keep them whole."""
        group.after_backward = True
        upcast = self.reduce_dtype != self.param_dtype
        if group.has_accumulated:
            for slot, gradient in group.grads.items():
                count = group.params[slot].num_elements
                out.append(accumulate("accumulate gradient", count, self.param_dtype, self.reduce_dtype))
                out.append(Free(gradient))
            group.grads.clear()
        if self.reshards and not self.plan.pipeline:
            self._reshard(group, out)
        if self.reduces and not self.plan.pipeline:
            self._reduce(group, out)
            return
        if upcast and group.grads:
            for slot, gradient in group.grads.items():
                count = group.params[slot].num_elements
                out.append(Alloc(group.accumulated[slot]))
                out.append(copy("fsdp.upcast", count, self.param_dtype, self.reduce_dtype))
                out.append(Free(gradient))
            group.grads.clear()
            group.has_accumulated = True

    def _sum_partial(self, group: Group, held: dict[int, Storage], dtype: DType, out: list[Instruction]) -> None:
        """``unsharded_grad_data`` of _fsdp_param.py: DTensor gradients that are partial sums over tp are redistributed.

        These are of parameters that every tensor-parallel rank has whole: norms under sequence parallelism.
        """
        for slot in self.partial.get(group.name, ()):
            count = group.params[slot].num_elements
            summed = flat_storage("gradient.summed", count, dtype, "gradients")
            event = f"fsdp.summed.{group.name}.{slot}"
            size = count * DTYPE_BYTES[dtype]
            out += [Alloc(summed), copy("fsdp.sum.copy", count, dtype, dtype)]
            out.extend(self.nccl_tp.asynchronous(event, "all_reduce", size, dtype, COMPUTE, event))
            out += [wait(event, COMPUTE), Free(held[slot])]
            held[slot] = summed

    def _reduce(self, group: Group, out: list[Instruction]) -> None:
        """``foreach_reduce``. The reduce-scatter before has its input taken away only now: one is in flight."""
        if group.has_accumulated:
            held = dict(enumerate(group.accumulated))
            source = self.reduce_dtype
            group.has_accumulated = False
        else:
            held = group.grads
            source = self.param_dtype
        self._sum_partial(group, held, source, out)
        grads: Iterable[Storage] = tuple(held.values())
        group.grads.clear()
        if self.reducing is not None:
            out.append(wait(f"fsdp.reduced.{self.reducing.name}", COMPUTE))
            out.append(Free(self.reducing.reduce_input))
        self.reducing = group
        plan, dtype = self.plan, self.reduce_dtype
        out += [Alloc(group.reduce_input), copy("fsdp.reduce.copy_in", group.whole, source, dtype)]
        out.extend(Free(gradient) for gradient in grads)
        out.extend(wait_stream(REDUCE_STREAM, COMPUTE))
        same = dtype == self.orig_dtype
        # what the reduction writes: the gradients themselves where no cast follows
        target = group.fresh if self.adds or self.offload else group.gradient
        reduced = target if same else group.reduce_output
        out.append(Alloc(reduced))
        divides = dtype == "fp16" and plan.dp * plan.replicas > 1
        if divides:
            out.append(in_place("fsdp.predivide", group.whole, dtype, REDUCE_STREAM))
        if plan.dp > 1:
            size = group.whole * DTYPE_BYTES[dtype]
            out.extend(self.nccl.blocking(group.name, "reduce_scatter", size, dtype, REDUCE_STREAM))
        else:
            out.append(copy("fsdp.reduce", group.whole, dtype, dtype, REDUCE_STREAM))
        out.append(record(f"fsdp.reduced.{group.name}", REDUCE_STREAM))
        post = REDUCE_STREAM
        if plan.replicas > 1:
            post = ALL_REDUCE_STREAM
            out.extend(wait_stream(post, REDUCE_STREAM))
            size = group.shard * DTYPE_BYTES[dtype]
            out.extend(self.nccl_replicate.blocking(group.name, "all_reduce", size, dtype, post))
        if divides:
            out.append(in_place("fsdp.postdivide", group.shard, dtype, post))
        if not same:
            out += [Alloc(target), copy("fsdp.grad.cast", group.shard, dtype, self.orig_dtype, post)]
            if plan.replicas == 1:
                out.append(Free(reduced))
        if plan.replicas > 1 and not (same and target is group.gradient):
            self.retained.append(reduced)
        self._view_out(group, target, post, out, retained=same and plan.replicas > 1)
        event = f"fsdp.reduced.{post}"
        out.append(record(event, post))
        self.post_streams[post] = event

    def _view_out(self, group: Group, target: Storage, post: str, out: list[Instruction], *, retained: bool) -> None:
        """The sharded gradients: views of the output, copied to the host or added to those of earlier microbatches."""
        dtype = self.orig_dtype
        if self.offload:
            if not self.adds:
                out.append(Alloc(group.gradient))
            for p in group.params:
                out.append(Copy(f"grad.{p.name}", "device_to_host", p.local * DTYPE_BYTES[dtype], post))
                if self.adds:  # a blocking copy, then the CPU adds
                    out.extend(host_sync("fsdp.offloaded", post))
                    out.append(HostCompute("accumulate gradient", "python", 1))
        elif self.adds:
            out.extend(accumulate("accumulate gradient", p.local, dtype, dtype, post) for p in group.params if p.local)
        if target is not group.gradient and not retained:
            out.append(Free(target))

    # optimizer

    def optimizer_step(self, first_step: bool) -> Chunk:
        """Unscale and clip, step on the shards, and ``zero_grad(set_to_none=True)``."""
        out: list[Instruction] = [Mark("optimizer", "optimizer")]
        plan, dtype = self.plan, self.orig_dtype
        params = [(p.name, p.local) for group in self.groups for p in group.params]
        total = sum(count for _, count in params)
        if plan.loss_scaling:
            # GradScaler.unscale_, then the host reads found_inf (torch/amp/grad_scaler.py)
            out.append(in_place("unscale", total, dtype))
            out.extend(host_sync("found_inf"))
        if plan.gradient_clipping:
            out.extend(self._clip(len(params), total))
        if self.offload:
            if first_step:
                states = torch_states(plan.optimizer, params, dtype)
                out.extend(Alloc(Storage(s.name, s.num_bytes, s.category, place="host")) for s in states)
            out.append(host_torch_update(plan.optimizer, self.settings.optimizer_implementation, total))
        else:
            if first_step:
                out.extend(Alloc(storage) for storage in torch_states(plan.optimizer, params, dtype))
            out.extend(torch_update(plan.optimizer, params, dtype, self.settings.optimizer_implementation))
        out.extend(Free(group.gradient) for group in self.groups)
        out.extend(self._scales())
        return tuple(out)

    def _scales(self) -> list[Instruction]:
        """``precompute_float8_dynamic_scale_for_fsdp``: the largest value of each weight, agreed on at once."""
        low = [p.local for group in self.groups for p in group.params if p.low]
        if not low:
            return []
        out: list[Instruction] = [pointwise("float8.amax", "reduce", ((sum(low), self.orig_dtype),), ())]
        if self.plan.dp > 1:
            size = len(low) * NORM_BYTES
            out.extend(self.nccl.asynchronous("float8 scales", "all_reduce", size, "fp32", COMPUTE, "float8.amax"))
            out.append(wait("float8.amax", COMPUTE))
        return out

    def _clip(self, count: int, total: int) -> list[Instruction]:
        """``clip_grad_norm_`` on DTensors: the norms of all parameters are reduced as one small tensor.

        The norm is partial over the shards alone: replicas hold the same gradients.
        """
        dtype = self.orig_dtype
        flat = ((total, dtype),)
        out: list[Instruction] = [pointwise("clip.norm", "reduce", flat, ())]
        if self.plan.dp > 1:
            event = "fsdp.norm"
            size = count * NORM_BYTES
            out.extend(self.nccl.asynchronous("gradient norm", "all_reduce", size, dtype, COMPUTE, event))
            out.append(wait(event, COMPUTE))
        out.append(pointwise("clip.scale", "elementwise", flat, flat))
        return out
