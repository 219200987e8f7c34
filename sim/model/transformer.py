"""A decoder-only transformer as a Ledger: embedding, one block (repeated), head with loss.

Three codes for the same mathematics. ``torch``: plain modules with fused norms and scaled_dot_product_attention, as in
torchtitan and nanoGPT. ``huggingface``: transformers' eager modules. ``megatron``: Megatron-Core with Transformer
Engine's fused kernels. Names of dimensions are those of ``sim.ir.ledger``, and ``key_seq`` for the keys of a score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sim.ir.ledger import Dim, DType, Layer, Ledger, Pointwise, Shape, Tensor
from sim.model import attention as core
from sim.model.embedding import TOKENS, lookup, positions
from sim.model.huggingface import eager_attention, rope_half
from sim.model.loss import (
    LABELS,
    chunked_cross_entropy,
    cross_entropy,
    fused_cross_entropy,
    kernel_cross_entropy,
    linear_cross_entropy,
    metric,
)
from sim.model.mlp import Mlp, gated, plain
from sim.model.names import Names, names_of
from sim.model.norm import norm
from sim.model.precision import Precision, promote
from sim.model.tape import Tape, Value, add, add_in_place, dropout, linear, narrow, pointwise, split
from sim.scenario.schema import MegatronSettings, ModelConfig, Training

FLOPS_FORMULA = (
    "3 * (2 * tokens * matrix parameters + 4 * batch * seq^2 * heads * head_dim * layers), embedding lookup excluded, "
    "head included, causal attention in full"
)


_USUAL = MegatronSettings()


@dataclass(frozen=True, slots=True)
class Dims:
    """The named dimensions of a model and a microbatch."""

    batch: Dim
    seq: Dim
    hidden: Dim
    heads: Dim
    kv_heads: Dim
    head_dim: Dim
    ffn: Dim
    vocab: Dim
    embedding: Dim

    @property
    def rows(self) -> Shape:
        return (self.batch, self.seq)

    @property
    def qkv(self) -> Shape:
        """Rows of a fused projection: for each key head its query heads, one key and one value."""
        return (self.kv_heads, Dim("group", self.heads.size // self.kv_heads.size + 2), self.head_dim)


@dataclass(frozen=True, slots=True)
class Context:
    """What every part of the description asks for."""

    model: ModelConfig
    training: Training
    precision: Precision
    dims: Dims
    names: Names
    flash: bool = True
    """Whether scaled_dot_product_attention has FlashAttention: from compute capability 8.0 on."""
    local: bool = False
    """Whether Megatron's layers are its own, not Transformer Engine's."""
    tp: int = 1
    megatron: MegatronSettings = _USUAL
    """Which of Megatron's ops are one kernel."""

    @property
    def code(self) -> str:
        return self.training.code

    @property
    def residual_dtype(self) -> DType:
        """The residual stream starts in the embedding's dtype; autocast does not touch it."""
        return self.precision.stored

    def hidden(self, name: str) -> Tensor:
        return Tensor(name, (*self.dims.rows, self.dims.hidden), self.residual_dtype)


def describe(
    model: ModelConfig,
    training: Training,
    *,
    parameter_dtype: DType,
    compute_dtype: DType,
    autocast: bool,
    flash: bool = True,
    local: bool = False,
    tp: int = 1,
    megatron: MegatronSettings = _USUAL,
) -> Ledger:
    """Return what one replica computes for one microbatch. Identical blocks are one object, described once.

    ``tp``: ranks that will have a part of the heads each, where the choice of a kernel looks at how many they are.
    ``megatron``: which ops of Megatron's code are one kernel.
    """
    dims = _dims(model, training)
    precision = Precision.of(parameter_dtype, compute_dtype, autocast=autocast)
    context = Context(model, training, precision, dims, names_of(model), flash, local, tp, megatron)
    if training.code == "megatron":
        from sim.model.megatron import layers

        embedding, block, head = layers(context)
    else:
        embedding, block, head = _embedding(context), _block(context), _head(context)
    return Ledger(
        layers=(embedding, *(block,) * model.num_hidden_layers, head),
        parameter_dtype=precision.stored,
        compute_dtype=compute_dtype,
        batch_inputs=(Tensor(TOKENS, dims.rows, "int64"), Tensor(LABELS, dims.rows, "int64")),
        matmul_flops=matmul_flops(model, training),
        flops_formula=FLOPS_FORMULA,
    )


