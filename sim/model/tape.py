"""A tape: forward ops written once, the backward pass derived from them as torch's autograd engine runs it.

Each forward op leaves a node, a closure that emits its backward ops. The engine takes ready nodes with the highest
sequence number first (torch/csrc/autograd/engine.cpp), which on one thread is the reverse of their creation. Gradients
of a tensor with several consumers meet in an input buffer: the first is kept, later ones are added to it *in place* if
nobody else holds it, else the sum is a new tensor (torch/csrc/autograd/input_buffer.cpp, ``can_accumulate_inplace``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sim.ir.ledger import Dim, DType, Gemm, Kernel, Op, Parameter, Pointwise, Shape, Tensor
from sim.model.precision import Precision


class Value:
    """A variable of the autograd graph. ``tensor`` names the storage that holds it: views share one."""

    __slots__ = ("needs_grad", "tensor")

    def __init__(self, tensor: Tensor, needs_grad: bool = True) -> None:
        self.tensor = tensor
        self.needs_grad = needs_grad

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> Shape:
        return self.tensor.shape

    @property
    def dtype(self) -> DType:
        return self.tensor.dtype


class Tape:
    """Ops of one layer as they are written. ``finish_backward`` runs the nodes and empties the tape."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.parameters: list[Parameter] = []
        self.forward: list[Op] = []
        self.backward: list[Op] = []
        self.buffers: list[Tensor] = []
        self._nodes: list[Callable[[], None]] = []
        self._pending: dict[Value, Tensor] = {}
        self._num_grads: dict[str, int] = {}
        self._weights: dict[str, Tensor] = {}

    # --- parameters ---

    def parameter(self, name: str, shape: Shape, *, decays: bool = True) -> Parameter:
        parameter = Parameter(name, shape, decays)
        self.parameters.append(parameter)
        return parameter

    def stored(self, parameter: Parameter) -> Tensor:
        """Return the parameter as a tensor for a kernel to read."""
        return Tensor(parameter.name, parameter.shape, self.precision.stored)

    def low_weight(self, parameter: Parameter, module: str) -> Tensor:
        """Return the weight that a matrix product reads; autocast keeps one cast of it per region and parameter."""
        if not self.precision.autocast:
            return self.stored(parameter)
        if parameter.name not in self._weights:
            cast = Tensor(f"autocast:{parameter.name}", parameter.shape, self.precision.low)
            self._weights[parameter.name] = cast
            self.op(
                f"{parameter.name}.cast", (Pointwise("copy", (self.stored(parameter),), (cast,)),),
                writes=(cast,), parameters=(parameter.name,), module=module,
            )  # fmt: skip
        return self._weights[parameter.name]

    # --- forward ---

    def op(
        self,
        name: str,
        kernels: tuple[Kernel, ...],
        *,
        reads: tuple[str, ...] = (),
        writes: tuple[Tensor, ...] = (),
        saves: tuple[str, ...] = (),
        keeps: tuple[Tensor, ...] = (),
        scratch: tuple[Tensor, ...] = (),
        parameters: tuple[str, ...] = (),
        module: str = "",
        region: str = "",
    ) -> None:
        self.forward.append(
            Op(name, kernels, reads, writes, saves, keeps, scratch, parameters, module=module, region=region)
        )

    def node(self, emit: Callable[[], None]) -> None:
        """Register the backward of the op just written."""
        self._nodes.append(emit)

    # --- backward ---

    def back(
        self,
        name: str,
        kernels: tuple[Kernel, ...],
        *,
        reads: tuple[str, ...] = (),
        writes: tuple[Tensor, ...] = (),
        scratch: tuple[Tensor, ...] = (),
        parameters: tuple[str, ...] = (),
        gradients: tuple[str, ...] = (),
        releases: tuple[str, ...] = (),
        module: str = "",
        region: str = "",
    ) -> None:
        self.backward.append(
            Op(name, kernels, reads, writes, (), (), scratch, parameters, gradients, releases, module, region)
        )

    def take(self, value: Value) -> Tensor | None:
        """Return the gradient that arrived for a value, and forget it; None if nothing depends on it."""
        return self._pending.pop(value, None)

    def fresh(self, value: Value, dtype: DType | None = None) -> Tensor:
        """Return a new tensor for a gradient of ``value``."""
        base = f"grad:{value.name}"
        count = self._num_grads.get(base, 0)
        self._num_grads[base] = count + 1
        return Tensor(f"{base}.{count}" if count else base, value.shape, dtype or value.dtype)

    def give(self, value: Value, gradient: Tensor, module: str = "", region: str = "") -> None:
        """Put a gradient into the input buffer of ``value``; cast it first if the engine would (validate_outputs)."""
        if not value.needs_grad:
            return
        if gradient.dtype != value.dtype:
            cast = self.fresh(value)
            self.back(
                f"{cast.name}.cast", (Pointwise("copy", (gradient,), (cast,)),),
                reads=(gradient.name,), writes=(cast,), module=module, region=region,
            )  # fmt: skip
            gradient = cast
        held = self._pending.get(value)
        if held is None:
            self._pending[value] = gradient
            return
        shared = any(t.name == held.name for v, t in self._pending.items() if v is not value)
        total = self.fresh(value) if shared else held
        self.back(
            f"{gradient.name}.accumulate", (Pointwise("elementwise", (held, gradient), (total,)),),
            reads=(held.name, gradient.name), writes=(total,) if shared else (), module=module, region=region,
        )  # fmt: skip
        self._pending[value] = total

    def start_backward(self, loss: Value) -> None:
        """Begin the pass at the loss: its gradient is a one in fp32."""
        ones = Tensor(f"grad:{loss.name}", loss.shape, loss.dtype)
        self._num_grads[ones.name] = 1
        self.back("loss.seed", (Pointwise("elementwise", (), (ones,)),), writes=(ones,))
        self._pending[loss] = ones

    def finish_backward(self, source: Value | None, output: Value | None) -> None:
        """Run the nodes, last first. ``grad:output`` is what arrives for ``output``, ``grad:input`` what leaves."""
        if output is not None:
            self._pending[output] = Tensor("grad:output", output.shape, output.dtype)
        self._num_grads["grad:output"] = self._num_grads["grad:input"] = 1
        for emit in reversed(self._nodes):
            emit()
        self._nodes.clear()
        if source is not None:
            self._name_input_gradient(self._pending.pop(source).name)
        assert not self._pending, f"gradients nobody took: {[v.name for v in self._pending]}"

    def _name_input_gradient(self, final: str) -> None:
        """Let the storage that ends as the input's gradient be ``grad:input``.

        Where the engine added in place into ``grad:output`` itself, the other summand takes its part: the same bytes
        are live at every moment, and the two names of the border stay two storages.
        """
        if final == "grad:output":
            last = max(i for i, op in enumerate(self.backward) if op.name.endswith(".accumulate") and final in op.reads)
            final = self.backward[last].reads[1]
        new = "grad:input"

        def renamed(tensor: Tensor) -> Tensor:
            return replace(tensor, name=new) if tensor.name == final else tensor

        for i, op in enumerate(self.backward):
            if final in op.reads or any(t.name == final for t in op.writes):
                kernels = tuple(
                    replace(k, reads=tuple(map(renamed, k.reads)), writes=tuple(map(renamed, k.writes)))
                    if isinstance(k, Pointwise)
                    else k
                    for k in op.kernels
                )
                self.backward[i] = replace(
                    op, kernels=kernels, reads=tuple(new if r == final else r for r in op.reads),
                    writes=tuple(map(renamed, op.writes)),
                )  # fmt: skip


