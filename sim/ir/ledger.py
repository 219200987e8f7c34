"""Ledger: what one replica of the model computes and keeps. No hardware, no parallelism.

Every size is a product of *named* dimensions. Sharding divides the dimensions of one name, and a
contraction over a sharded dimension is where a collective belongs, so tensor, sequence and context
parallelism are transforms of this noun and not a second description of the model.

Names of dimensions (the legend for every file of ``sim/model``):

    batch  sequences in a microbatch        heads     query heads
    seq    tokens of a sequence             kv_heads  key and value heads
    hidden width of the residual stream     head_dim  width of one head
    ffn    width of the MLP                 vocab     rows of the embedding
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

DType = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4", "int64", "int32", "uint8", "bool"]
"""mxfp8 and nvfp4 are asked of matrix products; tensors of them are counted in bytes, their scales included."""
DTYPE_BYTES: dict[str, int] = {
    "fp32": 4,
    "tf32": 4,
    "fp16": 2,
    "bf16": 2,
    "fp8": 1,
    "mxfp8": 1,
    "nvfp4": 1,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}
Direction = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Dim:
    """A named dimension of a tensor: ``size`` elements of what ``name`` counts."""

    name: str
    size: int


Shape = tuple[Dim, ...]


def size(shape: Shape) -> int:
    """Return the number of elements of a shape; 1 for the empty one."""
    return prod(dim.size for dim in shape)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor with a storage of its own. Views are not tensors here: they hold no bytes."""

    name: str
    shape: Shape
    dtype: DType

    @property
    def num_elements(self) -> int:
        return size(self.shape)

    @property
    def num_bytes(self) -> int:
        return size(self.shape) * DTYPE_BYTES[self.dtype]


# --- kernels: what a GPU is asked to do; the cost layer knows how long each kind takes ---------


@dataclass(frozen=True, slots=True)
class Gemm:
    """C[batch, m, n] = A[batch, m, k] @ B[batch, k, n], accumulated in fp32.

    C is written once, as wide as the operands (8-bit ones: 16 bits), unless ``result`` names its dtype;
    ``accumulates``: C += A @ B, so that it is read too. ``pieces``: one of so many equal products that run on streams
    in turn, the next one's tiles where the last wave of one leaves SMs idle. ``margin``: SMs that it is told to leave.
    ``promotes``: an 8-bit product whose partial sums go to full fp32 registers after every 128 of k
    (``CUBLASLT_MATMUL_DESC_FAST_ACCUM`` off).
    """

    m: Shape
    n: Shape
    k: Shape
    dtype: DType
    batch: Shape = ()
    result: DType | None = None
    accumulates: bool = False
    pieces: int = 1
    margin: int = 0
    promotes: bool = False

    @property
    def flops(self) -> int:
        return 2 * size(self.batch) * size(self.m) * size(self.n) * size(self.k)


@dataclass(frozen=True, slots=True)
class Attention:
    """A fused attention kernel (flash-1, -2, -3, cudnn, ...). ``math`` attention is gemms and pointwise kernels."""

    kernel: str
    direction: Direction
    batch: Shape
    heads: Shape
    kv_heads: Shape
    query: Shape
    key: Shape
    head_dim: Shape
    causal: bool
    dtype: DType

    @property
    def flops(self) -> int:
        """FLOPs executed: two matmuls forward, five backward; a causal mask skips half."""
        dense = 2 * prod(size(s) for s in (self.batch, self.heads, self.query, self.key, self.head_dim))
        executed = dense * (2 if self.direction == "forward" else 5)
        return executed // 2 if self.causal else executed


@dataclass(frozen=True, slots=True)
class Pointwise:
    """A kernel bound by memory: it reads ``reads``, writes ``writes`` and computes little.

    ``kind`` names the family whose measured bandwidth applies: ``elementwise``, ``norm``,
    ``softmax``, ``reduce``, ``gather`` (embedding), ``scatter``, ``copy``, ``transpose`` (written in another order than
    it is read), ``columns`` (goes down columns, by reads or writes that do not coalesce), ``optimizer``. ``random``: it
    draws a random number for each element.
    """

    kind: str
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    flops_per_element: int = 1
    random: bool = False

    @property
    def moved_bytes(self) -> int:
        return sum(t.num_bytes for t in self.reads) + sum(t.num_bytes for t in self.writes)

    @property
    def flops(self) -> int:
        return self.flops_per_element * self._widest

    @property
    def random_numbers(self) -> int:
        return self._widest if self.random else 0

    @property
    def _widest(self) -> int:
        return max((t.num_elements for t in self.reads + self.writes), default=0)


