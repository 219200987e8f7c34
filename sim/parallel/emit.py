"""From a stage's layers to instructions: the passes of one microbatch, with every storage's life.

A framework (``frameworks/``) supplies :class:`Hooks`: what it does before and after each module's
forward and backward, and when a parameter's gradient is ready. The order of ops, the storages, recompute
and the moments at which autograd lets go are the same for all of them and live here.

What decides a storage's life, as in eager PyTorch:

* forward: a tensor dies with its last reader of the pass, unless autograd saved it. A layer's input is also held by
  the caller's variable until the layer returns.
* backward: a saved tensor dies when every node that saved it has run; a gradient dies with its last reader.
* recompute: of the recomputed ops only the inputs are saved in forward; before the first backward op that needs them
  they run again, this time saving (torch/utils/checkpoint.py).

Liveness is worked out once for each distinct layer (:func:`plan_layer`) and instantiated where the layer stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from sim.ir.ledger import DTYPE_BYTES, Attention, Dim, DType, Gemm, Layer, Op, Pointwise, Tensor
from sim.ir.program import (
    COMPUTE,
    Alloc,
    Caller,
    Category,
    Chunk,
    Collective,
    Compute,
    Free,
    Instruction,
    Mark,
    Record,
    Recv,
    Send,
    Storage,
    Wait,
)

if TYPE_CHECKING:
    from sim.parallel.offload import Elsewhere


class Hooks(Protocol):
    """What a framework does around the model's own ops. Called in host order while a chunk is written.

    ``layer`` is the index of the layer in the stage; ``module`` the path of a torch module in it, "" for the
    layer itself. Containers are entered before the modules inside them, as torch's hooks are. During
    recompute the forward hooks run again (``recomputing`` is True), inside the backward hooks of the layer.
    """

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]: ...

    def post_forward(self, layer: int, module: str, recomputing: bool) -> Iterable[Instruction]: ...

    def pre_backward(self, layer: int, module: str) -> Iterable[Instruction]: ...

    def post_backward(self, layer: int, module: str) -> Iterable[Instruction]: ...

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> Iterable[Instruction]:
        """``gradient`` has just been written (its Alloc is emitted already). Whoever keeps it frees it."""
        ...

    def end_of_backward(self) -> Iterable[Instruction]:
        """Autograd's final callbacks: what is left in a bucket is reduced, the streams join."""
        ...


@dataclass(frozen=True, slots=True)
class Recompute:
    """Which forward ops run again in backward, and how.

    ``mode``       none | selective (ops of region ``core_attention``) | full (all ops of a block) | selective-op (of a
                   block all ops but those whose results torchtitan's policy keeps, see :meth:`cached`)
    ``reentrant``  torch's older form, DeepSpeed's and Megatron's: the whole function runs again and its outputs stay
                   until its backward is done. The other form stops at the last op that saves something.
    """

    mode: Literal["none", "selective", "selective-op", "full"] = "none"
    reentrant: bool = True
    interval: int = 1
    """Every how many blocks one is checkpointed, the last of them (torchtitan's ``selective_ac_option: "2"``)."""

    def of_block(self, number: int) -> Recompute:
        """Return what holds for a block, counted from 0 on the stage."""
        return self if (number + 1) % self.interval == 0 else NO_RECOMPUTE

    def ops(self, layer: Layer) -> frozenset[str]:
        if self.mode == "none" or layer.kind != "block":
            return frozenset()
        if self.mode == "full":
            return frozenset(op.name for op in layer.forward)
        if self.mode == "selective-op":
            cached = self.cached(layer)
            return frozenset(op.name for op in layer.forward if op.name not in cached)
        return frozenset(op.name for op in layer.forward if op.region == "core_attention")

    def cached(self, layer: Layer) -> frozenset[str]:
        """Return the ops of a checkpointed block that do not run again: their results are kept from forward.

        torchtitan's per-op policy (torchtitan/distributed/activation_checkpoint.py, ``_get_custom_policy``): fused
        attention, reduce-scatters, products with a bias or of batches (addmm, bmm), and every second of the other
        products (mm), the first of them. torch.utils.checkpoint keeps what such an op returns and hands it out when it
        comes up again (``_CachingTorchDispatchMode``, ``_CachedTorchDispatchMode``); what autograd saves for the op's
        backward is that of the second run.
        """
        if self.mode != "selective-op" or layer.kind != "block":
            return frozenset()
        found = []
        products = 0
        for op in layer.forward:
            kernel = op.kernels[0] if op.kernels else None
            if isinstance(kernel, Gemm):
                plain = not kernel.batch and f"{op.module}.bias" not in op.parameters
                products += plain
                if not plain or products % 2:
                    found.append(op.name)
            elif isinstance(kernel, Attention) or (op.exchange is not None and op.exchange.kind == "reduce_scatter"):
                found.append(op.name)
        return frozenset(found)


