"""Context parallelism of a layer: the three ways in which attention sees the whole sequence."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from engine_world import UNIT_S, UnitCost

from sim.engine.run import run
from sim.ir.ledger import Attention, Kernel, Layer, Ledger, Op
from sim.ir.program import Call, Communicator, Free, Instruction, Program, Recv, Send, Storage, Wait, World
from sim.model.transformer import describe
from sim.parallel.emit import Emitter, Recompute, plan_layer
from sim.parallel.shard import CP_AXIS, CP_RING_AXIS, ShardPlan, shard, shard_ledger
from sim.scenario.schema import ModelConfig, Training

B, S, H, A, K = 1, 1024, 256, 8, 4
"""Sequences, their tokens, width, query heads, key heads."""
KV = 2 * 2 * B * S * K * (H // A)
"""Bytes of keys and values of the whole sequence, 16 bit."""


def ledger(**more: Any) -> Ledger:
    model = ModelConfig(
        hidden_size=H, intermediate_size=768, num_hidden_layers=1, num_attention_heads=A, num_key_value_heads=K,
        head_dim=H // A, vocab_size=1024,
    )  # fmt: skip
    training = Training.model_validate(
        {
            "sequence_length": S, "micro_batch_size": B, "global_batch_size": B, "precision": "bf16",
            "attention": "flash-2", "code": "megatron",
        }
        | more
    )  # fmt: skip
    return describe(model, training, parameter_dtype="bf16", compute_dtype="bf16", autocast=False)


def block(**more: Any) -> Layer:
    return ledger(**more).layers[1]


def messages(ops: tuple[Op, ...]) -> list[tuple[str, str, int]]:
    return [(e.kind, e.axis, e.tensor.num_bytes) for op in ops if (e := op.exchange) is not None]


def attention_flops(ops: tuple[Op, ...]) -> int:
    return sum(k.flops for op in ops for k in op.kernels if isinstance(k, Attention))


def attention_saves(layer: Layer) -> int:
    """Bytes that ops of the attention core save, without the random state."""
    made = {t.name: t for op in layer.forward for t in (*op.writes, *op.keeps)}
    core = [op for op in layer.forward if op.region == "core_attention"]
    names = {name for op in core for name in op.saves if not name.endswith("rng_state")}
    return sum(made[name].num_bytes for name in sorted(names))


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_ring_sends_keys_and_values_round(cp: int) -> None:
    """Forward cp - 1 messages of a rank's keys and values; backward twice the volume: their gradients too."""
    found = shard(block(), ShardPlan(cp=cp))
    assert messages(found.forward) == [("send_recv", CP_RING_AXIS, KV // cp)] * (cp - 1)
    back = messages(found.backward)
    assert [n for _, _, n in back] == [KV // cp] + [2 * KV // cp] * (cp - 2) + [KV // cp]
    assert sum(n for _, _, n in back) == 2 * (cp - 1) * KV // cp


def test_ring_overlaps_with_the_step_before() -> None:
    found = shard(block(), ShardPlan(cp=4))
    core = "self_attention.core_attention"
    steps = [op for op in found.forward if op.name.startswith(core)]
    names = [op.name.removeprefix(core) for op in steps]
    assert names[2:] == [".ring0", ".step0", ".ring1", ".step1", ".ring2", ".step2", ".step3", ""]
    awaited = {op.name.removeprefix(core): op.awaits for op in steps if op.awaits}
    assert awaited == {f".step{i}": (f"{core}.ring{i - 1}",) for i in (1, 2, 3)}


def test_ring_sends_and_receives_at_once() -> None:
    """On two streams: with one, every rank would wait for its own send to be received."""
    found = shard(block(), ShardPlan(cp=2))
    steps = plan_layer(found, Recompute(), "bf16").forward
    (send,) = [s for s in steps if isinstance(s, Send)]
    (recv,) = [s for s in steps if isinstance(s, Recv)]
    assert (send.axis, send.tensor_bytes) == (f"{CP_RING_AXIS}.send", KV // 2)
    assert (recv.axis, recv.tensor_bytes) == (f"{CP_RING_AXIS}.recv", KV // 2)
    assert send.stream != recv.stream
    assert any(isinstance(s, Wait) and s.stream == "compute" and s.event == send.name for s in steps)


def test_all_gather_gathers_again_in_backward() -> None:
    """Keys and values each: gathered forward, gathered again and their gradients scattered backward."""
    found = shard(block(), ShardPlan(cp=4, cp_comm="all_gather"))
    assert messages(found.forward) == [("all_gather", CP_AXIS, KV // 2)] * 2
    scattered = [("reduce_scatter", CP_AXIS, KV // 2)] * 2
    assert messages(found.backward) == [("all_gather", CP_AXIS, KV // 2)] * 2 + scattered


def test_ulysses_exchanges_heads_for_sequence() -> None:
    """Query and output are H wide, keys and values KV / 2 each; backward the same."""
    found = shard(block(), ShardPlan(cp=4, cp_comm="a2a"))
    q, kv = 2 * B * S * H // 4, KV // 2 // 4
    assert messages(found.forward) == [("all_to_all", CP_AXIS, n) for n in (q, kv, kv, q)]
    assert messages(found.backward) == [("all_to_all", CP_AXIS, n) for n in (q, q, kv, kv)]
    (kernel,) = [k for op in found.forward for k in op.kernels if isinstance(k, Attention)]
    assert (kernel.query[0].size, kernel.heads[0].size, kernel.kv_heads[0].size) == (S, A // 4, K // 4)


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_torch_gathers_keys_and_values_once_or_sends_them_round(cp: int) -> None:
    """Keys and values are one tensor; their gradients take cp hops of fp32, the last one home."""
    home = [("send_recv", CP_RING_AXIS, 2 * KV // cp)] * cp
    ways: dict[str, list[tuple[str, str, int]]] = {
        "all_gather": [("all_gather", CP_AXIS, KV)],
        "p2p": [("send_recv", CP_RING_AXIS, KV // cp)] * (cp - 1),
    }
    for how, there in ways.items():
        found = shard(block(), ShardPlan(cp=cp, cp_comm=how, style="dtensor"))  # type: ignore[arg-type]
        assert messages(found.forward) == there
        assert sorted(messages(found.backward)) == sorted(there + home)


@pytest.mark.parametrize("style", ["megatron", "dtensor"])
@pytest.mark.parametrize("how", ["p2p", "all_gather", "a2a"])
@pytest.mark.parametrize("cp", [2, 4])
def test_every_rank_does_its_part_of_causal_attention(how: str, cp: int, style: str) -> None:
    whole = block()
    found = shard(whole, ShardPlan(cp=cp, cp_comm=how, style=style))  # type: ignore[arg-type]
    assert cp * attention_flops(found.forward) == attention_flops(whole.forward)
    assert cp * attention_flops(found.backward) == attention_flops(whole.backward)


@pytest.mark.parametrize("style", ["megatron", "dtensor"])
@pytest.mark.parametrize("how", ["p2p", "all_gather", "a2a"])
def test_attention_saves_its_part(how: str, style: str) -> None:
    """Query, keys, values, output, log-sum-exp: the ring keeps the keys and values that it received last, Ulysses its
    heads of all tokens (the local output is kept by the projection besides)."""
    whole = block()
    found = shard(whole, ShardPlan(cp=4, cp_comm=how, style=style))  # type: ignore[arg-type]
    assert 4 * attention_saves(found) == attention_saves(whole)


@pytest.mark.parametrize("style", ["megatron", "dtensor"])
@pytest.mark.parametrize("how", ["p2p", "all_gather", "a2a"])
def test_selective_recompute_exchanges_again(how: str, style: str) -> None:
    found = shard(block(), ShardPlan(cp=4, cp_comm=how, style=style))  # type: ignore[arg-type]

    def count(mode: str) -> int:
        plan = plan_layer(found, Recompute(mode), "bf16")  # type: ignore[arg-type]
        return sum(type(s).__name__ in ("Collective", "Send") for s in plan.backward)

    assert count("selective") == count("none") + len(messages(found.forward))


def test_scores_in_memory_are_refused() -> None:
    with pytest.raises(AssertionError, match="fused attention"):
        shard(block(attention="math"), ShardPlan(cp=2))


def test_tensor_parallelism_divides_the_messages() -> None:
    """A rank has KV/(tp cp) of keys and values to send round."""
    found = shard(block(), ShardPlan(tp=2, sp=True, cp=2))
    ring = [n for kind, _, n in messages(found.forward) if kind == "send_recv"]
    assert ring == [KV // 4]
    gathers = [n for kind, axis, n in messages(found.forward) if kind == "all_gather"]
    assert gathers == [2 * B * (S // 2) * H] * 2


class NoHooks:
    """A framework that does nothing but free gradients."""

    def pre_forward(self, layer: int, module: str, recomputing: bool) -> tuple[Instruction, ...]:
        return ()

    def post_forward(self, layer: int, module: str, recomputing: bool) -> tuple[Instruction, ...]:
        return ()

    def pre_backward(self, layer: int, module: str) -> tuple[Instruction, ...]:
        return ()

    def post_backward(self, layer: int, module: str) -> tuple[Instruction, ...]:
        return ()

    def gradient_ready(self, layer: int, parameter: str, gradient: Storage) -> tuple[Instruction, ...]:
        return (Free(gradient),)

    def end_of_backward(self) -> tuple[Instruction, ...]:
        return ()


class SameCost(UnitCost):
    """One unit for every kernel."""

    def kernel_s(self, kernel: Kernel, rank: int) -> float:
        return UNIT_S

    def launch_s(self, kernel: Kernel, rank: int, caller: str = "framework") -> float:
        return 0.0


@pytest.mark.parametrize("style", ["megatron", "dtensor"])
@pytest.mark.parametrize("how", ["p2p", "all_gather", "a2a"])
def test_ranks_meet(how: str, style: str) -> None:
    """Four ranks, tp 2 and cp 2, run to the end, folded into one class."""
    plan = ShardPlan(tp=2, sp=True, cp=2, cp_comm=how, style=style)  # type: ignore[arg-type]
    found = shard_ledger(ledger(), plan)
    emitter = Emitter(found.layers, found.batch_inputs, Recompute("full"), "bf16")
    passes = emitter.passes(NoHooks())
    calls = (Call("forward"), Call("backward"))
    sides = {f"{CP_RING_AXIS}.{side}": CP_RING_AXIS for side in ("send", "recv")}
    axes = {"tp": "tp", CP_AXIS: CP_AXIS} | sides
    chunks = {"forward": passes.forward, "backward": passes.backward}
    program = Program((0, 1, 2, 3), 0, chunks, (), calls, calls, axes)
    groups = {
        "tp": ((0, 1), (2, 3)),
        CP_AXIS: ((0, 2), (1, 3)),
        CP_RING_AXIS: ((0, 2), (2, 0), (1, 3), (3, 1)),
    }
    communicators = {axis: Communicator(axis, axis, pairs, (0,)) for axis, pairs in groups.items()}
    timeline = run(World(4, (program,), communicators), SameCost())
    sent = [span for span in timeline.spans if span.transfer is not None]
    expected = [m for layer in found.layers for ops in (layer.forward, layer.backward) for m in messages(ops)]
    again = messages(found.layers[1].forward)  # recomputed
    assert Counter(span.name for span in sent if span.kind != "send").total() == len(expected) + len(again)
