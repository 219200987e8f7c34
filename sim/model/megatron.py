"""Megatron-Core's block with Transformer Engine: fused modules that keep little.

linear_qkv and linear_fc1 are LayerNormColumnParallelLinear: the norm is theirs, they keep its input, its statistics and
its result. Rotary embedding, SwiGLU or bias-gelu, and bias-dropout-add are one kernel each. The linears that feed
bias-gelu and bias-dropout-add return their bias instead of adding it (``skip_bias_add``).

Sources: megatron/core/transformer/{attention,mlp,transformer_layer,dot_product_attention}.py, megatron/core/fusions/,
transformer_engine/pytorch/module/layernorm_linear.py, transformer_engine/pytorch/attention/.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sim.ir.ledger import Dim, DType, Kernel, Layer, Parameter, Pointwise, Shape, Tensor
from sim.model import attention as core
from sim.model.embedding import TOKENS, lookup, positions
from sim.model.loss import (
    LABELS,
    compiled_vocab_cross_entropy,
    cross_entropy,
    fused_cross_entropy,
    vocab_cross_entropy,
)
from sim.model.mlp import MLP_ACTIVATION
from sim.model.norm import norm
from sim.model.precision import promote
from sim.model.tape import Tape, Value, add, cat, dropout, handed_on, linear, narrow, pointwise, split

if TYPE_CHECKING:
    from sim.model.transformer import Context

QKV = "self_attention.linear_qkv"
FC1 = "mlp.linear_fc1"
SCORES = "attention_scores"
_LOSSES = {"fused": fused_cross_entropy, "vocab-parallel-compiled": compiled_vocab_cross_entropy}


def layers(c: Context) -> tuple[Layer, Layer, Layer]:
    """Return embedding, block and head."""
    return _embedding(c), _block(c), _head(c)


def _embedding(c: Context) -> Layer:
    """word_embeddings + position_embeddings, then dropout (megatron/core/models/common/embeddings)."""
    from sim.model.transformer import add_positions, layer

    tape, d, model = Tape(c.precision), c.dims, c.model
    learned, p = model.position == "learned", model.dropout
    module = "embedding.word_embeddings"
    name = "word_embedding" if learned or p or model.embedding_norm or model.embedding_width else "output"
    x = lookup(tape, module, Tensor(TOKENS, d.rows, "int64"), (d.vocab,), (d.embedding,), out=name)
    if model.embedding_width:
        out = "projected" if learned or p or model.embedding_norm else "output"
        x = linear(tape, "embedding.project_in", x, (d.hidden,), (d.embedding,), bias=False, out=out)
    if model.embedding_norm:
        x = _norm(c, tape, "embedding.norm", x, "embedding_normed" if learned or p else "output")
    if learned:
        rows = Dim("positions", model.max_position_embeddings + model.position_offset)
        indices = positions(tape, (d.seq,))
        where = lookup(
            tape, "embedding.position_embeddings", indices, (rows,), (d.hidden,), out="position_embedding"
        )  # fmt: skip
        x = add_positions(tape, x, where, "embedding" if p else "output", promote(x.dtype, where.dtype))
    x = dropout(tape, "embedding.dropout", x, p, out="output", module="embedding")
    tape.finish_backward(None, x)
    return layer(tape, "embedding", None, x.tensor, buffers=_buffers(c))


def _buffers(c: Context) -> tuple[Tensor, ...]:
    """The rotary angles, fp32 [seq, head_dim] (RotaryEmbedding.forward caches them), or ALiBi's biases.

    Megatron's own core attention writes the scores of every layer into one buffer that stays
    (``get_global_memory_buffer().get_tensor(..., "mpu")`` in megatron/core/transformer/dot_product_attention.py).
    """
    d = c.dims
    found: list[Tensor] = []
    if c.model.position == "rope":
        found.append(Tensor("rotary_pos_emb", (d.seq, d.head_dim), "fp32"))
    if c.model.position == "alibi":
        kernel = "eager" if c.training.attention == "math" else "flash-2"
        found.append(core.alibi_tensor((*d.rows, d.heads, d.head_dim), kernel, c.precision.low))
    if c.local and c.training.attention == "math":
        found.append(Tensor(SCORES, (d.batch, d.heads, d.seq, Dim("key_seq", d.seq.size)), c.precision.low))
    return tuple(found)


def _norm_code(c: Context) -> str:
    """Transformer Engine's kernels, or RMSNorms op by op, as a framework without them computes them."""
    return "huggingface" if c.training.norms == "composed" else "megatron"


