"""Linears in 8 and 4 bits: which products, what is kept, what is gathered, and when weights are quantised."""

from __future__ import annotations

import pytest

from sim.ir.ledger import Gemm, Layer, Op, Pointwise, Tensor
from sim.model.transformer import describe
from sim.parallel.emit import Recompute, plan_layer
from sim.parallel.quantise import Recipe, cast_kernels, linears, low_weights, quantise, recipe_of
from sim.parallel.shard import ShardPlan, shard
from sim.scenario.schema import ModelConfig, Training

HOPPER, BLACKWELL = (9, 0), (10, 0)
LLAMA = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=128,
)  # fmt: skip
GPT = LLAMA.model_copy(
    update={
        "hidden_act": "gelu", "norm": "layernorm", "position": "learned", "num_key_value_heads": 4,
        "attention_bias": True, "attention_output_bias": True, "mlp_bias": True,
    }
)  # fmt: skip
TOKENS = 32
RECIPES = {
    "delayed on Hopper": recipe_of("fp8", "delayed", HOPPER),
    "tensorwise on Hopper": recipe_of("fp8", "tensorwise", HOPPER),
    "blockwise": recipe_of("fp8", "blockwise", HOPPER),
    "delayed on Blackwell": recipe_of("fp8", "delayed", BLACKWELL),
    "mxfp8": recipe_of("mxfp8", "delayed", BLACKWELL),
    "nvfp4": recipe_of("nvfp4", "delayed", BLACKWELL),
}


def block(model: ModelConfig = LLAMA, code: str = "megatron", norms: str | None = None) -> Layer:
    training = Training(
        sequence_length=TOKENS, micro_batch_size=1, global_batch_size=1, precision="bf16", attention="flash-2",
        code=code, norms=norms,  # type: ignore[arg-type]
    )  # fmt: skip
    ledger = describe(model, training, parameter_dtype="bf16", compute_dtype="bf16", autocast=False)
    return ledger.layers[1]


def saved(layer: Layer) -> dict[str, int]:
    """Bytes of the tensors that autograd keeps, each once."""
    tensors = {t.name: t for op in layer.forward for t in (*op.writes, *op.keeps)}
    if layer.input is not None:
        tensors[layer.input.name] = layer.input
    return {name: tensors[name].num_bytes for op in layer.forward for name in op.saves}


def gemms(layer: Layer) -> list[tuple[str, Gemm]]:
    return [(op.name, k) for op in (*layer.forward, *layer.backward) for k in op.kernels if isinstance(k, Gemm)]


def op(layer: Layer, name: str) -> Op:
    return next(o for o in (*layer.forward, *layer.backward) if o.name == name)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    ("model", "norms"), [(LLAMA, None), (LLAMA, "composed"), (GPT, None)], ids=["llama", "composed", "gpt"]
)
@pytest.mark.parametrize("plan", [ShardPlan(), ShardPlan(tp=2), ShardPlan(tp=2, sp=True)], ids=["tp1", "tp2", "sp"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "each_pass"])
def test_all_products_are_low_and_everything_lives_and_dies(
    recipe: Recipe, model: ModelConfig, norms: str | None, plan: ShardPlan, cached: bool
) -> None:
    """Four linears, three products each; the plan of the layer's life finds every tensor that an op reads."""
    layer = quantise(shard(block(model, norms=norms), plan), recipe, cached_weights=cached)
    assert [k.dtype for _, k in gemms(layer)] == [recipe.gemm] * 12
    for recompute in ("none", "selective", "full"):
        made = plan_layer(layer, Recompute(recompute), "bf16")
        steps = [s for s in (*made.forward, *made.backward) if isinstance(s, tuple)]
        allocs = sorted(slot for verb, slot, _ in steps if verb == "alloc")
        frees = sorted(slot for verb, slot, _ in steps if verb == "free")
        # the input's gradient and the output go to the neighbours, the parameters' gradients to the framework
        given = {2, 3, 1, *(slot for verb, slot, _ in steps if verb == "gradient")}
        assert [s for s in allocs if s not in given] == [s for s in frees if s not in given and s != 0]


@pytest.mark.parametrize(
    ("recipe", "unit"),
    [("delayed on Hopper", 1.0), ("delayed on Blackwell", 1.0), ("mxfp8", 1 + 1 / 32), ("nvfp4", 0.5 + 1 / 16)],
)
def test_inputs_of_linears_are_kept_in_low_precision(recipe: str, unit: float) -> None:
    """Normed inputs [32, 64] twice, attention's output [32, 64] and the activation [32, 96] in ``unit`` bytes; the
    16-bit output of attention stays as well, for attention's own backward."""
    before, after = saved(block()), saved(quantise(block(), RECIPES[recipe], cached_weights=True))
    low = sum(after.values()) - sum(v for name, v in before.items() if name in after)
    assert low == int(TOKENS * (64 + 64 + 64 + 96) * unit)
    assert set(before) - set(after) == {"normed1", "normed2", "activated"}


def test_hopper_keeps_columns_and_blackwell_rows() -> None:
    hopper = saved(quantise(block(), RECIPES["delayed on Hopper"], cached_weights=True))
    blackwell = saved(quantise(block(), RECIPES["delayed on Blackwell"], cached_weights=True))
    assert {"normed1.columns", "activated.columns"} <= set(hopper)
    assert {"normed1.rows", "activated.rows"} <= set(blackwell)


