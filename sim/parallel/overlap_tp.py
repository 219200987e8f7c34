"""Tensor parallelism's exchanges in pieces, beside pieces of the products that need or make what is exchanged.

What a column-parallel linear gathers comes from one rank after the other, and is multiplied as it comes; what a
row-parallel one sums is sent off piece by piece while the next one is multiplied:

    all-gather, product         shift 1  shift 2  ...            product, reduce-scatter           shift 1  shift 2 ...
                         own    piece 1  piece 2  ...                                     piece 1  piece 2  ... own, sum

Pieces run on two or three streams in turn, so that the last wave of one is filled by the next (``Gemm.pieces``); a
shift is a copy by the copy engines, beside a block that waits for flags. Two ways of it:

``userbuffers``  Transformer Engine with Megatron's ``tp_comm_overlap``, by the defaults of ``initialize_ub``
                 (transformer_engine/pytorch/module/base.py): inputs of column-parallel products and gradients of
                 row-parallel ones come around a ring (``ring_exchange``, CommOverlapP2PBase::split_overlap_ag), outputs
                 are reduced in four pieces along their width by kernels with SMs (``pipeline``, CommOverlapBase::
                 split_overlap_rs). What backward gathers and scatters beside a whole product (``bulk``) does so without
                 the setting too; with it the product leaves SMs idle, as those reduced in pieces do.
``symmetric``    torch's asynchronous tensor parallelism: ``fuse_all_gather_matmul`` and ``fuse_matmul_reduce_scatter``
                 (torch/_inductor/fx_passes/micro_pipeline_tp.py) find an all-gather that products read and a product
                 that is reduced as it is, in forward and backward; not sums of several products. A copy of the own
                 part into the symmetric buffer comes first, the sum of what arrived last
                 (torch/distributed/_symmetric_memory/__init__.py).

All pieces of a product under user buffers are issued by one call of Transformer Engine's C++: only the first costs the
host what a linear does (``Op.library``).

Only blocks: Transformer Engine names no other linear's buffer, torchtitan compiles block by block.
Leaves out: that a buffer is filled again only once it has been read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sim.ir.ledger import Dim, Exchange, Gemm, Layer, Ledger, Op, Pointwise, Shape, Tensor, size
from sim.parallel.shard import TP_AXIS, ceil_div

Way = Literal["userbuffers", "symmetric"]
PIPELINED = 4
"""``num_splits`` where there is no ring: ``get_default_config`` in transformer_engine/pytorch/module/base.py."""


MARGIN = 16
"""``num_sm`` of the same, which ``set_sm_margin`` takes from the products that run beside (``_math_sms``)."""


def overlapped(ledger: Ledger, tp: int, way: Way) -> Ledger:
    """Return a rank's ledger with its blocks' exchanges in pieces. Layers that are one object stay one object."""
    made: dict[int, Layer] = {}
    for layer in ledger.layers:
        if id(layer) not in made:
            made[id(layer)] = overlapped_layer(layer, tp, way) if layer.kind == "block" else layer
    return replace(ledger, layers=tuple(made[id(layer)] for layer in ledger.layers))


def overlapped_layer(layer: Layer, tp: int, way: Way) -> Layer:
    """Return one rank's layer with its exchanges over tp in pieces."""
    return replace(
        layer,
        forward=_in_pieces(layer.forward, tp, way, backward=False),
        backward=_in_pieces(layer.backward, tp, way, backward=True),
    )


@dataclass(slots=True)
class _Group:
    """Products that are cut together with an exchange; all are indices of ops. ``copies``: torch's, before it."""

    products: list[int]
    exchange: int
    copies: int | None = None


def _in_pieces(ops: tuple[Op, ...], tp: int, way: Way, *, backward: bool) -> tuple[Op, ...]:
    gathers = [group for index in range(len(ops)) if (group := _gather(ops, index)) is not None]
    taken = {index for group in gathers for index in group.products}
    scatters = [group for index in range(len(ops)) if (group := _scatter(ops, index, taken)) is not None]
    beside = _beside(ops) if way == "userbuffers" else set()
    if not gathers and not scatters and not beside:
        return ops
    at: dict[int, list[Op]] = {}
    gone: set[int] = set()
    late: dict[str, tuple[int, str]] = {}
    for group in gathers:
        op = ops[group.exchange]
        at[group.exchange] = _shifts(op, tp, own=way == "symmetric" or backward)
        whole = op.writes[0].name
        at[group.products[0]] = _consume([ops[i] for i in group.products], op, tp, library=way == "userbuffers")
        gone.update(group.products)
        late[whole] = (group.products[0], op.name)
        if op.kernels and any(whole in other.reads for i, other in enumerate(ops) if i not in group.products):
            at[group.products[0]].append(_ordered(op))
    for group in scatters:
        product, exchange = ops[group.products[0]], ops[group.exchange]
        made = _send if way == "symmetric" else _pipeline
        at[group.products[0]] = made(product, exchange, tp)
        gone.update((group.exchange, group.copies if group.copies is not None else group.exchange))
    out: list[Op] = []
    for index, op in enumerate(ops):
        if index in at:
            out += at[index]
        elif index in beside:
            out.append(_with_margin(op))
        elif index not in gone:
            early = tuple(
                name for read in op.reads if read in late and late[read][0] > index for name in late[read][1:]
            )
            out.append(replace(op, awaits=tuple(dict.fromkeys((*op.awaits, *early)))) if early else op)
    return tuple(out)


