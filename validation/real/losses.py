"""Heads whose losses are computed in other ways than ``F.cross_entropy`` of whole fp32 logits, in plain torch.

What the published ones do, without their kernels: torchtune's chunked output, Transformer Engine's and Liger's
cross-entropy with the gradient over the logits, Liger's fused linear cross-entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Chunked(nn.Module):
    """``CEWithChunkedOutputLoss`` over a list of pieces of the output."""

    def __init__(self, norm: nn.Module, head: nn.Linear, chunks: int) -> None:
        super().__init__()
        self.norm, self.head, self.chunks = norm, head, chunks

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        # one sequence, so that pieces are contiguous; the normed tensor is held by the caller of the pieces
        pieces = [self.head(piece) for piece in self.norm(x).tensor_split(self.chunks, dim=1)]
        losses = []
        for logits, target in zip(pieces, labels.tensor_split(self.chunks, dim=1), strict=True):
            losses.append(functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="sum"))
        return torch.stack(losses).sum()


class OverLogits(torch.autograd.Function):
    """The gradient is written over the logits in forward, scaled in place in backward; rows one by one, as a kernel."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        flat, target = logits.detach().flatten(0, 1), labels.flatten()
        loss = torch.empty(target.shape, dtype=torch.float32)
        for row in range(flat.shape[0]):
            loss[row] = functional.cross_entropy(flat[row].float(), target[row])
            probabilities = flat[row].float().softmax(0)
            probabilities[target[row]] -= 1
            flat[row] = probabilities
        ctx.save_for_backward(logits.detach())
        return loss.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        return logits.mul_(gradients[0].unsqueeze(-1)), None


class LinearFused(torch.autograd.Function):
    """Projection and loss in pieces of the tokens; forward makes the gradients, in 16 bit by addmm into the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        flat, target = x.detach().flatten(0, 1), labels.flatten()
        tokens, width = flat.shape
        wanted = -(-tokens // -(-weight.shape[0] // width))
        piece = min(1 << (wanted - 1).bit_length(), tokens)
        grad_input, grad_weight = torch.zeros_like(flat), torch.zeros_like(weight)
        loss = torch.zeros(tokens, dtype=torch.float32)
        for start in range(0, tokens, piece):
            part = slice(start, start + piece)
            logits = flat[part] @ weight.t()
            for row in range(logits.shape[0]):
                probabilities = logits[row].float().softmax(0)
                loss[start + row] = -probabilities[target[start + row]].log()
                probabilities[target[start + row]] -= 1
                logits[row] = probabilities
                del probabilities
            torch.mm(logits, weight, out=grad_input[part])
            if weight.dtype == torch.float32:
                grad_weight += torch.mm(logits.t(), flat[part]).float()
            else:
                torch.addmm(grad_weight, logits.t(), flat[part], out=grad_weight)
            del logits
        ctx.save_for_backward(grad_input.view_as(x), grad_weight)
        return loss.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_input, grad_weight = ctx.saved_tensors
        return grad_input.mul_(0.5), grad_weight.mul_(0.5), None
