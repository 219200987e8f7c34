"""torch.compile of each block, as torchtitan applies it: a transform of a layer that is sharded already.

What the compiler changes is what is kept for backward, which kernels there are, and what lives meanwhile:

* **What is kept** is a minimum cut between forward and backward (``min_cut_rematerialization_partition``). Values that
  cost real work (products, attention, collectives), random ones, small results of reductions, and those that backward
  needs whole (an operand of a product) are not made again; all else may be, from what is kept. A value has the weight
  of its bytes, twice that where all its readers in forward would be fused with it, more by a tenth for each op between
  it and backward.
* **A checkpoint** inside the compiled block marks ops instead: what it does not keep is made again whatever it costs,
  where backward first asks for it. Parts that nobody asks for do not run.
* **Fusion** (Inductor): an elementwise op is written into each of its readers, if all of them can take it; what is left
  joins the kernel that makes its input, or one that reads the same tensor, if all else that it reads is there by then.
  A norm is one kernel with what stands before and after it. Sums over tokens (gradients of norm weights) and largest
  values over them (of 8-bit casts of columns) are kernels of their own. Complex numbers are not compiled: rotary
  embedding by ``view_as_complex`` stays three kernels.
* **Lives** are those of a written function: no local variable outlasts its last use, a result takes the place of an
  argument of its size that dies there, gradients are no longer added in an engine's buffers.

Sources: torch/_functorch/partitioners.py (solve_min_cut), torch/_inductor/scheduler.py (can_fuse), lowering.py
(complex numbers fall back), torchtitan/models/llama3/parallelize.py (apply_compile).
Leaves out: what is inside an op of the ledger (an activation's own pieces), that all gradients of a block's parameters
are handed over at its end, autotuning, CUDA graphs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sim.ir.ledger import Attention, Dim, Gemm, Kernel, Layer, Ledger, Op, Pointwise, Tensor, size
from sim.parallel.emit import Recompute

_AGAIN = "~"
"""Ends the names of what backward makes again."""
_COMPLEX_TABLE = "freqs_cis"
_LARGEST_OF_COLUMNS = ".columns.amax"
"""Ends the names of reductions over tokens of tensors that are read along rows as well."""
_INFINITE = 1 << 62
_REDUCES = ("norm", "softmax", "reduce")


def compile_ledger(ledger: Ledger, recompute: Recompute, *, loss: bool) -> Ledger:
    """Return the ledger with its blocks compiled, and its ``loss``. Layers that are one object stay one object."""
    made: dict[tuple[int, bool], Layer] = {}
    layers = []
    number = 0
    for layer in ledger.layers:
        chosen = recompute.of_block(number)
        number += layer.kind == "block"
        key = id(layer), chosen is recompute
        if key not in made:
            if layer.kind == "block":
                made[key] = compile_block(layer, chosen)
            else:
                made[key] = compile_loss(layer) if loss and layer.kind == "head" else layer
        layers.append(made[key])
    return replace(ledger, layers=tuple(layers))


def compile_block(layer: Layer, recompute: Recompute) -> Layer:
    """Return a block as its compiled forward and backward: fused, with what is made again written into backward."""
    part = _Part(layer, layer.forward, layer.backward)
    kept = part.cut(recompute)
    forward, backward = part.write(kept)
    return replace(layer, forward=forward, backward=backward)


def compile_loss(layer: Layer) -> Layer:
    """Return the head with ``F.cross_entropy`` compiled: it reads the 16-bit logits, and nothing of their size is kept.

    torchtitan compiles the loss by itself (torchtitan/components/loss.py); norm and projection stay eager.
    """
    forward = [op for op in layer.forward if op.name.startswith("loss")]
    backward = [op for op in layer.backward if op.name.startswith("loss")]
    if not forward or any(op.exchange is not None for op in (*forward, *backward)):
        return layer
    if not any(kernel.kind == "softmax" for op in forward for kernel in op.kernels if isinstance(kernel, Pointwise)):
        return layer
    part = _Part(layer, forward, backward)
    made, returned = part.write(part.cut(Recompute("none")))
    ours = {id(op) for op in (*forward, *backward)}
    before = tuple(op for op in layer.forward if id(op) not in ours)
    after = tuple(op for op in layer.backward if id(op) not in ours)
    return replace(layer, forward=(*before, *made), backward=(*returned, *after))


# --- nodes ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Node:
    """An op, or several in one kernel, in single assignment: nothing is written in place."""

    op: Op
    reads: list[str]
    writes: list[Tensor]
    heavy: bool
    apart: bool
    members: list[_Node] = field(default_factory=list)

    @property
    def fusible(self) -> bool:
        return not self.heavy and not self.apart

    @property
    def pure(self) -> bool:
        """Whether it is elementwise, so that each reader can take it in."""
        return (
            self.fusible
            and not self.op.gradients
            and len(self.writes) == 1
            and all(isinstance(k, Pointwise) and k.kind not in _REDUCES for k in self.op.kernels)
        )


class _Part:
    """Ops of a layer's forward and backward that are compiled together."""

    def __init__(self, layer: Layer, forward: Sequence[Op], backward: Sequence[Op]) -> None:
        self.layer = layer
        self.complex = {
            op.name
            for op in forward
            for kernel in op.kernels
            if isinstance(kernel, Pointwise) and any(t.name == _COMPLEX_TABLE for t in kernel.reads)
        }
        self.tensors: dict[str, Tensor] = {}
        for op in (*layer.forward, *layer.backward):
            for tensor in (*op.writes, *op.keeps):
                self.tensors.setdefault(tensor.name, tensor)
        if layer.input is not None:
            self.tensors[layer.input.name] = layer.input
        if layer.output is not None:
            self.tensors[f"grad:{layer.output.name}"] = layer.output
        self.parameters = {p.name for p in layer.parameters}
        self.versions: dict[str, str] = {}
        self.ends: set[str] = set()
        self.forward = [self._node(op, backward=False) for op in forward]
        self.made = {t.name for node in self.forward for t in node.writes}
        self.given = {name for node in self.forward for name in node.reads} - self.made
        self.backward = [self._node(op, backward=True) for op in backward]
        self._ends(layer)

    def _node(self, op: Op, *, backward: bool) -> _Node:
        heavy = op.exchange is not None or any(isinstance(k, (Gemm, Attention)) for k in op.kernels)
        reads = [self.versions.get(name, name) for name in (op.reads if backward else _true_reads(op))]
        kernels = tuple(
            replace(k, reads=tuple(self._version(t) for t in k.reads)) if isinstance(k, Pointwise) else k
            for k in op.kernels
        )
        writes = [*op.writes, *op.keeps]
        if not heavy and not op.writes and not op.gradients:  # an addition in place: a new value
            kernel = kernels[-1] if kernels else None
            if isinstance(kernel, Pointwise) and len(kernel.writes) == 1 and kernel.writes[0].name in self.tensors:
                old = kernel.writes[0]
                new = replace(old, name=f"{self.versions.get(old.name, old.name)}'")
                self.versions[old.name] = new.name
                self.tensors[new.name] = replace(self.tensors[old.name], name=new.name)
                kernels = (*kernels[:-1], replace(kernel, writes=(new,)))
                writes = [self.tensors[new.name]]
        if not heavy:
            writes, kernels = self._statistics(op, writes, kernels)
        apart = op.name in self.complex or op.name.removesuffix(".backward") in self.complex
        apart = apart or op.name.endswith(_LARGEST_OF_COLUMNS)
        apart = apart or any(isinstance(k, Pointwise) and k.kind == "columns" for k in kernels)
        return _Node(replace(op, kernels=kernels), list(dict.fromkeys(reads)), writes, heavy, apart)

    def _version(self, tensor: Tensor) -> Tensor:
        name = self.versions.get(tensor.name)
        return tensor if name is None else replace(tensor, name=name)

    def _statistics(
        self, op: Op, writes: list[Tensor], kernels: tuple[Kernel, ...]
    ) -> tuple[list[Tensor], tuple[Kernel, ...]]:
        """A softmax is made again from its input and two numbers a row (prims.prepare_softmax_online)."""
        if len(kernels) != 1 or not isinstance(kernels[0], Pointwise) or kernels[0].kind != "softmax" or op.keeps:
            return writes, kernels
        if not writes or op.name.endswith(".backward"):
            return writes, kernels
        rows = Tensor(f"{writes[0].name}.statistics", (*writes[0].shape[:-1], Dim("statistics", 2)), "fp32")
        self.tensors[rows.name] = rows
        return [*writes, rows], (replace(kernels[0], writes=(*kernels[0].writes, rows)),)

    def _ends(self, layer: Layer) -> None:
        """Name the last value of the input's gradient as the border does."""
        if layer.output is not None:
            self.ends.add(layer.output.name)
        self.ends.update(t.name for node in self.forward for t in node.writes if t.name == "loss")
        if layer.input is None or layer.kind != "block":
            inside = {name for node in self.backward for name in node.reads}
            self.ends.update(t.name for node in self.backward for t in node.writes if t.name not in inside)
            return
        border = f"grad:{layer.input.name}"
        last = next(t.name for node in reversed(self.backward) for t in node.writes)
        if last != border:
            self.tensors[border] = replace(self.tensors[last], name=border)
            part = f"{border}.part"
            self.tensors[part] = replace(self.tensors[border], name=part)
            names = {border: part, last: border}
            self.backward = [_renamed(node, names) for node in self.backward]
        self.ends.add(border)

    # --- what is kept ---

    def cut(self, recompute: Recompute) -> set[str]:
        """Return the names of forward's values that are kept for backward."""
        again, cached = recompute.ops(self.layer), recompute.cached(self.layer)
        producer = {t.name: node for node in self.forward for t in node.writes}
        needed = {name for node in self.backward for name in node.reads if name in producer or name in self.given}
        resident = {name for name in needed if name not in self.tensors}
        whole = {name for node in self.backward if node.heavy or node.apart for name in node.reads if name in producer}
        readers: dict[str, list[_Node]] = {}
        for node in self.forward:
            for name in node.reads:
                readers.setdefault(name, []).append(node)
        flow, distance = _Flow(), self._distances(needed, readers)
        for name in (*sorted(self.given), *producer):
            if name in resident or name not in self.tensors:
                continue
            maker = producer.get(name)
            weight = int(self.tensors[name].num_bytes * 1.1 ** max(1, min(distance[name], 100)))
            if maker is not None and all(r.fusible and maker.fusible for r in readers.get(name, ())):
                weight *= 2
            inside, outside = f"{name} in", f"{name} out"
            if maker is not None and maker.op.name in again:
                flow.add(inside, "sink", _INFINITE)
            elif maker is None or maker.op.name in cached or name in whole or self._costs(maker, name):
                flow.add("source", inside, _INFINITE)
            flow.add(inside, outside, max(1, weight))
            if name in needed:
                flow.add(outside, "sink", _INFINITE)
            if maker is not None and (not maker.heavy or maker.op.name in again):
                for read in self._sources(maker, name):
                    flow.add(f"{read} out", inside, _INFINITE)
        return {name.removesuffix(" in") for name in flow.cut("source", "sink")}

    def _distances(self, needed: set[str], readers: Mapping[str, Sequence[_Node]]) -> dict[str, int]:
        """Return how many ops a value is away from backward; statistics have no reader in forward."""
        distance: dict[str, int] = dict.fromkeys(self.given, 0)
        for node in reversed(self.forward):
            for tensor in node.writes:
                steps = [distance[t.name] + 1 for r in readers.get(tensor.name, ()) for t in r.writes]
                distance[tensor.name] = 0 if tensor.name in needed else min(steps, default=0)
        return distance

    def _sources(self, node: _Node, name: str) -> list[str]:
        """Return what a value is made again from: what its op reads, and the statistics that the op kept beside it."""
        found = [read for read in node.reads if read in self.tensors]
        if not node.heavy and not self._costs(node, name):
            found += [t.name for t in node.writes if t.name != name and self._costs(node, t.name)]
        return found

    def _costs(self, node: _Node, name: str) -> bool:
        """Whether a value is not made again for free: work, chance, or a reduction's small result."""
        if node.heavy:
            return True
        if any(t.dtype == "bool" for t in node.writes) and node.op.keeps:
            return name == node.op.keeps[0].name  # a dropout's mask
        read = sum(self.tensors[r].num_bytes for r in node.reads if r in self.tensors)
        return self.tensors[name].num_bytes * 4 < read

    # --- what is written ---

    def write(self, kept: set[str]) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
        """Return the ops of both passes."""
        backward = self._prune(self._with_repeats(kept), self.ends)
        read = {name for node in backward for name in node.reads}
        kept = {name for name in kept if name in read}  # the cut may hold what only an unused result is made of
        forward = self._prune(self.forward, kept | self.ends)
        done = self._emit(self._fuse(forward, kept | self.ends), kept | self.ends, set())
        held = {name for name in sorted(kept) if name in self.tensors}
        ops = self._emit(self._fuse(backward, self.ends), self.ends, held | {"grad:output"})
        module = done[-1].module if done else ""
        done.extend(Op(f"keep {name}", (), saves=(name,), module=module) for name in sorted(held))
        last = {name: i for i, op in enumerate(ops) for name in op.reads if name in held}
        unread = sorted(held - set(last))
        for i, op in enumerate(ops):
            released = [name for name, at in sorted(last.items()) if at == i]
            if i == len(ops) - 1:
                released += unread
            ops[i] = replace(op, releases=tuple(f"keep {name}" for name in released))
        return tuple(done), tuple(ops)

    def _prune(self, nodes: Sequence[_Node], wanted: set[str]) -> list[_Node]:
        """Drop what nobody reads: eager ops whose results a compiler sees unused."""
        live = set(wanted)
        out: list[_Node] = []
        for node in reversed(nodes):
            used = [t for t in node.writes if t.name in live]
            if node.op.gradients or node.op.exchange is not None or used or not node.writes:
                live.update(node.reads)
                out.append(node)
        return out[::-1]

    def _with_repeats(self, kept: set[str]) -> list[_Node]:
        """Return backward with what was not kept made again just before it is first read."""
        producer = {t.name: node for node in self.forward for t in node.writes}
        again: dict[str, str] = {}
        out: list[_Node] = []

        def ensure(name: str) -> None:
            if name not in producer or name in kept or name in again:
                return
            node = producer[name]
            for read in node.reads:
                ensure(read)
            for tensor in node.writes:
                if tensor.name not in kept:
                    again[tensor.name] = f"{tensor.name}{_AGAIN}"
                    self.tensors[again[tensor.name]] = replace(tensor, name=again[tensor.name])
            copy = _renamed(node, again)
            copy.op = replace(copy.op, name=f"{node.op.name}{_AGAIN}", gradients=())
            copy.reads += [t.name for t in node.writes if t.name in kept and not node.heavy]
            out.append(copy)

        for node in self.backward:
            for name in node.reads:
                ensure(name)
            out.append(_renamed(node, again) if again else node)
        return out

    def _fuse(self, nodes: Sequence[_Node], wanted: set[str]) -> list[_Node]:
        """Return the kernels: elementwise ops inside their readers, the others joined where they can be."""
        readers: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            for name in node.reads:
                readers.setdefault(name, []).append(i)
        groups: list[_Node | None] = [replace(node, members=[node]) for node in nodes]
        for i in range(len(nodes) - 1, -1, -1):
            node = nodes[i]
            name = node.writes[0].name if node.writes else ""
            into = [groups[j] for j in readers.get(name, ())]
            if not node.pure or name in wanted or not into or not all(g is not None and g.fusible for g in into):
                continue
            for group in into:
                assert group is not None
                group.members[:0] = [m for m in groups[i].members if all(m is not o for o in group.members)]  # type: ignore[union-attr]
                group.reads = [r for r in group.reads if r != name]
                group.reads += [r for r in groups[i].reads if r not in group.reads]  # type: ignore[union-attr]
            groups[i] = None
            for read in node.reads:  # its readers are now those of what it reads
                readers[read] = [j for j in readers[read] if j != i] + readers[name]
        placed: list[_Node] = []
        at: dict[str, int] = {}
        for group in groups:
            if group is None:
                continue
            home = self._home(group, placed, at)
            if home is None:
                placed.append(group)
                at.update({t.name: len(placed) - 1 for t in group.writes})
                continue
            host = placed[home]
            host.members += [m for m in group.members if all(m is not o for o in host.members)]
            made = {t.name for t in host.writes}
            host.reads += [r for r in group.reads if r not in host.reads and r not in made]
            host.writes = host.writes + group.writes
            host.op = replace(
                host.op,
                parameters=(*host.op.parameters, *group.op.parameters),
                gradients=(*host.op.gradients, *group.op.gradients),
            )
            at.update({t.name: home for t in group.writes})
        return placed

    def _home(self, group: _Node, placed: Sequence[_Node], at: Mapping[str, int]) -> int | None:
        """Return the kernel that ``group`` joins: the one that makes what it reads, or one that reads the same."""
        if not group.fusible:
            return None
        ready = max((at[name] for name in group.reads if name in at), default=-1)
        if ready >= 0 and placed[ready].fusible:
            # one number of a whole tensor is there only when its kernel is over
            whole = {t.name for t in placed[ready].writes if t.num_elements == 1}
            if whole.isdisjoint(group.reads):
                return ready
        widest = max((self.tensors[r].num_bytes for r in group.reads if r in self.tensors), default=0)
        for i in range(len(placed) - 1, max(ready, -1), -1):
            other = placed[i]
            shared = [r for r in group.reads if r in other.reads and r in self.tensors]
            if other.fusible and any(self.tensors[r].num_bytes == widest for r in shared):
                return i
        return None

    def _emit(self, groups: Sequence[_Node], wanted: set[str], held: set[str]) -> list[Op]:
        """Return the ops of kernels. What is not in ``wanted`` or ``held`` may give its place to a result."""
        last = {name: i for i, group in enumerate(groups) for name in group.reads}
        outside = {
            t.name
            for i, group in enumerate(groups)
            for t in group.writes
            if t.name in wanted or last.get(t.name, -1) > i or (not group.members[1:] and t.name not in last)
        }
        place: dict[str, str] = {}  # a result that took an argument's storage -> that storage
        out: list[Op] = []
        for i, group in enumerate(groups):
            made = {t.name for t in group.writes}
            reads = [place.get(r, r) for r in group.reads if r not in made]
            writes = [t for t in group.writes if t.name in outside]
            kernels = (
                group.op.kernels if len(group.members) == 1 and not group.fusible else self._kernels(group, writes)
            )
            free = [
                r for r in group.reads
                if group.fusible and last[r] == i and r in self.tensors and r not in wanted and r not in held
                and r not in made and r not in self.given and not r.startswith("grad:output")
            ]  # fmt: skip
            new: list[Tensor] = []
            for tensor in writes:
                taken = next((r for r in free if self.tensors[r].num_bytes == tensor.num_bytes), None)
                if taken is None or tensor.name in wanted:
                    new.append(tensor)
                else:
                    free.remove(taken)
                    place[tensor.name] = place.get(taken, taken)
            out.append(
                replace(
                    group.op, kernels=kernels, reads=tuple(dict.fromkeys(reads)), writes=tuple(new), saves=(),
                    keeps=(), releases=(), module="", region="",
                    parameters=tuple(dict.fromkeys(p for m in group.members for p in m.op.parameters)),
                    scratch=group.op.scratch if group.heavy else (),
                )
            )  # fmt: skip
        return out

    def _kernels(self, group: _Node, writes: Sequence[Tensor]) -> tuple[Kernel, ...]:
        """Return the kernel of a group, and one for each sum over tokens."""
        made: dict[str, Pointwise] = {}
        sums: list[Pointwise] = []
        main: list[Pointwise] = []
        for member in group.members:
            for kernel in member.op.kernels:
                assert isinstance(kernel, Pointwise), "only memory-bound ops are fused"
                if kernel.writes and all(t.name in self.parameters for t in kernel.writes):
                    sums.append(kernel)
                    continue
                main.append(kernel)
                made.update({t.name: kernel for t in kernel.writes if t.name not in {r.name for r in kernel.reads}})

        def external(kernels: Iterable[Pointwise]) -> tuple[Tensor, ...]:
            found: dict[tuple[str, int], Tensor] = {}
            seen: set[str] = set()
            stack = [t for kernel in kernels for t in kernel.reads]
            while stack:
                tensor = stack.pop(0)
                inner = made.get(tensor.name)
                if inner is None:
                    found[tensor.name, size(tensor.shape)] = tensor
                elif tensor.name not in seen:
                    seen.add(tensor.name)
                    stack.extend(inner.reads)
            return tuple(found.values())

        out: list[Kernel] = []
        flops = sum(kernel.flops_per_element for kernel in main)
        if writes or not sums:
            kinds = [kernel.kind for kernel in main]
            kind = next((k for k in ("transpose", "softmax", "norm") if k in kinds), "elementwise")
            if kinds and all(k in ("reduce", "gather", "scatter") for k in kinds):
                kind = kinds[0]
            out.append(Pointwise(kind, external(main), tuple(writes), max(1, flops), any(k.random for k in main)))
        out.extend(replace(kernel, reads=external([kernel])) for kernel in sums)
        return tuple(out)


