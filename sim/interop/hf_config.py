"""Hugging Face's ``config.json``, as it is found in the wild, and models written in place in its keys.

:func:`read_hf_config` turns the config of a known family into the keys of ``scenario.schema.ModelConfig``. What a
family fixes in code and not in its config (a norm, a bias, an activation) is a row of data here, with its
``transformers/models/*/modeling_*.py`` as source. What changes neither size nor time (``rope_scaling``,
``quantization_config``, token ids, ``torch_dtype``, ...) is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sim.interop.values import Key, Problem, boolean, choice, dotted, integer, number, read_mapping, suggest, text

Keys = dict[str, Any]

MODEL_KEYS: dict[str, Key] = {
    "name": text("a name", "a name"),
    "hidden_size": integer(1, 2**20, 4096, "Width of the residual stream."),
    "intermediate_size": integer(1, 2**24, 11008, "Width of the MLP."),
    "num_hidden_layers": integer(1, 10_000, 32, "Transformer blocks."),
    "num_attention_heads": integer(1, 2**16, 32, "Query heads."),
    "num_key_value_heads": integer(1, 2**16, 8, "Key and value heads; num_attention_heads if left out."),
    "head_dim": integer(1, 2**16, 128, "Width of a head; hidden_size / num_attention_heads if left out."),
    "vocab_size": integer(1, 2**24, 32000, "Rows of the word embedding."),
    "tie_word_embeddings": boolean("Whether the head is the word embedding; false if left out."),
    "hidden_act": choice(
        ("silu", "gelu", "relu", "gelu_gated"), "an activation", "silu and gelu_gated have a gate, gelu and relu not."
    ),
    "norm": choice(("rmsnorm", "layernorm"), "a norm"),
    "position": choice(("rope", "learned", "alibi", "none"), "a position encoding"),
    "max_position_embeddings": integer(1, 2**30, 4096, "Rows of a learned position table."),
    "bias": boolean("Biases in all linear layers of a block (and the norms)."),
    "attention_bias": boolean("Bias of the query, key and value projections."),
    "attention_output_bias": boolean("Bias of the attention's output projection; as attention_bias if left out."),
    "mlp_bias": boolean("Biases in the MLP."),
    "head_bias": boolean("Bias of the head."),
    "norm_bias": boolean("Bias of a layernorm; true if left out."),
    "dropout": number(
        0, 1, "0.1", "Residual, embedding and MLP dropout; 0.1 for a GPT in Megatron's code.", below=True
    ),
    "attention_dropout": number(0, 1, "0.1", "Dropout of the attention weights; likewise.", below=True),
    "position_offset": integer(0, 2**20, 2, "Extra rows of a learned position table (OPT has 2)."),
    "embedding_norm": boolean("A norm after the word embedding (BLOOM)."),
    "embedding_width": integer(1, 2**20, 512, "Width of the word embedding where it is projected (OPT-350M)."),
    "final_norm": boolean("A norm before the head; true if left out."),
    "parallel_block": boolean("Attention and MLP read the same normed input (Falcon)."),
    "num_block_norms": integer(1, 2, 2, "Norms in a block."),
    "query_key_norm": boolean("Norms on queries and keys (Qwen3)."),
    "fused_qkv": boolean("One matrix makes query, key and value where the family's own code has three."),
    "num_local_experts": integer(1, 65536, 8, "Experts of a layer (mixture of experts)."),
    "num_experts_per_tok": integer(1, 65536, 2, "Experts that a token visits."),
    "moe_intermediate_size": integer(1, 2**24, 1408, "Width of an expert; intermediate_size if left out."),
    "num_shared_experts": integer(0, 65536, 1, "Experts that every token visits."),
}
"""The keys of a model written in place: those of a Hugging Face Llama ``config.json`` and what other families add."""

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu",
    **dict.fromkeys(
        ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "gelu_accurate", "quick_gelu"), "gelu"
    ),
}  # fmt: skip

_IN_PLACE_IGNORED = (
    "model_type", "architectures", "torch_dtype", "dtype", "rope_theta", "rope_scaling", "rope_parameters",
    "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "initializer_range", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "transformers_version", "pretraining_tp", "_name_or_path", "sliding_window",
    "use_sliding_window", "max_window_layers", "quantization_config", "attn_implementation", "_attn_implementation",
)  # fmt: skip


class HfModel(NamedTuple):
    """What a config says: keys of ModelConfig, the sources of those it does not give, what is wrong."""

    keys: Keys
    sources: dict[str, str]
    wrong: set[str]
    family: str
    """The ``model_type``, or "" for a model written in place in plain keys."""


class _Family(NamedTuple):
    """How one ``model_type`` is read.

    ``names``    our key -> the config's keys that give it, the first present wins
    ``defaults`` values that the family's configuration class has where the config is silent
    ``fixed``    what the family's code does whatever the config says
    ``finish``   the rest, which needs arithmetic
    """

    names: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    finish: Callable[[Keys, Mapping[str, Any]], None] | None = None


_COMMON: dict[str, tuple[str, ...]] = {
    key: (key,)
    for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings", "attention_dropout", "hidden_act",
    )
}  # fmt: skip
_MOE: dict[str, tuple[str, ...]] = {
    "num_local_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_tok",),
    "moe_intermediate_size": ("moe_intermediate_size",),
    "num_shared_experts": ("num_shared_experts", "n_shared_experts"),
}
_LLAMA_FIXED = {"norm": "rmsnorm", "position": "rope"}


def _llama_biases(keys: Keys, config: Mapping[str, Any]) -> None:
    """LlamaAttention and LlamaMLP: ``attention_bias`` covers all four projections, ``mlp_bias`` all three."""
    keys["attention_bias"] = keys["attention_output_bias"] = config.get("attention_bias") is True
    keys["mlp_bias"] = config.get("mlp_bias") is True


def _qwen3_biases(keys: Keys, config: Mapping[str, Any]) -> None:
    keys["attention_bias"] = keys["attention_output_bias"] = config.get("attention_bias") is True


def _four_times(keys: Keys, config: Mapping[str, Any]) -> None:
    if "hidden_size" in keys:
        keys.setdefault("intermediate_size", 4 * keys["hidden_size"])


def _falcon(keys: Keys, config: Mapping[str, Any]) -> None:
    """FalconDecoderLayer: new_decoder_architecture has two norms and grouped heads; ``multi_query`` has one head."""
    _four_times(keys, config)
    new = config.get("new_decoder_architecture") is True
    heads = keys.get("num_attention_heads")
    if not new:
        keys["num_key_value_heads"] = 1 if config.get("multi_query", True) else heads
    elif "num_key_value_heads" not in keys and heads is not None:
        keys["num_key_value_heads"] = heads
    keys["parallel_block"] = new or config.get("parallel_attn", True) is True
    given = config.get("num_ln_in_parallel_attn")
    keys["num_block_norms"] = (given if given in (1, 2) else 2) if new else (1 if keys["parallel_block"] else 2)
    bias = config.get("bias") is True
    keys["attention_bias"] = keys["attention_output_bias"] = keys["mlp_bias"] = bias
    keys["position"] = "alibi" if config.get("alibi") is True else "rope"


def _mpt(keys: Keys, config: Mapping[str, Any]) -> None:
    """MptModel has neither biases nor norm biases; ``attn_config`` holds its attention."""
    attention = config.get("attn_config")
    attention = attention if isinstance(attention, Mapping) else {}
    ratio = config.get("expansion_ratio", 4)
    if "hidden_size" in keys and isinstance(ratio, int | float) and 0 < ratio < 1000:
        keys.setdefault("intermediate_size", int(ratio * keys["hidden_size"]))
    kind = attention.get("attn_type")
    given = attention.get("kv_n_heads")
    if kind == "multiquery_attention":
        keys["num_key_value_heads"] = 1
    elif isinstance(given, int) and given > 0:
        keys["num_key_value_heads"] = given
    keys["position"] = "alibi" if attention.get("alibi", True) else "learned"
    drop = attention.get("attn_pdrop")
    keys["attention_dropout"] = float(drop) if isinstance(drop, int | float) and 0 <= drop < 1 else 0.0
    bias = config.get("no_bias") is False
    for key in ("attention_bias", "attention_output_bias", "mlp_bias", "norm_bias"):
        keys[key] = bias
    keys["query_key_norm"] = attention.get("qk_ln") is True


def _opt(keys: Keys, config: Mapping[str, Any]) -> None:
    """OPTDecoder: OPT-350M norms after the block (so it has no final norm) and projects its embeddings."""
    bias = config.get("enable_bias", True) is True
    keys["attention_bias"] = keys["attention_output_bias"] = keys["mlp_bias"] = bias
    keys["final_norm"] = config.get("do_layer_norm_before", True) is True
    if keys.get("embedding_width") == keys.get("hidden_size"):
        keys.pop("embedding_width", None)


def _neox(keys: Keys, config: Mapping[str, Any]) -> None:
    keys["parallel_block"] = config.get("use_parallel_residual", True) is True
    bias = config.get("attention_bias", True) is True
    keys["attention_bias"] = keys["attention_output_bias"] = bias


def _gemma(keys: Keys, config: Mapping[str, Any]) -> None:
    """GemmaMLP is gated whatever the activation; ``hidden_activation`` wins over ``hidden_act`` and is a gelu."""
    keys["hidden_act"] = "gelu_gated"
    bias = config.get("attention_bias") is True
    keys["attention_bias"] = keys["attention_output_bias"] = bias


_ALL_BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
FAMILIES: dict[str, _Family] = {
    "llama": _Family(
        {**_COMMON, **_MOE}, {"hidden_act": "silu", "tie_word_embeddings": False}, _LLAMA_FIXED, _llama_biases
    ),
    "mistral": _Family(
        _COMMON, {"hidden_act": "silu", "tie_word_embeddings": False, "num_key_value_heads": 8}, _LLAMA_FIXED
    ),
    "mixtral": _Family(
        {**_COMMON, **_MOE},
        {
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        _LLAMA_FIXED,
    ),
    "qwen2": _Family(
        _COMMON, {"hidden_act": "silu", "tie_word_embeddings": False}, {**_LLAMA_FIXED, "attention_bias": True}
    ),
    "qwen3": _Family(
        _COMMON,
        {"hidden_act": "silu", "tie_word_embeddings": False, "head_dim": 128},
        {**_LLAMA_FIXED, "query_key_norm": True},
        _qwen3_biases,
    ),
    "qwen3_moe": _Family(
        {**_COMMON, **_MOE},
        {"hidden_act": "silu", "tie_word_embeddings": False},
        {**_LLAMA_FIXED, "query_key_norm": True},
        _qwen3_biases,
    ),
    "gemma": _Family(_COMMON, {"tie_word_embeddings": True, "head_dim": 256}, _LLAMA_FIXED, _gemma),
    "gpt2": _Family(
        {
            "hidden_size": ("n_embd", "hidden_size"),
            "intermediate_size": ("n_inner", "intermediate_size"),
            "num_hidden_layers": ("n_layer", "num_hidden_layers"),
            "num_attention_heads": ("n_head", "num_attention_heads"),
            "vocab_size": ("vocab_size",),
            "max_position_embeddings": ("n_positions", "n_ctx", "max_position_embeddings"),
            "hidden_act": ("activation_function",),
            "dropout": ("resid_pdrop",),
            "attention_dropout": ("attn_pdrop",),
            "tie_word_embeddings": ("tie_word_embeddings",),
        },
        {
            "hidden_act": "gelu",
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
        },
        {"norm": "layernorm", "position": "learned", **_ALL_BIASES},
        _four_times,
    ),
    "gpt_neox": _Family(
        {**_COMMON, "dropout": ("hidden_dropout",)},
        {"hidden_act": "gelu", "tie_word_embeddings": False},
        {"norm": "layernorm", "position": "rope", "mlp_bias": True},
        _neox,
    ),
    "falcon": _Family(
        {
            **_COMMON,
            "intermediate_size": ("ffn_hidden_size",),
            "hidden_act": ("activation",),
            "num_hidden_layers": ("num_hidden_layers", "n_layer"),
            "num_attention_heads": ("num_attention_heads", "n_head"),
            "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
            "dropout": ("hidden_dropout",),
        },
        {"hidden_act": "gelu", "tie_word_embeddings": True},
        {"norm": "layernorm"},
        _falcon,
    ),
    "mpt": _Family(
        {
            "hidden_size": ("d_model",),
            "num_hidden_layers": ("n_layers",),
            "num_attention_heads": ("n_heads",),
            "vocab_size": ("vocab_size",),
            "max_position_embeddings": ("max_seq_len",),
            "dropout": ("resid_pdrop",),
            "tie_word_embeddings": ("tie_word_embeddings",),
        },
        {"hidden_act": "gelu", "tie_word_embeddings": True},
        {"norm": "layernorm"},
        _mpt,
    ),
    "opt": _Family(
        {
            **_COMMON,
            "embedding_width": ("word_embed_proj_dim",),
            "intermediate_size": ("ffn_dim",),
            "hidden_act": ("activation_function",),
            "dropout": ("dropout",),
        },
        {"hidden_act": "relu", "tie_word_embeddings": True, "dropout": 0.1, "max_position_embeddings": 2048},
        {"norm": "layernorm", "position": "learned", "position_offset": 2},
        _opt,
    ),
    "bloom": _Family(
        {
            "hidden_size": ("hidden_size", "n_embed"),
            "num_hidden_layers": ("n_layer", "num_hidden_layers"),
            "num_attention_heads": ("n_head", "num_attention_heads"),
            "vocab_size": ("vocab_size",),
            "max_position_embeddings": ("seq_length",),
            "dropout": ("hidden_dropout",),
            "attention_dropout": ("attention_dropout",),
            "tie_word_embeddings": ("tie_word_embeddings",),
        },
        {"hidden_act": "gelu", "tie_word_embeddings": True},
        {"norm": "layernorm", "position": "alibi", "embedding_norm": True, **_ALL_BIASES},
        _four_times,
    ),
}


def read_hf_config(
    config: Mapping[str, Any], path: tuple[str, ...], problems: list[Problem], in_place: bool = False
) -> HfModel:
    """Read a config. ``path`` is where it stands in its document; mistakes are added to ``problems``.

    A config with a ``model_type`` is read as that family's. Without one it is read in plain keys (``MODEL_KEYS``);
    there ``in_place`` says that an unknown key is a mistake (a scenario), and not one of a file's many others.
    """
    family = config.get("model_type")
    if family is None:
        family = _family_of_architecture(config, path, problems, in_place)
        if family is None:
            return _read_plain(config, path, problems, strict=in_place and "architectures" not in config)
        if not family:
            return HfModel({}, {}, set(MODEL_KEYS), "")
    if not isinstance(family, str) or family not in FAMILIES:
        at = (*path, "model_type")
        word = family if isinstance(family, str) else ""
        problems.append(
            Problem(at, f"model type {family!r:.40} is not one that sim knows", suggest(word, FAMILIES, most=20))
        )
        return HfModel({}, {}, set(MODEL_KEYS), "")
    return _read_family(family, config, path, problems)


def _family_of_architecture(
    config: Mapping[str, Any], path: tuple[str, ...], problems: list[Problem], in_place: bool
) -> str | None:
    """Return the family that ``architectures`` names, "" if it is not known, None if there is no such key."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if not isinstance(first, str):
        return None
    bare = first.lower().removesuffix("forcausallm").removesuffix("lmheadmodel").replace("_", "")
    for family in FAMILIES:
        if family.replace("_", "") == bare:
            return family
    problems.append(
        Problem(
            (*path, "architectures"),
            f"architecture {first!r:.60} is not one that sim knows",
            f"known: {', '.join(FAMILIES)}",
        )
    )
    return ""