# --- what is found ------------------------------------------------------------------------------


def _exchanges(op: Op, kind: str) -> bool:
    exchange = op.exchange
    return exchange is not None and exchange.kind == kind and exchange.axis == TP_AXIS and exchange.blocking


def _over_tokens(op: Op) -> bool:
    """Whether an op is one product whose rows are the tokens; a gradient of a weight contracts over them."""
    products = [kernel for kernel in op.kernels if isinstance(kernel, Gemm)]
    return op.exchange is None and not op.gradients and len(products) == 1 and _has_seq(products[0].m)


def _beside(ops: tuple[Op, ...]) -> set[int]:
    """Return the products that a whole exchange runs beside (``bulk``): the next one after each."""
    found: set[int] = set()
    for index, op in enumerate(ops):
        exchange = op.exchange
        if exchange is not None and exchange.axis == TP_AXIS and not exchange.blocking:
            later = range(index + 1, len(ops))
            first = next((at for at in later if any(isinstance(k, Gemm) for k in ops[at].kernels)), None)
            found.update(() if first is None else (first,))
    return found


def _with_margin(op: Op) -> Op:
    kernels = tuple(replace(kernel, margin=MARGIN) if isinstance(kernel, Gemm) else kernel for kernel in op.kernels)
    return replace(op, kernels=kernels)


def _has_seq(shape: Shape) -> bool:
    return any(dim.name == "seq" for dim in shape)


def _gather(ops: tuple[Op, ...], index: int) -> _Group | None:
    """Return the products that read what op ``index`` gathers, and whatever else they read is there with the first."""
    op = ops[index]
    if not _exchanges(op, "all_gather") or len(op.writes) != 1:
        return None
    whole = op.writes[0].name
    found: list[int] = []
    written: set[str] = set()
    for at in range(index + 1, len(ops)):
        other = ops[at]
        if whole in other.reads and _over_tokens(other) and (not found or written.isdisjoint(other.reads)):
            found.append(at)
        elif found:
            written.update(t.name for t in (*other.writes, *other.keeps))
    return _Group(found, index) if found else None


def _scatter(ops: tuple[Op, ...], index: int, taken: set[int]) -> _Group | None:
    """Return the product whose output op ``index`` reduces and scatters, if nothing else reads it."""
    op = ops[index]
    if not _exchanges(op, "reduce_scatter") or len(op.reads) != 1:
        return None
    source = op.reads[0]
    again = "~" if op.name.endswith("~") else ""  # of a forward pass that runs again within a compiled backward
    copies = next((at for at in range(index) if ops[at].name == f"{op.name.removesuffix('~')}.pieces{again}"), None)
    if copies is not None:  # torch puts the pieces in order first
        if len(ops[copies].reads) != 1:
            return None  # a sum of several products
        source = ops[copies].reads[0]
    makers = [at for at in range(index) if any(t.name == source for t in ops[at].writes)]
    readers = [at for at, other in enumerate(ops) if source in other.reads and at not in (index, copies)]
    if not makers or readers or makers[-1] in taken or not _over_tokens(ops[makers[-1]]):
        return None
    return _Group([makers[-1]], index, copies)


# --- what becomes of it -------------------------------------------------------------------------


def _cut(op: Op, pieces: int, *, along_seq: bool) -> list[tuple[Gemm, ...]]:
    """Return the kernels of each piece of a product."""
    (gemm,) = [kernel for kernel in op.kernels if isinstance(kernel, Gemm)]
    if along_seq:
        piece = replace(gemm, m=_divided(gemm.m, pieces), pieces=pieces)
    else:
        first, *others = gemm.n
        shape = (replace(first, size=ceil_div(first.size, pieces)), *others)
        piece = replace(gemm, n=shape, pieces=pieces, margin=MARGIN)
    return [(piece,)] * pieces


def _divided(shape: Shape, parts: int) -> Shape:
    return tuple(Dim("seq", ceil_div(dim.size, parts)) if dim.name == "seq" else dim for dim in shape)


def _part(tensor: Tensor, parts: int) -> Tensor:
    return Tensor(f"{tensor.name}.piece", (Dim("elements", ceil_div(size(tensor.shape), parts)),), tensor.dtype)


