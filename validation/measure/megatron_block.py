"""A block with the calls of Megatron-LM's own transformer layer, to be timed on the host: nothing is computed of worth.

What counts is which Python functions, modules, autograd functions, views and kernels a block is made of; collectives
are left out (one tensor-parallel rank). Sources: megatron/core/transformer and megatron/legacy/model/transformer.py
(ParallelTransformerLayer, ParallelAttention, FlashSelfAttention), megatron/core/tensor_parallel/layers.py
(LinearWithGradAccumulationAndAsyncCommunication), mappings.py (the regions' functions), megatron/legacy/model/
fused_bias_gelu.py, apex/normalization/fused_layer_norm.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Region(torch.autograd.Function):
    """copy_to and reduce_from the tensor-parallel region."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Viewless(torch.autograd.Function):
    """make_viewless_tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty((1,), dtype=x.dtype, device=x.device)
        out.data = x.data
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class FusedLayerNorm(torch.autograd.Function):
    """One kernel forward, one backward, on contiguous tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        ctx.shape = shape
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grads = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, ctx.shape, mean, rstd, weight, bias, [True, True, True]
        )
        return (*grads, None, None)


class LinearFunction(torch.autograd.Function):
    """Matmul with the weight's gradient made here; fused accumulation is one more call in place of a result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fusion: bool, overlap: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.use_bias = bias is not None
        out = torch.matmul(x, weight.t())
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_input = grad.matmul(weight)
        grad = grad.contiguous()
        grad = grad.view(grad.shape[0] * grad.shape[1], grad.shape[2])
        x = x.view(x.shape[0] * x.shape[1], x.shape[2])
        grad_weight = grad.t().matmul(x)
        return grad_input, grad_weight, grad.sum(dim=0) if ctx.use_bias else None, None, None


class BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, _ = ctx.saved_tensors
        grad = torch.ops.aten.gelu_backward(grad, x)
        return grad, grad.sum(dim=(0, 1))


class Flash(torch.autograd.Function):
    """flash_attn_varlen_func: what it allocates and keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        out, lse, state = torch.empty_like(q), torch.empty(4), torch.empty(2)
        ctx.save_for_backward(q, k, v, out, lse, lengths, state)
        return out.copy_(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        q, k, v, _, _, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class Norm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.shape = (hidden,)
        self.weight, self.bias = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return FusedLayerNorm.apply(x, self.weight, self.bias, self.shape, 1e-5)  # type: ignore[no-any-return]


class ColumnParallel(nn.Module):
    def __init__(self, inputs: int, outputs: int, skip_bias: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs))
        self.skip_bias = skip_bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        bias = None if self.skip_bias else self.bias
        out = LinearFunction.apply(Region.apply(x), self.weight, bias, False, False)
        return out, self.bias if self.skip_bias else None


class RowParallel(ColumnParallel):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return Region.apply(LinearFunction.apply(x, self.weight, None, False, False)), self.bias


class Core(nn.Module):
    """FlashSelfAttention: [batch, seq, heads, width] packed into rows."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, seq, heads, width = q.shape
        q, k, v = (t.reshape(batch * seq, heads, width) for t in (q, k, v))
        lengths = torch.arange(0, (batch + 1) * seq, step=seq, dtype=torch.int32, device=q.device)
        return Flash.apply(q, k, v, lengths).reshape(batch, seq, heads, width)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, hidden // heads
        self.qkv, self.core = ColumnParallel(hidden, 3 * hidden, False), Core()
        self.dense = RowParallel(hidden, hidden, True)

    def forward(self, x: Tensor) -> Any:
        mixed, _ = self.qkv(x)
        mixed = mixed.view(*mixed.size()[:-1], self.heads, 3 * self.width)
        q, k, v = torch.split(mixed, self.width, dim=3)
        q, k, v = (t.transpose(0, 1).contiguous() for t in (q, k, v))
        out = self.core(q, k, v).transpose(0, 1).contiguous()
        return self.dense(out.view(*out.shape[:2], -1))


class Mlp(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = ColumnParallel(hidden, 4 * hidden, True), RowParallel(4 * hidden, hidden, True)

    def forward(self, x: Tensor) -> Any:
        up, bias = self.up(x)
        return self.down(BiasGelu.apply(up, bias))


@torch.jit.script
def bias_dropout_add(x: Tensor, bias: Tensor, residual: Tensor, p: float) -> Tensor:
    """One fused kernel once the profile is known."""
    return residual + functional.dropout(x + bias, p=p, training=True)


class Block(nn.Module):
    """ParallelTransformerLayer: [seq, batch, hidden] in and out."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = Norm(hidden), SelfAttention(hidden, heads)
        self.norm2, self.mlp = Norm(hidden), Mlp(hidden)

    def forward(self, x: Tensor) -> Tensor:
        attended, bias = self.attention(self.norm1(x))
        with torch.enable_grad():
            middle = bias_dropout_add(attended, bias.expand_as(x), x, 0.0)
        mixed, bias = self.mlp(self.norm2(middle))
        with torch.enable_grad():
            out = bias_dropout_add(mixed, bias.expand_as(middle), middle, 0.0)
        return Viewless.apply(out)  # type: ignore[no-any-return]
