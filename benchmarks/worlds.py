"""Synthetic worlds of the size of real jobs: tensor groups inside nodes, a pipeline, data-parallel replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sim.cluster.symmetry import places_of
from sim.cluster.topology import Cluster
from sim.ir.ledger import Attention, Dim, Gemm, Kernel, Pointwise, Tensor
from sim.ir.program import (
    COMPUTE,
    Call,
    Chunk,
    Collective,
    Compute,
    HostWait,
    Instruction,
    Mark,
    Program,
    Record,
    Recv,
    Send,
    Wait,
    World,
)
from sim.parallel.fold import fold
from sim.parallel.mesh import mesh_of
from sim.parallel.schedule import SCHEDULES


@dataclass(frozen=True, slots=True)
class Job:
    """A Megatron-like job. ``waits``: the host waits for the GPU after each exchange between stages."""

    tp: int
    pp: int
    dp: int
    vpp: int
    num_layers: int
    num_microbatches: int
    hidden: int
    width: int
    sequence: int
    schedule: str
    waits: bool

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp * self.dp


LLAMA_405B = Job(8, 16, 128, 4, 128, 16, 16384, 53248, 8192, "interleaved", False)
ONE_TRILLION = Job(8, 64, 6, 1, 128, 512, 25600, 102400, 2048, "1f1b", True)


def _layer(job: Job, backward: bool) -> list[Kernel | tuple[str, int]]:
    """Return the kernels of a layer, and its collectives on the tensor axis as (kind, bytes)."""
    seq, hidden = (Dim("seq", job.sequence),), (Dim("hidden", job.hidden),)
    split, width = (Dim("heads", job.hidden // job.tp),), (Dim("ffn", job.width // job.tp),)
    whole = job.sequence * job.hidden * 2
    part = Tensor("x", (Dim("seq", job.sequence // job.tp), *hidden), "bf16")
    inside = Tensor("h", (*seq, *width), "bf16")
    head = (Dim("head_dim", 128),)
    heads = (Dim("heads", job.hidden // 128 // job.tp),)
    norm = Pointwise("norm", (part,), (part,))
    add = Pointwise("elementwise", (part, part), (part,))
    act = Pointwise("elementwise", (inside,), (inside,))
    attention = Attention(
        "flash-2", "backward" if backward else "forward", (), heads, heads, seq, seq, head, True, "bf16"
    )
    gather, scatter = ("all_gather", whole), ("reduce_scatter", whole)
    if not backward:
        qkv, out = Gemm(seq, split, hidden, "bf16"), Gemm(seq, hidden, split, "bf16")
        up, down = Gemm(seq, width, hidden, "bf16"), Gemm(seq, hidden, width, "bf16")
        return [
            norm,
            gather,
            qkv,
            qkv,
            qkv,
            act,
            attention,
            out,
            scatter,
            add,
            norm,
            gather,
            up,
            act,
            down,
            scatter,
            add,
        ]
    products: list[list[Kernel | tuple[str, int]]] = [
        [Gemm(seq, wide, hidden, "bf16"), Gemm(wide, hidden, seq, "bf16"), gather]
        for wide in (width, width, split, split)
    ]
    return [
        add, gather, *products[0], act, *products[1], scatter, norm, add, gather, *products[2], attention, act,
        *products[3][:2], *products[3][:2], scatter, norm,
    ]  # fmt: skip


def _pass(job: Job, layers: int, backward: bool, receives: bool, sends: bool) -> Chunk:
    """Return the instructions of one pass through ``layers`` layers, with its messages."""
    way: Literal["forward", "backward"] = "backward" if backward else "forward"
    message = job.sequence * job.hidden * 2 // job.tp
    found: list[Instruction] = [Mark(way, "exchange")]
    if receives:
        found += [
            Record("ready", COMPUTE), Wait("ready", "recv"), Recv("recv", f"{way}.recv", message, "recv"),
            Record("received", "recv"), Wait("received", COMPUTE),
        ]  # fmt: skip
        if job.waits:
            found.append(HostWait("received"))
    steps: list[Instruction] = []
    for step in _layer(job, backward):
        if isinstance(step, tuple):
            kind, size = step
            steps += [
                Record("in", COMPUTE), Wait("in", "tp"), Collective(kind, kind, "tp", size, "bf16", "tp"),  # type: ignore[arg-type]
                Record("out", "tp"), Wait("out", COMPUTE),
            ]  # fmt: skip
        else:
            steps.append(Compute(type(step).__name__.lower(), step))
    for layer in range(layers):
        found += [Mark(way, f"layer.{layer}"), *steps]
    if sends:
        found += [Record("made", COMPUTE), Wait("made", "send"), Send("send", f"{way}.send", message, "send")]
    return tuple(found)


def _optimizer(job: Job) -> Chunk:
    size = job.num_layers // job.pp * (4 * job.hidden**2 + 2 * job.hidden * job.width) // job.tp * 2
    found: list[Instruction] = [Mark("optimizer", "gradients"), Record("done", COMPUTE), Wait("done", "dp")]
    for kind in ("reduce_scatter", "all_gather"):
        found += [Collective(f"{kind}.{bucket}", kind, "dp", size // 4, "bf16", "dp") for bucket in range(4)]
    return tuple(found)


def build(job: Job, cluster: Cluster) -> World:
    """Return the world of a job: programs by stage, folded."""
    mesh = mesh_of({"tp": job.tp, "dp": job.dp, "pp": job.pp})
    stride = job.tp * job.dp
    stages = [rank // stride for rank in range(job.num_gpus)]
    ring = [(rank, (rank + stride) % job.num_gpus) for rank in range(job.num_gpus - (0 if job.vpp > 1 else stride))]
    folding = fold(
        mesh,
        stages,
        axes=("tp", "dp"),
        pairs={"forward": ring, "backward": [(b, a) for a, b in ring]},
        places=places_of(cluster),
    )
    orders = SCHEDULES[job.schedule].orders(job.pp, job.num_microbatches, job.vpp)
    layers = job.num_layers // job.pp // job.vpp
    last = job.pp * job.vpp - 1
    shared: dict[tuple[bool, bool, bool], Chunk] = {}
    programs = []
    for ranks, axes in zip(folding.classes, folding.axes, strict=True):
        stage = stages[ranks[0]]
        chunks: dict[str, Chunk] = {"optimizer": _optimizer(job)}
        calls = []
        for pass_ in orders[stage]:
            place = pass_.chunk * job.pp + stage
            backward = pass_.kind == "backward"
            key = (backward, place != (last if backward else 0), place != (0 if backward else last))
            name = f"{pass_.kind}.{pass_.chunk}"
            if name not in chunks:
                chunks[name] = shared.setdefault(key, _pass(job, layers, *key))
            calls.append(Call(name, pass_.microbatch))
        calls.append(Call("optimizer"))
        programs.append(Program(ranks, stage, chunks, (), tuple(calls), tuple(calls), axes))
    return World(job.num_gpus, tuple(programs), folding.communicators)
