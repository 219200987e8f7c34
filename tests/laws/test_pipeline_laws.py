"""Laws of pipelines through the whole engine: bubbles, what is held, and that messages meet.

Matmuls of the blocks take one unit, all else is free: so forward, input gradient and weight gradient of a block are as
long as each other, stages of equally many blocks are uniform, and communication costs nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine.run import run
from sim.ir.ledger import Gemm, Kernel, Ledger
from sim.ir.program import (
    Alloc,
    Collective,
    Communicator,
    Compute,
    Copy,
    Free,
    HostCompute,
    Program,
    Recv,
    Send,
    World,
)
from sim.ir.traffic import Link, Traffic
from sim.model.transformer import describe
from sim.parallel.lower import lower
from sim.parallel.pipelining import pair_axes
from sim.parallel.precision import dtypes_of
from sim.parallel.schedule import SCHEDULES, V_SHAPED, Durations, held, simulate_order
from sim.scenario.load import load_scenario_text
from sim.scenario.schema import Scenario

EVERY = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-2p", "zb-v", "v-half", "v-min", "dualpipev", "dualpipe")
UNIT = 10**12 // 2**12
"""Ticks of a unit."""


@dataclass
class OnlyBlocks:
    """One unit for each matmul of a block, nothing for the rest."""

    links: tuple[Link, ...] = ()

    def kernel_s(self, kernel: Kernel, rank: int) -> float:
        dims = (*kernel.m, *kernel.n, *kernel.k) if isinstance(kernel, Gemm) else ()
        return 2.0**-12 if dims and all(dim.name != "vocab" for dim in dims) else 0.0

    def launch_s(self, kernel: Kernel, rank: int, caller: str = "framework") -> float:
        return 0.0

    def issue_s(self, rank: int, caller: str = "framework") -> float:
        return 0.0

    def wait_s(self) -> float:
        return 0.0

    def host_s(self, work: HostCompute, ranks: tuple[int, ...]) -> float:
        return 0.0

    def collective(self, collective: Collective, communicator: Communicator) -> Traffic:
        return Traffic("free", (), 0)

    def point_to_point(self, message: Send | Recv, communicator: Communicator) -> Traffic:
        return Traffic("free", (), 0)

    def copy(self, copy: Copy, ranks: tuple[int, ...]) -> Traffic:
        return Traffic("free", (), 0)


def scenario(
    p: int,
    m: int,
    *,
    v: int = 1,
    schedule: str = "1f1b",
    framework: str = "megatron",
    num_layers: int | None = None,
    dp: int = 1,
    extra: dict[str, Any] | None = None,
    **training: Any,
) -> Scenario:
    stages = SCHEDULES[schedule].placement.num_stages(p, v)
    asked: dict[str, Any] = {
        "model": {
            "num_hidden_layers": num_layers or stages,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "vocab_size": 256,
            "hidden_act": "gelu",
        },
        "cluster": {"node": "dgx-h100", **({"num_gpus": p * dp} if p * dp <= 8 else {"num_nodes": p * dp // 8})},
        "framework": framework,
        "parallelism": {"pp": p, "vpp": v, "schedule": schedule, "dp": dp},
        "training": {
            "sequence_length": 32,
            "micro_batch_size": 1,
            "global_batch_size": m * dp,
            "precision": "bf16",
            "attention": "sdpa",
            "code": "megatron",
            **training,
        },
        **(extra or {}),
    }
    if framework == "fsdp2":
        asked["parallelism"]["zero"] = 3
    return load_scenario_text(yaml.safe_dump(asked), "law.yaml")


def ledger_of(asked: Scenario) -> Ledger:
    dtypes = dtypes_of(asked)
    return describe(
        asked.model,
        asked.training,
        parameter_dtype=dtypes.parameter,
        compute_dtype=dtypes.compute,
        autocast=dtypes.autocast,
    )


def world_of(asked: Scenario) -> World:
    return lower(ledger_of(asked), asked)


MATMULS = 4
"""Of a block, forward: qkv, projection, and two of the MLP."""


def cases(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, int, int, int]]:
    @st.composite
    def draw_case(draw: st.DrawFn) -> tuple[str, int, int, int]:
        name = draw(st.sampled_from(names))
        p = draw(st.sampled_from([2, 4, 8, 16]))
        spec = SCHEDULES[name]
        v = spec.num_chunks or draw(st.integers(2, 4))
        m = draw(st.integers(1, 3 * p))
        if name == "interleaved":
            m = p * draw(st.integers(1, 3))
        if name == "dualpipev":
            m += 2 * p
        if name == "dualpipe":
            m = 2 * p + m // 2 * 2
        return name, p, m, v

    return draw_case()


@settings(max_examples=25, deadline=None)
@given(cases(EVERY), st.booleans())
def test_a_step_is_as_long_as_its_schedule_says(case: tuple[str, int, int, int], overlap: bool) -> None:
    """Whether messages run beside passes, or all of a turn are one batch that is waited for."""
    name, p, m, v = case
    spec = SCHEDULES[name]
    extra = {"megatron": {"overlap_p2p_communication": overlap}}
    asked = scenario(p, m, v=1 if spec.num_chunks else v, schedule=name, extra=extra)
    timeline = run(world_of(asked), OnlyBlocks())
    played = simulate_order(spec, p, m, v, Durations(MATMULS, MATMULS, MATMULS))
    assert timeline.end == played.makespan * UNIT


@settings(max_examples=25, deadline=None)
@given(cases(("gpipe", "1f1b", "interleaved")))
def test_the_bubble_is_its_closed_form(case: tuple[str, int, int, int]) -> None:
    """(p-1) (F + B) / v, with F and B of one microbatch through one rank."""
    name, p, m, v = case
    timeline = run(world_of(scenario(p, m, v=v, schedule=name)), OnlyBlocks())
    forward, backward = MATMULS * v, 2 * MATMULS * v
    busy = m * (forward + backward)
    assert (timeline.end - busy * UNIT) * v == (p - 1) * (forward + backward) * UNIT


@pytest.mark.parametrize("framework", ["megatron", "deepspeed", "fsdp2", "ddp"])
@pytest.mark.parametrize(("p", "m"), [(2, 1), (4, 6), (8, 3)])
def test_1f1b_is_1f1b_in_every_framework(framework: str, p: int, m: int) -> None:
    timeline = run(world_of(scenario(p, m, framework=framework)), OnlyBlocks())
    assert timeline.end == (m + p - 1) * 3 * MATMULS * UNIT


# --- memory ---------------------------------------------------------------------------------------


def held_microbatches(program: Program, name: str) -> int:
    """Return the most microbatches whose storage of that name is live at once in a step."""
    live: Counter[tuple[int, int]] = Counter()
    most = 0
    for call in program.step:
        for instruction in program.chunks[call.chunk]:
            if isinstance(instruction, (Alloc, Free)) and instruction.storage.name.endswith(name):
                key = (id(instruction.storage), call.microbatch)
                if isinstance(instruction, Alloc):
                    live[key] += 1
                else:
                    del live[key]
                most = max(most, len(live))
    return most


@settings(max_examples=25, deadline=None)
@given(cases(("gpipe", "1f1b", "interleaved", "zb-v")))
def test_activations_held_are_those_of_the_order(case: tuple[str, int, int, int]) -> None:
    """The saved logsumexp of the one block of a stage: as many as the order has passes under way.

    A split backward needs it no more once the input gradient is there; it is then held for fewer.
    """
    name, p, m, v = case
    spec = SCHEDULES[name]
    world = world_of(scenario(p, m, v=1 if spec.num_chunks else v, schedule=name))
    for rank, (program, order) in enumerate(zip(world.programs, spec.orders(p, m, v), strict=True)):
        mine = held_microbatches(program, "attention.logsumexp")
        if spec.splits_backward:
            assert mine <= held(order)
        else:
            assert mine == held(order) == spec.microbatches_held(p, m, v, rank)
        if name == "1f1b":
            assert mine == min(m, p - rank)


@settings(max_examples=30, deadline=None)
@given(
    cases(EVERY),
    st.booleans(),
    st.sampled_from(["none", "selective", "full"]),
    st.sampled_from(
        [
            {},
            {"overlap_grad_reduce": True},
            {"overlap_p2p_communication": False},
            {"scatter_gather_tensors_in_pipeline": True},
        ]
    ),
)
def test_nothing_of_a_step_is_held_when_it_ends(
    case: tuple[str, int, int, int], tied: bool, recompute: str, megatron: dict[str, Any]
) -> None:
    name, p, m, v = case
    spec = SCHEDULES[name]
    asked = scenario(
        p, m, v=1 if spec.num_chunks else v, schedule=name, recompute=recompute, extra={"megatron": megatron}
    )
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"tie_word_embeddings": tied})})
    for program in world_of(asked).programs:
        live: set[tuple[int, int]] = set()
        after = []
        for calls in (program.setup, program.first_step, program.step):
            for call in calls:
                for instruction in program.chunks[call.chunk]:
                    if isinstance(instruction, (Alloc, Free)):
                        storage = instruction.storage
                        key = (id(storage), call.microbatch if storage.per_microbatch else 0)
                        assert (key in live) == isinstance(instruction, Free), (storage.name, call)
                        live ^= {key}
            after.append(set(live))
        assert after[1] == after[2]


@settings(max_examples=15, deadline=None)
@given(cases(tuple(name for name in EVERY if name != "dualpipe")), st.sampled_from(["torch", "huggingface"]))
def test_autograd_splits_no_memory_off_and_nothing_is_left(case: tuple[str, int, int, int], code: str) -> None:
    """torch keeps all that forward saved until the gradients of weights: as many microbatches as the order holds."""
    name, p, m, v = case
    spec = SCHEDULES[name]
    own = "interleaved-torch" if name == "interleaved" else name
    asked = scenario(p, m, v=1 if spec.num_chunks else v, schedule=name, framework="fsdp2", code=code)
    world = world_of(asked)
    for program, order in zip(world.programs, SCHEDULES[own].orders(p, m, v), strict=True):
        assert held_microbatches(program, "attention.logsumexp") == held(order)
        after = []
        live: Counter[tuple[int, int]] = Counter()
        for calls in (program.setup, program.first_step, program.step):
            for call in calls:
                for instruction in program.chunks[call.chunk]:
                    if isinstance(instruction, (Alloc, Free)):
                        storage = instruction.storage
                        key = (id(storage), call.microbatch if storage.per_microbatch else 0)
                        assert live[key] == isinstance(instruction, Free), (storage.name, call)
                        live[key] ^= 1
            after.append(+live)
        assert after[1] == after[2]


@settings(max_examples=15, deadline=None)
@given(cases(("gpipe", "1f1b", "interleaved")))
def test_ddp_reduces_each_stage_once_a_step(case: tuple[str, int, int, int]) -> None:
    """With its last backward, in buckets that together are the stage's parameters (``no_sync`` before)."""
    name, p, m, v = case
    world = world_of(scenario(p, m, v=v, schedule=name, framework="ddp", dp=2, code="torch"))
    for program in world.programs:
        held = sum(
            i.storage.num_bytes
            for call in program.setup
            for i in program.chunks[call.chunk]
            if isinstance(i, Alloc) and i.storage.category == "parameters"
        )
        reduced = [
            i.tensor_bytes
            for call in program.step
            for i in program.chunks[call.chunk]
            if isinstance(i, Collective) and i.kind == "all_reduce"
        ]
        assert sum(reduced) == held


