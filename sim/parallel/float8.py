"""Linear layers in FP8 as torchao's Float8Linear runs them: a transform of a layer that is sharded already.

Scales are dynamic: each operand of a product is cast from 16 bit when it is used. What autograd keeps is the 16-bit
input; torch.compile sees that forward and backward cast the same tensor and keeps one cast, so that its partitioner may
choose (``shared``).

* ``tensorwise``: the largest value of a tensor, then a cast. "TN" products need the other operand order in backward: a
  transposed copy of gradient, input and weight. Under tensor parallelism the cast comes before the all-gather, and
  ranks agree on the largest value first (Float8ColwiseParallel, Float8RowwiseParallel, PrepareFloat8ModuleInput).
* ``rowwise``: a scale a row, so that each product has casts of its own along the dimension that it sums; activations
  are gathered in 16 bit.
* Products of gradients promote their partial sums to fp32 (``gemm_config_grad_input``, ``gemm_config_grad_weight``:
  no ``use_fast_accum``). The rowwise kernel is slow at that, so that these are products without scales, and a kernel of
  its own reads and writes each result once more to scale it (``addmm_float8_unwrapped``: ``post_inverse_scale``).
  Inductor works both scales out of the largest values for each element there, partly in fp64 (:data:`SCALING_FLOPS`).
* The largest values of columns come from a pass over the whole tensor before the cast that writes the other order: a
  reduction along another dimension shares no kernel with the one along rows, and the tensor is there in 16 bits. Where
  there are :data:`COLUMNS_PER_SM` columns an SM, Inductor does not split the reduction, and so writes one kernel for
  both, which goes down the columns twice: reads that do not coalesce (``kind`` columns). Of fewer columns it splits the
  reduction, and a gradient's two casts become one kernel, that of its rows' largest values, whose writes in the other
  order do not coalesce: a reduction is not tiled in both dimensions, as casts by a known scale are (``kind``
  transpose). It is taken to be as slow as reads that do not coalesce, which were measured.
* ``gathered_low``: FSDP gathers weights in FP8 (``enable_fsdp_float8_all_gather``): no cast where they are used.

Sources: torchao/float8/{float8_linear,float8_scaling_utils,float8_tensor_parallel,float8_ops,fsdp_utils}.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from sim.ir.ledger import Dim, Exchange, Gemm, Kernel, Layer, Ledger, Op, Pointwise, Tensor, size
from sim.parallel.quantise import linears

Granularity = Literal["tensorwise", "rowwise"]

COLUMNS_PER_SM = 64
"""``num_sm * 2 * 32`` of ``Reduction.num_splits``, torch/_inductor/ir.py: so many keep the GPU busy by themselves."""
SCALING_FLOPS = 192
"""What scaling a result by its row and its column costs an element, in fp32 operations' time.