Kernel = Gemm | Attention | Pointwise


@dataclass(frozen=True, slots=True)
class Exchange:
    """A collective that is part of a layer's own forward or backward: tensor, sequence, context or expert parallelism.

    ``tensor`` is the whole message in nccl-tests' sense: an all-gather's output, a reduce-scatter's input, else the
    buffer; a shift (a copy to another rank, from another) what each rank sends. ``blocking``: the
    compute stream waits for it; else only the op that reads its output does (``Op.awaits``).
    """

    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv", "shift"]
    axis: str
    tensor: Tensor
    blocking: bool = True


# --- layers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trained tensor. ``name`` is its path in the layer ("self_attn.q_proj.weight").

    ``decays`` is False for those that optimizers usually keep out of weight decay (norms, biases).
    """

    name: str
    shape: Shape
    decays: bool = True

    @property
    def num_elements(self) -> int:
        return size(self.shape)

    @property
    def module(self) -> str:
        """Path of the torch module that owns it: the one around which ZeRO-3 and FSDP gather."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Op:
    """One node of the autograd graph (or a piece of one), with the storages it makes and keeps.

    ``reads``    names of tensors of this layer (a layer's input included) that must be live
    ``writes``   new storages; each lives until its last reader of the pass has run, longer if saved
    ``saves``    names that autograd keeps until the backward op that has this op in ``releases``;
                 may name inputs, outputs, or tensors of ``keeps``
    ``keeps``    storages made for backward only (log-sum-exp, dropout mask, mean and rstd)
    ``scratch``  storages that live while the op runs
    ``parameters``  names of the parameters it reads
    ``gradients``   (backward) names of the parameters whose gradient it writes
    ``releases``    (backward) forward ops whose saved tensors it was the last to need
    ``module``      path of the innermost torch module whose forward runs it ("" is the layer)
    ``region``      a label that recompute policies refer to ("core_attention", "mlp_activation")
    ``exchange``    the collective that the op is, instead of or before its kernels
    ``awaits``      names of ops whose exchange was not blocking and must have ended before the kernels run
    ``library``     a library's C++ issues its kernels and its collective within its call for the op before
    """

    name: str
    kernels: tuple[Kernel, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[Tensor, ...] = ()
    saves: tuple[str, ...] = ()
    keeps: tuple[Tensor, ...] = ()
    scratch: tuple[Tensor, ...] = ()
    parameters: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    module: str = ""
    region: str = ""
    exchange: Exchange | None = None
    awaits: tuple[str, ...] = ()
    library: bool = False

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)


@dataclass(frozen=True, slots=True)
class Layer:
    """A unit that repeats: embedding, transformer block, head with loss.

    Forward reads the tensor named ``input`` and writes ``output`` (the first layer has no input,
    the last no output). Backward reads ``grad:output`` and writes ``grad:input``.
    ``tied`` maps a parameter of this layer to (layer name, parameter name) that owns the storage.
    ``input`` and ``output`` of the hidden tensor are given as tensors so that recompute, pipeline and
    checkpointing know what crosses the border.
    """

    name: str
    kind: Literal["embedding", "block", "head"]
    parameters: tuple[Parameter, ...]
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    input: Tensor | None
    output: Tensor | None
    buffers: tuple[Tensor, ...] = ()
    tied: tuple[tuple[str, str, str], ...] = ()

    @property
    def num_parameters(self) -> int:
        """Parameters that this layer owns: tied ones are counted where they live."""
        elsewhere = {name for name, _, _ in self.tied}
        return sum(p.num_elements for p in self.parameters if p.name not in elsewhere)


@dataclass(frozen=True, slots=True)
class Ledger:
    """One replica's microbatch. Identical layers are the same object, repeated in ``layers``.

    ``parameter_dtype``  dtype of the parameters that the forward pass reads
    ``batch_inputs``     the tensors that the data loader hands over (token ids, labels)
    ``matmul_flops``     useful FLOPs of one microbatch: three times the forward matmuls, attention in
                         full (not halved by a causal mask), as PaLM's and Megatron's formulas count
    """

    layers: tuple[Layer, ...]
    parameter_dtype: DType
    compute_dtype: DType
    batch_inputs: tuple[Tensor, ...]
    matmul_flops: int
    flops_formula: str

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers)
