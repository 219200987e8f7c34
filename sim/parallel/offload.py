"""Activations that are kept elsewhere between forward and backward: on the host, or in parts over tensor parallelism.

The passes of a microbatch are written as if all stayed on the GPU (``emit.py``); what is here rewrites them: storages
that autograd saved go before their time, and others come for them in backward.

:class:`LayerOffload` is Transformer Engine's ``get_cpu_offload_context`` as Megatron's ``TransformerBlock`` uses it
(transformer_engine/pytorch/cpu_offload.py from 2.10 on; megatron/core/transformer/transformer_block.py):

* Of the first ``num_layers`` blocks each saved tensor of at least 256 Ki elements goes to pinned memory; weights stay.
  Copies are queued on one stream when the block's forward is issued, each behind the tensor's own making.
* ``_init_offload_synchronization_dicts``: of N blocks, K of them offloaded, block i's tensors are let go before the
  forward of block N - K + i, for which the compute stream waits for their copies; they come back, on the same stream
  and into memory of the compute stream, before the backward of block N - 1 - K + i.
* What came back lives until the next block's backward begins (``release_all_memory``), and the pinned copies with it.

:class:`LegacyLayerOffload` is what Transformer Engine had before and runs with ``NVTE_CPU_OFFLOAD_V1=1``
(transformer_engine/pytorch/cpu_offload_v1.py): one block's copies after the other's, spread over the forward of all
blocks; where one block's are to be done both streams wait for each other, its tensors go, and the next one's copies
start. Backward takes the same places in reverse, with a stream of its own; what came back goes as soon as it is read.

:class:`Checkpoints` is ``CheckpointFunction`` of deepspeed/runtime/activation_checkpointing/checkpointing.py (0.19.8),
and of megatron/core/tensor_parallel/random.py with ``distribute_saved_activations``: what becomes of a checkpoint's
input.

* ``partition_activations``: this rank's part is cloned before forward, with ``cpu_checkpointing`` into pageable memory,
  for which the host waits; the input itself goes after the forward. Backward puts the part into a zeroed tensor and
  gathers the others' into it. ``contiguous_memory_optimization``: the first forward makes all ``number_checkpoints``
  places for parts, the first backward lets go of those that hold none.
* ``cpu_checkpointing`` alone: ``_ActivationOffloadEngine`` (offload_activations.py) copies to pinned memory and back,
  on a stream of its own. The last input stays; one is copied when the next has come, and let go when two have. Backward
  brings it back when it is needed, not before.
* Megatron takes its part after the forward, and gathers into memory that nothing has filled.

Left out: reloading into two buffers (``cpu_offloading_double_buffering``, which the newer code ignores); the inputs of
several pipelined microbatches in DeepSpeed's engine at once (it keeps one of all, here one of each).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sim.ir.ledger import Dim, Layer, Pointwise, Tensor
from sim.ir.program import (
    COMPUTE,
    Alloc,
    Collective,
    Compute,
    Copy,
    Free,
    HostWait,
    Instruction,
    Record,
    Storage,
    UseOn,
    Wait,
)

OFFLOAD_STREAM = "offload"
"""Of both directions (``OffloadSynchronizer.offload_stream``; ``_ActivationOffloadEngine.s1``)."""
RELOAD_STREAM = "reload"
"""Of copies back where they have their own (``h2d_stream``)."""
LEAST_ELEMENTS = 256 * 1024
"""``_check_if_offload``: smaller tensors stay on the GPU."""


@dataclass(slots=True)
class Written:
    """The passes of a microbatch as written, and where each layer's part of them begins.

    ``inputs``: the storage of each layer's input. ``weights`` is empty unless backward is split.
    """

    layers: Sequence[Layer]
    forward: list[Instruction]
    backward: list[Instruction]
    weights: list[Instruction]
    forward_starts: Sequence[int]
    """Of each layer, the place after its mark."""
    backward_starts: Sequence[int]
    """The same of backward, in which the last layer comes first."""
    backward_end: int
    """The place after the last layer's backward."""
    inputs: Sequence[Storage]

    def forward_end(self, index: int) -> int:
        """Return the place where a layer's forward is over: before the next one's mark."""
        return self.forward_starts[index + 1] - 1 if index + 1 < len(self.layers) else len(self.forward)

    def backward_over(self, index: int) -> int:
        """Return the place where a layer's backward is over."""
        return self.backward_starts[index - 1] - 1 if index else self.backward_end


