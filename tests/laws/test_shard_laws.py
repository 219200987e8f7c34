"""Dividing a layer changes neither what is computed nor what is kept in all, whatever the model and the plan."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sim.ir.ledger import Attention, Gemm, Layer, Ledger, Op
from sim.model.transformer import describe
from sim.parallel.emit import LayerPlan, Recompute, plan_layer
from sim.parallel.shard import ShardPlan, shard, shard_ledger
from sim.scenario.schema import ModelConfig, Training

SEQ = 512
DIVIDED = {"heads", "kv_heads", "ffn", "vocab"}


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Models of every family whose heads, width and vocabulary 2 and 4 ranks divide."""
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    gated = draw(st.booleans())
    learned = draw(st.booleans())
    found: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": kv_heads, "head_dim": 32, "vocab_size": 1024,
        "hidden_act": "silu" if gated else draw(st.sampled_from(["gelu", "relu"])),
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "position": "learned" if learned else draw(st.sampled_from(["rope", "none"])),
        "query_key_norm": draw(st.booleans()),
        "parallel_block": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip
    if draw(st.booleans()):
        found |= {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
    if found["parallel_block"]:
        found["num_block_norms"] = draw(st.sampled_from([1, 2]))
    return found


@st.composite
def ledgers(draw: st.DrawFn, kernels: tuple[str, ...] = ("flash-2", "cudnn", "math")) -> Ledger:
    code = draw(st.sampled_from(["torch", "huggingface", "megatron"]))
    autocast = code != "megatron" and draw(st.booleans())
    batch = draw(st.sampled_from([1, 2]))
    training = Training.model_validate(
        {
            "sequence_length": SEQ, "micro_batch_size": batch, "global_batch_size": batch, "precision": "bf16",
            "attention": draw(st.sampled_from(kernels)), "code": code,
        }
    )  # fmt: skip
    return describe(
        ModelConfig.model_validate(draw(models())), training, parameter_dtype="fp32" if autocast else "bf16",
        compute_dtype="bf16", autocast=autocast,
    )  # fmt: skip


def tensor_plans(tp: tuple[int, ...] = (2, 4)) -> st.SearchStrategy[ShardPlan]:
    return st.builds(
        ShardPlan,
        tp=st.sampled_from(tp),
        sp=st.booleans(),
        style=st.sampled_from(["megatron", "dtensor"]),
        prepare_module_input=st.booleans(),
        loss_parallel=st.booleans(),
    )


context_plans = st.builds(
    ShardPlan,
    tp=st.sampled_from([1, 2]),
    sp=st.booleans(),
    cp=st.sampled_from([2, 4]),
    cp_comm=st.sampled_from(["p2p", "all_gather", "a2a"]),
    style=st.sampled_from(["megatron", "dtensor"]),
)


def fits(ledger: Ledger, plan: ShardPlan) -> bool:
    """Ulysses gives every rank whole key heads."""
    heads = {d.size for k in cores(ledger.layers[1].forward) for d in k.kv_heads}
    return plan.cp_comm != "a2a" or plan.cp == 1 or all(size % (plan.cp * plan.tp) == 0 for size in heads)


def cores(ops: tuple[Op, ...]) -> list[Attention]:
    return [k for op in ops for k in op.kernels if isinstance(k, Attention)]


def product_flops(ops: tuple[Op, ...]) -> int:
    return sum(k.flops for op in ops for k in op.kernels if isinstance(k, Gemm | Attention))


def shared_heads_flops(layer: Layer, ops: tuple[Op, ...], tp: int) -> int:
    """What ranks do more than once because they share key heads: the projections of keys and values."""
    found = 0
    for op in ops:
        for k in op.kernels:
            names = {d.name: d.size for shape in (k.m, k.n, k.k) for d in shape} if isinstance(k, Gemm) else {}
            if "kv_heads" in names and "group" not in names and names["kv_heads"] < tp:
                found += k.flops * tp // names["kv_heads"] - k.flops
    return found


@given(ledgers(), tensor_plans())
def test_ranks_together_multiply_what_one_did(ledger: Ledger, plan: ShardPlan) -> None:
    for layer in ledger.layers:
        local = shard(layer, plan)
        for whole, part in ((layer.forward, local.forward), (layer.backward, local.backward)):
            again = shared_heads_flops(layer, whole, plan.tp)
            assert plan.tp * product_flops(part) == product_flops(whole) + again


@given(ledgers(("flash-2", "flash-3", "cudnn")), context_plans)
def test_context_parallel_ranks_too(ledger: Ledger, plan: ShardPlan) -> None:
    if not fits(ledger, plan):
        return
    for layer in ledger.layers:
        local = shard(layer, plan)
        for whole, part in ((layer.forward, local.forward), (layer.backward, local.backward)):
            again = shared_heads_flops(layer, whole, plan.tp)
            assert plan.tp * plan.cp * product_flops(part) == product_flops(whole) + again


@given(ledgers(), tensor_plans())
def test_parameters_divide_or_stay(ledger: Ledger, plan: ShardPlan) -> None:
    """1024 rows are a multiple of 128 for each of 4 ranks: nothing is padded. Shared key heads: one a rank."""
    for layer in ledger.layers:
        local = shard(layer, plan)
        for whole, part in zip(layer.parameters, local.parameters, strict=True):
            names = {d.name: d.size for d in whole.shape}
            parts = plan.tp if DIVIDED & names.keys() else 1
            if "kv_heads" in names and "group" not in names:
                parts = min(parts, names["kv_heads"])
            assert part.num_elements * parts == whole.num_elements


def saved(layer: Layer, ledger: Ledger) -> int:
    resident = {t.name for t in (*ledger.batch_inputs, *(b for each in ledger.layers for b in each.buffers))}
    made = {t.name: t for op in layer.forward for t in (*op.writes, *op.keeps)}
    if layer.input is not None:
        made[layer.input.name] = layer.input
    names = sorted({n for op in layer.forward for n in op.saves} - resident)
    return sum(made[n].num_bytes for n in names if not n.endswith("rng_state"))


@given(ledgers(), st.sampled_from([2, 4]))
def test_megatron_sequence_parallelism_divides_all_that_a_block_saves(ledger: Ledger, tp: int) -> None:
    block = ledger.layers[1]
    shared = any(d.name == "kv_heads" and d.size < tp for p in block.parameters for d in p.shape)
    if shared:
        return
    local = shard(block, ShardPlan(tp=tp, sp=True))
    assert tp * saved(local, ledger) == saved(block, ledger)


@given(ledgers(), tensor_plans())
def test_sequence_parallelism_saves_no_more(ledger: Ledger, plan: ShardPlan) -> None:
    """Nor does tensor parallelism, except where each linear keeps its own gathered input, or a fused projection of
    shared key heads is gathered."""
    block = ledger.layers[1]
    own_inputs = plan.style == "dtensor" and plan.sp and not plan.prepare_module_input
    if not own_inputs:
        assert saved(shard(block, plan), ledger) <= saved(block, ledger)


def balanced(plan: LayerPlan) -> None:
    """Every storage of the layer is made once and let go once; gradients of parameters are the framework's."""
    verbs = Counter((s[0], s[1]) for steps in (plan.forward, plan.backward) for s in steps if isinstance(s, tuple))
    for slot, described in enumerate(plan.slots, start=4):
        assert verbs["alloc", slot] == 1
        assert verbs["free", slot] == (0 if described.parameter else 1)


recomputes = st.builds(Recompute, st.sampled_from(["none", "selective", "full"]), st.booleans())


@given(ledgers(), tensor_plans(), recomputes, st.booleans())
def test_storages_live_and_die(ledger: Ledger, plan: ShardPlan, recompute: Recompute, split: bool) -> None:
    local = shard_ledger(ledger, plan)
    for layer in local.layers:
        found = plan_layer(layer, recompute, "bf16", (*local.batch_inputs, *local.layers[0].buffers), split=split)
        if not split:
            balanced(found)


@given(ledgers(("flash-2", "flash-3", "cudnn")), context_plans, recomputes)
def test_storages_live_and_die_in_context_parallelism(ledger: Ledger, plan: ShardPlan, recompute: Recompute) -> None:
    if not fits(ledger, plan):
        return
    local = shard_ledger(ledger, plan)
    for layer in local.layers:
        balanced(plan_layer(layer, recompute, "bf16", (*local.batch_inputs, *local.layers[0].buffers)))


@given(ledgers(("flash-2", "cudnn")), st.one_of(tensor_plans(), context_plans))
def test_whoever_does_not_block_is_waited_for(ledger: Ledger, plan: ShardPlan) -> None:
    """Each exchange beside the compute stream is awaited later in its pass, before an op reads what it brings."""
    if not fits(ledger, plan):
        return
    for layer in shard_ledger(ledger, plan).layers:
        for ops in (layer.forward, layer.backward):
            for index, op in enumerate(ops):
                if op.exchange is None or op.exchange.blocking:
                    continue
                brings = {t.name for t in op.writes} or {op.reads[-1]}  # in place, or into the second buffer
                for later in ops[index + 1 :]:
                    if op.name in later.awaits:
                        break
                    asked = brings & set(later.reads) if later.exchange is None else set()
                    assert not asked, f"{later.name} reads {asked} before {op.name} has ended"
                else:
                    raise AssertionError(f"nobody waits for {op.name}")


@given(ledgers(("flash-2", "cudnn")), tensor_plans())
def test_sequence_parallelism_moves_what_reductions_moved(ledger: Ledger, plan: ShardPlan) -> None:
    """An all-reduce is a reduce-scatter and an all-gather: forward, a block's row-parallel outputs are scattered where
    they were reduced, and as many gathers as Megatron needs modules, or DTensor linears, come before them."""
    if plan.style == "dtensor" or not plan.sp:
        return
    with_sp = shard(ledger.layers[1], plan)
    without = shard(ledger.layers[1], ShardPlan(tp=plan.tp))

    def volume(layer: Layer, kind: str) -> int:
        return sum(e.tensor.num_bytes for op in layer.forward if (e := op.exchange) is not None and e.kind == kind)

    assert volume(with_sp, "reduce_scatter") == volume(without, "all_reduce")


def visits(ops: tuple[Op, ...]) -> list[str]:
    """The modules that are entered, one after the other."""
    return [module for module, _ in itertools.groupby(op.module for op in ops)]


@given(ledgers(("flash-2", "cudnn")), st.one_of(tensor_plans(), context_plans))
def test_modules_are_entered_in_the_same_order(ledger: Ledger, plan: ShardPlan) -> None:
    """An exchange belongs to a module that is entered anyway: hooks of ZeRO and FSDP see no other order."""
    if not fits(ledger, plan):
        return
    for layer in ledger.layers:
        local = shard(layer, plan)
        assert visits(local.forward) == visits(layer.forward)
        assert visits(local.backward) == visits(layer.backward)
