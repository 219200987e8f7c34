"""Tensor and sequence parallelism of a layer: what is divided, what is exchanged, what is saved."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest

from sim.ir.ledger import Exchange, Layer, Ledger, Op, Tensor
from sim.ir.program import Collective, Compute, Wait
from sim.model.transformer import describe
from sim.parallel.emit import Recompute, plan_layer
from sim.parallel.shard import ShardPlan, partial_gradients, shard, shard_ledger
from sim.scenario.schema import ModelConfig, Training

B, S, H, A = 2, 128, 256, 8
"""Sequences, their tokens, width, heads of the GPT whose bytes the table counts; its MLP is 4 H wide."""
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
GPT: dict[str, Any] = {
    "hidden_size": H, "intermediate_size": 4 * H, "num_hidden_layers": 2, "num_attention_heads": A,
    "num_key_value_heads": A, "head_dim": H // A, "vocab_size": 1000, "hidden_act": "gelu", "norm": "layernorm",
    "position": "learned", "dropout": 0.1, "attention_dropout": 0.1, "tie_word_embeddings": True, **BIASES,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "hidden_size": H, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": A,
    "num_key_value_heads": 4, "head_dim": H // A, "vocab_size": 1024,
}  # fmt: skip


@cache
def _ledger(model: tuple[tuple[str, Any], ...], code: str, attention: str) -> Ledger:
    training = Training.model_validate(
        {
            "sequence_length": S, "micro_batch_size": B, "global_batch_size": B, "precision": "bf16",
            "attention": attention, "code": code,
        }
    )  # fmt: skip
    config = ModelConfig.model_validate(dict(model))
    return describe(config, training, parameter_dtype="bf16", compute_dtype="bf16", autocast=False)


def ledger(model: dict[str, Any], code: str = "megatron", attention: str = "flash-2", **more: Any) -> Ledger:
    return _ledger(tuple(sorted((model | more).items())), code, attention)


def layers(found: Ledger) -> tuple[Layer, Layer, Layer]:
    """Return embedding, block, head."""
    return found.layers[0], found.layers[1], found.layers[-1]


def saved_bytes(layer: Layer, *, but: str = "") -> int:
    """Return what the forward ops keep, each tensor once; ops of the region ``but`` are done again instead."""
    made = {t.name: t for op in layer.forward for t in (*op.writes, *op.keeps)}
    if layer.input is not None:
        made[layer.input.name] = layer.input
    ops = [op for op in layer.forward if not but or op.region != but]
    names = {name for op in ops for name in op.saves}
    if but:
        inside = [op for op in layer.forward if op.region == but]
        names |= {n for op in inside for n in op.reads} - {t.name for op in inside for t in (*op.writes, *op.keeps)}
    return sum(made[name].num_bytes for name in sorted(names) if name in made)


def exchanges(ops: tuple[Op, ...]) -> list[Exchange]:
    return [op.exchange for op in ops if op.exchange is not None]


def kinds(ops: tuple[Op, ...]) -> dict[str, int]:
    return dict(Counter(exchange.kind for exchange in exchanges(ops)))


STATISTICS = 2 * 2 * 4 * B * S
"""Beside the table: mean and rstd of two LayerNorms, fp32."""


# --- saved bytes: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", table 2 -----
# 16-bit activations, one byte for an element of a dropout mask.


def test_saved_bytes_of_a_whole_layer() -> None:
    """sbh (34 + 5 a s / h)."""
    _, block, _ = layers(ledger(GPT, attention="math"))
    assert saved_bytes(block) == 34 * S * B * H + 5 * A * S * S * B + STATISTICS


@pytest.mark.parametrize("t", [2, 4, 8])
def test_saved_bytes_with_tensor_parallelism(t: int) -> None:
    """sbh (10 + 24/t + 5 a s / (h t)): the norms, their results and the residual dropouts' masks stay whole."""
    _, block, _ = layers(ledger(GPT, attention="math"))
    expected = 10 * S * B * H + (24 * S * B * H + 5 * A * S * S * B) // t + STATISTICS
    assert saved_bytes(shard(block, ShardPlan(tp=t))) == expected