def _true_reads(op: Op) -> list[str]:
    """Return what an op computes from, without what eager code only holds in local variables meanwhile."""
    if op.exchange is not None:
        return list(op.reads)
    named = {t.name for kernel in op.kernels if isinstance(kernel, Pointwise) for t in kernel.reads}
    found = [name for name in op.reads if name in named or name in op.saves]
    if not found or (op.reads and op.reads[0] not in found and any(isinstance(k, Gemm) for k in op.kernels)):
        return list(op.reads[:1]) + [name for name in op.reads[1:] if name.startswith("autocast:")]
    return found


def _renamed(node: _Node, names: Mapping[str, str]) -> _Node:
    def tensor(t: Tensor) -> Tensor:
        return replace(t, name=names[t.name]) if t.name in names else t

    kernels = tuple(
        replace(k, reads=tuple(map(tensor, k.reads)), writes=tuple(map(tensor, k.writes)))
        if isinstance(k, Pointwise)
        else k
        for k in node.op.kernels
    )
    exchange = node.op.exchange
    if exchange is not None:
        exchange = replace(exchange, tensor=tensor(exchange.tensor))
    return replace(
        node, op=replace(node.op, kernels=kernels, exchange=exchange), reads=[names.get(r, r) for r in node.reads],
        writes=[tensor(t) for t in node.writes],
    )  # fmt: skip


