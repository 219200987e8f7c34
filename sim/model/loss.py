"""The head's end: logits to loss, with the temporaries that dominate memory at large vocabularies.

Shapes: logits[batch, seq, vocab]; labels int64 [batch, seq].
"""

from __future__ import annotations

from sim.ir.ledger import Pointwise, Tensor
from sim.model.tape import Tape, Value, cast, pointwise

LABELS = "labels"


def cross_entropy(tape: Tape, logits: Value, labels: Tensor, *, code: str) -> Value:
    """``F.cross_entropy(logits.float(), labels)``: log_softmax keeps its result, nll_loss that, the labels, a weight.

    The caller's ``logits`` and their upcast live until the loss is there (they are arguments of a running call).
    Backward: nll_loss fills a zeroed fp32 tensor, log_softmax writes another, then the cast to the logits' dtype.
    ``huggingface`` shifts the labels into a tensor of their own (transformers/loss/loss_utils.py, ForCausalLMLoss).
    Source: torch/nn/functional.py; aten/src/ATen/native/cuda/{SoftMax,NLLLoss2d}.cu.
    """
    target = labels
    if code == "huggingface":
        target = Tensor("shifted_labels", labels.shape, "int64")
        tape.op("loss.shift", (Pointwise("copy", (labels,), (target,)),), reads=(labels.name,), writes=(target,))
    upcast = cast(tape, "loss.float", logits, "fp32", out="logits.fp32")
    log_name = "log_probabilities"
    log_probabilities = pointwise(
        tape, "loss.log_softmax", (upcast,), log_name, grads=((log_name,),), kind="softmax"
    )  # fmt: skip
    weight = Tensor("loss.total_weight", (), "fp32")
    loss = Value(Tensor("loss", (), "fp32"))
    saves = (log_name, target.name, weight.name)
    tape.op(
        "loss", (Pointwise("reduce", (target,), (loss.tensor, weight)),),
        reads=tuple(dict.fromkeys((log_name, target.name, upcast.name, logits.name))), writes=(loss.tensor,),
        saves=saves, keeps=(weight,),
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(loss)
        assert grad is not None
        new = tape.fresh(log_probabilities)
        tape.back(
            "loss.backward", (Pointwise("elementwise", (), (new,)), Pointwise("scatter", (target,), (target,))),
            reads=(grad.name, *saves), writes=(new,), releases=("loss",),
        )  # fmt: skip
        tape.give(log_probabilities, new)

    tape.node(emit)
    return loss


def vocab_cross_entropy(tape: Tape, logits: Value, labels: Tensor) -> Value:
    """Megatron's ``_VocabParallelCrossEntropy``: one fp32 copy of the logits becomes softmax, then gradient.

    The copy is shifted, exponentiated and normalised in place and kept; backward subtracts the targets from it and
    scales it in place, and the engine casts it to the logits' dtype. Also kept: which targets were masked (bool) and
    their indices (int64). Source: megatron/core/tensor_parallel/cross_entropy.py.
    """
    softmax = Tensor("softmax", logits.shape, "fp32")
    mask = Tensor("loss.target_mask", labels.shape, "bool")
    masked = Tensor("loss.masked_target", labels.shape, "int64")
    rows = Tensor("loss.rows", labels.shape, "fp32")
    loss = Value(Tensor("loss", labels.shape, "fp32"))
    saves = (softmax.name, mask.name, masked.name)
    tape.op(
        "loss",
        (
            Pointwise("copy", (logits.tensor,), (softmax,)),
            Pointwise("reduce", (softmax,), (rows,)),
            Pointwise("elementwise", (softmax, rows), (softmax,)),
            Pointwise("gather", (labels,), (mask, masked, rows)),
            Pointwise("elementwise", (softmax,), (softmax,)),
            Pointwise("reduce", (softmax,), (rows,)),
            Pointwise("elementwise", (softmax, rows), (softmax,)),
        ),
        reads=(logits.name, labels.name), writes=(loss.tensor, softmax), saves=saves, keeps=(mask, masked),
        scratch=(rows,),
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(loss)
        assert grad is not None
        tape.back(
            "loss.backward",
            (Pointwise("scatter", (masked, mask), (masked,)), Pointwise("elementwise", (softmax, grad), (softmax,))),
            reads=(grad.name, *saves),
        )  # fmt: skip
        new = tape.fresh(logits)
        tape.back(
            "loss.cast", (Pointwise("copy", (softmax,), (new,)),), reads=(softmax.name,), writes=(new,),
            releases=("loss",),
        )  # fmt: skip
        tape.give(logits, new)

    tape.node(emit)
    return loss
