"""Megatron's ``--no-*-fusion`` options: passes over a tensor counted by hand; what autograd keeps, against torch."""

from __future__ import annotations

import pytest

from sim.ir.ledger import Dim, Gemm, Layer, Op, Pointwise, Tensor
from sim.model.megatron import _rope_op_by_op
from sim.model.precision import Precision
from sim.model.tape import Tape, Value
from sim.model.transformer import describe
from sim.scenario.schema import MegatronSettings, ModelConfig, Training

MODEL = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    head_dim=16, vocab_size=128, tie_word_embeddings=False,
)  # fmt: skip
TRAINING = Training.model_validate(
    {
        "sequence_length": 32, "micro_batch_size": 2, "global_batch_size": 2, "precision": "bf16",
        "attention": "flash-2", "code": "megatron", "loss": "vocab-parallel",
    }
)  # fmt: skip


def block(**settings: bool) -> Layer:
    megatron = MegatronSettings(**settings)
    ledger = describe(
        MODEL, TRAINING, parameter_dtype="bf16", compute_dtype="bf16", autocast=False, megatron=megatron
    )  # fmt: skip
    return ledger.layers[1]


def moved(ops: tuple[Op, ...], prefix: str) -> int:
    """Bytes that kernels of ops called so read and write."""
    return sum(
        k.moved_bytes for op in ops if op.name.startswith(prefix) for k in op.kernels if isinstance(k, Pointwise)
    )  # fmt: skip


def saved(layer: Layer) -> int:
    sizes = {t.name: t.num_bytes for op in layer.forward for t in (*op.writes, *op.keeps)}
    sizes["input"] = layer.input.num_bytes if layer.input else 0
    return sum(sizes[name] for name in {name for op in layer.forward for name in op.saves})


def test_rotary_embedding_op_by_op() -> None:
    """Of x in and out: products 2 + 2, half negated 1, cat 2, sum 3, cat with nothing 2; angles beside it. Backward:
    sin 2, neg 1, chunk 2, cos 2, sum 3, a slice's zeros 1 and copy 2, the empty slice's zeros 1, and its sum 3."""
    x = 2 * 32 * 4 * 16 * 2
    angles = 32 * 16
    fused, parts = block(), block(apply_rope_fusion=False)
    name = "self_attention.rope_query"
    assert moved(fused.forward, name) == 2 * x + 4 * angles
    assert moved(parts.forward, name) == 12 * x + 2 * 2 * angles
    backward = (
        moved(parts.backward, name)
        + sum(
            k.moved_bytes
            for op in parts.backward
            if op.name.endswith(".accumulate") and op.module == "self_attention"
            for k in op.kernels
            if isinstance(k, Pointwise)
        )
        // 2
    )
    assert backward == 17 * x + 2 * 2 * angles
    # cos and sin of query and of key are kept
    assert saved(parts) - saved(fused) == 2 * 2 * 2 * angles


def test_gated_activation_op_by_op() -> None:
    """Of a half: silu 2, product 3 against 3; backward 2 * 3, 3 and a copy of 4 against 5. silu's result is kept."""
    half = 2 * 32 * 96 * 2
    fused, parts = block(), block(bias_swiglu_fusion=False)
    names = ("mlp.activation", "mlp.gate", "mlp.chunk")
    assert sum(moved(fused.forward, n) for n in names) == 3 * half
    assert sum(moved(parts.forward, n) for n in names) == 5 * half
    assert sum(moved(fused.backward, n) for n in names) == 5 * half
    assert sum(moved(parts.backward, n) for n in names) == 13 * half
    assert saved(parts) - saved(fused) == half


def test_products_are_the_same() -> None:
    """Which kernels do the rest changes no matrix product."""

    def products(layer: Layer) -> list[Gemm]:
        return [k for op in (*layer.forward, *layer.backward) for k in op.kernels if isinstance(k, Gemm)]

    assert products(block()) == products(block(apply_rope_fusion=False, bias_swiglu_fusion=False))


@pytest.mark.real
def test_what_torch_keeps_of_rotary_embedding() -> None:
    """The same function in torch keeps cos and sin alone."""
    import torch

    from validation.real import modules

    def rotated(t: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        t, rest = t[..., :16], t[..., 16:]
        cos, sin = (torch.cos(freqs) * 1.0).to(t.dtype), (torch.sin(freqs) * 1.0).to(t.dtype)
        first, second = torch.chunk(t, 2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return torch.cat((t * cos + turned * sin, rest), dim=-1)

    x = torch.randn(2, 32, 4, 16, dtype=torch.bfloat16, requires_grad=True).clone()
    measured = modules.saved_bytes(lambda: rotated(x, modules.rotary_angles(32, 32)[:, None]), [])
    tape = Tape(Precision.of("bf16", "bf16", autocast=False))
    shape = (Dim("batch", 2), Dim("seq", 32), Dim("heads", 4), Dim("head_dim", 16))
    table = Tensor("angles", (Dim("seq", 32), Dim("head_dim", 16)), "fp32")
    _rope_op_by_op(tape, "rope", Value(Tensor("x", shape, "bf16")), "out", table, "")
    sizes = {t.name: t.num_bytes for op in tape.forward for t in op.writes}
    assert measured == sum(sizes[name] for op in tape.forward for name in op.saves)
