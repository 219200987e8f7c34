"""Norms: torch's fused kernels, Hugging Face's LlamaRMSNorm step by step, and Transformer Engine's.

Shapes: x[batch, seq, hidden]; statistics [batch, seq] in fp32.
"""

from __future__ import annotations

from sim.ir.ledger import DType, Parameter, Pointwise, Shape, Tensor
from sim.model.tape import Tape, Value, cast, handed_on, pointwise


def norm(
    tape: Tape,
    module: str,
    x: Value,
    *,
    kind: str,
    bias: bool,
    code: str,
    out: str,
    width: Shape | None = None,
    inner: str = "",
) -> Value:
    """Normalise the last dimension of ``x``, or the last ones that ``width`` names.

    ``inner``: the norm is a part of ``module`` without a module of its own, and its names start with this.
    """
    prefix = f"{module}.{inner}_" if inner else f"{module}."
    width = width or x.shape[-1:]
    weight = tape.parameter(f"{prefix}weight", width, decays=False)
    shift = tape.parameter(f"{prefix}bias", width, decays=False) if kind == "layernorm" and bias else None
    if code == "huggingface" and kind == "rmsnorm":
        return _llama_rms_norm(tape, module, x, weight, out)
    name = f"{module}.{inner}" if inner else module
    return _fused(tape, name, x, weight, shift, module=module, out=out, layernorm=kind == "layernorm")