def _shifts(op: Op, tp: int, *, own: bool) -> list[Op]:
    """Return an all-gather as copies from one rank after the other; the last has its name. ``own``: the rank's part is
    copied into the buffer first."""
    exchange, whole = op.exchange, op.writes[0]
    assert exchange is not None
    part = _part(exchange.tensor, tp)
    out: list[Op] = []
    if own:
        copy = Pointwise("copy", (part,), (part,))
        out.append(Op(f"{op.name}.own", (copy,), op.reads, module=op.module, region=op.region))
    shift = replace(op, kernels=(), writes=(), scratch=(), exchange=Exchange("shift", TP_AXIS, part, blocking=False))
    for i in range(1, tp):
        name = op.name if i == tp - 1 else f"{op.name}.{i}"
        reads = op.reads if i == 1 else (*op.reads, whole.name)
        out.append(replace(shift, name=name, reads=reads, writes=(whole,) if i == 1 else ()))
    return out


def _consume(products: list[Op], gather: Op, tp: int, *, library: bool) -> list[Op]:
    """Return products in pieces, each piece of all of them when it has come; the own one first."""
    whole = gather.writes[0].name
    cut = [_cut(op, tp, along_seq=True) for op in products]
    last = products[-1]
    out = [replace(op, kernels=kernels[0], releases=()) for op, kernels in zip(products, cut, strict=True)]
    for i in range(1, tp):
        arrived = gather.name if i == tp - 1 else f"{gather.name}.{i}"
        for op, kernels in zip(products, cut, strict=True):
            outputs = tuple(t.name for t in op.writes)
            piece = Op(
                f"{op.name}.{i}", kernels[i], (whole, *outputs), module=last.module, region=op.region,
                awaits=(arrived,), library=library,
            )  # fmt: skip
            out.append(_ending(piece, op) if i == tp - 1 else piece)
    return out


def _ordered(gather: Op) -> Op:
    """What else reads a tensor that was gathered along its second dimension needs its tokens in order: a copy.

    ``fused_all_gather_matmul`` returns it with the first two dimensions exchanged, and a weight's gradient takes both
    as one (``reshape``); the products' own rows come in that order too, but what reads them is pointwise or attention.
    """
    return Op(
        f"{gather.name}.order", gather.kernels, (gather.writes[0].name,), module=gather.module, region=gather.region
    )


def _ending(piece: Op, op: Op) -> Op:
    """The last piece: what comes after the product runs now, and what backward needed may go."""
    after = tuple(kernel for kernel in op.kernels if not isinstance(kernel, Gemm))
    reads = tuple(dict.fromkeys((*piece.reads, *op.reads)))
    return replace(piece, kernels=(*piece.kernels, *after), reads=reads, releases=op.releases)


def _send(op: Op, scatter: Op, tp: int) -> list[Op]:
    """Return a product in pieces, of which all but the own one are copied to their ranks meanwhile, and their sum."""
    part, into = op.writes[0], scatter.writes[0]
    assert scatter.exchange is not None
    sent = _part(scatter.exchange.tensor, tp)
    out: list[Op] = []
    name = ""
    for i, kernels in enumerate(_cut(op, tp, along_seq=True)):
        if i == 0:
            out.append(replace(op, kernels=kernels, releases=()))
        else:
            piece = Op(f"{op.name}.{i}", kernels, (part.name,), module=op.module, region=op.region)
            out.append(_ending(piece, op) if i == tp - 1 else piece)
        if i < tp - 1:
            name = f"{scatter.name}.{i + 1}"
            exchange = Exchange("shift", TP_AXIS, sent, blocking=False)
            out.append(Op(name, (), (part.name,), module=scatter.module, region=scatter.region, exchange=exchange))
    total = Pointwise("reduce", (part,), (into,))
    out.append(replace(scatter, kernels=(total,), reads=(part.name,), exchange=None, awaits=(name,)))
    return out


def _pipeline(op: Op, scatter: Op, tp: int) -> list[Op]:
    """Return a product in pieces along its width, each of which is reduced and scattered beside the next."""
    part, into = op.writes[0], scatter.writes[0]
    assert scatter.exchange is not None
    piece_tensor = _part(scatter.exchange.tensor, PIPELINED)
    out: list[Op] = []
    for i, kernels in enumerate(_cut(op, PIPELINED, along_seq=False)):
        last = i == PIPELINED - 1
        if i == 0:
            out.append(replace(op, kernels=kernels, releases=()))
        else:
            piece = Op(f"{op.name}.{i}", kernels, (part.name,), module=op.module, region=op.region, library=True)
            out.append(_ending(piece, op) if last else piece)
        out.append(
            replace(
                scatter,
                name=scatter.name if last else f"{scatter.name}.{i + 1}",
                reads=(part.name,) if i == 0 else (part.name, into.name),
                writes=(into,) if i == 0 else (),
                exchange=Exchange("reduce_scatter", TP_AXIS, piece_tensor, blocking=last),
                library=True,
            )
        )
    return out
