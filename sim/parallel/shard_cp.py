"""Context parallelism: every rank has 1/cp of each sequence; only attention needs the rest.

Under a causal mask the sequence is cut in 2 cp chunks and rank i has chunks i and 2cp-1-i, so that all have the same
work (transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py). Ranks differ in *which* halves
they multiply, not in how much; the ledger describes one of them: the last, whose steps take all its queries and half
of the visiting keys, and so hold the most.

Shapes: q, out [batch, seq, heads, head_dim] with the local ``seq``; a ring message [kv_pair, batch, seq, kv_heads,
head_dim].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from sim.ir.ledger import (
    Attention,
    Dim,
    DType,
    Exchange,
    Kernel,
    Layer,
    Op,
    Pointwise,
    Shape,
    Tensor,
    size,
)
from sim.parallel.shard import CP_AXIS, CP_RING_AXIS, ShardPlan, ceil_div, divide_seq


def shard_cp(layer: Layer, plan: ShardPlan) -> Layer:
    """Return the layer on 1/cp of the tokens, with attention's exchanges."""
    forward: list[Op] = []
    backward: list[Op] = []
    kept: dict[str, _Call] = {}
    for op in layer.forward:
        kernel = _attention(op)
        if kernel is None:
            forward.append(_divided(op, plan.cp))
            continue
        call = kept[op.name] = _Call.of(op, kernel, plan)
        forward.extend(_FORWARD[_way(plan)](call, op))
    for op in layer.backward:
        if _attention(op) is None:
            backward.append(_divided(op, plan.cp))
            continue
        (released,) = op.releases
        backward.extend(_BACKWARD[_way(plan)](kept[released], op))
    return replace(
        layer,
        forward=tuple(forward),
        backward=tuple(backward),
        input=None if layer.input is None else divide_seq(layer.input, plan.cp),
        output=None if layer.output is None else divide_seq(layer.output, plan.cp),
        buffers=tuple(divide_seq(t, plan.cp) for t in layer.buffers),
    )


def _way(plan: ShardPlan) -> str:
    """torch's ``context_parallel`` has ways of its own; heads for sequence is the same whoever does it."""
    return f"torch.{plan.cp_comm}" if plan.style == "dtensor" and plan.cp_comm != "a2a" else plan.cp_comm


def _attention(op: Op) -> Attention | None:
    return next((kernel for kernel in op.kernels if isinstance(kernel, Attention)), None)


def _divided(op: Op, cp: int) -> Op:
    def tensors(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(divide_seq(t, cp) for t in found)

    return replace(
        op,
        kernels=tuple(_divided_kernel(op, k, cp) for k in op.kernels),
        writes=tensors(op.writes),
        keeps=tensors(op.keeps),
        scratch=tensors(op.scratch),
    )


def _divided_kernel(op: Op, kernel: Kernel, cp: int) -> Kernel:
    assert not isinstance(kernel, Attention)
    if isinstance(kernel, Pointwise):
        return replace(
            kernel,
            reads=tuple(divide_seq(t, cp) for t in kernel.reads),
            writes=tuple(divide_seq(t, cp) for t in kernel.writes),
        )
    scores = any(dim.name == "key_seq" for shape in (kernel.m, kernel.n, kernel.k) for dim in shape)
    assert not scores, f"{op.name}: context parallelism needs a fused attention kernel"
    m, n, k = (_seq(shape, cp) for shape in (kernel.m, kernel.n, kernel.k))
    return replace(kernel, m=m, n=n, k=k)


def _seq(shape: Shape, cp: int) -> Shape:
    return tuple(Dim(d.name, ceil_div(d.size, cp)) if d.name == "seq" else d for d in shape)


def _scaled(tensor: Tensor, name: str, cp: int) -> Tensor:
    """Divide the dimensions called ``name`` by cp."""
    shape = tuple(Dim(d.name, ceil_div(d.size, cp)) if d.name == name else d for d in tensor.shape)
    return replace(tensor, shape=shape)


@dataclass(frozen=True, slots=True)
class _Call:
    """One use of a fused attention kernel, in local shapes. ``query``, ``key``, ``value`` name storages."""

    name: str
    cp: int
    kernel: Attention
    query: str
    key: str
    value: str
    out: Tensor
    lse: Tensor
    state: Tensor
    dtype: DType

    @staticmethod
    def of(op: Op, kernel: Attention, plan: ShardPlan) -> _Call:
        query, key, value = op.reads if len(op.reads) == 3 else op.reads * 3  # views of one fused projection
        lse, state = op.keeps
        local = replace(kernel, query=_seq(kernel.query, plan.cp), key=_key(kernel, plan.cp))
        out = divide_seq(op.writes[0], plan.cp)
        return _Call(op.name, plan.cp, local, query, key, value, out, divide_seq(lse, plan.cp), state, out.dtype)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.query, self.key, self.value)))

    def tensor(self, what: str, *, heads: str = "kv_heads", whole: bool = False, pair: int = 0) -> Tensor:
        """Return a tensor of q's shape or k's: ``whole``: of the whole sequence; ``pair``: that many together."""
        k = self.kernel
        (seq,) = k.query
        shape = (*k.batch, Dim("seq", seq.size * (self.cp if whole else 1)))
        shape += (k.heads if heads == "heads" else k.kv_heads) + k.head_dim
        return Tensor(f"{self.name}.{what}", ((Dim("kv_pair", pair),) if pair else ()) + shape, self.dtype)

    def part(self, direction: str, step: int) -> Attention:
        """Step 0 is the rank's own chunks under the mask; the others are half of a full product."""
        kernel = replace(self.kernel, direction="forward" if direction == "forward" else "backward")
        if step == 0 or not kernel.causal:
            return kernel
        (keys,) = kernel.key
        return replace(kernel, key=(Dim(keys.name, ceil_div(keys.size, 2)),), causal=False)


