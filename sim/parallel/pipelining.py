"""From the order of a pipeline rank's passes to calls: who receives before a pass, and who sends after it.

Each pass that needs a neighbour's tensor receives it into a buffer of its own, each that makes one sends it. How early
a receive is posted, what waits for a message, and when what was sent is let go differ by framework (:class:`Messages`).
A message waits for the kernels issued before it, as ProcessGroupNCCL's streams do; messages of one kind between two
ranks are in order, and a send meets the receive of the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from sim.ir.program import (
    COMPUTE,
    Alloc,
    Call,
    Chunk,
    Collective,
    Free,
    HostWait,
    Instruction,
    Mark,
    Record,
    Recv,
    Send,
    Storage,
    UseOn,
    Wait,
)
from sim.parallel.emit import Border
from sim.parallel.frameworks.flat import copy, pointwise
from sim.parallel.schedule import LOOPED, Order, Pass, Placement

Way = Literal["forward", "backward"]
_UNBOUND = (Wait, Record, HostWait)
"""Instructions that are of no microbatch in particular."""


@dataclass(frozen=True, slots=True)
class Messages:
    """How a framework exchanges tensors between stages.

    ``ahead``       when a receive is posted: ``never`` before its pass, ``turn`` one pass earlier if that goes the
                    other way (so that it hides behind it), ``always`` one pass earlier
    ``waits``       the compute stream waits for a send at ``once``, before the ``next`` one of its kind, or ``never``:
                    then what was sent is let go as soon as it has left
    ``host_waits``  the host waits for the GPU after each exchange
    ``frees_sent``  a sent output's memory is freed; else it stays until its backward
    ``buffers``     receive buffers are there from the start, one a microbatch and direction
    ``lands``       what is received comes into one buffer, there from the start: activations are copied out of it,
                    gradients are used where they are
    ``batched``     what a turn sends, and receives for later turns, is one exchange after it, waited for as a whole
    ``remembers``   the function that runs the passes still has what the last backward took and gave in its variables
    ``in_group``    messages go by ``batch_isend_irecv``, in the communicator of all stages; else each pair has its own
    ``parts``       ranks of the axis "tp" over which a tensor is divided to be sent; who receives it gathers it
    ``described``   parts come with what they are of, are cloned, and an output's is all that is kept of it; else a part
                    is a slice of what is sent, and what was received is gathered once the exchange has been waited for
    """

    ahead: Literal["never", "turn", "always"]
    waits: Literal["once", "next", "never"]
    host_waits: bool
    frees_sent: bool
    buffers: bool = False
    lands: bool = False
    batched: bool = False
    parts: int = 1
    described: bool = False
    remembers: bool = False
    in_group: bool = False


MEGATRON = Messages("never", waits="once", host_waits=True, frees_sent=True, remembers=True, in_group=True)
"""``forward_backward_pipelining_without_interleaving`` (megatron/core/pipeline_parallel/schedules.py): sends and
receives of a turn are one batch (``batch_p2p_comm``), ended by ``torch.cuda.synchronize()`` (``batch_p2p_sync``)."""
MEGATRON_OVERLAP = Messages("turn", waits="next", host_waits=False, frees_sent=True)
"""``forward_backward_pipelining_with_interleaving`` with ``overlap_p2p_comm``, its default: exchanges of the
steady state run beside the next pass, those of warm-up and cool-down are waited for."""
MEGATRON_INTERLEAVED = Messages("never", waits="once", host_waits=True, frees_sent=True, batched=True, in_group=True)
"""The same without ``overlap_p2p_comm``: all messages of a turn are one batch (``send_forward_recv_forward``,
``send_forward_backward_recv_forward_backward``), tensors of later passes among them.

