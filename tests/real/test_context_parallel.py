"""torch's ring attention in real processes on the CPU exchanges what our ledger says: kinds, bytes and order."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from sim.ir.ledger import Layer
from sim.model.transformer import describe
from sim.parallel.shard import ShardPlan, shard
from sim.scenario.schema import ModelConfig, Training
from validation.real import context_parallel as real

pytestmark = pytest.mark.real
WAYS = {"allgather": "all_gather", "alltoall": "p2p"}
"""torch's rotate method -> our exchange."""


@cache
def measured(num_ranks: int) -> dict[str, dict[str, list[list[Any]]]]:
    return real.measure(num_ranks)


def block(num_ranks: int, method: str) -> Layer:
    model = ModelConfig(
        hidden_size=real.HEADS * real.HEAD_DIM, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=real.HEADS, num_key_value_heads=real.HEADS, head_dim=real.HEAD_DIM, vocab_size=64,
    )  # fmt: skip
    training = Training(
        sequence_length=real.SEQUENCE, micro_batch_size=real.BATCH, global_batch_size=real.BATCH, precision="fp32",
        attention="flash-2", code="torch",
    )  # fmt: skip
    ledger = describe(model, training, parameter_dtype="fp32", compute_dtype="fp32", autocast=False)
    return shard(ledger.layers[1], ShardPlan(cp=num_ranks, cp_comm=WAYS[method], style="dtensor"))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("method", real.METHODS)
def test_exchanges_in_order(method: str, num_ranks: int) -> None:
    """A hop around the ring is an all-to-all of which all goes to one rank (``permute_tensor``)."""
    found = block(num_ranks, method)
    for what, ops in (("forward", found.forward), ("backward", found.backward)):
        ours = [
            [
                "all_to_all" if op.exchange.kind == "send_recv" else op.exchange.kind,
                op.exchange.tensor.num_bytes,
                num_ranks,
            ]
            for op in ops
            if op.exchange is not None
        ]
        assert measured(num_ranks)[method][what] == ours
