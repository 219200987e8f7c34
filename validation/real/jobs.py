"""A scenario as a real training job: torch's or DeepSpeed's own wrappers around the model, and one step of it.

A job says ``note(name)`` at the borders of a step: after each pass ("forward", "backward"), after the optimizer
("step"), and when the gradients are gone ("end").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from sim.parallel.precision import dtypes_of
from sim.parallel.schedule import SCHEDULES, V_SHAPED
from sim.parallel.stages import blocks_per_stage
from sim.scenario.schema import Scenario
from validation.real.model import Transformer
from validation.real.modules import loss_of

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9}),
}
PIPELINES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "zb-v": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
"""Schedule of a scenario -> torch's name of it."""
Note = Callable[[str], None]
FAKE: list[Any] = []
"""The mode under which tensors have no bytes, if :func:`use_fake_tensors` was called."""


def use_fake_tensors() -> None:
    """Have models, batches and steps of :class:`TorchJob` compute nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    FAKE.append(FakeTensorMode(allow_non_fake_inputs=True))


def tensors() -> Any:
    """Return the context in which tensors are made. Meshes and wrappers are made outside it: they look into tensors."""
    return FAKE[-1] if FAKE else contextlib.nullcontext()


class Job(Protocol):
    """What is measured."""

    def step(self, note: Note) -> None:
        """Train on one batch."""
        ...

    def states(self) -> dict[str, list[Tensor]]:
        """Return the tensors of the model's states by category: parameters, gradients, optimizer, buffers."""
        ...


def make_job(scenario: Scenario, device: torch.device) -> Job:
    """Build the model of the scenario and what trains it, as this process' rank."""
    if missing := unsupported(scenario):
        raise NotImplementedError(f"this program does not train {', '.join(missing)}")
    if scenario.framework == "deepspeed":
        from validation.real.deepspeed_jobs import DeepSpeedJob, DeepSpeedPipelineJob

        return (DeepSpeedPipelineJob if scenario.parallelism.pp > 1 else DeepSpeedJob)(scenario, device)
    from validation.real.pipeline_jobs import PipelineJob

    return PipelineJob(scenario, device) if scenario.parallelism.pp > 1 else TorchJob(scenario, device)


def unsupported(scenario: Scenario) -> list[str]:
    """Return what a scenario asks for and no job does, in words."""
    training, p = scenario.training, scenario.parallelism
    whole = p.tp == p.pp == 1
    found = {
        "framework megatron": scenario.framework == "megatron",
        f"code {training.code}": training.code == "megatron",
        f"precision {training.precision}": training.precision not in DTYPES,
        f"optimizer {training.optimizer}": training.optimizer not in OPTIMIZERS,
        f"recompute {training.recompute}": training.recompute not in ("none", "full"),
        "recompute of some blocks": training.recompute_interval > 1,
        f"loss {training.loss}": training.loss not in (None, "eager"),
        "compile": training.compile,
        "cp": p.cp > 1,
        "ddp with tp or pp": scenario.framework == "ddp" and not whole,
        "fsdp1 with tp or pp": scenario.framework == "fsdp1" and not whole,
        "deepspeed with tp": scenario.framework == "deepspeed" and p.tp > 1,
        f"schedule {p.schedule}": p.pp > 1 and p.schedule not in PIPELINES,
    }
    return [words for words, asked in found.items() if asked]


# --- the model and the batch ---------------------------------------------------------------------


def make_model(
    scenario: Scenario, device: torch.device, num_blocks: int | None = None, *, first: bool = True, last: bool = True
) -> Transformer:
    """Return the model, or a stage of it, in the dtype in which the framework is given it."""
    training = scenario.training
    reentrant = training.code != "torch"
    recompute = {"none": "", "full": "around" if reentrant else "inside"}[training.recompute]
    with device, tensors():
        return Transformer(
            scenario.model,
            training.code,
            "math" if training.attention == "math" else "sdpa",
            training.sequence_length,
            num_blocks=scenario.model.num_hidden_layers if num_blocks is None else num_blocks,
            first=first,
            last=last,
            recompute=recompute,
        )


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters their dtype; angles that are complex numbers keep theirs."""
    if any(p.dtype != dtype for p in model.parameters()):
        model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def batch(scenario: Scenario, device: torch.device, sequences: int = 0) -> tuple[Tensor, Tensor]:
    """Return token ids and labels of one microbatch, or of so many sequences."""
    shape = (sequences or scenario.training.micro_batch_size, scenario.training.sequence_length)
    high = scenario.model.vocab_size
    return torch.randint(high, shape, device=device), torch.randint(high, shape, device=device)


def make_optimizer(scenario: Scenario, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    kind, settings = OPTIMIZERS[scenario.training.optimizer]
    return kind(parameters, lr=1e-4, **settings)


def local(tensor: Tensor) -> Tensor:
    """Return what of a tensor is on this rank."""
    while isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    return tensor


def states_of(model: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None) -> dict[str, list[Tensor]]:
    """Return what torch's own modules and optimizers hold on this rank."""
    parameters = [p for module in model for p in module.parameters()]
    kept = [] if optimizer is None else [t for s in optimizer.state.values() for t in s.values()]
    return {
        "parameters": [local(p) for p in parameters],
        "gradients": [local(p.grad) for p in parameters if p.grad is not None],
        "optimizer": [local(t) for t in kept if isinstance(t, Tensor) and t.dim()],
        "buffers": [local(b) for module in model for b in module.buffers()],
    }


