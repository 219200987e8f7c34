"""The loss's temporaries, in bytes a logit: they decide the peak where the vocabulary is large."""

from __future__ import annotations

import pytest

from sim.ir.ledger import Dim, DType, Pointwise, Tensor
from sim.model.loss import (
    chunked_cross_entropy,
    compiled_vocab_cross_entropy,
    cross_entropy,
    fused_cross_entropy,
    kernel_cross_entropy,
    linear_cross_entropy,
    metric,
    vocab_cross_entropy,
)
from sim.model.precision import Precision
from sim.model.tape import Tape, Value

ROWS = (Dim("batch", 2), Dim("seq", 8))
LOGITS = (*ROWS, Dim("vocab", 1000))
LABELS = Tensor("labels", ROWS, "int64")


def run(code: str, dtype: DType = "bf16") -> tuple[Tape, dict[str, str]]:
    """Return the tape after both passes, and the dtypes of the tensors as large as the logits."""
    tape = Tape(Precision.of(dtype, dtype, autocast=False))
    logits = Value(Tensor("logits", LOGITS, dtype))
    if code == "megatron":
        loss = vocab_cross_entropy(tape, logits, LABELS)
    else:
        loss = cross_entropy(tape, logits, LABELS, code=code)
    tape.start_backward(loss)
    for emit in reversed(tape._nodes):
        emit()
    made = [t for op in (*tape.forward, *tape.backward) for t in op.writes]
    return tape, {t.name: t.dtype for t in made if t.shape == LOGITS}


@pytest.mark.parametrize("code", ["torch", "huggingface"])
def test_plain_cross_entropy_makes_four_tensors_beside_16_bit_logits(code: str) -> None:
    """Forward the upcast and log-softmax (kept), backward nll_loss's, log_softmax's, and the cast: 4 4 4 4 2 bytes."""
    tape, made = run(code)
    assert made == {
        "logits.fp32": "fp32", "log_probabilities": "fp32", "grad:log_probabilities": "fp32",
        "grad:logits.fp32": "fp32", "grad:logits": "bf16",
    }  # fmt: skip
    saved = {name for op in tape.forward for name in op.saves}
    assert saved & made.keys() == {"log_probabilities"}


def test_fp32_logits_need_no_casts() -> None:
    _, made = run("torch", "fp32")
    assert list(made) == ["log_probabilities", "grad:log_probabilities", "grad:logits"]


def test_the_callers_logits_live_until_the_loss_is_there() -> None:
    tape, _ = run("torch")
    assert {"logits", "logits.fp32"} <= set(tape.forward[-1].reads)


def test_megatron_makes_one_fp32_tensor_and_the_gradient() -> None:
    """The fp32 copy becomes the softmax, then the gradient, in place: 4 bytes kept and 2 made."""
    tape, made = run("megatron")
    assert made == {"softmax": "fp32", "grad:logits": "bf16"}
    assert {name for op in tape.forward for name in op.saves} == {"softmax", "loss.target_mask", "loss.masked_target"}


def test_hugging_face_shifts_the_labels_into_a_tensor_that_is_kept() -> None:
    tape, _ = run("huggingface")
    assert tape.forward[0].writes == (Tensor("shifted_labels", ROWS, "int64"),)
    assert "shifted_labels" in tape.forward[-1].saves


def test_a_fused_loss_makes_nothing_as_large_as_the_logits() -> None:
    """Transformer Engine and Liger: forward writes the gradient over the logits, which are what is kept."""
    tape = Tape(Precision.of("bf16", "bf16", autocast=False))
    logits = Value(Tensor("logits", LOGITS, "bf16"))
    tape.start_backward(fused_cross_entropy(tape, logits, LABELS))
    for emit in reversed(tape._nodes):
        emit()
    made = [t for op in (*tape.forward, *tape.backward) for t in op.writes if t.shape == LOGITS]
    assert not made
    assert {name for op in tape.forward for name in op.saves} == {"logits"}


