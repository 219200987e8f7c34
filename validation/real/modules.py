"""Ground truth: transformer modules in plain torch, and in the manner of transformers' eager code.

Written from the published equations, to be run on a CPU and looked into; ``saved_bytes`` says what autograd keeps.
They take a ``ModelConfig``, so that one config builds both the module and the ledger that is to equal it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from sim.scenario.schema import ModelConfig


def saved_bytes(run: Callable[[], object], excluded: list[Tensor]) -> int:
    """Return the bytes of the storages that autograd saves while ``run`` runs, each once, without ``excluded``."""
    known = {t.untyped_storage().data_ptr() for t in excluded if t.numel()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the reference keeps the address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    assert result is not None
    return sum(size for size, _ in kept.values())


# --- norms, positions, activations ---------------------------------------------------------------


class LlamaRMSNorm(nn.Module):
    """Root-mean-square norm with its arithmetic in fp32, op by op."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        return self.weight * x.to(dtype)


RMS_NORM: type[nn.Module] = nn.RMSNorm
"""What plain torch code has for one."""


def make_norm(config: ModelConfig, code: str, width: int) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(width, bias=config.norm_bias)
    return LlamaRMSNorm(width) if code == "huggingface" else RMS_NORM(width)


class NewGELU(nn.Module):
    """The tanh approximation of GELU, op by op."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def rotary_angles(seq: int, head_dim: int) -> Tensor:
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    return torch.outer(torch.arange(seq).float(), frequencies)


def rotate_complex(x: Tensor, table: Tensor) -> Tensor:
    """x[batch, seq, heads, head_dim] turned by a complex table [seq, head_dim / 2]."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table[None, :, None, :]).flatten(3).type_as(x)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