class Elsewhere(Protocol):
    """Rewrites passes so that something of what they save is kept elsewhere."""

    def rewrite(self, written: Written) -> None: ...


@dataclass(slots=True)
class _Edits:
    """What is put into a list of instructions, by place, and which storages are freed elsewhere or instead."""

    before: dict[int, list[Instruction]] = field(default_factory=dict)
    instead: dict[int, Storage | None] = field(default_factory=dict)

    def at(self, place: int) -> list[Instruction]:
        return self.before.setdefault(place, [])

    def applied(self, instructions: Sequence[Instruction]) -> list[Instruction]:
        out: list[Instruction] = []
        before, instead = self.before, self.instead
        for place, instruction in enumerate(instructions):
            if place in before:
                out.extend(before[place])
            if isinstance(instruction, Free) and id(instruction.storage) in instead:
                other = instead[id(instruction.storage)]
                if other is not None:
                    out.append(Free(other))
            else:
                out.append(instruction)
        out.extend(before.get(len(instructions), ()))
        return out


def _blocks(layers: Sequence[Layer]) -> list[int]:
    return [index for index, layer in enumerate(layers) if layer.kind == "block"]


@dataclass(frozen=True, slots=True)
class LayerOffload:
    """Saved tensors of the first ``num_layers`` of all blocks, kept in pinned memory."""

    num_layers: int

    def rewrite(self, written: Written) -> None:
        """Put copies behind a block's forward, and what they make room for before later ones."""
        blocks = _blocks(written.layers)
        total, count = len(blocks), min(self.num_layers, len(blocks) - 1)
        forward, backward = _Edits(), _Edits()
        moved = _saved(written, blocks[:count], LEAST_ELEMENTS)
        for number, tensors in enumerate(moved):
            ready, out = _made(written, blocks[number], tensors, number)
            for place, event in ready.items():
                forward.at(place).append(event)
            forward.at(written.forward_starts[blocks[number + 1]]).extend(out)
            forward.at(written.forward_starts[blocks[total - count + number]]).extend(
                (Wait(f"offloaded.{number}", COMPUTE), *(Free(t) for t in tensors))
            )
            back = [_again(t) for t in tensors]
            backward.at(written.backward_starts[blocks[total - 1 - count + number]]).extend(_reload(number, back))
            backward.at(written.backward_starts[blocks[number]]).append(Wait(f"reloaded.{number}", COMPUTE))
            after = written.backward_starts[blocks[number - 1]] if number else written.backward_end
            host = [i.storage for i in out if isinstance(i, Alloc)]
            backward.at(after)[:0] = [Free(s) for s in (*back, *host)]
            backward.instead.update(dict.fromkeys(map(id, tensors)))
        written.forward = forward.applied(written.forward)
        written.backward = backward.applied(written.backward)