Inductor stores largest values and inlines all that follows into the pointwise kernel: its value is no reduction, read
but once and of a dozen operations (``should_realize_on_reuse`` of torch/_inductor/ir.py: more than 4 reads or 30
operations). For each of the two scales these are (``amax_to_scale`` of torchao/float8/float8_utils.py, with powers of
two): to fp64, a division, back to fp32, log2, floor, exp2, reciprocal. Six of them run 16 to a clock and SM: the
conversions from and to 64 bit, the division's first reciprocal, log2, exp2 and reciprocal (CUDA C++ Programming Guide,
"Throughput of Native Arithmetic Instructions", 9.0). 256 fp32 operations would: 2 * 6 / 16 * 256.
"""


def float8_ledger(
    ledger: Ledger, granularity: Granularity, *, gathered_low: bool, shared: bool, num_sms: int = 0
) -> Ledger:
    """Return the ledger with the linears of its blocks in FP8; the head stays (torchtitan's ``filter_fqns``).

    ``num_sms``: of the GPU that torch.compile writes the casts for; 0: they are eager.
    """
    to_8_bits = partial(float8, granularity=granularity, gathered_low=gathered_low, shared=shared, num_sms=num_sms)
    made: dict[int, Layer] = {}
    for layer in ledger.layers:
        if id(layer) not in made:
            made[id(layer)] = to_8_bits(layer) if layer.kind == "block" else layer
    return replace(ledger, layers=tuple(made[id(layer)] for layer in ledger.layers))


def float8(layer: Layer, granularity: Granularity, *, gathered_low: bool, shared: bool, num_sms: int = 0) -> Layer:
    """Return ``layer`` with its linears in FP8."""
    rowwise = granularity == "rowwise"
    return _Float8(layer, rowwise, gathered_low, shared and not rowwise, num_sms * COLUMNS_PER_SM).run()


@dataclass(slots=True)
class _Float8:
    """One walk through a layer. ``done``: tensors cast so far in the pass that is being written."""

    layer: Layer
    rowwise: bool
    gathered_low: bool
    shared: bool
    wide: int = 0
    """From how many columns on their largest values and casts are one kernel; 0: never."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    out: list[Op] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    versions: dict[str, int] = field(default_factory=dict)
    """How often a gradient was added to in place: what was cast before is of another value."""

    def run(self) -> Layer:
        layer = self.layer
        self.tensors = {t.name: t for op in (*layer.forward, *layer.backward) for t in (*op.writes, *op.keeps)}
        if layer.input is not None:
            self.tensors[layer.input.name] = layer.input
        if layer.output is not None:
            self.tensors[f"grad:{layer.output.name}"] = layer.output
        for p in layer.parameters:
            self.tensors[p.name] = Tensor(p.name, (Dim("numel", p.num_elements),), "bf16")
        modules = linears(layer)
        self._forward(modules)
        forward, self.out, self.done = tuple(self.out), [], set()
        self._backward(modules)
        return replace(layer, forward=forward, backward=tuple(self.out))

    # --- casts ---

    def value(self, name: str) -> str:
        """Return a name for what a tensor is now."""
        version = self.versions.get(name, 0)
        return f"{name}@{version}" if version else name

    def note(self, op: Op) -> None:
        """Emit an op as it is; remember what it writes in place."""
        self.out.append(op)
        if not op.writes:
            for name in {t.name: None for k in op.kernels if isinstance(k, Pointwise) for t in k.writes}:
                if name in self.tensors:
                    self.versions[name] = self.versions.get(name, 0) + 1

    def made(self, name: str, like: str, dtype: Literal["fp8", "fp32"] = "fp8") -> Tensor:
        shape = () if dtype == "fp32" else self.tensors[like].shape
        tensor = self.tensors[name] = Tensor(name, shape, dtype)
        return tensor

    def emit(
        self, name: str, kernels: Iterable[Kernel], reads: tuple[str, ...], writes: Tensor, like: Op, of: str
    ) -> None:
        parameters = (of,) if of.endswith(".weight") else ()
        reads = tuple(read for read in reads if read not in parameters)
        self.out.append(Op(name, tuple(kernels), reads, (writes,), parameters=parameters, module=like.module))

    def cast(self, of: str, into: str, like: Op, *, axis: str = "", columns: bool = False) -> None:
        """Emit the cast of a 16-bit tensor; ``axis``: ranks that agree on its largest value; ``columns``: of rowwise
        scaling, along the other dimension."""
        if into in self.done:
            return
        self.done.add(into)
        if columns and self.rowwise:
            self._cast_columns(of, into, like)
        elif self.rowwise:
            source, low = self.tensors[of], self.made(into, of)
            self.emit(f"{into}.cast", [Pointwise("norm", (source,), (low,), 4)], (of,), low, like, of)
        else:
            self._cast_tensorwise(of, into, like, axis)

    def _cast_columns(self, of: str, into: str, like: Op) -> None:
        """Largest values in a pass of their own, or of many columns in the cast's kernel, which then reads twice."""
        source, low = self.tensors[of], self.made(into, of)
        depth = next(size(k.k) for k in like.kernels if isinstance(k, Gemm))  # each column is summed along
        if self.wide and source.num_elements >= self.wide * depth:
            self.emit(f"{into}.cast", [Pointwise("columns", (source, source), (low,), 2)], (of,), low, like, of)
            return
        largest = self._largest_of_columns(of, into, like)
        kernel = Pointwise("transpose", (source, largest), (low,), 2)
        self.emit(f"{into}.cast", [kernel], (of, largest.name), low, like, of)

    def _largest_of_columns(self, of: str, into: str, like: Op) -> Tensor:
        """Emit and return the largest values: one number a column, next to nothing beside the tensor."""
        largest = self.made(f"{into}.amax", of, "fp32")
        self.emit(largest.name, [Pointwise("reduce", (self.tensors[of],), (largest,), 2)], (of,), largest, like, of)
        return largest

    def _cast_tensorwise(self, of: str, into: str, like: Op, axis: str) -> None:
        source, low = self.tensors[of], self.made(into, of)
        amax = f"{self.value(of)}.amax"
        if amax not in self.done:
            self.done.add(amax)
            scalar = self.made(amax, of, "fp32")
            self.emit(amax, [Pointwise("reduce", (source,), (scalar,), 2)], (of,), scalar, like, of)
            if axis:
                agreed = Exchange("all_reduce", axis, scalar)
                self.out.append(Op(f"{amax}.all_reduce", (), (amax,), module=like.module, exchange=agreed))
        kernel = Pointwise("copy", (source, self.tensors[amax]), (low,), 2)
        self.emit(f"{into}.cast", [kernel], (of, amax), low, like, of)

    def transpose(self, of: str, into: str, like: Op) -> None:
        if into in self.done:
            return
        self.done.add(into)
        source = self.tensors[of]
        low = self.made(into, of)
        source = replace(source, dtype="fp8")
        self.emit(f"{into}.transpose", [Pointwise("transpose", (source,), (low,))], (of,), low, like, of)

    def gather(self, op: Op) -> None:
        """Cast, then gather what was cast."""
        assert op.exchange is not None
        source, into = op.reads[0], op.writes[0]
        low_name = f"{self.value(source)}.low"
        self.cast(source, low_name, op, axis=op.exchange.axis)
        self.done.add(into.name)

        def low(tensor: Tensor) -> Tensor:
            return replace(tensor, dtype="fp8")

        made = self.tensors[into.name] = low(into)
        kernels = tuple(
            replace(k, reads=tuple(map(low, k.reads)), writes=tuple(map(low, k.writes)))
            if isinstance(k, Pointwise)
            else k
            for k in op.kernels
        )
        self.out.append(
            replace(
                op, kernels=kernels, reads=(low_name, *op.reads[1:]), writes=(made,),
                scratch=tuple(map(low, op.scratch)), exchange=replace(op.exchange, tensor=low(op.exchange.tensor)),
            )
        )  # fmt: skip

    # --- passes ---

    def _gathers(self, ops: Iterable[Op], read: set[str]) -> set[str]:
        """Return the all-gathers in front of linears, which then carry 8 bits."""
        if self.rowwise:
            return set()
        return {
            op.name
            for op in ops
            if op.exchange is not None and op.exchange.kind == "all_gather" and op.writes and op.writes[0].name in read
        }

    def _forward(self, modules: dict[str, str]) -> None:
        ops = self.layer.forward
        gathers = self._gathers(ops, {op.reads[0] for op in ops if op.name == op.module and op.module in modules})
        for op in ops:
            if op.name in gathers:
                self.gather(op)
            elif op.name == op.module and op.module in modules:
                self._product(op, modules[op.module])
            else:
                self.out.append(op)

    def _low(self, name: str) -> str:
        """Return the cast of a tensor: itself if it was gathered in 8 bits."""
        return name if self.tensors[name].dtype == "fp8" else f"{self.value(name)}.low"

    def _product(self, op: Op, weight: str) -> None:
        source = op.reads[0]
        if self._low(source) != source:
            self.cast(source, self._low(source), op)
        reads = [self._low(source)]
        saves = [reads[0] if self.shared else source]
        parameters = op.parameters
        if not self.gathered_low:
            self.cast(weight, f"{weight}.low", op)
            reads.append(f"{weight}.low")
            if self.shared:
                saves.append(f"{weight}.low")
        kernels = tuple(replace(k, dtype="fp8") if isinstance(k, Gemm) else k for k in op.kernels)
        rest = [name for name in op.reads[1:] if not name.startswith("autocast:")]
        self.out.append(replace(op, kernels=kernels, reads=(*reads, *rest), saves=tuple(saves), parameters=parameters))

    def _backward(self, modules: dict[str, str]) -> None:
        ops = self.layer.backward
        inputs = {f"{module}.grad_input": module for module in modules}
        weights = {f"{module}.grad_weight": module for module in modules}
        gathers = self._gathers(ops, {op.reads[0] for op in ops if op.name in inputs or op.name in weights})
        for op in ops:
            if op.name in gathers:
                self.gather(op)
                continue
            if op.name not in inputs and op.name not in weights:
                self.note(op)
                continue
            gradient = op.reads[0]
            low = self._low(gradient)
            if low != gradient:
                self._cast_gradient(gradient, low, op, op.name in inputs)
            kernels = self._gradient_kernels(op)
            if op.name in inputs:
                columns = self._weight_columns(f"{inputs[op.name]}.weight", op)
                self.out.append(replace(op, kernels=kernels, reads=(low, columns), parameters=op.parameters))
                continue
            rows = f"{self.value(gradient)}.columns"
            if self.rowwise:
                self.cast(gradient, rows, op, columns=True)
            else:
                self.transpose(low, rows, op)
            kept = self._input_columns(op.reads[1], op)
            reads = (rows, kept, *(n for n in op.reads[2:] if not n.startswith("autocast:")))
            if any(not isinstance(kernel, Gemm) for kernel in kernels):
                reads = (*reads, gradient)  # the bias's gradient is a sum of the 16-bit one
            self.out.append(replace(op, kernels=kernels, reads=reads))

    def _cast_gradient(self, gradient: str, low: str, op: Op, along_features: bool) -> None:
        """Cast a gradient along its rows; where it has few columns and torch.compile is used, along these as well."""
        columns = f"{self.value(gradient)}.columns"
        source = self.tensors[gradient]
        depth = next(size(k.k) for k in op.kernels if isinstance(k, Gemm))
        count = depth if along_features else source.num_elements // depth
        if not self.rowwise or count >= self.wide or low in self.done:
            self.cast(gradient, low, op)
            return
        self.done.update((low, columns))
        largest = self._largest_of_columns(gradient, columns, op)
        made = (self.made(low, gradient), self.made(columns, gradient))
        kernel = Pointwise("columns", (source, largest), made, 4)
        self.out.append(Op(f"{low}.cast", (kernel,), (gradient, largest.name), made, module=op.module))

    def _gradient_kernels(self, op: Op) -> tuple[Kernel, ...]:
        """The product of a gradient; where rows have scales, and what multiplies the result by them afterwards."""
        made: list[Kernel] = []
        for kernel in op.kernels:
            if not isinstance(kernel, Gemm):
                made.append(kernel)
                continue
            made.append(replace(kernel, dtype="fp8", promotes=True))
            if self.rowwise:
                result = Tensor("result", (*kernel.batch, *kernel.m, *kernel.n), "bf16")
                made.append(Pointwise("elementwise", (result,), (result,), SCALING_FLOPS))
        return tuple(made)

    def _weight_columns(self, weight: str, op: Op) -> str:
        """The weight as the input's gradient reads it: cast again, or a transposed copy of what is there in 8 bits."""
        columns = f"{weight}.columns"
        if self.gathered_low:
            self.transpose(weight, columns, op)
        elif self.shared:
            self.transpose(f"{weight}.low", columns, op)
        else:
            self.cast(weight, columns, op, columns=True)
        return columns

    def _input_columns(self, source: str, op: Op) -> str:
        columns = f"{source}.columns"
        if self.tensors[source].dtype == "fp8" or self.shared:
            self.transpose(self._low(source), columns, op)
        else:
            self.cast(source, columns, op, columns=True)
        return columns
