"""A scenario with a pipeline, under ``torch.distributed.pipelining``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sim.parallel.precision import dtypes_of
from sim.parallel.schedule import SCHEDULES
from sim.scenario.schema import Scenario
from validation.real.jobs import (
    DTYPES,
    PIPELINES,
    Note,
    batch,
    cast,
    loss_context,
    make_model,
    make_optimizer,
    mesh_of,
    num_blocks_of,
    states_of,
    wrap,
)
from validation.real.modules import loss_of


def let_go_when_waited() -> None:
    """Have works that were waited for hold nothing, as NCCL's do; gloo's hold what they sent until they are dropped."""
    from torch.distributed.pipelining import schedules

    def wait(works: list[Any]) -> None:
        for work in works:
            work.wait()
        works.clear()

    schedules._wait_batch_p2p = wait


class PipelineJob:
    """Stages of this rank, each wrapped by its framework. ``passes`` are (kind, stage, microbatch) of the last step."""

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

        let_go_when_waited()
        self.scenario, self.device = scenario, device
        p, mesh = scenario.parallelism, mesh_of(scenario, device)
        dtypes = dtypes_of(scenario)
        ours = SCHEDULES[p.schedule]
        placement, chunks = ours.placement, ours.num_chunks or p.vpp
        num_stages = placement.num_stages(p.pp, chunks)
        rank = mesh["pp"].get_local_rank()
        self.mine = [placement.stage_of(rank, chunk, p.pp, chunks) for chunk in range(chunks)]
        self.last_stage = num_stages - 1
        blocks = num_blocks_of(scenario, num_stages)
        self.models = []
        for index in self.mine:
            ends = {"first": index == 0, "last": index == self.last_stage}
            model = make_model(scenario, device, blocks[index], **ends)
            if scenario.framework == "ddp":
                cast(model, DTYPES[dtypes.parameter])
            self.models.append(wrap(scenario, model, mesh))
        self.optimizer = make_optimizer(scenario, (p for model in self.models for p in model.parameters()))
        group = mesh["pp"].get_group()
        self.stages: list[Any] = [
            PipelineStage(model, index, num_stages, device, group=group)
            for model, index in zip(self.models, self.mine, strict=True)
        ]
        self.passes: list[tuple[str, int, int]] = []
        self.note: Note = lambda border: None
        for stage in self.stages:
            self._follow(stage)
        kind: Any = get_schedule_class(PIPELINES[p.schedule])
        single = issubclass(kind, PipelineScheduleSingle)
        self.schedule = kind(
            self.stages[0] if single else self.stages, scenario.num_microbatches, loss_fn=self._loss, scale_grads=False
        )
        self._follow_loss()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return loss_of(logits, labels, self.scenario.training.code)

    def _follow(self, stage: Any) -> None:
        """Have the stage write down each pass that it is asked for, and say when it is done."""

        def wrap_method(method: str, kind: Callable[[dict[str, Any]], str]) -> None:
            original = getattr(stage, method)

            def followed(microbatch: int, *args: Any, **kwargs: Any) -> Any:
                self.passes.append((kind(kwargs), stage.stage_index, microbatch))
                out = original(microbatch, *args, **kwargs)
                if method != "forward_one_chunk":
                    self.note("backward")
                elif not stage.is_last:
                    self.note("forward")
                return out

            setattr(stage, method, followed)

        wrap_method("forward_one_chunk", lambda _: "forward")
        wrap_method("backward_one_chunk", lambda k: "backward" if k.get("full_backward", True) else "input_gradient")
        wrap_method("backward_weight_one_chunk", lambda _: "weight_gradient")

    def _follow_loss(self) -> None:
        """The last stage's forward ends with the loss."""
        original = self.schedule._maybe_compute_loss

        def followed(stage: Any, *args: Any, **kwargs: Any) -> None:
            original(stage, *args, **kwargs)
            if stage.is_last:
                self.note("forward")

        self.schedule._maybe_compute_loss = followed

    def step(self, note: Note) -> None:
        self.note = note
        self.passes.clear()
        p = self.scenario
        tokens, labels = batch(p, self.device, p.num_microbatches * p.training.micro_batch_size)
        inputs = [tokens] if 0 in self.mine else []
        target = {"target": labels} if self.last_stage in self.mine else {}
        del tokens, labels
        with loss_context(p):
            self.schedule.step(*inputs, **target, return_outputs=False)  # as torchtitan: logits are not kept
        del inputs, target
        note("passes")
        if largest := p.training.gradient_clipping:
            torch.nn.utils.clip_grad_norm_([q for model in self.models for q in model.parameters()], largest)
        self.optimizer.step()
        note("step")
        self.optimizer.zero_grad()
        note("end")

    def states(self) -> dict[str, list[Tensor]]:
        return states_of(self.models, self.optimizer)