NO_RECOMPUTE = Recompute()
"""Of a compiled block too: what it makes again is written into its backward (``sim/parallel/fuse.py``)."""


@dataclass(frozen=True, slots=True)
class Passes:
    """The chunks of a microbatch. They share storages: what forward saves, backward frees.

    A split backward is two: ``backward`` makes the gradients of activations, ``weight_gradient`` those of the weights
    of matmuls (all other parameters' come with the first, unless autograd splits). Else ``weight_gradient`` is empty.
    """

    forward: Chunk
    backward: Chunk
    weight_gradient: Chunk = ()


@dataclass(frozen=True, slots=True)
class Border:
    """What crosses the ends of a stage that is not alone, for every microbatch. None at the ends of the model.

    The stage frees ``input`` and ``grad_output`` when it has used them; whoever receives allocates them. It allocates
    ``output`` and ``grad_input``; whoever sends frees them.
    """

    input: Storage | None = None
    output: Storage | None = None
    grad_output: Storage | None = None
    grad_input: Storage | None = None


# --- the plan of one layer ---------------------------------------------------------------------

_INPUT, _OUTPUT, _GRAD_OUTPUT, _GRAD_INPUT = range(4)
_NUM_BORDER = 4

_Verb = Literal["alloc", "free", "gradient", "pre", "post", "pre_again", "post_again", "pre_back", "post_back"]
_Step = tuple[_Verb, int, str] | Instruction
"""An instruction, or (verb, slot, module): a slot's alloc, free or gradient; entering and leaving a module."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A storage of a layer: ``parameter`` names the one whose gradient it is, "" for the others."""

    name: str
    num_bytes: int
    category: Category
    parameter: str = ""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Steps of the passes of a layer over numbered slots.

    Slots 0..3 cross the layer's border (input, output, gradient of the output, gradient of the input) and belong to
    the place where the layer stands; ``slots`` describes those from 4 on.
    """

    forward: tuple[_Step, ...]
    backward: tuple[_Step, ...]
    slots: tuple[Slot, ...]
    weight_gradient: tuple[_Step, ...] = ()


@dataclass(slots=True)
class _Node:
    """One run of an op. ``verbs``: how its module is entered and left. The life of slots is filled in by the tape."""

    op: Op
    verbs: tuple[_Verb, _Verb]
    born: list[int]
    gradients: list[int]
    scratch: list[int]
    dying: list[int]


class _Tape:
    """The layer's whole life in order: forward, then backward with the recomputed ops where they run again.

    Each run of an op makes new slots; ``death`` of a slot is the last node that holds it: its readers, and for what
    autograd saved the node that releases it.
    """

    def __init__(
        self, layer: Layer, gradient_dtype: DType, batch_inputs: Sequence[Tensor], fused: frozenset[str]
    ) -> None:
        self.layer = layer
        self.fused = fused
        self.gradient_dtype = gradient_dtype
        self.resident = {t.name for t in (*batch_inputs, *layer.buffers)}  # live whatever the layer does
        self.slots: list[Slot] = []
        self.nodes: list[_Node] = []
        self.death: dict[int, int] = {}
        self.parameters = {p.name: p for p in layer.parameters}

    def slot(self, tensor: Tensor, category: Category, parameter: str = "") -> int:
        self.slots.append(Slot(f"{self.layer.kind}.{tensor.name}", tensor.num_bytes, category, parameter))
        return _NUM_BORDER + len(self.slots) - 1

    def hold(self, slot: int, node: int) -> None:
        self.death[slot] = max(self.death.get(slot, -1), node)

    def run(self, op: Op, verbs: tuple[_Verb, _Verb], names: dict[str, int], border: Mapping[str, int]) -> int:
        """Append a run of ``op`` whose tensors are looked up and entered in ``names``; return the node's index."""
        index = len(self.nodes)
        for name in op.reads:
            if name not in self.resident:
                self.hold(names[name], index)
        node = _Node(op, verbs, [], [], [], [])
        for tensor in (*op.writes, *op.keeps):
            slot = border[tensor.name] if tensor.name in border else self.slot(tensor, "activations")
            names[tensor.name] = slot
            node.born.append(slot)
            self.hold(slot, index)
        for parameter in op.gradients:
            shape = (Dim("numel", 0),) if parameter in self.fused else self.parameters[parameter].shape
            gradient = Tensor(f"grad:{parameter}", shape, self.gradient_dtype)
            node.gradients.append(self.slot(gradient, "gradients", parameter))
        node.scratch.extend(self.slot(tensor, "temporary") for tensor in op.scratch)
        self.nodes.append(node)
        return index