@dataclass(frozen=True, slots=True)
class LegacyLayerOffload:
    """The same as Transformer Engine did it before 2.10, with a stream for each direction."""

    num_layers: int

    def rewrite(self, written: Written) -> None:
        """``synchronize_on_group_commit_forward`` behind a block, ``on_group_commit_backward`` before its backward."""
        blocks = _blocks(written.layers)
        total, count = len(blocks), min(self.num_layers, len(blocks) - 1)
        forward, backward = _Edits(), _Edits()
        moved = _saved(written, blocks[:count], 0)
        hosts = [[_host(tensor, pinned=True) for tensor in tensors] for tensors in moved]
        last = windows(total, count)
        for number, tensors in enumerate(moved):
            copies = [Copy("offload", "device_to_host", t.num_bytes, OFFLOAD_STREAM) for t in tensors]
            queued = [step for pair in zip(map(Alloc, hosts[number]), copies, strict=True) for step in pair]
            # the first block's copies start when it is done, any other's when those before are
            start = forward.at(written.forward_end(blocks[last[number - 1] if number else 0]))
            start += [*(() if number else _behind(OFFLOAD_STREAM, COMPUTE)), *queued]
            end = forward.at(written.forward_end(blocks[last[number]]))
            end += [*_behind(OFFLOAD_STREAM, COMPUTE), *_behind(COMPUTE, OFFLOAD_STREAM), *map(Free, tensors)]
            back = [_again(t) for t in tensors]
            before = backward.at(written.backward_starts[blocks[last[number]]])
            before += [*_behind(RELOAD_STREAM, COMPUTE), *_behind(COMPUTE, RELOAD_STREAM)]
            for tensor, host in zip(back, hosts[number], strict=True):
                before += [Alloc(tensor), Copy("reload", "host_to_device", tensor.num_bytes, RELOAD_STREAM), Free(host)]
            backward.instead.update({id(t): again for t, again in zip(tensors, back, strict=True)})
        backward.at(written.backward_starts[blocks[0]]).extend(_behind(COMPUTE, RELOAD_STREAM))
        written.forward = forward.applied(written.forward)
        written.backward = backward.applied(written.backward)


def windows(num_layers: int, num_offloaded: int) -> list[int]:
    """Return the block behind which each offloaded block's copies are waited for (``layer_window_map``).

    >>> windows(8, 3)
    [2, 5, 7]
    """
    share, over = divmod(num_layers, num_offloaded)
    return [share * (i + 1) - 1 + min(i + 1, over) for i in range(num_offloaded)]


def _behind(stream: str, other: str) -> tuple[Instruction, ...]:
    event = f"{stream} behind {other}"
    return Record(event, other), Wait(event, stream)


def _saved(written: Written, blocks: Sequence[int], least: int) -> list[list[Storage]]:
    """Return what of each block autograd keeps from forward to backward and is large enough, in the order of making."""
    made = {id(i.storage): place for place, i in enumerate(written.forward) if isinstance(i, Alloc)}
    sizes: dict[int, dict[str, int]] = {}
    found = []
    for index in blocks:
        layer = written.layers[index]
        if id(layer) not in sizes:
            tensors = [t for op in layer.forward for t in (*op.writes, *op.keeps)]
            sizes[id(layer)] = {f"{layer.kind}.{t.name}": t.num_elements for t in tensors}
        names = sizes[id(layer)]
        freed = [
            i.storage
            for i in written.backward[written.backward_starts[index] : written.backward_over(index)]
            if isinstance(i, Free) and id(i.storage) in made and i.storage.category == "activations"
        ]
        entered = written.inputs[index]
        elements = layer.input.num_elements if layer.input is not None else 0
        large = [s for s in freed if (elements if s is entered else names.get(s.name, 0)) >= least]
        found.append(sorted(large, key=lambda storage: made[id(storage)]))
    return found


def _made(
    written: Written, index: int, tensors: Sequence[Storage], number: int
) -> tuple[dict[int, Record], list[Instruction]]:
    """Return events behind the kernels that make the tensors, by place, and the copies that wait for them.

    What was there before the block is ready where the block begins.
    """
    start, end = written.forward_starts[index], written.forward_end(index)
    wanted = {id(t) for t in tensors}
    ready: dict[int, Record] = {}
    of: dict[int, Record] = {}
    waiting: list[int] = []
    computed = False
    for place in range(start, end + 1):
        instruction = written.forward[place] if place < end else None
        if isinstance(instruction, Compute):
            computed = True
        elif waiting and (computed or instruction is None):
            ready[place] = Record(f"saved.{number}.{len(ready)}", COMPUTE)
            of.update(dict.fromkeys(waiting, ready[place]))
            waiting = []
        if isinstance(instruction, Alloc) and id(instruction.storage) in wanted:
            waiting.append(id(instruction.storage))
            computed = False
    out: list[Instruction] = []
    entered = Record(f"saved.{number}.input", COMPUTE)
    for tensor in tensors:
        event = of.get(id(tensor), entered)
        if event is entered:
            ready[start] = entered
        host = _host(tensor, pinned=True)
        out.append(Wait(event.event, OFFLOAD_STREAM))
        out.append(Alloc(host))
        out.append(Copy("offload", "device_to_host", tensor.num_bytes, OFFLOAD_STREAM))
    out.append(Record(f"offloaded.{number}", OFFLOAD_STREAM))
    return ready, out