def _norm(c: Context, tape: Tape, module: str, x: Value, out: str, *, width: Shape | None = None) -> Value:
    """A norm with a module of its own."""
    return norm(
        tape, module, x, kind=c.model.norm, bias=c.model.norm_bias, code=_norm_code(c), out=out, width=width
    )  # fmt: skip


def _norm_of_linear(c: Context, tape: Tape, module: str, x: Value, out: str) -> Value:
    """The norm inside a LayerNormColumnParallelLinear: its parameters belong to the linear's module."""
    return norm(
        tape, module, x, kind=c.model.norm, bias=c.model.norm_bias, code=_norm_code(c), out=out, inner="layer_norm"
    )  # fmt: skip


def _block(c: Context) -> Layer:
    from sim.model.transformer import layer

    tape, model = Tape(c.precision), c.model
    x = Value(c.hidden("input"))
    first = _norm_of_linear(c, tape, QKV, x, "normed1")
    attended, attended_bias = _attention(c, tape, first)
    if model.parallel_block:
        second = first
        if model.num_block_norms == 2:
            second = _norm_of_linear(c, tape, FC1, x, "normed2")
        mixed, mixed_bias = _mlp(c, tape, second)
        middle = bias_dropout_add(c, tape, "self_attn_bda", attended, x, bias=attended_bias, out="middle")
        result = bias_dropout_add(c, tape, "mlp_bda", mixed, middle, bias=mixed_bias, out="output")
    else:
        middle = bias_dropout_add(c, tape, "self_attn_bda", attended, x, bias=attended_bias, out="middle")
        second = _norm_of_linear(c, tape, FC1, middle, "normed2")
        mixed, mixed_bias = _mlp(c, tape, second)
        result = bias_dropout_add(c, tape, "mlp_bda", mixed, middle, bias=mixed_bias, out="output")
    tape.finish_backward(x, result)
    return layer(tape, "block", x.tensor, result.tensor)


