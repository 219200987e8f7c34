"""DeepSpeed's checkpoints with each of its settings, on two tensor-parallel ranks: what stays after forward, what is
gathered in backward.

A worker is started as ``worker FOLDER``. On the CPU there is one memory: parts on the host count like the others.
"""

from __future__ import annotations

import sys
from typing import Any

from validation.real.processes import launch, write

BLOCKS, SEQUENCE, WIDTH, PLACES = 6, 256, 64, 10
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "parts": {"partition_activations": True},
    "parts on the host": {"partition_activations": True, "checkpoint_in_cpu": True},
    "parts in places": {"partition_activations": True, "contiguous_checkpointing": True, "num_checkpoints": PLACES},
}


def measured() -> list[dict[str, Any]]:
    """Return what each of two ranks found: by name of the settings, bytes held after forward and bytes gathered."""
    return launch(__file__, (), 2)


class Ranks:
    """What DeepSpeed asks a model-parallel unit for: all ranks are one tensor-parallel group."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def get_tensor_model_parallel_rank(self) -> int:
        return self.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.size

    def get_tensor_model_parallel_group(self) -> Any:
        return self.group


def one(given: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Run blocks one after the other forward and backward, each in a checkpoint."""
    import torch
    from deepspeed.runtime.activation_checkpointing import checkpointing
    from torch import nn

    from validation.real.live import LiveBytes

    checkpointing.configure(ranks, **given)
    blocks = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(BLOCKS)]
    gathered: list[int] = []
    gather = checkpointing.dist.all_gather_into_tensor

    def noted(whole: Any, part: Any, **others: Any) -> Any:
        gathered.append(whole.nbytes)
        return gather(whole, part, **others)

    checkpointing.dist.all_gather_into_tensor = noted
    try:
        with LiveBytes(smallest_bytes=1024) as live:
            x = torch.ones(1, SEQUENCE, WIDTH, dtype=torch.bfloat16).requires_grad_()
            first = x
            for block in blocks:
                x = checkpointing.checkpoint(block, x)
            held = live.live
            x.sum().backward()
        assert first.grad is not None
    finally:
        checkpointing.dist.all_gather_into_tensor = gather
    return {"held": held, "gathered": gathered}


def main(folder: str) -> None:
    import deepspeed.comm
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    deepspeed.comm.torch.build_shm_op = lambda: None  # it would be compiled, and is for reductions alone
    deepspeed.comm.init_distributed("gloo")
    group = deepspeed.comm.new_group([0, 1])
    ranks = Ranks(group, torch.distributed.get_rank(), 2)
    write(folder, {name: one(given, ranks) for name, given in SETTINGS.items()})


if __name__ == "__main__":
    main(sys.argv[2])