def _read_family(  # noqa: PLR0912 - one branch for each way that a key may be silent or wrong
    family: str, config: Mapping[str, Any], path: tuple[str, ...], problems: list[Problem]
) -> HfModel:
    spec = FAMILIES[family]
    keys: Keys = {}
    sources: dict[str, str] = {}
    wrong: set[str] = set()
    for ours, theirs in spec.names.items():
        given = next((name for name in theirs if config.get(name) is not None), None)
        if given is None:
            if ours in spec.defaults:
                keys[ours] = spec.defaults[ours]
                sources[ours] = f"transformers' default for {family}"
            continue
        value = config[given]
        if ours == "hidden_act":
            if isinstance(value, str) and value in _ACTIVATIONS:
                keys[ours] = _ACTIVATIONS[value]
            elif family != "gemma":
                _complain(
                    problems,
                    (*path, given),
                    f"{value!r:.40} is not an activation that sim knows",
                    suggest(str(value), _ACTIVATIONS),
                )
                wrong.add(ours)
            continue
        local: list[Problem] = []
        found, _ = read_mapping({given: value}, {given: MODEL_KEYS[ours]}, path, local)
        if local:
            problems.extend(local)
            wrong.add(ours)
        else:
            keys[ours] = found[given]
    for ours, value in {**spec.defaults, **spec.fixed}.items():
        if ours not in keys and ours not in wrong:
            keys[ours] = value
            sources.setdefault(ours, f"the code of {family} in transformers")
    if spec.finish is not None:
        before = set(keys)
        spec.finish(keys, config)
        for ours in sorted(set(keys) - before):
            sources[ours] = f"the code of {family} in transformers"
            if read_mapping({ours: keys[ours]}, MODEL_KEYS, path, problems)[1]:
                wrong.add(ours)
    missing = [ours for ours in REQUIRED if ours not in keys and ours not in wrong]
    if missing:
        theirs_missing = [spec.names.get(ours, (ours,))[0] for ours in missing]
        problems.append(
            Problem(
                path,
                f"{dotted(path) or 'the config'} of type {family} lacks {', '.join(theirs_missing)}",
                "a config.json of that family has them; copy it whole",
            )
        )
        wrong.update(missing)
    complete(keys, sources, wrong)
    return HfModel(keys, sources, wrong, family)