@pytest.mark.parametrize("t", [2, 4, 8])
def test_saved_bytes_with_sequence_parallelism(t: int) -> None:
    """sbh/t (34 + 5 a s / h)."""
    _, block, _ = layers(ledger(GPT, attention="math"))
    expected = (34 * S * B * H + 5 * A * S * S * B + STATISTICS) // t
    assert saved_bytes(shard(block, ShardPlan(tp=t, sp=True))) == expected


@pytest.mark.parametrize("t", [2, 4, 8])
def test_saved_bytes_with_selective_recompute(t: int) -> None:
    """34 sbh/t: the attention core is done again from query, key and value."""
    _, block, _ = layers(ledger(GPT, attention="math"))
    found = saved_bytes(shard(block, ShardPlan(tp=t, sp=True)), but="core_attention")
    assert found == (34 * S * B * H + STATISTICS) // t


@pytest.mark.parametrize("t", [2, 4, 8])
def test_saved_bytes_with_flash_attention(t: int) -> None:
    """34 sbh/t, 2 sbh/t as attention's result is kept in both layouts, the log-sum-exp in fp32, the random state."""
    _, block, _ = layers(ledger(GPT))
    found = saved_bytes(shard(block, ShardPlan(tp=t, sp=True)))
    assert found == (36 * S * B * H + STATISTICS + 4 * B * A * S) // t + 16


# --- collectives of Megatron's block ----------------------------------------------------------------------------------


def test_tensor_parallel_block_reduces_twice_each_way() -> None:
    _, block, _ = layers(shard_ledger(ledger(LLAMA), ShardPlan(tp=4)))
    for ops in (block.forward, block.backward):
        assert kinds(ops) == {"all_reduce": 2}
        assert all(e.tensor.num_bytes == 2 * B * S * H and e.axis == "tp" for e in exchanges(ops))
    assert all(e.blocking for e in exchanges(block.forward))
    assert not any(e.blocking for e in exchanges(block.backward))  # beside the weight gradients


def test_sequence_parallel_block_gathers_and_scatters() -> None:
    """Forward 2 + 2; backward mirrored, and the inputs of the column-parallel linears gathered again: 4 + 2."""
    _, block, _ = layers(shard_ledger(ledger(LLAMA), ShardPlan(tp=4, sp=True)))
    assert kinds(block.forward) == {"all_gather": 2, "reduce_scatter": 2}
    assert kinds(block.backward) == {"all_gather": 4, "reduce_scatter": 2}
    both = exchanges(block.forward) + exchanges(block.backward)
    assert all(e.tensor.num_bytes == 2 * B * S * H for e in both)


def test_weight_gradient_is_made_of_what_was_gathered_again_meanwhile() -> None:
    """Order of LinearWithGradAccumulationAndAsyncCommunication.backward."""
    _, block, _ = layers(shard_ledger(ledger(LLAMA), ShardPlan(tp=4, sp=True)))
    names = [op.name for op in block.backward]
    start = names.index("normed2.gathered.again.all_gather")
    assert names[start : start + 5] == [
        "normed2.gathered.again.all_gather",
        "mlp.linear_fc1.grad_input",
        "grad:normed2.reduce_scatter",
        "mlp.linear_fc1.grad_weight",
        "grad:normed2.reduce_scatter.wait",
    ]
    by_name = {op.name: op for op in block.backward}
    assert by_name["mlp.linear_fc1.grad_weight"].awaits == ("normed2.gathered.again.all_gather",)
    assert "normed2.gathered.again" in by_name["mlp.linear_fc1.grad_weight"].reads
    wait = by_name["grad:normed2.reduce_scatter.wait"]
    assert wait.awaits == ("grad:normed2.reduce_scatter",)
    assert wait.reads == ("grad:normed2.partial", "grad:normed2")  # neither is let go while NCCL works on it


