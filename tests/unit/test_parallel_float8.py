"""torchao's FP8 linears: casts, what is kept, what travels, and what FSDP2 gathers."""

from __future__ import annotations

import pytest

from sim.ir.ledger import Gemm, Layer, Op, Pointwise, size
from sim.ir.program import Collective
from sim.model.transformer import describe
from sim.parallel.emit import NO_RECOMPUTE, Emitter, Recompute, plan_layer
from sim.parallel.float8 import Granularity, float8, float8_ledger
from sim.parallel.frameworks.fsdp2 import Fsdp2
from sim.parallel.frameworks.plan import Plan
from sim.parallel.fuse import compile_block
from sim.parallel.shard import ShardPlan, shard
from sim.scenario.schema import Fsdp2Settings, ModelConfig, Training

LLAMA = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=128,
)  # fmt: skip
TOKENS = 32
TRAINING = Training(
    sequence_length=TOKENS, micro_batch_size=1, global_batch_size=1, precision="bf16", attention="flash-2",
    code="torch",
)  # fmt: skip
LEDGER = describe(LLAMA, TRAINING, parameter_dtype="bf16", compute_dtype="bf16", autocast=False)
SEQUENCE_PARALLEL = ShardPlan(tp=2, sp=True, style="dtensor", prepare_module_input=True)


def of(
    granularity: Granularity = "tensorwise", plan: ShardPlan | None = None, *, low: bool = False, shared: bool = False
) -> Layer:
    return float8(shard(LEDGER.layers[1], plan or ShardPlan()), granularity, gathered_low=low, shared=shared)


def ops(layer: Layer, word: str) -> list[Op]:
    return [op for op in (*layer.forward, *layer.backward) if word in op.name]


def kept(layer: Layer) -> dict[str, int]:
    tensors = {t.name: t for op in layer.forward for t in (*op.writes, *op.keeps)}
    assert layer.input is not None
    tensors[layer.input.name] = layer.input
    return {name: tensors[name].num_bytes for op in layer.forward for name in op.saves}