def plan_layer(
    layer: Layer,
    recompute: Recompute,
    gradient_dtype: DType,
    batch_inputs: Sequence[Tensor] = (),
    fused: frozenset[str] = frozenset(),
    *,
    split: bool = False,
    retained: bool = False,
    held: tuple[str, ...] = (),
    main_dtype: DType | None = None,
) -> LayerPlan:
    """Work out what lives when in the passes of one layer.

    ``fused`` are parameters whose gradient the kernel adds to where it accumulates, a buffer of ``main_dtype``: it is
    no tensor of its own.
    ``split``: ops that only make gradients of parameters come after all others, in a pass of their own; what they read
    lives until then. ``retained``: it is autograd that splits, which keeps all that forward saved for the second pass
    and hands over every gradient there (``retain_graph`` of ``stage_backward_input`` in
    torch/distributed/pipelining/_backward.py); a kernel that makes both kinds is counted once, in the first.

    ``held`` names tensors that somebody keeps until the backward pass is over, besides autograd.

    ``gradient_dtype`` is the dtype in which autograd hands over parameter gradients: that of the parameters.
    ``batch_inputs`` and the layer's buffers may be read and saved; they stay whatever the layer does.
    """
    tape = _Tape(layer, gradient_dtype, batch_inputs, fused)
    recomputed, cached = recompute.ops(layer), recompute.cached(layer)
    inside = recomputed | cached
    again = [op for op in layer.forward if op.name in recomputed]
    made_again = {t.name for op in again for t in (*op.writes, *op.keeps)}
    first: dict[str, int] = {}
    backward_border: dict[str, int] = {}
    if layer.input is not None:
        first[layer.input.name] = _INPUT
        backward_border[f"grad:{layer.input.name}"] = _GRAD_INPUT
    border = {layer.output.name: _OUTPUT} if layer.output is not None else {}

    for op in layer.forward:
        tape.run(op, ("pre", "post"), first, border)
    num_forward = len(tape.nodes)
    if layer.input is not None:
        tape.hold(_INPUT, num_forward - 1)  # the caller's variable, until the layer returns

    second = dict(first)  # names as the recomputed run sees them
    saved_once = {name for op in layer.forward if op.name not in inside for name in op.saves}
    mixed = first  # names as a backward op sees them that belongs to no recomputed op alone
    grads: dict[str, int] = {f"grad:{layer.output.name}": _GRAD_OUTPUT} if layer.output is not None else {}
    node_of: dict[str, int] = {}  # forward op -> node that releases what it saved
    waiting, whole = bool(again), len(inside) == len(layer.forward)
    whole_backward = _accumulating(layer.backward, fused, main_dtype) if fused else layer.backward
    backward = _parted(whole_backward) if split and retained else whole_backward
    later = [op for op in backward if split and op.gradients and not op.writes]
    num_weight_gradients = len(later)
    for op in (*(op for op in backward if not any(op is other for other in later)), *later):
        ours = not inside.isdisjoint(op.releases)
        # the other form runs again when the first saved tensor is asked for, which no collective of gradients does
        starts = whole and (recompute.reentrant or op.exchange is None)
        if waiting and (starts or ours or any(name in made_again and name not in grads for name in op.reads)):
            waiting = False
            # torchtitan checkpoints with early_stop=False where it keeps results
            for repeated in again if cached else _repeated(again, recompute.reentrant):
                tape.run(repeated, ("pre_again", "post_again"), second, {})
            mixed = {**second, **{name: first[name] for name in saved_once if name in first}}
        names = {**(second if ours else mixed), **grads}
        index = tape.run(op, ("pre_back", "post_back"), names, backward_border)
        grads.update({t.name: names[t.name] for t in (*op.writes, *op.keeps)})
        node_of.update(dict.fromkeys(op.releases, index))
    if later and retained:
        node_of = dict.fromkeys(node_of, len(tape.nodes) - 1)
    for name in held:
        if name in first:
            tape.hold(first[name], len(tape.nodes) - num_weight_gradients - 1)
    _hold_saved(tape, recompute, node_of, first, second)
    forward, activations, weights = _steps(tape, num_forward, num_weight_gradients)
    return LayerPlan(forward, activations, tuple(tape.slots), weights)