def test_one_exchange_for_a_modules_input_where_projections_are_apart() -> None:
    """Query, key and value (and gate and up) share one gather, and their input gradients are added before it."""
    _, block, _ = layers(shard_ledger(ledger(LLAMA, "torch"), ShardPlan(tp=4, sp=True)))
    assert kinds(block.forward) == {"all_gather": 2, "reduce_scatter": 2}
    assert kinds(block.backward) == {"all_gather": 4, "reduce_scatter": 2}


@pytest.mark.parametrize(("fused", "sp", "sums"), [(False, False, 5), (True, False, 3), (True, True, 2)])
def test_column_parallel_linears_of_plain_modules_each_sum_their_input_gradient(
    fused: bool, sp: bool, sums: int
) -> None:
    """Query, key, value (or one matrix for all), gate and up projection; with sp the norms gather for a module."""
    plan = ShardPlan(tp=2, sp=sp, async_allreduce=False, each_linear=True)
    block = shard(layers(ledger(LLAMA, "huggingface", fused_qkv=fused))[1], plan)
    assert kinds(block.backward).get("reduce_scatter" if sp else "all_reduce") == sums


def test_dtensor_reduces_for_every_linear() -> None:
    """2 forward and 5 backward (query, key, value, gate, up), unless the module's input is prepared."""
    plan = ShardPlan(tp=4, style="dtensor")
    _, block, _ = layers(shard_ledger(ledger(LLAMA, "torch"), plan))
    assert (kinds(block.forward), kinds(block.backward)) == ({"all_reduce": 2}, {"all_reduce": 5})
    prepared = ShardPlan(tp=4, style="dtensor", prepare_module_input=True)
    _, block, _ = layers(shard_ledger(ledger(LLAMA, "torch"), prepared))
    assert (kinds(block.forward), kinds(block.backward)) == ({"all_reduce": 2}, {"all_reduce": 2})


def test_parallel_block_reduces_for_attention_and_mlp() -> None:
    found = ledger(LLAMA | {"hidden_act": "gelu"}, parallel_block=True, norm="layernorm", num_block_norms=1)
    _, block, _ = layers(shard_ledger(found, ShardPlan(tp=4)))
    assert (kinds(block.forward), kinds(block.backward)) == ({"all_reduce": 2}, {"all_reduce": 2})


# --- embedding, head, loss --------------------------------------------------------------------------------------------


def test_vocabulary_is_padded_to_a_multiple_of_128_for_each_rank() -> None:
    """1000 rows on 4 ranks: the next multiple of 4 * 128 is 1024, 256 rows each; torch.chunk gives 250."""
    megatron = shard_ledger(ledger(GPT), ShardPlan(tp=4)).layers[0].parameters[0]
    assert [d.size for d in megatron.shape] == [256, H]
    torch = shard_ledger(ledger(GPT, "torch"), ShardPlan(tp=4, style="dtensor")).layers[0].parameters[0]
    assert [d.size for d in torch.shape] == [250, H]


def test_embedding_sums_lookups() -> None:
    embedding, _, _ = layers(shard_ledger(ledger(LLAMA), ShardPlan(tp=4)))
    assert (kinds(embedding.forward), kinds(embedding.backward)) == ({"all_reduce": 1}, {})
    embedding, _, _ = layers(shard_ledger(ledger(LLAMA), ShardPlan(tp=4, sp=True)))
    assert (kinds(embedding.forward), kinds(embedding.backward)) == ({"reduce_scatter": 1}, {"all_gather": 1})


def test_learned_positions_are_added_to_the_whole_sequence() -> None:
    """LanguageModelEmbedding reduces, adds, then scatters without an exchange; dropout sees a part."""
    embedding, _, _ = layers(shard_ledger(ledger(GPT), ShardPlan(tp=4, sp=True)))
    assert (kinds(embedding.forward), kinds(embedding.backward)) == ({"all_reduce": 1}, {"all_gather": 1})
    made = {t.name: t for op in embedding.forward for t in (*op.writes, *op.keeps)}
    assert made["embedding.whole"].num_elements == B * S * H
    assert made["output"].num_elements == made["output.mask"].num_elements == B * S * H // 4


