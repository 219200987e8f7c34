"""The head's end: logits to loss, with the temporaries that dominate memory at large vocabularies.

Shapes: logits[batch, seq, vocab]; labels int64 [batch, seq].
"""

from __future__ import annotations

from dataclasses import replace

from sim.ir.ledger import DTYPE_BYTES, Dim, Gemm, Kernel, Parameter, Pointwise, Shape, Tensor, size
from sim.model.tape import Tape, Value, cast, pointwise, split

LABELS = "labels"
NUM_OUTPUT_CHUNKS = 8
"""torchtune's default of ``num_output_chunks`` (torchtune/modules/loss/ce_chunked_output_loss.py)."""


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


def metric(tape: Tape, logits: Tensor, labels: Tensor) -> None:
    """A metric of the logits, the last op of a microbatch's backward: ``F.cross_entropy`` as autocast has it, in fp32.

    The trainer holds the logits until then, which is counted here alone. Source: composer/metrics/nlp.py
    (LanguageCrossEntropy, and LanguagePerplexity, which computes it again) and composer/trainer/trainer.py
    (``_eval_train_metrics``, after ``microbatch_loss.backward``), on by default in llm-foundry (``use_train_metrics``).
    """
    upcast, log_probabilities = (replace(logits, name=f"metrics.{n}", dtype="fp32") for n in ("fp32", "log"))
    total = Tensor("metrics.total", (), "fp32")
    tape.back(
        "metrics",
        (
            Pointwise("copy", (logits,), (upcast,)),
            Pointwise("softmax", (upcast,), (log_probabilities,)),
            Pointwise("reduce", (labels,), (total,)),
        ),
        scratch=(logits, upcast, log_probabilities, total),
    )  # fmt: skip


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


