"""ZeRO 3: parameters, gradients and states in partitions; a parameter is whole only around the modules that read it.

Source: deepspeed/runtime/zero/stage3.py, partitioned_param_coordinator.py, partition_parameters.py and
parameter_offload.py of DeepSpeed 0.19.8.

* Each parameter is padded to the ranks and cut by itself; small ones (``param_persistence_threshold``) stay whole.
* The first pass records which modules run in which order. From then on every module that is entered fetches what it
  lacks, waits for it, and prefetches along the record, up to ``prefetch_bucket_size`` and ``max_live_parameters``.
* What is fetched together is one all-gather into one flat buffer; when it has arrived each parameter is copied out,
  and the buffer goes when the last of them has been asked for. A parameter fetched alone is used where it arrived.
* A module that is left lets go of its parameters, unless the record uses them again within ``max_reuse_distance``.
* ``memory_efficient_linear`` replaces ``F.linear`` by a function that hands over the weight's gradient before the
  bias's (linear.py, ``LinearFunctionForZeroStage3``); autograd's own comes in the other order.
* Gradients are copied into a permanent bucket, reduce-scattered when the next does not fit, added to one flat buffer.
* Hooks around every module, forward and backward, cost the host more than the module's own kernels
  (validation/measure/measure_zero3.py).
* ``offload_optimizer``: that flat buffer, master, moments and fp32 gradients live on the host, and DeepSpeedCPUAdam
  steps; with a ``ratio`` the first sub groups stay on the GPU. ``offload_param``: the partitions live on the host too,
  and each gather first copies its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from sim.interop.deepspeed_config import DeepSpeedSettings
from sim.ir.ledger import DTYPE_BYTES, DType, Layer
from sim.ir.program import (
    COMPUTE,
    Alloc,
    Chunk,
    Free,
    HostCompute,
    HostWait,
    Instruction,
    Mark,
    Storage,
    UseOn,
)
from sim.parallel.emit import Emitter
from sim.parallel.frameworks.deepspeed_base import DeepSpeed, communication_dtype, named_dtype
from sim.parallel.frameworks.flat import (
    NORM_BYTES,
    Trained,
    accumulate,
    copy,
    flat_storage,
    host_alloc,
    host_cast,
    host_storage,
    host_sync,
    host_update,
    in_place,
    partition_elements,
    pointwise,
    record,
    sub_groups,
    to_gpu,
    to_host,
    wait,
    wait_stream,
)
from sim.parallel.frameworks.plan import Plan
from sim.parallel.optimizer import foreach_step

ALL_GATHER_STREAM = "all_gather"
REDUCE_STREAM = "reduce_and_partition"
MAX_FETCH_EVENTS = 2
"""``__max_ongoing_fetch_events``: more than these, and the host waits for the oldest."""
MAX_REDUCE_EVENTS = 2
"""``max_param_reduce_events``."""

_PARTITIONED, _IN_FLIGHT, _AVAILABLE = range(3)
_ROOT = (-1, "")
_Place = tuple[int, str]
"""A torch module: (index of the layer, path in it); the modules around the layers are ``_ROOT``."""


class _Handle:
    """An all-gather under way. ``held`` are its buffers, dropped when none of the ``waiting`` is to be asked for.

    ``source`` is what it reads, where that is not the partition itself: dropped when it has arrived.
    """

    __slots__ = ("alone", "complete", "event", "group", "held", "source", "waiting")

    def __init__(
        self,
        group: list[int],
        held: tuple[Storage, ...],
        event: str,
        alone: bool,
        source: tuple[Storage, ...] = (),
    ) -> None:
        self.group = group
        self.held = held
        self.event = event
        self.alone = alone
        self.source = source
        self.waiting = len(group)
        self.complete = False


def _biased_linears(layers: Sequence[Layer]) -> frozenset[_Place]:
    """Return the modules that own a bias beside a weight of two dimensions or more.

    A tied weight's gradient waits for that of its other use, and the bias does not wait for it.
    """
    found: set[_Place] = set()
    known: dict[int, tuple[str, ...]] = {}
    for index, layer in enumerate(layers):
        modules = known.get(id(layer))
        if modules is None:
            tied = {own for own, _, _ in layer.tied}
            matrices = {
                p.module
                for p in layer.parameters
                if p.name.endswith(".weight") and len(p.shape) > 1 and p.name not in tied
            }
            modules = known[id(layer)] = tuple(
                p.module for p in layer.parameters if p.name.endswith(".bias") and p.module in matrices
            )
        found.update((index, module) for module in modules)
    return frozenset(found)


class Stage3(DeepSpeed):
    """Hooks, setup and optimizer step of ZeRO 3.

    Emission needs the record of modules. Give it with :meth:`use_trace`; else the first microbatch that is written is
    what the first one of a job is (fetching without prefetching, recording), and those after it follow its record.
    """

    def __init__(self, layers: Sequence[Layer], settings: DeepSpeedSettings, plan: Plan) -> None:
        super().__init__(layers, settings, plan)
        self.sizes = [p.num_elements for p in self.parameters]
        self.partitions = [partition_elements(count, plan.dp) for count in self.sizes]
        self.partition = sum(self.partitions)
        self.groups = sub_groups(self.partitions, settings.sub_group_size)
        self.offload = settings.offload_optimizer == "cpu"
        self.offload_param = settings.offload_param == "cpu"
        # subgroup_to_device: the first sub groups stay on the GPU
        stay = int((1 - settings.offload_ratio) * len(self.groups))
        self.on_host = [self.offload and number >= stay for number in range(len(self.groups))]
        self.group_of = [number for number, group in enumerate(self.groups) for _ in group]
        self.copies = plan.dp > 1 or self.offload_param
        """Whether a gathered parameter is other memory than its partition."""
        self.leaving: dict[tuple[int, bool], list[Instruction]] = {}
        self.gather_stream = ALL_GATHER_STREAM if settings.overlap_comm else COMPUTE
        self.reduce_stream = REDUCE_STREAM if settings.overlap_comm else COMPUTE
        self.communication_dtype = communication_dtype(settings, plan.parameter_dtype)
        self.accumulation_dtype: DType = named_dtype(settings.grad_accum_dtype) or plan.parameter_dtype
        self.persistent = self._persistent()
        self.entered = self._entered()
        self.modules = self._modules()
        self.hooks_forward, self.hooks_backward = self._hooks("zero3_forward"), self._hooks("zero3_backward")
        self.trace: list[_Place] | None = None
        self.recorded: list[_Place] = []
        self.linears = _biased_linears(self.layers) if settings.memory_efficient_linear else frozenset()
        self.early: dict[_Place, Storage] = {}
        self.weighed: set[_Place] = set()
        self.pending: dict[int, Storage] = {}
        # one storage of a gathered parameter: it is gathered, dropped and gathered again
        self.whole = [self._gathered(index) for index in range(len(self.parameters))]
        self.allocs = [Alloc(s) for s in self.whole]
        self.releases: list[tuple[Instruction, ...]] = [
            (Free(s),) if self.gather_stream == COMPUTE else (UseOn(s, COMPUTE), Free(s)) for s in self.whole
        ]
        self.status = [_AVAILABLE if keeps else _PARTITIONED for keeps in self.persistent]
        self.active: list[set[_Place]] = [set() for _ in self.parameters]

    def _persistent(self) -> list[bool]:
        """``mark_persistent_parameters``: in order, those that are small enough while all together are."""
        total, marks = 0, []
        for count in self.sizes:
            keeps = (
                count + total <= self.settings.model_persistence_threshold
                and count <= self.settings.param_persistence_threshold
            )
            marks.append(keeps)
            total += count if keeps else 0
        return marks

    def _entered(self) -> dict[int, set[str]]:
        """Return the torch modules of each layer (by its id) that ops run in, containers and the layer itself too."""
        entered: dict[int, set[str]] = {}
        for layer in self.layers:
            if id(layer) in entered:
                continue
            known = entered[id(layer)] = {""}
            for op in (*layer.forward, *layer.backward):
                parts = op.module.split(".")
                known.update(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        return entered

    def _hooks(self, kind: str) -> dict[int, HostCompute]:
        """Return what the hooks around the modules of each layer (by its id) take of the host in a pass.

        Every module has them, with parameters or without (``_register_deepspeed_module`` of parameter_offload.py). They
        stand together where the layer is entered.
        """
        return {key: HostCompute("zero3 hooks", kind, len(modules)) for key, modules in self.entered.items()}

    def _modules(self) -> dict[_Place, tuple[int, ...]]:
        """Return the parameters that each torch module owns itself, tied ones included.

        A parameter whose module runs no op of its own belongs to the nearest container that does.
        """
        found: dict[_Place, list[int]] = {}
        for index, layer in enumerate(self.layers):
            known = self.entered[id(layer)]
            for parameter in layer.parameters:
                module = parameter.module
                while module not in known:
                    module = module.rpartition(".")[0]
                found.setdefault((index, module), []).append(self.owner[index, parameter.name].index)
        return {place: tuple(sorted(set(indices))) for place, indices in found.items()}

    def _gathered(self, index: int) -> Storage:
        dp = self.plan.dp
        count = self.partitions[index] * dp if self.copies else 0
        return flat_storage(self.parameters[index].name, count, self.dtype, "parameters", self.gather_stream)

    # setup

    def setup(self) -> Chunk:
        """Parameters are made whole and cut one by one (``zero.Init``), then laid into one flat buffer."""
        out: list[Instruction] = [Mark("setup", "model")]
        pieces = []
        for parameter, count in zip(self.parameters, self.partitions, strict=True):
            full = flat_storage(parameter.name, parameter.num_elements, self.dtype, "temporary")
            out.append(Alloc(full))
            if self.offload_param:
                own = self.settings.offload_param_pin_memory
                piece, made = host_alloc(parameter.name, count * self.element, own, "parameters")
                out.extend(made)
            else:
                piece = flat_storage(parameter.name, count, self.dtype, "parameters")
                out.append(Alloc(piece))
            pieces.append(piece)
            out.append(Free(full))
        out.extend(self.model_buffers())
        out.append(Mark("setup", "optimizer"))
        if self.offload_param:  # _create_param_groups_fp16_flat_cpu_memory: pinned, whatever the settings
            out.extend(host_alloc("parameters.partition", self.partition * self.element, True, "parameters")[1])
            out.extend(Free(piece) for piece in pieces)
        else:
            out.extend(Free(piece) for piece in pieces)  # defragment(): by way of the host
            out.append(Alloc(flat_storage("parameters.partition", self.partition, self.dtype, "parameters")))
        out.extend(self._setup_masters())
        out.extend(self._setup_gradients())
        # every parameter is gathered once for its hook; one of each size has the same effect on the allocator
        for index in {self.sizes[i]: i for i in reversed(range(len(self.sizes)))}.values():
            full = flat_storage(
                self.parameters[index].name, self.partitions[index] * self.plan.dp, self.dtype, "temporary"
            )
            out += [Alloc(full), Free(full)]
        if self.copies:
            # the first pass gathers the persistent ones; every step ends with them gathered
            out.extend(self.allocs[i] for i, keeps in enumerate(self.persistent) if keeps)
        return tuple(out)

    def _setup_masters(self) -> list[Instruction]:
        """``_create_fp32_partitions``: each sub group is converted and cloned; the conversion stays until the next."""
        out: list[Instruction] = []
        converted: Storage | None = None
        for number, group in enumerate(self.groups):
            count = sum(self.partitions[i] for i in group)
            host = self.on_host[number]
            master = flat_storage(f"master.{number}", count, "fp32", "optimizer")
            if host:
                master = host_storage(master.name, master.num_bytes, category="optimizer")
            if self.dtype == "fp32" and host == self.offload_param:  # .to() gives the same tensor
                out.append(Alloc(master))
                continue
            previous, converted = converted, flat_storage("converted", count, "fp32", "temporary")
            if host:
                converted = host_storage("converted", converted.num_bytes)
            out.append(Alloc(converted))
            if not host:
                out.append(copy("master", count, self.dtype, "fp32"))
            if previous is not None:
                out.append(Free(previous))
            out.append(Alloc(master))
        if converted is not None:
            out.append(Free(converted))
        return out

    def _setup_gradients(self) -> list[Instruction]:
        """``initialize_optimizer_states``, the bucket, and the flat buffer that gradients accumulate in."""
        out: list[Instruction] = []
        pinned = self.settings.pin_memory
        counts = [sum(self.partitions[i] for i in group) for group in self.groups]
        largest = max(counts, default=0)
        if self.offload:
            zeros = host_storage("grad.buffer", 4 * largest)
            out.append(Alloc(zeros))
            for number, count in enumerate(counts):
                kept, made = host_alloc(f"grad.{number}", 4 * count, pinned, "gradients")
                out.extend(made)
                if not self.on_host[number]:
                    out += [Alloc(flat_storage(f"grad.{number}", count, "fp32", "gradients")), Free(kept)]
        else:
            zeros = flat_storage("grad.buffer", largest, "fp32", "temporary")
            out.append(Alloc(zeros))
        out.append(Free(zeros))
        if self.settings.contiguous_gradients:
            size = self.settings.reduce_bucket_size
            out.append(Alloc(flat_storage("ipg", size, self.communication_dtype, "buffers")))
        accumulated = flat_storage("grad.partition", self.partition, self.accumulation_dtype, "gradients")
        if self.offload:
            out.extend(host_alloc("grad.partition", accumulated.num_bytes, pinned, "gradients")[1])
        else:
            out.append(Alloc(accumulated))
        return out

    # the record

    def use_trace(self, emitter: Emitter) -> None:
        """Take the record from the plans of an emitter, without writing a pass."""
        places: list[_Place] = [_ROOT] * self.plan.root_modules
        wanted = ("pre", "pre_again", "pre_back")
        for index, plan in enumerate(emitter.plans):
            places.extend((index, step[2]) for step in plan.forward if isinstance(step, tuple) and step[0] in wanted)
        places.extend([_ROOT] * self.plan.root_modules)
        for index in reversed(range(len(emitter.plans))):
            steps = emitter.plans[index].backward
            places.extend((index, step[2]) for step in steps if isinstance(step, tuple) and step[0] in wanted)
        self._complete([place for place in places if self._is_module(place)])

    def _is_module(self, place: _Place) -> bool:
        """Embedding and head are groups of modules here, not modules of their own, unless they own a parameter."""
        return place == _ROOT or bool(place[1]) or place in self.modules or self.layers[place[0]].kind == "block"

    def _complete(self, trace: list[_Place]) -> None:
        """``construct_parameter_trace_from_module_trace``, and what release asks of it, as running sums."""
        self.trace = trace
        self.queue: list[tuple[int, int]] = []
        self.reach = [0]
        self.uses: list[list[int]] = [[] for _ in self.parameters]
        none: tuple[int, ...] = ()
        for step, place in enumerate(trace):
            mine = self.modules.get(place, none)
            total = self.reach[-1]
            for index in mine:
                self.queue.append((index, step))
                self.uses[index].append(step)
                total += self.sizes[index]
            self.reach.append(total)

    # passes

    def begin_microbatch(self, first: bool, last: bool) -> None:
        """``reset_step``. Every fetch event is over: the host waited for the reductions that follow them."""
        super().begin_microbatch(first, last)
        self.leaving = {}
        if self.trace is None and self.recorded:
            self._complete(self.recorded)
        self.recorded = []
        self.step_id = 0
        self.front = 0
        self.recent = [-1] * len(self.parameters)
        self.next_use = [0] * len(self.parameters)
        self.num_available = 0
        self.handles: dict[int, _Handle] = {}
        self.fetch_events: deque[str] = deque()
        self.num_gathers = self.num_fetches = self.num_reductions = 0
        self.reduce_events: deque[str] = deque()
        self.behind = ""
        self.moved = True
        self.in_bucket: list[tuple[Trained, Storage | None]] = []
        self.elements = 0
        self.leftovers: list[_Place] = []
        self.early, self.weighed = {}, set()
        self.started = self.turned = False

    def load(self) -> Iterable[Instruction]:
        """Nothing is left to wait for: the host has waited for the reductions, which come last."""
        return ()

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        out: list[Instruction] = []
        if not self.started:
            self.started = True
            for _ in range(self.plan.root_modules):
                self._fetch(_ROOT, out)
        place = (layer, module)
        if not module:
            out.append(self.hooks_forward[id(self.layers[layer])])
        if module or self._is_module(place):
            self._fetch(place, out)
        return out

    def post_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]:
        place = (layer, module)
        return self._release(place) if place in self.modules else ()

    def pre_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        out: list[Instruction] = []
        if not self.turned:
            self.turned = True
            for _ in range(self.plan.root_modules):
                self._fetch(_ROOT, out)
        place = (layer, module)
        if not module:
            out.append(self.hooks_backward[id(self.layers[layer])])
        if module or self._is_module(place):
            self._fetch(place, out)
        return out

    def post_backward(self, layer: int, module: str) -> Iterable[Instruction]:
        place = (layer, module)
        if place not in self.modules:
            return ()
        if self.layers[layer].kind == "embedding":
            self.leftovers.append(place)  # token ids need no gradient: the hook on the input never runs
            return ()
        return self._release(place)

    def _fetch(self, place: _Place, out: list[Instruction]) -> None:
        """``fetch_sub_module``: gather what is missing, wait for it, prefetch."""
        step = self.step_id
        mine = self.modules.get(place, ())
        if self.trace is None:
            self.recorded.append(place)
        else:
            assert self.trace[step] == place, f"ZeRO-3 trace: expected {self.trace[step]} at {step}, not {place}"
        if mine:
            missing = [index for index in mine if self.status[index] == _PARTITIONED]
            if missing:
                self._gather(missing, out)
            for index in mine:
                self.active[index].add(place)
                if index in self.handles:
                    self._await(index, out)
        if self.behind:  # current_stream().wait_stream(allgather_stream), where something has arrived there
            out.append(wait(self.behind, COMPUTE))
            self.behind = ""
        if self.trace is not None:
            self._prefetch(mine, out)
        self.step_id = step + 1

    def _prefetch(self, mine: tuple[int, ...], out: list[Instruction]) -> None:
        """Take what this module needs off the queue, then gather what comes next, as far as the limits allow."""
        recent, queue, front, status = self.recent, self.queue, self.front, self.status
        for index in mine:
            if recent[index] < self.step_id:
                fetched, at = queue[front]
                assert fetched in mine, "ZeRO-3 trace: the queue of parameters is out of step"
                recent[fetched] = at
                front += 1
        self.front = front
        if front == len(queue):
            return
        limit = min(self.settings.max_live_parameters - self.num_available, self.settings.prefetch_bucket_size)
        ahead: list[int] = []
        while front < len(queue) and limit > 0:
            index, at = queue[front]
            front += 1
            recent[index] = max(recent[index], at)
            if status[index] == _PARTITIONED and index not in ahead:
                ahead.append(index)
                limit -= self.sizes[index]
        self.front = front
        if ahead:
            self._gather(sorted(ahead), out)

    def _gather(self, group: list[int], out: list[Instruction]) -> None:
        """``all_gather_coalesced``: on the gather stream, into one flat buffer, or its own if it is alone."""
        self.num_available += sum(self.sizes[index] for index in group)
        handle = self._launch(group, out)
        for index in group:
            self.status[index] = _IN_FLIGHT
            self.handles[index] = handle

    def _launch(self, group: list[int], out: list[Instruction]) -> _Handle:
        dp, stream = self.plan.dp, self.gather_stream
        event = f"gather.{self.num_gathers}"
        self.num_gathers += 1
        count = sum(self.partitions[index] for index in group)
        alone = len(group) == 1
        held: tuple[Storage, ...] = ()
        source: tuple[Storage, ...] = ()
        if dp > 1:
            if alone:
                out.append(self.allocs[group[0]])
                if self.offload_param:
                    source = (self._from_host(group[0], out),)
                    self.moved = True
            else:
                flat = flat_storage("gathered", count * dp, self.dtype, "buffers", stream)
                held = (flat,)
                out.append(Alloc(flat))
                sources = [self._from_host(index, out) for index in group] if self.offload_param else []
                out.append(copy("gather.flatten", count, self.dtype, self.dtype, stream))
                out.extend(Free(s) for s in sources)
                self.moved = True
            name = self.parameters[group[0]].name if alone else "parameters"
            size = count * dp * self.element
            current = stream if self.moved else self.nccl.stream  # nothing ran there but waits for gathers
            self.moved = stream == COMPUTE
            out.extend(self.nccl.asynchronous(name, "all_gather", size, self.dtype, current, event))
        elif self.offload_param:
            for index in group:
                out.append(self.allocs[index])
                out.append(to_gpu("parameter from host", self.partitions[index] * self.element, stream))
        return _Handle(group, held, event, alone, source)

    def _from_host(self, index: int, out: list[Instruction], stream: str = "") -> Storage:
        """``ds_tensor.to(device)``: a blocking copy of a partition, on the gather stream; the host waits for it."""
        stream = stream or self.gather_stream
        partition = flat_storage("partition", self.partitions[index], self.dtype, "buffers", stream)
        out += [Alloc(partition), to_gpu("parameter from host", partition.num_bytes, stream)]
        out.extend(host_sync("from host", stream))
        return partition

    def _await(self, index: int, out: list[Instruction]) -> None:
        """Take a parameter out of the registry of those in flight, and wait for it on the gather stream."""
        stream = self.gather_stream
        if len(self.fetch_events) > MAX_FETCH_EVENTS:
            out.append(HostWait(self.fetch_events.popleft()))
        handle = self.handles.pop(index)
        handle.waiting -= 1
        if not handle.complete:
            handle.complete = True
            self._arrive(handle, out)
            for each in handle.group:
                self.status[each] = _AVAILABLE
            out.extend(Free(s) for s in handle.source)
        if handle.waiting == 0 and handle.held:
            out.extend(Free(s) for s in handle.held)
        event = f"fetch.{self.num_fetches % (MAX_FETCH_EVENTS + 2)}"
        self.num_fetches += 1
        out.append(record(event, stream))
        self.fetch_events.append(event)
        if stream != COMPUTE:
            self.behind = event

    def _arrive(self, handle: _Handle, out: list[Instruction]) -> None:
        """``wait()`` of the handle, on the gather stream: each parameter is copied out of the flat buffer."""
        stream = self.gather_stream
        if self.plan.dp == 1:
            out.extend(host_sync("gathered", stream))  # NoGatherHandle.wait synchronises the stream
            return
        out.append(wait(handle.event, stream))
        if not handle.alone:
            self.moved = True
            for each in handle.group:
                out.append(self.allocs[each])
                out.append(copy("gather.unflatten", self.sizes[each], self.dtype, self.dtype, stream))

    def _release(self, place: _Place) -> list[Instruction]:
        """``release_sub_module``: keep what persists, was skipped by the prefetch, or is used again soon."""
        out: list[Instruction] = []
        step = self.step_id
        for index in self.modules[place]:
            self.active[index].discard(place)
            if self.persistent[index] or self.status[index] != _AVAILABLE or self.active[index]:
                continue
            if self.trace is not None:
                if self.recent[index] > step:
                    continue
                uses, at = self.uses[index], self.next_use[index]
                while at < len(uses) and uses[at] < step:
                    at += 1
                self.next_use[index] = at
                if at < len(uses):
                    distance = self.reach[uses[at]] - self.reach[step]
                    if distance < self.settings.max_reuse_distance:
                        continue
            self._drop(index, out)
        return out

    def _drop(self, index: int, out: list[Instruction]) -> None:
        self.status[index] = _PARTITIONED
        self.num_available -= self.sizes[index]
        if self.copies:
            out.extend(self.releases[index])

    # gradients

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        """A linear's weight comes before its bias, whichever the ledger has first."""
        module, _, leaf = parameter.rpartition(".")
        if (layer, module) not in self.linears:
            return self._to_bucket(layer, parameter, gradient)
        if leaf == "bias" and (layer, module) not in self.weighed:
            self.early[layer, module] = gradient
            return ()
        out = self._to_bucket(layer, parameter, gradient)
        if leaf == "weight":
            self.weighed.add((layer, module))
            bias = self.early.pop((layer, module), None)
            if bias is not None:
                out.extend(self._to_bucket(layer, f"{module}.bias", bias))
        return out

    def _to_bucket(self, layer: int, parameter: str, gradient: Storage) -> list[Instruction]:
        """``reduce_independent_p_g_buckets_and_remove_grads`` and ``__add_grad_to_ipg_bucket``."""
        trained = self.owner[layer, parameter]
        count, size, stream = trained.num_elements, self.settings.reduce_bucket_size, self.reduce_stream
        out: list[Instruction] = []
        if self.elements + count > size and self.elements > 0:
            out.extend(self._reduce())
        out.extend(wait_stream(stream, COMPUTE))
        if self.settings.contiguous_gradients and self.elements + count <= size:
            out.append(copy("gradient to bucket", count, self.dtype, self.communication_dtype, stream))
            self._forget(gradient, out)
            self.in_bucket.append((trained, None))
        else:
            self.in_bucket.append((trained, gradient))
        self.elements += count
        return out

    def _forget(self, gradient: Storage, out: list[Instruction]) -> None:
        """Free a gradient that the reduce stream still reads."""
        if self.reduce_stream != COMPUTE:
            out.append(UseOn(gradient, self.reduce_stream))
        out.append(Free(gradient))

    def _reduce(self) -> list[Instruction]:
        """``__reduce_and_partition_ipg_grads``: reduce-scatter what is in the bucket, add it to the partitions."""
        bucket, total, stream = self.in_bucket, self.elements, self.reduce_stream
        if not bucket:
            return []
        self.in_bucket, self.elements = [], 0
        out: list[Instruction] = []
        if len(self.reduce_events) > MAX_REDUCE_EVENTS:
            out.append(HostWait(self.reduce_events.popleft()))
        dp, dtype = self.plan.dp, self.communication_dtype
        counts = [self.partitions[t.index] for t, _ in bucket]
        temporary: list[Storage] = []
        if (
            self.settings.contiguous_gradients
            and total <= self.settings.reduce_bucket_size
            and not self.settings.reduce_scatter
        ):
            out.append(in_place("bucket.average", total, dtype, stream))
            out.extend(self.nccl.blocking("gradients", "all_reduce", total * DTYPE_BYTES[dtype], dtype, stream))
            if dp > 1:
                # postscale: .mul(), out of place (gradient_predivide_factor 1 is not the number of ranks)
                temporary.append(flat_storage("bucket.scaled", total, dtype, "buffers", stream))
                out += [Alloc(temporary[-1]), copy("bucket.scale", total, dtype, dtype, stream)]
        else:
            self._scatter(bucket, total, temporary, out)
        if dtype != self.accumulation_dtype:
            cast = flat_storage("partition.cast", sum(counts), self.accumulation_dtype, "buffers", stream)
            temporary.append(cast)
            out.append(Alloc(cast))
            out.extend(copy("partition.cast", count, dtype, self.accumulation_dtype, stream) for count in counts)
        for trained, _ in bucket:
            out.extend(self._partition(trained.index))
        for _, gradient in bucket:
            if gradient is not None:
                self._forget(gradient, out)
        out.extend(Free(s) for s in temporary)
        event = f"reduced.{self.num_reductions % (MAX_REDUCE_EVENTS + 2)}"
        self.num_reductions += 1
        out.append(record(event, stream))
        self.reduce_events.append(event)
        return out

    def _scatter(
        self,
        bucket: Sequence[tuple[Trained, Storage | None]],
        total: int,
        temporary: list[Storage],
        out: list[Instruction],
    ) -> None:
        """``__avg_scatter_grads``: one reduce-scatter of the bucket's gradients, interleaved by rank."""
        dp, dtype, stream = self.plan.dp, self.communication_dtype, self.reduce_stream
        scattered = sum(self.partitions[t.index] for t, _ in bucket) * dp
        if bucket[0][1] is not None and dtype != self.dtype:
            cast = flat_storage("bucket.cast", total, dtype, "buffers", stream)
            temporary.append(cast)
            out += [Alloc(cast), copy("bucket.cast", total, self.dtype, dtype, stream)]
        if len(bucket) > 1 or bucket[0][0].num_elements % dp:
            flat = flat_storage("bucket.flat", scattered, dtype, "buffers", stream)
            temporary.append(flat)
            out += [Alloc(flat), copy("bucket.interleave", scattered, dtype, dtype, stream)]
        out.append(in_place("bucket.average", scattered, dtype, stream))
        size = scattered * DTYPE_BYTES[dtype]
        out.extend(self.nccl.blocking("gradients", "reduce_scatter", size, dtype, stream))

    def _partition(self, index: int) -> Sequence[Instruction]:
        """``partition_grads``: the first microbatch overwrites, later ones add."""
        if self.offload:
            return self._to_host(index)
        dtype, stream, count = self.accumulation_dtype, self.reduce_stream, self.partitions[index]
        if self.first:
            return (copy("gradient to partition", count, dtype, dtype, stream),)
        return (accumulate("accumulate partition", count, dtype, dtype, stream),)

    def _to_host(self, index: int) -> list[Instruction]:
        """``partition_grads`` with ``offload_optimizer``, on the reduce stream.

        The first microbatch's goes to the host and is read back, later ones are added to what comes from there. At the
        boundary the norm is taken on the GPU and the fp32 gradient goes to where its sub group is stepped.
        """
        count, host = self.partitions[index], self.on_host[self.group_of[index]]
        known = self.leaving.get((count, host))
        if known is not None:
            return known
        dtype, stream = self.accumulation_dtype, self.reduce_stream
        size = count * DTYPE_BYTES[dtype]
        own = flat_storage("grad.gpu", count, dtype, "buffers", stream)
        there, back = to_host("gradient to host", size, stream), to_gpu("gradient from host", size, stream)
        out: list[Instruction]
        if self.first:
            out = [there, Alloc(own), back]
        else:
            out = [Alloc(own), back, accumulate("accumulate partition", count, dtype, dtype, stream), there]
        if self.last:
            double = Storage("norm.double", NORM_BYTES * count, "temporary", stream=stream)
            out += [
                Alloc(double),
                pointwise("norm.cast", "elementwise", ((count, dtype),), ((count, "int64"),), stream),
                pointwise("norm", "reduce", ((count, "int64"),), (), stream),
                Free(double),
            ]
            cast = flat_storage("grad.cast", count, "fp32", "temporary", stream)
            if dtype != "fp32":
                out += [Alloc(cast), copy("grad.cast", count, dtype, "fp32", stream)]
            if host:
                out.append(to_host("gradient to host", 4 * count, stream))
            else:
                out.append(copy("gradient to partition", count, "fp32", "fp32", stream))
            if dtype != "fp32":
                out.append(Free(cast))
        out.append(Free(own))
        self.leaving[count, host] = out
        return out

    def end_of_backward(self) -> Iterable[Instruction]:
        """``independent_gradient_partition_epilogue``, then modules whose hooks never ran let go."""
        out = self._reduce()
        out.extend(host_sync("reduced", self.reduce_stream))
        for place in reversed(self.leftovers):
            for index in self.modules[place]:
                self.active[index].discard(place)
                if not self.persistent[index] and self.status[index] == _AVAILABLE and not self.active[index]:
                    self._drop(index, out)
        self.leftovers = []
        held = [index for index, status in enumerate(self.status) if status != _PARTITIONED]
        for index in held:
            if self.status[index] == _IN_FLIGHT:  # _clean_inflight_param_registry, at the next forward
                self._await(index, out)
            if not self.persistent[index]:
                self._drop(index, out)
        return out

    # optimizer

    def optimizer_step(self, first_step: bool) -> Chunk:
        self.nccl.reset()
        out: list[Instruction] = [Mark("optimizer", "norm")]
        kept = [index for index, keeps in enumerate(self.persistent) if keeps]
        if self.copies:  # _partition_all_parameters: the persistent ones too
            for index in kept:
                out.extend(self.releases[index])
        dtype = self.accumulation_dtype
        if self.plan.loss_scaling:
            out.extend(self._overflow())
        for group in self.groups:
            if self.offload:
                out.extend(self._norm_of_offloaded(group))
                continue
            out.extend(self.steps.norm((self.partitions[i] for i in group), dtype))
            out.extend(self.nccl.blocking("norm", "all_reduce", 8, "fp32", COMPUTE))
        out.extend(host_sync("norm"))
        out.append(Mark("optimizer", "step"))
        for number, group in enumerate(self.groups):
            out.extend(self._step_group(number, group, first_step))
        out.append(Mark("optimizer", "gather"))
        if self.copies and kept:
            sources = [self._from_host(index, out, COMPUTE) for index in kept] if self.offload_param else []
            out.extend(self.allocs[index] for index in kept)
            for number, index in enumerate(kept):
                size = self.partitions[index] * self.plan.dp * self.element
                event = f"persistent.{number}"
                name = self.parameters[index].name
                out.extend(self.nccl.asynchronous(name, "all_gather", size, self.dtype, COMPUTE, event))
            out.extend(wait(f"persistent.{number}", COMPUTE) for number in range(len(kept)))
            out.extend(host_sync("persistent"))
            out.extend(Free(source) for source in sources)
        return tuple(out)

    def _overflow(self) -> list[Instruction]:
        """``has_overflow``: isinf makes the absolute values and a mask, isnan a mask, of the whole partition."""
        stream, count, dtype = self.reduce_stream, self.partition, self.accumulation_dtype
        answer = [
            *wait_stream(COMPUTE, stream),
            *self.nccl.blocking("overflow", "all_reduce", 1, "uint8", COMPUTE),
            *host_sync("overflow"),
        ]
        if self.offload:
            return [HostCompute("overflow", "cpu_overflow", count), to_gpu("overflow", 1, stream), *answer]
        absolute = flat_storage("overflow.abs", count, dtype, "temporary", stream)
        mask = flat_storage("overflow.mask", count, "bool", "temporary", stream)
        return [
            Alloc(absolute),
            copy("overflow.abs", count, dtype, dtype, stream),
            Alloc(mask),
            pointwise("overflow.isinf", "elementwise", ((count, dtype),), ((count, "bool"),), stream),
            Free(absolute),
            pointwise("overflow.any", "reduce", ((count, "bool"),), (), stream),
            Free(mask),
            Alloc(mask),
            pointwise("overflow.isnan", "elementwise", ((count, dtype),), ((count, "bool"),), stream),
            pointwise("overflow.any", "reduce", ((count, "bool"),), (), stream),
            Free(mask),
            *answer,
        ]

    def _norm_of_offloaded(self, group: range) -> list[Instruction]:
        """``complete_grad_norm_calculation_for_cpu_offload``: two kernels over single numbers for each parameter."""
        one = ((1, "int64"),)
        square = pointwise("norm.sum", "elementwise", one, one)
        out: list[Instruction] = [square] * (2 * len(group))
        out.extend(host_sync("norm"))
        out.extend(self.nccl.blocking("norm", "all_reduce", DTYPE_BYTES["fp32"], "fp32", COMPUTE))
        out.extend(host_sync("norm"))
        return out

    def _step_group(self, number: int, group: range, first_step: bool) -> list[Instruction]:
        """Flatten the group's gradients, cast, unscale, step, write the 16-bit partition."""
        count = sum(self.partitions[i] for i in group)
        stepped = [(f"partition.{number}", count)]
        if self.on_host[number]:
            return self._step_on_host(count, stepped, first_step)
        out: list[Instruction] = []
        gradient = None if self.offload else self._fp32_gradient(count, len(group), out)
        out.append(in_place("unscale", count, "fp32"))
        if first_step:
            out.extend(Alloc(s) for s in self.steps.states(stepped))
        if self.offload:  # backup_optimizer is torch's AdamW
            out.extend(foreach_step(self.plan.optimizer, stepped, "fp32", "fp32"))
        else:
            out.extend(self.steps.update(stepped))
        if self.offload_param:  # a blocking copy to the host is cast there
            out.append(to_host("parameters to host", 4 * count))
            out.extend(host_sync("parameters to host"))
            out.append(host_cast(count, self.dtype))
        else:
            out.append(copy("update parameters", count, "fp32", self.dtype))
        if gradient is not None:
            out.append(Free(gradient))
        return out

    def _step_on_host(self, count: int, stepped: list[tuple[str, int]], first_step: bool) -> list[Instruction]:
        """A sub group whose states are on the host; the GPU gets its 16 bits from pageable memory, and all wait."""
        out: list[Instruction] = [HostCompute("unscale", "cpu_scale", count)]
        if first_step:
            out.extend(Alloc(s) for s in self.steps.states(stepped, on_host=True))
        out.append(host_update(self.plan.optimizer, count))
        if self.offload_param or self.dtype != "fp32":
            out.append(host_cast(count, self.dtype))
        if not self.offload_param:
            out.append(to_gpu("parameters from host", count * self.element))
            out.extend(host_sync("parameters from host"))
        return out

    def _fp32_gradient(self, count: int, num_parameters: int, out: list[Instruction]) -> Storage | None:
        """Flatten a sub group's gradients and cast them to fp32; one tensor in fp32 is stepped where it is."""
        dtype = self.accumulation_dtype
        gradient = flat_storage("grad.fp32", count, "fp32", "gradients")
        if dtype == "fp32":
            if num_parameters == 1:
                return None
            out += [Alloc(gradient), copy("grad.flatten", count, dtype, dtype)]
            return gradient
        flat = flat_storage("grad.flat", count, dtype, "gradients")
        if num_parameters > 1:
            out += [Alloc(flat), copy("grad.flatten", count, dtype, dtype)]
        out += [Alloc(gradient), copy("grad.cast", count, dtype, "fp32")]
        if num_parameters > 1:
            out.append(Free(flat))
        return gradient