def test_loss_reduces_three_numbers_a_token() -> None:
    for style, code in (("megatron", "megatron"), ("dtensor", "torch")):
        plan = ShardPlan(tp=4, style=style)  # type: ignore[arg-type]
        _, _, head = layers(shard_ledger(ledger(LLAMA, code), plan))
        assert [(e.kind, e.tensor.num_bytes) for e in exchanges(head.forward)] == [("all_reduce", 4 * B * S)] * 3
        assert [(e.kind, e.tensor.num_bytes) for e in exchanges(head.backward)] == [("all_reduce", 2 * B * S * H)]


def test_the_fp32_softmax_is_local() -> None:
    """Megatron's loss keeps softmax in fp32 for its rows of the vocabulary, the masked targets and the mask."""
    _, _, head = layers(shard_ledger(ledger(LLAMA), ShardPlan(tp=4)))
    made = {t.name: t for op in head.forward for t in (*op.writes, *op.keeps)}
    (loss,) = [op for op in head.forward if op.name == "loss"]
    assert sum(made[name].num_bytes for name in loss.saves) == 4 * B * S * 1024 // 4 + (8 + 1) * B * S


def test_logits_are_gathered_without_loss_parallelism() -> None:
    plan = ShardPlan(tp=4, style="dtensor", loss_parallel=False)
    _, _, head = layers(shard_ledger(ledger(LLAMA, "torch"), plan))
    assert [(e.kind, e.tensor.num_bytes) for e in exchanges(head.forward)] == [("all_gather", 2 * B * S * 1024)]
    made = {t.name: t for op in (*head.forward, *head.backward) for t in op.writes}
    assert made["log_probabilities"].num_bytes == 4 * B * S * 1024
    assert made["grad:logits.part"].num_bytes == 2 * B * S * 1024 // 4


# --- heads ------------------------------------------------------------------------------------------------------------