def compiled_vocab_cross_entropy(tape: Tape, logits: Value, labels: Tensor) -> Value:
    """Megatron's ``fused_vocab_parallel_cross_entropy`` (``cross_entropy_fusion_impl: native``), compiled functions.

    ``jit_fuser`` is torch.compile from torch 2.2 on. Forward holds what :func:`vocab_cross_entropy` does, in three
    kernels. Backward: of ``grad_2d[rows, targets] -= ...`` Inductor makes an fp32 tensor of its own beside the softmax,
    then scales and casts in one kernel, which writes the softmax too. Read off the code that Inductor of torch 2.13
    writes for these functions; older ones make a second such tensor.
    Source: megatron/core/fusions/fused_cross_entropy.py, megatron/core/jit.py.
    """
    softmax = Tensor("softmax", logits.shape, "fp32")
    mask = Tensor("loss.target_mask", labels.shape, "bool")
    masked = Tensor("loss.masked_target", labels.shape, "int64")
    both = Tensor("loss.both", (*labels.shape, Dim("both", 2)), "fp32")
    loss = Value(Tensor("loss", labels.shape, "fp32"))
    saves = (softmax.name, mask.name, masked.name)
    tape.op(
        "loss",
        (
            Pointwise("reduce", (logits.tensor,), (softmax,)),
            Pointwise("softmax", (softmax, labels), (softmax, mask, masked, both)),
            Pointwise("elementwise", (softmax, both), (softmax,)),
        ),
        reads=(logits.name, labels.name), writes=(loss.tensor, softmax), saves=saves, keeps=(mask, masked),
        scratch=(both,),
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(loss)
        assert grad is not None
        updated = Tensor("loss.updated", logits.shape, "fp32")
        new = tape.fresh(logits)
        tape.back(
            "loss.backward",
            (
                Pointwise("copy", (softmax,), (updated,)),
                Pointwise("scatter", (masked, mask), (masked,)),
                Pointwise("elementwise", (updated, grad), (softmax, new)),
            ),
            reads=(grad.name, *saves), writes=(new,), scratch=(updated,), releases=("loss",),
        )  # fmt: skip
        tape.give(logits, new)

    tape.node(emit)
    return loss


def fused_cross_entropy(tape: Tape, logits: Value, labels: Tensor) -> Value:
    """One kernel that writes the gradient over the logits: no fp32 copy, nothing new in backward.

    Megatron's ``cross_entropy_fusion_impl: te`` and Liger's cross-entropy. Statistics of a row (maximum, sum, target's
    logit) are fp32 and, over a divided vocabulary, gathered at once. Backward scales in place.
    Source: transformer_engine/pytorch/triton/cross_entropy.py up to 2.17 (later ones keep an fp32 gradient beside the
    logits, which this leaves out); liger_kernel/ops/cross_entropy.py.
    """
    loss = Value(Tensor("loss", labels.shape, "fp32"))
    statistics = Tensor("loss.statistics", (*labels.shape, Dim("statistics", 3)), "fp32")
    tape.op(
        "loss",
        (Pointwise("reduce", (logits.tensor,), (statistics,)),
         Pointwise("elementwise", (logits.tensor, statistics), (logits.tensor, loss.tensor))),
        reads=(logits.name, labels.name), writes=(loss.tensor,), saves=(logits.name,), scratch=(statistics,),
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(loss)
        assert grad is not None
        tape.back(
            "loss.backward", (Pointwise("elementwise", (logits.tensor, grad), (logits.tensor,)),),
            reads=(grad.name, logits.name), releases=("loss",),
        )  # fmt: skip
        tape.give(logits, logits.tensor)

    tape.node(emit)
    return loss


def kernel_cross_entropy(tape: Tape, logits: Value, labels: Tensor) -> Value:
    """One kernel for the loss, one for a gradient of its own: flash-attn's ``CrossEntropyLoss``.

    No fp32 copy of the logits: a row's log-sum-exp is kept in fp32, beside the logits and the labels, and backward
    fills a new tensor of the logits' dtype (``inplace_backward`` is False unless asked for).
    Source: flash_attn/losses/cross_entropy.py and csrc/xentropy up to 2.3, ops/triton/cross_entropy.py from 2.4 on.
    """
    loss = Value(Tensor("loss", labels.shape, "fp32"))
    lse = Tensor("loss.log_sum_exp", labels.shape, "fp32")
    saves = (logits.name, labels.name, lse.name)
    tape.op(
        "loss", (Pointwise("reduce", (logits.tensor, labels), (loss.tensor, lse)),),
        reads=(logits.name, labels.name), writes=(loss.tensor,), saves=saves, keeps=(lse,),
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(loss)
        assert grad is not None
        new = tape.fresh(logits)
        tape.back(
            "loss.backward", (Pointwise("elementwise", (logits.tensor, labels, lse, grad), (new,)),),
            reads=(grad.name, *saves), writes=(new,), releases=("loss",),
        )  # fmt: skip
        tape.give(logits, new)

    tape.node(emit)
    return loss


def chunked_cross_entropy(
    tape: Tape, x: Value, labels: Tensor, *, module: str, rows: Shape, chunks: int = NUM_OUTPUT_CHUNKS
) -> Value:
    """The projection and the loss in pieces of the sequence: torchtune's ``CEWithChunkedOutputLoss``.

    All 16-bit pieces of the logits are made first; each is upcast and its log-softmax kept, so that one fp32 copy of a
    piece, not of all, stands beside them. Backward goes through the losses of all pieces, last first, then through the
    projections: each makes a whole weight gradient, which the engine adds to the sum so far.
    Source: torchtune/modules/transformer.py (``chunked_output``), torchtune/modules/loss/ce_chunked_output_loss.py.
    Leaves out: with several sequences a piece is copied to be contiguous.
    """
    pieces = _piece_sizes(labels.shape[1].size, chunks)
    batch, width = x.shape[:1], x.shape[2:]
    parts = split(tape, "chunks", x, tuple((*batch, Dim("seq", n), *width) for n in pieces))
    weight = tape.parameter(f"{module}.weight", rows + width)
    held = tape.low_weight(weight, module)
    logits = [
        Value(Tensor(f"logits.{i}", (*batch, Dim("seq", n), *rows), tape.precision.low)) for i, n in enumerate(pieces)
    ]
    total = Tensor("grad:logits.weight", weight.shape, tape.precision.low)
    for i, (part, out) in enumerate(zip(parts, logits, strict=True)):
        _project(tape, module, part, out, weight, held, total, first=i == len(parts) - 1, last=i == 0)
    loss = Value(Tensor("loss", (), "fp32"))
    losses = []
    for i, out in enumerate(logits):
        target = Tensor(labels.name, (labels.shape[0], Dim("seq", pieces[i])), labels.dtype)
        losses.append(_piece_loss(tape, out, target, i))
    # a sum of numbers; its backward hands the one gradient on
    tape.op(
        "loss", (Pointwise("elementwise", tuple(v.tensor for v in losses), (loss.tensor,)),),
        reads=tuple(v.name for v in (*losses, *logits)), writes=(loss.tensor,),  # the pieces stand in a list meanwhile
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(loss)
        assert grad is not None
        for one in losses:
            tape.give(one, grad)

    tape.node(emit)
    return loss


def _piece_sizes(tokens: int, chunks: int) -> tuple[int, ...]:
    """``tensor_split``: the first pieces are one longer where they do not divide."""
    chunks = min(chunks, tokens)
    least, longer = divmod(tokens, chunks)
    return tuple(least + (i < longer) for i in range(chunks))


def _project(
    tape: Tape, module: str, x: Value, out: Value, weight: Parameter, held: Tensor, total: Tensor, *, first: bool,
    last: bool,
) -> None:  # fmt: skip
    """One piece of the projection; ``first`` and ``last`` in the order of backward, which sums up ``total``."""
    m, n, k, gemm = x.shape[:2], out.shape[2:], x.shape[2:], tape.precision.gemm
    autocast = tape.precision.autocast
    cast_name = (held.name,) if autocast else ()
    tape.op(
        f"{module}.{out.name}", (Gemm(m, n, k, gemm),), reads=(x.name, *cast_name), writes=(out.tensor,),
        saves=(x.name, *cast_name), parameters=(weight.name,), module=module,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(out)
        assert grad is not None
        new = tape.fresh(x)
        name = f"{module}.{out.name}"
        tape.back(
            f"{name}.grad_input", (Gemm(m, k, n, gemm),), reads=(grad.name, *cast_name), writes=(new,),
            parameters=() if autocast else (weight.name,), module=module,
        )  # fmt: skip
        product, reads = (Gemm(n, k, m, gemm),), (grad.name, x.name)
        whole = first and last
        add: tuple[Kernel, ...] = () if first else (Pointwise("elementwise", (total, total), (total,)),)
        if last and not autocast:  # the sum so far and the last summand are both live, whichever is kept
            tape.back(
                f"{name}.grad_weight", product + add, reads=reads if whole else (*reads, total.name),
                gradients=(weight.name,), releases=(name,), module=module,
            )  # fmt: skip
        else:
            piece = Tensor(f"{total.name}.piece", total.shape, total.dtype)
            tape.back(
                f"{name}.grad_weight", product + add, reads=reads if first else (*reads, total.name),
                writes=(total,) if first else (), scratch=() if first else (piece,), releases=(name,), module=module,
            )  # fmt: skip
        if last and autocast:
            tape.back(
                f"{weight.name}.grad.cast", (Pointwise("copy", (total,), (tape.stored(weight),)),),
                reads=(total.name,), gradients=(weight.name,), module=module,
            )  # fmt: skip
        tape.give(x, new, module)

    tape.node(emit)


def _piece_loss(tape: Tape, logits: Value, target: Tensor, index: int) -> Value:
    """``F.cross_entropy(logits.float(), labels, reduction="sum")`` of one piece."""
    upcast = cast(tape, f"loss.{index}.float", logits, "fp32", out=f"{logits.name}.fp32")
    name = f"log_probabilities.{index}"
    log_probabilities = pointwise(
        tape, f"loss.{index}.log_softmax", (upcast,), name, grads=((name,),), kind="softmax"
    )  # fmt: skip
    loss = Value(Tensor(f"loss.{index}", (), "fp32"))
    weight = Tensor(f"loss.{index}.total_weight", (), "fp32")
    saves = (name, target.name, weight.name)
    tape.op(
        loss.name, (Pointwise("reduce", (target,), (loss.tensor, weight)),),
        reads=tuple(dict.fromkeys((name, target.name, upcast.name, logits.name))), writes=(loss.tensor,), saves=saves,
        keeps=(weight,),
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(loss)
        assert grad is not None
        new = tape.fresh(log_probabilities)
        tape.back(
            f"{loss.name}.backward", (Pointwise("elementwise", (), (new,)), Pointwise("scatter", (target,), (target,))),
            reads=(grad.name, *saves), writes=(new,), releases=(loss.name,),
        )  # fmt: skip
        tape.give(log_probabilities, new)

    tape.node(emit)
    return loss


def linear_cross_entropy(tape: Tape, x: Value, labels: Tensor, *, module: str, rows: Shape) -> Value:
    """Projection, loss and their gradients in one pass over pieces of the tokens: Liger's fused linear cross-entropy.

    There are never more logits than one piece of them: next_power_of_2(tokens / ceil(vocab / hidden)) tokens. Forward
    already makes the gradients of the input and of the weight, which live until backward hands them on. Where the
    weight is wider than the products, each piece's weight gradient is made and upcast beside the sum.
    Source: liger_kernel/ops/fused_linear_cross_entropy.py.
    """
    stored, low, gemm = tape.precision.stored, tape.precision.low, tape.precision.gemm
    width, vocab = x.shape[2:], rows[0].size
    weight = tape.parameter(f"{module}.weight", rows + width)
    tokens = size(labels.shape)
    wanted = -(-tokens // -(-vocab // size(width)))
    piece = min(1 << (wanted - 1).bit_length(), tokens)
    count = -(-tokens // piece)
    m = (Dim("tokens", piece),)
    logits = Tensor("logits.piece", m + rows, low)
    grad_input = Tensor("grad:normed.kept", x.shape, x.dtype)
    grad_weight = Tensor(f"grad:{weight.name}.kept", weight.shape, stored)
    scratch = [logits]
    if stored != low or stored == "fp32":  # grad_weight += torch.mm(...).float()
        scratch.append(Tensor("grad:weight.piece", weight.shape, low))
        if DTYPE_BYTES[low] < DTYPE_BYTES["fp32"]:
            scratch.append(Tensor("grad:weight.piece.fp32", weight.shape, "fp32"))
    one: tuple[Kernel, ...] = (
        Gemm(m, rows, width, gemm), Pointwise("softmax", (logits,), (logits,)), Gemm(m, width, rows, gemm),
        Gemm(rows, width, m, gemm),
    )  # fmt: skip
    loss = Value(Tensor("loss", labels.shape, "fp32"))
    kept = (grad_input.name, grad_weight.name)
    tape.op(
        "loss", one * count, reads=(x.name, labels.name), writes=(loss.tensor,), saves=kept,
        keeps=(grad_input, grad_weight), scratch=tuple(scratch), parameters=(weight.name,), module=module,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(loss)
        assert grad is not None
        both = (grad_input, grad_weight)
        tape.back(
            "loss.backward", tuple(Pointwise("elementwise", (t, grad), (t,)) for t in both),
            reads=(grad.name, *kept), releases=("loss",), module=module,
        )  # fmt: skip
        # The kept tensors become the gradients; here they go and come back, so that they are counted once.
        new = tape.fresh(x)
        tape.back(f"{module}.grad_input", (), writes=(new,), gradients=(weight.name,), module=module)
        tape.give(x, new, module)

    tape.node(emit)
    return loss
