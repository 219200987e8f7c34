"""DeepSpeed's pipeline engine: what stages agree on, what they add up, and where messages land."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import yaml

from sim.ir.ledger import Gemm
from sim.ir.program import COMPUTE, Alloc, Collective, Compute, HostWait, Program, Recv, Send, Wait, World
from sim.model.transformer import describe
from sim.parallel.lower import lower
from sim.scenario.load import load_scenario_text

HIDDEN, VOCAB, SEQUENCE = 64, 256, 32
PP, DP, MICROBATCHES = 4, 2, 6


def world(
    zero: int,
    *,
    tied: bool = False,
    tp: int = 1,
    pp: int = PP,
    code: str = "torch",
    settings: Any = None,
    megatron: Any = None,
) -> World:
    asked: dict[str, Any] = {
        "model": {
            "num_hidden_layers": PP, "hidden_size": HIDDEN, "intermediate_size": 128, "num_attention_heads": 4,
            "vocab_size": VOCAB, "tie_word_embeddings": tied,
        },
        "cluster": {"node": "dgx-h100", "num_gpus": pp * tp * DP},
        "framework": "deepspeed",
        "parallelism": {"pp": pp, "tp": tp, "dp": DP, "zero": zero},
        "training": {
            "sequence_length": SEQUENCE, "micro_batch_size": 1, "global_batch_size": MICROBATCHES * DP,
            "precision": "bf16", "code": code,
        },
        **({"deepspeed": settings} if settings else {}),
        **({"megatron": megatron} if megatron else {}),
    }  # fmt: skip
    scenario = load_scenario_text(yaml.safe_dump(asked), "pipe.yaml")
    ledger = describe(
        scenario.model, scenario.training, parameter_dtype="bf16", compute_dtype="bf16", autocast=False
    )  # fmt: skip
    return lower(ledger, scenario)


def collectives(program: Program) -> list[tuple[str, str, int]]:
    chunks = [program.chunks[call.chunk] for call in program.step]
    return [(i.kind, i.axis, i.tensor_bytes) for chunk in chunks for i in chunk if isinstance(i, Collective)]


@pytest.mark.parametrize("zero", [0, 1])
def test_tied_weights_are_added_before_gradients_are_reduced(zero: int) -> None:
    """``ReduceTiedGrads`` then ``ReduceGrads``: the first and the last stage alone, VOCAB x HIDDEN in bf16."""
    for rank, program in enumerate(world(zero, tied=True).programs):
        axes = [axis for _, axis, _ in collectives(program)]
        assert ("embedding" in axes) == (rank in (0, PP - 1))
        if "embedding" in axes:
            assert ("all_reduce", "embedding", 2 * VOCAB * HIDDEN) in collectives(program)
            assert axes.index("embedding") < axes.index("dp")
    assert all(axis != "embedding" for program in world(zero).programs for _, axis, _ in collectives(program))


@pytest.mark.parametrize("zero", [0, 1])
def test_all_stages_agree_on_overflow_and_norm_and_hear_of_the_loss(zero: int) -> None:
    """A byte and a number over the ranks of a replica; two fp32 numbers from the last stage, which averages its own."""
    for rank, program in enumerate(world(zero).programs):
        found = Counter(collectives(program))
        assert found["all_reduce", "model", 1] == found["all_reduce", "model", 4] == 1
        assert found["broadcast", "pp", 8] == 1
        last = collectives(program)[-2:] if rank == PP - 1 else collectives(program)[-1:]
        assert last[-1] == ("broadcast", "pp", 8)
        assert rank < PP - 1 or last[0] == ("all_reduce", "dp", 4)


def test_messages_land_in_one_buffer_for_good() -> None:
    """An activation, [1, SEQUENCE, HIDDEN] in bf16, is copied out of it; a gradient is read there."""
    message = 2 * SEQUENCE * HIDDEN
    for rank, program in enumerate(world(1).programs):
        setup = [i for call in program.setup for i in program.chunks[call.chunk] if isinstance(i, Alloc)]
        assert [i.storage.num_bytes for i in setup if i.storage.name == "pipe_recv_buf"] == [message]
        step = [i for call in program.step for i in program.chunks[call.chunk]]
        clones = sum(isinstance(i, Compute) and i.op == "clone" for i in step)
        assert clones == (MICROBATCHES if rank else 0)


def waits(program: Program, chunk: str) -> int:
    return sum(isinstance(i, HostWait) for i in program.chunks[chunk])


@pytest.mark.parametrize("code", ["torch", "megatron"])
def test_the_host_waits_where_a_batch_is_loaded(code: str) -> None:
    """The first and the last stage, once a microbatch; Megatron's sizes are read back where ranks share a batch."""
    for tp in (1, 2):
        for program in world(1, tp=tp, code=code).programs:
            loads = program.stage in (0, PP - 1)
            shares = code == "megatron" and tp > 1
            assert waits(program, "forward.middle") == loads * (1 + shares)
            told = [
                (i.name, i.tensor_bytes)
                for i in program.chunks["forward.middle"]
                if isinstance(i, Collective) and i.kind == "broadcast"
            ]
            assert told == [("sizes", 40), ("tokens", 8 * (SEQUENCE + 1))] * (loads and shares)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_without_a_pipeline_the_throughput_timer_waits_before_each_forward(zero: int) -> None:
    """Unless ``timers.throughput`` says otherwise."""
    (program,) = world(zero, pp=1).programs
    assert waits(program, "forward.middle") == 1
    for name in ("enabled", "synchronized"):
        (program,) = world(zero, pp=1, settings={"timers": {"throughput": {name: False}}}).programs
        assert waits(program, "forward.middle") == 0