def test_a_kernels_loss_makes_one_gradient_and_no_fp32_logits() -> None:
    """flash-attn: 2 bytes a logit kept and 2 made; of a row the log-sum-exp in fp32."""
    tape = Tape(Precision.of("bf16", "bf16", autocast=False))
    logits = Value(Tensor("logits", LOGITS, "bf16"))
    tape.start_backward(kernel_cross_entropy(tape, logits, LABELS))
    for emit in reversed(tape._nodes):
        emit()
    made = {t.name: t.dtype for op in (*tape.forward, *tape.backward) for t in op.writes if t.shape == LOGITS}
    assert made == {"grad:logits": "bf16"}
    assert {name for op in tape.forward for name in op.saves} == {"logits", LABELS.name, "loss.log_sum_exp"}


@pytest.mark.parametrize(("vocab", "hidden", "piece"), [(1000, 100, 2), (1000, 1000, 16), (1000, 500, 8)])
def test_linear_fused_never_has_more_logits_than_a_piece(vocab: int, hidden: int, piece: int) -> None:
    """next_power_of_2(16 tokens / ceil(vocab / hidden)): 16/10 -> 2, 16/1 -> 16, 16/2 -> 8."""
    tape = Tape(Precision.of("bf16", "bf16", autocast=False))
    x = Value(Tensor("normed", (*ROWS, Dim("hidden", hidden)), "bf16"))
    linear_cross_entropy(tape, x, LABELS, module="head", rows=(Dim("vocab", vocab),))
    (op,) = [op for op in tape.forward if op.name == "loss"]
    assert [t.num_bytes for t in op.scratch] == [2 * piece * vocab]
    assert [t.num_bytes for t in op.keeps] == [2 * 16 * hidden, 2 * vocab * hidden]


def test_chunks_upcast_one_piece_at_a_time() -> None:
    tape = Tape(Precision.of("bf16", "bf16", autocast=False))
    x = Value(Tensor("normed", (*ROWS, Dim("hidden", 4)), "bf16"))
    chunked_cross_entropy(tape, x, LABELS, module="head", rows=(Dim("vocab", 1000),), chunks=4)
    upcasts = [t for op in tape.forward for t in op.writes if t.name.endswith(".fp32")]
    assert [t.num_bytes for t in upcasts] == [4 * 2 * 2 * 1000] * 4
    last_reader = {name: op.name for op in tape.forward for name in op.reads}
    assert [last_reader[t.name] for t in upcasts] == [f"loss.{i}" for i in range(4)]


def test_compiled_vocab_cross_entropy_makes_one_fp32_tensor_more_in_backward() -> None:
    """Inductor's index_put of calculate_gradients: softmax 4, its update 4, gradient 2 bytes a logit."""
    tape = Tape(Precision.of("bf16", "bf16", autocast=False))
    loss = compiled_vocab_cross_entropy(tape, Value(Tensor("logits", LOGITS, "bf16")), LABELS)
    tape.start_backward(loss)
    for emit in reversed(tape._nodes):
        emit()
    (back,) = (op for op in tape.backward if op.name == "loss.backward")
    live = {t.name: t.num_bytes // 16000 for t in (*back.writes, *back.scratch)}
    assert live == {"grad:logits": 2, "loss.updated": 4}
    assert "softmax" in back.reads


def test_a_metric_comes_after_backward_and_keeps_nothing() -> None:
    """Logits in 16 bit, their fp32 copy and its log-softmax: 10 bytes a logit for a moment; 14 moved (2 + 4, 4 + 4)."""
    tape = Tape(Precision.of("bf16", "bf16", autocast=False))
    metric(tape, Tensor("metrics.logits", LOGITS, "bf16"), LABELS)
    (op,) = tape.backward
    assert (tape.forward, op.writes, op.reads) == ([], (), ())
    number = 2 * 8 * 1000
    assert sum(t.num_bytes for t in op.scratch) == 10 * number + 4
    moved = sum(k.moved_bytes for k in op.kernels if isinstance(k, Pointwise))
    assert moved == 14 * number + LABELS.num_bytes + 4