With ``parts`` the three are ``scatter_gather_tensors_in_pipeline`` of 2021 to 2023 (megatron/p2p_communication.py):
``split_tensor_into_1d_equal_chunks`` takes a slice, ``gather_split_1d_tensor`` comes after the wait for the device."""
DEEPSPEED = Messages("never", waits="once", host_waits=False, frees_sent=False, lands=True, described=True)
"""deepspeed/runtime/pipe/p2p.py: blocking sends and receives; outputs stay in ``pipe_buffers`` until their backward.
``pipe_recv_buf`` and ``grad_layer`` are one buffer (``_allocate_or_extend_buffers`` of pipe/engine.py). With tensor
parallelism each rank sends a part (``is_pipe_partitioned``, ``is_grad_partitioned``)."""
MEGATRON_ORDERED = Messages("always", waits="never", host_waits=False, frees_sent=True, in_group=True)
"""Schedules given as a list for each rank, as zero-bubble runtimes execute them: every message is asynchronous."""
TORCH = Messages("always", waits="never", host_waits=False, frees_sent=False, buffers=True, in_group=True)
"""torch/distributed/pipelining/stage.py and schedules.py: receives into buffers made once, sends waited for later; a
stage's ``fwd_cache`` keeps outputs until their backward."""


@dataclass(frozen=True, slots=True)
class Route:
    """A message between two chunks: the pair axis that it takes."""

    axis: str
    sender: tuple[int, int]
    receiver: tuple[int, int]


def way_of(pass_: Pass) -> Way | None:
    """Return which way a pass goes; a weight gradient goes none."""
    if pass_.kind == "weight_gradient":
        return None
    return "forward" if pass_.kind == "forward" else "backward"


def outgoing(placement: Placement, rank: int, chunk: int, way: Way, p: int, v: int) -> Route | None:
    """Return where the passes of a chunk send to; None at the end of the model."""
    step = 1 if way == "forward" else -1
    other = placement.neighbour(rank, chunk, step, p, v)
    if other is None:
        return None
    # round and round the ranks, one axis a direction is enough: all messages go one way, in one order
    back = placement is not LOOPED and chunk == 1
    return Route(f"pp_{way}{'_back' if back else ''}", (rank, chunk), other)


def incoming(placement: Placement, rank: int, chunk: int, way: Way, p: int, v: int) -> Route | None:
    """Return where the passes of a chunk receive from; None at the start."""
    source = placement.neighbour(rank, chunk, -1 if way == "forward" else 1, p, v)
    return None if source is None else outgoing(placement, *source, way, p, v)


