"""What attention kernels keep and allocate, term by term."""

from __future__ import annotations

import pytest

from sim.ir.ledger import Attention, Dim, DType, Op, Tensor
from sim.model.attention import fused_attention
from sim.model.precision import Precision
from sim.model.tape import Tape, Value
from sim.model.transformer import sdpa_backend

BATCH, HEADS, HEAD_DIM = 2, 8, 80


def value(name: str, heads: int, seq: int, dtype: DType, head_dim: int = HEAD_DIM) -> Value:
    kind = "heads" if name == "query" else "kv_heads"
    dims = (Dim("batch", BATCH), Dim("seq", seq), Dim(kind, heads), Dim("head_dim", head_dim))
    return Value(Tensor(name, dims, dtype))


def run(kernel: str, seq: int = 200, kv_heads: int = 8, dtype: DType = "bf16") -> tuple[Op, Op]:
    tape = Tape(Precision.of(dtype, dtype, autocast=False))
    q, k, v = (
        value("query", HEADS, seq, dtype),
        value("key", kv_heads, seq, dtype),
        value("value", kv_heads, seq, dtype),
    )
    out = fused_attention(tape, q, k, v, kernel=kernel, out="attention", module="attn")
    tape._pending[out] = Tensor("grad:attention", out.shape, dtype)
    tape._nodes.pop()()
    return tape.forward[0], tape.backward[0]


def sizes(tensors: tuple[Tensor, ...]) -> dict[str, int]:
    return {t.name.rpartition(".")[2]: t.num_bytes for t in tensors}


@pytest.mark.parametrize("kernel", ["flash-2", "flash-3", "cudnn"])
def test_forward_keeps_a_row_of_fp32_and_the_random_state(kernel: str) -> None:
    forward, backward = run(kernel)
    assert sizes(forward.keeps) == {"logsumexp": 4 * BATCH * HEADS * 200, "rng_state": 16}
    assert set(forward.saves) == {"query", "key", "value", "attention", *(t.name for t in forward.keeps)}
    assert backward.releases == (forward.name,)
    assert [t.name for t in backward.writes] == ["grad:query", "grad:key", "grad:value"]


def test_flash_2_rounds_rows_to_128_and_width_to_32() -> None:
    """200 rows -> 256, 80 wide -> 96; all query heads' dk and dv only where heads are grouped."""
    _, backward = run("flash-2")
    expected = {"softmax_d": 4 * BATCH * HEADS * 256, "dq_accum": 4 * BATCH * 256 * HEADS * 96}
    assert sizes(backward.scratch) == expected
    _, grouped = run("flash-2", kv_heads=2)
    whole = 2 * BATCH * 200 * HEADS * HEAD_DIM
    assert sizes(grouped.scratch) == expected | {"dk_expanded": whole, "dv_expanded": whole}
    assert len(grouped.kernels) == 3  # the kernel and two sums over groups


def test_flash_3_accumulates_grouped_keys_in_fp32_of_their_own_heads() -> None:
    _, backward = run("flash-3", kv_heads=2)
    rows, keys = 4 * BATCH * HEADS * 256, 4 * BATCH * 2 * 256 * 96
    assert sizes(backward.scratch) == {
        "dq_accum": rows * 96, "softmax_d": rows, "softmax_lse_log2": rows, "dk_accum": keys, "dv_accum": keys,
    }  # fmt: skip


def test_the_efficient_kernel_aligns_its_statistics_to_32_rows() -> None:
    forward, backward = run("memory-efficient", dtype="fp32")
    assert sizes(forward.keeps)["logsumexp"] == 4 * BATCH * HEADS * 224
    assert sizes(backward.scratch) == {"delta": 4 * BATCH * HEADS * 200}


def test_backward_is_five_matmuls_to_two() -> None:
    forward, backward = run("flash-2")
    assert backward.flops * 2 == forward.flops * 5
    kernel = forward.kernels[0]
    assert isinstance(kernel, Attention)
    assert kernel.flops * 2 == 2 * 2 * BATCH * HEADS * 200 * 200 * HEAD_DIM


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "biased", "backend"),
    [
        ("bf16", 8, False, "flash-2"), ("bf16", 2, False, "flash-2"), ("bf16", 8, True, "memory-efficient"),
        ("fp32", 8, False, "memory-efficient"), ("fp32", 2, False, "math"),
    ],
)  # fmt: skip
def test_what_sdpa_takes_on_cuda(dtype: DType, kv_heads: int, biased: bool, backend: str) -> None:
    assert sdpa_backend(value("query", 8, 16, dtype), value("key", kv_heads, 16, dtype), biased) == backend