# --- torch ---------------------------------------------------------------------------------------


def mesh_of(scenario: Scenario, device: torch.device) -> DeviceMesh:
    """Return the ranks as (pp, dp, tp); neighbours share a tensor-parallel group."""
    p = scenario.parallelism
    return init_device_mesh(device.type, (p.pp, p.dp, p.tp), mesh_dim_names=("pp", "dp", "tp"))


def wrap(scenario: Scenario, model: Transformer, mesh: DeviceMesh) -> nn.Module:
    """Return the model as its framework has it: divided by tensors, then replicated or sharded over ``dp``."""
    if scenario.parallelism.tp > 1:
        divide(scenario, model, mesh["tp"])
    if scenario.framework == "fsdp2":
        return fully_sharded(scenario, model, mesh["dp"])
    if scenario.framework == "fsdp1":
        return fully_sharded1(scenario, model, mesh["dp"])
    if scenario.parallelism.dp == 1:
        return model
    settings = scenario.ddp
    return nn.parallel.DistributedDataParallel(
        model,
        process_group=mesh["dp"].get_group(),
        bucket_cap_mb=settings.bucket_cap_mb,
        gradient_as_bucket_view=settings.gradient_as_bucket_view,
        static_graph=settings.static_graph,
        find_unused_parameters=settings.find_unused_parameters,
    )


class TorchJob:
    """DDP, FSDP1, FSDP2 and tensor parallelism, without a pipeline."""

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self.scenario, self.device = scenario, device
        self.dtypes = dtypes_of(scenario)
        model = make_model(scenario, device)
        if scenario.framework == "ddp":
            cast(model, DTYPES[self.dtypes.parameter])
        self.model = wrap(scenario, model, mesh_of(scenario, device))
        self.optimizer = make_optimizer(scenario, self.model.parameters())

    def step(self, note: Note) -> None:
        with tensors():
            self._step(note)

    def _step(self, note: Note) -> None:
        count = self.scenario.num_microbatches
        for index in range(count):
            self._microbatch(last=index == count - 1, note=note)
        if largest := self.scenario.training.gradient_clipping:
            if self.scenario.framework == "fsdp1":
                self.model.clip_grad_norm_(largest)  # type: ignore[operator]
            else:
                nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        self.optimizer.step()
        note("step")
        self.optimizer.zero_grad()
        note("end")

    def _microbatch(self, last: bool, note: Note) -> None:
        tokens, labels = batch(self.scenario, self.device)
        with accumulating(self.scenario, self.model, last), loss_context(self.scenario):
            with self.autocast():
                logits = self.model(tokens)
                loss = loss_of(logits, labels, self.scenario.training.code)
            del logits
            note("forward")
            loss.backward()
        del tokens, labels, loss
        note("backward")

    def autocast(self) -> Any:
        compute = DTYPES[self.dtypes.compute]
        return torch.autocast(self.device.type, compute, enabled=self.dtypes.autocast)

    def states(self) -> dict[str, list[Tensor]]:
        return states_of([self.model], self.optimizer)


def accumulating(scenario: Scenario, model: Any, last: bool) -> Any:
    """Tell the framework whether a microbatch ends the step; return the context to run it in."""
    if scenario.framework == "fsdp2":
        settings = scenario.fsdp2
        model.set_requires_gradient_sync(last or settings.gradient_sync == "every")
        model.set_reshard_after_backward(last or settings.reshard_after_backward)
        return contextlib.nullcontext()
    whole = scenario.framework == "ddp" or scenario.fsdp1.gradient_sync == "last"
    return model.no_sync() if whole and not last and hasattr(model, "no_sync") else contextlib.nullcontext()


def loss_context(scenario: Scenario) -> Any:
    from torch.distributed.tensor.parallel import loss_parallel

    return loss_parallel() if scenario.parallelism.tp > 1 else contextlib.nullcontext()


