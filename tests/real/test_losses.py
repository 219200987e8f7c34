"""Live bytes of the head under each way to compute the loss, to the byte, against the same written in plain torch."""

from __future__ import annotations

import pytest

from sim.ir.ledger import Layer
from sim.model.transformer import describe
from sim.scenario.schema import Training
from tests.real.test_live_bytes import replay
from tests.real.test_saved_bytes import EMBEDDINGS, SEQ, norm_on_cpu, torch_dtype

pytestmark = pytest.mark.real

CONFIG = EMBEDDINGS["gpt"]


def head_of(loss: str, dtype: str) -> Layer:
    training = Training.model_validate(
        {
            "sequence_length": SEQ, "micro_batch_size": 1, "global_batch_size": 1, "precision": dtype,
            "attention": "flash-2", "code": "torch", "loss": loss,
        }
    )  # fmt: skip
    ledger = describe(CONFIG, training, parameter_dtype=dtype, compute_dtype=dtype, autocast=False)  # type: ignore[arg-type]
    return ledger.layers[-1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["chunked", "fused", "linear-fused"])
def test_head(loss: str, dtype: str) -> None:
    import torch
    from torch import nn

    from validation.real import losses
    from validation.real.live import LiveBytes

    kind = torch_dtype(dtype)
    norm = nn.LayerNorm(CONFIG.hidden_size).to(kind)
    head = nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size, bias=False).to(kind)
    labels = torch.randint(CONFIG.vocab_size, (1, SEQ))
    leaf = torch.randn(1, SEQ, CONFIG.hidden_size, dtype=kind, requires_grad=True)
    chunked = losses.Chunked(norm, head, 8)

    def run(x: torch.Tensor) -> torch.Tensor:
        if loss == "chunked":
            return chunked(x, labels)
        if loss == "fused":
            return losses.OverLogits.apply(head(norm(x)), labels)  # type: ignore[no-any-return]
        return losses.LinearFused.apply(norm(x), head.weight, labels)  # type: ignore[no-any-return]

    row = CONFIG.vocab_size * 4  # the kernel's registers, which plain torch has in tensors of one row
    with LiveBytes(smallest_bytes=5) as live:
        x = leaf.clone()
        result = run(x)
        forward_peak, kept = live.peak, live.live
        live.peak = 0
        gradient = torch.ones_like(result)
        del x
        result.backward(gradient)
    cause = norm_on_cpu(CONFIG, "torch", (dtype, False), SEQ, CONFIG.hidden_size)
    expected = replay(head_of(loss, dtype), gradient_dtype=dtype)
    held = 2 * SEQ * 4  # the losses and their gradients, which the test itself holds
    scalars = 0
    if loss == "chunked":
        # Under a dispatch mode the engine does not add gradients in place: isTensorSubclassLike of
        # ATen/TensorSubclassLikeUtils.h, asked by torch/csrc/autograd/input_buffer.cpp. One more weight gradient,
        # while the piece's own gradient, of 4 tokens, is gone by then.
        held = (head.weight.numel() - SEQ // 8 * CONFIG.vocab_size) * head.weight.element_size()
        scalars = 4 * (8 + 1)  # of each piece the total weight, and the loss
    assert (kept, live.peak - held) == (expected[1] + cause - scalars, expected[2] + cause)
    beyond = forward_peak - expected[0] - cause
    if loss == "chunked":
        assert -4 * (8 + 8) <= beyond <= 0  # each piece's loss and weight, scalars that the mode leaves out
    else:
        assert 0 <= beyond <= 3 * row
