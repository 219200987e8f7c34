"""Compiled blocks: what is kept, what is one kernel, what runs again, and that every tensor still lives and dies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.ir.ledger import Attention, DType, Gemm, Layer, Ledger, Pointwise
from sim.model.transformer import describe
from sim.parallel.emit import NO_RECOMPUTE, Recompute, plan_layer
from sim.parallel.fuse import _Flow, compile_block, compile_ledger, compile_loss
from sim.parallel.shard import ShardPlan, shard_ledger
from sim.scenario.schema import ModelConfig, Training

LLAMA = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=128,
)  # fmt: skip
GPT = LLAMA.model_copy(
    update={
        "hidden_act": "gelu", "norm": "layernorm", "position": "learned", "num_key_value_heads": 4, "dropout": 0.1,
        "attention_bias": True, "attention_output_bias": True, "mlp_bias": True,
    }
)  # fmt: skip
FALCON = LLAMA.model_copy(update={"parallel_block": True, "norm": "layernorm", "hidden_act": "gelu"})
MODELS = {"llama": LLAMA, "gpt": GPT, "falcon": FALCON}
TOKENS = 64
PLANS = {
    "one": ShardPlan(),
    "tp": ShardPlan(tp=2, style="dtensor", prepare_module_input=True),
    "sp": ShardPlan(tp=2, sp=True, style="dtensor", prepare_module_input=True),
    "cp": ShardPlan(cp=2, style="dtensor"),
}


def ledger(model: ModelConfig = LLAMA, *, code: str = "torch", autocast: bool = False, **training: object) -> Ledger:
    asked = Training(
        sequence_length=32, micro_batch_size=2, global_batch_size=2, precision="bf16", attention="flash-2",
        code=code, **training,  # type: ignore[arg-type]
    )  # fmt: skip
    stored: DType = "fp32" if autocast else "bf16"
    return describe(model, asked, parameter_dtype=stored, compute_dtype="bf16", autocast=autocast)


def kept(layer: Layer) -> set[str]:
    return {name for op in layer.forward for name in op.saves}


def count(layer: Layer, kind: type, *, backward: bool = False) -> int:
    ops = layer.backward if backward else layer.forward
    return sum(isinstance(kernel, kind) for op in ops for kernel in op.kernels)


@pytest.mark.parametrize("recompute", ["none", "selective", "selective-op", "full"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("code", ["torch", "huggingface"])
@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
def test_everything_lives_and_dies(
    code: str, model: ModelConfig, plan: ShardPlan, recompute: str, autocast: bool
) -> None:
    """Each gradient is made once, each storage that is made dies or is handed on, and what is read is there."""
    whole = shard_ledger(ledger(model, code=code, autocast=autocast), plan)
    compiled = compile_ledger(whole, Recompute(recompute), loss=True)  # type: ignore[arg-type]
    for before, layer in zip(whole.layers, compiled.layers, strict=True):
        eager = sorted(name for op in before.backward for name in op.gradients)
        assert sorted(name for op in layer.backward for name in op.gradients) == eager
        plan_ = plan_layer(layer, NO_RECOMPUTE, "bf16", whole.batch_inputs)
        steps = [s for s in (*plan_.forward, *plan_.backward) if isinstance(s, tuple)]
        made = [slot for verb, slot, _ in steps if verb == "alloc"]
        gone = [slot for verb, slot, _ in steps if verb == "free"]
        given_away = {1, 3, *(slot for verb, slot, _ in steps if verb == "gradient")}
        assert sorted(s for s in made if s not in given_away) == sorted(s for s in gone if s not in given_away | {0, 2})


def test_kept_of_a_llama_block() -> None:
    """Operands of products, statistics, and of the chain gate * up its ends; the sum after attention is made again from
    the block's input and attention's output."""
    layer = compile_block(ledger().layers[1], Recompute("none"))
    assert kept(layer) == {
        "input", "normed1", "normed1.rstd", "query_rotated", "key_rotated", "value", "attention",
        "attention.logsumexp", "attention.rng_state", "attention_output", "normed2", "normed2.rstd", "gate", "up",
        "activated",
    }  # fmt: skip


def test_a_checkpoint_keeps_its_input_and_runs_products_again() -> None:
    """Seven products forward and fourteen backward; of the seven, six run again: nobody reads the last one's result."""
    layer = compile_block(ledger().layers[1], Recompute("full"))
    assert kept(layer) == {"input"}
    assert count(layer, Gemm) == 7
    assert count(layer, Gemm, backward=True) == 14 + 6
    assert count(layer, Attention, backward=True) == 2