def _fused(
    tape: Tape,
    name: str,
    x: Value,
    weight: Parameter,
    shift: Parameter | None,
    *,
    module: str,
    out: str,
    layernorm: bool,
) -> Value:
    """``native_layer_norm`` and ``_fused_rms_norm`` on CUDA: save the input and rstd (and mean) in fp32.

    Both are on autocast's fp32 list. Source: aten/src/ATen/native/cuda/layer_norm_kernel.cu. Leaves out: the partial
    sums of the weight's gradient, which that file allocates only for tall inputs.
    Transformer Engine's kernels save the same (transformer_engine/pytorch/module/layernorm_linear.py: mu, rsigma).
    """
    if tape.precision.autocast:
        x = cast(tape, f"{out}.input.cast", x, "fp32", module=module)
    rows = x.shape[: len(x.shape) - len(weight.shape)]
    statistics = [Tensor(f"{out}.rstd", rows, "fp32")]
    if layernorm:
        statistics.insert(0, Tensor(f"{out}.mean", rows, "fp32"))
    keeps = tuple(statistics)
    result = Value(Tensor(out, x.shape, x.dtype))
    parameters = (weight,) if shift is None else (weight, shift)
    names = tuple(p.name for p in parameters)
    stored = tuple(tape.stored(p) for p in parameters)
    tape.op(
        name, (Pointwise("norm", (x.tensor, *stored), (result.tensor, *keeps), 4),), reads=(x.name,),
        writes=(result.tensor,), saves=(x.name, *(t.name for t in keeps)), keeps=keeps, parameters=names, module=module,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        new = tape.fresh(x)
        saved = (x.name, *(t.name for t in keeps))
        tape.back(
            f"{name}.backward",
            (
                Pointwise("norm", (grad, x.tensor, *keeps, stored[0]), (new,), 8),
                Pointwise("reduce", (grad, x.tensor, *keeps), stored, 2),
            ),
            reads=(grad.name, *saved), writes=(new,), parameters=names[:1], gradients=names,
            releases=(name,), module=module,
        )  # fmt: skip
        tape.give(x, new, module)

    tape.node(emit)
    return result


def _llama_rms_norm(tape: Tape, module: str, x: Value, weight: Parameter, out: str) -> Value:
    """transformers' LlamaRMSNorm: x32 = x.float(); y = w * (x32 * rsqrt(mean(x32^2) + eps)).to(x.dtype).

    Kept: x32 by ``pow`` and the product, rsqrt's result, the normalised tensor by the product with the weight.
    (transformers/models/llama/modeling_llama.py)
    """
    dtype = x.dtype
    x32 = cast(tape, f"{module}.float", x, "fp32", out=f"{out}.fp32", module=module)
    square = pointwise(
        tape, f"{module}.pow", (x32,), f"{out}.square", grads=((x32.name,),), backward_scratch=2, module=module
    )  # fmt: skip
    rows = x.shape[: len(x.shape) - len(weight.shape)]
    mean = pointwise(
        tape, f"{module}.mean", (square,), f"{out}.variance", shape=rows, grads=((),), kind="reduce", module=module
    )  # fmt: skip
    shifted = handed_on(tape, f"{module}.eps", mean, f"{out}.variance_eps", module=module)
    rstd_name = f"{out}.rstd"
    rstd = pointwise(
        tape, f"{module}.rsqrt", (shifted,), rstd_name, grads=((rstd_name,),), also_reads=(mean.name,), module=module
    )  # fmt: skip
    normed32 = _scale_rows(tape, module, x32, rstd, f"{out}.normed32")
    normed = cast(tape, f"{module}.cast", normed32, dtype, out=f"{out}.normed", module=module)
    return _times_weight(tape, module, normed, weight, out)


def _scale_rows(tape: Tape, module: str, x: Value, rows: Value, out: str) -> Value:
    """x * rows[..., None]: saves both; the gradient of ``rows`` is a product of full size, then a sum."""
    result = Value(Tensor(out, x.shape, "fp32"))
    name = f"{module}.scale"
    tape.op(
        name, (Pointwise("elementwise", (x.tensor, rows.tensor), (result.tensor,)),), reads=(x.name, rows.name),
        writes=(result.tensor,), saves=(x.name, rows.name), module=module,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        new, product, new_rows = tape.fresh(x), Tensor(f"{name}.product", x.shape, "fp32"), tape.fresh(rows)
        tape.back(
            f"{name}.backward0", (Pointwise("elementwise", (grad, rows.tensor), (new,)),),
            reads=(grad.name, rows.name), writes=(new,), module=module,
        )  # fmt: skip
        tape.back(
            f"{name}.backward1",
            (Pointwise("elementwise", (grad, x.tensor), (product,)), Pointwise("reduce", (product,), (new_rows,))),
            reads=(grad.name, x.name), writes=(new_rows,), scratch=(product,), releases=(name,), module=module,
        )  # fmt: skip
        tape.give(x, new, module)
        tape.give(rows, new_rows, module)

    tape.node(emit)
    return result


def _times_weight(tape: Tape, module: str, x: Value, weight: Parameter, out: str) -> Value:
    """weight * x: saves x. Under autocast the weight is fp32, so the result is fp32 whatever x was."""
    stored = tape.stored(weight)
    dtype: DType = "fp32" if "fp32" in (stored.dtype, x.dtype) else x.dtype
    result = Value(Tensor(out, x.shape, dtype))
    tape.op(
        module, (Pointwise("elementwise", (stored, x.tensor), (result.tensor,)),), reads=(x.name,),
        writes=(result.tensor,), saves=(x.name,), parameters=(weight.name,), module=module,
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        product, new = Tensor(f"{module}.product", x.shape, dtype), tape.fresh(x, dtype)
        # The engine sums the weight's gradient to its shape only after the node has made both products.
        tape.back(
            f"{module}.backward",
            (
                Pointwise("elementwise", (grad, x.tensor), (product,)),
                Pointwise("elementwise", (grad, stored), (new,)),
                Pointwise("reduce", (product,), (stored,)),
            ),
            reads=(grad.name, x.name), writes=(new,), scratch=(product,), parameters=(weight.name,),
            gradients=(weight.name,), releases=(module,), module=module,
        )  # fmt: skip
        tape.give(x, new, module)

    tape.node(emit)
    return result