@settings(max_examples=25, deadline=None)
@given(cases(EVERY), st.booleans())
def test_a_receive_is_for_the_microbatch_that_was_sent(case: tuple[str, int, int, int], overlap: bool) -> None:
    """Messages of one direction between two ranks are in order; both sides mean the same ones."""
    name, p, m, v = case
    spec = SCHEDULES[name]
    v = spec.num_chunks or v
    extra = {"megatron": {"overlap_p2p_communication": overlap}}
    world = world_of(scenario(p, m, v=1 if spec.num_chunks else v, schedule=name, extra=extra))

    def meant(rank: int, kind: type[Send] | type[Recv], axis: str) -> list[int]:
        program = world.programs[rank]
        return [
            call.microbatch
            for call in program.step
            for i in program.chunks[call.chunk]
            if isinstance(i, kind) and i.axis.rpartition(".")[0] == axis
        ]

    for axis, pairs in pair_axes(spec.placement, p, v).items():
        for sender, receiver in pairs:
            assert meant(sender, Send, axis) == meant(receiver, Recv, axis)


@settings(max_examples=25, deadline=None)
@given(cases(EVERY))
def test_sends_match_receives(case: tuple[str, int, int, int]) -> None:
    name, p, m, v = case
    spec = SCHEDULES[name]
    world = world_of(scenario(p, m, v=1 if spec.num_chunks else v, schedule=name))
    sent: dict[str, list[int]] = {}
    received: dict[str, list[int]] = {}
    for program in world.programs:
        for call in program.step:
            for instruction in program.chunks[call.chunk]:
                if isinstance(instruction, Send):
                    sent.setdefault(program.axes[instruction.axis], []).append(instruction.tensor_bytes)
                if isinstance(instruction, Recv):
                    received.setdefault(program.axes[instruction.axis], []).append(instruction.tensor_bytes)
    assert sent == received
    stages = spec.placement.num_stages(p, v)
    local = sum(1 for s in range(stages - 1) if spec.placement is V_SHAPED and s == p - 1)
    assert sum(map(len, sent.values())) == 2 * m * (stages - 1 - local)


@settings(max_examples=15, deadline=None)
@given(cases(("zb-h1", "zb-2p", "zb-v", "v-half", "v-min")))
def test_a_split_backward_computes_what_the_whole_one_does(case: tuple[str, int, int, int]) -> None:
    name, p, m, v = case
    split = world_of(scenario(p, m, schedule=name))
    whole = world_of(scenario(p, m, schedule="gpipe", num_layers=SCHEDULES[name].placement.num_stages(p, v)))

    def kernels(world: World) -> Counter[str]:
        found: Counter[str] = Counter()
        for program in world.programs:
            for call in program.step:
                chunk = program.chunks[call.chunk]
                found.update(i.op for i in chunk if isinstance(i, Compute) and isinstance(i.kernel, Gemm))
        return found

    assert kernels(split) == kernels(whole)