def _key(kernel: Attention, cp: int) -> Shape:
    return tuple(Dim(d.name, ceil_div(d.size, cp)) for d in kernel.key)


# --- ring of keys and values (AttnFuncWithCPAndKVP2P) -------------------------------------------


def _ring_forward(call: _Call, op: Op) -> Iterator[Op]:
    """cp steps; while one is computed the next keys and values arrive. The last ones received are what is saved.

    Every step's output, and all that was received, is kept until the outputs are weighted by their log-sum-exps and
    added, in fp32. Leaves out: that steps alternate between two streams, and a random state for each.
    """
    name, module, region = op.name, op.module, op.region
    kv = [call.tensor(f"kv{i}", pair=2) for i in range(call.cp)]
    outs = [replace(call.out, name=f"{name}.out{i}") for i in range(call.cp)]
    lses = [replace(call.lse, name=f"{name}.logsumexp{i}") for i in range(call.cp)]
    yield Op(
        f"{name}.concat", (Pointwise("copy", (kv[0],), (kv[0],)),), call.reads, (kv[0],), module=module, region=region
    )  # fmt: skip
    for i in range(call.cp):
        if i + 1 < call.cp:
            yield Op(
                f"{name}.ring{i}", (), (kv[i].name,), (kv[i + 1],), module=module, region=region,
                exchange=Exchange("send_recv", CP_RING_AXIS, kv[i], blocking=False),
            )  # fmt: skip
        yield Op(
            f"{name}.step{i}", (call.part("forward", i),), (call.query, kv[i].name), (outs[i], lses[i]), module=module,
            region=region, awaits=(f"{name}.ring{i - 1}",) if i else (),
        )  # fmt: skip
    saves = (call.query, kv[-1].name, call.out.name, call.lse.name, call.state.name)
    total = Tensor(f"{name}.out_fp32", call.out.shape, "fp32")
    kernels: tuple[Kernel, ...] = (Pointwise("elementwise", (*lses,), (call.lse,), 3),)
    kernels += tuple(
        Pointwise("elementwise", (out, lse, call.lse) + ((total,) if i else ()), (total,), 3)
        for i, (out, lse) in enumerate(zip(outs, lses, strict=True))
    )
    kernels += (Pointwise("copy", (total,), (call.out,)),)
    yield Op(
        name, kernels, (*(t.name for t in (*outs, *lses, *kv)), call.query), (call.out,), saves,
        (call.lse, call.state), scratch=(total,), module=module, region=region,
    )  # fmt: skip