def bias_dropout_add(
    c: Context, tape: Tape, name: str, x: Value, residual: Value, *, bias: Parameter | None, out: str
) -> Value:
    """residual + dropout(x + bias) in one kernel: keeps the mask, if there is dropout.

    Source: megatron/core/fusions/fused_bias_dropout.py (a jitted function; native_dropout's mask is what it keeps).
    Backward: the mask's product is a new tensor, the residual's gradient is the incoming one.
    """
    p = c.model.dropout
    mask = Tensor(f"{name}.mask", x.shape, "bool")
    keeps = (mask,) if p else ()
    result = Value(Tensor(out, x.shape, c.residual_dtype))
    parameters = (bias.name,) if bias else ()
    tape.op(
        name, (Pointwise("elementwise", (x.tensor, residual.tensor), (result.tensor, *keeps), 3, bool(p)),),
        reads=(x.name, residual.name), writes=(result.tensor,), saves=tuple(t.name for t in keeps), keeps=keeps,
        parameters=parameters,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        inner = grad
        if p:
            inner = tape.fresh(x)
            tape.back(
                f"{name}.backward", (Pointwise("elementwise", (grad, mask), (inner,)),), reads=(grad.name, mask.name),
                writes=(inner,), releases=(name,),
            )  # fmt: skip
        if bias is not None:
            tape.back(
                f"{name}.grad_bias", (Pointwise("reduce", (inner,), (tape.stored(bias),)),), reads=(inner.name,),
                gradients=(bias.name,),
            )  # fmt: skip
        tape.give(residual, grad)
        tape.give(x, inner)

    tape.node(emit)
    return result


def _projection(c: Context, tape: Tape, x: Value) -> Value:
    """linear_qkv. Megatron's own linears add the bias in a kernel after the product (``output = output + bias`` in
    megatron/core/tensor_parallel/layers.py), Transformer Engine's in the product's epilogue."""
    d, bias, out = c.dims, c.model.attention_bias, "query_key_value"
    if not (c.local and bias):
        return linear(tape, QKV, x, d.qkv, (d.hidden,), bias=bias, out=out)
    product = linear(tape, QKV, x, d.qkv, (d.hidden,), bias=False, out=f"{out}.product")
    shift = tape.parameter(f"{QKV}.bias", d.qkv, decays=False)
    return _add_bias(tape, f"{QKV}.add_bias", product, shift, QKV, out=out)


def _attention(c: Context, tape: Tape, x: Value) -> tuple[Value, Parameter | None]:
    """SelfAttention: the fused projection, rotary embedding, the core, linear_proj without its bias."""
    d, model, module = c.dims, c.model, "self_attention"
    fused = _projection(c, tape, x)
    query, key = (*d.rows, d.heads, d.head_dim), (*d.rows, d.kv_heads, d.head_dim)
    q, k, v = split(tape, f"{module}.split", fused, (query, key, key), module=module)
    if model.query_key_norm:
        q = _norm(c, tape, f"{module}.q_layernorm", q, "query_normed", width=(d.head_dim,))
        k = _norm(c, tape, f"{module}.k_layernorm", k, "key_normed", width=(d.head_dim,))
    if model.position == "rope":
        table = _buffers(c)[0]
        rope = _rope if c.megatron.apply_rope_fusion else _rope_op_by_op
        q = rope(tape, f"{module}.rope_query", q, "query", table, module)
        k = rope(tape, f"{module}.rope_key", k, "key", table, module)
    out = _core(c, tape, q, k, v)
    proj = f"{module}.linear_proj"
    y = linear(tape, proj, out, (d.hidden,), (d.heads, d.head_dim), bias=False, out="attention_output")
    bias = tape.parameter(f"{proj}.bias", (d.hidden,), decays=False) if model.attention_output_bias else None
    return y, bias


def _rope(tape: Tape, name: str, x: Value, out: str, table: Tensor, module: str) -> Value:
    """``fused_apply_rotary_pos_emb``: one kernel, which keeps nothing but the angles."""
    return pointwise(tape, name, (x,), out, grads=((),), constants=(table,), module=module)


def _rope_op_by_op(tape: Tape, name: str, x: Value, out: str, table: Tensor, module: str) -> Value:
    """``_apply_rotary_pos_emb_bshd``: cat((t * cos + cat((-t2, t1)) * sin, rest)), where nothing rests.

    cos and sin are made of the fp32 angles in every call, times ``mscale``, in x's dtype, and kept by the products. The
    gradients of both slices of x, that of the empty rest too, are filled with zeros to full size.
    Source: megatron/core/models/common/embeddings/rope_utils.py.
    """
    half: Shape = (*x.shape[:3], Dim("head_dim", x.shape[3].size // 2))
    cos, sin = (Tensor(f"{out}.{n}", table.shape, x.dtype) for n in ("cos", "sin"))
    for made in (cos, sin):
        full = Tensor(f"{made.name}.fp32", table.shape, "fp32")
        scaled = replace(full, name=f"{made.name}.scaled")
        kernels = (
            Pointwise("elementwise", (table,), (full,)),
            Pointwise("elementwise", (full,), (scaled,)),
            Pointwise("copy", (scaled,), (made,)),
        )
        tape.op(f"{made.name}", kernels, writes=(made,), scratch=(full, scaled), module=module)
    turning = narrow(tape, f"{name}.slice", x, x.shape, module=module)
    _empty_rest(tape, f"{name}.rest", x, module)
    straight = _times(tape, f"{name}.cos", turning, cos, f"{out}.straight", module)
    first, second = split(tape, f"{name}.chunk", turning, (half, half), module=module)
    minus = pointwise(tape, f"{name}.neg", (second,), f"{out}.minus", grads=((),), module=module)
    turned = cat(tape, f"{name}.cat", minus, first, f"{out}.half", x.shape, module=module)
    crossed = _times(tape, f"{name}.sin", turned, sin, f"{out}.crossed", module)
    rotated = add(tape, f"{name}.add", straight, crossed, x.dtype, out=f"{out}.rotated", module=module)
    return handed_on(tape, name, rotated, out, kind="copy", module=module)


def _times(tape: Tape, name: str, x: Value, factor: Tensor, out: str, module: str) -> Value:
    """x * factor, which is kept."""
    return pointwise(
        tape, name, (x,), out, grads=((factor.name,),), constants=(factor,), also_reads=(factor.name,), module=module
    )  # fmt: skip


def _empty_rest(tape: Tape, name: str, x: Value, module: str) -> None:
    """A slice of no elements: its gradient is a zero for each of x."""

    def emit() -> None:
        new = tape.fresh(x)
        tape.back(f"{name}.backward", (Pointwise("elementwise", (), (new,)),), writes=(new,), module=module)
        tape.give(x, new, module)

    tape.node(emit)


def _core(c: Context, tape: Tape, q: Value, k: Value, v: Value) -> Value:
    """DotProductAttention: fused, or ``math`` with the scaled masked softmax as one kernel.

    The flash backend wants contiguous tensors: views of the fused projection are copied, so that its storage is let
    go after them (transformer_engine/pytorch/attention: ``x.transpose(0, 1).contiguous()``). cuDNN reads query, key and
    value packed per head as they are, and else asks for copies too, as after rotary embedding, or with fewer key heads
    than query heads (``get_qkv_layout`` in dot_product_attention/utils.py: "not_supported").
    """
    module, kernel, d = "self_attention.core_attention", c.training.attention, c.dims
    if kernel == "math":
        return _unfused(c, tape, q, k, v)
    packed = q.name == k.name == v.name and q.shape == k.shape
    if kernel in ("flash-1", "flash-triton", "flash-2", "flash-3", "sdpa") or not packed:
        fused = "query_key_value"
        q, k, v = (
            core.contiguous(tape, f"{module}.{n}", x, f"{n}.contiguous", module=module) if x.name == fused else x
            for n, x in (("query", q), ("key", k), ("value", v))
        )
    chosen = "flash-2" if kernel == "sdpa" else kernel
    if chosen == "cudnn" or d.batch.size == 1:
        return core.fused_attention(
            tape, q, k, v, kernel=chosen, out="attention", module=module, name=module,
            sample_length=c.training.sample_length,
        )  # fmt: skip
    # flash takes and gives [batch, seq, ...]; Megatron's layers are [seq, batch, ...]: what it gives is kept, and its
    # transpose is what the projection keeps (FlashAttention.forward in .../dot_product_attention/backends.py)
    given = core.fused_attention(
        tape, q, k, v, kernel=chosen, out="attention.batch_first", module=module, name=module,
        sample_length=c.training.sample_length,
    )  # fmt: skip
    return core.contiguous(tape, f"{module}.transpose", given, "attention", module=module)


def _unfused(c: Context, tape: Tape, q: Value, k: Value, v: Value) -> Value:
    """baddbmm, FusedScaleMaskSoftmax (keeps its result in 16 bit), dropout, bmm: 5 bytes a score with dropout.

    Source: megatron/core/transformer/dot_product_attention.py, megatron/core/fusions/fused_softmax.py. The matrix of
    scores is Megatron's shared buffer, or with Transformer Engine (UnfusedDotProductAttention) a new tensor. Under
    GQA keys and values are repeated (repeat_interleave).
    """
    module, p, heads = "self_attention.core_attention", c.model.attention_dropout, q.shape[2:3]
    k = core.repeat_kv(tape, f"{module}.repeat_key", k, heads, "key.repeated", module=module)
    v = core.repeat_kv(tape, f"{module}.repeat_value", v, heads, "value.repeated", module=module)
    shared = c.local
    scores = core.matmul_scores(
        tape, f"{module}.scores", q, k, SCORES if shared else "scores", module=module, heads=heads, shared=shared
    )  # fmt: skip
    batches, keys = c.training.micro_batch_size * c.dims.heads.size // c.tp, c.training.sequence_length
    fused = c.megatron.masked_softmax_fusion and batches % batches_of_a_block(keys) == 0
    softmax = _fused_softmax if fused else _torch_softmax
    probabilities = softmax(tape, f"{module}.softmax", scores, "probabilities", module, shared=shared)
    dropped = dropout(tape, f"{module}.dropout", probabilities, p, out="dropped", module=module, region=core.REGION)
    context = core.matmul_values(tape, module, dropped, v, "context", module=module)
    return core.contiguous(tape, f"{module}.contiguous", context, "attention", module=module)


def _fused_softmax(tape: Tape, name: str, scores: Value, out: str, module: str, *, shared: bool) -> Value:
    """ScaledUpperTriangMaskedSoftmax: keeps its result; backward overwrites the gradient that arrives.

    Of each row only what the mask leaves is read (``local_seq``); all of it is written, zeros beyond. Source:
    megatron/fused_kernels and apex, scaled_upper_triang_masked_softmax.h and _cuda.cu ("completely in-place").
    """
    result = Value(Tensor(out, scores.shape, scores.dtype))
    tape.op(
        name, (Pointwise("softmax", (_below(scores.tensor),), (result.tensor,)),),
        reads=() if shared else (scores.name,), writes=(result.tensor,), saves=(out,), module=module,
        region=core.REGION,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        tape.back(
            f"{name}.backward", (Pointwise("softmax", (_below(grad), _below(result.tensor)), (grad,)),),
            reads=(grad.name, out), releases=(name,), module=module, region=core.REGION,
        )  # fmt: skip
        tape.give(scores, grad, module, core.REGION)

    tape.node(emit)
    return result


def batches_of_a_block(keys: int) -> int:
    """Return the score matrices that a thread block takes; a rank's must be a multiple of it, or nothing is fused.

    ``is_kernel_available`` (also 4 at least) and ``get_batch_per_block`` in megatron/core/fusions/fused_softmax.py: 128
    threads, a warp for one row of more than 128 keys, for two of fewer.
    """
    threads = min(1 << (keys - 1).bit_length(), 32)
    return max(4, 128 // threads * (2 if keys <= 128 else 1))


def _torch_softmax(tape: Tape, name: str, scores: Value, out: str, module: str, *, shared: bool) -> Value:
    """``forward_torch_softmax``: to fp32, scaled, masked in place, softmax (keeps its result), and back to 16 bit.

    Each of them is a kernel, forward and backward (masked_fill's gradient is a copy, then filled). The mask is taken to
    be there already. Source: megatron/core/fusions/fused_softmax.py with ``attention_softmax_in_fp32``, as it is
    wherever scores are scaled.
    """
    region, dtype = core.REGION, scores.dtype

    def tensor(what: str, dtype: DType = "fp32") -> Tensor:
        return Tensor(f"{name}.{what}", scores.shape, dtype)

    def step(what: str, source: Tensor, target: Tensor) -> None:
        made = () if source is target else (target,)
        tape.op(
            f"{name}.{what}", (Pointwise("elementwise", (source,), (target,)),), module=module, region=region,
            reads=() if shared and source is scores.tensor else (source.name,), writes=made,
        )  # fmt: skip

    full, scaled, kept = tensor("float"), tensor("scaled"), tensor("float_probabilities")
    result = Value(Tensor(out, scores.shape, dtype))
    step("float", scores.tensor, full)
    step("scale", full, scaled)
    step("mask", scaled, scaled)
    tape.op(
        name, (Pointwise("softmax", (scaled,), (kept,)),), reads=(scaled.name,), writes=(kept,), saves=(kept.name,),
        module=module, region=region,
    )  # fmt: skip
    step("half", kept, result.tensor)

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        up, down = tensor("half.grad"), tensor("grad")
        masked, unscaled, last = tensor("mask.grad"), tensor("scale.grad"), tape.fresh(scores)

        def back(what: str, kind: str, sources: tuple[Tensor, ...], target: Tensor, *releases: str) -> None:
            kernels: tuple[Kernel, ...] = (Pointwise(kind, sources, (target,)),)
            if what == "mask":
                kernels += (Pointwise("elementwise", (target,), (target,)),)
            tape.back(
                f"{name}.{what}.backward", kernels, reads=tuple(t.name for t in sources), writes=(target,),
                releases=releases, module=module, region=region,
            )  # fmt: skip

        back("half", "elementwise", (grad,), up)
        back("softmax", "softmax", (up, kept), down, name)
        back("mask", "elementwise", (down,), masked)
        back("scale", "elementwise", (masked,), unscaled)
        back("float", "elementwise", (unscaled,), last)
        tape.give(scores, last, module, region)

    tape.node(emit)
    return result


def _below(scores: Tensor) -> Tensor:
    """Return what a causal mask leaves of a matrix of scores [..., keys], for a kernel to read: half of it."""
    keys = scores.shape[-1]
    return replace(scores, shape=(*scores.shape[:-1], replace(keys, size=max(1, keys.size // 2))))


def _mlp(c: Context, tape: Tape, x: Value) -> tuple[Value, Parameter | None]:
    """linear_fc1 (gate and up in one matrix), the fused activation, linear_fc2 without its bias.

    bias_swiglu and bias_gelu keep their input only (megatron/core/fusions/fused_bias_{swiglu,gelu}.py). ReLU is not
    fused: it keeps its result.
    """
    d, model = c.dims, c.model
    rows: Shape = (Dim("gate_up", 2), d.ffn) if model.gated else (d.ffn,)
    up = linear(tape, FC1, x, rows, (d.hidden,), bias=False, out="up")
    bias = tape.parameter(f"{FC1}.bias", rows, decays=False) if model.mlp_bias else None
    if model.gated and not c.megatron.bias_swiglu_fusion:
        activated = _gate_op_by_op(c, tape, up, bias)
    else:
        activated = _activation(c, tape, up, bias)
    down = linear(tape, "mlp.linear_fc2", activated, (d.hidden,), (d.ffn,), bias=False, out="mlp_output")
    down_bias = tape.parameter("mlp.linear_fc2.bias", (d.hidden,), decays=False) if model.mlp_bias else None
    return down, down_bias


def _gate_op_by_op(c: Context, tape: Tape, x: Value, bias: Parameter | None) -> Value:
    """``activation_func(x[0]) * x[1]`` of x in two, after a bias is added (megatron/core/transformer/mlp.py, ``glu``).

    Keeps x, and the activation's result; the halves' gradients are put together by a copy.
    """
    module, half = "mlp", (*c.dims.rows, c.dims.ffn)
    if bias is not None:
        x = _add_bias(tape, f"{module}.add_bias", x, bias, module)
    gate, up = split(tape, f"{module}.chunk", x, (half, half), module=module)
    acted = pointwise(
        tape, f"{module}.gate", (gate,), "gate", grads=((gate.name,),), module=module, region=MLP_ACTIVATION
    )  # fmt: skip
    return pointwise(
        tape, f"{module}.activation", (acted, up), "activated", grads=((up.name,), (acted.name,)), module=module,
        region=MLP_ACTIVATION,
    )  # fmt: skip


def _add_bias(tape: Tape, name: str, x: Value, bias: Parameter, module: str, out: str = "") -> Value:
    """x + bias as a new tensor; the bias's gradient is a sum over the tokens."""
    result = Value(Tensor(out or f"{x.name}.biased", x.shape, x.dtype))
    tape.op(
        name, (Pointwise("elementwise", (x.tensor, tape.stored(bias)), (result.tensor,)),), reads=(x.name,),
        writes=(result.tensor,), parameters=(bias.name,), module=module,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        tape.back(
            f"{name}.grad_bias", (Pointwise("reduce", (grad,), (tape.stored(bias),)),), reads=(grad.name,),
            gradients=(bias.name,), module=module,
        )  # fmt: skip
        tape.give(x, grad, module)

    tape.node(emit)
    return result


def _activation(c: Context, tape: Tape, x: Value, bias: Parameter | None) -> Value:
    module = "mlp"
    result = Value(Tensor("activated", (*c.dims.rows, c.dims.ffn), x.dtype))
    saved = result.name if c.model.hidden_act == "relu" else x.name
    parameters = (bias.name,) if bias else ()
    name = f"{module}.activation"
    tape.op(
        name, (Pointwise("elementwise", (x.tensor,), (result.tensor,), 8),), reads=(x.name,), writes=(result.tensor,),
        saves=(saved,), parameters=parameters, module=module, region=MLP_ACTIVATION,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        new = tape.fresh(x)
        held = result.tensor if saved == result.name else x.tensor
        tape.back(
            f"{name}.backward", (Pointwise("elementwise", (grad, held), (new,), 12),), reads=(grad.name, saved),
            writes=(new,), parameters=parameters, releases=(name,), module=module, region=MLP_ACTIVATION,
        )  # fmt: skip
        if bias is not None:
            tape.back(
                f"{name}.grad_bias", (Pointwise("reduce", (new,), (tape.stored(bias),)),), reads=(new.name,),
                gradients=(bias.name,), module=module,
            )  # fmt: skip
        tape.give(x, new, module, MLP_ACTIVATION)

    tape.node(emit)
    return result


def _head(c: Context) -> Layer:
    """final_layernorm, output_layer, the vocabulary-parallel cross-entropy, the mean."""
    from sim.model.transformer import layer

    tape, d, model = Tape(c.precision), c.dims, c.model
    source = Value(c.hidden("input"))
    x = source
    if model.final_norm:
        x = _norm(c, tape, "decoder.final_layernorm", x, "normed")
    if model.embedding_width is not None:
        x = linear(tape, "project_out", x, (d.embedding,), (d.hidden,), bias=False, out="projected")
    logits = linear(tape, "output_layer", x, (d.vocab,), (d.embedding,), bias=model.head_bias, out="logits")
    labels = Tensor(LABELS, d.rows, "int64")
    if c.training.loss == "eager":  # other trainers on such layers: F.cross_entropy of the whole vocabulary
        loss = cross_entropy(tape, logits, labels, code="torch")
    else:
        compute = _LOSSES.get(c.training.loss or "", vocab_cross_entropy)
        loss = compute(tape, logits, labels)
    tape.start_backward(loss)
    tape.finish_backward(source, None)
    tied = (("output_layer.weight", "embedding", "embedding.word_embeddings.weight"),)
    return layer(tape, "head", source.tensor, None, tied=tied if model.tie_word_embeddings else ())
