"""What the format can say and the simulation cannot do yet: the one gate. To support something, delete its lines."""

from __future__ import annotations

from collections.abc import Iterator

from sim.interop.values import Problem
from sim.scenario.checks import Rule, run_rules
from sim.scenario.draft import Draft


def experts_axis(d: Draft) -> Iterator[Problem]:
    if d.ep > 1:
        yield Problem(
            ("parallelism", "ep"), f"parallelism.ep = {d.ep} is not simulated yet", "leave ep out: dense models are"
        )


def compiled(d: Draft) -> Iterator[Problem]:
    """Blocks of plain modules under DDP or FSDP are; hooks of DeepSpeed on each module break the graph."""
    if d.compile and (d.framework in ("deepspeed", "megatron") or d.code == "megatron"):
        yield Problem(
            ("training", "compile"),
            f"compile: true with framework {d.framework} and code {d.code} is not simulated yet",
            "leave compile out, or write framework: fsdp2",
        )


def experts(d: Draft) -> Iterator[Problem]:
    if d.model.num_local_experts is not None:
        yield Problem(("model",), "mixtures of experts are not simulated yet", "name a dense model")


def offload(d: Draft) -> Iterator[Problem]:
    for key in ("offload_optimizer", "offload_param"):
        if getattr(d, key) == "nvme":
            yield Problem(
                ("deepspeed",), f"DeepSpeed's {key} to nvme is not simulated yet", f'write "device": "cpu" in {key}'
            )


def low_precision_of_shards(d: Draft) -> Iterator[Problem]:
    """DTensor keeps gathered inputs whole: of quantised ones only torchao's scales a tensor are known."""
    low, torchao = d.precision in ("fp8", "mxfp8", "nvfp4"), d.precision == "fp8" and d.code == "torch"
    if d.framework == "fsdp2" and d.tp > 1 and d.sp and low and not torchao:
        yield Problem(
            ("training", "precision"),
            f"precision {d.precision} with code {d.code} and fsdp2's sequence parallelism is not simulated yet",
            "write precision: fp8 and code: torch; or sp: false; or framework: megatron",
        )


def rings_over_gloo(d: Draft) -> Iterator[Problem]:
    """torch's ring attention moves gradients by an all-to-all that only neighbours take part in (``permute_tensor``),
    which is laid out as messages; those gloo cannot send from GPUs."""
    if d.backend == "gloo" and d.framework == "fsdp2" and d.cp > 1 and d.cp_comm == "all_gather":
        yield Problem(
            ("parallelism", "cp"),
            f"parallelism.cp = {d.cp} of fsdp2 over gloo is not simulated yet",
            "write backend: nccl, or leave cp out",
        )


NOT_YET: tuple[Rule, ...] = (
    experts_axis,
    compiled,
    experts,
    offload,
    low_precision_of_shards,
    rings_over_gloo,
)


def unsupported(draft: Draft) -> Iterator[Problem]:
    """Yield what of a question is not simulated yet."""
    yield from run_rules(draft, NOT_YET)
