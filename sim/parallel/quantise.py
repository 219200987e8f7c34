"""Linear layers in 8 or 4 bits as Transformer Engine runs them: a transform of a layer that is sharded already.

The products of the blocks' linears (query-key-value, projection, fc1, fc2) run in low precision; attention, norms,
embedding, head and loss stay in 16 bit. Each operand is quantised by kernels of its own, and what autograd keeps for
the weight's gradient is the quantised input:

* Per-tensor FP8 needs, on Hopper, both operands contiguous along the dimension that is summed (only "TN" products), so
  a second, transposed copy is made where a tensor is an operand of two products. Blackwell reads either way.
* Blocks of 32 (MXFP8), 16 (NVFP4) or 128 (blockwise) elements share a scale along one dimension, so that rows and
  columns are quantised apart: two copies on every GPU, of which forward reads one and backward the other.
* ``delayed`` scales come from the steps before, and the norm in front of a linear writes 8 bits itself. ``tensorwise``
  (current scaling) needs the largest value first: the norm computes it on the way, other tensors are read twice.
* Under sequence parallelism the quantised tensor is gathered, not the 16-bit one: rows only where the scale is the
  tensor's (the transposed copy is made of what was gathered), rows and columns each where blocks have scales.
* Products of gradients promote their partial sums to fp32 on the way (``use_split_accumulator``), forward's do so with
  scales of blocks only: slower on Hopper (``Gemm.promotes``).
* Weights are quantised in the first microbatch of a step and kept (``is_first_microbatch``), where the framework says
  so (Megatron-Core); else in every forward pass, and kept for its backward.

Sources: transformer_engine/pytorch/module/{layernorm_linear,linear,base,_common}.py, pytorch/distributed.py,
pytorch/csrc/extensions/normalization.cpp (which norm writes what), common/transformer_engine.cpp
(nvte_is_non_tn_fp8_gemm_supported), pytorch/tensor/{float8,mxfp8,nvfp4,float8_blockwise}_tensor.py, common/recipe.
Leaves out: amax histories and their small all-reduce once a pass, the swizzling of block scales, host time of
quantiser objects.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from sim.ir.ledger import Dim, DType, Gemm, Kernel, Layer, Ledger, Op, Pointwise, Tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a linear quantises. Sizes are in 1/64 bytes an element, scales included.

    ``gemm``        what the tensor cores are asked for
    ``unit``        bytes of one copy of an element, in 64ths
    ``copies``      copies that a tensor needs which two products read
    ``transposes``  the second copy is made of the first (by a transposing kernel); else both are quantised apart
    ``fused_norm``  a norm writes the quantised rows itself
    ``amax``        what is read to find the scale first: "" nothing, "tensor" all of it unless a norm did, "always"
    ``passes``      kernels that read the 16-bit tensor to quantise it both ways
    ``promotes``    forward's products promote their partial sums too; those of backward do under every recipe of FP8
    """

    name: str
    gemm: DType
    unit: int
    copies: int
    transposes: bool
    fused_norm: bool = False
    amax: str = ""
    passes: int = 1
    promotes: bool = False

    def num_bytes(self, num_elements: int, copies: int = 1) -> int:
        return -(-num_elements * self.unit * copies // 64)


def recipe_of(precision: str, fp8_recipe: str, compute_capability: tuple[int, int]) -> Recipe:
    """Return the recipe of a precision; ``fp8_recipe`` is Megatron's ``--fp8-recipe``, which only fp8 asks for."""
    if precision == "mxfp8":  # an 8-bit exponent for 32 elements
        return Recipe("mxfp8", "mxfp8", 66, 2, False)
    if precision == "nvfp4":  # 4 bits, an 8-bit scale for 16; columns are turned by a Hadamard matrix first
        return Recipe("nvfp4", "nvfp4", 36, 2, False, amax="always", passes=2)
    if fp8_recipe == "blockwise":  # an fp32 scale for 128 elements
        return Recipe("blockwise", "fp8", 66, 2, False, promotes=True)
    any_layout = (10, 0) <= compute_capability < (12, 0)
    copies = 1 if any_layout else 2
    if fp8_recipe == "tensorwise":
        return Recipe("tensorwise", "fp8", 64, copies, not any_layout, amax="tensor")
    return Recipe("delayed", "fp8", 64, copies, not any_layout, fused_norm=True)


def quantise_ledger(ledger: Ledger, recipe: Recipe, *, cached_weights: bool, in_16_bit: frozenset[int]) -> Ledger:
    """Return the ledger with its blocks quantised, but for those whose number is in ``in_16_bit``.

    Layers that are one object stay one object.
    """
    made: dict[int, Layer] = {}
    layers = []
    number = 0
    for layer in ledger.layers:
        if layer.kind == "block":
            number += 1
            if number - 1 not in in_16_bit:
                if id(layer) not in made:
                    made[id(layer)] = quantise(layer, recipe, cached_weights=cached_weights)
                layers.append(made[id(layer)])
                continue
        layers.append(layer)
    return replace(ledger, layers=tuple(layers))


def linears(layer: Layer) -> dict[str, str]:
    """Return the modules whose forward is one matrix product with a weight, and that weight's name."""
    return {op.module: f"{op.module}.weight" for op in layer.forward if _is_linear(op)}


def _is_linear(op: Op) -> bool:
    """Return whether an op is its module's product; a norm of that module that runs op by op has its name too."""
    return (
        op.name == op.module
        and f"{op.module}.weight" in op.parameters
        and any(kernel.__class__ is Gemm for kernel in op.kernels)
    )


def quantise(layer: Layer, recipe: Recipe, *, cached_weights: bool) -> Layer:
    """Return ``layer`` with its linears in the recipe's precision."""
    return _Quantise(layer, recipe, cached_weights).run()


def low_weights(layer: Layer, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Return module -> (elements, bytes) of the quantised weights of a quantised layer."""
    sizes = {p.name: p.num_elements for p in layer.parameters}
    return {
        op.module: (sizes[weight], recipe.num_bytes(sizes[weight], recipe.copies))
        for op in layer.forward
        if any(kernel.__class__ is Gemm and kernel.dtype == recipe.gemm for kernel in op.kernels)
        if (weight := f"{op.module}.weight") in sizes
    }


def cast_kernels(recipe: Recipe, num_elements: int, copies: int, *, known_amax: bool = False) -> tuple[Kernel, ...]:
    """Return the kernels that quantise a 16-bit tensor into ``copies`` copies."""
    source = Tensor("source", (Dim("numel", num_elements),), "bf16")
    kernels: list[Kernel] = []
    if recipe.amax == "always" or (recipe.amax == "tensor" and not known_amax):
        kernels.append(Pointwise("amax", (source,), (), 2))
    passes = min(copies, recipe.passes)
    for _ in range(passes):
        made = Tensor("quantised", (Dim("bytes", recipe.num_bytes(num_elements, copies) // passes),), "fp8")
        kernels.append(Pointwise("copy", (source,), (made,), 2))
    return tuple(kernels)


@dataclass(slots=True)
class _Quantise:
    """One walk through a layer. ``quantised``: tensor -> its quantised copy, under a name of its own."""

    layer: Layer
    recipe: Recipe
    cached_weights: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    out: list[Op] = field(default_factory=list)
    saved: dict[str, str] = field(default_factory=dict)
    """Of each linear's saved input: what it keeps instead."""

    def run(self) -> Layer:
        layer = self.layer
        modules = linears(layer)
        for op in (*layer.forward, *layer.backward):
            for tensor in (*op.writes, *op.keeps):
                self.tensors.setdefault(tensor.name, tensor)
        if layer.input is not None:
            self.tensors[layer.input.name] = layer.input
        if layer.output is not None:
            self.tensors[f"grad:{layer.output.name}"] = layer.output
        self._forward(modules)
        forward, self.out = tuple(self.out), []
        self._backward(modules)
        return replace(layer, forward=forward, backward=tuple(self.out))

    def low(self, name: str, of: str, copies: int = 1) -> Tensor:
        tensor = self.tensors[of]
        made = Tensor(name, (Dim("bytes", self.recipe.num_bytes(tensor.num_elements, copies)),), "fp8")
        self.tensors[name] = made
        return made

    def cast(self, of: str, copies: int, op: Op, *, known_amax: bool = False, extra: tuple[Kernel, ...] = ()) -> None:
        """Emit the kernels that quantise a tensor: rows, and columns as ``.columns`` where there are two copies."""
        kernels = cast_kernels(self.recipe, self.tensors[of].num_elements, copies, known_amax=known_amax)
        writes = [self.low(f"{of}.rows", of)]
        if copies == 2:
            writes.append(self.low(f"{of}.columns", of))
        self.out.append(
            Op(f"{of}.quantise", (*kernels, *extra), (of,), tuple(writes), module=op.module, region=op.region)
        )

    def transpose(self, of: str, into: str, op: Op, awaits: tuple[str, ...] = ()) -> None:
        """Emit the kernel that writes rows of 8 bits as columns."""
        source = self.tensors[of]
        made = replace(source, name=into)
        self.tensors[into] = made
        self.out.append(
            Op(
                f"{into}.transpose", (Pointwise("copy", (source,), (made,)),), (of,), (made,), module=op.module,
                region=op.region, awaits=awaits,
            )
        )  # fmt: skip

    # --- forward ---

    def _forward(self, modules: dict[str, str]) -> None:
        """Quantise what a linear reads where it is made, gather rows, keep what the weight's gradient will read."""
        recipe, layer = self.recipe, self.layer
        gathers = {t.name: op for op in layer.forward if op.exchange is not None for t in op.writes}
        sources: dict[str, str] = {}  # what a linear reads -> what is quantised: that, or what it was gathered from
        readers: dict[str, list[str]] = {}
        for op in layer.forward:
            for name in op.reads:
                readers.setdefault(name, []).append(op.name)
        for op in layer.forward:
            if _is_linear(op):
                read = op.reads[0]
                gather = gathers.get(read)
                gathered = gather is not None and gather.exchange is not None and gather.exchange.kind == "all_gather"
                sources[read] = gather.reads[0] if gather is not None and gathered else read
        wanted = set(sources.values())
        done: set[str] = set()
        for op in layer.forward:
            made = [t.name for t in op.writes if t.name in wanted]
            is_norm = op.kernels and isinstance(op.kernels[0], Pointwise) and op.kernels[0].kind == "norm"
            if op.exchange is not None and op.writes and op.writes[0].name in sources and op.reads[0] in wanted:
                self._gather(op)
            elif _is_linear(op):
                source = sources[op.reads[0]]
                if source not in done and source not in {t.name for o in self.out for t in o.writes}:
                    self._ready(source, op, source in sources, known=False)  # the layer's own input
                    done.add(source)
                self._product(op, source, modules[op.module])
            elif made and is_norm:
                name = made[0]
                alone = all(
                    reader in modules or (reader in {g.name for g in gathers.values()}) for reader in readers[name]
                )
                self._norm(op, name, fused=recipe.fused_norm and alone, gathered=name not in sources)
                done.add(name)
            else:
                self.out.append(op)
                for name in made:
                    self._ready(name, op, name in sources, known=False)
                    done.add(name)

    def _ready(self, name: str, op: Op, direct: bool, *, known: bool) -> None:
        """Quantise a tensor for its linear: both ways at once, or rows only where they are gathered first."""
        recipe = self.recipe
        copies = recipe.copies if direct or not recipe.transposes else 1
        self.cast(name, copies, replace(op, region=""), known_amax=known)
        keeps_rows = recipe.copies == 1 or (recipe.transposes and not direct)
        self.saved[name] = f"{name}.rows" if keeps_rows else f"{name}.columns"

    def _norm(self, op: Op, name: str, *, fused: bool, gathered: bool) -> None:
        """A norm that writes rows of 8 bits, which are then transposed; or 16 bits, which are quantised."""
        recipe = self.recipe
        if not fused:
            self.out.append(op)
            self._ready(name, op, not gathered, known=True)
            return
        rows = self.low(f"{name}.rows", name)

        def low(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
            return tuple(rows if t.name == name else t for t in tensors)

        kernels = tuple(replace(k, writes=low(k.writes)) if isinstance(k, Pointwise) else k for k in op.kernels)
        self.out.append(replace(op, kernels=kernels, writes=low(op.writes)))
        if recipe.copies == 2 and not gathered:
            self.transpose(f"{name}.rows", f"{name}.columns", op)
            self.saved[name] = f"{name}.columns"
        else:
            self.saved[name] = f"{name}.rows"

    def _gather(self, op: Op) -> None:
        """Gather the quantised rows of what was to be gathered in 16 bit."""
        assert op.exchange is not None
        source, into = op.reads[0], op.writes[0]
        made = self.low(into.name, into.name)
        exchange = replace(op.exchange, tensor=made)
        reads = (f"{source}.rows", *op.reads[1:])
        self.out.append(replace(op, kernels=(), reads=reads, writes=(made,), scratch=(), exchange=exchange))

    def _product(self, op: Op, source: str, weight: str) -> None:
        recipe = self.recipe
        read = op.reads[0]
        reads = [f"{read}.rows" if read == source else read, *op.reads[1:]]
        saves = [self.saved[source] if name == source else name for name in op.saves]
        if not self.cached_weights:
            saves = [name for name in saves if not name.startswith("autocast:")]
            reads = [name for name in reads if not name.startswith("autocast:")]
            self._weight(op, weight)
            reads.append(f"{weight}.low")
            saves.append(f"{weight}.low")
        promotes = recipe.promotes
        kernels = tuple(
            replace(k, dtype=recipe.gemm, promotes=promotes) if isinstance(k, Gemm) else k for k in op.kernels
        )
        self.out.append(replace(op, kernels=kernels, reads=tuple(reads), saves=tuple(saves)))

    def _weight(self, op: Op, weight: str) -> None:
        """Quantise a weight as its linear runs: both ways, for this pass and its backward."""
        recipe = self.recipe
        count = next(p.num_elements for p in self.layer.parameters if p.name == weight)
        self.tensors[weight] = Tensor(weight, (Dim("numel", count),), "bf16")
        made = self.low(f"{weight}.low", weight, recipe.copies)
        self.out.append(
            Op(
                f"{weight}.quantise", cast_kernels(recipe, count, recipe.copies), writes=(made,),
                parameters=(weight,), module=op.module,
            )
        )  # fmt: skip

    # --- backward ---

    def _backward(self, modules: dict[str, str]) -> None:
        """Quantise each gradient that a linear's two products read, gather it low, transpose what Hopper must."""
        inputs = {f"{module}.grad_input": module for module in modules}
        weights = {f"{module}.grad_weight" for module in modules}
        gathers = {op.writes[0].name for op in self.layer.backward if _is_gather(op)}
        grads = {op.reads[0] for op in self.layer.backward if op.name in inputs or op.name in weights}
        ready: set[str] = set()
        for op in self.layer.backward:
            product = op.name in inputs or op.name in weights
            if not product and not _is_gather(op):
                self.out.append(op)
                if not op.writes:  # an addition in place: what was quantised before is of another value
                    ready -= {t.name for k in op.kernels if isinstance(k, Pointwise) for t in k.writes}
                continue
            if not product and op.writes[0].name not in grads:
                if op.reads[0] in self.saved:
                    self._gather_input(op)
                else:
                    self.out.append(op)
                continue
            gradient = op.reads[0]
            if gradient not in gathers and gradient not in ready:
                self.cast(gradient, self.recipe.copies if product or not self.recipe.transposes else 1, op)
                ready.add(gradient)
            if not product:
                self._gather_gradient(op)
            elif op.name in weights:
                self._weight_gradient(op, gathers)
            else:
                self._input_gradient(op, inputs[op.name], gradient in gathers)

    def _low_product(self, op: Op, *, gathered: bool) -> tuple[Kernel, ...]:
        """The product in low precision; the bias's gradient is summed by the kernel that quantises, unless gathered.

        (``bgrad_quantize`` in ``grad_output_preprocess``.)
        """
        made: list[Kernel] = []
        for kernel in op.kernels:
            if isinstance(kernel, Gemm):
                made.append(replace(kernel, dtype=self.recipe.gemm, promotes=True))
            elif gathered:
                made.append(kernel)
        return tuple(made)

    def _input_gradient(self, op: Op, module: str, gathered: bool) -> None:
        gradient = op.reads[0]
        rest = list(op.reads[1:])
        if not self.cached_weights:
            rest = [name for name in rest if not name.startswith("autocast:")] + [f"{module}.weight.low"]
        reads = (gradient if gathered else f"{gradient}.rows", *rest)
        self.out.append(replace(op, kernels=self._low_product(op, gathered=gathered), reads=reads))

    def _weight_gradient(self, op: Op, gathers: set[str]) -> None:
        recipe, awaits = self.recipe, op.awaits
        gradient, kept = op.reads[:2]
        gathered = gradient in gathers
        if gathered and recipe.transposes:
            self.transpose(gradient, f"{gradient}.columns", op)
        if recipe.copies == 2:
            gradient = f"{gradient}.columns"
        elif not gathered:
            gradient = f"{gradient}.rows"
        if kept not in gathers:
            kept = self.saved[kept]
        elif recipe.transposes:
            self.transpose(kept, f"{kept}.columns", op, awaits)
            kept, awaits = f"{kept}.columns", ()
        kernels = self._low_product(op, gathered=gathered)
        self.out.append(replace(op, kernels=kernels, reads=(gradient, kept, *op.reads[2:]), awaits=awaits))

    def _gather_gradient(self, op: Op) -> None:
        """Gather a gradient's rows, and its columns too where they were quantised apart."""
        assert op.exchange is not None
        into = op.writes[0].name
        apart = self.recipe.copies == 2 and not self.recipe.transposes
        source = op.reads[0]
        rows = self.low(into, into)
        exchange = replace(op.exchange, tensor=rows)
        reads = (f"{source}.rows", *op.reads[1:])
        self.out.append(replace(op, kernels=(), reads=reads, writes=(rows,), scratch=(), exchange=exchange))
        if apart:
            columns = replace(rows, name=f"{into}.columns")
            self.tensors[columns.name] = columns
            self.out.append(
                replace(
                    op, name=f"{op.name}.columns", kernels=(), reads=(f"{source}.columns",), writes=(columns,),
                    scratch=(), exchange=replace(exchange, tensor=columns),
                )
            )  # fmt: skip

    def _gather_input(self, op: Op) -> None:
        """Gather again what forward kept of an input: rows, or columns where they are apart."""
        assert op.exchange is not None
        made = self.low(op.writes[0].name, op.writes[0].name)
        reads = (self.saved[op.reads[0]], *op.reads[1:])
        exchange = replace(op.exchange, tensor=made)
        self.out.append(replace(op, kernels=(), reads=reads, writes=(made,), scratch=(), exchange=exchange))


def _is_gather(op: Op) -> bool:
    return op.exchange is not None and op.exchange.kind == "all_gather" and bool(op.writes)