def _accumulating(ops: Sequence[Op], fused: frozenset[str], main_dtype: DType | None) -> list[Op]:
    """Let the products that make the gradients of ``fused`` add them to the buffer: they read and write it."""
    return [
        replace(
            op,
            kernels=tuple(
                replace(kernel, result=main_dtype, accumulates=True) if isinstance(kernel, Gemm) else kernel
                for kernel in op.kernels
            ),
        )
        if not fused.isdisjoint(op.gradients)
        else op
        for op in ops
    ]


def _parted(ops: Sequence[Op]) -> list[Op]:
    """Part what makes gradients of activations and of parameters in two; the second is the gradient alone."""
    parts: list[Op] = []
    for op in ops:
        if not (op.gradients and op.writes):
            parts.append(op)
            continue
        parts.append(replace(op, gradients=()))
        alone = replace(op, name=f"{op.name}.parameters", kernels=(), writes=(), keeps=(), scratch=(), releases=())
        parts.append(replace(alone, exchange=None, awaits=()))
    return parts


def _hold_saved(
    tape: _Tape, recompute: Recompute, node_of: Mapping[str, int], first: Mapping[str, int], second: Mapping[str, int]
) -> None:
    """Let saved tensors live until the node that releases them, and what a checkpoint holds until it is done.

    ``first`` and ``second`` map names to slots as the forward pass and the recomputed run saw them.
    """
    forward = tape.layer.forward
    unreleased = [op.name for op in forward if op.saves and op.name not in node_of]
    assert not unreleased, f"layer {tape.layer.name}: no backward op releases what {unreleased} saved"
    cached = recompute.cached(tape.layer)
    recomputed = recompute.ops(tape.layer)
    inside = recomputed | cached
    again = [op for op in forward if op.name in recomputed]
    done = max((node_of[name] for name in sorted(inside) if name in node_of), default=-1)
    made = {t.name for op in again for t in (*op.writes, *op.keeps)}
    handed_out = {t.name for op in forward if op.name in cached for t in (*op.writes, *op.keeps)}
    read = {name for op in again for name in op.reads if name not in tape.resident}
    for op in forward:
        for name in op.saves:
            if name in tape.resident:
                continue
            tape.hold((second if op.name in inside else first)[name], node_of[op.name])
    for name in sorted(read - made - handed_out):
        tape.hold(first[name], done)  # what the checkpoint saved
    if recompute.reentrant:
        for name in sorted(made - read):
            if second[name] != first[name]:
                tape.hold(second[name], done)  # the function's outputs, which its backward starts from


