"""Measure what DeepSpeed's ZeRO-3 hooks spend on the host around a torch module, forward and backward.

    python validation/measure/measure_zero3.py

Linears and activations so small that their arithmetic takes next to nothing run with and without DeepSpeed's engine,
as rank 0 of eight under torch's fake process group. All parameters persist (they are below
``stage3_param_persistence_threshold``), so nothing is gathered: what is left is ``_call_impl`` with its hooks, their
autograd functions, ``fetch_sub_module`` and ``release_sub_module``. Stamps before and after each module, in both
directions, make windows of a tenth of a millisecond, and each figure is the least of many. One thread. Needs deepspeed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 64
PAIRS = 4
REPEATS = 300
TIMES: dict[str, float] = defaultdict(lambda: float("inf"))


class _Stamp(torch.autograd.Function):
    """The identity; notes when it is passed, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Callable[[str], None]) -> Tensor:
        ctx.note = note
        note("forward")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.note("backward")
        return grads[0], None


class Chain(nn.Module):
    """Linear, activation, linear, ... with a stamp between each two."""

    def __init__(self) -> None:
        super().__init__()
        self.whose = "plain"
        self.last: dict[str, float] = {}
        self.steps = nn.ModuleList(
            step for _ in range(PAIRS) for step in (nn.Linear(WIDTH, WIDTH, bias=False), nn.SiLU())
        )

    def forward(self, x: Tensor) -> Tensor:
        self.last.clear()
        x = _Stamp.apply(x, self._note(""))
        for step in self.steps:
            x = _Stamp.apply(step(x), self._note(type(step).__name__))
        return x.float().sum()

    def _note(self, after: str) -> Callable[[str], None]:
        """Between two stamps is the module before the second, forward; the one before the first, backward."""

        def note(direction: str) -> None:
            now = time.perf_counter()
            if direction in self.last:
                module = after if direction == "forward" else self._behind
                key = f"{self.whose} {module} {direction}"
                TIMES[key] = min(TIMES[key], now - self.last[direction])
            self._behind = after
            self.last[direction] = time.perf_counter()

        return note


def main() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="8", LOCAL_RANK="0", LOCAL_SIZE="1", DS_ACCELERATOR="cpu")
    import torch._dynamo  # before any hook: it is imported inside them otherwise
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    import deepspeed
    from deepspeed.runtime.zero import partitioned_param_coordinator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("fake")
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None

    plain, sharded = Chain().bfloat16(), Chain().bfloat16()
    sharded.whose = "zero3"
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3}, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=sharded, optimizer=torch.optim.AdamW(sharded.parameters()), config=config)
    x = torch.randn(1, 8, WIDTH).bfloat16().requires_grad_()
    for _ in range(REPEATS):
        plain(x).backward()
        engine.backward(engine(x))
        engine.step()
    for key in sorted(TIMES):
        print(f"{key}: {TIMES[key] * 1e6:.1f} us")
    for direction in ("forward", "backward"):
        more = [TIMES[f"zero3 {m} {direction}"] - TIMES[f"plain {m} {direction}"] for m in ("Linear", "SiLU")]
        print(f"hooks {direction}: Linear {more[0] * 1e6:.0f} us, SiLU {more[1] * 1e6:.0f} us")


if __name__ == "__main__":
    main()
