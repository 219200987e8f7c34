"""Folding changes nothing: not the partition that naive refinement finds, and not when anything happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sim.catalog import load
from sim.cluster.symmetry import places_of
from sim.cluster.topology import Cluster, build_cluster
from sim.cost.model import CostModel, CostSettings
from sim.engine.run import run
from sim.errors import ContentionError
from sim.ir.ledger import Dim, Pointwise, Tensor
from sim.ir.program import (
    Call,
    Collective,
    CollectiveKind,
    Compute,
    Instruction,
    Program,
    Record,
    Recv,
    Send,
    Wait,
    World,
)
from sim.ir.timeline import Timeline
from sim.parallel.alike import alike
from sim.parallel.fold import fold, refold
from sim.parallel.mesh import Mesh, mesh_of
from sim.parallel.schedule import SCHEDULES
from sim.pipeline import simulate
from sim.report.report import Report
from sim.scenario.load import load_scenario, load_scenario_text
from sim.scenario.schema import ClusterSpec

sizes = st.sampled_from((1, 2, 3, 4))


def naive(mesh: Mesh, colours: Sequence[Hashable], pairs: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Refine by the definition, rank by rank."""
    of: list[Hashable] = list(colours)
    while True:
        keys: list[Hashable] = []
        for rank in range(mesh.world_size):
            around: list[Hashable] = [of[rank]]
            for axis in ("tp", "dp"):
                group = next(group for group in mesh.groups(axis) if rank in group)
                around.append(frozenset(Counter(of[other] for other in group).items()))
            around.append(frozenset(of[b] for a, b in pairs if a == rank))
            around.append(frozenset(of[a] for a, b in pairs if b == rank))
            keys.append(tuple(around))
        if len(set(keys)) == len(set(of)):
            break
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        of = [number[key] for key in keys]
    classes: dict[Hashable, list[int]] = {}
    for rank, key in enumerate(of):
        classes.setdefault(key, []).append(rank)
    return sorted(tuple(ranks) for ranks in classes.values())


def next_stage(mesh: Mesh) -> list[tuple[int, int]]:
    stride = mesh.world_size // mesh.sizes[-1][1]
    return [(rank, rank + stride) for rank in range(mesh.world_size - stride)]