def test_a_norm_writes_eight_bits_only_with_scales_known_before() -> None:
    """Delayed scaling: [32, 64] in one byte from the norm, then a transposing kernel; else 16 bit, then a cast."""
    fused = quantise(block(), RECIPES["delayed on Hopper"], cached_weights=True)
    norm = op(fused, "self_attention.linear_qkv.layer_norm")
    assert [(t.name, t.num_bytes) for t in norm.writes] == [("normed1.rows", TOKENS * 64)]
    assert op(fused, "normed1.columns.transpose").kernels[0].moved_bytes == 2 * TOKENS * 64  # type: ignore[union-attr]
    plain = quantise(block(), RECIPES["tensorwise on Hopper"], cached_weights=True)
    assert op(plain, "self_attention.linear_qkv.layer_norm").writes[0].num_bytes == 2 * TOKENS * 64
    # the norm knows the largest value; of the activation it must be found first
    assert len(op(plain, "normed1.quantise").kernels) == 1
    assert len(op(plain, "activated.quantise").kernels) == 2


@pytest.mark.parametrize(("recipe", "gathers"), [("delayed on Hopper", 6), ("mxfp8", 8), ("nvfp4", 8)])
def test_sequence_parallelism_gathers_low_precision(recipe: str, gathers: int) -> None:
    """Two inputs in forward and again in backward, two gradients; columns apart where blocks have scales: two more."""
    chosen = RECIPES[recipe]
    layer = quantise(shard(block(), ShardPlan(tp=2, sp=True)), chosen, cached_weights=True)
    found = [o for o in (*layer.forward, *layer.backward) if o.exchange and o.exchange.kind == "all_gather"]
    assert len(found) == gathers
    assert {o.exchange.tensor.num_bytes for o in found if o.exchange} == {chosen.num_bytes(TOKENS * 64)}
    scatters = [o for o in (*layer.forward, *layer.backward) if o.exchange and o.exchange.kind == "reduce_scatter"]
    assert all(o.exchange.tensor.dtype == "bf16" for o in scatters if o.exchange)


def test_weights_that_no_framework_keeps_are_quantised_in_each_pass_and_saved() -> None:
    """Two copies of each of the four weights, kept for backward; their 16-bit originals are parameters."""
    each = quantise(block(), RECIPES["delayed on Hopper"], cached_weights=False)
    kept = saved(each)
    sizes = {p.name: p.num_elements for p in each.parameters}
    for module, weight in linears(block()).items():
        assert kept[f"{weight}.low"] == 2 * sizes[weight]
        assert f"{weight}.low" in op(each, f"{module}.grad_input").reads
    assert not any(name.endswith(".low") for name in saved(quantise(block(), RECIPES["mxfp8"], cached_weights=True)))


def test_low_weights_are_those_of_the_quantised_linears() -> None:
    layer = quantise(block(), RECIPES["nvfp4"], cached_weights=True)
    sizes = {p.name: p.num_elements for p in layer.parameters}
    assert low_weights(layer, RECIPES["nvfp4"]) == {
        module: (sizes[weight], sizes[weight] * 9 // 8) for module, weight in linears(block()).items()
    }
    assert low_weights(block(), RECIPES["nvfp4"]) == {}


@pytest.mark.parametrize(
    ("recipe", "copies", "moved"),
    [
        ("delayed on Hopper", 2, 2 + 1 + 1),
        ("tensorwise on Hopper", 2, 2 + 2 + 1 + 1),
        ("delayed on Blackwell", 1, 2 + 1),
        ("nvfp4", 2, 2 + 2 * (2 + 9 / 16)),
    ],
)
def test_bytes_that_quantising_moves(recipe: str, copies: int, moved: float) -> None:
    kernels = cast_kernels(RECIPES[recipe], 1024, copies)
    assert sum(k.moved_bytes for k in kernels if isinstance(k, Pointwise)) == 1024 * moved


def test_a_tensor_of_odd_size_rounds_up() -> None:
    assert RECIPES["nvfp4"].num_bytes(1) == 1
    assert Tensor("x", (), "fp8").num_bytes == 1


def test_a_gradient_that_was_added_to_is_quantised_again() -> None:
    """The residual's gradient is fc2's, and after an addition in place the projection's: two values, two casts."""
    layer = quantise(block(), RECIPES["mxfp8"], cached_weights=True)
    assert sum(o.name == "grad:output.quantise" for o in layer.backward) == 2
    assert sum(o.name.endswith(".quantise") for o in layer.backward) == 4


@pytest.mark.parametrize("name", ["delayed on Hopper", "tensorwise on Hopper", "blockwise"])
def test_products_of_gradients_promote_their_sums(name: str) -> None:
    """``use_split_accumulator``: in forward with scales of blocks alone (common/recipe; module/base.py, _2X_ACC_)."""
    low = quantise(block(), RECIPES[name], cached_weights=True)
    for op_name, kernel in gemms(low):
        assert kernel.promotes == (name == "blockwise" or ".grad_" in op_name)
