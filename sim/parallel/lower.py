"""From the ledger to the programs of all ranks: one Program for each class of identical ranks."""

from __future__ import annotations

from typing import Protocol

from sim.ir.ledger import Ledger
from sim.ir.program import Call, Chunk, Communicator, Program, World
from sim.parallel.cublas import workspaces
from sim.parallel.emit import Emitter, Hooks, Recompute
from sim.parallel.mesh import mesh_of
from sim.scenario.schema import Scenario


class Framework(Hooks, Protocol):
    """A framework's part in a rank's program: what it allocates, what it hooks into, how it steps.

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


def lower(ledger: Ledger, scenario: Scenario) -> World:
    """Return what each class of ranks does: setup, the first step and every later one.

    Every rank of a data-parallel job runs the same program, so there is one class.
    """
    mesh = mesh_of({"dp": scenario.parallelism.dp})
    emitter = Emitter(ledger.layers, ledger.batch_inputs, _recompute(scenario), ledger.parameter_dtype)
    framework = _framework(emitter, ledger, scenario)
    num_microbatches = scenario.num_microbatches
    gpu = scenario.cluster.gpu
    chunks: dict[str, Chunk] = {"setup": framework.setup(), "workspaces": workspaces(gpu.compute_capability)}
    passes = _passes(chunks, "first." if framework.passes_differ else "", emitter, framework, num_microbatches)
    chunks["first.optimizer"] = framework.optimizer_step(first_step=True)
    first_step = (Call("workspaces"), *passes, Call("first.optimizer"))
    if framework.passes_differ:
        chunks["between"] = framework.after_first_step()
        first_step = (*first_step, Call("between"))
        passes = _passes(chunks, "", emitter, framework, num_microbatches)
    chunks["optimizer"] = framework.optimizer_step(first_step=False)
    step = (*passes, Call("optimizer"))
    program = Program(tuple(range(mesh.world_size)), 0, chunks, (Call("setup"),), first_step, step, {"dp": "dp"})
    return World(mesh.world_size, (program,), {"dp": Communicator("dp", "dp", mesh.groups("dp"), (0,))})


def _passes(
    chunks: dict[str, Chunk], prefix: str, emitter: Emitter, framework: Framework, num_microbatches: int
) -> tuple[Call, ...]:
    """Write the chunks of a step's microbatches; return their calls. Those between the first and the last share one."""
    roles = ["only"] if num_microbatches == 1 else ["first", "middle", "last"]
    if num_microbatches == 2:
        roles.remove("middle")
    for role in roles:
        framework.begin_microbatch(first=role in ("only", "first"), last=role in ("only", "last"))
        passes = emitter.passes(framework)
        chunks[f"{prefix}forward.{role}"] = passes.forward
        chunks[f"{prefix}backward.{role}"] = passes.backward
    calls = []
    for microbatch in range(num_microbatches):
        role = roles[0] if microbatch == 0 else roles[-1] if microbatch == num_microbatches - 1 else "middle"
        calls.append(Call(f"{prefix}forward.{role}", microbatch))
        calls.append(Call(f"{prefix}backward.{role}", microbatch))
    return tuple(calls)


def _recompute(scenario: Scenario) -> Recompute:
    """Hugging Face, DeepSpeed and Megatron use the reentrant form, torch's own examples and torchtitan the other."""
    reentrant = scenario.training.code != "torch"
    match scenario.training.recompute:
        case "none":
            return Recompute("none", reentrant)
        case "full":
            return Recompute("full", reentrant)
        case _:
            return Recompute("selective", reentrant)


def _framework(emitter: Emitter, ledger: Ledger, scenario: Scenario) -> Framework:
    training = scenario.training
    if scenario.framework == "ddp":
        from sim.parallel.frameworks.ddp import Ddp

        return Ddp(
            ledger.layers,
            emitter.gradient_order(),
            scenario.ddp,
            num_ranks=scenario.parallelism.dp,
            parameter_dtype=ledger.parameter_dtype,
            loss_scaling=training.precision == "fp16",
            optimizer=training.optimizer,
            gradient_clipping=training.gradient_clipping,
        )
    if scenario.framework == "deepspeed":
        from sim.parallel.frameworks.deepspeed import deepspeed
        from sim.parallel.frameworks.deepspeed_stage3 import Stage3
        from sim.parallel.frameworks.plan import Plan

        plan = Plan(
            dp=scenario.parallelism.dp,
            parameter_dtype=ledger.parameter_dtype,
            master=ledger.parameter_dtype != "fp32",
            num_microbatches=scenario.num_microbatches,
            optimizer=training.optimizer,
            num_gpus_per_node=scenario.cluster.gpus_per_node,
            root_modules=2 if training.code == "huggingface" else 1,
            gpu_memory_bytes=scenario.cluster.gpu.total_memory_bytes - scenario.cluster.gpu.cuda_context_bytes,
        )
        framework = deepspeed(ledger.layers, scenario.deepspeed, plan)
        if isinstance(framework, Stage3):
            framework.use_trace(emitter)
        return framework
    raise AssertionError(f"no lowering for framework {scenario.framework}")
