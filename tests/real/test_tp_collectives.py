"""Real torch processes on the CPU do the collectives that our DTensor ledgers say: kinds, bytes and order."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from sim.ir.ledger import Layer, Ledger
from sim.ir.program import Collective
from sim.model.transformer import describe
from sim.parallel.emit import LayerPlan, Recompute, plan_layer
from sim.parallel.shard import ShardPlan, shard_ledger
from sim.scenario.schema import ModelConfig, Training
from validation.real import tensor_parallel

pytestmark = pytest.mark.real
CPU_HAS_NO_RANDOM_STATE = 16
"""Bytes that a CUDA attention kernel keeps of the random generator; the CPU's kernel keeps none."""


@cache
def measured(num_ranks: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = tensor_parallel.measure(num_ranks)
    return found


def ledger(case: dict[str, bool], num_ranks: int) -> Ledger:
    real = tensor_parallel
    model = ModelConfig(
        hidden_size=real.HIDDEN, intermediate_size=real.FFN, num_hidden_layers=real.NUM_LAYERS,
        num_attention_heads=real.HEADS, num_key_value_heads=real.KV_HEADS, head_dim=real.HIDDEN // real.HEADS,
        vocab_size=real.VOCABULARY, norm="layernorm", norm_bias=False, position="none",
    )  # fmt: skip
    training = Training(
        sequence_length=real.SEQUENCE, micro_batch_size=real.BATCH, global_batch_size=real.BATCH, precision="fp32",
        attention="flash-2", code="torch",
    )  # fmt: skip
    plan = ShardPlan(
        tp=num_ranks, sp=case.get("sp", False), style="dtensor", prepare_module_input=case.get("module", False),
        loss_parallel=case.get("loss_parallel", False),
    )  # fmt: skip
    return shard_ledger(describe(model, training, parameter_dtype="fp32", compute_dtype="fp32", autocast=False), plan)


def plans(case: dict[str, bool], num_ranks: int) -> list[LayerPlan]:
    recompute = Recompute("full" if case.get("checkpoint") else "none", reentrant=False)
    found = ledger(case, num_ranks)
    return [plan_layer(layer, recompute, "fp32", found.batch_inputs) for layer in found.layers]


def saved_bytes(layer: Layer) -> int:
    made = {t.name: t for op in layer.forward for t in (*op.writes, *op.keeps)}
    if layer.input is not None:
        made[layer.input.name] = layer.input
    names = sorted({name for op in layer.forward for name in op.saves if name in made})
    return sum(made[name].num_bytes for name in names)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", tensor_parallel.CASES)
def test_collectives_in_order(name: str, num_ranks: int) -> None:
    found = plans(tensor_parallel.CASES[name], num_ranks)
    forward = [s for plan in found for s in plan.forward]
    backward = [s for plan in reversed(found) for s in plan.backward]
    for what, steps in (("forward", forward), ("backward", backward)):
        ours = [[s.kind, s.tensor_bytes, num_ranks] for s in steps if isinstance(s, Collective)]
        assert measured(num_ranks)[name][what] == ours


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", [name for name, case in tensor_parallel.CASES.items() if not case.get("checkpoint")])
def test_saved_and_parameter_bytes(name: str, num_ranks: int) -> None:
    """What each linear gathered is kept by it; token ids and labels are kept whole, by embedding and loss."""
    found = ledger(tensor_parallel.CASES[name], num_ranks)
    ids = sum(t.num_bytes for t in found.batch_inputs)
    ours = sum(map(saved_bytes, found.layers)) + ids - tensor_parallel.NUM_LAYERS * CPU_HAS_NO_RANDOM_STATE
    assert measured(num_ranks)[name]["saved_bytes"] == ours
    assert measured(num_ranks)[name]["parameter_bytes"] == 4 * found.num_parameters
