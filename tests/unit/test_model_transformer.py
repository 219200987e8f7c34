"""The description of a transformer: published parameter counts, FLOPs, and the grammar of a ledger."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sim.catalog import load
from sim.ir.ledger import Attention, DType, Gemm, Layer, Ledger, Pointwise
from sim.model.transformer import FLOPS_FORMULA, describe, matmul_flops, num_parameters
from sim.scenario.load import load_scenario
from sim.scenario.schema import ModelConfig, Training


def llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: object) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "vocab_size": vocab,
        }
        | more
    )  # fmt: skip


BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}


def gpt2(hidden: int, layers: int, heads: int) -> ModelConfig:
    return llama(
        hidden, 4 * hidden, layers, heads, heads, 50257, hidden_act="gelu", norm="layernorm", position="learned",
        max_position_embeddings=1024, tie_word_embeddings=True, **BIASES,
    )  # fmt: skip


def opt(hidden: int, ffn: int, layers: int, heads: int, **more: object) -> ModelConfig:
    return llama(
        hidden, ffn, layers, heads, heads, 50272, hidden_act="relu", norm="layernorm", position="learned",
        max_position_embeddings=2048, position_offset=2, tie_word_embeddings=True, **BIASES, **more,
    )  # fmt: skip


def bloom(hidden: int, layers: int, heads: int) -> ModelConfig:
    return llama(
        hidden, 4 * hidden, layers, heads, heads, 250880, hidden_act="gelu", norm="layernorm", position="alibi",
        embedding_norm=True, tie_word_embeddings=True, **BIASES,
    )  # fmt: skip


FALCON = {"hidden_act": "gelu", "norm": "layernorm", "parallel_block": True, "tie_word_embeddings": True}
MPT_7B = llama(
    4096, 16384, 32, 32, 32, 50432, hidden_act="gelu", norm="layernorm", norm_bias=False, position="alibi",
    tie_word_embeddings=True,
)  # fmt: skip

# Number of elements in the published checkpoints (tied tensors once), from their safetensors indices on the Hub.
PUBLISHED = {
    "llama-2-7b": (llama(4096, 11008, 32, 32, 32, 32000), 6_738_415_616),
    "llama-2-13b": (llama(5120, 13824, 40, 40, 40, 32000), 13_015_864_320),
    "llama-2-70b": (llama(8192, 28672, 80, 64, 8, 32000), 68_976_648_192),
    "llama-3-8b": (llama(4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "llama-3-70b": (llama(8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "llama-3.1-405b": (llama(16384, 53248, 126, 128, 8, 128256), 405_853_388_800),
    "mistral-7b": (llama(4096, 14336, 32, 32, 8, 32000), 7_241_732_096),
    "tinyllama-1.1b": (llama(2048, 5632, 22, 32, 4, 32000), 1_100_048_384),
    "qwen2.5-7b": (llama(3584, 18944, 28, 28, 4, 152064, attention_bias=True), 7_615_616_512),
    "qwen2.5-0.5b": (
        llama(896, 4864, 24, 14, 2, 151936, attention_bias=True, tie_word_embeddings=True), 494_032_768
    ),
    "qwen3-8b": (llama(4096, 12288, 36, 32, 8, 151936, query_key_norm=True), 8_190_735_360),
    "gpt2": (gpt2(768, 12, 12), 124_439_808),
    "gpt2-medium": (gpt2(1024, 24, 16), 354_823_168),
    "gpt2-xl": (gpt2(1600, 48, 25), 1_557_611_200),
    "opt-125m": (opt(768, 3072, 12, 12), 125_239_296),
    "opt-350m": (opt(1024, 4096, 24, 16, embedding_width=512, final_norm=False), 331_196_416),
    "opt-6.7b": (opt(4096, 16384, 32, 32), 6_658_473_984),
    "bloom-560m": (bloom(1024, 24, 16), 559_214_592),
    "bloom-176b": (bloom(14336, 70, 112), 176_247_271_424),
    "falcon-7b": (llama(4544, 18176, 32, 71, 1, 65024, num_block_norms=1, **FALCON), 6_921_720_704),
    "falcon-40b": (llama(8192, 32768, 60, 128, 8, 65024, **FALCON), 41_303_293_952),
    "mpt-7b": (MPT_7B, 6_649_286_656),
}  # fmt: skip

CODES = ("torch", "huggingface", "megatron")
KERNELS = ("math", "flash-2", "flash-3", "sdpa", "cudnn")
MODES: dict[str, tuple[DType, DType, bool]] = {
    "fp32": ("fp32", "fp32", False),
    "tf32": ("fp32", "tf32", False),
    "bf16": ("bf16", "bf16", False),
    "autocast": ("fp32", "fp16", True),
}


def ledger(
    model: ModelConfig, code: str, kernel: str = "flash-2", mode: str = "bf16", *, batch: int = 2, seq: int = 256
) -> Ledger:
    parameter_dtype, compute_dtype, autocast = MODES[mode]
    training = Training.model_validate(
        {
            "sequence_length": seq, "micro_batch_size": batch, "global_batch_size": batch, "precision": "bf16",
            "attention": kernel, "code": code,
        }
    )  # fmt: skip
    return describe(model, training, parameter_dtype=parameter_dtype, compute_dtype=compute_dtype, autocast=autocast)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_checkpoint(name: str) -> None:
    model, published = PUBLISHED[name]
    assert num_parameters(model) == published


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ledger_owns_as_many_parameters_as_are_counted(name: str, code: str) -> None:
    model, published = PUBLISHED[name]
    # Megatron pads the vocabulary to a multiple of 128, whatever tp is
    rows = -model.vocab_size % 128 if code == "megatron" else 0
    tables = 1 if model.tie_word_embeddings else 2
    assert ledger(model, code).num_parameters == published + rows * tables * (
        model.embedding_width or model.hidden_size
    )


@pytest.mark.parametrize("name", [n for n in load.names("model") if "num_local_experts" not in load.model_config(n)])
def test_every_dense_model_of_the_catalogue_has_its_parameters(name: str, tmp_path: Path) -> None:
    text = (
        f"model: {name}\ncluster: {{node: dgx-h100, num_nodes: 1}}\nframework: deepspeed\n"
        "parallelism: {dp: 8, zero: 3}\n"
        "training: {sequence_length: 512, micro_batch_size: 1, global_batch_size: 8, precision: bf16}\n"
    )
    (tmp_path / "scenario.yaml").write_text(text, encoding="utf-8")
    model = load_scenario(str(tmp_path / "scenario.yaml")).model
    assert num_parameters(model) == load.model_parameters()[name][0] == ledger(model, "torch").num_parameters


def test_blocks_are_one_object() -> None:
    layers = ledger(PUBLISHED["llama-2-70b"][0], "torch").layers
    assert len(layers) == 82
    assert all(layer is layers[1] for layer in layers[1:-1])


# --- FLOPs ---

SMALL = {
    "llama": llama(128, 352, 3, 8, 2, 512),
    "mqa": llama(128, 352, 3, 8, 1, 512),
    "qwen3": llama(128, 352, 3, 8, 2, 512, query_key_norm=True, attention_bias=True),
    "gpt": gpt2(128, 3, 8).model_copy(update={"dropout": 0.1, "attention_dropout": 0.1}),
    "opt_350m": opt(128, 512, 3, 8, embedding_width=64, final_norm=False),
    "bloom": bloom(128, 3, 8),
    "falcon_7b": llama(128, 512, 3, 8, 1, 512, num_block_norms=1, **FALCON),
    "falcon_40b": llama(128, 512, 3, 8, 2, 512, **FALCON),
    "gemma": llama(128, 352, 3, 8, 8, 512, hidden_act="gelu_gated", mlp_bias=True),
    "head_bias": llama(128, 352, 3, 8, 2, 512, head_bias=True, dropout=0.1),
}
EVERY = list(itertools.product(SMALL, CODES, KERNELS, MODES))


def matmuls(layer: Layer, *, backward: bool) -> tuple[int, int]:
    """FLOPs of (projections, attention in full) of one direction."""
    kernels = [k for op in (layer.backward if backward else layer.forward) for k in op.kernels]
    batched = sum(k.flops for k in kernels if isinstance(k, Gemm) and k.batch)
    fused = sum(k.flops * (2 if k.causal else 1) for k in kernels if isinstance(k, Attention))
    return sum(k.flops for k in kernels if isinstance(k, Gemm) and not k.batch), batched + fused


@pytest.mark.parametrize(("name", "code", "kernel", "mode"), EVERY)
def test_forward_flops_are_the_formula_and_backward_doubles_them(name: str, code: str, kernel: str, mode: str) -> None:
    """Formula: 2 FLOPs a weight and token, 4 b s^2 a d a layer. A fused kernel's backward redoes q k^T: 5 for 2.

    Rows that Megatron pads the vocabulary by (to a multiple of 128) are multiplied too, and are not useful.
    """
    model = SMALL[name]
    described = ledger(model, code, kernel, mode)
    forward = [matmuls(layer, backward=False) for layer in described.layers]
    backward = [matmuls(layer, backward=True) for layer in described.layers]
    rows = -model.vocab_size % 128 if code == "megatron" else 0
    padding = 3 * 2 * (2 * 256) * rows * (model.embedding_width or model.hidden_size)  # 2 sequences of 256
    assert 3 * sum(map(sum, forward)) == described.matmul_flops + padding
    assert described.flops_formula == FLOPS_FORMULA
    for (projections, scores), (projections_back, scores_back) in zip(forward, backward, strict=True):
        assert projections_back == 2 * projections
        fused = any(isinstance(k, Attention) for op in described.layers[1].forward for k in op.kernels)
        assert scores_back * 2 == scores * (5 if fused else 4)


def test_flops_of_a_known_case() -> None:
    """Llama-2-7B, one sequence of 4096: 6 * 4096 * (6 738 415 616 - 131 072 000 embedding - 266 240 norms) of weights,
    12 * 32 layers * 4096^2 * 4096 of attention."""
    model = PUBLISHED["llama-2-7b"][0]
    training = Training.model_validate(
        {
            "sequence_length": 4096, "micro_batch_size": 1, "global_batch_size": 1, "precision": "bf16",
            "code": "torch",
        }
    )  # fmt: skip
    weights = 6_738_415_616 - 32000 * 4096 - 65 * 4096
    assert matmul_flops(model, training) == 6 * 4096 * weights + 12 * 32 * 4096**2 * 4096


# --- the grammar of a ledger ---


@pytest.mark.parametrize(("name", "code", "kernel", "mode"), EVERY)
def test_every_ledger_obeys_the_grammar(name: str, code: str, kernel: str, mode: str) -> None:
    """Names are unique and read only when there; what is saved is released once; each parameter gets one gradient."""
    described = ledger(SMALL[name], code, kernel, mode)
    given = {t.name for t in described.batch_inputs}
    for layer in dict.fromkeys(described.layers):
        obeys_grammar(layer, given)


def obeys_grammar(layer: Layer, given: set[str]) -> None:
    parameters = {p.name for p in layer.parameters}
    names = [op.name for op in (*layer.forward, *layer.backward)]
    assert len(names) == len(set(names))
    stored = [t.name for op in (*layer.forward, *layer.backward) for t in (*op.writes, *op.keeps)]
    assert len(stored) == len(set(stored))

    there = given | ({layer.input.name} if layer.input else set())
    for op in layer.forward:
        assert set(op.reads) <= there, op.name
        assert set(op.parameters) <= parameters, op.name
        there |= {t.name for t in op.writes}
        assert set(op.saves) <= there | {t.name for t in op.keeps}, op.name
        assert {t.name for t in op.keeps} <= set(op.saves), op.name
    assert (layer.output is None) == (layer.kind == "head")
    assert layer.output is None or (layer.output.name == "output" and layer.output.name in there)

    saving = {op.name: set(op.saves) for op in layer.forward if op.saves}
    released: list[str] = []
    there = {"grad:output"} if layer.output else set()
    gradients: list[str] = []
    for op in layer.backward:
        held = {name for op_name, names in saving.items() if op_name not in released for name in names}
        assert set(op.reads) <= there | held, (op.name, set(op.reads) - there - held)
        there |= {t.name for t in op.writes}
        released += op.releases
        gradients += op.gradients
    assert sorted(released) == sorted(saving)
    assert sorted(gradients) == sorted(parameters)
    assert ("grad:input" in there) == (layer.input is not None)


# --- activation memory by published formulas ---


def saved(layer: Layer) -> int:
    sizes = {t.name: t.num_bytes for op in layer.forward for t in (*op.writes, *op.keeps)}
    if layer.input is not None:
        sizes["input"] = layer.input.num_bytes
    return sum(sizes[name] for name in sorted({n for op in layer.forward for n in op.saves}))


def test_megatron_keeps_what_korthikanti_counts() -> None:
    """34 sbh + 5 as^2b, "Reducing Activation Recomputation in Large Transformer Models" (2022), equation 1.

    On top, what the paper leaves out as small: mean and rstd of two norms, fp32.
    """
    batch, seq, hidden, heads = 2, 256, 128, 8
    model = gpt2(hidden, 2, heads).model_copy(update={"dropout": 0.1, "attention_dropout": 0.1})
    block = ledger(model, "megatron", "math", batch=batch, seq=seq).layers[1]
    tokens = batch * seq
    assert saved(block) == 34 * tokens * hidden + 5 * heads * seq * seq * batch + 4 * tokens * 4


def test_megatron_with_flash_keeps_a_row_of_statistics_instead_of_scores() -> None:
    """34 sbh - the dropout terms (2 sbh) + attention's result in both layouts (2 sbh); log-sum-exp 4 a s b."""
    batch, seq, hidden, heads = 2, 256, 128, 8
    model = gpt2(hidden, 2, heads)
    block = ledger(model, "megatron", "flash-2", batch=batch, seq=seq).layers[1]
    tokens = batch * seq
    assert saved(block) == 34 * tokens * hidden + 4 * heads * tokens + 16 + 4 * tokens * 4