def test_fewer_key_heads_than_ranks() -> None:
    """Megatron divides the fused projection's rows evenly, gathers the result, and each rank takes one key head.

    8 query and 2 key heads of 32 on 4 ranks: (8 + 2 * 2) * 32 / 4 = 96 rows each.
    """
    found = shard_ledger(ledger(LLAMA, num_key_value_heads=2), ShardPlan(tp=4))
    _, block, _ = layers(found)
    rows = {p.name: p.num_elements // H for p in block.parameters}
    assert rows["self_attention.linear_qkv.weight"] == 96
    assert kinds(block.forward) == {"all_gather": 1, "all_reduce": 2}
    assert kinds(block.backward) == {"reduce_scatter": 1, "all_reduce": 2}
    whole = 2 * B * S * 12 * 32
    assert [e.tensor.num_bytes for e in exchanges(block.forward) if e.kind == "all_gather"] == [whole]
    (core,) = [k for op in block.forward for k in op.kernels if type(k).__name__ == "Attention"]
    assert (core.heads[0].size, core.kv_heads[0].size) == (2, 1)  # type: ignore[union-attr]


def test_key_heads_that_ranks_share_have_partial_gradients() -> None:
    found = ledger(LLAMA, "torch", num_key_value_heads=2)
    block = found.layers[1]
    plan = ShardPlan(tp=4, style="dtensor")
    assert partial_gradients(block, plan) == ("self_attn.v_proj.weight", "self_attn.k_proj.weight")
    rows = {p.name: p.num_elements // H for p in shard(block, plan).parameters if p.num_elements > H}
    assert rows["self_attn.k_proj.weight"] == 32


# --- gradients that each rank has a part of ---------------------------------------------------------------------------


def test_partial_gradients_under_sequence_parallelism() -> None:
    """Norms and the biases added after a reduction see a part of the tokens; positions see all."""
    embedding, block, head = layers(ledger(GPT))
    plan = ShardPlan(tp=4, sp=True)
    assert partial_gradients(embedding, plan) == ()
    assert set(partial_gradients(block, plan)) == {
        *(f"self_attention.linear_{part}" for part in ("qkv.layer_norm_weight", "qkv.layer_norm_bias", "proj.bias")),
        *(f"mlp.linear_{part}" for part in ("fc1.layer_norm_weight", "fc1.layer_norm_bias", "fc2.bias")),
    }
    assert set(partial_gradients(head, plan)) == {"decoder.final_layernorm.weight", "decoder.final_layernorm.bias"}
    assert partial_gradients(block, ShardPlan(tp=4)) == ()


def test_query_and_key_norms_see_a_part_of_the_heads() -> None:
    block = ledger(LLAMA, query_key_norm=True).layers[1]
    expected = {"self_attention.k_layernorm.weight", "self_attention.q_layernorm.weight"}
    assert set(partial_gradients(block, ShardPlan(tp=4))) == expected


# --- the whole ledger -------------------------------------------------------------------------------------------------


def test_nothing_divided_is_the_same_object() -> None:
    found = ledger(LLAMA)
    assert shard_ledger(found, ShardPlan()) is found
    assert shard(found.layers[1], ShardPlan(sp=True)) is found.layers[1]


def test_identical_layers_stay_one_object() -> None:
    found = shard_ledger(ledger(LLAMA), ShardPlan(tp=2, cp=2))
    assert found.layers[1] is found.layers[2]
    assert [d.size for d in found.batch_inputs[0].shape] == [B, S // 2]
    assert found.matmul_flops == ledger(LLAMA).matmul_flops


def test_exchanges_are_issued_on_the_axis_stream() -> None:
    """What does not block is waited for only by the op that needs it."""
    _, block, _ = layers(shard_ledger(ledger(LLAMA), ShardPlan(tp=4, sp=True)))
    plan = plan_layer(block, Recompute(), "bf16")
    steps = [s for s in plan.backward if isinstance(s, Collective | Compute | Wait)]
    names = [getattr(s, "name", "") or getattr(s, "op", "") or f"wait {s.event}" for s in steps]  # type: ignore[union-attr]
    again = "normed2.gathered.again.all_gather"
    weight = names.index("mlp.linear_fc1.grad_weight")
    assert names.index(again) < names.index("mlp.linear_fc1.grad_input") < names.index(f"wait {again}") < weight
    assert all(s.stream == "nccl:tp" for s in steps if isinstance(s, Collective))


def test_full_recompute_gathers_again() -> None:
    """Reentrant: all of the block's collectives run again; the other form stops before the last reduction."""
    _, block, _ = layers(shard_ledger(ledger(LLAMA), ShardPlan(tp=4)))

    def count(recompute: Recompute) -> int:
        return sum(isinstance(s, Collective) for s in plan_layer(block, recompute, "bf16").backward)

    assert [count(Recompute("full", True)), count(Recompute("full", False)), count(Recompute())] == [4, 3, 2]


def tensor_of(layer: Layer, name: str) -> Tensor:
    return next(t for op in (*layer.forward, *layer.backward) for t in (*op.writes, *op.keeps) if t.name == name)


def test_torch_copies_where_it_gathers_along_the_second_dimension() -> None:
    """[batch, seq, hidden] is gathered along the first dimension and put in order; one sequence is in order already."""
    plan = ShardPlan(tp=4, sp=True, style="dtensor")
    _, block, _ = layers(shard_ledger(ledger(LLAMA, "torch"), plan))
    gather = next(op for op in block.forward if op.exchange is not None)
    assert [t.num_elements for t in gather.scratch] == [B * S * H]
    assert tensor_of(block, "normed1.gathered").num_elements == B * S * H
    assert all("normed1.gathered" in name for op in block.forward if op.name.endswith("k_proj") for name in op.saves)