def _complain(problems: list[Problem], at: tuple[str, ...], what: str, remedy: str) -> None:
    problems.append(Problem(at, f"{dotted(at)}: {what}", remedy))


def _read_plain(config: Mapping[str, Any], path: tuple[str, ...], problems: list[Problem], strict: bool) -> HfModel:
    """Read the plain keys. Outside a scenario, unknown keys are a config's many others and are passed over."""
    ours = {
        key: value
        for key, value in config.items()
        if (strict and key not in _IN_PLACE_IGNORED) or (not strict and key in MODEL_KEYS)
    }
    act = ours.get("hidden_act")
    if isinstance(act, str) and act in _ACTIVATIONS:
        ours["hidden_act"] = _ACTIVATIONS[act]
    keys, wrong = read_mapping(ours, MODEL_KEYS, path, problems)
    misspelt = [key for key in ours if key not in MODEL_KEYS]
    missing = [key for key in REQUIRED if key not in keys and key not in wrong]
    if missing:
        from sim.interop.values import near

        named = {close for word in misspelt for close in near(word, MODEL_KEYS, 1)}
        if rest := [key for key in missing if key not in named]:
            problems.append(
                Problem(
                    path,
                    f"{dotted(path) or 'the config'} lacks {', '.join(rest)}",
                    "write them, or give the model as a name or the path of a config.json",
                )
            )
        wrong.update(missing)
    sources: dict[str, str] = {}
    bias = keys.pop("bias", None)
    if bias is not None:
        for key in ("attention_bias", "attention_output_bias", "mlp_bias"):
            if key not in keys:
                keys[key] = bias
                sources[key] = "model.bias"
        if not bias and keys.get("norm") == "layernorm" and "norm_bias" not in keys:
            keys["norm_bias"] = False
            sources["norm_bias"] = "model.bias"
    elif "attention_bias" in keys and "attention_output_bias" not in keys:
        keys["attention_output_bias"] = keys["attention_bias"]
        sources["attention_output_bias"] = "model.attention_bias"
    complete(keys, sources, wrong)
    return HfModel(keys, sources, wrong, "")


def complete(keys: Keys, sources: dict[str, str], wrong: set[str]) -> None:
    """Fill in heads and their width, which most configs leave out."""
    heads, hidden = keys.get("num_attention_heads"), keys.get("hidden_size")
    if "num_key_value_heads" not in keys and "num_key_value_heads" not in wrong and heads is not None:
        keys["num_key_value_heads"] = heads
        sources["num_key_value_heads"] = "num_attention_heads: no grouped queries"
    if "head_dim" not in keys and "head_dim" not in wrong and heads and hidden and hidden % heads == 0:
        keys["head_dim"] = hidden // heads
        sources["head_dim"] = "hidden_size / num_attention_heads"