# --- block ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head, grouped or multi-query attention in either code. ``kernel`` is ``sdpa`` or ``math``."""

    def __init__(self, config: ModelConfig, code: str, kernel: str, *, fused: bool) -> None:
        super().__init__()
        self.config, self.code, self.kernel, self.fused = config, code, kernel, fused
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        h, bias = config.hidden_size, config.attention_bias
        if fused:
            self.qkv = nn.Linear(h, q + 2 * kv, bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(h, width, bias=bias) for width in (q, kv, kv))
        self.o = nn.Linear(q, h, bias=config.attention_output_bias)
        if config.query_key_norm:
            self.q_norm, self.k_norm = (make_norm(config, code, config.head_dim) for _ in range(2))

    def forward(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        c = self.config
        batch, seq, _ = x.shape
        q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        if self.fused and self.code == "huggingface" and c.embedding_norm:
            mixed = self.qkv(x).view(batch, seq, c.num_attention_heads, 3, c.head_dim)
            q, k, v = mixed[..., 0, :], mixed[..., 1, :], mixed[..., 2, :]
            del mixed
        elif self.fused:
            q, k, v = self.qkv(x).split((q_width, kv_width, kv_width), dim=-1)
        else:
            q = self.q(x)
            if self.code == "huggingface" and c.position_offset:
                q = q * c.head_dim**-0.5
            k, v = self.k(x), self.v(x)
        q, k, v = (t.view(batch, seq, -1, c.head_dim) for t in (q, k, v))
        if c.parallel_block and not c.mlp_bias and self.code == "huggingface" and c.num_key_value_heads > 1:
            k, v = (t.unsqueeze(3).expand(-1, -1, -1, q.shape[2] // t.shape[2], -1).reshape(q.shape) for t in (k, v))
        if c.query_key_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.position == "rope" and self.code == "torch":
            q, k = rotate_complex(q, tables[0]), rotate_complex(k, tables[0])
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if c.position == "rope" and self.code == "huggingface":
            cos, sin = tables[:2]
            q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        out = self.eager(q, k, v, tables[-1]) if self.is_eager else self.sdpa(q, k, v)
        out = out.transpose(1, 2).contiguous().view(batch, seq, -1)  # a tensor-parallel rank has some of the heads
        return functional.dropout(self.o(out), c.dropout) if c.dropout else self.o(out)

    @property
    def is_eager(self) -> bool:
        return self.kernel == "math" and self.code == "huggingface"

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        backend = torch.nn.attention.SDPBackend.MATH if self.kernel == "math" else None
        options = {
            "is_causal": True,
            "enable_gqa": q.shape[1] != k.shape[1],
            "dropout_p": self.config.attention_dropout,
        }
        if backend is None:
            return functional.scaled_dot_product_attention(q, k, v, **options)
        with torch.nn.attention.sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, **options)

    def eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        c = self.config
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = (
                t[:, :, None].expand(-1, -1, groups, -1, -1).reshape(t.shape[0], -1, t.shape[2], t.shape[3])
                for t in (k, v)
            )
        if c.embedding_norm:
            batch, heads, seq, width = q.shape
            q, k, v = (t.reshape(batch * heads, seq, width) for t in (q, k, v))
            bias = torch.zeros(batch * heads, 1, seq, dtype=q.dtype)
            scores = bias.baddbmm(q, k.transpose(1, 2), alpha=c.head_dim**-0.5).view(batch, heads, seq, seq) + mask
            probabilities = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
            return torch.bmm(probabilities.view(batch * heads, seq, seq), v).view(batch, heads, seq, width)
        scores = torch.matmul(q, k.transpose(2, 3)) * (c.head_dim**-0.5)
        scores = scores + mask
        if c.position == "alibi" or (c.position == "rope" and (c.mlp_bias or not c.parallel_block)):
            scores = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        else:
            scores = functional.softmax(scores, dim=-1).type(v.dtype)
        if c.attention_dropout:
            scores = functional.dropout(scores, c.attention_dropout)
        return torch.matmul(scores, v)


class Mlp(nn.Module):
    def __init__(self, config: ModelConfig, code: str) -> None:
        super().__init__()
        h, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.config = config
        if config.gated:
            self.gate = nn.Linear(h, f, bias=bias)
        self.up, self.down = nn.Linear(h, f, bias=bias), nn.Linear(f, h, bias=bias)
        kinds: dict[str, type[nn.Module]] = {
            "silu": nn.SiLU, "gelu_gated": nn.GELU, "relu": nn.ReLU, "gelu": nn.GELU
        }  # fmt: skip
        self.act: nn.Module = kinds[config.hidden_act]()
        if code == "huggingface" and config.hidden_act == "gelu" and config.position == "learned":
            self.act = NewGELU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.gate(x)) * self.up(x) if self.config.gated else self.act(self.up(x))
        y = self.down(y)
        return functional.dropout(y, self.config.dropout) if self.config.dropout else y


class Block(nn.Module):
    def __init__(self, config: ModelConfig, code: str, kernel: str, *, fused: bool) -> None:
        super().__init__()
        self.parallel, self.code, self.norms_after = config.parallel_block, code, not config.final_norm
        self.neox = config.mlp_bias
        # registered in the order of use, which is the ledger's
        two = config.num_block_norms == 2
        self.norm1 = make_norm(config, code, config.hidden_size)
        if two and self.parallel:
            self.norm2: nn.Module | None = make_norm(config, code, config.hidden_size)
        self.attention = Attention(config, code, kernel, fused=fused)
        if not self.parallel:
            self.norm2 = make_norm(config, code, config.hidden_size)
        self.mlp = Mlp(config, code)
        if not two:
            self.norm2 = None

    def forward(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        if self.parallel:
            first = self.norm1(x)
            second = first if self.norm2 is None else self.norm2(x)
            if self.code == "huggingface" and not self.neox:
                attended, mixed = self.attention(first, tables), self.mlp(second)
                mixed += attended
                return x + mixed
            return x + (self.attention(first, tables) + self.mlp(second))
        assert self.norm2 is not None
        if self.norms_after:
            middle = self.norm1(x + self.attention(x, tables))
            return self.norm2(middle + self.mlp(middle))
        middle = x + self.attention(self.norm1(x), tables)
        return middle + self.mlp(self.norm2(middle))


# --- ends ----------------------------------------------------------------------------------------


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig, code: str) -> None:
        super().__init__()
        width = config.embedding_width or config.hidden_size
        self.config = config
        self.words = nn.Embedding(config.vocab_size, width)
        self.project = nn.Linear(width, config.hidden_size, bias=False) if config.embedding_width else nn.Identity()
        self.norm = make_norm(config, code, config.hidden_size) if config.embedding_norm else nn.Identity()
        if config.position == "learned":
            rows = config.max_position_embeddings + config.position_offset
            self.positions = nn.Embedding(rows, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.project(self.words(tokens)))
        if self.config.position == "learned":
            x = x + self.positions(torch.arange(tokens.shape[1])[None] + self.config.position_offset)
        return functional.dropout(x, self.config.dropout) if self.config.dropout else x


class Head(nn.Module):
    def __init__(self, config: ModelConfig, code: str) -> None:
        super().__init__()
        width = config.embedding_width or config.hidden_size
        self.code = code
        self.norm = make_norm(config, code, config.hidden_size) if config.final_norm else nn.Identity()
        self.project = nn.Linear(config.hidden_size, width, bias=False) if config.embedding_width else nn.Identity()
        self.head = nn.Linear(width, config.vocab_size, bias=config.head_bias)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return loss_of(self.logits(x), labels, self.code)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.project(self.norm(x)))


def loss_of(logits: Tensor, labels: Tensor, code: str) -> Tensor:
    """Return the mean cross entropy, computed in fp32."""
    if code == "huggingface":
        labels = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