def _ring_backward(call: _Call, op: Op) -> Iterator[Op]:
    """cp steps, from the keys and values that forward received last, so that the last step is at home.

    Keys and values go round with the sum of their gradients, in two buffers that take turns: the first hop carries only
    the former, the last only the latter: 2 (cp-1) messages of keys and values in all. Every op says what it is the last
    to need, so that recompute gives all of them its own tensors; the last of them counts.
    """
    name, module, region, cp = op.name, op.module, op.region, call.cp
    dq, dk, dv = (divide_seq(t, cp) for t in op.writes)
    scratch = tuple(divide_seq(t, cp) for t in op.scratch)
    extra = tuple(_divided_kernel(op, k, cp) for k in op.kernels[1:])
    kv = call.tensor(f"kv{cp - 1}", pair=2)
    buffers = [call.tensor(f"backward.buffer{i}", pair=4) for i in range(2)]
    saved = (op.reads[0], call.query, call.out.name, call.lse.name, call.state.name)
    yield Op(
        f"{name}.start", (Pointwise("copy", (kv,), (kv,)),), (kv.name,), (dq, *buffers), releases=op.releases,
        module=module, region=region,
    )  # fmt: skip
    for i in range(cp):
        here, there = buffers[i % 2], buffers[(i + 1) % 2]
        message = call.tensor(f"backward.message{i}", pair=2 if i in (0, cp - 1) else 4)
        yield Op(
            f"{name}.ring{i}", (), (here.name, there.name), releases=op.releases, module=module, region=region,
            exchange=Exchange("send_recv", CP_RING_AXIS, message, blocking=False),
        )  # fmt: skip
        own = call.tensor(f"backward.grad_kv{i}", pair=2)
        part = replace(dq, name=f"{name}.dq{i}")
        add = Pointwise("elementwise", (dq, part) if i else (part,), (dq,))
        yield Op(
            f"{name}.step{i}", (call.part("backward", i), *extra, add), (*saved, here.name, dq.name), (own,),
            scratch=(*scratch, part), releases=op.releases, module=module, region=region,
        )  # fmt: skip
        yield Op(
            f"{name}.add{i}", (Pointwise("elementwise", (own, own) if i else (own,), (own,)),),
            (own.name, here.name, there.name), module=module, region=region, awaits=(f"{name}.ring{i}",),
        )  # fmt: skip
    reads = (*saved, kv.name, *(t.name for t in buffers))
    yield Op(name, (), reads, (dk, dv), releases=op.releases, module=module, region=region)


# --- all-gather of keys and values (AttnFuncWithCPAndKVAllGather) -------------------------------


def _gathers(call: _Call, name: str, module: str, region: str) -> tuple[tuple[Op, ...], tuple[Tensor, Tensor]]:
    """Gather keys and values, then put the chunks in the order of the sequence (a copy)."""
    ops, found = [], []
    for what, source in (("key", call.key), ("value", call.value)):
        suffix = name.removeprefix(call.name).lstrip(".")
        tensor = call.tensor(".".join(filter(None, (suffix, what, "gathered"))), whole=True)
        raw = replace(tensor, name=f"{tensor.name}.chunks")
        ops.append(
            Op(
                f"{name}.all_gather_{what}", (Pointwise("copy", (raw,), (tensor,)),), (source,), (tensor,),
                scratch=(raw,), module=module, region=region, exchange=Exchange("all_gather", CP_AXIS, raw),
            )
        )  # fmt: skip
        found.append(tensor)
    return tuple(ops), (found[0], found[1])


