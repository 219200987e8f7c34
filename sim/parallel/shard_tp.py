"""Tensor and sequence parallelism: heads, MLP width and vocabulary divided among the ranks of an axis.

A linear whose output dimension is divided is column-parallel, one whose input dimension is divided row-parallel. The
product of a row-parallel linear, the lookup in a divided table and the input gradient of a column-parallel linear
contract over a divided dimension: each rank has a partial sum, and the collective stands there. Under sequence
parallelism everything between those regions is divided along ``seq``: inputs are gathered, sums are scattered.

Sources: megatron/core/tensor_parallel/{layers,mappings,cross_entropy}.py, transformer_engine/pytorch/module/
{layernorm_linear,linear}.py; torch/distributed/tensor/parallel/{style,loss}.py, torch/distributed/tensor/
placement_types.py, torch/distributed/_functional_collectives.py. Megatron's tensors are [seq, batch, hidden], so that
gathering needs no copy; torch's are [batch, seq, hidden] and every gather or scatter along ``seq`` copies once.

Leaves out: the copy of a bias that RowParallelLinear adds after its reduction; that without FSDP DTensor's embedding
gradient stays whole until the optimizer's step, not only while it is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from sim.ir.ledger import (
    Attention,
    Dim,
    Exchange,
    Gemm,
    Kernel,
    Layer,
    Op,
    Parameter,
    Pointwise,
    Shape,
    Tensor,
    size,
)
from sim.model.transformer import VOCAB_MULTIPLE
from sim.parallel.shard import TP_AXIS, ShardPlan, ceil_div

DIVIDED = ("heads", "kv_heads", "ffn", "vocab")


@dataclass(frozen=True, slots=True)
class ShardedLayer:
    layer: Layer
    partial_gradients: tuple[str, ...]


def shard_tp(layer: Layer, plan: ShardPlan) -> ShardedLayer:
    """Return one rank's part of a layer, and whose gradients it has only a part of."""
    return _Transform(layer, plan).run()


def local_vocab(vocab: int, plan: ShardPlan) -> int:
    """Return the rows of the vocabulary that a rank has: padded as Megatron does, or torch.chunk's first part."""
    if plan.style == "megatron":
        return ceil_div(vocab, VOCAB_MULTIPLE * plan.tp) * VOCAB_MULTIPLE
    return ceil_div(vocab, plan.tp)


@dataclass(slots=True)
class _Linear:
    """A divided linear: its input as the forward op reads it, and how its gradients are exchanged."""

    module: str
    kind: Literal["column", "row"]
    source: str
    group: str
    gathered: str


@dataclass(slots=True)
class _Partial:
    """A gradient of which each rank has a part. ``stored`` is the name of the storage that holds the part."""

    group: str
    stored: Tensor
    final: bool