def test_one_matrix_for_query_key_and_value_is_kept_whole_for_the_sake_of_value() -> None:
    """A view of it is what attention keeps as value: 2 bytes a token and head more of query and of key."""
    model, batch, seq = llama(256, 512, 2, 8, 4, 512), 2, 64
    apart, fused = (ledger(m, "huggingface", "flash-2", batch=batch, seq=seq) for m in (model, _fused(model)))
    assert num_parameters(_fused(model)) == num_parameters(model)
    assert next(op.name for op in fused.layers[1].forward if op.name.endswith("_proj")) == "self_attn.qkv_proj"
    assert saved(fused.layers[1]) - saved(apart.layers[1]) == 2 * batch * seq * (256 + 128)


def _fused(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"fused_qkv": True})


def test_a_fused_softmax_is_one_kernel_and_keeps_two_bytes_a_score() -> None:
    """LlamaAttention's eager code scales, masks, casts, normalises and casts: five kernels, and softmax's fp32 result
    is kept beside its 16-bit copy. One kernel reads scores (2 bytes) and mask (1, alike for all heads), writes 2 bytes.
    """
    model, batch, seq, heads = llama(256, 512, 2, 8, 8, 512), 2, 64, 8
    eager, fused = (
        describe(
            model,
            Training(sequence_length=seq, micro_batch_size=batch, global_batch_size=batch, precision="bf16",
                     attention="math", code="huggingface", softmax=softmax),
            parameter_dtype="bf16", compute_dtype="bf16", autocast=False,
        ).layers[1]
        for softmax in (None, "fused")
    )  # fmt: skip
    between = ("scale", "mask", "float", "softmax", "probabilities.cast")
    assert [op.name for op in eager.forward if op.name in {f"self_attn.{name}" for name in between}] == [
        f"self_attn.{name}" for name in between
    ]
    (op,) = [op for op in fused.forward if op.name in {f"self_attn.{name}" for name in between}]
    (kernel,) = op.kernels
    assert isinstance(kernel, Pointwise)
    scores = batch * heads * seq * seq
    assert sum(t.num_bytes for t in kernel.reads) == 2 * scores + scores // heads
    assert sum(t.num_bytes for t in kernel.writes) == 2 * scores
    assert saved(eager) - saved(fused) == 4 * scores


