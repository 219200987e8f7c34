"""Attention cores and rotary embedding: what each kernel keeps for backward and what its backward needs.

Shapes: q[batch, seq, heads, head_dim], k and v[batch, seq, kv_heads, head_dim], out as q. The key's side of a score
matrix is the dimension ``key_seq``, so that dividing ``seq`` divides queries only. Layouts are not modelled beyond
copies that they force: a transposed view holds no bytes.
"""

from __future__ import annotations

from sim.ir.ledger import Attention, Dim, DType, Gemm, Kernel, Pointwise, Shape, Tensor, size
from sim.model.tape import Tape, Value, cast, dropout, handed_on, pointwise

REGION = "core_attention"
"""What Megatron's selective recompute redoes."""


def _round(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def head_dims(x: Value) -> tuple[Shape, Shape, Shape, Shape]:
    """Return (batch, seq, heads, head_dim) of a query, key or value."""
    batch, seq, heads, head_dim = x.shape
    return (batch,), (seq,), (heads,), (head_dim,)


def key_seq(x: Value) -> Shape:
    """Return the sequence of keys as the key side of a score matrix."""
    return (Dim("key_seq", x.shape[1].size),)


def fused_attention(
    tape: Tape,
    q: Value,
    k: Value,
    v: Value,
    *,
    kernel: str,
    out: str,
    module: str,
    name: str = "",
    causal: bool = True,
    sample_length: int = 0,
) -> Value:
    """One kernel forward, one backward; scores are never in memory, dropout is redone from the random state.

    ``kernel``: flash-1 (its CUDA kernels), flash-triton, flash-2, flash-3, cudnn, or memory-efficient (what SDPA takes
    for fp32, and where there is a bias).
    Saves q, k, v, out, the log-sum-exp in fp32 [batch, heads, seq] and the state of the random generator. ``causal`` is
    False where the mask is a tensor: then nothing is skipped. ``sample_length``: mean tokens of samples packed into the
    sequence; the kernel works on each by itself, as on a batch of them.
    """
    batch, seq, heads, head_dim = head_dims(q)
    kv_heads = k.shape[2:3]
    lse_seq = seq
    if kernel == "memory-efficient":
        # kAlignLSE of the memory-efficient kernels is 32 rows (attention.cu, _efficient_attention_forward)
        lse_seq = (Dim("seq", _round(seq[0].size, 32)),)
    lse = Tensor(f"{out}.logsumexp", batch + heads + lse_seq, "fp32")
    # flash: rng_state int64[2] (flash_api.cpp); SDPA's efficient kernel: seed and offset, an int64 each
    state = Tensor(f"{out}.rng_state", (Dim("state", 2),), "int64")
    result = Value(Tensor(out, q.shape, q.dtype))

    each, query, keys = batch, seq, key_seq(k)
    if 0 < sample_length < size(seq):
        samples = max(1, round(size(seq) / sample_length))
        length = -(-size(seq) // samples)
        each, query, keys = (*batch, Dim("samples", samples)), (Dim("seq", length),), (Dim("key_seq", length),)

    def call(direction: str) -> Attention:
        return Attention(
            kernel, "forward" if direction == "forward" else "backward", each, heads, kv_heads, query, keys,
            head_dim, causal, tape.precision.gemm,
        )  # fmt: skip

    keeps = (lse, state)
    saves = tuple(dict.fromkeys((q.name, k.name, v.name, out, lse.name, state.name)))
    name = name or f"{module}.{REGION}"
    tape.op(
        name, (call("forward"),), reads=tuple(dict.fromkeys((q.name, k.name, v.name))),
        writes=(result.tensor,), saves=saves, keeps=keeps, module=module, region=REGION,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        new = (tape.fresh(q), tape.fresh(k), tape.fresh(v))
        scratch, extra = _backward_scratch(kernel, name, q, k, v)
        tape.back(
            f"{name}.backward", (call("backward"), *extra), reads=(grad.name, *saves), writes=new,
            scratch=scratch, releases=(name,), module=module, region=REGION,
        )  # fmt: skip
        for value, gradient in zip((q, k, v), new, strict=True):
            tape.give(value, gradient, module, REGION)

    tape.node(emit)
    return result


def _backward_scratch(
    kernel: str, name: str, q: Value, k: Value, v: Value
) -> tuple[tuple[Tensor, ...], tuple[Kernel, ...]]:
    """Return what the backward kernel allocates while it runs, and kernels it launches besides itself.

    flash-2: softmax_d fp32[b, h, s_round], dq_accum fp32[b, s_round, h, d_round]; under GQA also dk and dv of all query
    heads in the input's dtype, summed into the results (csrc/flash_attn/flash_api.cpp, mha_bwd; s_round is a multiple
    of 128, d_round of 32 up to 128, then of 64).
    flash-1 and flash-triton (flash_attn_triton.py): delta and an fp32 dq likewise.
    flash-3: dq_accum fp32[b, h, s_round*d_round], softmax_d and log2 of the softmax's sum, fp32[b, h, s_round]; under
    GQA dk and dv accumulators fp32 of the key heads (hopper/flash_api.cpp; head_dim rounded to 64, 96, 128, 192, 256,
    tiles of 128 rows at most).
    cudnn: an fp32 accumulator of dq and the row sums. Its true workspace is not published; flash-2's is assumed.
    memory-efficient: delta fp32[b, h, s]; for fp32 its outputs are the accumulators (attention_backward.cu); for
    16 bit it accumulates dq in fp32 (kernel_backward.h, kNeedsAccumGradQ) [batch, heads, seq, head_dim].
    """
    batch, seq, heads, head_dim = head_dims(q)
    d = head_dim[0].size
    grouped = size(k.shape) != size(q.shape)

    def tensor(what: str, shape: Shape, dtype: DType = "fp32") -> Tensor:
        return Tensor(f"{name}.{what}", shape, dtype)

    if kernel == "memory-efficient":
        delta = tensor("delta", batch + heads + seq)
        if q.dtype == "fp32":
            return (delta,), ()
        return (delta, tensor("dq_accum", q.shape)), ()
    scratch: tuple[Tensor, ...]
    rounded = (Dim("seq", _round(seq[0].size, 128)),)
    if kernel == "flash-3":
        d_round = next((w for w in (64, 96, 128, 192, 256) if d <= w), _round(d, 64))
        width = (Dim("head_dim", d_round),)
        scratch = (
            tensor("dq_accum", batch + heads + rounded + width),
            tensor("softmax_d", batch + heads + rounded),
            tensor("softmax_lse_log2", batch + heads + rounded),
        )
        if grouped:
            accumulator = batch + k.shape[2:3] + rounded + width
            scratch += (tensor("dk_accum", accumulator), tensor("dv_accum", accumulator))
        return scratch, ()
    width = (Dim("head_dim", _round(d, 32) if d <= 128 else _round(d, 64)),)
    scratch = (tensor("softmax_d", batch + heads + rounded), tensor("dq_accum", batch + rounded + heads + width))
    if not grouped:
        return scratch, ()
    dk, dv = tensor("dk_expanded", q.shape, q.dtype), tensor("dv_expanded", q.shape, q.dtype)
    sums = tuple(Pointwise("reduce", (t,), (target.tensor,)) for t, target in ((dk, k), (dv, v)))
    return (*scratch, dk, dv), sums


def to_low(tape: Tape, module: str, q: Value, k: Value, v: Value) -> tuple[Value, Value, Value]:
    """Autocast runs scaled_dot_product_attention in its low dtype: cast what is not in it yet."""
    q, k, v = (
        cast(tape, f"{module}.{n}.cast", x, tape.precision.low, out=f"{n}.low", module=module, region=REGION)
        for n, x in (("query", q), ("key", k), ("value", v))
    )
    return q, k, v


def matmul_scores(
    tape: Tape, name: str, q: Value, k: Value, out: str, *, module: str, heads: Shape, shared: bool = False
) -> Value:
    """scores[batch, heads, seq, key_seq] = q @ k^T, batched over sequences and heads. Saves both.

    ``shared``: they are written into a buffer of the model's that is there anyway.
    """
    batch, seq, _, head_dim = head_dims(q)
    keys = key_seq(k)
    gemm = tape.precision.gemm
    result = Value(Tensor(out, batch + heads + seq + keys, q.dtype))
    tape.op(
        name, (Gemm(seq, keys, head_dim, gemm, batch + heads),), reads=(q.name, k.name),
        writes=() if shared else (result.tensor,),
        saves=tuple(dict.fromkeys((q.name, k.name))), module=module, region=REGION,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        dq, dk = tape.fresh(q), tape.fresh(k)
        tape.back(
            f"{name}.grad_query", (Gemm(seq, head_dim, keys, gemm, batch + heads),), reads=(grad.name, k.name),
            writes=(dq,), module=module, region=REGION,
        )  # fmt: skip
        tape.back(
            f"{name}.grad_key", (Gemm(keys, head_dim, seq, gemm, batch + heads),), reads=(grad.name, q.name),
            writes=(dk,), releases=(name,), module=module, region=REGION,
        )  # fmt: skip
        tape.give(q, dq, module, REGION)
        tape.give(k, dk, module, REGION)

    tape.node(emit)
    return result


def matmul_values(tape: Tape, name: str, scores: Value, v: Value, out: str, *, module: str) -> Value:
    """out[batch, heads, seq, head_dim] = probabilities @ v. Saves both."""
    batch, heads, seq, keys = ((d,) for d in scores.shape)
    head_dim = v.shape[3:4]
    gemm = tape.precision.gemm
    result = Value(Tensor(out, batch + seq + heads + head_dim, v.dtype))
    tape.op(
        name, (Gemm(seq, head_dim, keys, gemm, batch + heads),), reads=(scores.name, v.name),
        writes=(result.tensor,), saves=(scores.name, v.name), module=module, region=REGION,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        dp, dv = tape.fresh(scores), tape.fresh(v)
        tape.back(
            f"{name}.grad_scores", (Gemm(seq, keys, head_dim, gemm, batch + heads),), reads=(grad.name, v.name),
            writes=(dp,), module=module, region=REGION,
        )  # fmt: skip
        tape.back(
            f"{name}.grad_value", (Gemm(keys, head_dim, seq, gemm, batch + heads),), reads=(grad.name, scores.name),
            writes=(dv,), releases=(name,), module=module, region=REGION,
        )  # fmt: skip
        tape.give(scores, dp, module, REGION)
        tape.give(v, dv, module, REGION)

    tape.node(emit)
    return result


def repeat_kv(tape: Tape, name: str, x: Value, heads: Shape, out: str, *, module: str) -> Value:
    """Copy each key (or value) head for every query head of its group: expand and reshape, or repeat_interleave."""
    if x.shape[2].size == heads[0].size:
        return x
    batch, seq, _, head_dim = head_dims(x)
    return pointwise(
        tape, name, (x,), out, shape=batch + seq + heads + head_dim, grads=((),), kind="copy",
        module=module, region=REGION,
    )  # fmt: skip


def contiguous(tape: Tape, name: str, x: Value, out: str, *, module: str) -> Value:
    """A copy into another layout; its gradient is handed back as a view."""
    return handed_on(tape, name, x, out, kind="copy", module=module, region=REGION)


def for_bmm(tape: Tape, module: str, what: str, x: Value) -> Value:
    """``matmul`` folds batch and heads into one dimension: a transposed operand is copied for it, unless there is one
    sequence, when a view serves. Keys and values repeated for GQA are contiguous already."""
    if x.shape[0].size == 1 or f"{what}.repeated" in x.name:
        return x
    return contiguous(tape, f"{module}.{what}.contiguous", x, f"{what}.contiguous", module=module)


def sdpa_math(
    tape: Tape, q: Value, k: Value, v: Value, *, out: str, module: str, p: float, alibi: Tensor | None
) -> Value:
    """``_scaled_dot_product_attention_math``: 16-bit q, k, v are computed in fp32; q and k are each scaled by the
    root of the scale, the mask is added in place, softmax keeps its result, dropout its mask and result.

    Source: aten/src/ATen/native/transformers/attention.cpp (allowFP16BF16ReductionMathSDP is off by default).
    Leaves out: the causal mask itself, [seq, seq] booleans made and dropped in each call.
    """
    heads, repeated = q.shape[2:3], q.shape[2].size != k.shape[2].size
    dtype = q.dtype
    q, k, v = (
        cast(tape, f"{module}.{n}.float", x, "fp32", out=f"{n}.math", module=module, region=REGION)
        for n, x in (("query", q), ("key", k), ("value", v))
    )
    k = repeat_kv(tape, f"{module}.repeat_key", k, heads, "key.repeated", module=module)
    v = repeat_kv(tape, f"{module}.repeat_value", v, heads, "value.repeated", module=module)
    q, k = (
        pointwise(
            tape,
            f"{module}.scale_{n}",
            (x,),
            f"{x.name}.scaled" if repeated else f"{n}.scaled",
            grads=((),),
            module=module,
            region=REGION,
        )
        for n, x in (("query", q), ("key", k))
    )
    q, k = for_bmm(tape, module, "query", q), for_bmm(tape, module, "key", k)
    scores = matmul_scores(tape, f"{module}.scores", q, k, f"{out}.scores", module=module, heads=heads)
    mask = alibi if alibi is not None else Tensor("causal_mask", scores.shape[2:], "fp32")
    tape.op(
        f"{module}.mask", (Pointwise("elementwise", (scores.tensor, mask), (scores.tensor,)),),
        reads=(scores.name,), module=module, region=REGION,
    )  # fmt: skip
    name = f"{out}.probabilities"
    probabilities = pointwise(
        tape, f"{module}.softmax", (scores,), name, grads=((name,),), kind="softmax", module=module, region=REGION
    )  # fmt: skip
    dropped = dropout(tape, f"{module}.dropout", probabilities, p, out=f"{name}.dropped", module=module, region=REGION)
    v = for_bmm(tape, module, "value", v)
    context = matmul_values(tape, f"{module}.{REGION}", dropped, v, f"{out}.heads", module=module)
    result = cast(tape, f"{module}.cast", context, dtype, out=f"{out}.cast", module=module, region=REGION)
    return contiguous(tape, f"{module}.contiguous", result, out, module=module)


def rope_complex(tape: Tape, module: str, q: Value, k: Value, *, table: Tensor) -> tuple[Value, Value]:
    """Rotary embedding as torchtitan writes it: ``view_as_complex(x.float()) * freqs`` back in x's dtype.

    Saves only the table (a buffer). q and k live through the whole function, as its locals do.
    """
    q_out, k_out = "query_rotated", "key_rotated"
    made = []
    for x, what in ((q, "query"), (k, "key")):
        x32 = cast(tape, f"{module}.rope_{what}.float", x, "fp32", out=f"{what}.fp32", module=module)
        made.append((x, x32, what))
    turned = []
    for (x, x32, what), out in zip(made, (q_out, k_out), strict=True):
        turned.append(
            pointwise(
                tape,
                f"{module}.rope_{what}",
                (x32,),
                out if x.dtype == "fp32" else f"{out}.fp32",
                grads=((),),
                constants=(table,),
                module=module,
            )
        )
    dtype: DType = q.dtype
    if dtype == "fp32":
        return turned[0], turned[1]
    held = (q.name, k.name, *(x32.name for _, x32, _ in made), *(t.name for t in turned))
    first = pointwise(
        tape, f"{module}.rope_query.cast", (turned[0],), q_out, grads=((),), dtype=dtype, kind="copy",
        also_reads=held, module=module,
    )  # fmt: skip
    second = pointwise(
        tape, f"{module}.rope_key.cast", (turned[1],), k_out, grads=((),), dtype=dtype, kind="copy",
        also_reads=held, module=module,
    )  # fmt: skip
    return first, second


def alibi_tensor(q: Shape, kernel: str, dtype: DType) -> Tensor:
    """What ALiBi keeps on the GPU for a query of shape [batch, seq, heads, head_dim].

    flash and cudnn kernels take a slope a head, fp32. scaled_dot_product_attention has no slopes, and takes no mask
    beside ``is_causal``: both become one mask [heads, seq, key_seq]. Code that adds to scores itself broadcasts
    [heads, 1, key_seq] (``eager``).
    """
    _, seq, heads, _ = q
    keys = Dim("key_seq", seq.size)
    if kernel == "eager":
        return Tensor("alibi", (heads, keys), dtype)
    if kernel in ("sdpa", "math"):
        return Tensor("alibi", (heads, seq, keys), dtype)
    return Tensor("alibi", (heads,), "fp32")