def fully_sharded(scenario: Scenario, model: Transformer, mesh: DeviceMesh) -> nn.Module:
    """Return the model with ``fully_shard`` on each block and on it."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    settings, dtypes = scenario.fsdp2, dtypes_of(scenario)
    shard = min(mesh.size(), settings.shard_size or mesh.size())
    if shard < mesh.size():
        names = ("replicate", "shard")
        mesh = init_device_mesh(mesh.device_type, (mesh.size() // shard, shard), mesh_dim_names=names)
    gathered, reduced = DTYPES[dtypes.parameter], DTYPES.get(settings.reduce_dtype or "")
    original = DTYPES[settings.orig_dtype]
    cast(model, original)
    pinned = mesh.device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if settings.cpu_offload else OffloadPolicy()
    given: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(None if gathered == original else gathered, reduced),
        "offload_policy": offload,
    }
    # torchtitan's default: in a pipeline the parameters stay whole from one microbatch to the next
    reshard = settings.reshard_after_forward if scenario.parallelism.pp == 1 else False
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard, **given)
    if settings.wrap == "torchtitan":
        parts = dict(model.named_children())
        groups = [[part for name, part in parts.items() if name.startswith(end)] for end in ("embed_", "head_")]
        for group, gathers_again in zip(groups, (reshard, False), strict=True):
            if group:
                fully_shard(group, reshard_after_forward=gathers_again, **given)
    return fully_shard(model, **given, **({"reshard_after_forward": True} if settings.reshard_root else {}))


def fully_sharded1(scenario: Scenario, model: Transformer, mesh: DeviceMesh) -> nn.Module:
    """Return the model with FSDP1 around each block and around it."""
    from torch.distributed.fsdp import (
        BackwardPrefetch,
        CPUOffload,
        FullyShardedDataParallel,
        MixedPrecision,
        ShardingStrategy,
    )
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    settings = scenario.fsdp1
    low = DTYPES[scenario.training.precision]
    policy = {
        "DEFAULT": MixedPrecision(param_dtype=low, reduce_dtype=torch.float32),
        "PURE": MixedPrecision(param_dtype=low, reduce_dtype=low),
        "FULL": MixedPrecision(),
    }[settings.mixed_precision]
    hybrid = "HYBRID" in settings.sharding_strategy
    if hybrid:
        shard = min(mesh.size(), settings.shard_size or scenario.cluster.gpus_per_node)
        names = ("replicate", "shard")
        mesh = init_device_mesh(mesh.device_type, (mesh.size() // shard, shard), mesh_dim_names=names)
    prefetch = settings.backward_prefetch
    return FullyShardedDataParallel(
        model,
        process_group=None if hybrid else mesh.get_group(),
        device_mesh=mesh if hybrid else None,
        sharding_strategy=ShardingStrategy[settings.sharding_strategy],
        auto_wrap_policy=ModuleWrapPolicy({type(model.blocks[0])}),
        mixed_precision=policy,
        backward_prefetch=None if prefetch == "NONE" else BackwardPrefetch[prefetch],
        forward_prefetch=settings.forward_prefetch,
        limit_all_gathers=settings.limit_all_gathers,
        use_orig_params=settings.use_orig_params,
        cpu_offload=CPUOffload(offload_params=True) if settings.cpu_offload else None,
        device_id=torch.device(mesh.device_type, torch.cuda.current_device())
        if mesh.device_type == "cuda"
        else torch.device("cpu"),
    )


def divide(scenario: Scenario, model: Transformer, mesh: DeviceMesh) -> None:
    """Parallelise as PyTorch's tutorial does (a plan for each linear), or, under FSDP2, as torchtitan (for modules).

    The loss is parallel too: logits stay divided by the vocabulary.
    """
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    sp, module = scenario.parallelism.sp, scenario.framework == "fsdp2"
    stream = Shard(1) if sp else Replicate()
    source = Replicate() if module else stream
    ends: dict[str, Any] = {
        "embed_words": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "head_norm": SequenceParallel(),
        "head_head": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
    }
    columns = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
    plan: dict[str, Any] = {name: ColwiseParallel(input_layouts=source) for name in columns}
    plan |= {name: RowwiseParallel(output_layouts=stream) for name in ("attention.o", "mlp.down")}
    if sp:
        plan |= {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
    else:
        del ends["head_norm"]
    if module:
        first = (stream,), (Replicate(),)
        # attention is also given the angles of the positions, which are no DTensor
        plan["attention"] = PrepareModuleInput(input_layouts=(stream, None), desired_input_layouts=(Replicate(), None))
        plan["mlp"] = PrepareModuleInput(input_layouts=first[0], desired_input_layouts=first[1])
    present = dict(model.named_modules())
    parallelize_module(model, mesh, {name: style for name, style in ends.items() if name in present})
    for block in model.blocks:
        inside = dict(block.named_modules())
        parallelize_module(block, mesh, {name: style for name, style in plan.items() if name in inside})


def num_blocks_of(scenario: Scenario, num_stages: int) -> tuple[int, ...]:
    """Return the blocks of each virtual stage."""
    p = scenario.parallelism
    in_a_v = p.pp > 1 and SCHEDULES[p.schedule].placement is V_SHAPED
    return blocks_per_stage(scenario.model.num_hidden_layers, num_stages, p.layers_per_stage, in_a_v=in_a_v)
