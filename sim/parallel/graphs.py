"""CUDA graphs: what is captured is launched at once, and the host issues nothing of it one by one.

Megatron's ``cuda_graph_impl`` captures each block's forward and backward as a graph (``_CudaGraphRunner`` in
megatron/core/transformer/cuda_graphs.py for ``local``, ``make_graphed_callables`` of Transformer Engine for
``transformer_engine``), or with ``cuda_graph_scope: full_iteration`` all passes of a step as one
(``FullCudaGraphWrapper`` in megatron/core/full_cuda_graph.py); the optimizer's step is issued as ever.

    a block's pass    one kernel's time of the host, for the call that replays it; ``graph_node`` for each other
    a full iteration  ``graph_node`` for each kernel and transfer; the host waits for nothing in it

Leaves out: the graphs' own memory pools, that kernels within a graph follow each other sooner, the copies of inputs
into static buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sim.ir.program import Chunk, Collective, Compute, Copy, HostWait, Instruction, Mark, Program, Recv, Send

NOT_CAPTURED = ("setup", "workspaces", "buffers", "between", "first.optimizer", "optimizer")
"""Chunks outside the passes of a step."""
_CAPTURED = ("forward", "backward", "checkpoint", "library")
"""Callers whose kernels and transfers are a block's own; what a framework's hooks issue stays outside its graph."""


def graphed(programs: Sequence[Program], *, whole: bool) -> list[Program]:
    """Return the programs with each block's passes in graphs, or ``whole`` passes of a step; equal chunks stay one."""
    known: dict[int, tuple[Chunk, Chunk]] = {}
    nodes: dict[int, tuple[Instruction, Instruction]] = {}

    def of(name: str, chunk: Chunk) -> Chunk:
        if name in NOT_CAPTURED:
            return chunk
        if id(chunk) not in known:
            known[id(chunk)] = (chunk, _whole(chunk, nodes) if whole else _blocks(chunk, nodes))
        return known[id(chunk)][1]

    return [replace(p, chunks={name: of(name, chunk) for name, chunk in p.chunks.items()}) for p in programs]


def _node(step: Instruction, nodes: dict[int, tuple[Instruction, Instruction]]) -> Instruction:
    """Return a kernel or transfer as a graph's node: one object for each object."""
    assert isinstance(step, Compute | Collective | Send | Recv | Copy), step
    found = nodes.get(id(step))
    if found is None:
        found = nodes[id(step)] = (step, replace(step, caller="graph"))
    return found[1]


def _whole(chunk: Chunk, nodes: dict[int, tuple[Instruction, Instruction]]) -> Chunk:
    return tuple(
        _node(step, nodes) if isinstance(step, Compute | Collective | Send | Recv | Copy) else step
        for step in chunk
        if not isinstance(step, HostWait)
    )


def _blocks(chunk: Chunk, nodes: dict[int, tuple[Instruction, Instruction]]) -> Chunk:
    """Return a chunk with what stands under each block's mark in a graph, its first kernel being the replay."""
    found: list[Instruction] = []
    within = replays = False
    for step in chunk:
        if isinstance(step, Mark):
            within = step.module.startswith("block.")
            replays = within
        elif within and isinstance(step, Compute | Collective | Send | Recv) and step.caller in _CAPTURED:
            if replays and isinstance(step, Compute):
                replays = False
            else:
                found.append(_node(step, nodes))
                continue
        found.append(step)
    return tuple(found)