@pytest.mark.parametrize("granularity", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("plan", [ShardPlan(), SEQUENCE_PARALLEL], ids=["one", "sp"])
@pytest.mark.parametrize("low", [False, True], ids=["bf16_weights", "fp8_weights"])
@pytest.mark.parametrize("recompute", ["none", "selective-op", "full"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_all_products_are_low_and_lives_close(
    granularity: Granularity, plan: ShardPlan, low: bool, recompute: str, compiled: bool
) -> None:
    layer = of(granularity, plan, low=low, shared=compiled)
    products = [k for op in (*layer.forward, *layer.backward) for k in op.kernels if isinstance(k, Gemm)]
    assert [k.dtype for k in products] == ["fp8"] * 21
    mode = Recompute(recompute, reentrant=False)  # type: ignore[arg-type]
    if compiled:
        layer, mode = compile_block(layer, mode), NO_RECOMPUTE
    made = plan_layer(layer, mode, "bf16")
    steps = [s for s in (*made.forward, *made.backward) if isinstance(s, tuple)]
    given = {1, 3, *(slot for verb, slot, _ in steps if verb == "gradient")}
    allocs = sorted(slot for verb, slot, _ in steps if verb == "alloc" and slot not in given)
    assert allocs == sorted(slot for verb, slot, _ in steps if verb == "free" and slot not in given | {0, 2})


@pytest.mark.parametrize("kernel", ["math", "flash-2"])
def test_no_tensor_is_written_twice(kernel: str) -> None:
    """What attention casts to 16 bit and what is made of its result in 8 are two tensors."""
    training = TRAINING.model_copy(update={"attention": kernel})
    ledger = describe(LLAMA, training, parameter_dtype="bf16", compute_dtype="bf16", autocast=False)
    layer = float8(ledger.layers[1], "tensorwise", gathered_low=False, shared=False)
    made = [t.name for op in layer.forward for t in (*op.writes, *op.keeps)]
    assert len(made) == len(set(made))


def test_eager_keeps_sixteen_bit_inputs() -> None:
    """Float8Linear saves its input as it came, so no fewer bytes than in 16 bit."""
    assert kept(of()) == kept(LEDGER.layers[1])


def test_a_tensor_is_cast_once_a_pass() -> None:
    """Query, key and value read one input, gate and up another: four casts of inputs, seven of weights, in forward."""
    forward = [op for op in of().forward if op.name.endswith(".cast") and "rope" not in op.name]
    assert len(forward) == 4 + 7
    assert len([op for op in of(low=True).forward if op.name.endswith(".cast") and "rope" not in op.name]) == 4


def test_backward_needs_the_other_order_of_all_three_operands() -> None:
    """A transposed copy, or a cast anew, of seven gradients' tensors, four inputs and seven weights."""
    columns = {t.name for op in of(shared=True).backward for t in op.writes if t.name.endswith(".columns")}
    assert len(columns) == 7 + 4 + 7


@pytest.mark.parametrize(("granularity", "dtype"), [("tensorwise", "fp8"), ("rowwise", "bf16")])
def test_what_tensor_parallel_ranks_gather(granularity: Granularity, dtype: str) -> None:
    layer = of(granularity, SEQUENCE_PARALLEL)
    gathers = [op.exchange for op in ops(layer, "all_gather") if op.exchange is not None]
    assert {exchange.tensor.dtype for exchange in gathers} == {dtype}
    agreed = [op for op in (*layer.forward, *layer.backward) if op.exchange and op.exchange.kind == "all_reduce"]
    assert len(agreed) == (len(gathers) if granularity == "tensorwise" else 0)


def test_compiled_without_checkpoint_drops_what_casts_can_be_made_of() -> None:
    """The product gate * up is only ever cast: not kept. Nor are normed inputs: input and statistics are."""
    names = set(kept(compile_block(of(shared=True), Recompute("none"))))
    assert not {"activated", "normed1", "normed2"} & names
    assert {"gate", "up", "normed1.rstd", "activated.amax"} <= names


def test_the_largest_value_is_a_kernel_before_the_cast() -> None:
    """One number of a whole tensor: the cast that reads it cannot be in the kernel that makes it."""
    layer = compile_block(of(shared=True), Recompute("none"))
    made = {t.name: i for i, op in enumerate(layer.forward) for t in op.writes}
    assert made["activated.amax"] < made["activated.low"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_largest_values_of_columns_are_a_pass_of_their_own(compiled: bool) -> None:
    """18 tensors are cast along columns in backward. Each is read once more before, by a reduction along another
    dimension than any kernel beside it, and the cast that reads what comes of it is a kernel after that one."""
    layer = of("rowwise")
    layer = compile_block(layer, Recompute("none")) if compiled else layer
    at = {op.name: i for i, op in enumerate(layer.backward)}
    largest = [op for op in layer.backward if op.name.endswith(".columns.amax")]
    assert len(largest) == 7 + 4 + 7
    for op in largest:
        (kernel,) = op.kernels
        (cast,) = [o for o in layer.backward if op.writes[0].name in o.reads]
        assert isinstance(kernel, Pointwise) and kernel.kind == "reduce"
        assert [k.kind for k in cast.kernels if isinstance(k, Pointwise)] == ["transpose"]
        assert at[op.name] < at[cast.name]


def test_many_columns_are_reduced_and_cast_by_one_kernel_that_goes_down_them_twice() -> None:
    """At 64 columns an SM and one SM: all but the gradients of key and value (2 heads of 16), 16 of 18. Such a kernel
    reads 16 bits twice and writes 8; nothing else is fused with it."""
    layer = float8(shard(LEDGER.layers[1], ShardPlan()), "rowwise", gathered_low=False, shared=True, num_sms=1)
    layer = compile_block(layer, Recompute("none"))
    wide = [op for op in layer.backward for k in op.kernels if isinstance(k, Pointwise) and k.kind == "columns"]
    assert len(wide) == 16 + 2
    assert sum(op.name.endswith(".columns.amax") for op in layer.backward) == 2
    for op in wide:
        (kernel,) = op.kernels
        assert isinstance(kernel, Pointwise)
        if len(op.writes) == 1:
            assert kernel.moved_bytes == (2 + 2 + 1) * op.writes[0].num_elements


def test_few_columns_of_a_gradient_are_cast_with_its_rows() -> None:
    """At 64 columns an SM and two SMs all seven gradients are narrow (96 columns at most): seven reductions, and seven
    kernels that read 16 bits and write two tensors of 8, and the largest values (4 bytes stand for them)."""
    layer = float8(shard(LEDGER.layers[1], ShardPlan()), "rowwise", gathered_low=False, shared=True, num_sms=2)
    layer = compile_block(layer, Recompute("none"))
    both = [(op, k) for op in layer.backward for k in op.kernels if isinstance(k, Pointwise) and k.kind == "columns"]
    assert len(both) == 7
    assert sum(op.name.endswith(".columns.amax") for op in layer.backward) == 7 + 4 + 7
    for op, kernel in both:
        rows, columns = op.writes
        assert kernel.moved_bytes == (2 + 1 + 1) * rows.num_elements + 4
        assert rows.num_elements == columns.num_elements


def test_scaling_a_result_by_rows_and_columns_is_arithmetic_of_twelve_slow_instructions() -> None:
    """16 a clock and SM take as long as 256 fp32 operations: 12 / 16 * 256 = 192 an element of the result."""
    scaled = [op for op in of("rowwise").backward if any(isinstance(k, Gemm) for k in op.kernels)]
    for op in scaled:
        product, scaling = op.kernels
        assert isinstance(product, Gemm) and isinstance(scaling, Pointwise)
        assert scaling.flops == 192 * size(product.m) * size(product.n)


def test_fsdp_gathers_weights_of_linears_in_one_byte() -> None:
    """A block's matrices in one byte an element, its two norms [64] in two; the shards stay fp32."""
    layers = float8_ledger(LEDGER, "tensorwise", gathered_low=True, shared=False).layers
    sizes = {}
    for low in (False, True):
        plan = Plan(
            dp=8, parameter_dtype="bf16", master=True, num_microbatches=1, optimizer="adamw", gradient_clipping=0.0,
            dp_axis="dp", num_gpus_per_node=8,
        )  # fmt: skip
        hooks = Fsdp2(layers, Fsdp2Settings(float8_all_gather=low), plan)
        hooks.begin_microbatch(first=True, last=True)
        emitter = Emitter(layers, LEDGER.batch_inputs, NO_RECOMPUTE, "bf16")
        passes = emitter.passes(hooks)
        gathers = [i for i in passes.forward if isinstance(i, Collective) and i.kind == "all_gather"]
        sizes[low] = [i.tensor_bytes for i in gathers][1]  # the root first, then the blocks
    matrices = sum(p.num_elements for p in layers[1].parameters) - 2 * 64
    assert sizes == {False: 2 * (matrices + 2 * 64), True: matrices + 2 * 2 * 64}


@pytest.mark.parametrize("granularity", ["tensorwise", "rowwise"])
def test_products_of_gradients_promote_and_are_scaled_afterwards_where_rows_have_scales(
    granularity: Granularity,
) -> None:
    """One more kernel a product of backward, that reads and writes the 16-bit result."""
    layer = of(granularity)
    for op in layer.forward:
        assert not any(k.promotes for k in op.kernels if isinstance(k, Gemm))
    for op in layer.backward:
        for at, kernel in enumerate(op.kernels):
            if isinstance(kernel, Gemm):
                after = op.kernels[at + 1 :]
                assert kernel.promotes
                assert len(after) == (granularity == "rowwise")
                assert all(k.moved_bytes == 2 * 2 * size(kernel.m) * size(kernel.n) for k in after)  # type: ignore[union-attr]