# --- ops that every module uses -----------------------------------------------------------------


def pointwise(
    tape: Tape,
    name: str,
    inputs: tuple[Value, ...],
    out: str,
    *,
    grads: tuple[tuple[str, ...] | None, ...],
    dtype: DType | None = None,
    shape: Shape | None = None,
    keeps: tuple[Tensor, ...] = (),
    constants: tuple[Tensor, ...] = (),
    also_reads: tuple[str, ...] = (),
    kind: str = "elementwise",
    random: bool = False,
    backward_scratch: int = 0,
    module: str = "",
    region: str = "",
) -> Value:
    """Write an op of one kernel forward and one kernel backward per input that needs a gradient.

    ``grads[i]``: names of saved tensors that the gradient of input i needs besides the incoming one (inputs, ``out``
    or ``keeps``); None: no gradient. ``constants`` are buffers that the kernel reads. ``random``: forward draws a
    number for each element. ``backward_scratch``: tensors of the output's size and dtype that live while the backward
    runs, a kernel each: what is saved goes through them before it meets the incoming gradient (``pow_backward`` in
    torch/csrc/autograd/FunctionsManual.cpp: ``grad * (exponent * self.pow(exponent - 1))``, two).
    """
    result = Value(
        Tensor(out, inputs[0].shape if shape is None else shape, dtype or inputs[0].dtype),
        any(v.needs_grad for v, g in zip(inputs, grads, strict=True) if g is not None),
    )
    named = {v.name: v.tensor for v in inputs} | {t.name: t for t in keeps} | {out: result.tensor}
    named |= {t.name: t for t in constants}
    needed = [g for v, g in zip(inputs, grads, strict=True) if g is not None and v.needs_grad]
    saves = tuple(dict.fromkeys(n for g in needed for n in g if not n.startswith("buffer:")))
    reads = tuple(v.tensor for v in inputs)
    tape.op(
        name, (Pointwise(kind, reads + constants, (result.tensor, *keeps), random=random),),
        reads=tuple(dict.fromkeys([v.name for v in inputs] + list(also_reads))), writes=(result.tensor,),
        saves=saves, keeps=keeps, module=module, region=region,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        todo = [(v, g) for v, g in zip(inputs, grads, strict=True) if g is not None and v.needs_grad]
        made = []
        for i, (value, saved) in enumerate(todo):
            new = tape.fresh(value, value.dtype)
            scratch = tuple(
                Tensor(f"{name}.backward.scratch{j}", result.shape, result.dtype) for j in range(backward_scratch)
            )
            factors = tuple(named[n] for n in saved)
            kernels: list[Kernel] = []
            for tensor in scratch:
                kernels.append(Pointwise(kind, factors, (tensor,)))
                factors = (tensor,)
            tape.back(
                f"{name}.backward" if len(todo) == 1 else f"{name}.backward{i}",
                (*kernels, Pointwise(kind, (grad, *factors), (new,))),
                reads=(grad.name, *(n for n in saved if not n.startswith("buffer:"))), writes=(new,), scratch=scratch,
                releases=(name,) if i == len(todo) - 1 and saves else (), module=module, region=region,
            )  # fmt: skip
            made.append((value, new))
        for value, new in made:
            tape.give(value, new, module, region)

    tape.node(emit)
    return result


def cast(
    tape: Tape,
    name: str,
    x: Value,
    dtype: DType,
    *,
    out: str = "",
    module: str = "",
    region: str = "",
    also_reads: tuple[str, ...] = (),
) -> Value:
    """``x.to(dtype)``: nothing if it is that already; saves nothing, casts the gradient back."""
    if x.dtype == dtype:
        return x
    return pointwise(
        tape, name, (x,), out or name, grads=((),), dtype=dtype, kind="copy", also_reads=also_reads, module=module,
        region=region,
    )  # fmt: skip


def add(
    tape: Tape,
    name: str,
    left: Value,
    right: Value,
    dtype: DType,
    *,
    out: str,
    module: str = "",
    also_reads: tuple[str, ...] = (),
) -> Value:
    """``left + right``: saves nothing; its gradient is handed on to both, the same storage."""
    result = Value(Tensor(out, left.shape, dtype))
    tape.op(
        name, (Pointwise("elementwise", (left.tensor, right.tensor), (result.tensor,)),),
        reads=(left.name, right.name, *also_reads), writes=(result.tensor,), module=module,
    )  # fmt: skip

    def emit() -> None:
        if (grad := tape.take(result)) is not None:
            tape.give(left, grad, module)
            tape.give(right, grad, module)

    tape.node(emit)
    return result


def add_in_place(tape: Tape, name: str, left: Value, right: Value, *, module: str = "") -> Value:
    """``left += right``: the sum lives in left's storage."""
    result = Value(left.tensor)
    tape.op(
        name, (Pointwise("elementwise", (left.tensor, right.tensor), (left.tensor,)),), reads=(left.name, right.name),
        module=module,
    )  # fmt: skip

    def emit() -> None:
        if (grad := tape.take(result)) is not None:
            tape.give(left, grad, module)
            tape.give(right, grad, module)

    tape.node(emit)
    return result


def dropout(
    tape: Tape,
    name: str,
    x: Value,
    p: float,
    *,
    out: str,
    module: str = "",
    region: str = "",
    also_reads: tuple[str, ...] = (),
) -> Value:
    """``F.dropout`` on CUDA: native_dropout keeps a mask of one byte an element. Nothing when p is 0."""
    if not p:
        return x
    mask = Tensor(f"{out}.mask", x.shape, "bool")
    return pointwise(
        tape, name, (x,), out, grads=((mask.name,),), keeps=(mask,), also_reads=also_reads, random=True, module=module,
        region=region,
    )  # fmt: skip


def split(tape: Tape, name: str, x: Value, shapes: tuple[Shape, ...], *, module: str = "") -> tuple[Value, ...]:
    """Views of one storage (``split``, ``chunk``); their gradients are concatenated into a new tensor."""
    parts = tuple(Value(Tensor(x.name, shape, x.dtype)) for shape in shapes)

    def emit() -> None:
        grads = [g for part in parts if (g := tape.take(part)) is not None]
        new = tape.fresh(x)
        tape.back(
            f"{name}.backward", (Pointwise("copy", tuple(grads), (new,)),),
            reads=tuple(dict.fromkeys(g.name for g in grads)), writes=(new,), module=module,
        )  # fmt: skip
        tape.give(x, new, module)

    tape.node(emit)
    return parts


def narrow(tape: Tape, name: str, x: Value, shape: Shape, *, module: str = "") -> Value:
    """A view of a part (slice, select): its gradient is filled with zeros to the full size of ``x``."""
    part = Value(Tensor(x.name, shape, x.dtype), x.needs_grad)

    def emit() -> None:
        grad = tape.take(part)
        if grad is None:
            return
        new = tape.fresh(x)
        tape.back(
            f"{name}.backward", (Pointwise("elementwise", (), (new,)), Pointwise("copy", (grad,), (grad,))),
            reads=(grad.name,), writes=(new,), module=module,
        )  # fmt: skip
        tape.give(x, new, module)

    tape.node(emit)
    return part


def cat(tape: Tape, name: str, left: Value, right: Value, out: str, shape: Shape, *, module: str) -> Value:
    """``torch.cat`` of two: the gradients are views of the incoming one."""
    result = Value(Tensor(out, shape, left.dtype))
    tape.op(
        name, (Pointwise("copy", (left.tensor, right.tensor), (result.tensor,)),), reads=(left.name, right.name),
        writes=(result.tensor,), module=module,
    )  # fmt: skip

    def emit() -> None:
        if (grad := tape.take(result)) is not None:
            for part in (left, right):
                tape.give(part, Tensor(grad.name, part.shape, grad.dtype), module)

    tape.node(emit)
    return result


def handed_on(
    tape: Tape,
    name: str,
    x: Value,
    out: str,
    *,
    constants: tuple[Tensor, ...] = (),
    dtype: DType | None = None,
    kind: str = "elementwise",
    module: str = "",
    region: str = "",
) -> Value:
    """A new tensor whose gradient is handed on as it is: x plus a constant, or x in another layout."""
    result = Value(Tensor(out, x.shape, dtype or x.dtype))
    tape.op(
        name, (Pointwise(kind, (x.tensor, *constants), (result.tensor,)),), reads=(x.name,), writes=(result.tensor,),
        module=module, region=region,
    )  # fmt: skip

    def emit() -> None:
        if (grad := tape.take(result)) is not None:
            tape.give(x, grad, module, region)

    tape.node(emit)
    return result


def linear(
    tape: Tape,
    module: str,
    x: Value,
    n: Shape,
    k: Shape,
    *,
    bias: bool,
    out: str,
    also_reads: tuple[str, ...] = (),
) -> Value:
    """``F.linear``: y[m, n] = x[m, k] @ w[n, k]^T + b[n]. Saves x (and the weight, which is a parameter).

    Backward in the order of AddmmBackward0/MmBackward0: grad_input, grad_weight, then the bias's sum, which the engine
    does when it checks the gradient's shape (torch/csrc/autograd/engine.cpp, validate_outputs).
    Under autocast the input is cast (each call anew), the weight once; their gradients are cast back. Leaves out: the
    bias's cast, n elements that autocast's cache holds until its region ends.
    """
    low, gemm = tape.precision.low, tape.precision.gemm
    m = x.shape[:2]
    weight = tape.parameter(f"{module}.weight", n + k)
    shift = tape.parameter(f"{module}.bias", n, decays=False) if bias else None
    if tape.precision.autocast:
        x = cast(tape, f"{out}.input.cast", x, low, module=module)
    held = tape.low_weight(weight, module)
    result = Value(Tensor(out, m + n, low))
    autocast_reads = (held.name,) if tape.precision.autocast else ()
    parameters = (weight.name,) + ((shift.name,) if shift else ())
    tape.op(
        module, (Gemm(m, n, k, gemm),), reads=tuple(dict.fromkeys((x.name, *autocast_reads, *also_reads))),
        writes=(result.tensor,),
        saves=(x.name, *autocast_reads), parameters=parameters, module=module,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        new = tape.fresh(x) if x.needs_grad else None
        if new is not None:
            tape.back(
                f"{module}.grad_input", (Gemm(m, k, n, gemm),), reads=(grad.name, *autocast_reads), writes=(new,),
                parameters=() if tape.precision.autocast else (weight.name,), module=module,
            )  # fmt: skip
        bias_kernel: tuple[Kernel, ...] = ()
        if shift is not None:
            bias_kernel = (Pointwise("reduce", (grad,), (Tensor(f"grad:{shift.name}", shift.shape, grad.dtype),)),)
        names = (shift.name, weight.name) if shift else (weight.name,)
        if tape.precision.autocast:
            lows = tuple(Tensor(f"grad:autocast:{p.name}", p.shape, low) for p in (shift, weight) if p is not None)
            tape.back(
                f"{module}.grad_weight", (Gemm(n, k, m, gemm), *bias_kernel),
                reads=(grad.name, x.name), writes=lows, releases=(module,), module=module,
            )  # fmt: skip
            for t, p in zip(lows, names, strict=True):
                stored = Tensor(f"grad:{p}", t.shape, tape.precision.stored)
                tape.back(
                    f"{p}.grad.cast", (Pointwise("copy", (t,), (stored,)),),
                    reads=(t.name,), gradients=(p,), module=module,
                )  # fmt: skip
        else:
            tape.back(
                f"{module}.grad_weight", (Gemm(n, k, m, gemm), *bias_kernel),
                reads=(grad.name, x.name), gradients=names, releases=(module,), module=module,
            )  # fmt: skip
        if new is not None:
            tape.give(x, new, module)

    tape.node(emit)
    return result


def dims(*pairs: tuple[str, int]) -> Shape:
    """Return a shape from (name, size) pairs."""
    return tuple(Dim(name, size) for name, size in pairs)