@settings(deadline=None, max_examples=100)
@given(sizes, sizes, sizes, st.data())
def test_classes_are_those_of_naive_refinement(tp: int, dp: int, pp: int, data: st.DataObject) -> None:
    mesh = mesh_of({"tp": tp, "dp": dp, "pp": pp})
    odd = data.draw(st.lists(st.integers(0, mesh.world_size - 1), max_size=2))
    colours = [(mesh.coordinates(rank)["pp"] // 2, rank in odd) for rank in range(mesh.world_size)]
    pairs = next_stage(mesh)
    folding = fold(mesh, colours, axes=("tp", "dp"), pairs={"forward": pairs})
    assert sorted(folding.classes) == naive(mesh, colours, pairs)
    assert [ranks[0] for ranks in folding.classes] == sorted(ranks[0] for ranks in folding.classes)


@settings(deadline=None, max_examples=50)
@given(sizes, sizes, sizes, st.integers(0, 63))
def test_every_group_is_in_one_communicator_of_its_classes(tp: int, dp: int, pp: int, odd: int) -> None:
    mesh = mesh_of({"tp": tp, "dp": dp, "pp": pp})
    folding = fold(mesh, [rank == odd for rank in range(mesh.world_size)], axes=("tp", "dp"))
    class_of = {rank: i for i, ranks in enumerate(folding.classes) for rank in ranks}
    for axis in ("tp", "dp"):
        named = [c for c in folding.communicators.values() if c.axis == axis]
        assert sorted(group for c in named for group in c.groups) == sorted(mesh.groups(axis))
        for communicator in named:
            for group in communicator.groups:
                assert {class_of[rank] for rank in group} == set(communicator.classes)
                assert all(folding.axes[class_of[rank]][axis] == communicator.name for rank in group)


# --- folded and unfolded worlds ---------------------------------------------------------------------


def machine(node: str, num_nodes: int, gpus: int, network: str) -> Cluster:
    facts = load.node(node)
    spec = ClusterSpec(
        node=facts,
        gpu=load.gpu(facts.gpu),
        network=load.network(network) if num_nodes > 1 else None,
        num_nodes=num_nodes,
        num_gpus=gpus,
    )
    return build_cluster(spec)


def kernel(mebibytes: int) -> Compute:
    return Compute("op", Pointwise("elementwise", (Tensor("x", (Dim("seq", mebibytes * 2**20),), "uint8"),), ()))


class Job(NamedTuple):
    """A small job on a small machine. ``broken``: a link, as a part of all; -1: none. ``slow``: a rank; -1: none."""

    node: str
    num_nodes: int
    world_size: int
    tp: int
    pp: int
    kind: CollectiveKind
    overlaps: bool
    tensor_bytes: int
    slow: int
    broken: float


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    num_nodes = draw(st.integers(1, 4))
    world_size = 8 * num_nodes if num_nodes > 1 else draw(st.sampled_from((2, 4, 6, 8)))
    tp = draw(st.sampled_from([d for d in (1, 2, 3, 4, 8) if world_size % d == 0]))
    return Job(
        draw(st.sampled_from(("dgx-h100", "dgx-a100", "pcie-8x-4090", "dgx-1"))),
        num_nodes,
        world_size,
        tp,
        draw(st.sampled_from([d for d in (1, 2, 3, 4) if world_size // tp % d == 0])),
        draw(st.sampled_from(("all_reduce", "all_gather", "reduce_scatter", "all_to_all"))),
        draw(st.booleans()),
        draw(st.sampled_from((1000, 2**20, 30 * 2**20))),
        draw(st.one_of(st.just(-1), st.integers(0, world_size - 1))),
        draw(st.one_of(st.just(-1.0), st.floats(0, 0.999))),
    )


def build(job: Job) -> tuple[World, Cluster, dict[int, float]]:
    """Return a world of three layers a stage, two microbatches, its machine, and what is slow."""
    cluster = machine(job.node, job.num_nodes, job.world_size, "ib-ndr-400-4")
    mesh = mesh_of({"tp": job.tp, "dp": job.world_size // job.tp // job.pp, "pp": job.pp})
    stages = [mesh.coordinates(rank)["pp"] for rank in range(job.world_size)]
    folding = fold(mesh, stages, axes=("tp", "dp"), pairs={"forward": next_stage(mesh)})
    programs = []
    for ranks, axes in zip(folding.classes, folding.axes, strict=True):
        stage = stages[ranks[0]]
        step: list[Instruction] = []
        if stage > 0:
            step += [Recv("recv", "forward.recv", 2**22, "recv"), Record("got", "recv"), Wait("got", "compute")]
        for layer in range(3):
            on = "tp" if job.overlaps else "compute"
            step += [kernel(64), Record("in", "compute"), Wait("in", on)]
            step.append(Collective("tp", job.kind, "tp", job.tensor_bytes, "bf16", on))
            step += [Record("out", on), Wait("out", "compute"), kernel(16 + stage), Record("grad", "compute")]
            step += [Wait("grad", "dp"), Collective(f"dp{layer}", "all_reduce", "dp", 2**23, "bf16", "dp")]
        if stage < job.pp - 1:
            step += [Record("made", "compute"), Wait("made", "send"), Send("send", "forward.send", 2**22, "send")]
        calls = (Call("pass"), Call("pass", 1))
        programs.append(Program(ranks, stage, {"pass": tuple(step)}, (), calls, calls, axes))
    if job.broken >= 0:
        cluster = replace(cluster, degraded={int(job.broken * cluster.num_links): 0.5}, memo={}, _routes={})
    return World(job.world_size, tuple(programs), folding.communicators), cluster, {job.slow: 1.25}


def happened(world: World, timeline: Timeline) -> dict[int, list[tuple[object, ...]]]:
    """Return for every rank what its class did and when."""
    found: dict[int, list[tuple[object, ...]]] = {}
    for program in world.programs:
        spans: list[tuple[object, ...]] = []
        for s in timeline.of(program.rank):
            t = s.transfer
            moved = (
                None if t is None else (t.kind, t.axis, t.num_ranks, t.tensor_bytes, t.wire_bytes, t.algorithm, t.start)
            )
            spans.append((s.stream, s.position, s.start, s.end, s.kernels, moved))
        for rank in program.ranks:
            found[rank] = spans
    return found


def difference(job: Job) -> tuple[object, ...]:
    """Return the first thing that happens otherwise unfolded: (rank, folded, unfolded); empty if nothing does."""
    world, cluster, slow = build(job)
    places = places_of(cluster, num_ranks=world.world_size)
    settings = CostSettings(slow=slow)

    def same(found: World) -> list[int]:
        cost = CostModel(cluster, cluster.spec.gpu, settings)
        return alike(found, cost.traffic, cost.links)

    told = []
    for folded in (True, False):
        own = refold(world, speeds=slow if job.slow >= 0 else {}, places=places, folded=folded, alike=same)
        cost = CostModel(cluster, cluster.spec.gpu, settings)
        told.append(happened(own, run(own, cost)))
    for rank in range(world.world_size):
        for ours, theirs in zip(told[0][rank], told[1][rank], strict=True):
            if ours != theirs:
                return rank, ours, theirs
    return ()


@settings(deadline=None, max_examples=60)
@given(jobs())
def test_folded_is_unfolded(job: Job) -> None:
    assert difference(job) == ()


LAYOUTS = (
    ("framework=ddp",),
    ("framework=deepspeed", "parallelism={zero: 2}"),
    ("framework=deepspeed", "parallelism={zero: 3}", "cluster.num_nodes=2", "cluster.num_gpus=16"),
    ("framework=megatron", "parallelism={tp: 2, pp: 2}"),
    ("framework=megatron", "parallelism={tp: 2, pp: 2}", "megatron.scatter_gather_tensors_in_pipeline=true"),
    ("framework=megatron", "parallelism={tp: 4, sp: true}", "megatron.tp_comm_overlap=true"),
    ("framework=fsdp2", "parallelism={tp: 2, sp: true}", "training.compile=true", "fsdp2.async_tensor_parallel=true"),
    ("framework=megatron", "parallelism={tp: 2, pp: 2}", "megatron.cuda_graph_impl=local", "training.recompute=none"),
    (
        "framework=megatron",
        "parallelism={zero: 1, pp: 2}",
        "megatron={cuda_graph_impl: local, cuda_graph_scope: full_iteration, check_for_nan_in_grad: false}",
    ),
    (
        "framework=deepspeed",
        "parallelism={tp: 2, pp: 2}",
        *("training.code=huggingface", "training.attention=math", "training.softmax=fused", "model.fused_qkv=true"),
    ),
    (
        "framework=fsdp2",
        *("training.precision=fp8", "training.compile=true", "fsdp2.float8_recipe=rowwise"),
    ),
)
FAULTS = ("{}", "{slow: [{rank: 5, factor: 0.8}]}", "{links: [{between: [node0.gpu1, node0.nvswitch0], factor: 0.5}]}")


def answer(report: Report) -> tuple[object, ...]:
    """What a report says, rank by rank."""
    held = {
        rank: (f.stage, f.peak_allocated_bytes, f.peak_reserved_bytes, f.peak_device_bytes, f.at_peak, f.out_of_memory)
        for f in report.footprints
        for rank in f.ranks
    }
    return (
        held,
        report.time_ticks,
        report.step_ticks,
        report.communication,
        report.executed_flops,
        report.pipeline,
        report.warnings,
    )


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_folded_and_unfolded_reports_are_the_same(layout: tuple[str, ...], faults: str) -> None:
    small = "model={config: llama-2-7b, num_hidden_layers: 2, vocab_size: 512}"
    scenario = load_scenario("scenarios/7b_ddp.yaml", [small, *layout, f"faults={faults}"])
    folded, unfolded = (simulate(scenario, fold=fold) for fold in (True, False))
    assert len(unfolded.world.programs) == scenario.parallelism.world_size
    assert answer(folded.report) == answer(unfolded.report)


# --- what all stages do together, once a step --------------------------------------------------------

PIPELINE = (
    "framework=megatron",
    "parallelism={tp: 8, pp: 2, sp: true}",
    "cluster.num_nodes=2",
    "cluster.num_gpus=16",
    "training.global_batch_size=4",
    "training.micro_batch_size=1",
    "model={config: llama-2-7b, num_hidden_layers: 2, vocab_size: 512}",
)


def test_ranks_of_a_stage_are_one_class_and_unfolded_is_the_same() -> None:
    scenario = load_scenario("scenarios/7b_ddp.yaml", list(PIPELINE))
    folded, unfolded = (simulate(scenario, fold=fold) for fold in (True, False))
    assert [program.ranks for program in folded.world.programs] == [tuple(range(8)), tuple(range(8, 16))]
    assert len(unfolded.world.programs) == 16
    assert answer(folded.report) == answer(unfolded.report)


def together(overlaps: bool) -> tuple[World, Cluster]:
    """Return two stages on two nodes that sum over all ranks once; messages between the stages flow meanwhile or not.

    The rings of the sum load the links of some GPUs more than those of others.
    """
    cluster = machine("dgx-a100-80gb", 2, 16, "ib-ndr-400-4")
    mesh = mesh_of({"tp": 8, "pp": 2})
    pairs = next_stage(mesh)
    groups = {"tp": mesh.groups("tp"), "all": (tuple(range(16)),)}
    folding = fold(_Mesh(16, groups), [rank // 8 for rank in range(16)], axes=("tp", "all"), pairs={"forward": pairs})
    send: list[Instruction] = [Send("send", "forward.send", 2**28, "send")]
    receive: list[Instruction] = [Recv("recv", "forward.recv", 2**28, "recv")]
    own: list[Instruction] = [kernel(64), Collective("tp", "all_reduce", "tp", 2**24, "bf16", "compute")]
    whole: list[Instruction] = [Collective("all", "all_reduce", "all", 2**26, "bf16", "all")]
    programs = []
    for stage, (ranks, axes) in enumerate(zip(folding.classes, folding.axes, strict=True)):
        message, stream = (receive, "recv") if stage else (send, "send")
        done: list[Instruction] = [] if overlaps else [Record("done", stream), Wait("done", "all")]
        chunks = {"pass": tuple(own), "end": (*message, *done, *whole)}
        calls = (Call("pass"), Call("pass", 1), Call("end"))
        if not overlaps:
            chunks["end"] = (*message, *done, Record("summed", "compute"), Wait("summed", "all"), *whole)
        programs.append(Program(ranks, stage, chunks, (), calls, calls, axes))
    return World(16, tuple(programs), folding.communicators), cluster


class _Mesh(NamedTuple):
    world_size: int
    of_axis: dict[str, Sequence[tuple[int, ...]]]

    def groups(self, axis: str) -> Sequence[tuple[int, ...]]:
        return self.of_axis[axis]


@pytest.mark.parametrize("overlaps", [False, True])
def test_trust_folds_more_and_is_found_out_where_it_is_misplaced(overlaps: bool) -> None:
    world, cluster = together(overlaps)
    places = places_of(cluster, num_ranks=16)
    trusted = refold(world, speeds={}, places=places, trusting=True)
    assert len(trusted.programs) == 2
    assert len(refold(world, speeds={}, places=places).programs) == 16
    if overlaps:
        with pytest.raises(ContentionError):
            run(trusted, CostModel(cluster, cluster.spec.gpu))
        return
    unfolded = refold(world, speeds={}, places=places, folded=False)
    told = [happened(w, run(w, CostModel(cluster, cluster.spec.gpu))) for w in (trusted, unfolded)]
    assert told[0] == told[1]


def test_misplaced_trust_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = load_scenario("scenarios/7b_ddp.yaml", list(PIPELINE))
    trusted = simulate(scenario)

    def betrayed(world: World, cost: CostModel) -> Timeline:
        timeline = run(world, cost)
        if any(communicator.lone for communicator in world.communicators.values()):
            raise ContentionError("as if")
        return timeline

    monkeypatch.setattr("sim.pipeline.run", betrayed)
    careful = simulate(scenario)
    assert any(communicator.lone for communicator in trusted.world.communicators.values())
    assert not any(communicator.lone for communicator in careful.world.communicators.values())
    assert answer(careful.report) == answer(trusted.report)


# --- whole answers, over all layouts -----------------------------------------------------------------


EVERY = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-2p", "zb-v", "v-half", "v-min", "dualpipev", "dualpipe")
ZERO = {"ddp": (0,), "fsdp1": (2, 3), "fsdp2": (2, 3), "megatron": (0, 1, 2, 3), "deepspeed": (0, 1, 2, 3)}
STATES = ("fp32", "bf16", "fp8")


@st.composite
def layouts(draw: st.DrawFn) -> str:
    """Draw a question on up to 32 GPUs: every framework, its axes and schedules, uneven stages, faults."""
    framework = draw(st.sampled_from(["ddp", "fsdp1", "fsdp2", "deepspeed", "megatron", "megatron", "fsdp2"]))
    num_nodes = draw(st.sampled_from([1, 1, 2, 4]))
    num_gpus = 8 * num_nodes
    model_axes = framework in ("megatron", "fsdp2")
    tp = draw(st.sampled_from([1, 2, 4])) if model_axes else 1
    cp = draw(st.sampled_from([1, 1, 2, min(4, 8 // tp)])) if model_axes or framework == "deepspeed" else 1
    pp = draw(st.sampled_from([1, 2, 4])) if model_axes or framework == "deepspeed" else 1
    pp = min(pp, num_gpus // (tp * cp))
    dp = num_gpus // (tp * cp * pp)
    schedule, vpp = "1f1b", 1
    if pp > 1 and framework != "deepspeed":
        schedule = draw(st.sampled_from([s for s in EVERY if s != "dualpipe" or framework == "megatron"]))
        vpp = 2 if schedule == "interleaved" else 1
    stages = pp * (1 if schedule == "dualpipe" else SCHEDULES[schedule].num_chunks or vpp)
    layers = [draw(st.integers(1, 2)) for _ in range(stages)]
    parallelism: dict[str, object] = {
        "tp": tp, "cp": cp, "pp": pp, "schedule": schedule, "vpp": vpp, "sp": tp > 1 and draw(st.booleans()),
    }  # fmt: skip
    if pp > 1:
        parallelism["layers_per_stage"] = layers
    stages_of_zero = [z for z in ZERO[framework] if z < 2 or pp == 1 or framework.startswith("fsdp")]
    zero = parallelism["zero"] = draw(st.sampled_from(stages_of_zero))
    precision, own = "bf16", dict[str, object]()
    if framework == "megatron":
        precision = draw(st.sampled_from(["bf16", "bf16", "fp8"]))
        own["fp8_param_gather"] = zero > 0 and precision == "fp8" and draw(st.booleans())
        own["use_precision_aware_optimizer"] = zero > 0 and draw(st.booleans())
        if own["use_precision_aware_optimizer"]:
            own["exp_avg_dtype"] = draw(st.sampled_from(STATES))
        if zero > 1:
            own["suggested_communication_unit_size"] = draw(st.sampled_from([1, 300_000, 10**9]))
    if cp > 1:
        exchanges = ["a2a"] if framework == "deepspeed" else ["p2p", "all_gather", "a2a"]
        parallelism["cp_comm"] = draw(st.sampled_from(exchanges))
    faults: dict[str, object] = {}
    if draw(st.booleans()):
        faults["slow"] = [{"rank": draw(st.integers(0, num_gpus - 1)), "factor": 0.8}]
    if draw(st.booleans()):
        faults["links"] = [{"between": ["node0.gpu1", "node0.nvswitch0"], "factor": 0.5}]
    microbatches = draw(st.sampled_from([2 * pp, 4 * pp]))
    asked = {
        "model": {
            "num_hidden_layers": sum(layers) if pp > 1 else 2, "hidden_size": 128, "intermediate_size": 256,
            "num_attention_heads": 8, "vocab_size": 512,
            "tie_word_embeddings": framework != "fsdp2" and draw(st.booleans()),
        },
        "cluster": {"node": "dgx-h100", **({"num_nodes": num_nodes} if num_nodes > 1 else {})},
        "framework": framework,
        "parallelism": parallelism,
        "training": {
            "sequence_length": 64, "micro_batch_size": 1, "global_batch_size": dp * microbatches,
            "precision": precision, "attention": "flash-2", "code": "torch" if framework == "fsdp2" else "megatron",
            "gradient_clipping": draw(st.sampled_from([0.0, 1.0])),
        },
        "faults": faults,
        **({framework: own} if own else {}),
    }  # fmt: skip
    return yaml.safe_dump(asked)


@settings(deadline=None, max_examples=12)
@given(layouts())
def test_folded_and_unfolded_reports_are_the_same_on_every_layout(text: str) -> None:
    scenario = load_scenario_text(text, "layout.yaml")
    folded, unfolded = (simulate(scenario, fold=fold) for fold in (True, False))
    assert len(unfolded.world.programs) == scenario.parallelism.world_size
    assert answer(folded.report) == answer(unfolded.report)


# --- copies to the host: they share switches, sockets and memory with those of other ranks ------------

SOCKETS = ("dgx-h100", "dgx-a100-80gb", "pcie-8x-4090", "pcie-8x-a100-80gb-switch", "pcie-8x-rtx-pro-6000-pairs")


def offloaded(
    node: str,
    num_nodes: int,
    per_node: int,
    tp: int,
    pp: int,
    framework: str,
    own: Mapping[str, object],
    slow: int = -1,
) -> str:
    """Return a question on some GPUs of each node, with the framework's ``own`` settings; ``slow``: a rank, -1: none.

    All that ``tp`` divides is a multiple of 12.
    """
    num_gpus = num_nodes * per_node
    config = own.get("zero_optimization", {})
    zero = config.get("stage", 0) if isinstance(config, dict) else 0
    network = {"network": "ib-ndr-400-4"} if num_nodes > 1 else {}
    asked = {
        "model": {
            "num_hidden_layers": 2 * pp, "hidden_size": 240, "intermediate_size": 480, "num_attention_heads": 12,
            "vocab_size": 480, "tie_word_embeddings": False,
        },
        "cluster": {"node": node, "num_nodes": num_nodes, "num_gpus": num_gpus, **network},
        "framework": framework,
        "parallelism": {"tp": tp, "pp": pp, **({"zero": zero} if framework == "deepspeed" else {})},
        "training": {
            "sequence_length": 96, "micro_batch_size": 1, "global_batch_size": 2 * pp * num_gpus // (tp * pp),
            "precision": "bf16", "attention": "flash-2", "code": "torch" if framework == "fsdp2" else "megatron",
            "gradient_clipping": 1.0,
        },
        "faults": {"slow": [{"rank": slow, "factor": 0.8}]} if slow >= 0 else {},
        framework: own,
    }  # fmt: skip
    return yaml.safe_dump(asked)


@st.composite
def offloads(draw: st.DrawFn) -> str:
    """Draw what may be kept on the host, by every framework, on nodes of several sockets that jobs use in part."""
    framework = draw(st.sampled_from(["deepspeed", "deepspeed", "fsdp1", "fsdp2", "megatron"]))
    num_nodes = draw(st.sampled_from([1, 1, 2, 3]))
    per_node = draw(st.sampled_from([2, 3, 4, 5, 6, 8]))
    num_gpus = num_nodes * per_node
    by_tensor = framework in ("fsdp2", "megatron")
    tp = draw(st.sampled_from([d for d in (1, 2, 3, 4) if num_gpus % d == 0])) if by_tensor else 1
    stages = [d for d in (1, 2, 3) if num_gpus // tp % d == 0]
    own: dict[str, object] = {}
    pp = 1
    if framework == "deepspeed":
        stage = draw(st.sampled_from([1, 2, 3]))
        pp = draw(st.sampled_from(stages)) if stage == 1 else 1
        zero: dict[str, object] = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        if stage == 3 and draw(st.booleans()):
            zero["offload_param"] = {"device": "cpu"}
        zero["overlap_comm"] = draw(st.booleans())
        zero["sub_group_size"] = draw(st.sampled_from([100_000, 10**9]))
        own = {"bf16": {"enabled": True}, "zero_optimization": zero}
    elif framework == "megatron":
        own = {"cpu_offloading_num_layers": 1}
    else:
        pp = draw(st.sampled_from(stages)) if framework == "fsdp2" else 1
        own = {"cpu_offload": draw(st.booleans())}
    slow = draw(st.one_of(st.just(-1), st.just(-1), st.integers(0, num_gpus - 1)))
    return offloaded(draw(st.sampled_from(SOCKETS)), num_nodes, per_node, tp, pp, framework, own, slow)


@settings(deadline=None, max_examples=15)
@given(offloads())
@example(offloaded("pcie-8x-a100-80gb-switch", 1, 6, 3, 1, "fsdp2", {"cpu_offload": True}))
@example(offloaded("pcie-8x-4090", 1, 6, 3, 1, "fsdp2", {"cpu_offload": False}))
@example(offloaded("dgx-a100-80gb", 1, 8, 1, 1, "fsdp1", {"cpu_offload": True}))
def test_folded_and_unfolded_reports_are_the_same_where_the_host_takes_part(text: str) -> None:
    scenario = load_scenario_text(text, "offloaded.yaml")
    folded, unfolded = (simulate(scenario, fold=fold) for fold in (True, False))
    assert len(unfolded.world.programs) == scenario.parallelism.world_size
    assert answer(folded.report) == answer(unfolded.report)