def _dims(model: ModelConfig, training: Training) -> Dims:
    return Dims(
        batch=Dim("batch", training.micro_batch_size),
        seq=Dim("seq", training.sequence_length),
        hidden=Dim("hidden", model.hidden_size),
        heads=Dim("heads", model.num_attention_heads),
        kv_heads=Dim("kv_heads", model.num_key_value_heads),
        head_dim=Dim("head_dim", model.head_dim),
        ffn=Dim("ffn", model.intermediate_size),
        vocab=Dim("vocab", padded_vocab(model, training)),
        embedding=Dim("hidden" if model.embedding_width is None else "embedding", _embedding_width(model)),
    )


VOCAB_MULTIPLE = 128
"""``--make-vocab-size-divisible-by`` (megatron/training/arguments.py): rows are padded to a multiple of 128 * tp."""


def padded_vocab(model: ModelConfig, training: Training) -> int:
    """Return the rows of the word embedding before it is divided: Megatron pads them whatever tp is."""
    if training.code != "megatron":
        return model.vocab_size
    return -(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# --- counts -------------------------------------------------------------------------------------


def _embedding_width(model: ModelConfig) -> int:
    return model.embedding_width or model.hidden_size


def _matrices_of_block(model: ModelConfig) -> int:
    """Weights of a block's matrix products: query, key, value, output, and two or three of the MLP."""
    h = model.hidden_size
    attention = h * model.head_dim * (2 * model.num_attention_heads + 2 * model.num_key_value_heads)
    return attention + (3 if model.gated else 2) * h * model.intermediate_size


def _matrices_of_ends(model: ModelConfig) -> int:
    """Weights of the matrix products outside the blocks: the head, and projections of a narrow embedding."""
    width = _embedding_width(model)
    projections = 2 * width * model.hidden_size if model.embedding_width is not None else 0
    return model.vocab_size * width + projections


def num_parameters(model: ModelConfig) -> int:
    """Return the number of trained parameters, tied ones once. Builds no ops.

    Per block: the matrices, their biases, the norms (a LayerNorm has a bias unless ``norm_bias`` is off).
    """
    h, d = model.hidden_size, model.head_dim
    norm_size = 2 if model.norm == "layernorm" and model.norm_bias else 1
    block = _matrices_of_block(model) + model.num_block_norms * norm_size * h
    if model.attention_bias:
        block += d * (model.num_attention_heads + 2 * model.num_key_value_heads)
    if model.attention_output_bias:
        block += h
    if model.mlp_bias:
        block += (2 if model.gated else 1) * model.intermediate_size + h
    if model.query_key_norm:
        block += 2 * norm_size * d
    ends = _matrices_of_ends(model)
    if not model.tie_word_embeddings:
        ends += model.vocab_size * _embedding_width(model)
    if model.position == "learned":
        ends += (model.max_position_embeddings + model.position_offset) * h
    ends += (int(model.final_norm) + int(model.embedding_norm)) * norm_size * h
    ends += model.vocab_size if model.head_bias else 0
    return model.num_hidden_layers * block + ends


def matmul_flops(model: ModelConfig, training: Training) -> int:
    """Return the useful FLOPs of one microbatch, forward and backward, by ``FLOPS_FORMULA``.

    Scores of packed samples are those within each.
    """
    tokens = training.micro_batch_size * training.sequence_length
    weights = model.num_hidden_layers * _matrices_of_block(model) + _matrices_of_ends(model)
    scores = (
        4 * tokens * (training.sample_length or training.sequence_length) * model.num_attention_heads * model.head_dim
    )
    return 3 * (2 * tokens * weights + model.num_hidden_layers * scores)


# --- layers -------------------------------------------------------------------------------------


def _embedding(c: Context) -> Layer:
    """Word embedding, its projection and norm, learned positions, dropout; and the model's buffers."""
    tape, d, model = Tape(c.precision), c.dims, c.model
    tokens = Tensor(TOKENS, d.rows, "int64")
    learned, p = model.position == "learned", model.dropout
    projected = model.embedding_width is not None
    steps = [projected, model.embedding_norm, learned, bool(p)]

    def name(step: int, text: str) -> str:
        return text if any(steps[step:]) else "output"

    x = lookup(tape, c.names.embed, tokens, (d.vocab,), (d.embedding,), out=name(0, "word_embedding"))
    if projected:
        x = linear(tape, "project_in", x, (d.hidden,), (d.embedding,), bias=False, out=name(1, "projected"))
    if model.embedding_norm:
        x = normalise(c, tape, c.names.embed_norm, x, out=name(2, "embedding_normed"))
    if learned:
        indices = positions(tape, (d.seq,))
        rows = Dim("positions", model.max_position_embeddings + model.position_offset)
        where = lookup(tape, c.names.position, indices, (rows,), (d.hidden,), out="position_embedding")
        x = add_positions(tape, x, where, name(3, "embedding"), promote(x.dtype, where.dtype))
    x = dropout(tape, "dropout", x, p, out="output", module="drop" if p else "")
    tape.finish_backward(None, x)
    logits = Tensor("metrics.logits", (*d.rows, d.vocab), c.precision.low)
    for _ in range(c.training.metrics):
        metric(tape, logits, Tensor(LABELS, d.rows, "int64"))
    return layer(tape, "embedding", None, x.tensor, buffers=_buffers(c))


def add_positions(tape: Tape, x: Value, where: Value, out: str, dtype: DType) -> Value:
    """words + positions[None]: the gradient of the positions is summed over the batch."""
    result = Value(Tensor(out, x.shape, dtype))
    tape.op(
        "embedding.add", (Pointwise("elementwise", (x.tensor, where.tensor), (result.tensor,)),),
        reads=(x.name, where.name), writes=(result.tensor,),
    )  # fmt: skip

    def emit() -> None:
        grad = tape.take(result)
        if grad is None:
            return
        tape.give(x, grad)
        if x.shape[0].size == 1:
            tape.give(where, grad)
            return
        new = tape.fresh(where)
        tape.back(
            "embedding.add.backward", (Pointwise("reduce", (grad,), (new,)),), reads=(grad.name,), writes=(new,)
        )  # fmt: skip
        tape.give(where, new)

    tape.node(emit)
    return result


def _rope_table(c: Context) -> Tensor:
    """torch: a complex64 for each position of the sequences trained on and each pair (torchtitan, freqs_cis)."""
    return Tensor("freqs_cis", (Dim("positions", c.training.sequence_length), c.dims.head_dim), "fp32")


def _buffers(c: Context) -> tuple[Tensor, ...]:
    """Tensors that all blocks share. They stand in the embedding layer, which holds what the model makes once.

    huggingface: cos and sin are computed in each forward and live until the last block's backward: they are counted
    as buffers, since no op of one block owns them. So is the causal mask of eager attention.
    """
    model = c.model
    found: list[Tensor] = []
    if model.position == "rope":
        if c.code == "torch":
            found.append(_rope_table(c))
        else:
            found.append(Tensor("rotary_emb.inv_freq", (Dim("head_dim", model.head_dim // 2),), "fp32"))
            found += rope_cos_sin(c)
    if model.position == "alibi":
        found.append(_alibi(c))
    if c.code == "huggingface" and c.training.attention == "math":
        found.append(_causal_mask(c))
    return tuple(found)


def _alibi(c: Context) -> Tensor:
    """ALiBi's biases as the attention code that runs takes them."""
    d, kernel = c.dims, c.training.attention
    eager = c.code == "huggingface" and kernel == "math"
    return core.alibi_tensor((*d.rows, d.heads, d.head_dim), "eager" if eager else kernel, c.precision.low)


def _causal_mask(c: Context) -> Tensor:
    """The mask that eager attention adds: zeros and the smallest number, in the model's dtype."""
    return Tensor("causal_mask", (c.dims.batch, c.dims.seq, Dim("key_seq", c.dims.seq.size)), c.residual_dtype)


def rope_cos_sin(c: Context) -> tuple[Tensor, Tensor]:
    """cos and sin of the microbatch's positions, in the dtype of the hidden states."""
    shape = (c.dims.seq, c.dims.head_dim)
    return Tensor("rotary_emb.cos", shape, c.residual_dtype), Tensor("rotary_emb.sin", shape, c.residual_dtype)


def _block(c: Context) -> Layer:
    """One transformer block: attention and MLP on a residual stream, one after the other or side by side.

    Without a final norm the blocks must end normed: the norms stand after the sums (OPT-350M's do_layer_norm_before).
    """
    tape, model = Tape(c.precision), c.model
    x = Value(c.hidden("input"))
    if not model.final_norm and not model.parallel_block:
        attended = _attention(c, tape, x)
        middle = add(tape, "attention_residual.add", x, attended, c.residual_dtype, out="attention_sum")
        first = normalise(c, tape, c.names.norm1, middle, out="normed1")
        mixed = _mlp(c, tape, first)
        total = add(tape, "mlp_residual.add", first, mixed, promote(first.dtype, mixed.dtype), out="mlp_sum")
        result = normalise(c, tape, c.names.norm2, total, out="output")
        tape.finish_backward(x, result)
        return layer(tape, "block", x.tensor, result.tensor)
    first = normalise(c, tape, c.names.norm1, x, out="normed1")
    if model.parallel_block:
        second = first
        if model.num_block_norms == 2:
            second = normalise(c, tape, c.names.norm2, x, out="normed2")
        attended = _attention(c, tape, first)
        mixed = _mlp(c, tape, second)
        in_place = c.code == "huggingface" and c.names.adds_in_place
        if in_place:
            both = add_in_place(tape, "parallel.add", mixed, attended)
        else:
            both = add(tape, "parallel.add", mixed, attended, promote(mixed.dtype, attended.dtype), out="parallel")
        # FalconDecoderLayer's local variable holds the attention's output until it returns
        held = (attended.name,) if in_place else ()
        result = add(tape, "residual.add", both, x, c.residual_dtype, out="output", also_reads=held)
    else:
        attended = _attention(c, tape, first)
        middle = add(tape, "attention_residual.add", x, attended, c.residual_dtype, out="middle")
        second = normalise(c, tape, c.names.norm2, middle, out="normed2")
        mixed = _mlp(c, tape, second)
        result = add(tape, "mlp_residual.add", middle, mixed, c.residual_dtype, out="output")
    tape.finish_backward(x, result)
    return layer(tape, "block", x.tensor, result.tensor)


def normalise(c: Context, tape: Tape, module: str, x: Value, *, out: str, width: Shape | None = None) -> Value:
    """The model's kind of norm, in this code."""
    code = {None: c.code, "fused": "torch", "composed": "huggingface"}[c.training.norms]
    return norm(tape, module, x, kind=c.model.norm, bias=c.model.norm_bias, code=code, out=out, width=width)


def _qkv(c: Context, tape: Tape, x: Value) -> tuple[Value, Value, Value]:
    """Return query, key and value, projected apart or by one matrix, as [batch, seq, heads, head_dim]."""
    n, d, bias = c.names, c.dims, c.model.attention_bias
    hidden: Shape = (d.hidden,)

    def project(module: str, rows: Shape, out: str) -> Value:
        return linear(tape, module, x, rows, hidden, bias=bias, out=out)

    if n.qkv:
        fused = project(n.qkv, d.qkv, "query_key_value")
        query, key = (*d.rows, d.heads, d.head_dim), (*d.rows, d.kv_heads, d.head_dim)
        if n.select and c.code == "huggingface":
            q, k, v = (
                narrow(tape, f"{n.attention}.{name}", fused, shape, module=n.attention)
                for name, shape in (("query", query), ("key", key), ("value", key))
            )
        else:
            q, k, v = split(tape, f"{n.attention}.split", fused, (query, key, key), module=n.attention)
        if n.repeats and c.code == "huggingface" and d.kv_heads.size > 1:
            k, v = (
                core.repeat_kv(
                    tape, f"{n.attention}.repeat_{what}", x, (d.heads,), f"{what}.broadcast", module=n.attention
                )
                for what, x in (("key", k), ("value", v))
            )
        return q, k, v
    q = project(n.q, (d.heads, d.head_dim), "query")
    if n.scale == "query" and c.code == "huggingface":
        q = pointwise(tape, f"{n.attention}.scale_query", (q,), "query.scaled", grads=((),), module=n.attention)
    return (
        q,
        project(n.k, (d.kv_heads, d.head_dim), "key"),
        project(n.v, (d.kv_heads, d.head_dim), "value"),
    )


def _attention(c: Context, tape: Tape, x: Value) -> Value:
    """The attention module, from the normed input to its (dropped-out) output."""
    n, d, model, module = c.names, c.dims, c.model, c.names.attention
    q, k, v = _qkv(c, tape, x)
    if model.query_key_norm:
        width = (d.head_dim,)
        q = normalise(c, tape, f"{module}.q_norm", q, out="query_normed", width=width)
        k = normalise(c, tape, f"{module}.k_norm", k, out="key_normed", width=width)
    if model.position == "rope":
        if c.code == "huggingface":
            cos, sin = rope_cos_sin(c)
            q, k = rope_half(tape, module, q, k, cos=cos, sin=sin)
        else:
            q, k = core.rope_complex(tape, module, q, k, table=_rope_table(c))
    out = _core_attention(c, tape, q, k, v)
    p, name = model.dropout, "attention_output"
    held = (q.name, k.name, v.name)  # local variables of the module's forward until it returns
    y = linear(
        tape, n.out, out, (d.hidden,), (d.heads, d.head_dim), bias=model.attention_output_bias,
        out=f"{name}.linear" if p else name, also_reads=held,
    )  # fmt: skip
    return dropout(
        tape,
        f"{module}.resid_dropout",
        y,
        p,
        out=name,
        also_reads=held,
        module=f"{module}.resid_dropout" if p else module,
    )


def _core_attention(c: Context, tape: Tape, q: Value, k: Value, v: Value) -> Value:
    """Choose what computes softmax(q k^T) v."""
    module, p, out = c.names.attention, c.model.attention_dropout, "attention"
    alibi = _alibi(c) if c.model.position == "alibi" else None
    kernel: str = c.training.attention
    if c.code == "huggingface" and kernel == "math":
        bias = alibi if alibi is not None else _causal_mask(c)
        fused = c.training.softmax == "fused"
        return eager_attention(tape, module, q, k, v, names=c.names, out=out, p=p, bias=bias, fused_softmax=fused)
    if tape.precision.autocast:
        q, k, v = core.to_low(tape, module, q, k, v)
    biased = kernel == "sdpa" and alibi is not None
    if kernel == "sdpa":
        kernel = sdpa_backend(q, k, alibi is not None, c.flash)
    if kernel == "math":
        return core.sdpa_math(tape, q, k, v, out=out, module=module, p=p, alibi=alibi)
    return core.fused_attention(tape, q, k, v, kernel=kernel, out=out, module=module, causal=not biased)


def sdpa_backend(q: Value, k: Value, biased: bool, flash: bool = True) -> str:
    """Return what scaled_dot_product_attention runs on CUDA (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).

    flash takes 16 bit without a bias; memory-efficient takes the rest unless keys are grouped; math takes what is left.
    """
    if q.dtype != "fp32" and not biased and flash:
        return "flash-2"
    return "memory-efficient" if q.shape[2].size == k.shape[2].size else "math"


def _mlp(c: Context, tape: Tape, x: Value) -> Value:
    """The MLP module, from the normed input to its (dropped-out) output."""
    n, d, model = c.names, c.dims, c.model
    activation = n.activation if n.activation and c.code == "huggingface" else model.hidden_act
    mlp = Mlp(n.gate, n.up, n.act, n.down, activation, (d.hidden,), (d.ffn,), model.mlp_bias, model.dropout)
    return (gated if model.gated else plain)(tape, mlp, x, "mlp_output")


def _head(c: Context) -> Layer:
    """Final norm, the projection to the vocabulary, the loss."""
    tape, d, model = Tape(c.precision), c.dims, c.model
    source = Value(c.hidden("input"))
    x = source
    if model.final_norm:
        x = normalise(c, tape, c.names.final_norm, x, out="normed")
    if model.embedding_width is not None:
        x = linear(tape, "project_out", x, (d.embedding,), (d.hidden,), bias=False, out="projected")
    labels = Tensor(LABELS, d.rows, "int64")
    if c.training.loss == "chunked":
        loss = chunked_cross_entropy(tape, x, labels, module=c.names.head, rows=(d.vocab,))
    elif c.training.loss == "linear-fused":
        loss = linear_cross_entropy(tape, x, labels, module=c.names.head, rows=(d.vocab,))
    elif c.training.loss == "fused":
        loss = fused_cross_entropy(tape, project_to_vocabulary(c, tape, x), labels)
    elif c.training.loss == "kernel":
        loss = kernel_cross_entropy(tape, project_to_vocabulary(c, tape, x), labels)
    else:
        loss = cross_entropy(tape, project_to_vocabulary(c, tape, x), labels, code=c.code)
    tape.start_backward(loss)
    tape.finish_backward(source, None)
    return layer(tape, "head", source.tensor, None, tied=tied(c))


def project_to_vocabulary(c: Context, tape: Tape, x: Value) -> Value:
    """logits[batch, seq, vocab]."""
    d = c.dims
    return linear(tape, c.names.head, x, (d.vocab,), (d.embedding,), bias=c.model.head_bias, out="logits")


def tied(c: Context) -> tuple[tuple[str, str, str], ...]:
    """Return where the head's weight lives if it is the embedding's."""
    if not c.model.tie_word_embeddings:
        return ()
    return ((f"{c.names.head}.weight", "embedding", f"{c.names.embed}.weight"),)


def layer(
    tape: Tape,
    kind: Literal["embedding", "block", "head"],
    source: Tensor | None,
    output: Tensor | None,
    *,
    buffers: tuple[Tensor, ...] = (),
    tied: tuple[tuple[str, str, str], ...] = (),
) -> Layer:
    """Freeze a finished tape. Layers are called after their kind: a ledger has one of each, blocks repeated."""
    return Layer(
        name=kind,
        kind=kind,
        parameters=tuple(tape.parameters),
        forward=tuple(tape.forward),
        backward=tuple(tape.backward),
        input=source,
        output=output,
        buffers=buffers,
        tied=tied,
    )