def test_tensor_parallel_ranks_send_parts_and_gather_them() -> None:
    """Half an activation each way, after int64 [3 dimensions, 3 sizes, 2 parts, rank, 3 offsets]: 9 numbers.

    The last stage gathers its input, the first one the output that it had sent and its gradient, others all three.
    """
    message = 2 * SEQUENCE * HIDDEN
    for program in world(1, tp=2).programs:
        step = [i for call in program.step for i in program.chunks[call.chunk]]
        sent = Counter(i.tensor_bytes for i in step if isinstance(i, Send))
        received = Counter(i.tensor_bytes for i in step if isinstance(i, Recv))
        ways = 1 if program.stage in (0, PP - 1) else 2
        assert sent == received == {message // 2: ways * MICROBATCHES, 8 * 9: ways * MICROBATCHES}
        gathers = [i.tensor_bytes for i in step if isinstance(i, Collective) and i.name == "parts"]
        assert gathers == [message] * (MICROBATCHES * (2, 3, 3, 1)[program.stage])
        assert sum(isinstance(i, HostWait) and i.event == "described" for i in step) == ways * MICROBATCHES


@pytest.mark.parametrize("waits", [False, True])
def test_layers_of_2021_sum_input_gradients_before_the_weights_product(waits: bool) -> None:
    """Megatron-DeepSpeed's linear layers: the stream waits for the sum at once, or after the weight's product."""
    settings = {"async_tensor_model_parallel_allreduce": not waits}
    program = world(0, tp=2, pp=1, code="megatron", megatron=settings).programs[0]
    beside = 0
    for chunk in {id(c): c for c in (program.chunks[call.chunk] for call in program.step)}.values():
        for at, step in enumerate(chunk):
            if isinstance(step, Collective) and step.axis == "tp" and step.kind == "all_reduce":
                after = next(i for i, s in enumerate(chunk[at:], at) if isinstance(s, Wait) and s.stream == COMPUTE)
                beside += any(isinstance(s, Compute) and isinstance(s.kernel, Gemm) for s in chunk[at:after])
    assert (beside == 0) == waits