def pair_axes(placement: Placement, p: int, v: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return axis -> (sender, receiver) in pipeline ranks, of every message that crosses ranks."""
    pairs: dict[str, dict[tuple[int, int], None]] = {}
    ways: tuple[Way, ...] = ("forward", "backward")
    for way in ways:
        for rank in range(p):
            for chunk in range(v):
                route = outgoing(placement, rank, chunk, way, p, v)
                if route is not None and route.receiver[0] != rank:
                    pairs.setdefault(route.axis, {})[rank, route.receiver[0]] = None
    return {axis: tuple(found) for axis, found in pairs.items()}


class Exchange:
    """Writes the calls of one pipeline rank, and the chunks of its messages as they are first needed.

    ``borders`` are those of its chunks. ``pass_name`` gives the chunk of a pass.
    """

    def __init__(
        self, rank: int, p: int, v: int, placement: Placement, borders: Sequence[Border], messages: Messages
    ) -> None:
        self.rank, self.p, self.v = rank, p, v
        self.placement = placement
        self.borders = borders
        self.messages = messages
        self.chunks: dict[str, Chunk] = {}
        self.slices = messages.parts > 1 and not messages.described
        self._parts: dict[tuple[Way, int], Storage] = {}
        self._bound: dict[str, bool] = {}
        self._sources: dict[tuple[int, str], Route | None] = {}
        self._targets: dict[tuple[int, str], Route | None] = {}
        self._known: dict[tuple[tuple[str, int], ...], list[tuple[str, int | None]]] = {}
        """Groups of calls by their chunks and microbatches from the first one's on, joined."""

    def calls(self, order: Order, pass_name: Callable[[Pass], str]) -> list[list[Call]]:
        """Return the calls of each pass of the order, with what belongs to it before and after."""
        if self.messages.batched:
            return self._batched(order, pass_name)
        groups: list[list[Call]] = []
        posted = -1
        self._pending: dict[str, tuple[Way, Pass]] = {}
        self._arrived: Pass | None = None
        done_with: list[Pass] = []
        for index, pass_ in enumerate(order):
            calls: list[Call] = []
            groups.append(calls)
            following = order[index + 1] if index + 1 < len(order) else None
            if posted < index:
                self._post(calls, pass_)
                self._arrive(calls, pass_, sync=True)
            elif self._arrived is not pass_:
                self._arrive(calls, pass_, sync=False)
            if following is not None and not pass_.with_next and self._ahead(pass_, following):
                self._post(calls, following)
                posted = index + 1
            if pass_.with_next and following is not None:  # both start when both can
                self._post(calls, following)
                self._arrive(calls, following, sync=False)
                posted, self._arrived = index + 1, following
                calls.append(Call(pass_name(pass_), pass_.microbatch))
                done_with.append(pass_)
                continue
            calls.append(Call(pass_name(pass_), pass_.microbatch))
            for first in done_with:
                self._after(calls, first, None)
            done_with.clear()
            if self._after(calls, pass_, following):
                posted = index + 1
        for axis in list(self._pending):
            self._settle(groups[-1], axis)
        if self.messages.remembers:
            self._remember(groups, order)
        return [self._joined(group) for group in groups]

    def _remember(self, groups: list[list[Call]], order: Order) -> None:
        """Keep the gradient that a backward made until the next has made its own, and its input until a turn later.

        In ``forward_backward_pipelining_without_interleaving`` they are in variables until these are assigned anew.
        ``input_tensor_grad`` is by the next backward; ``output_tensor`` by the next forward, or where there is none by
        the next backward's ``pop``: it has no bytes left, but its graph holds what the stage received, a leaf.
        """
        border = self.borders[0]
        if border.grad_input is None or border.input is None or self.v > 1:
            return
        kept = {
            "gradient": Storage("input_tensor_grad", border.grad_input.num_bytes, "activations"),
            "input": Storage("input_tensor", border.input.num_bytes, "activations"),
        }
        has = dict.fromkeys(kept, False)

        def turn(calls: list[Call], pass_: Pass, what: str, keep: bool, place: int | None = None) -> None:
            if has[what] == keep:
                return
            has[what] = keep
            name = f"{'keep' if keep else 'drop'}.{what}"
            storage = kept[what]
            if name not in self.chunks:
                self.chunks[name] = (Alloc(storage) if keep else Free(storage),)
            calls.insert(len(calls) if place is None else place, Call(name, pass_.microbatch))

        last = max(index for index, pass_ in enumerate(order) if pass_.kind != "forward")
        for index, (calls, pass_) in enumerate(zip(groups, order, strict=True)):
            if pass_.kind == "forward":
                turn(calls, pass_, "input", False)
                continue
            turn(calls, pass_, "input", False, 0)
            turn(calls, pass_, "gradient", False)
            if index != last:
                turn(calls, pass_, "gradient", True)
                turn(calls, pass_, "input", True)

    def _batched(self, order: Order, pass_name: Callable[[Pass], str]) -> list[list[Call]]:
        """Return the calls of interleaved 1F1B without overlap: a turn is a forward, a backward, or one of each.

        After it come one batch and a wait for all of it. A rank receives what its next forward needs; the first one
        what the last one has sent just now, p - 1 turns behind it, for a later chunk. Backward likewise from the other
        end; the first gradient comes with the last batch of the warm-up
        (``recv_tensor_from_previous_stage`` in megatron/core/pipeline_parallel/schedules.py).
        """
        groups: list[list[Call]] = [[] for _ in order]
        self._pending = {}
        passes: dict[Way, list[Pass]] = {"forward": [], "backward": []}
        for pass_ in order:
            passes["forward" if pass_.kind == "forward" else "backward"].append(pass_)
        total = len(passes["forward"])
        warmup = min(2 * (self.p - self.rank - 1) + (self.v - 1) * self.p, total)
        self._at = {(way, q.chunk, q.microbatch): q for way, found in passes.items() for q in found}
        if self._source(passes["forward"][0]) is not None:
            self._exchange(groups[0], [], [passes["forward"][0]])
        done = {"forward": 0, "backward": 0}
        turn: list[Pass] = []
        for index, pass_ in enumerate(order):
            steady = warmup <= index < 2 * total - warmup
            if index == warmup == total:  # nothing but warm-up: ``recv_backward``
                self._exchange(groups[index], [], self._next(passes, "backward", -1))
            groups[index].append(Call(pass_name(pass_), pass_.microbatch))
            turn.append(pass_)
            if steady and pass_.kind == "forward":
                continue
            arriving: list[Pass] = []
            for each in turn:
                way: Way = "forward" if each.kind == "forward" else "backward"
                arriving += self._next(passes, way, done[way])
                done[way] += 1
            if index == warmup - 1 < total - 1:
                arriving += self._next(passes, "backward", -1)
            self._exchange(groups[index], turn, arriving)
            turn = []
        return [self._joined(group) for group in groups]

    def _next(self, passes: dict[Way, list[Pass]], way: Way, k: int) -> list[Pass]:
        """Return the pass whose tensor is received after pass ``k`` of its way (-1: before the first), if any."""
        own, step = passes[way], 1 if way == "forward" else -1
        if self.rank == (0 if way == "forward" else self.p - 1):  # k is p - 1 ahead of who sends
            if k < self.p - 1:
                return []
            sent = own[k - (self.p - 1)]
            later = self._at.get((way, sent.chunk + step, sent.microbatch))
            return [] if later is None else [later]
        return own[k + 1 : k + 2]

    def _exchange(self, calls: list[Call], made: Sequence[Pass], arriving: Sequence[Pass]) -> None:
        """Send and receive at once, and wait for all of it."""
        exchanged = False
        for pass_ in made:
            way = way_of(pass_)
            assert way is not None
            route = outgoing(self.placement, self.rank, pass_.chunk, way, self.p, self.v)
            if route is not None:
                send = partial(self._send, way, pass_.chunk, route)
                self._call(calls, f"send.{way}.{pass_.chunk}", pass_, send)
                self._pending[route.axis] = (way, pass_)
                exchanged = True
        for pass_ in arriving:
            self._post(calls, pass_)
        for axis in list(self._pending):
            self._settle(calls, axis)
        for pass_ in arriving:
            way = way_of(pass_)
            assert way is not None
            name = f"{way}.{pass_.chunk}"
            self._call(calls, f"received.{name}", pass_, partial(self._received, name, way, pass_.chunk))
            exchanged = True
        if exchanged:
            self._call(calls, "synchronize", (*made, *arriving)[0], _synchronize)
        for pass_ in arriving:
            self._gather(calls, pass_, "forward" if pass_.kind == "forward" else "backward")

    def _gather(self, calls: list[Call], pass_: Pass, way: Way) -> None:
        """Gather what was received in part, where who sent it did not describe it."""
        if self.slices:
            self._call(calls, f"gather.{way}.{pass_.chunk}", pass_, partial(self._gathered, way, pass_.chunk))

    def _joined(self, calls: Sequence[Call]) -> list[Call]:
        """Return the calls with neighbours made one where they are of one microbatch, or of none in particular."""
        if not calls:
            return []
        base = calls[0].microbatch
        key = tuple([(call.chunk, call.microbatch - base) for call in calls])
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = [
                (call.chunk, None if of is None else of - base) for call, of in self._joining(calls)
            ]
        return [Call(name, 0 if after is None else base + after) for name, after in known]

    def _joining(self, calls: Sequence[Call]) -> list[tuple[Call, int | None]]:
        """Return the joined calls with their microbatches; None: of none in particular."""
        found: list[tuple[Call, int | None]] = []
        names: list[str] = []
        of: int | None = None

        def close() -> None:
            nonlocal of
            if names:
                name = " ".join(names)
                if name not in self.chunks:
                    self.chunks[name] = tuple(i for part in names for i in self.chunks[part])
                found.append((Call(name, 0 if of is None else of), of))
            names.clear()
            of = None

        for call in calls:
            if call.chunk not in self.chunks:  # a pass
                close()
                found.append((call, call.microbatch))
                continue
            bound = self._bound.get(call.chunk)
            if bound is None:
                bound = any(not isinstance(i, _UNBOUND) for i in self.chunks[call.chunk])
                self._bound[call.chunk] = bound
            if bound:
                if of is not None and of != call.microbatch:
                    close()
                of = call.microbatch
            names.append(call.chunk)
        close()
        return found

    def _ahead(self, pass_: Pass, following: Pass) -> bool:
        if self.messages.ahead == "never" or way_of(following) is None:
            return False
        return self.messages.ahead == "always" or way_of(pass_) != way_of(following)

    def _after(self, calls: list[Call], pass_: Pass, following: Pass | None) -> bool:
        """Send what the pass made; return whether the next pass's receive went with it and has been waited for."""
        way = way_of(pass_)
        if way is None:
            return False
        if way == "backward" and not self.messages.frees_sent and self.borders[pass_.chunk].output is not None:
            self._call(calls, f"release.{pass_.chunk}", pass_, lambda: self._release(pass_.chunk))
        route = self._target(pass_.chunk, way)
        if route is None:
            return False
        self._settle(calls, route.axis)
        self._call(calls, f"send.{way}.{pass_.chunk}", pass_, lambda: self._send(way, pass_.chunk, route))
        if self.messages.waits == "never":
            return False
        self._pending[route.axis] = (way, pass_)
        turn = following is not None and way_of(following) not in (None, way)
        at_once = self.messages.waits == "once" or (self.messages.ahead == "turn" and not turn)
        # around a ring of stages a send that waited alone would wait for itself: send_forward_recv_forward is one
        together = at_once and (turn or self.v > 1)
        if together and following is not None and self._source(following) is not None:
            self._post(calls, following)
            self._settle(calls, route.axis)
            self._arrive(calls, following, sync=True)
            self._arrived = following
            return True
        if at_once:
            self._settle(calls, route.axis)
            if self.messages.host_waits:
                self._call(calls, "synchronize", pass_, _synchronize)
        return False

    def _source(self, pass_: Pass) -> Route | None:
        """Return the route of what the pass needs from another rank."""
        way = way_of(pass_)
        if way is None:
            return None
        key = (pass_.chunk, way)
        if key not in self._sources:
            route = incoming(self.placement, self.rank, pass_.chunk, way, self.p, self.v)
            self._sources[key] = None if route is None or route.sender[0] == self.rank else route
        return self._sources[key]

    def _target(self, chunk: int, way: Way) -> Route | None:
        """Return the route to another rank of what the passes of a chunk make."""
        key = (chunk, way)
        if key not in self._targets:
            route = outgoing(self.placement, self.rank, chunk, way, self.p, self.v)
            self._targets[key] = None if route is None or route.receiver[0] == self.rank else route
        return self._targets[key]

    def _post(self, calls: list[Call], pass_: Pass) -> None:
        route, way = self._source(pass_), way_of(pass_)
        if route is not None and way is not None:
            self._call(calls, f"recv.{way}.{pass_.chunk}", pass_, lambda: self._recv(way, pass_.chunk, route))

    def _arrive(self, calls: list[Call], pass_: Pass, *, sync: bool) -> None:
        way = way_of(pass_)
        if way is None:
            return
        if self._source(pass_) is not None:
            name = f"{way}.{pass_.chunk}"
            self._call(calls, f"received.{name}", pass_, lambda: self._received(name, way, pass_.chunk))
            if sync and self.messages.host_waits:
                self._call(calls, "synchronize", pass_, _synchronize)
            self._gather(calls, pass_, way)
            return
        route = incoming(self.placement, self.rank, pass_.chunk, way, self.p, self.v)
        if route is not None:  # from another chunk of this rank: the same memory under another name
            sender = self.borders[route.sender[1]]
            given = sender.output if way == "forward" else sender.grad_input
            taken = _received(self.borders[pass_.chunk], way)
            keep = way == "forward" and not self.messages.frees_sent
            handed: list[Instruction] = [Alloc(taken)] if keep else [Free(_some(given)), Alloc(taken)]
            self._call(calls, f"hand.{way}.{pass_.chunk}", pass_, lambda: handed)

    def _settle(self, calls: list[Call], axis: str) -> None:
        """Wait for the last send on an axis; let go what it sent."""
        pending = self._pending.pop(axis, None)
        if pending is None:
            return
        way, pass_ = pending
        border = self.borders[pass_.chunk]
        name = f"{way}.{pass_.chunk}"

        def sent() -> list[Instruction]:
            out: list[Instruction] = [Wait(f"sent {name}", COMPUTE)]
            if way == "backward":
                out.append(Free(_some(border.grad_input)))
                if self.messages.parts > 1 and not self.slices:
                    out.append(Free(self._part(way, pass_.chunk)))
            elif self.messages.frees_sent:
                out.append(Free(_some(border.output)))
            return out

        self._call(calls, f"sent.{name}", pass_, sent)

    def _send(self, way: Way, chunk: int, route: Route) -> list[Instruction]:
        border = self.borders[chunk]
        tensor = _some(border.output if way == "forward" else border.grad_input)
        stream = f"p2p:{route.axis}.send"
        if self.messages.parts > 1 and not self.slices:
            return self._send_part(way, chunk, route, tensor, stream)
        let_go: list[Instruction] = []
        if self.messages.waits == "never" and (way == "backward" or self.messages.frees_sent):
            let_go = [UseOn(tensor, stream), Free(tensor)]
        return [
            Mark(way, "pipeline"),
            Record(f"{stream} ready", COMPUTE),
            Wait(f"{stream} ready", stream),
            Send(f"{way}.send", f"{route.axis}.send", -(-tensor.num_bytes // self.messages.parts), stream),
            Record(f"sent {way}.{chunk}", stream),
            *let_go,
        ]

    def _send_part(self, way: Way, chunk: int, route: Route, tensor: Storage, stream: str) -> list[Instruction]:
        """Send this rank's part, and before it what the part is of.

        ``PartitionedTensor`` (deepspeed/runtime/utils.py) clones the part; ``to_meta`` copies a list of numbers from
        pageable memory, for which the host waits until all before it is done. Of an output the part alone is kept.
        """
        part = self._part(way, chunk)
        return [
            Mark(way, "pipeline"),
            Alloc(part),
            copy("part", part.num_bytes, "uint8", "uint8"),
            *_described(),
            *((Free(tensor),) if way == "forward" else ()),
            Record(f"{stream} ready", COMPUTE),
            Wait(f"{stream} ready", stream),
            Send(f"{way}.meta.send", f"{route.axis}.send", self._meta_bytes(), stream),
            Send(f"{way}.send", f"{route.axis}.send", part.num_bytes, stream),
            Record(f"sent {way}.{chunk}", stream),
        ]

    def _part(self, way: Way, chunk: int) -> Storage:
        """Return what a rank sends of an output or of the gradient of an input: one for each microbatch."""
        found = self._parts.get((way, chunk))
        if found is None:
            border = self.borders[chunk]
            whole = _some(border.output if way == "forward" else border.grad_input)
            num_bytes = -(-whole.num_bytes // self.messages.parts)
            found = Storage(f"part of {whole.name}", num_bytes, "activations", per_microbatch=True)
            self._parts[way, chunk] = found
        return found

    def _meta_bytes(self) -> int:
        """int64: dimensions and their sizes, [batch, sequence, hidden]; parts, rank, and where each part begins."""
        return 8 * (1 + 3 + 2 + self.messages.parts + 1)

    def _release(self, chunk: int) -> list[Instruction]:
        """Let an output go after its backward, and its part with it."""
        output = _some(self.borders[chunk].output)
        parts = self.messages.parts > 1 and not self.slices
        return [Free(output), *((Free(self._part("forward", chunk)),) if parts else ())]

    def _recv(self, way: Way, chunk: int, route: Route) -> list[Instruction]:
        buffer = _received(self.borders[chunk], way)
        stream = f"p2p:{route.axis}.recv"
        axis = f"{route.axis}.recv"
        parts = self.messages.parts > 1 and not self.slices
        if self.slices:
            buffer = self._slice(way, chunk)
        return [
            Mark(way, "pipeline"),
            *(() if parts or (self.messages.lands and way == "forward") else (Alloc(buffer),)),
            Record(f"{stream} ready", COMPUTE),
            Wait(f"{stream} ready", stream),
            *((Recv(f"{way}.meta.recv", axis, self._meta_bytes(), stream),) if parts else ()),
            Recv(f"{way}.recv", axis, self._message_bytes(way, chunk), stream),
            Record(f"received {way}.{chunk}", stream),
        ]

    def _received(self, name: str, way: Way, chunk: int) -> list[Instruction]:
        """Wait for a message; where it has landed in the buffer of all, copy an activation out of it (``clone``)."""
        out: list[Instruction] = [Wait(f"received {name}", COMPUTE)]
        if self.messages.parts > 1 and not self.slices:
            border, num_bytes = self.borders[chunk], self._message_bytes(way, chunk)
            if way == "forward":
                return [*out, copy("clone", num_bytes, "uint8", "uint8"), *self._whole(_some(border.input), num_bytes)]
            out += self._whole(_some(border.output), num_bytes)  # of which only the part was kept
            return [*out, *self._whole(_some(border.grad_output), num_bytes)]
        if self.messages.lands and way == "forward":
            num_bytes = self._message_bytes(way, chunk)
            out += [Alloc(_received(self.borders[chunk], way)), copy("clone", num_bytes, "uint8", "uint8")]
        return out

    def _slice(self, way: Way, chunk: int) -> Storage:
        """Return what a part is received into: one for each microbatch."""
        found = self._parts.get((way, chunk))
        if found is None:
            whole = _received(self.borders[chunk], way)
            num_bytes = -(-whole.num_bytes // self.messages.parts)
            found = Storage(f"part of {whole.name}", num_bytes, "activations", per_microbatch=True)
            self._parts[way, chunk] = found
        return found

    def _gathered(self, way: Way, chunk: int) -> list[Instruction]:
        """``gather_split_1d_tensor``: an all-gather into a new tensor; the part goes when its name is assigned anew."""
        whole, part = _received(self.borders[chunk], way), self._slice(way, chunk)
        return [
            Mark(way, "pipeline"),
            Alloc(whole),
            Record("parts ready", COMPUTE),
            Wait("parts ready", "nccl:tp"),
            Collective("parts", "all_gather", "tp", whole.num_bytes, "uint8", "nccl:tp"),
            Record("parts gathered", "nccl:tp"),
            Wait("parts gathered", COMPUTE),
            Free(part),
        ]

    def _whole(self, tensor: Storage, part_bytes: int) -> list[Instruction]:
        """Gather a tensor from its parts: ``PartitionedTensor.full``.

        A flat buffer of zeros, the own part into it, an all-gather into a list of its slices, which torch gathers into
        one buffer and copies out of it (``ProcessGroupNCCL::allgather``), and a clone of the buffer.
        """
        num_bytes = tensor.num_bytes
        flat = Storage(f"flat {tensor.name}", num_bytes, "temporary")
        gathered = Storage(f"gathered {tensor.name}", num_bytes, "temporary")
        return [
            Alloc(flat),
            pointwise("zeros", "elementwise", (), ((num_bytes, "uint8"),)),
            copy("own part", part_bytes, "uint8", "uint8"),
            Alloc(gathered),
            Collective("parts", "all_gather", "tp", num_bytes, "uint8", COMPUTE),
            copy("parts", num_bytes, "uint8", "uint8"),
            Free(gathered),
            Alloc(tensor),
            copy("clone", num_bytes, "uint8", "uint8"),
            Free(flat),
        ]

    def _message_bytes(self, way: Way, chunk: int) -> int:
        """Return the bytes of a message: those of the gradient or activation of the same border, or of a part of it."""
        border = self.borders[chunk]
        other = border.grad_input if way == "forward" else border.output
        return -(-_some(other).num_bytes // self.messages.parts)

    def _call(self, calls: list[Call], name: str, pass_: Pass, chunk: Callable[[], Sequence[Instruction]]) -> None:
        if name not in self.chunks:
            self.chunks[name] = tuple(chunk())
        calls.append(Call(name, pass_.microbatch))


def _received(border: Border, way: Way) -> Storage:
    return _some(border.input if way == "forward" else border.grad_output)


def _some(storage: Storage | None) -> Storage:
    assert storage is not None, "a message at the end of the model"
    return storage


def _synchronize() -> list[Instruction]:
    return [Record("exchanged", COMPUTE), HostWait("exchanged")]


def _described() -> tuple[Instruction, ...]:
    return Record("described", COMPUTE), HostWait("described")


ACTIVE_STAGES = 3
"""``max_active_stages`` of ``_add_unshard_reshard`` in torch/distributed/pipelining/schedules.py."""


def fetches(order: Order, num_chunks: int) -> dict[int, int]:
    """Return the pass before which each chunk's parameters are fetched: the first from which on it is among the next
    ``ACTIVE_STAGES`` chunks to compute; later chunks of one pass after earlier ones, as they are inserted before it.

    Leaves out that a fourth chunk's parameters are let go, and fetched again.
    """
    coming: list[int] = []
    found: dict[int, int] = {}
    for index in range(len(order) - 1, -1, -1):
        chunk = order[index].chunk
        coming = [chunk, *(c for c in coming if c != chunk)]
        for near in coming[:ACTIVE_STAGES]:
            found[near] = index
    assert len(found) == num_chunks, "every chunk has passes"
    turn = {chunk: place for place, chunk in enumerate(dict.fromkeys(p.chunk for p in order))}
    return dict(sorted(found.items(), key=lambda item: (item[1], -turn[item[0]])))


def aligned_fetches(order: Order, num_chunks: int, rank: int) -> dict[int, int]:
    """Return the pass before which Megatron's interleaved schedule gathers each chunk's parameters.

    The first two at the start. A later one as the first rank of the pipeline begins the chunk before it: ``rank``
    forward passes earlier than this rank, so that all ranks gather at one time (``param_sync_virtual_microbatch_id`` in
    megatron/core/pipeline_parallel/schedules.py).
    """
    found = dict.fromkeys(range(min(2, num_chunks) - 1, -1, -1), 0)
    forwards = [index for index, pass_ in enumerate(order) if pass_.kind == "forward"]
    for chunk in range(2, num_chunks):
        turn = next(k for k, index in enumerate(forwards) if order[index].chunk == chunk - 1)
        found[chunk] = forwards[max(turn - rank, 0)]
    return found


def roles(order: Order) -> dict[tuple[int, int], str]:
    """Return the role of each (chunk, microbatch) of an order, with ``.split`` where its backward is in two passes.

    Only, first, middle or last of its chunk to finish its gradients.
    """
    done: dict[int, list[int]] = {}
    split: set[tuple[int, int]] = set()
    for pass_ in order:
        if pass_.kind in ("backward", "weight_gradient"):
            done.setdefault(pass_.chunk, []).append(pass_.microbatch)
        if pass_.kind == "weight_gradient":
            split.add((pass_.chunk, pass_.microbatch))
    found = {}
    for chunk, microbatches in done.items():
        for place, microbatch in enumerate(microbatches):
            if len(microbatches) == 1:
                role = "only"
            else:
                role = "first" if place == 0 else "last" if place == len(microbatches) - 1 else "middle"
            found[chunk, microbatch] = role + (".split" if (chunk, microbatch) in split else "")
    return found
