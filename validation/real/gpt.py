"""A small GPT to train under real frameworks: 12 parameters in a block, 5 beside."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as run_again


class Block(nn.Module):
    """Pre-norm attention and MLP; with ``checkpoint``, what is in it runs again in backward."""

    def __init__(self, hidden: int, heads: int, checkpoint: bool) -> None:
        super().__init__()
        self.heads, self.checkpoint = heads, checkpoint
        self.ln1 = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.ln2 = nn.LayerNorm(hidden)
        self.fc1 = nn.Linear(hidden, 4 * hidden)
        self.fc2 = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_again(self.body, x, use_reentrant=False) if self.checkpoint else self.body(x)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, s, h))
        return x + self.fc2(functional.gelu(self.fc1(self.ln2(x))))


class Gpt(nn.Module):
    """``checkpoint``: "" (none), "inside" (not re-entrant, within each block) or "around" (re-entrant, around it)."""

    def __init__(
        self, hidden: int, heads: int, vocabulary: int, num_layers: int, sequence: int, checkpoint: str = ""
    ) -> None:
        super().__init__()
        self.around = checkpoint == "around"
        self.wte = nn.Embedding(vocabulary, hidden)
        self.wpe = nn.Embedding(sequence, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, checkpoint == "inside") for _ in range(num_layers))
        self.ln_f = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = run_again(block, x, use_reentrant=True) if self.around else block(x)
        return self.head(self.ln_f(x))


class GptWithLoss(Gpt):
    """What DeepSpeed's engine wraps: forward returns the loss."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = super().forward(tokens)
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