def test_megatron_without_a_fused_rmsnorm_computes_it_op_by_op() -> None:
    """As many more kernels a norm as LlamaRMSNorm has ops, in a block with two of them; the same matrix products."""
    model = llama(256, 512, 2, 4, 4, 512)
    fused, composed = (
        describe(
            model,
            Training(sequence_length=64, micro_batch_size=1, global_batch_size=1, precision="bf16", attention="flash-2",
                     code="megatron", norms=norms),
            parameter_dtype="bf16", compute_dtype="bf16", autocast=False,
        ).layers[1]
        for norms in (None, "composed")
    )  # fmt: skip
    count = [sum(len(op.kernels) for op in layer.forward) for layer in (fused, composed)]
    assert count[1] - count[0] >= 2 * 5
    assert matmuls(fused, backward=True) == matmuls(composed, backward=True)
    assert [p.num_elements for p in fused.parameters] == [p.num_elements for p in composed.parameters]


def test_torch_llama_block_term_by_term() -> None:
    """bf16, GQA: norm inputs and outputs 8, q 2, k and v 4 kv/a, attention 2, gate, act, up, product 8 f/h, per sbh."""
    model = llama(128, 352, 2, 8, 2, 512)
    batch, seq = 2, 256
    tokens = batch * seq
    wide = tokens * 128 * (8 + 2 + 2) + tokens * 2 * 16 * 4 + tokens * 352 * 8
    small = 2 * tokens * 4 + tokens * 8 * 4 + 16  # rstd of two norms, log-sum-exp, random state
    assert saved(ledger(model, "torch", batch=batch, seq=seq).layers[1]) == wide + small


def test_description_is_fast_and_the_same_each_time() -> None:
    model = PUBLISHED["llama-2-70b"][0]
    assert ledger(model, "torch") == ledger(model, "torch")
