"""Run torch's pipeline schedules in real processes on the CPU with gloo, and write down the order of their passes.

``python -m validation.real.pipelining 4`` prints, for each case of 4 ranks, the passes of each rank as JSON, each
as (kind, stage, microbatch). :func:`measure` is for tests. What is written down is what a stage was asked to do, not
``pipeline_order``: that of ``Schedule1F1B`` differs from what it runs (torch 2.13, last rank).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from validation.real.processes import launch, write

WIDTH, ROWS = 4, 1

Case = tuple[str, int, int, str]
"""torch's name of the schedule, stages a rank, microbatches, placement ("loop" or "v")."""
CASES: dict[int, dict[str, Case]] = {
    2: {
        "gpipe": ("GPipe", 1, 5, "loop"),
        "1f1b": ("1F1B", 1, 5, "loop"),
        "interleaved": ("Interleaved1F1B", 3, 4, "loop"),
        "interleaved-torch": ("Interleaved1F1B", 2, 3, "loop"),
        "looped-bfs": ("LoopedBFS", 2, 3, "loop"),
        "interleaved-zb": ("InterleavedZeroBubble", 2, 4, "loop"),
        "zb-h1": ("InterleavedZeroBubble", 1, 4, "loop"),
        "zb-v": ("ZBVZeroBubble", 2, 2, "v"),
        "dualpipev": ("DualPipeV", 2, 5, "v"),
    },
    4: {
        "gpipe": ("GPipe", 1, 8, "loop"),
        "1f1b": ("1F1B", 1, 8, "loop"),
        "interleaved": ("Interleaved1F1B", 2, 8, "loop"),
        "interleaved-torch": ("Interleaved1F1B", 2, 10, "loop"),
        "looped-bfs": ("LoopedBFS", 2, 8, "loop"),
        "interleaved-zb": ("InterleavedZeroBubble", 2, 8, "loop"),
        "zb-h1": ("InterleavedZeroBubble", 1, 8, "loop"),
        "zb-v": ("ZBVZeroBubble", 2, 8, "v"),
        "dualpipev": ("DualPipeV", 2, 10, "v"),
    },
}
"""Ranks -> our name of the schedule -> what torch is asked."""


def measure(num_ranks: int) -> dict[str, list[list[tuple[str, int, int]]]]:
    """Run the cases with so many processes; return case -> passes of each rank, in the order in which they ran."""
    written = launch(__file__, (), num_ranks)
    return {name: [[tuple(q) for q in each[name]] for each in written] for name in CASES[num_ranks]}


def worker(folder: str) -> None:
    """What each process runs."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {name: run(case, rank, num_ranks) for name, case in CASES[num_ranks].items()}
    write(folder, found)
    torch.distributed.destroy_process_group()


def run(case: Case, rank: int, num_ranks: int) -> list[tuple[str, int, int]]:
    """Do one step of one case; return the passes of this rank."""
    import torch
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

    name, per_rank, num_microbatches, placement = case
    last = num_ranks * per_rank - 1
    mine = [rank, last - rank] if placement == "v" else list(range(rank, last + 1, num_ranks))
    passes: list[tuple[str, int, int]] = []
    stages = [PipelineStage(torch.nn.Linear(WIDTH, WIDTH), index, last + 1, torch.device("cpu")) for index in mine]
    for stage in stages:
        _write_down(stage, passes)
    kind: Any = get_schedule_class(name)
    loss = torch.nn.functional.mse_loss
    single = issubclass(kind, PipelineScheduleSingle)
    schedule = kind(stages[0] if single else stages, num_microbatches, loss_fn=loss)
    batch = torch.ones(num_microbatches * ROWS, WIDTH)
    schedule.step(*([batch] if 0 in mine else []), **({"target": batch} if last in mine else {}))
    return passes


def _write_down(stage: Any, passes: list[tuple[str, int, int]]) -> None:
    """Have the stage write down each pass that it is asked for."""

    def wrap(method: str, kind: Callable[[dict[str, Any]], str]) -> None:
        original = getattr(stage, method)

        def written(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            passes.append((kind(kwargs), stage.stage_index, microbatch))
            return original(microbatch, *args, **kwargs)

        setattr(stage, method, written)

    wrap("forward_one_chunk", lambda _: "forward")
    wrap("backward_one_chunk", lambda k: "backward" if k.get("full_backward", True) else "input_gradient")
    wrap("backward_weight_one_chunk", lambda _: "weight_gradient")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2])
    else:
        print(json.dumps(measure(int(sys.argv[1]))))