def _reload(number: int, tensors: Sequence[Storage]) -> list[Instruction]:
    """``start_reload``: the copies wait for what the compute stream has to do until here, whose memory they may get."""
    out: list[Instruction] = [Record(f"reload.{number}", COMPUTE), Wait(f"reload.{number}", OFFLOAD_STREAM)]
    for tensor in tensors:
        out.append(Alloc(tensor))
        out.append(Copy("reload", "host_to_device", tensor.num_bytes, OFFLOAD_STREAM))
    out.append(Record(f"reloaded.{number}", OFFLOAD_STREAM))
    return out


def _again(storage: Storage, stream: str = COMPUTE) -> Storage:
    return Storage(f"{storage.name} again", storage.num_bytes, "activations", per_microbatch=True, stream=stream)


def _host(storage: Storage, *, pinned: bool) -> Storage:
    stream = "pinned" if pinned else "pageable"
    return Storage(f"{storage.name} on host", storage.num_bytes, "activations", True, stream=stream, place="host")


# --- inputs of checkpoints -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """What happens to the input of each block that is run again, under DeepSpeed or (``megatron``) Megatron.

    ``parts`` tensor-parallel ranks share a checkpoint, if ``partition``; ``places`` for parts are made at once, None:
    each when it is needed. ``interval`` as in :class:`sim.parallel.emit.Recompute`.
    """

    partition: bool
    on_host: bool
    parts: int
    places: int | None = None
    synchronize: bool = False
    megatron: bool = False
    interval: int = 1

    def rewrite(self, written: Written) -> None:
        blocks = [index for number, index in enumerate(_blocks(written.layers)) if (number + 1) % self.interval == 0]
        forward, backward = _Edits(), _Edits()
        held = [written.inputs[index] for index in blocks]
        if self.partition:
            for number, index in enumerate(blocks):
                before, after, gather, whole = self._divided(number, written, index)
                forward.at(written.forward_starts[index]).extend(before)
                forward.at(written.forward_end(index)).extend(after)
                backward.at(written.backward_starts[index]).extend(gather)
                backward.instead[id(held[number])] = whole
            if self.places is not None and blocks:
                self._all_at_once(forward, backward, written, blocks)
        elif self.on_host:
            self._streamed(forward, backward, written, blocks)
        if self.synchronize:
            for index in blocks:
                forward.at(written.forward_starts[index])[:0] = _sync()
                forward.at(written.forward_end(index)).extend(_sync())
                backward.at(written.backward_starts[index])[:0] = _sync()
                backward.at(written.backward_over(index))[:0] = _sync()
        written.forward = forward.applied(written.forward)
        written.backward = backward.applied(written.backward)
        if written.weights:
            written.weights = _Edits(instead=backward.instead).applied(written.weights)

    def _divided(
        self, number: int, written: Written, index: int
    ) -> tuple[list[Instruction], list[Instruction], list[Instruction], Storage]:
        """Return what stands before the forward, after it and before the backward, and what is whole again then."""
        layer, whole = written.layers[index], written.inputs[index]
        assert layer.input is not None
        elements = -(-layer.input.num_elements // self.parts)
        dtype = layer.input.dtype
        num_bytes = -(-whole.num_bytes // self.parts) if whole.num_bytes else 0
        part = Storage(f"part of {whole.name}", num_bytes, "activations", True)
        share = Tensor("part", (Dim("numel", elements),), dtype)
        full = Tensor("whole", (Dim("numel", layer.input.num_elements),), dtype)
        clone = Compute("checkpoint.part", Pointwise("copy", (share,), (share,)))
        before: list[Instruction] = []
        after: list[Instruction] = []
        (after if self.megatron else before).extend((Alloc(part), clone))
        again = _again(whole)
        gather: list[Instruction] = []
        held = part
        if self.on_host:
            host = _host(part, pinned=False)
            if self.places is None:
                before.append(Alloc(host))
            before += [Copy("checkpoint.part", "device_to_host", num_bytes, COMPUTE), *_sync(), Free(part)]
            held = Storage(part.name, num_bytes, "activations", True)
            gather += [Alloc(held), Copy("checkpoint.part", "host_to_device", num_bytes, COMPUTE), *_sync()]
            gather.append(Free(host))
        elif self.places is not None:  # the clone is copied into its place
            held = Storage(f"place of {part.name}", num_bytes, "activations", True)
            before += [clone, Free(part)]
        after.append(Free(whole))
        if self.parts == 1:
            return before, after, gather, held
        gather.append(Alloc(again))
        if not self.megatron:
            gather.append(Compute("checkpoint.whole", Pointwise("elementwise", (), (full,))))
            gather.append(clone)
        name = "checkpoint.gather"
        gather += [
            Record(f"{name} ready", COMPUTE),
            Wait(f"{name} ready", "nccl:tp"),
            Collective(name, "all_gather", "tp", whole.num_bytes, dtype, "nccl:tp"),
            Record(name, "nccl:tp"),
            Wait(name, COMPUTE),
            Free(held),
        ]
        return before, after, gather, again

    def _all_at_once(self, forward: _Edits, backward: _Edits, written: Written, blocks: Sequence[int]) -> None:
        """Let the first forward make the places of all parts, and the first backward let go of those left over."""
        places: list[Storage] = []
        for index in blocks:
            gather = backward.before[written.backward_starts[index]]
            instead = backward.instead[id(written.inputs[index])]
            freed = [i.storage for i in gather if isinstance(i, Free)]
            kept = [s for s in freed if (s.place == "host") == self.on_host]
            places.extend(kept or ([instead] if instead is not None else []))
        assert self.places is not None and self.places >= len(places)
        like = places[0]
        spare = [
            Storage(f"{like.name} spare", like.num_bytes, "activations", True, stream=like.stream, place=like.place)
            for _ in range(self.places - len(places))
        ]
        first = forward.at(written.forward_starts[blocks[0]])
        # behind the first clone, before it is copied
        first[2:2] = [Alloc(s) for s in (*places, *spare)]
        backward.at(written.backward_starts[blocks[-1]])[:0] = [Free(s) for s in spare]

    def _streamed(self, forward: _Edits, backward: _Edits, written: Written, blocks: Sequence[int]) -> None:
        """``_ActivationOffloadEngine`` with one input kept and two in the stash (``_flush_keep_last``)."""
        held = [written.inputs[index] for index in blocks]
        hosts = [_host(storage, pinned=True) for storage in held]
        last = len(blocks) - 1
        for number, index in enumerate(blocks):
            out = forward.at(written.forward_end(index))
            if number >= 2:
                out.append(Free(held[number - 2]))
            if number >= 1:
                copied = held[number - 1]
                event = f"checkpoint.{number - 1}"
                out += [
                    Record(f"{event} made", COMPUTE),
                    Wait(f"{event} made", OFFLOAD_STREAM),
                    Alloc(hosts[number - 1]),
                    Copy("checkpoint", "device_to_host", copied.num_bytes, OFFLOAD_STREAM),
                    UseOn(copied, OFFLOAD_STREAM),
                    Record(f"{event} copied", OFFLOAD_STREAM),
                ]
            if number == last:
                continue
            start = backward.at(written.backward_starts[index])
            host = hosts[number]
            if number == last - 1:
                start += [Wait(f"checkpoint.{number} copied", COMPUTE), Free(host)]
                continue
            again = _again(held[number], OFFLOAD_STREAM)
            start += [
                Alloc(again),
                Copy("checkpoint", "host_to_device", again.num_bytes, OFFLOAD_STREAM),
                Record(f"checkpoint.{number} back", OFFLOAD_STREAM),
                Wait(f"checkpoint.{number} back", COMPUTE),
                UseOn(again, COMPUTE),
                Free(host),
            ]
            backward.instead[id(held[number])] = again


def _sync() -> tuple[Instruction, ...]:
    return (Record("checkpoint.sync", COMPUTE), HostWait("checkpoint.sync"))