class _Flow:
    """A network of capacities; ``cut`` is Edmonds and Karp's (the shortest augmenting path each time)."""

    def __init__(self) -> None:
        self.capacity: dict[str, dict[str, int]] = {}

    def add(self, tail: str, head: str, capacity: int) -> None:
        ahead = self.capacity.setdefault(tail, {})
        ahead[head] = max(ahead.get(head, 0), capacity)
        self.capacity.setdefault(head, {}).setdefault(tail, 0)

    def cut(self, source: str, sink: str) -> list[str]:
        """Return the tails of the edges that cross a minimum cut."""
        capacity = self.capacity
        if source not in capacity or sink not in capacity:
            return []
        while True:
            before: dict[str, str] = {source: ""}
            queue = deque([source])
            while queue and sink not in before:
                node = queue.popleft()
                for other, left in capacity[node].items():
                    if left > 0 and other not in before:
                        before[other] = node
                        queue.append(other)
            if sink not in before:
                break
            path = [sink]
            while path[-1] != source:
                path.append(before[path[-1]])
            edges = [(path[i + 1], path[i]) for i in range(len(path) - 1)]
            amount = min(capacity[tail][head] for tail, head in edges)
            assert amount < _INFINITE, f"nothing may be kept on the way to {edges[0][0]}"
            for tail, head in edges:
                capacity[tail][head] -= amount
                capacity[head][tail] += amount
        return [
            tail
            for tail in before
            for head in capacity[tail]
            if head not in before and tail.endswith(" in") and head == f"{tail.removesuffix(' in')} out"
        ]
