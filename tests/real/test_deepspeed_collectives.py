"""Real DeepSpeed processes on the CPU do what our programs say: the same collectives in order, the same bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from held import live_bytes

from sim.interop.deepspeed_config import DeepSpeedSettings
from sim.ir.ledger import Dim, Layer, Op, Parameter
from sim.ir.program import Alloc, Chunk, Collective, Instruction, Storage
from sim.parallel.frameworks.deepspeed import deepspeed
from sim.parallel.frameworks.plan import Plan
from validation.real import deepspeed_zero

NUM_RANKS = 2
ELEMENT = {"bf16": 2, "fp32": 4}


CASES: dict[str, dict[str, Any]] = deepspeed_zero.CASES


@cache
def measured() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = deepspeed_zero.measure(NUM_RANKS)
    return found


def place(name: str) -> tuple[int, str]:
    """Return layer and path in it of a module of the small GPT: embeddings, four blocks, final norm and head."""
    if name.startswith("blocks."):
        number, _, rest = name.removeprefix("blocks.").partition(".")
        return int(number) + 1, rest
    return (0 if name in ("wte", "wpe") else 5), name


def layers(parameters: list[tuple[str, int]]) -> tuple[Layer, ...]:
    """Return layers that own these parameters, each by the module that owns it, with an op for each module."""
    owned: dict[int, list[Parameter]] = {}
    for name, count in parameters:
        module, _, leaf = name.rpartition(".")
        index, path = place(module)
        owned.setdefault(index, []).append(Parameter(f"{path}.{leaf}", (Dim("numel", count),)))
    kinds = {0: "embedding", 5: "head"}
    return tuple(
        Layer(
            str(index),
            kinds.get(index, "block"),  # type: ignore[arg-type]
            tuple(mine),
            tuple(Op(p.name, (), module=p.module) for p in mine),
            (),
            None,
            None,
        )
        for index, mine in sorted(owned.items())
    )


class Replay:
    """Writes a step from the events of a real one: modules entered and left, gradients as they came."""

    def __init__(self, case: dict[str, Any], parameters: list[tuple[str, int]], rank: int) -> None:
        zero = {key.removeprefix("stage3_"): value for key, value in case["zero"].items()}
        zero.setdefault("overlap_comm", zero["stage"] == 3)
        zero |= {key: value["device"] for key, value in zero.items() if key.startswith("offload")}
        zero["grad_accum_dtype"] = case.get("accumulation")
        self.microbatches = case.get("microbatches", 1)
        self.dtype = case["dtype"]
        plan = Plan(
            NUM_RANKS,
            self.dtype,
            self.dtype != "fp32",
            self.microbatches,
            fused=False,
            dp_rank=rank,
        )
        self.hooks = deepspeed(layers(parameters), DeepSpeedSettings(**zero), plan)
        self.sizes = dict(parameters)

    def microbatch(self, events: list[tuple[str, str]], first: bool, last: bool) -> Chunk:
        out: list[Instruction] = []
        self.hooks.begin_microbatch(first, last)
        for event, name in events:
            if event == "gradient":
                module, _, leaf = name.rpartition(".")
                index, path = place(module)
                gradient = Storage(name, self.sizes[name] * ELEMENT[self.dtype], "gradients", True)
                out.append(Alloc(gradient))
                out.extend(self.hooks.gradient_ready(index, f"{path}.{leaf}", gradient))
            elif name:  # the root is ours to enter
                index, path = place(name)
                if event.endswith("forward"):
                    out.extend(getattr(self.hooks, event)(index, path, False))
                else:
                    out.extend(getattr(self.hooks, event)(index, path))
        out.extend(self.hooks.end_of_backward())
        return tuple(out)

    def step(self, events: list[tuple[str, str]]) -> list[Chunk]:
        """Return the chunks of a step: its microbatches, then the optimizer."""
        split: list[list[tuple[str, str]]] = [[]]
        for event, name in events:
            if event == "end":
                split.append([])
            else:
                split[-1].append((event, name))
        chunks = [
            self.microbatch(each, index == 0, index == self.microbatches - 1)
            for index, each in enumerate(split[: self.microbatches])
        ]
        return [*chunks, self.hooks.optimizer_step(False)]


def collectives(chunk: Chunk) -> list[tuple[str, int]]:
    return [(each.kind, each.tensor_bytes) for each in chunk if isinstance(each, Collective)]


@pytest.mark.real
@pytest.mark.parametrize("name", CASES)
def test_collectives_and_state_bytes_are_those_of_deepspeed(name: str) -> None:
    case, real = CASES[name], measured()[name]
    parameters = [(n, count) for n, count in real["parameters"]]
    events = [(event, n) for event, n in real["events"]]
    for rank in range(NUM_RANKS):
        replay = Replay(case, parameters, rank)
        setup = replay.hooks.setup()
        replay.step(events)  # stage 3 records its modules
        chunks = replay.step(events)
        ours = [each for chunk in chunks for each in collectives(chunk)]
        assert ours == [(kind, size) for kind, size, _ in real["collectives"]]
        states: list[Instruction] = []
        if case["zero"]["stage"] or case["dtype"] == "fp32":  # FP16_UnfusedOptimizer makes them at the start
            first = Replay(case, parameters, rank)
            first.hooks.setup()
            first.step(events)
            states = [
                each
                for each in first.hooks.optimizer_step(True)
                if isinstance(each, Alloc) and each.storage.category == "optimizer"
            ]
        assert live_bytes([setup, tuple(states), *chunks]) == real["live_bytes"][rank]
        if rank == 0:
            assert live_bytes([setup, tuple(states), chunks[0]]) == real["after_first_microbatch"]