def test_a_policy_keeps_what_it_names_if_backward_reads_it() -> None:
    """Every second product is kept, of the others three run again; attention does not."""
    layer = compile_block(ledger().layers[1], Recompute("selective-op", reentrant=False))
    assert kept(layer) == {
        "input", "query", "value", "attention", "attention.logsumexp", "attention.rng_state", "gate",
    }  # fmt: skip
    assert count(layer, Gemm, backward=True) == 14 + 3
    assert count(layer, Attention, backward=True) == 1


def test_kernels_of_the_mlp() -> None:
    """silu(gate) * up: one kernel reads two tensors [64, 96] and writes one; backward reads three and writes two."""
    layer = compile_block(ledger().layers[1], Recompute("none"))
    width = TOKENS * 96 * 2
    moved = [
        kernel.moved_bytes
        for op in (*layer.forward, *layer.backward)
        for kernel in op.kernels
        if isinstance(kernel, Pointwise) and any(t.name in ("activated", "grad:up") for t in kernel.writes)
    ]
    assert moved == [3 * width, 5 * width]


def test_a_composed_norm_is_one_kernel() -> None:
    """Op by op in fp32 it is eight kernels; compiled it reads and writes 16 bit, as the fused one does."""
    composed = ledger(norms="composed").layers[1]
    assert sum(op.module == "input_layernorm" for op in composed.forward) == 8
    one = [op for op in compile_block(composed, Recompute("none")).forward if op.name.startswith("input_layernorm")]
    assert len(one) == 1
    assert {t.name for t in one[0].kernels[0].reads} == {"input", "input_layernorm.weight"}  # type: ignore[union-attr]


def test_the_loss_keeps_sixteen_bit_logits() -> None:
    """Eager keeps an fp32 log-probability for each logit; compiled the logits, labels and two numbers a token."""
    head = ledger().layers[-1]
    assert "log_probabilities" in kept(head)
    compiled = compile_loss(head)
    assert kept(compiled) >= {"logits", "log_probabilities.statistics"}
    assert "log_probabilities" not in kept(compiled)
    widest = max(t.num_bytes for op in (*compiled.forward, *compiled.backward) for t in op.writes)
    assert widest == TOKENS * 128 * 2


def test_a_loss_with_collectives_stays_eager() -> None:
    head = shard_ledger(ledger(), PLANS["tp"]).layers[-1]
    assert compile_loss(head) is head


def test_layers_that_are_one_object_stay_one() -> None:
    compiled = compile_ledger(ledger(), Recompute("none"), loss=False)
    assert compiled.layers[1] is compiled.layers[2]
    assert compiled.layers[-1] is ledger().layers[-1] or compiled.layers[-1] == ledger().layers[-1]


def test_fewer_kernels_and_bytes_than_eager() -> None:
    eager = ledger().layers[1]
    compiled = compile_block(eager, Recompute("none"))

    def moved(layer: Layer) -> int:
        kernels = [k for op in (*layer.forward, *layer.backward) for k in op.kernels if isinstance(k, Pointwise)]
        return sum(k.moved_bytes for k in kernels)

    assert moved(compiled) < moved(eager)
    assert count(compiled, Pointwise) < count(eager, Pointwise)
    assert count(compiled, Gemm) == count(eager, Gemm)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 20)), max_size=14))
def test_a_cut_parts_source_and_sink_at_least_cost(edges: list[tuple[int, int, int]]) -> None:
    """Nodes 0 to 5 with a capacity of node + 1 each: no path avoids the cut, and no cheaper set of nodes does that."""
    flow = _Flow()
    for node in range(6):
        flow.add(f"{node} in", f"{node} out", node + 1)
    for tail, head, _ in edges:
        flow.add(f"{tail} out", f"{head} in", 1 << 62)
    flow.add("source", "0 in", 1 << 62)
    flow.add("5 out", "sink", 1 << 62)
    found = {int(name.removesuffix(" in")) for name in flow.cut("source", "sink")}

    def parted(cut: set[int]) -> bool:
        seen, stack = set(), [0]
        while stack:
            node = stack.pop()
            if node in seen or node in cut:
                continue
            seen.add(node)
            stack += [head for tail, head, _ in edges if tail == node]
        return 5 not in seen

    assert parted(found)
    choices = [{n for n in range(6) if bits >> n & 1} for bits in range(64)]
    assert sum(n + 1 for n in found) == min(sum(n + 1 for n in cut) for cut in choices if parted(cut))


def test_eager_ledger_is_untouched() -> None:
    whole = ledger()
    before = replace(whole)
    compile_ledger(whole, Recompute("none"), loss=True)
    assert whole == before