def _gathered_kernels(call: _Call, direction: str) -> tuple[Attention, ...]:
    """Two chunks of queries, each against the keys up to its own: on average half the sequence."""
    kernel = replace(call.kernel, direction="forward" if direction == "forward" else "backward")
    (seq,), (keys,) = kernel.query, kernel.key
    if not kernel.causal:
        return (replace(kernel, key=(Dim(keys.name, keys.size * call.cp),)),)
    half = replace(
        kernel, query=(Dim(seq.name, ceil_div(seq.size, 2)),), key=(Dim(keys.name, keys.size * call.cp // 2),),
        causal=False,
    )  # fmt: skip
    return (half, half)


def _gather_forward(call: _Call, op: Op) -> Iterator[Op]:
    """Only the local keys and values are saved; backward gathers them again."""
    gathers, (key, value) = _gathers(call, op.name, op.module, op.region)
    yield from gathers
    yield replace(
        op, kernels=_gathered_kernels(call, "forward"), reads=(*call.reads, key.name, value.name), writes=(call.out,),
        saves=(*call.reads, call.out.name, call.lse.name, call.state.name), keeps=(call.lse, call.state),
    )  # fmt: skip


def _gather_backward(call: _Call, op: Op) -> Iterator[Op]:
    gathers, (key, value) = _gathers(call, op.name, op.module, op.region)
    yield from gathers
    dq, dk, dv = (divide_seq(t, call.cp) for t in op.writes)
    whole = [call.tensor(f"backward.grad_{what}.whole", whole=True) for what in ("key", "value")]
    saved = (call.out.name, call.lse.name, call.state.name)
    yield replace(
        op, kernels=(*_gathered_kernels(call, "backward"), *op.kernels[1:]),
        reads=(op.reads[0], *call.reads, *saved, key.name, value.name), writes=(dq, *whole),
        scratch=tuple(divide_seq(t, call.cp) for t in op.scratch),
    )  # fmt: skip
    for what, source, target in zip(("key", "value"), whole, (dk, dv), strict=True):
        chunks = replace(source, name=f"{source.name}.chunks")
        yield Op(
            f"{op.name}.reorder_{what}", (Pointwise("copy", (source,), (chunks,)),), (source.name,), (chunks,),
            module=op.module, region=op.region,
        )  # fmt: skip
        yield Op(
            f"{op.name}.reduce_scatter_{what}", (), (chunks.name,), (target,), module=op.module, region=op.region,
            exchange=Exchange("reduce_scatter", CP_AXIS, chunks),
        )  # fmt: skip


# --- heads for sequence (AttnFuncWithCPAndQKVOA2A, DeepSpeed-Ulysses) ---------------------------


def _fewer_heads(call: _Call, shape: Shape) -> Shape:
    found = []
    for dim in shape:
        by = call.cp if dim.name in ("heads", "kv_heads") else 1
        assert dim.size % by == 0, f"{call.name}: {dim.size} {dim.name} among {by} ranks"
        found.append(Dim(dim.name, dim.size // by))
    return tuple(found)


def _swapped(call: _Call, what: str, heads: str) -> Tensor:
    tensor = call.tensor(what, heads=heads, whole=True)
    return replace(tensor, shape=_fewer_heads(call, tensor.shape))


def _a2a(call: _Call, name: str, source: Tensor, target: Tensor, op: Op, reads: str) -> Op:
    """One all-to-all; the pieces are put in order by a copy, before it or after it."""
    assert size(source.shape) == size(target.shape)
    raw = replace(target, name=f"{name}.pieces")
    return Op(
        name, (Pointwise("copy", (raw,), (target,)),), (reads,), (target,), scratch=(raw,), module=op.module,
        region=op.region, exchange=Exchange("all_to_all", CP_AXIS, source),
    )  # fmt: skip


def _ulysses_forward(call: _Call, op: Op) -> Iterator[Op]:
    names = []
    sources = (("query", "heads", call.query), ("key", "kv_heads", call.key), ("value", "kv_heads", call.value))
    for what, heads, source in sources:
        target = _swapped(call, f"{what}.by_head", heads)
        yield _a2a(call, f"{op.name}.all_to_all_{what}", call.tensor(what, heads=heads), target, op, source)
        names.append(target.name)
    out = replace(_swapped(call, "out.by_head", "heads"), dtype=call.out.dtype)
    lse = _scaled(replace(op.keeps[0], name=f"{op.name}.logsumexp.by_head"), "heads", call.cp)
    yield replace(
        op, kernels=(_by_head(call, op),), reads=tuple(names), writes=(out,),
        saves=(*names, out.name, lse.name, call.state.name), keeps=(lse, call.state),
    )  # fmt: skip
    yield _a2a(call, f"{op.name}.all_to_all_out", out, call.out, op, out.name)


def _by_head(call: _Call, op: Op) -> Attention:
    kernel = _attention(op)
    assert kernel is not None
    return replace(
        kernel, heads=_fewer_heads(call, kernel.heads), kv_heads=_fewer_heads(call, kernel.kv_heads)
    )  # fmt: skip


def _ulysses_backward(call: _Call, op: Op) -> Iterator[Op]:
    name = call.name
    grad = replace(call.tensor("grad_out", heads="heads"))
    swapped = _swapped(call, "backward.grad_out.by_head", "heads")
    yield _a2a(call, f"{op.name}.all_to_all_grad", grad, swapped, op, op.reads[0])
    saved = [f"{name}.{what}.by_head" for what in ("query", "key", "value", "out", "logsumexp")]
    made = [
        _swapped(call, f"backward.grad_{what}.by_head", "heads" if what == "query" else "kv_heads")
        for what in ("query", "key", "value")
    ]
    yield replace(
        op, kernels=(_by_head(call, op), *(_kernel_by_head(k, call.cp) for k in op.kernels[1:])),
        reads=(swapped.name, *saved, call.state.name), writes=tuple(made),
        scratch=tuple(_scaled(_scaled(t, "heads", call.cp), "kv_heads", call.cp) for t in op.scratch),
    )  # fmt: skip
    for what, source, target in zip(("query", "key", "value"), made, op.writes, strict=True):
        yield _a2a(
            call, f"{op.name}.all_to_all_{what}", source, divide_seq(target, call.cp), op, source.name
        )  # fmt: skip


def _kernel_by_head(kernel: Kernel, cp: int) -> Kernel:
    assert isinstance(kernel, Pointwise)
    return replace(
        kernel,
        reads=tuple(_scaled(_scaled(t, "heads", cp), "kv_heads", cp) for t in kernel.reads),
        writes=tuple(_scaled(_scaled(t, "heads", cp), "kv_heads", cp) for t in kernel.writes),
    )


# --- torch's ring (_templated_ring_attention) ------------------------------------------------------
#
# Source: torch/distributed/tensor/experimental/_context_parallel/_attention.py of PyTorch 2.13. Keys and values travel
# as one tensor, either all of them in one gather ("allgather", torch's default) or one hop at a time
# (``permute_tensor``, "alltoall"). Outputs are merged step by step in fp32. Backward fetches keys and values again, and
# sends their gradients round in fp32, a hop a step, the last one home.


def _visiting(call: _Call, op: Op, name: str, *, gathers: bool) -> tuple[list[list[Op]], list[str]]:
    """Return the exchanges to be issued before each step, and where each step's keys and values are."""
    more = {"module": op.module, "region": op.region, "releases": op.releases}
    local = Tensor("", (), call.dtype)

    def cat(i: int, source: tuple[str, ...]) -> Op:
        sent = replace(local, name=f"{name}.kv{i}.sent", shape=call.tensor("", pair=2).shape)
        return Op(f"{name}.cat{i}", (Pointwise("copy", (sent,), (sent,)),), source, (sent,), **more)  # type: ignore[arg-type]

    before: list[list[Op]] = [[] for _ in range(call.cp)]
    places = [""]
    for i in range(call.cp - 1):
        if gathers and i:
            places.append(places[-1])
            continue
        first = cat(i, call.reads if i == 0 else (places[-1],))
        target = replace(call.tensor("", pair=2, whole=gathers), name=f"{name}.kv{i + 1}")
        message = target if gathers else first.writes[0]
        exchange = Exchange(
            "all_gather" if gathers else "send_recv", CP_AXIS if gathers else CP_RING_AXIS, message, blocking=False
        )
        moved = Op(f"{name}.fetch{i}", (), (first.writes[0].name,), (target,), exchange=exchange, **more)  # type: ignore[arg-type]
        before[i] += [first, moved]
        places.append(target.name)
    return before, places


def _fetch_of(name: str, i: int, *, gathers: bool) -> tuple[str, ...]:
    """Return the exchange that a step waits for."""
    if i == 0 or (gathers and i > 1):
        return ()
    return (f"{name}.fetch{i - 1}",)


def _torch_forward(call: _Call, op: Op, *, gathers: bool) -> Iterator[Op]:
    """cp steps, each merged into the sum of those before; what is saved is local, as without context parallelism."""
    name, module, region = op.name, op.module, op.region
    before, places = _visiting(call, op, name, gathers=gathers)
    lse_before = ""
    whole = [Tensor(f"{name}.merged{i}", call.out.shape, "fp32") for i in range(call.cp)]
    lses = [replace(call.lse, name=f"{name}.logsumexp{i}") for i in range(call.cp)]
    for i in range(call.cp):
        yield from before[i]
        out, lse = replace(call.out, name=f"{name}.out{i}"), replace(call.lse, name=f"{name}.step_lse{i}")
        yield Op(
            f"{name}.step{i}", (call.part("forward", i),), (call.reads if i == 0 else (call.query, places[i])),
            (out, lse), module=module, region=region, awaits=_fetch_of(name, i, gathers=gathers),
        )  # fmt: skip
        block = Tensor(f"{name}.block{i}", call.out.shape, "fp32")
        cast = Pointwise("copy", (out,), (whole[i] if i == 0 else block,))
        if i == 0:
            copied = (Pointwise("copy", (lse,), (lses[0],)),)
            yield Op(
                f"{name}.merge0", (cast, *copied), (out.name, lse.name), (whole[0], lses[0]), module=module,
                region=region,
            )  # fmt: skip
        else:
            difference = replace(block, name=f"{name}.difference{i}")
            yield Op(
                f"{name}.merge{i}",
                (
                    cast,
                    Pointwise("elementwise", (lse, lses[i - 1]), (lses[i],), 2),
                    Pointwise("elementwise", (whole[i - 1], block), (difference,)),
                    Pointwise("elementwise", (difference, lse), (difference,)),
                    Pointwise("elementwise", (whole[i - 1], difference), (whole[i],)),
                    Pointwise("elementwise", (lse, lses[i - 1]), (lses[i],), 3),
                ),
                (out.name, lse.name, whole[i - 1].name, lse_before), (whole[i], lses[i]), scratch=(block, difference),
                module=module, region=region,
            )  # fmt: skip
        lse_before = lses[i].name
    saves = (*call.reads, call.out.name, call.lse.name, call.state.name)
    kernels = (Pointwise("copy", (whole[-1],), (call.out,)), Pointwise("copy", (lses[-1],), (call.lse,)))
    yield Op(
        name, kernels, (*call.reads, whole[-1].name, lse_before), (call.out,), saves, (call.lse, call.state),
        module=module, region=region,
    )  # fmt: skip


def _torch_backward(call: _Call, op: Op, *, gathers: bool) -> Iterator[Op]:
    """cp steps; gradients of keys and values go round in fp32, and come home after the last."""
    name, cp = op.name, call.cp
    more = {"module": op.module, "region": op.region, "releases": op.releases}
    dq, dk, dv = (divide_seq(t, cp) for t in op.writes)
    scratch = tuple(divide_seq(t, cp) for t in op.scratch)
    extra = tuple(_divided_kernel(op, k, cp) for k in op.kernels[1:])
    saved = (op.reads[0], *call.reads, call.out.name, call.lse.name, call.state.name)
    total = Tensor(f"{name}.grad_query", dq.shape, "fp32")
    pair = replace(call.tensor("", pair=2), dtype="fp32")
    start = replace(pair, name=f"{name}.grad_kv")
    before, places = _visiting(call, op, name, gathers=gathers)
    zero = (Pointwise("elementwise", (), (total,)), Pointwise("elementwise", (), (start,)))
    yield Op(f"{name}.start", zero, saved[1:2], (total, start), **more)  # type: ignore[arg-type]
    summed, awaits = start.name, ()  # type: str, tuple[str, ...]
    for i in range(cp):
        yield from before[i]
        own = call.tensor(f"backward.grad_kv{i}", pair=2)
        part = replace(dq, name=f"{name}.dq{i}")
        keys = () if i == 0 else (places[i],)
        yield Op(
            f"{name}.step{i}", (call.part("backward", i), *extra), (*saved, *keys), (part, own), scratch=scratch,
            awaits=_fetch_of(name, i, gathers=gathers), **more,  # type: ignore[arg-type]
        )  # fmt: skip
        sent, back = replace(pair, name=f"{name}.grad_kv{i}.sent"), replace(pair, name=f"{name}.grad_kv{i}.home")
        adds = (
            Pointwise("elementwise", (start, own), (start,)),
            Pointwise("elementwise", (total, part), (total,)),
            Pointwise("copy", (start,), (sent,)),
        )
        yield Op(
            f"{name}.add{i}", adds, (own.name, part.name, summed, total.name), (sent,), awaits=awaits,
            **more,  # type: ignore[arg-type]
        )  # fmt: skip
        exchange = Exchange("send_recv", CP_RING_AXIS, sent, blocking=False)
        yield Op(f"{name}.send{i}", (), (sent.name,), (back,), exchange=exchange, **more)  # type: ignore[arg-type]
        summed, awaits = back.name, (f"{name}.send{i}",)
    casts = (Pointwise("copy", (total,), (dq,)), Pointwise("copy", (start,), (dk, dv)))
    yield Op(name, casts, (*saved, total.name, summed), (dq, dk, dv), awaits=awaits, **more)  # type: ignore[arg-type]


_FORWARD: dict[str, Callable[[_Call, Op], Iterator[Op]]] = {
    "p2p": _ring_forward,
    "all_gather": _gather_forward,
    "a2a": _ulysses_forward,
    "torch.p2p": partial(_torch_forward, gathers=False),
    "torch.all_gather": partial(_torch_forward, gathers=True),
}
_BACKWARD: dict[str, Callable[[_Call, Op], Iterator[Op]]] = {
    "p2p": _ring_backward,
    "all_gather": _gather_backward,
    "a2a": _ulysses_backward,
    "torch.p2p": partial(_torch_backward, gathers=False),
    "torch.all_gather": partial(_torch_backward, gathers=True),
}