def _repeated(again: Sequence[Op], reentrant: bool) -> Sequence[Op]:
    """Return the ops that really run again.

    The non-reentrant form stops as soon as everything that backward needs has been saved
    (``_StopRecomputationError`` in torch/utils/checkpoint.py): an op that saves only what it reads packs it before its
    kernel runs, so the last such op does not run.
    """
    saving = [index for index, op in enumerate(again) if op.saves]
    if reentrant or not saving:
        return again
    last = again[saving[-1]]
    made = {t.name for t in (*last.writes, *last.keeps)}
    return again[: saving[-1] + (0 if made.isdisjoint(last.saves) else 1)]


def _steps(
    tape: _Tape, num_forward: int, num_weight_gradients: int
) -> tuple[tuple[_Step, ...], tuple[_Step, ...], tuple[_Step, ...]]:
    """Write the tape as steps of forward, of backward, and of the weight gradients that are a pass of their own.

    Where backward is split, modules are left (reshard, reduce) once their weight gradients are there: at the end.
    """
    never = {_OUTPUT, _GRAD_INPUT}  # these die in the neighbour
    for slot, last in tape.death.items():
        if slot not in never:
            tape.nodes[last].dying.append(slot)
    issued: dict[tuple[int, Caller], tuple[Instruction, ...]] = {}
    passes: list[list[_Step]] = []
    end = len(tape.nodes) - num_weight_gradients
    for nodes in (tape.nodes[:num_forward], tape.nodes[num_forward:end], tape.nodes[end:]):
        steps: list[_Step] = []
        stack: list[tuple[str, _Verb]] = []
        in_weights = len(passes) == 2
        entered = ""
        for node in nodes:
            caller = _CALLERS[node.verbs[0]]
            if node.verbs[0] == "pre_again" and entered != "pre_again":
                caller = "checkpoint"
            entered = node.verbs[0]
            if not in_weights:
                _enter(steps, stack, node)
            steps.extend(("alloc", slot, "") for slot in (*node.born, *node.gradients, *node.scratch))
            instructions = issued.get((id(node.op), caller))
            if instructions is None:
                instructions = issued[id(node.op), caller] = tuple(_issue(node.op, caller))
            steps.extend(instructions)
            steps.extend(("free", slot, "") for slot in node.scratch)
            steps.extend(("gradient", slot, "") for slot in node.gradients)
            steps.extend(("free", slot, "") for slot in sorted(node.dying))
        _leave(steps, stack, 0)
        passes.append(steps)
    forward, backward, weights = passes
    if num_weight_gradients:
        weights += [step for step in backward if isinstance(step, tuple) and step[0] == "post_back"]
        backward = [step for step in backward if not (isinstance(step, tuple) and step[0] == "post_back")]
    return tuple(forward), tuple(backward), tuple(weights)


_CALLERS: dict[_Verb, Caller] = {"pre": "forward", "pre_again": "forward", "pre_back": "backward"}


def _issue(op: Op, caller: Caller) -> Iterator[Instruction]:
    """Yield what an op asks of the GPU: its collective on NCCL's stream for the axis, then its kernels."""
    exchange = op.exchange
    issuer: Caller = "library" if op.library else caller
    if exchange is not None:
        stream = f"nccl:{exchange.axis}"
        yield Record(f"{op.name} ready", COMPUTE)
        yield Wait(f"{op.name} ready", stream)
        tensor = exchange.tensor
        if exchange.kind == "send_recv":
            # one grouped kernel in NCCL; here on two streams, since in a ring each receives what another sends
            beside = f"{stream}:send"
            yield Wait(f"{op.name} ready", beside)
            yield Send(op.name, f"{exchange.axis}.send", tensor.num_bytes, beside, issuer)
            yield Recv(op.name, f"{exchange.axis}.recv", tensor.num_bytes, stream, issuer)
        else:
            yield Collective(op.name, exchange.kind, exchange.axis, tensor.num_bytes, tensor.dtype, stream, issuer)
        yield Record(op.name, stream)
        if exchange.blocking:
            yield Wait(op.name, COMPUTE)
    for awaited in op.awaits:
        yield Wait(awaited, COMPUTE)
    for kernel in op.kernels:
        yield Compute(op.name, kernel, COMPUTE, issuer)
        if issuer == "checkpoint":
            issuer = "forward"