@dataclass(slots=True)
class _Transform:
    """One walk through a layer. ``split``: names of tensors that are divided along ``seq``."""

    layer: Layer
    plan: ShardPlan
    out: list[Op] = field(default_factory=list)
    split: set[str] = field(default_factory=set)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    linears: dict[str, _Linear] = field(default_factory=dict)
    gathered: dict[tuple[str, str], str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    partial: dict[str, _Partial] = field(default_factory=dict)
    in_flight: dict[str, tuple[str, str]] = field(default_factory=dict)
    input_gradients: dict[str, str] = field(default_factory=dict)
    to_gather: set[str] = field(default_factory=set)
    tables: dict[str, bool] = field(default_factory=dict)
    sums: list[str] = field(default_factory=list)
    whole_vocab: bool = False
    gathers_logits: bool = False
    shared_heads: bool = False

    # --- sizes ---

    @property
    def sp(self) -> bool:
        return self.plan.sequence_parallel

    @property
    def megatron(self) -> bool:
        return self.plan.style == "megatron"

    @property
    def waits(self) -> bool:
        """Megatron's layers without ``async_tensor_model_parallel_allreduce``; sequence parallelism overlaps anyway."""
        return not self.plan.async_allreduce and not self.sp

    def dim(self, dim: Dim) -> Dim:
        tp = self.plan.tp
        if dim.name == "vocab":
            return dim if self.whole_vocab else Dim("vocab", local_vocab(dim.size, self.plan))
        if dim.name == "kv_heads":
            return Dim("kv_heads", max(1, dim.size // tp))
        return Dim(dim.name, ceil_div(dim.size, tp)) if dim.name in DIVIDED else dim

    def shape(self, shape: Shape, split: bool = False) -> Shape:
        """Return the local shape; ``split``: ``seq`` is divided too, unless another dimension is."""
        if _is_divided(shape):
            if any(d.name == "group" for d in shape):
                return self.fused(shape)
            return tuple(map(self.dim, shape))
        if not split:
            return shape
        return tuple(Dim("seq", ceil_div(d.size, self.plan.tp)) if d.name == "seq" else d for d in shape)

    def fused(self, shape: Shape) -> Shape:
        """Rows of a fused query-key-value projection. With fewer key heads than ranks Megatron divides the rows evenly
        all the same (``_Transform.gather_heads``)."""
        heads = next(d for d in shape if d.name == "kv_heads")
        if heads.size >= self.plan.tp:
            return tuple(map(self.dim, shape))
        rows = {"kv_heads", "group", "head_dim"}
        each = size(tuple(d for d in shape if d.name in rows)) // self.plan.tp
        sizes = {"kv_heads": 1, "group": 1, "head_dim": each}
        return tuple(Dim(d.name, sizes[d.name]) if d.name in rows else d for d in shape)

    def tensor(self, tensor: Tensor, split: bool) -> Tensor:
        """Return the local tensor: as it was written if it is known by name, else ``split`` decides."""
        name = self.renamed.get(tensor.name, tensor.name)
        return Tensor(name, self.shape(tensor.shape, name in self.split or split), tensor.dtype)

    def kernel(self, kernel: Kernel, split: bool) -> Kernel:
        if isinstance(kernel, Gemm):
            m, n, k, batch = (self.shape(s, split) for s in (kernel.m, kernel.n, kernel.k, kernel.batch))
            return replace(kernel, m=m, n=n, k=k, batch=batch)
        if isinstance(kernel, Attention):
            return replace(kernel, heads=self.shape(kernel.heads), kv_heads=self.shape(kernel.kv_heads))
        return replace(
            kernel,
            reads=tuple(self.tensor(t, split) for t in kernel.reads),
            writes=tuple(self.tensor(t, split) for t in kernel.writes),
        )

    def local(self, op: Op) -> Op:
        """Return an op with nothing to exchange, in local shapes. It works on ``seq`` as what it reads does."""
        reads = tuple(dict.fromkeys(self.renamed.get(name, name) for name in op.reads))
        split = not _touches_divided(op) and any(name in self.split for name in reads)
        if split:
            self.split.update(t.name for t in (*op.writes, *op.keeps) if not _is_divided(t.shape))
        exchange = op.exchange
        if exchange is not None:
            exchange = replace(exchange, tensor=self.tensor(exchange.tensor, split))
        self.note_partial_sums(op, split)
        return replace(
            op,
            kernels=tuple(self.kernel(k, split) for k in op.kernels),
            reads=reads,
            writes=tuple(self.tensor(t, split) for t in op.writes),
            saves=tuple(dict.fromkeys(self.renamed.get(name, name) for name in op.saves)),
            keeps=tuple(self.tensor(t, split) for t in op.keeps),
            scratch=tuple(self.tensor(t, split) for t in op.scratch),
            exchange=exchange,
        )

    def note_partial_sums(self, op: Op, split: bool) -> None:
        """A gradient is a part of a sum if its parameter is whole but the op sees a part of the tokens or heads."""
        shapes = {p.name: p.shape for p in self.layer.parameters}
        for name in op.gradients:
            divided = _is_divided(shapes[name])
            shared = self.shared_kv(shapes[name])
            biased_row = self.linears.get(op.module)
            row = biased_row is not None and biased_row.kind == "row"
            whole = row and not (self.sp and self.megatron)  # its gradient is summed from the gathered tokens
            if shared or (not divided and not whole and (split or row or _touches_divided(op))):
                self.sums.append(name)

    def shared_kv(self, shape: Shape) -> bool:
        heads = [d.size for d in shape if d.name == "kv_heads"]
        return bool(heads) and heads[0] < self.plan.tp and all(d.name != "group" for d in shape)

    def emit(self, op: Op) -> Op:
        self.out.append(op)
        for tensor in (*op.writes, *op.keeps):
            self.tensors[tensor.name] = tensor
        return op

    # --- collectives ---

    def all_reduce(self, name: str, tensor: Tensor, into: str, module: str, region: str, *, blocking: bool) -> None:
        """Sum in place, as Megatron does; torch's functional collective makes a new tensor."""
        exchange = Exchange("all_reduce", TP_AXIS, tensor, blocking)
        if tensor.name == into:
            self.emit(Op(name, (), (into,), module=module, region=region, exchange=exchange))
            return
        made = replace(tensor, name=into)
        copy = Pointwise("copy", (tensor,), (made,))
        self.emit(Op(name, (copy,), (tensor.name,), (made,), module=module, region=region, exchange=exchange))

    def all_gather(self, name: str, source: str, into: Tensor, module: str, region: str, *, blocking: bool) -> None:
        """Gather along ``seq``. torch gathers along the first dimension and copies into place."""
        exchange = Exchange("all_gather", TP_AXIS, into, blocking)
        if self.megatron or (into.shape[0].size == 1 and into.shape[1].name == "seq"):
            # one sequence: a view puts the pieces in order (torch/_utils.py, _maybe_view_chunk_cat)
            self.emit(Op(name, (), (source,), (into,), module=module, region=region, exchange=exchange))
            return
        raw = replace(into, name=f"{into.name}.pieces")
        exchange = replace(exchange, tensor=raw)
        self.emit(
            Op(
                name, (Pointwise("copy", (raw,), (into,)),), (source,), (into,), scratch=(raw,), module=module,
                region=region, exchange=exchange,
            )
        )  # fmt: skip

    def reduce_scatter(self, name: str, source: Tensor, into: Tensor, module: str, region: str, blocking: bool) -> None:
        """Sum and scatter along ``seq``; ``source`` and ``into`` are local. torch puts the pieces in order first."""
        self.split.add(into.name)
        if not self.megatron:
            pieces = replace(source, name=f"{source.name}.pieces")
            copy = Pointwise("copy", (source,), (pieces,))
            self.emit(Op(f"{name}.pieces", (copy,), (source.name,), (pieces,), module=module, region=region))
            source = pieces
        exchange = Exchange("reduce_scatter", TP_AXIS, source, blocking)
        self.emit(Op(name, (), (source.name,), (into,), module=module, region=region, exchange=exchange))

    def reduce(self, op: Op, y: Tensor, name: str) -> None:
        """Emit ``op``, whose output ``y`` (unsharded) is a partial sum, and what sums it."""
        if self.sp or not self.megatron:
            part = Tensor(f"{y.name}.partial", self.shape(y.shape), y.dtype)
        else:
            part = Tensor(y.name, self.shape(y.shape), y.dtype)
        writes = tuple(part if t.name == y.name else self.tensor(t, False) for t in op.writes)
        self.emit(replace(op, writes=writes))
        if self.sp:
            into = Tensor(y.name, self.shape(y.shape, True), y.dtype)
            self.reduce_scatter(f"{name}.reduce_scatter", part, into, op.module, op.region, True)
        else:
            self.all_reduce(f"{name}.all_reduce", part, y.name, op.module, op.region, blocking=True)

    # --- forward ---

    def run(self) -> ShardedLayer:
        layer = self.layer
        if layer.input is not None and self.sp:
            self.split.add(layer.input.name)
        learned = any(op.name == "embedding.add" for op in layer.forward)
        for op in layer.forward:
            linear = _linear_of(op)
            if _is_lookup(op, layer):
                self.lookup(op, learned)
            elif linear is not None and _is_divided(linear.n):
                self.column(op, linear)
            elif linear is not None and _is_divided(linear.k):
                self.row(op)
            elif op.name == "embedding.add" and self.sp:
                self.scatter(op)
            elif op.name.startswith("loss") and _touches_divided(op):
                self.loss(op)
            else:
                self.emit(self.local(op))
        forward, self.out = tuple(self.out), []
        self.renamed = {}
        self.run_backward()
        local = replace(
            layer,
            parameters=tuple(self.parameter(p) for p in layer.parameters),
            forward=forward,
            backward=tuple(self.out),
            input=self.border(layer.input),
            output=self.border(layer.output),
            buffers=tuple(self.tensor(t, False) for t in layer.buffers),
        )
        return ShardedLayer(local, tuple(dict.fromkeys(self.sums)))

    def parameter(self, parameter: Parameter) -> Parameter:
        self.whole_vocab = False
        return replace(parameter, shape=self.shape(parameter.shape))

    def border(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else Tensor(tensor.name, self.shape(tensor.shape, self.sp), tensor.dtype)

    def group_of(self, module: str) -> str:
        """Linears of one group share their input's exchange: a whole module's, or each its own.

        Under sequence parallelism the norm before them gathers once for all of a module.
        """
        if self.plan.each_linear and not self.sp:
            return module
        if self.megatron or self.plan.prepare_module_input:
            return module.rpartition(".")[0]
        return module

    def column(self, op: Op, gemm: Gemm) -> None:
        """y = x w[divided]: needs all of x. Megatron saves x as it was and gathers it again in backward."""
        source, module = op.reads[0], op.module
        linear = self.linears[module] = _Linear(module, "column", source, self.group_of(module), source)
        made = self.local(op)
        if source in self.split:
            key = (source, linear.group)
            if key not in self.gathered:
                twice = any(name == source for name, _ in self.gathered)
                name = f"{source}.gathered" + (f".{module}" if twice else "")
                self.gathered[key] = name
                self.all_gather(
                    f"{module}.all_gather", source, self.gathered_like(name, source), module, op.region, blocking=True
                )  # fmt: skip
            linear.gathered = self.gathered[key]
            made = replace(made, reads=_swap(made.reads, source, linear.gathered))
            if not self.megatron:
                made = replace(made, saves=_swap(made.saves, source, linear.gathered))
        if op.writes[0].name == "logits" and not self.plan.loss_parallel:
            self.emit(made)
            self.gather_logits(op)
            return
        fused = [t for t in op.writes if any(d.name == "group" for d in t.shape)]
        if fused and fused[0].shape[2].size < self.plan.tp:
            self.gather_heads(made, fused[0])
            return
        self.emit(made)

    def gathered_like(self, name: str, source: str) -> Tensor:
        """Return the tensor of the whole sequence whose part is ``source``."""
        part = self.tensors.get(source)
        if part is None:
            border = self.layer.input if source == "input" else self.layer.output
            assert border is not None, f"{self.layer.name}: nobody wrote {source}"
            return replace(border, name=name)
        tp = self.plan.tp
        shape = tuple(Dim("seq", self.whole_seq(d.size)) if d.name == "seq" else d for d in part.shape)
        assert shape != part.shape or tp == 1
        return Tensor(name, shape, part.dtype)

    def whole_seq(self, part: int) -> int:
        border = self.layer.input or self.layer.output
        assert border is not None
        whole = next(d.size for d in border.shape if d.name == "seq")
        return whole if ceil_div(whole, self.plan.tp) == part else part * self.plan.tp

    def gather_heads(self, op: Op, fused: Tensor) -> None:
        """Fewer key heads than ranks: each rank multiplies an equal part of the rows, all are gathered along the last
        dimension, and each takes its one key head and its query heads out of them (megatron/core/transformer/
        attention.py, get_query_key_value_tensors). Backward scatters the sums of a zero-filled gradient."""
        self.shared_heads = True
        part = replace(op.writes[0], name=f"{fused.name}.part")
        self.emit(replace(op, writes=(part,)))
        raw = replace(fused, name=f"{fused.name}.pieces")
        self.emit(
            Op(
                f"{op.name}.all_gather_heads", (Pointwise("copy", (raw,), (fused,)),), (part.name,), (fused,),
                scratch=(raw,), module=op.module, exchange=Exchange("all_gather", TP_AXIS, raw),
            )
        )  # fmt: skip

    def gather_logits(self, op: Op) -> None:
        """Without loss parallelism the logits are gathered; what follows is done by every rank for all the rows."""
        self.gathers_logits = self.whole_vocab = True
        logits = replace(op.writes[0], name="logits.gathered")
        raw = replace(logits, name="logits.pieces")
        self.emit(
            Op(
                "logits.all_gather", (Pointwise("copy", (raw,), (logits,)),), (op.writes[0].name,), (logits,),
                scratch=(raw,), exchange=Exchange("all_gather", TP_AXIS, raw),
            )
        )  # fmt: skip
        self.renamed["logits"] = logits.name

    def row(self, op: Op) -> None:
        """y = x[divided] w[divided]: a partial sum."""
        self.linears[op.module] = _Linear(op.module, "row", op.reads[0], op.module, op.reads[0])
        y = op.writes[0]
        local = self.local(op)
        self.split.discard(y.name)
        self.reduce(replace(local, writes=op.writes), y, op.module)

    def lookup(self, op: Op, learned: bool) -> None:
        """A rank looks up the tokens that fall in its rows, zeroes the others' results, and the ranks add.

        Megatron keeps which tokens were masked, and their indices (VocabParallelEmbedding.forward).
        """
        y = op.writes[0]
        shape = y.shape[:2]
        mask = Tensor(f"{op.name}.mask", shape, "bool")
        masked = Tensor(f"{op.name}.masked_tokens", shape, "int64")
        part = Tensor(f"{y.name}.masked", y.shape, y.dtype)
        kernels = (Pointwise("elementwise", (masked,), (masked, mask)), *op.kernels)
        kernels += (Pointwise("elementwise", (mask,), (part,)),)
        made = replace(self.local(op), kernels=kernels)
        if self.megatron:
            made = replace(made, saves=(masked.name, mask.name), keeps=(mask, masked))
        else:  # the ids of DTensor's autograd are the whole ones
            made = replace(made, scratch=(mask, masked))
        self.tables[op.name] = not learned
        if learned and self.sp:
            # positions are added to the whole sequence, which is divided only then (LanguageModelEmbedding)
            self.emit(made)
            self.all_reduce(f"{op.name}.all_reduce", y, y.name, op.module, op.region, blocking=True)
            return
        self.reduce(made, y, op.name)

    def scatter(self, op: Op) -> None:
        """Divide a whole tensor along ``seq``: a copy, no exchange; backward gathers."""
        y = op.writes[0]
        whole = replace(y, name=f"{y.name}.whole")
        made = self.local(op)
        kernels = tuple(
            replace(k, writes=(whole,)) if isinstance(k, Pointwise) else k for k in made.kernels
        )  # fmt: skip
        self.emit(replace(made, writes=(whole,), kernels=kernels))
        self.split.add(y.name)
        part = Tensor(y.name, self.shape(y.shape, True), y.dtype)
        self.emit(Op("embedding.scatter", (Pointwise("copy", (part,), (part,)),), (whole.name,), (part,)))
        self.to_gather.add(y.name)

    def loss(self, op: Op) -> None:
        """Cross-entropy over a divided vocabulary: three all-reduces of a number a token: maximum, target, sum."""
        made = self.local(op)
        if self.whole_vocab:
            self.emit(made)
        elif op.name == "loss" and any(t.name == "softmax" for t in op.writes):
            self.fused_loss(made)
        elif op.name == "loss.log_softmax":
            self.log_softmax(made)
        elif op.name == "loss" and any(t.name == "loss.statistics" for t in op.scratch):
            gathered = made.scratch[0]  # all_gather_into_tensor(m_d_X_y_gathered, m_d_X_y)
            every = replace(gathered, name="loss.statistics.gathered", shape=(*gathered.shape, Dim("tp", self.plan.tp)))
            self.emit(replace(made, scratch=(gathered, every), exchange=Exchange("all_gather", TP_AXIS, every)))
        else:
            self.emit(made)

    def rows(self, name: str, like: Tensor) -> Tensor:
        return Tensor(name, like.shape[:2], "fp32")

    def summed(self, tensor: Tensor) -> Exchange:
        return Exchange("all_reduce", TP_AXIS, tensor)

    def fused_loss(self, op: Op) -> None:
        """``_VocabParallelCrossEntropy``: the one op cut where it communicates."""
        softmax = next(t for t in op.writes if t.name == "softmax")
        maximum, target, total = (self.rows(f"loss.{n}", softmax) for n in ("maximum", "target", "sum_exp"))
        k = op.kernels
        logits = op.reads[0]
        if any(t.name == "loss.both" for t in op.scratch):
            self.compiled_loss(op, softmax, maximum)
            return
        self.emit(Op("loss.maximum", k[:2], (logits,), (softmax, maximum)))
        self.emit(
            Op("loss.shift", k[2:4], (softmax.name, maximum.name, *op.reads[1:]), (target,), keeps=op.keeps,
               exchange=self.summed(maximum))
        )  # fmt: skip
        self.emit(
            Op("loss.exponent", k[4:6], (softmax.name, target.name), (total,), exchange=self.summed(target))
        )  # fmt: skip
        kept = tuple(t.name for t in op.keeps)
        self.emit(
            replace(
                op, kernels=k[6:], reads=(softmax.name, target.name, total.name, logits, *kept),
                writes=tuple(t for t in op.writes if t.name != "softmax"), keeps=(), scratch=(),
                exchange=self.summed(total),
            )
        )  # fmt: skip

    def log_softmax(self, op: Op) -> None:
        """``_log_softmax`` and ``_nll_loss_forward`` of torch/distributed/tensor/parallel/loss.py."""
        logits, out = op.reads[0], op.writes[0]
        maximum, total, target = (self.rows(f"loss.{n}", out) for n in ("maximum", "sum_exp", "target"))
        shifted = replace(out, name="loss.shifted")
        exponent = replace(out, name="loss.exponent")
        x = self.tensors[logits]
        self.emit(Op("loss.maximum", (Pointwise("reduce", (x,), (maximum,)),), op.reads, (maximum,)))
        kernels = (
            Pointwise("elementwise", (x, maximum), (shifted,)),
            Pointwise("elementwise", (shifted,), (exponent,)),
            Pointwise("reduce", (exponent,), (total,)),
        )
        self.emit(
            Op("loss.sum", kernels, (logits, maximum.name), (shifted, total), scratch=(exponent,),
               exchange=self.summed(maximum))
        )  # fmt: skip
        minus = Pointwise("elementwise", (shifted, total), (out,))
        self.emit(
            replace(op, kernels=(minus,), reads=(*op.reads, shifted.name, total.name), exchange=self.summed(total))
        )  # fmt: skip
        self.emit(Op("loss.target", (Pointwise("gather", (target,), (target,)),), (out.name,), (target,)))
        self.emit(Op("loss.target.all_reduce", (), (target.name,), exchange=self.summed(target)))

    def compiled_loss(self, op: Op, softmax: Tensor, maximum: Tensor) -> None:
        """``fused_vocab_parallel_cross_entropy``: logits of targets and sums are one tensor, one all-reduce."""
        both = next(t for t in op.scratch if t.name == "loss.both")
        logits, k = op.reads[0], op.kernels
        self.emit(Op("loss.maximum", k[:1], (logits,), (softmax, maximum)))
        self.emit(
            Op("loss.exponent", k[1:2], (softmax.name, maximum.name, *op.reads[1:]), (both,), keeps=op.keeps,
               exchange=self.summed(maximum))
        )  # fmt: skip
        kept = tuple(t.name for t in op.keeps)
        self.emit(
            replace(
                op, kernels=k[2:], reads=(softmax.name, both.name, logits, *kept), keeps=(), scratch=(),
                writes=tuple(t for t in op.writes if t.name != "softmax"), exchange=self.summed(both),
            )
        )  # fmt: skip

    def loss_backward(self, op: Op) -> Op:
        """``_nll_loss_and_log_softmax_backward``: (grad_input + exp(x)) * grad_output, where x is what was saved.

        While the sum or the product is made, two of these are live beside x and the result.
        """
        made = self.local(op)
        if self.megatron or self.whole_vocab or not op.writes:
            return made
        ones, exponent = (replace(made.writes[0], name=f"loss.backward.{n}") for n in ("grad_input", "sum"))
        kernels = (*made.kernels, Pointwise("elementwise", (ones, ones), (exponent,)))
        return replace(made, kernels=kernels, scratch=(*made.scratch, ones, exponent))

    # --- backward ---

    def run_backward(self) -> None:
        ops = self.layer.backward
        self.whole_vocab = self.gathers_logits
        if self.sp and self.layer.output is not None:
            self.split.add(f"grad:{self.layer.output.name}")
        for op in ops:
            module, _, what = op.name.rpartition(".")
            if what == "grad_input" and module in self.linears and self.linears[module].kind == "column":
                self.input_gradients[op.writes[0].name] = self.linears[module].group
        for index, op in enumerate(ops):
            module, _, what = op.name.rpartition(".")
            linear = self.linears.get(module) if what in ("grad_input", "grad_weight") else None
            self.arrive(op)
            if linear is not None and linear.kind == "column":
                self.column_backward(index, op, linear, what)
            elif linear is not None:
                self.row_backward(op, linear)
            elif module in self.tables:
                self.lookup_backward(op, module)
            elif op.name.endswith(".accumulate") and self.adds_partials(op):
                self.accumulate(index, op)
            else:
                if self.shared_heads and op.name.endswith(".split.backward"):
                    self.scatter_heads(op)
                    continue
                self.emit(self.loss_backward(op) if op.name == "loss.backward" else self.local(op))
        for name in list(self.in_flight):
            self.wait(name, self.out[-1].module, self.out[-1].region)
        assert not self.partial, f"{self.layer.name}: partial sums that nobody reduced: {sorted(self.partial)}"

    def arrive(self, op: Op) -> None:
        """Before an op runs: wait for reductions that it reads, gather what had been divided by a mere copy."""
        for name in op.reads:
            if name in self.in_flight:
                self.wait(name, op.module, op.region)
            if name.removeprefix("grad:") in self.to_gather and name not in self.renamed and self.sp:
                whole = self.gathered_like(f"{name}.gathered", name.removeprefix("grad:"))
                self.all_gather(f"{name}.all_gather", name, whole, op.module, op.region, blocking=True)
                self.renamed[name] = whole.name

    def wait(self, name: str, module: str, region: str) -> None:
        """The part stays until the exchange has read it; compute goes on when its sum is there."""
        exchange, part = self.in_flight.pop(name)
        reads = tuple(dict.fromkeys((part, name)))
        self.emit(Op(f"{exchange}.wait", (), reads, module=module, region=region, awaits=(exchange,)))

    def adds_partials(self, op: Op) -> bool:
        return any(name in self.partial for name in op.reads)

    def final(self, index: int, name: str, group: str) -> bool:
        """Whether a partial sum is complete: nothing of its group is added to it by the next op that reads it."""
        for op in self.layer.backward[index + 1 :]:
            if name in op.reads:
                if not op.name.endswith(".accumulate"):
                    return True
                (other,) = [n for n in op.reads if n != name] or [name]
                pending = self.partial.get(other)
                found = pending.group if pending is not None else self.input_gradients.get(other, "")
                return (found or None) != (group or None) or (pending is None and other not in self.input_gradients)
        return True

    def column_backward(self, index: int, op: Op, linear: _Linear, what: str) -> None:
        """grad_input is a partial sum. Megatron: the input is gathered again meanwhile, and the sum is reduced while
        the weight's gradient is multiplied (LinearWithGradAccumulationAndAsyncCommunication.backward)."""
        regather = self.megatron and linear.gathered != linear.source
        again = f"{linear.gathered}.again"
        if self.gathers_logits and self.whole_vocab:
            self.slice_logits(op)
        made = self.local(op)
        split_source = linear.source in self.split
        if what == "grad_weight":
            source = linear.source
            reads = made.reads
            if regather:
                reads = _swap(reads, source, again)
                made = replace(made, awaits=(f"{again}.all_gather",))
            elif split_source:
                reads = _swap(reads, source, linear.gathered)
            self.emit(replace(made, reads=reads))
            for name in [n for n, p in self.partial.items() if p.final and p.group == linear.group]:
                self.finish(name, op, blocking=True)
            return
        if regather and again not in self.tensors:
            self.all_gather(
                f"{again}.all_gather", linear.source, self.gathered_like(again, linear.source), op.module, "",
                blocking=False,
            )  # fmt: skip
        gradient = op.writes[0]
        self.split.discard(gradient.name)
        separate = self.sp or not self.megatron
        stored = replace(gradient, name=f"{gradient.name}.partial") if separate else gradient
        self.emit(replace(made, writes=(stored,)))
        final = self.final(index, gradient.name, linear.group)
        self.partial[gradient.name] = _Partial(linear.group, stored, final)
        if final and self.megatron:
            self.finish(gradient.name, op, blocking=self.waits)

    def finish(self, name: str, op: Op, *, blocking: bool) -> None:
        """Reduce a complete partial sum into the gradient called ``name``."""
        part = self.partial.pop(name).stored
        if self.sp:
            into = Tensor(name, self.shape(part.shape, True), part.dtype)
            exchange = f"{name}.reduce_scatter"
            self.reduce_scatter(exchange, part, into, op.module, op.region, blocking)
        else:
            exchange = f"{name}.all_reduce"
            self.all_reduce(exchange, part, name, op.module, op.region, blocking=blocking)
        if not blocking:
            self.in_flight[name] = (exchange, part.name)

    def accumulate(self, index: int, op: Op) -> None:
        """Partial sums of one group are added before they are reduced."""
        held, added = (self.partial.pop(name) for name in op.reads)
        total = op.writes[0] if op.writes else replace(held.stored, name=op.reads[0])
        fresh = bool(op.writes)
        stored = held.stored
        if fresh:
            separate = self.sp or not self.megatron
            stored = Tensor(f"{total.name}.partial" if separate else total.name, held.stored.shape, held.stored.dtype)
        kernel = Pointwise("elementwise", (held.stored, added.stored), (stored,))
        self.emit(
            replace(
                op, kernels=(kernel,), reads=(held.stored.name, added.stored.name), writes=(stored,) if fresh else ()
            )
        )  # fmt: skip
        final = self.final(index, total.name, held.group)
        self.partial[total.name] = _Partial(held.group, stored, final)
        if final:
            self.finish(total.name, op, blocking=not self.megatron or self.waits)

    def row_backward(self, op: Op, linear: _Linear) -> None:
        """The gradient of a scattered output is gathered once, for both products."""
        made = self.local(op)
        gradient = made.reads[0]
        if gradient in self.split:
            whole = f"{gradient}.gathered.{linear.module}"
            if whole not in self.tensors:
                like = self.gathered_like(whole, gradient)
                self.all_gather(f"{linear.module}.grad.all_gather", gradient, like, op.module, "", blocking=True)
            made = replace(made, reads=_swap(made.reads, gradient, whole))
        self.emit(made)

    def lookup_backward(self, op: Op, module: str) -> None:
        """The gradient is gathered, zeroed (in a copy) where the token was another rank's, and added to the rows.

        DTensor adds to a whole table on every rank, of which each then takes its rows
        (torch/distributed/tensor/_ops/_embedding_ops.py, embedding_dense_backward_strategy).
        """
        gradient = op.reads[0]
        made = self.local(op)
        source = self.renamed.get(gradient, gradient)
        if source in self.split:
            whole = self.gathered_like(f"{source}.gathered", source)
            self.all_gather(f"{module}.grad.all_gather", source, whole, op.module, "", blocking=True)
            source = whole.name
        if not self.megatron:
            (name,) = op.gradients
            table = next(p.shape for p in self.layer.parameters if p.name == name)
            stored = next(t for k in op.kernels if isinstance(k, Pointwise) for t in k.writes if not _seq_of(t.shape))
            whole_table = Tensor(f"{module}.grad.whole", table, stored.dtype)
            rows = Pointwise("copy", (self.tensor(stored, False),), (self.tensor(stored, False),))
            self.emit(
                replace(
                    made, kernels=(*op.kernels, rows), reads=tuple(source if n == gradient else n for n in op.reads),
                    scratch=(*made.scratch, whole_table),
                )
            )  # fmt: skip
            return
        like = next(
            t for k in op.kernels if isinstance(k, Pointwise) for t in k.writes if _seq_of(t.shape)
        )  # fmt: skip
        zeroed = Tensor(f"{module}.grad.masked", like.shape, like.dtype)
        saved = (f"{module}.masked_tokens", f"{module}.mask")
        kernels = (Pointwise("copy", (zeroed,), (zeroed,)), *(self.whole_kernel(k) for k in op.kernels))
        self.emit(
            replace(made, kernels=kernels, reads=(source, *saved), scratch=(*made.scratch, zeroed))
        )  # fmt: skip

    def whole_kernel(self, kernel: Kernel) -> Kernel:
        """The kernel on the whole sequence and a rank's rows."""
        assert isinstance(kernel, Pointwise)
        return replace(
            kernel,
            reads=tuple(replace(t, shape=self.shape(t.shape)) for t in kernel.reads),
            writes=tuple(replace(t, shape=self.shape(t.shape)) for t in kernel.writes),
        )

    def slice_logits(self, op: Op) -> None:
        """The gathered logits' gradient is on every rank; each takes its own columns."""
        gradient = op.reads[0]
        self.whole_vocab = False
        logits = self.tensors["logits"]
        part = Tensor(f"{gradient}.part", logits.shape, logits.dtype)
        copy = Pointwise("copy", (part,), (part,))
        self.emit(Op("logits.all_gather.backward", (copy,), (gradient,), (part,)))
        self.renamed[gradient] = part.name

    def scatter_heads(self, op: Op) -> None:
        """Backward of ``gather_heads``."""
        made = self.local(op)
        fused = op.writes[0]
        zeros = Pointwise("elementwise", (), (fused,))
        kernels = (zeros, *(replace(k, writes=k.reads) for k in made.kernels if isinstance(k, Pointwise)))
        self.emit(replace(made, kernels=kernels, writes=(fused,)))
        pieces = replace(fused, name=f"{fused.name}.pieces")
        part = Tensor(f"{fused.name}.part", self.shape(fused.shape), fused.dtype)
        self.emit(
            Op(
                f"{op.name}.pieces", (Pointwise("copy", (fused,), (pieces,)),), (fused.name,), (pieces,),
                module=op.module,
            )
        )  # fmt: skip
        self.emit(
            Op(
                f"{op.name}.reduce_scatter", (), (pieces.name,), (part,), module=op.module,
                exchange=Exchange("reduce_scatter", TP_AXIS, pieces),
            )
        )  # fmt: skip
        self.renamed[fused.name] = part.name


# --- what an op is ------------------------------------------------------------------------------


def _is_divided(shape: Shape) -> bool:
    return any(dim.name in DIVIDED for dim in shape)


def _seq_of(shape: Shape) -> bool:
    return any(dim.name == "seq" for dim in shape)


def _touches_divided(op: Op) -> bool:
    shapes: list[Iterable[Dim]] = [t.shape for t in (*op.writes, *op.keeps, *op.scratch)]
    for kernel in op.kernels:
        if isinstance(kernel, Gemm):
            shapes += [kernel.m, kernel.n, kernel.k, kernel.batch]
        elif isinstance(kernel, Attention):
            shapes += [kernel.heads, kernel.kv_heads]
        else:
            shapes += [t.shape for t in (*kernel.reads, *kernel.writes)]
    if op.exchange is not None:
        shapes.append(op.exchange.tensor.shape)
    return any(dim.name in DIVIDED for shape in shapes for dim in shape)


def _linear_of(op: Op) -> Gemm | None:
    """Return the product of a linear's forward op, None for other ops."""
    if op.parameters and op.name == op.module and len(op.kernels) == 1 and isinstance(op.kernels[0], Gemm):
        return op.kernels[0]
    return None


def _is_lookup(op: Op, layer: Layer) -> bool:
    if layer.kind != "embedding" or len(op.parameters) != 1:
        return False
    (shape,) = [p.shape for p in layer.parameters if p.name == op.parameters[0]]
    return shape[0].name == "vocab" and isinstance(op.kernels[0], Pointwise) and op.kernels[0].kind == "gather"


def _swap(names: tuple[str, ...], old: str, new: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(new if name == old else name for name in names))
