"""What transformers' eager modules do differently: rotary embedding by halves, eager attention, NewGELU.

Sources: transformers/models/{llama,gpt2,opt,bloom,falcon,mpt}/modeling_*.py, transformers/activations.py,
transformers/integrations/sdpa_attention.py. Shapes as in ``sim.model.attention``.
"""

from __future__ import annotations

from dataclasses import replace

from sim.ir.ledger import Dim, DType, Pointwise, Shape, Tensor
from sim.model.attention import REGION, contiguous, for_bmm, matmul_scores, matmul_values, repeat_kv
from sim.model.names import Names
from sim.model.precision import promote
from sim.model.tape import Tape, Value, add, cast, cat, dropout, handed_on, narrow, pointwise


def rope_half(
    tape: Tape, module: str, q: Value, k: Value, *, cos: Tensor, sin: Tensor
) -> tuple[Value, Value]:  # fmt: skip
    """apply_rotary_pos_emb: x * cos + rotate_half(x) * sin, for q and k. Only cos and sin are saved (buffers)."""
    return (
        _rotate(tape, f"{module}.rope_query", q, "query_rotated", cos=cos, sin=sin, module=module),
        _rotate(tape, f"{module}.rope_key", k, "key_rotated", cos=cos, sin=sin, module=module),
    )