def _enter(steps: list[_Step], stack: list[tuple[str, _Verb]], node: _Node) -> None:
    """Leave the modules that the node is not in, then enter its own, containers first ("", "mlp", "mlp.up_proj")."""
    parts = node.op.module.split(".") if node.op.module else []
    path = [(".".join(parts[:depth]), node.verbs[1]) for depth in range(len(parts) + 1)]
    shared = 0
    while shared < min(len(path), len(stack)) and path[shared] == stack[shared]:
        shared += 1
    _leave(steps, stack, shared)
    for module, leave in path[shared:]:
        steps.append((node.verbs[0], 0, module))
        stack.append((module, leave))


def _leave(steps: list[_Step], stack: list[tuple[str, _Verb]], depth: int) -> None:
    while len(stack) > depth:
        module, verb = stack.pop()
        steps.append((verb, 0, module))


# --- instantiation -----------------------------------------------------------------------------


_CACHED = "autocast:"
"""What a parameter's copy in the dtype of autocast is called (sim/model/tape.py, ``low_weight``)."""


def _until_autocast_ends(forward: Sequence[Instruction]) -> list[Instruction]:
    """Return a forward pass in which autocast's copies of parameters go at its end, not with their last reader.

    Autocast keeps them in a cache until its region ends, whatever recompute lets go of (``cached_cast`` and
    ``clear_cache`` in aten/src/ATen/autocast_mode.cpp). What autograd saved lives longer anyway.
    """
    late = [i for i in forward if isinstance(i, Free) and f".{_CACHED}" in i.storage.name]
    if not late:
        return list(forward)
    kept = {id(i) for i in late}
    return [*(i for i in forward if id(i) not in kept), *late]


