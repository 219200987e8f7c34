"""What the format can say and the simulation cannot do yet: the one gate. To support something, delete its lines."""

from __future__ import annotations

from collections.abc import Iterator

from sim.interop.values import Problem
from sim.scenario.checks import Rule, run_rules
from sim.scenario.draft import Draft

HANDCRAFTED = ("zb-h1", "zb-2p")
"""Zero-bubble orders that only Megatron's descendants have; torch splits backward in zb-v and dualpipev."""


def experts_axis(d: Draft) -> Iterator[Problem]:
    if d.ep > 1:
        yield Problem(
            ("parallelism", "ep"), f"parallelism.ep = {d.ep} is not simulated yet", "leave ep out: dense models are"
        )


def schedules(d: Draft) -> Iterator[Problem]:
    if d.pp > 1 and d.schedule in ("v-half", "v-min", "dualpipe"):
        yield Problem(
            ("parallelism", "schedule"),
            f"schedule {d.schedule} is not simulated yet",
            "write schedule: zb-v" if d.schedule != "dualpipe" else "write schedule: dualpipev",
        )


def sharded_with_split_backward(d: Draft) -> Iterator[Problem]:
    """FSDP's gathers and reductions around the passes of a schedule that torch does not have are not written."""
    if d.pp > 1 and d.framework in ("fsdp1", "fsdp2") and d.schedule in HANDCRAFTED:
        yield Problem(
            ("parallelism", "schedule"),
            f"schedule {d.schedule} with framework {d.framework} is not simulated yet",
            "write schedule: zb-v, 1f1b or interleaved",
        )


def tied_on_one_rank(d: Draft) -> Iterator[Problem]:
    """Schedules in a V put the first and the last stage on one rank: their embeddings are then one tensor."""
    if d.pp > 1 and d.schedule in ("zb-v", "dualpipev") and d.model.tie_word_embeddings:
        yield Problem(
            ("parallelism", "schedule"),
            f"schedule {d.schedule} with tied embeddings is not simulated yet",
            "write model.tie_word_embeddings: false, or schedule: 1f1b or zb-h1",
        )


def recompute(d: Draft) -> Iterator[Problem]:
    if d.recompute == "selective-op":
        yield Problem(
            ("training", "recompute"), "recompute selective-op is not simulated yet", "write none, selective or full"
        )


def precision(d: Draft) -> Iterator[Problem]:
    if d.precision in ("fp8", "mxfp8", "nvfp4"):
        yield Problem(("training", "precision"), f"precision {d.precision} is not simulated yet", "write bf16")


def compiled(d: Draft) -> Iterator[Problem]:
    if d.compile:
        yield Problem(("training", "compile"), "compile: true is not simulated yet", "leave compile out")


def experts(d: Draft) -> Iterator[Problem]:
    if d.model.num_local_experts is not None:
        yield Problem(("model",), "mixtures of experts are not simulated yet", "name a dense model")


def offload(d: Draft) -> Iterator[Problem]:
    for key in ("offload_optimizer", "offload_param"):
        if getattr(d, key) == "nvme":
            yield Problem(
                ("deepspeed",), f"DeepSpeed's {key} to nvme is not simulated yet", f'write "device": "cpu" in {key}'
            )


NOT_YET: tuple[Rule, ...] = (
    experts_axis,
    schedules,
    sharded_with_split_backward,
    tied_on_one_rank,
    recompute,
    precision,
    compiled,
    experts,
    offload,
)


def unsupported(draft: Draft) -> Iterator[Problem]:
    """Yield what of a question is not simulated yet."""
    yield from run_rules(draft, NOT_YET)