def _rotate(tape: Tape, name: str, x: Value, out: str, *, cos: Tensor, sin: Tensor, module: str) -> Value:
    """rotate_half(x) is cat(-x[d/2:], x[:d/2]): the halves are views whose gradients are zero-filled to full size."""
    dtype = promote(x.dtype, cos.dtype)
    half: Shape = (*x.shape[:3], Dim("head_dim", x.shape[3].size // 2))
    straight = pointwise(
        tape, f"{name}.cos", (x,), f"{out}.straight", grads=((),), constants=(cos,), dtype=dtype, module=module
    )  # fmt: skip
    first = narrow(tape, f"{name}.first", x, half, module=module)
    second = narrow(tape, f"{name}.second", x, half, module=module)
    minus = pointwise(tape, f"{name}.neg", (second,), f"{out}.minus", grads=((),), module=module)
    turned = cat(tape, f"{name}.cat", minus, first, f"{out}.half", x.shape, module=module)
    crossed = pointwise(
        tape, f"{name}.sin", (turned,), f"{out}.crossed", grads=((),), constants=(sin,), dtype=dtype, module=module
    )  # fmt: skip
    return add(tape, name, straight, crossed, dtype, out=out, module=module)


def _expand(tape: Tape, name: str, x: Value, heads: Shape, *, module: str) -> Value:
    """One key head for all query heads is a view (stride 0), even after repeat_kv's reshape; its gradient is summed."""
    view = Value(Tensor(x.name, x.shape[:2] + heads + x.shape[3:], x.dtype))

    def emit() -> None:
        grad = tape.take(view)
        if grad is None:
            return
        new = tape.fresh(x)
        tape.back(
            f"{name}.backward", (Pointwise("reduce", (grad,), (new,)),), reads=(grad.name,), writes=(new,),
            module=module, region=REGION,
        )  # fmt: skip
        tape.give(x, new, module, REGION)

    tape.node(emit)
    return view


def eager_attention(
    tape: Tape, module: str, q: Value, k: Value, v: Value, *, names: Names, out: str, p: float, bias: Tensor,
    fused_softmax: bool = False,
) -> Value:  # fmt: skip
    """eager_attention_forward: keys and values repeated for GQA, scores scaled, masked, softmax (in fp32 where the
    family does), cast back, dropout, product with the values. BLOOM's baddbmm scales and adds ALiBi in the product; the
    mask is added all the same.

    Kept: q, the repeated k and v, softmax's result, its cast (if any), dropout's mask and result. With
    ``fused_softmax`` one kernel goes from the product's scores to probabilities in their dtype.
    """
    heads, repeated = q.shape[2:3], q.shape[2].size != k.shape[2].size
    single = repeated and k.shape[2].size == 1
    k, v = (
        _expand(tape, f"{module}.expand_{n}", x, heads, module=module)
        if single
        else repeat_kv(tape, f"{module}.repeat_{n}", x, heads, f"{n}.repeated", module=module)
        for n, x in (("key", k), ("value", v))
    )
    if tape.precision.autocast:
        low = tape.precision.low
        q = cast(tape, f"{module}.query.cast", q, low, out="query.low", module=module, region=REGION)
        k = cast(tape, f"{module}.key.cast", k, low, out="key.low", module=module, region=REGION)
        v = cast(tape, f"{module}.value.cast", v, low, out="value.low", module=module, region=REGION)
    q, k = for_bmm(tape, module, "query", q), for_bmm(tape, module, "key", k)
    scores = matmul_scores(tape, f"{module}.scores", q, k, "scores", module=module, heads=heads)
    if fused_softmax:
        low_probabilities = _masked_softmax(tape, f"{module}.softmax", scores, "probabilities", bias, module=module)
    else:
        low_probabilities = _eager_softmax(tape, module, scores, q.dtype, names=names, bias=bias)
    dropped = dropout(tape, f"{module}.dropout", low_probabilities, p, out="dropped", module=module, region=REGION)
    v = for_bmm(tape, module, "value", v)
    context = matmul_values(tape, f"{module}.{REGION}", dropped, v, f"{out}.heads", module=module)
    return contiguous(tape, f"{module}.contiguous", context, out, module=module)


def _eager_softmax(tape: Tape, module: str, scores: Value, dtype_after: DType, *, names: Names, bias: Tensor) -> Value:
    """Scale, mask, softmax and what casts it takes, one by one; the result is of ``dtype_after``."""
    scaled = scores
    if names.scale != "fused":
        scaled = pointwise(
            tape, f"{module}.scale", (scores,), "scores.scaled", grads=((),), module=module, region=REGION
        )
    dtype = promote(scaled.dtype, bias.dtype)
    masked = handed_on(
        tape, f"{module}.mask", scaled, "scores.masked", constants=(bias,), dtype=dtype, module=module, region=REGION
    )  # fmt: skip
    variable = masked.name  # replaced by the probabilities only when they are cast
    upcast = names.fp32_softmax or tape.precision.autocast
    if upcast and masked.dtype != "fp16":
        masked = cast(tape, f"{module}.float", masked, "fp32", out="scores.fp32", module=module, region=REGION)
    name = "probabilities"
    # CUDA's softmax reads fp16 and writes fp32 in one kernel, bf16 it does not (aten/src/ATen/native/SoftMax.cpp)
    probabilities = pointwise(
        tape, f"{module}.softmax", (masked,), name, grads=((name,),), kind="softmax",
        dtype="fp32" if upcast else masked.dtype, module=module, region=REGION,
    )  # fmt: skip
    return cast(
        tape, f"{module}.probabilities.cast", probabilities, dtype_after, out=f"{name}.low", module=module,
        region=REGION, also_reads=(variable,),
    )  # fmt: skip


def _masked_softmax(tape: Tape, name: str, scores: Value, out: str, mask: Tensor, *, module: str) -> Value:
    """ScaledMaskedSoftmax: scales, masks and normalises in one kernel, keeps its result in 16 bit.

    The mask is a byte a key and the same for all heads; backward writes over the gradient that arrives ("completely
    in-place"). Source: megatron/fused_kernels and apex, scaled_masked_softmax.h and scaled_masked_softmax_cuda.cu.
    """
    result = Value(Tensor(out, scores.shape, scores.dtype))
    tape.op(
        name, (Pointwise("softmax", (scores.tensor, replace(mask, dtype="bool")), (result.tensor,)),),
        reads=(scores.name,), writes=(result.tensor,), saves=(out,), module=module, region=REGION,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        tape.back(
            f"{name}.backward", (Pointwise("softmax", (grad, result.tensor), (grad,)),), reads=(grad.name, out),
            releases=(name,), module=module, region=REGION,
        )  # fmt: skip
        tape.give(scores, grad, module, REGION)

    tape.node(emit)
    return result


def gelu_new(tape: Tape, module: str, x: Value, *, region: str) -> Value:
    """NewGELUActivation, op by op: 0.5 * x * (1 + tanh(c * (x + 0.044715 * pow(x, 3)))).

    Kept: x by ``pow``, tanh's result, and by the product 0.5 x and 1 + tanh. ``pow`` is on autocast's fp32 list, so
    that what follows it is fp32 there.
    """

    def one(name: str, value: Value, saves: tuple[str, ...] = (), scratch: int = 0) -> Value:
        return pointwise(
            tape, f"{module}.{name}", (value,), f"up.{name}", grads=(saves,), backward_scratch=scratch, module=module,
            region=region,
        )  # fmt: skip

    half = one("half", x)
    base = cast(tape, f"{module}.float", x, "fp32", out="up.fp32", module=module) if tape.precision.autocast else x
    cube = one("cube", base, (base.name,), 2)
    scaled = one("cube_scaled", cube)
    inner = add(tape, f"{module}.inner", x, scaled, scaled.dtype, out="up.inner", module=module)
    outer = one("outer", inner)
    tanh = one("tanh", outer, ("up.tanh",))
    plus = handed_on(tape, f"{module}.one_plus", tanh, "up.one_plus", module=module, region=region)
    return pointwise(
        tape, module, (half, plus), "activated", grads=((plus.name,), (half.name,)), dtype=plus.dtype, module=module,
        region=region,
    )  # fmt: skip