class Emitter:
    """Writes the passes of a microbatch for a stage. Plans are kept, so several roles cost little more than one."""

    def __init__(
        self,
        layers: Sequence[Layer],
        batch_inputs: Sequence[Tensor],
        recompute: Recompute,
        gradient_dtype: DType,
        *,
        fused: Callable[[Layer], frozenset[str]] = lambda layer: frozenset(),
        main_dtype: DType | None = None,
        retained: bool = False,
        held: tuple[str, ...] = (),
        inside: tuple[bool, bool] = (False, False),
        elsewhere: Elsewhere | None = None,
        caches_casts: bool = True,
    ) -> None:
        """``fused``, ``main_dtype``, ``retained``, ``held`` as in :func:`plan_layer`; ``inside``: whether stages come
        before, after. ``elsewhere`` rewrites passes where saved tensors do not stay on the GPU. ``caches_casts``:
        autocast keeps its copies of parameters until its region ends, as it does of leaves that are no views."""
        self.layers = tuple(layers)
        self.batch_inputs = tuple(batch_inputs)
        self.names = layer_names(self.layers)
        self._recompute = recompute
        self._fused = {id(layer): fused(layer) for layer in self.layers}
        self._retained, self._held, self._main_dtype = retained, held, main_dtype
        self._elsewhere = elsewhere
        self._caches_casts = caches_casts
        self._split_plans: tuple[LayerPlan, ...] = ()
        self.gradient_dtype = gradient_dtype
        self.plans = self._plans(split=False)
        self.border = self._border(*inside)
        self.owners = {
            (index, own): _owner(self.layers, layer_name, parameter)
            for index, layer in enumerate(self.layers)
            for own, layer_name, parameter in layer.tied
        }
        self.gradient_bytes = DTYPE_BYTES[gradient_dtype]

    def _plans(self, *, split: bool) -> tuple[LayerPlan, ...]:
        plans: dict[tuple[int, bool], LayerPlan] = {}
        keys: list[tuple[int, bool]] = []
        number = 0
        for layer in self.layers:
            recompute = self._recompute.of_block(number)
            number += layer.kind == "block"
            key = id(layer), recompute is self._recompute
            keys.append(key)
            if key not in plans:
                plans[key] = plan_layer(
                    layer,
                    recompute,
                    self.gradient_dtype,
                    self.batch_inputs,
                    self._fused[id(layer)],
                    split=split,
                    retained=self._retained,
                    held=self._held if layer.kind == "head" else (),
                    main_dtype=self._main_dtype,
                )
        return tuple(plans[key] for key in keys)

    def _border(self, before: bool, after: bool) -> Border:
        first, last = self.layers[:1], self.layers[-1:]
        input_ = first[0].input if first and before else None
        output = last[0].output if last and after else None
        return Border(
            input=_activation(first[0], input_.name, input_) if input_ else None,
            output=_activation(last[0], output.name, output) if output else None,
            grad_output=_activation(last[0], f"grad:{output.name}", output) if output else None,
            grad_input=_activation(first[0], f"grad:{input_.name}", input_) if input_ else None,
        )

    def passes(self, hooks: Hooks, *, split: bool = False) -> Passes:
        """Return forward and backward of one microbatch, as the framework behind ``hooks`` runs them."""
        if split and not self._split_plans:
            self._split_plans = self._plans(split=True)
        plans = self._split_plans if split else self.plans
        inputs = [Storage(f"batch.{t.name}", t.num_bytes, "activations", True) for t in self.batch_inputs]
        tables = self._tables(plans)
        forward: list[Instruction] = [Mark("forward", "batch"), *(Alloc(s) for s in inputs)]
        forward_starts: list[int] = []
        for index in range(len(self.layers)):
            forward.append(Mark("forward", self.names[index]))
            forward_starts.append(len(forward))
            self._replay(forward, plans[index].forward, plans[index].slots, tables[index], index, hooks)
        backward: list[Instruction] = []
        self._waiting: dict[tuple[int, str], Storage] = {}
        backward_starts: list[int] = []
        for index in reversed(range(len(self.layers))):
            backward.append(Mark("backward", self.names[index]))
            backward_starts.append(len(backward))
            self._replay(backward, plans[index].backward, plans[index].slots, tables[index], index, hooks)
        weights: list[Instruction] = []
        if split:
            for index in reversed(range(len(self.layers))):
                weights.append(Mark("backward", self.names[index]))
                steps, slots = plans[index].weight_gradient, plans[index].slots
                self._replay(weights, steps, slots, tables[index], index, hooks)
        if self._elsewhere is not None:
            from sim.parallel.offload import Written

            entered = [table[_INPUT] for table in tables]
            starts = forward_starts, backward_starts[::-1]
            written = Written(self.layers, forward, backward, weights, *starts, len(backward), entered)
            self._elsewhere.rewrite(written)
            forward, backward, weights = written.forward, written.backward, written.weights
        if self._caches_casts and any(
            f".{_CACHED}" in slot.name for plan in {id(p): p for p in plans}.values() for slot in plan.slots
        ):
            forward = _until_autocast_ends(forward)
        assert not self._waiting, f"gradients of tied parameters never met: {sorted(self._waiting)}"
        last = weights if split else backward
        last.append(Mark("backward", "end"))
        last.extend(hooks.end_of_backward())
        last.extend(Free(s) for s in inputs)
        return Passes(tuple(forward), tuple(backward), tuple(weights))

    def gradient_order(self) -> tuple[tuple[int, str], ...]:
        """Return (layer, parameter) in the order in which backward finishes their gradients."""
        order = []
        for index in reversed(range(len(self.layers))):
            for step in self.plans[index].backward:
                if isinstance(step, tuple) and step[0] == "gradient":
                    parameter = self.plans[index].slots[step[1] - _NUM_BORDER].parameter
                    if (index, parameter) not in self.owners:
                        order.append((index, parameter))
        return tuple(order)

    def _tables(self, plans: Sequence[LayerPlan]) -> list[list[Storage]]:
        """One storage for each slot of each layer; a layer's output is the next one's input."""
        nothing = Storage("nothing", 0, "temporary")
        tables: list[list[Storage]] = []
        for layer, plan in zip(self.layers, plans, strict=True):
            table = [nothing] * _NUM_BORDER
            if layer.output is not None:
                table[_OUTPUT] = _activation(layer, layer.output.name, layer.output)
            if layer.input is not None:
                table[_GRAD_INPUT] = _activation(layer, f"grad:{layer.input.name}", layer.input)
            # a gradient outlives its microbatch: the framework decides who frees it
            table.extend(Storage(s.name, s.num_bytes, s.category, not s.parameter) for s in plan.slots)
            tables.append(table)
        for before, after in itertools.pairwise(tables):
            after[_INPUT] = before[_OUTPUT]
            before[_GRAD_OUTPUT] = after[_GRAD_INPUT]
        border = self.border
        if border.input is not None and border.grad_input is not None:
            tables[0][_INPUT], tables[0][_GRAD_INPUT] = border.input, border.grad_input
        if border.output is not None and border.grad_output is not None:
            tables[-1][_OUTPUT], tables[-1][_GRAD_OUTPUT] = border.output, border.grad_output
        return tables

    def _replay(
        self,
        out: list[Instruction],
        steps: Sequence[_Step],
        slots: Sequence[Slot],
        table: Sequence[Storage],
        index: int,
        hooks: Hooks,
    ) -> None:
        for step in steps:
            if not isinstance(step, tuple):
                out.append(step)
                continue
            verb, slot, module = step
            if verb == "alloc":
                out.append(Alloc(table[slot]))
            elif verb == "free":
                out.append(Free(table[slot]))
            elif verb == "gradient":
                self._gradient(out, index, slots[slot - _NUM_BORDER].parameter, table[slot], hooks)
            elif verb in ("pre", "pre_again"):
                out.extend(hooks.pre_forward(index, module, verb == "pre_again"))
            elif verb in ("post", "post_again"):
                out.extend(hooks.post_forward(index, module, verb == "post_again"))
            elif verb == "pre_back":
                out.extend(hooks.pre_backward(index, module))
            else:
                out.extend(hooks.post_backward(index, module))

    def _gradient(self, out: list[Instruction], index: int, parameter: str, gradient: Storage, hooks: Hooks) -> None:
        """Hand a gradient to the framework; those of a tied parameter wait for each other and are added.

        The engine accumulates in place in the input buffer of the one AccumulateGrad node
        (torch/csrc/autograd/input_buffer.cpp).
        """
        owner = self.owners.get((index, parameter), (index, parameter))
        if owner != (index, parameter) and not gradient.num_bytes:
            out.append(Free(gradient))
            return  # the kernel has added it to the owner's already
        if owner != (index, parameter):
            self._waiting[owner] = gradient
            return
        first = self._waiting.pop(owner, None)
        if first is not None:
            numel = Tensor("gradient", (Dim("numel", gradient.num_bytes // self.gradient_bytes),), self.gradient_dtype)
            out.append(Compute("tied gradient", Pointwise("elementwise", (numel, numel), (numel,))))
            out.append(Free(gradient))
            gradient = first
        out.extend(hooks.gradient_ready(index, parameter, gradient))


def _activation(layer: Layer, name: str, like: Tensor) -> Storage:
    return Storage(f"{layer.kind}.{name}", like.num_bytes, "activations", True)


def layer_names(layers: Sequence[Layer]) -> tuple[str, ...]:
    """Return a name for each place: repeated layers are numbered ("model.layers.3")."""
    repeated = {layer.name for layer in layers if sum(other.name == layer.name for other in layers) > 1}
    seen: dict[str, int] = {}
    names = []
    for layer in layers:
        if layer.name in repeated:
            names.append(f"{layer.name}.{seen.setdefault(layer.name, 0)}")
            seen[layer.name] += 1
        else:
            names.append(layer.name)
    return tuple(names)


def _owner(layers: Sequence[Layer], layer_name: str, parameter: str) -> tuple[int, str]:
    for index, layer in enumerate(layers):
        if layer.name == layer_name:
            return index, parameter
    raise AssertionError(f"tied to layer {layer_name!r}, which is not on this stage")
