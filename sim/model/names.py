"""Module paths of the families, as their own code has them. ZeRO-3 and FSDP work on modules, so paths matter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sim.scenario.schema import ModelConfig


@dataclass(frozen=True, slots=True)
class Names:
    """Paths relative to the layer. ``qkv`` is set where one matrix makes query, key and value; ``gate`` where gated.

    ``activation`` overrides the configured one where the family's eager code computes it otherwise.
    """

    embed: str
    position: str
    embed_norm: str
    attention: str
    q: str
    k: str
    v: str
    qkv: str
    out: str
    norm1: str
    norm2: str
    gate: str
    up: str
    act: str
    down: str
    final_norm: str
    head: str = "lm_head"
    activation: str = ""
    select: bool = False
    """Query, key and value are picked by index, whose backward makes a zeroed tensor for each, not by ``split``."""
    scale: Literal["scores", "query", "fused"] = "scores"
    """What eager attention scales: the scores, the projected query, or the product itself as it is made (baddbmm)."""
    repeats: bool = False
    """Grouped keys and values are copied for every query head as soon as they are projected (Falcon-40B's code)."""
    adds_in_place: bool = False
    """A parallel block adds attention's output into the MLP's (``+=``), and holds it to the end."""
    fp32_softmax: bool = False
    """Eager attention computes softmax in fp32 and casts it back."""


LLAMA = Names(
    embed="embed_tokens", position="embed_positions", embed_norm="embed_norm", attention="self_attn",
    q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", qkv="", out="self_attn.o_proj",
    norm1="input_layernorm", norm2="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj",
    act="mlp.act_fn", down="mlp.down_proj", final_norm="norm", fp32_softmax=True,
)  # fmt: skip
GPT2 = Names(
    embed="wte", position="wpe", embed_norm="ln_e", attention="attn", q="", k="", v="", qkv="attn.c_attn",
    out="attn.c_proj", norm1="ln_1", norm2="ln_2", gate="mlp.c_gate", up="mlp.c_fc", act="mlp.act", down="mlp.c_proj",
    final_norm="ln_f", activation="gelu_new",
)  # fmt: skip
OPT = Names(
    embed="embed_tokens", position="embed_positions", embed_norm="embed_norm", attention="self_attn",
    q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", qkv="", out="self_attn.out_proj",
    norm1="self_attn_layer_norm", norm2="final_layer_norm", gate="fc_gate", up="fc1", act="activation_fn", down="fc2",
    final_norm="final_layer_norm", scale="query",
)  # fmt: skip
BLOOM = Names(
    embed="word_embeddings", position="position_embeddings", embed_norm="word_embeddings_layernorm",
    attention="self_attention", q="", k="", v="", qkv="self_attention.query_key_value", out="self_attention.dense",
    norm1="input_layernorm", norm2="post_attention_layernorm", gate="mlp.gate", up="mlp.dense_h_to_4h",
    act="mlp.gelu_impl", down="mlp.dense_4h_to_h", final_norm="ln_f", select=True, scale="fused",
    fp32_softmax=True,
)  # fmt: skip
FALCON = Names(
    embed="word_embeddings", position="position_embeddings", embed_norm="embed_norm", attention="self_attention",
    q="", k="", v="", qkv="self_attention.query_key_value", out="self_attention.dense", norm1="input_layernorm",
    norm2="post_attention_layernorm", gate="mlp.gate", up="mlp.dense_h_to_4h", act="mlp.act", down="mlp.dense_4h_to_h",
    final_norm="ln_f", repeats=True, adds_in_place=True,
)  # fmt: skip
NEOX = Names(
    embed="embed_in", position="embed_positions", embed_norm="embed_norm", attention="attention", q="", k="", v="",
    qkv="attention.query_key_value", out="attention.dense", norm1="input_layernorm", norm2="post_attention_layernorm",
    gate="mlp.gate", up="mlp.dense_h_to_4h", act="mlp.act", down="mlp.dense_4h_to_h", final_norm="final_layer_norm",
    head="embed_out", fp32_softmax=True,
)  # fmt: skip
MPT = Names(
    embed="wte", position="wpe", embed_norm="norm_e", attention="attn", q="", k="", v="", qkv="attn.Wqkv",
    out="attn.out_proj", norm1="norm_1", norm2="norm_2", gate="ffn.gate", up="ffn.up_proj", act="ffn.act",
    down="ffn.down_proj", final_norm="norm_f", fp32_softmax=True,
)  # fmt: skip


def names_of(model: ModelConfig) -> Names:
    """Return the paths of the family that a config's structure belongs to (a parallel block with biases is NeoX's)."""
    names = _family(model)
    if model.fused_qkv and not names.qkv:
        return replace(names, q="", k="", v="", qkv=f"{names.attention}.qkv_proj")
    return names


def _family(model: ModelConfig) -> Names:
    if model.parallel_block:
        return NEOX if model.mlp_bias else FALCON
    if model.position == "alibi":
        return BLOOM if model.embedding_norm else MPT
    if model.position == "learned" and not model.gated:
        return OPT if model.position_offset or model.embedding_width else GPT2
    return LLAMA
