"""The real model of a scenario, or one pipeline stage of it: what its ledger describes, as torch modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sim.scenario.schema import ModelConfig
from validation.real.modules import Block, Embedding, Head, loss_of, rotary_angles


class CheckpointedBlock(Block):
    """What is in it runs again in backward: not re-entrant, and hooks around the block do not run again."""

    def forward(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        return checkpoint(super().forward, x, tables, use_reentrant=False)


class Transformer(nn.Module):
    """Blocks, with the embedding before them on the first stage and the head after them on the last.

    The parts of embedding and head are the model's own modules, registered in the order of use, as in real models.
    ``recompute``: "" (none), "inside" (:class:`CheckpointedBlock`) or "around" (re-entrant, around each block).
    """

    def __init__(
        self,
        config: ModelConfig,
        code: str,
        kernel: str,
        sequence: int,
        *,
        num_blocks: int,
        first: bool = True,
        last: bool = True,
        recompute: str = "",
    ) -> None:
        super().__init__()
        self.config, self.code, self.recompute = config, code, recompute
        self.ends: dict[str, nn.Module] = {}  # a dict: torch sees the parts alone
        if first:
            self._own("embed", Embedding(config, code))
        kind = CheckpointedBlock if recompute == "inside" else Block
        fused = config.position in ("learned", "alibi") or config.parallel_block
        self.blocks = nn.ModuleList(kind(config, code, kernel, fused=fused) for _ in range(num_blocks))
        if last:
            self._own("head", Head(config, code))
        if first and last and config.tie_word_embeddings:
            self.head_head.weight = self.embed_words.weight
        if config.position == "rope":
            angles = rotary_angles(sequence, config.head_dim)
            if code == "torch":
                self.register_buffer("rotary", torch.polar(torch.ones_like(angles), angles), persistent=False)
            else:
                self.register_buffer("rotary", torch.ones(config.head_dim // 2), persistent=False)
        elif code == "huggingface" and kernel == "math":
            self.register_buffer("mask", torch.full((sequence, sequence), -1e4).triu(1)[None], persistent=False)

    def _own(self, name: str, part: nn.Module) -> None:
        self.ends[name] = part
        for child, module in part.named_children():
            if not isinstance(module, nn.Identity):
                self.add_module(f"{name}_{child}", module)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the hidden states of a stage that is not the last, else logits, or the loss if there are labels."""
        if "embed" in self.ends:
            x = self.ends["embed"](x)
        tables = self.tables(x) if len(self.blocks) else ()
        for block in self.blocks:
            x = checkpoint(block, x, tables, use_reentrant=True) if self.recompute == "around" else block(x, tables)
        if "head" not in self.ends:
            return x
        logits = self.ends["head"].logits(x)  # type: ignore[operator]
        return logits if labels is None else loss_of(logits, labels, self.code)

    def tables(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what all blocks read beside the hidden states: angles of the positions, the causal mask."""
        if self.config.position != "rope":
            return (self.mask,) if hasattr(self, "mask") else ()
        if self.code == "torch":
            return (self.rotary,)
        angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32, device=x.device), self.rotary.float())
        both = torch.cat((angles, angles), -1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)
