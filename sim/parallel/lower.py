"""From the ledger to the programs of all ranks: one Program for each class of identical ranks.

The model is sharded over tensor- and context-parallel ranks, its layers are spread over pipeline stages, and each
pipeline rank's passes are written once for each role of a microbatch; the schedule says in which order they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from sim.cluster.symmetry import Places
from sim.ir.ledger import DType, Layer, Ledger
from sim.ir.program import Alloc, Call, Chunk, Collective, Free, Instruction, Mark, Program, Storage, World
from sim.parallel.cublas import workspaces
from sim.parallel.emit import NO_RECOMPUTE, Emitter, Hooks
from sim.parallel.frameworks.plan import Plan
from sim.parallel.mesh import ORDERS, Mesh, across, mesh_of, mirrored, within
from sim.parallel.pipelining import (
    DEEPSPEED,
    MEGATRON,
    MEGATRON_INTERLEAVED,
    MEGATRON_ORDERED,
    MEGATRON_OVERLAP,
    TORCH,
    Exchange,
    Messages,
    aligned_fetches,
    fetches,
    pair_axes,
    roles,
)
from sim.parallel.precision import recipe_of, recompute_of, transformed
from sim.parallel.schedule import LOOPED, SCHEDULES, V_SHAPED, Order, Pass, Placement, one_f_one_b
from sim.parallel.stages import Stage, split
from sim.scenario.schema import Scenario

if TYPE_CHECKING:
    from sim.parallel.frameworks.deepspeed_base import Stage0
    from sim.parallel.frameworks.deepspeed_stage3 import Stage3
    from sim.parallel.frameworks.deepspeed_stage12 import Stage12
    from sim.parallel.offload import Elsewhere


class Framework(Hooks, Protocol):
    """A framework's part in the program of a rank with one stage: what it allocates, hooks into, and how it steps.

    ``passes_differ``: the passes of the first step are not like the later ones (DDP's buckets).
    """

    passes_differ: bool

    def setup(self) -> Chunk:
        """What it holds before the first step."""
        ...

    def begin_microbatch(self, first: bool, last: bool) -> None:
        """Say which microbatch of a step is written next."""
        ...

    def optimizer_step(self, first_step: bool) -> Chunk:
        """From the end of the last backward to the start of the next forward.

        Optimizers make their states in the first step. May be written for both after the same passes.
        """
        ...

    def after_first_step(self) -> Chunk:
        """What happens once, before the second step."""
        ...


class RankFramework(Protocol):
    """The same of a rank with several chunks of the model."""

    passes_differ: bool

    def setup(self) -> Chunk: ...

    def hooks(self, chunk: int) -> Hooks: ...

    def begin_microbatch(self, chunk: int, first: bool, last: bool) -> None: ...

    def start_reductions(self, chunk: int) -> Chunk:
        """What is to start once a chunk's gradients are complete, where the schedule says when. May be empty."""
        ...

    def gather_ahead(self, chunk: int) -> Chunk:
        """What is to start some chunks before this one's first pass. May be empty."""
        ...

    def optimizer_step(self, first_step: bool) -> Chunk: ...

    def after_first_step(self) -> Chunk: ...


@runtime_checkable
class Loads(Protocol):
    """A framework whose host waits for the GPU before each forward."""

    def load(self) -> Iterable[Instruction]: ...


@runtime_checkable
class HoldsBatch(Protocol):
    """A framework that holds tensors of a batch, which no layer reads, while a forward runs."""

    def through_forward(self) -> tuple[Storage, ...]: ...


@runtime_checkable
class GathersAhead(Protocol):
    """A framework whose parameters the pipeline's schedule may ask for before their stage's turn."""

    def gather_ahead(self) -> Iterable[Instruction]: ...


class OfChunks:
    """Frameworks that know of one model, one for each chunk of the rank."""

    def __init__(self, frameworks: Sequence[Framework]) -> None:
        self.frameworks = frameworks
        self.passes_differ = frameworks[0].passes_differ

    def hooks(self, chunk: int) -> Hooks:
        return self.frameworks[chunk]

    def begin_microbatch(self, chunk: int, first: bool, last: bool) -> None:
        self.frameworks[chunk].begin_microbatch(first=first, last=last)

    def start_reductions(self, chunk: int) -> Chunk:
        return ()

    def gather_ahead(self, chunk: int) -> Chunk:
        framework = self.frameworks[chunk]
        return tuple(framework.gather_ahead()) if isinstance(framework, GathersAhead) else ()

    def setup(self) -> Chunk:
        return self._joined(f.setup() for f in self.frameworks)

    def optimizer_step(self, first_step: bool) -> Chunk:
        return self._joined(f.optimizer_step(first_step) for f in self.frameworks)

    def after_first_step(self) -> Chunk:
        return self._joined(f.after_first_step() for f in self.frameworks)

    def _joined(self, chunks: Iterable[Chunk]) -> Chunk:
        found = tuple(chunks)
        return found[0] if len(found) == 1 else tuple(instruction for chunk in found for instruction in chunk)


class _AfterSends:
    """Hooks of a stage whose end of backward comes after the gradient has been sent on, as a chunk of its own.

    DeepSpeed's pipeline engine reduces at the end of the batch (``ReduceGrads`` in deepspeed/runtime/pipe/schedule.py).
    """

    def __init__(self, hooks: Hooks) -> None:
        self.end: Chunk = ()
        self._hooks = hooks
        self.pre_forward = hooks.pre_forward
        self.post_forward = hooks.post_forward
        self.pre_backward = hooks.pre_backward
        self.post_backward = hooks.post_backward
        self.gradient_ready = hooks.gradient_ready

    def end_of_backward(self) -> Iterable[Instruction]:
        self.end = tuple(self._hooks.end_of_backward())
        return ()


@dataclass(frozen=True, slots=True)
class _Job:
    """What all pipeline ranks have in common. ``dp_axis`` is that of the ranks with the same parameters.

    ``copies`` of the model in a pipeline: where there are two, mirrored stages have the same parameters too.
    """

    scenario: Scenario
    ledger: Ledger
    mesh: Mesh
    placement: Placement
    orders: tuple[Order, ...]
    stages: tuple[Stage, ...]
    num_chunks: int
    messages: Messages
    dp_axis: str
    copies: int
    partial: Callable[[Layer], tuple[str, ...]]

    @property
    def dp(self) -> int:
        return self.mesh.size(self.dp_axis)


def lower(ledger: Ledger, scenario: Scenario, places: Places | None = None, *, folded: bool = True) -> World:
    """Return what each class of ranks does: setup, the first step and every later one.

    Ranks differ by pipeline rank; ``places`` may tell more of them apart. ``folded`` False keeps every rank.
    """
    job = _job(ledger, scenario)
    mesh, num_ranks = job.mesh, scenario.parallelism.pp
    from sim.parallel.fold import fold

    colours = [mesh.coordinates(rank)["pp"] for rank in range(mesh.world_size)]
    written = [_program(job, stage, num_ranks) for stage in range(num_ranks)]
    if scenario.framework == "megatron" and scenario.megatron.cuda_graph_impl != "none":
        from sim.parallel.graphs import graphed

        written = graphed(written, whole=scenario.megatron.cuda_graph_scope == "full_iteration")
    if scenario.training.launch_blocking:
        from sim.parallel.blocking import blocking

        written = blocking(written)
    folding = fold(
        mesh, colours, axes=_axes(written), pairs=_pairs(job), places=places, folded=folded, within=_within(job)
    )
    programs = tuple(
        replace(written[colours[ranks[0]]], ranks=ranks, axes=dict(axes))
        for ranks, axes in zip(folding.classes, folding.axes, strict=True)
    )
    return World(mesh.world_size, programs, folding.communicators)


def _axes(programs: Sequence[Program]) -> list[str]:
    """Return the axes on which the programs have collectives, in the order in which they come up."""
    chunks = {id(chunk): chunk for program in programs for chunk in program.chunks.values()}
    return list(dict.fromkeys(i.axis for chunk in chunks.values() for i in chunk if i.__class__ is Collective))


def _job(ledger: Ledger, scenario: Scenario) -> _Job:
    parallelism = scenario.parallelism
    partial: Callable[[Layer], tuple[str, ...]] = lambda layer: ()  # noqa: E731
    whole = ledger.layers
    if parallelism.tp > 1 or parallelism.cp > 1:
        from sim.parallel.shard import ShardPlan, partial_gradients, shard_ledger

        plan = ShardPlan(
            tp=parallelism.tp,
            sp=parallelism.sp,
            cp=parallelism.cp,
            cp_comm=parallelism.cp_comm,
            style="megatron" if scenario.framework in ("megatron", "deepspeed") else "dtensor",
            prepare_module_input=scenario.framework == "fsdp2",
            loss_parallel=scenario.training.loss != "eager" or scenario.framework not in ("megatron", "deepspeed"),
            async_allreduce=scenario.megatron.async_tensor_model_parallel_allreduce,
            each_linear=scenario.framework in ("megatron", "deepspeed") and scenario.training.code != "megatron",
        )
        ledger = transformed(shard_ledger(ledger, plan), scenario)
        of = {id(ours): theirs for ours, theirs in zip(ledger.layers, whole, strict=True)}
        names = {key: partial_gradients(theirs, plan) for key, theirs in of.items()}
        by_name = {ours.name: names[id(ours)] for ours in ledger.layers}
        partial = lambda layer: names.get(id(layer), by_name[layer.name])  # noqa: E731
    else:
        ledger = transformed(ledger, scenario)
    p, m = parallelism.pp, scenario.num_microbatches
    dp_axis = "dp_cp" if parallelism.cp > 1 else "dp"
    copies = 1
    if p == 1:
        placement, chunks, orders = LOOPED, 1, one_f_one_b(1, m, 1)
    else:
        schedule = SCHEDULES[_schedule_name(scenario)]
        chunks = schedule.num_chunks or parallelism.vpp
        assert schedule.refusal(p, m, chunks) is None, schedule.refusal(p, m, chunks)
        placement, copies = schedule.placement, schedule.copies
        if schedule.found is not None and scenario.framework == "megatron":
            from sim.parallel.zero_bubble import kept_share

            model = scenario.model
            kept = kept_share(model.hidden_size, model.num_attention_heads, scenario.training.sequence_length)
            orders = schedule.found(p, m, kept)
        else:
            orders = schedule.orders(p, m, chunks)
    return _Job(
        scenario=scenario,
        ledger=ledger,
        mesh=_mesh(scenario),
        placement=placement,
        orders=orders,
        stages=split(
            ledger.layers,
            ledger.batch_inputs,
            placement.num_stages(p, chunks),
            parallelism.layers_per_stage,
            in_a_v=placement is V_SHAPED,
        ),
        num_chunks=chunks,
        messages=_messages(scenario, chunks),
        dp_axis=dp_axis if copies == 1 else mirrored(dp_axis),
        copies=copies,
        partial=partial,
    )


def _schedule_name(scenario: Scenario) -> str:
    """Return the schedule by the name of its function; torch groups the microbatches of interleaving in its own way."""
    name = scenario.parallelism.schedule
    return "interleaved-torch" if name == "interleaved" and scenario.framework in ("ddp", "fsdp2") else name


def _mesh(scenario: Scenario) -> Mesh:
    parallelism = scenario.parallelism
    sizes = {"tp": parallelism.tp, "cp": parallelism.cp, "dp": parallelism.dp, "pp": parallelism.pp}
    return mesh_of(sizes, parallelism.order or ORDERS["megatron"])


def _messages(scenario: Scenario, chunks: int) -> Messages:
    if scenario.framework == "megatron":
        simple = scenario.parallelism.schedule in ("1f1b", "interleaved")
        overlaps = chunks > 1 and scenario.megatron.overlap_p2p_communication
        if not simple:
            return MEGATRON_ORDERED
        messages = MEGATRON_OVERLAP if overlaps else MEGATRON_INTERLEAVED if chunks > 1 else MEGATRON
        # a sequence that is divided already is sent as it is
        divided = scenario.megatron.scatter_gather_tensors_in_pipeline and not scenario.parallelism.sp
        return replace(messages, parts=scenario.parallelism.tp) if divided else messages
    if scenario.framework != "deepspeed":
        return TORCH
    # a sequence that is divided already is sent as it is (``pipe_partitioned`` and ``grad_partitioned`` turned off)
    parts = 1 if scenario.parallelism.sp else scenario.parallelism.tp
    return replace(DEEPSPEED, parts=parts) if parts > 1 else DEEPSPEED


def _norm_axis(scenario: Scenario) -> str:
    """Return the ranks over which Megatron adds up the norm: all of them where each has a shard of the gradients."""
    return "world" if scenario.megatron.use_distributed_optimizer else "model"


def _pairs(job: _Job) -> dict[str, list[tuple[int, int]]]:
    """Return (sender, receiver) of the pipeline's messages, and of the rings of context parallelism."""
    mesh = job.mesh
    pipelines = mesh.groups("pp")
    found: dict[str, list[tuple[int, int]]] = {}
    if mesh.size("pp") > 1:
        for axis, stages in pair_axes(job.placement, mesh.size("pp"), job.num_chunks).items():
            found[axis] = [(group[sender], group[receiver]) for group in pipelines for sender, receiver in stages]
    if mesh.size("cp") > 1:
        found["cp.ring"] = list(mesh.neighbours("cp", 1, around=True))
    return found


def _within(job: _Job) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return the groups whose communicators carry the pipeline's messages, where they go in batches.

    ``batch_isend_irecv`` sends in the communicator of the process group, ``isend`` and ``send`` in one of the two ranks
    (``ProcessGroupNCCL::pointToPoint``, torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp: ``batchP2P``).
    """
    if job.mesh.size("pp") == 1 or not _messages(job.scenario, job.num_chunks).in_group:
        return {}
    return dict.fromkeys(
        pair_axes(job.placement, job.mesh.size("pp"), job.num_chunks), tuple(map(tuple, job.mesh.groups("pp")))
    )


# --- one pipeline rank ---------------------------------------------------------------------------


def _program(job: _Job, rank: int, num_ranks: int) -> Program:
    """Return the program of a pipeline rank, ranks and axes to be filled in."""
    scenario = job.scenario
    stages = [job.stages[job.placement.stage_of(rank, c, num_ranks, job.num_chunks)] for c in range(job.num_chunks)]
    emitters = [_emitter(job, stage) for stage in stages]
    framework = _framework(job, rank, stages, emitters)
    chunks: dict[str, Chunk] = {
        "setup": framework.setup(),
        "workspaces": workspaces(
            scenario.cluster.gpu.compute_capability,
            scenario.allocator.cublas_workspace_bytes,
            transformer_engine=scenario.framework == "megatron"
            and scenario.megatron.transformer_impl == "transformer_engine",
        ),
    }
    setup = [Call("setup")]
    if job.messages.buffers and num_ranks > 1:
        chunks["buffers"] = _receive_buffers(emitters, scenario.num_microbatches)
        setup.append(Call("buffers"))
    if job.messages.lands and num_ranks > 1:
        chunks["buffers"] = _landing_buffer(emitters[0], job.messages.parts)
        setup.append(Call("buffers"))
    exchange = Exchange(
        rank, num_ranks, job.num_chunks, job.placement, [emitter.border for emitter in emitters], job.messages
    )
    order = job.orders[rank]
    delay = rank if job.num_chunks > job.copies else 0  # copies reduce in one order: that of their mirrored passes
    passes = _passes(chunks, "first." if framework.passes_differ else "", order, emitters, framework, exchange, delay)
    chunks["first.optimizer"] = framework.optimizer_step(first_step=True)
    first_step = (Call("workspaces"), *passes, Call("first.optimizer"))
    if framework.passes_differ:
        chunks["between"] = framework.after_first_step()
        first_step = (*first_step, Call("between"))
        passes = _passes(chunks, "", order, emitters, framework, exchange, delay)
    chunks["optimizer"] = framework.optimizer_step(first_step=False)
    chunks.update(exchange.chunks)
    step = (*passes, Call("optimizer"))
    return Program((rank,), rank, chunks, tuple(setup), first_step, step)


def _emitter(job: _Job, stage: Stage) -> Emitter:
    fused: Callable[[Layer], frozenset[str]] = lambda layer: frozenset()  # noqa: E731
    main: DType | None = None
    if job.scenario.framework == "megatron" and job.scenario.megatron.gradient_accumulation_fusion:
        from sim.parallel.frameworks.megatron import fused_gradients, main_dtype

        fused, main = fused_gradients, main_dtype(job.scenario.megatron, job.ledger.parameter_dtype)
    return Emitter(
        stage.layers,
        stage.batch_inputs,
        NO_RECOMPUTE if job.scenario.training.compile else recompute_of(job.scenario),
        job.ledger.parameter_dtype,
        fused=fused,
        main_dtype=main,
        retained=job.scenario.framework == "fsdp2",
        # the last stage's outputs wait for their backward in ``fwd_cache`` (torch/distributed/pipelining/stage.py)
        held=("logits",) if job.messages.buffers and len(job.stages) > 1 else (),
        inside=(stage.index > 0, stage.index < len(job.stages) - 1),
        elsewhere=_elsewhere(job.scenario),
        # FSDP1's modules see views of the flat parameter, which autocast does not cache (``_use_unsharded_views``)
        caches_casts=job.scenario.framework != "fsdp1",
    )


def _elsewhere(scenario: Scenario) -> Elsewhere | None:
    """Return what keeps saved tensors elsewhere than whole on the GPU, if anything does."""
    megatron, deepspeed = scenario.megatron, scenario.deepspeed
    parts, full = scenario.parallelism.tp, scenario.training.recompute == "full"
    interval = scenario.training.recompute_interval
    if scenario.framework == "megatron":
        if megatron.cpu_offloading_num_layers and megatron.cpu_offloading_activations:
            from sim.parallel.offload import LayerOffload, LegacyLayerOffload

            return (LegacyLayerOffload if megatron.nvte_cpu_offload_v1 else LayerOffload)(
                megatron.cpu_offloading_num_layers
            )
        if megatron.distribute_saved_activations and full:
            from sim.parallel.offload import Checkpoints

            return Checkpoints(True, False, parts, megatron=True, interval=interval)
        return None
    if not full or scenario.training.checkpoint != "deepspeed":
        return None
    if not (
        deepspeed.partition_activations or deepspeed.cpu_checkpointing or deepspeed.synchronize_checkpoint_boundary
    ):
        return None
    from sim.parallel.offload import Checkpoints

    # in a pipeline places are told apart by microbatch here, so each is made when it is needed
    at_once = deepspeed.contiguous_memory_optimization and scenario.parallelism.pp == 1
    return Checkpoints(
        deepspeed.partition_activations,
        deepspeed.cpu_checkpointing,
        parts,
        deepspeed.number_checkpoints if at_once else None,
        deepspeed.synchronize_checkpoint_boundary,
        interval=interval,
    )


def _passes(
    chunks: dict[str, Chunk],
    prefix: str,
    order: Order,
    emitters: Sequence[Emitter],
    framework: RankFramework,
    exchange: Exchange,
    delay: int,
) -> tuple[Call, ...]:
    """Write the passes of a step, one set for each role of a microbatch; return their calls with the messages between.

    ``delay``: backward passes after a chunk's last before its reductions start, so that they start together on all
    pipeline ranks (``grad_sync_virtual_microbatch_id`` in megatron/core/pipeline_parallel/schedules.py).
    """
    role_of = roles(order)
    several = len(emitters) > 1
    for number, emitter in enumerate(emitters):
        mine = dict.fromkeys(role for (chunk, _), role in role_of.items() if chunk == number)
        if gathers := framework.gather_ahead(number):
            chunks[f"{prefix}unshard.{number}"] = gathers
        for role in sorted(mine, key=_ROLES.index):
            place, _, halves = role.partition(".")
            framework.begin_microbatch(number, first=place in ("only", "first"), last=place in ("only", "last"))
            of = f"{number}.{role}" if several else role
            hooks = framework.hooks(number)
            after = _AfterSends(hooks) if exchange.p > 1 else None
            passes = emitter.passes(after or hooks, split=bool(halves))
            if after is not None and after.end:
                chunks[f"{prefix}end.{of}"] = (Mark("backward", "end"), *after.end)
            before = tuple(hooks.load()) if isinstance(hooks, Loads) else ()
            batch = hooks.through_forward() if isinstance(hooks, HoldsBatch) else ()
            if batch:
                before = (*before, Mark("forward", "batch"), *map(Alloc, batch))
            chunks[f"{prefix}forward.{of}"] = (*before, *passes.forward, *map(Free, batch))
            chunks[f"{prefix}backward.{of}"] = passes.backward
            if halves:
                chunks[f"{prefix}weight_gradient.{of}"] = passes.weight_gradient

    def name(pass_: Pass) -> str:
        role = role_of[pass_.chunk, pass_.microbatch]
        verb = "backward" if pass_.kind == "input_gradient" else pass_.kind
        return f"{prefix}{verb}.{pass_.chunk}.{role}" if several else f"{prefix}{verb}.{role}"

    groups = exchange.calls(order, name)
    for pass_, group in zip(order, groups, strict=True):
        end = name(pass_).replace(pass_.kind, "end")
        if pass_.kind in ("backward", "weight_gradient") and end in chunks:
            group.append(Call(end, pass_.microbatch))
    aligned = replace(exchange.messages, parts=1) in (MEGATRON_OVERLAP, MEGATRON_INTERLEAVED)
    when = aligned_fetches(order, len(emitters), exchange.rank) if aligned else fetches(order, len(emitters))
    for number, index in when.items():
        if f"{prefix}unshard.{number}" in chunks:
            groups[index].insert(0, Call(f"{prefix}unshard.{number}"))
    for number in range(len(emitters)):
        reductions = framework.start_reductions(number)
        if reductions:
            chunks[f"reduce.{number}"] = reductions
            ends = [i for i, pass_ in enumerate(order) if pass_.kind in ("backward", "weight_gradient")]
            last = max(at for at, i in enumerate(ends) if order[i].chunk == number)
            groups[ends[min(last + delay, len(ends) - 1)]].append(Call(f"reduce.{number}"))
    return tuple(call for group in groups for call in group)


_ROLES = ("only", "only.split", "first", "first.split", "middle", "middle.split", "last", "last.split")
"""In the order of a step: what a framework holds (FSDP's whole parameters) goes from one role to the next."""


def _receive_buffers(emitters: Sequence[Emitter], num_microbatches: int) -> Chunk:
    """``_prepare_forward_infra`` and ``_prepare_backward_infra``: one buffer a microbatch and direction, kept.

    Source: torch/distributed/pipelining/stage.py. The tensors that passes read are these, so theirs have no bytes.
    """
    out: list[Instruction] = []
    for emitter in emitters:
        border = emitter.border
        for storage in (border.input, border.grad_output):
            if storage is not None:
                out.extend(
                    Alloc(Storage(f"recv buffer {storage.name}", storage.num_bytes, "activations"))
                    for _ in range(num_microbatches)
                )
        emitter.border = replace(
            border,
            input=border.input and replace(border.input, num_bytes=0),
            grad_output=border.grad_output and replace(border.grad_output, num_bytes=0),
        )
    return tuple(out)


def _landing_buffer(emitter: Emitter, parts: int) -> Chunk:
    """One buffer for all that a stage receives. Whole gradients are read there: theirs have no bytes of their own."""
    border = emitter.border
    num_bytes = max(s.num_bytes for s in (border.input, border.grad_output) if s is not None)
    if parts == 1:
        emitter.border = replace(border, grad_output=border.grad_output and replace(border.grad_output, num_bytes=0))
    return (Alloc(Storage("pipe_recv_buf", -(-num_bytes // parts), "buffers")),)


# --- frameworks ----------------------------------------------------------------------------------


def _framework(job: _Job, rank: int, stages: Sequence[Stage], emitters: Sequence[Emitter]) -> RankFramework:
    if job.scenario.framework == "megatron":
        return _megatron(job, rank, stages)
    found = [_of_stage(job, stage, emitter) for stage, emitter in zip(stages, emitters, strict=True)]
    return OfChunks(found)


def _megatron(job: _Job, rank: int, stages: Sequence[Stage]) -> RankFramework:
    from sim.parallel.frameworks.megatron import Megatron, MegatronPlan, MegatronStage

    scenario = job.scenario
    plan = MegatronPlan(
        dp=job.dp,
        dp_axis=job.dp_axis,
        parameter_dtype=job.ledger.parameter_dtype,
        optimizer=scenario.training.optimizer,
        gradient_clipping=scenario.training.gradient_clipping,
        tp=scenario.parallelism.tp,
        pipeline_rank=rank,
        pipeline_ranks=scenario.parallelism.pp,
        num_chunks=job.num_chunks,
        norm_axis=_norm_axis(scenario),
        norm_ranks=job.mesh.size(_norm_axis(scenario)),
        late_validation=scenario.parallelism.pp > 1 and SCHEDULES[_schedule_name(scenario)].post_validates,
        recipe=recipe_of(scenario),
        interleaved=scenario.parallelism.schedule == "interleaved" and job.num_chunks > 1,
        shards_parameters=scenario.megatron.use_megatron_fsdp and scenario.parallelism.zero == 3,
    )
    training = scenario.training
    mask = 0
    if scenario.megatron.create_attention_mask_in_dataloader:
        mask = training.micro_batch_size * training.sequence_length**2 // scenario.parallelism.cp
    of_rank = [
        MegatronStage(
            stage.layers,
            stage.tied,
            tuple((i, name) for i, layer in enumerate(stage.layers) for name in job.partial(layer)),
            stage.index,
            mask if stage.index in (0, len(job.stages) - 1) else 0,
        )
        for stage in stages
    ]
    return cast("RankFramework", Megatron(of_rank, scenario.megatron, plan))


def _of_stage(job: _Job, stage: Stage, emitter: Emitter) -> Framework:
    scenario, training = job.scenario, job.scenario.training
    if scenario.framework == "ddp":
        from sim.parallel.frameworks.ddp import Ddp

        return Ddp(
            stage.layers,
            emitter.gradient_order(),
            scenario.ddp,
            num_ranks=scenario.parallelism.dp,
            parameter_dtype=job.ledger.parameter_dtype,
            loss_scaling=training.precision == "fp16",
            optimizer=training.optimizer,
            gradient_clipping=training.gradient_clipping,
        )
    plan = _plan(job, scenario)
    if scenario.framework == "deepspeed":
        from sim.parallel.frameworks.deepspeed import deepspeed
        from sim.parallel.frameworks.deepspeed_stage3 import Stage3

        plan = replace(plan, model_ranks=job.mesh.size("model"))
        framework = deepspeed(stage.layers, scenario.deepspeed, plan)
        if isinstance(framework, Stage3):
            framework.use_trace(emitter)
        return _in_pipe(job, stage, framework) if scenario.parallelism.pp > 1 else framework
    if scenario.framework == "fsdp2":
        from sim.parallel.frameworks.fsdp2 import fsdp2

        if scenario.parallelism.tp > 1:
            partial = tuple((i, name) for i, layer in enumerate(stage.layers) for name in job.partial(layer))
            plan = replace(plan, tp=scenario.parallelism.tp, partial=partial)
        return fsdp2(stage.layers, scenario.fsdp2, plan)
    from sim.parallel.frameworks.fsdp1 import fsdp1

    return fsdp1(stage.layers, scenario.fsdp1, plan)


def _in_pipe(job: _Job, stage: Stage, zero: Stage0 | Stage12 | Stage3) -> Framework:
    from sim.parallel.frameworks.deepspeed_pipe import DeepSpeedPipe, Pipe

    sizes = {(i, p.name): p.num_elements for i, layer in enumerate(stage.layers) for p in layer.parameters}
    training = job.scenario.training
    megatron = training.code == "megatron"
    pipe = Pipe(
        tied=tuple(sizes[key] for key in stage.tied),
        model_ranks=job.mesh.size("model"),
        stages=len(job.stages),
        is_first=stage.index == 0,
        is_last=stage.index == len(job.stages) - 1,
        tp=job.scenario.parallelism.tp,
        broadcast_bytes=8 * training.micro_batch_size * (training.sequence_length + 1) if megatron else 0,
        dp=job.dp,
        dp_axis=job.dp_axis,
        dtype=job.ledger.parameter_dtype,
    )
    return DeepSpeedPipe(zero, pipe)


def _plan(job: _Job, scenario: Scenario) -> Plan:
    """Return the plan of a framework that shards over the ranks with the same parameters, or over a part of them."""
    training, axis = scenario.training, job.dp_axis
    shard, resharded = job.dp, 0
    if scenario.framework == "fsdp2":
        shard = min(job.dp, scenario.fsdp2.shard_size or job.dp)
        reshard = scenario.fsdp2.reshard_after_forward
        resharded = 0 if isinstance(reshard, bool) else reshard
    elif scenario.framework == "fsdp1" and "HYBRID" in scenario.fsdp1.sharding_strategy:
        shard = min(job.dp, scenario.fsdp1.shard_size or scenario.cluster.gpus_per_node)
    replicas = job.dp // shard
    return Plan(
        dp=shard,
        parameter_dtype=job.ledger.parameter_dtype,
        master=job.ledger.parameter_dtype != "fp32",
        num_microbatches=scenario.num_microbatches,
        optimizer=training.optimizer,
        gradient_clipping=training.gradient_clipping,
        dp_axis=axis if replicas == 1 else within(axis, shard),
        replicas=replicas,
        replicate_axis=across(axis, shard),
        reshard_axis=within(axis, resharded or 1),
        num_gpus_per_node=scenario.cluster.gpus_per_node,
        root_modules=2 if training.code == "huggingface" else 1,
        gpu_memory_bytes=scenario.cluster.gpu.total_memory_bytes - scenario.cluster.gpu.cuda_context_bytes,
        pipeline=scenario.parallelism.pp > 1,
        gathers_ahead=scenario.framework == "fsdp2"
        and scenario.parallelism.pp > 1
        and job.num_chunks > 1
        and shard > 1,
    )
