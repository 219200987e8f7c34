"""Configs of every family: the published numbers of parameters come out, to the last one."""

from __future__ import annotations

from typing import Any

import pytest

from sim.catalog import load as catalog
from sim.interop.hf_config import FAMILIES, read_hf_config
from sim.interop.values import Problem
from sim.scenario.schema import ModelConfig


def read(config: dict[str, Any], in_place: bool = False) -> ModelConfig:
    problems: list[Problem] = []
    found = read_hf_config(config, ("model",), problems, in_place)
    assert problems == []
    assert found.wrong == set()
    return ModelConfig(**found.keys)


def mistakes(config: dict[str, Any], in_place: bool = False) -> list[str]:
    problems: list[Problem] = []
    read_hf_config(config, ("model",), problems, in_place)
    return [problem.problem for problem in problems]


def num_parameters(m: ModelConfig) -> int:
    """Count the weights of a dense decoder from its shape alone."""
    hidden, width = m.hidden_size, m.embedding_width or m.hidden_size
    query, kv = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
    norm = hidden * (2 if m.norm == "layernorm" and m.norm_bias else 1)
    attention = hidden * (query + 2 * kv) + query * hidden
    attention += (query + 2 * kv) * m.attention_bias + hidden * m.attention_output_bias
    attention += 2 * m.head_dim * m.query_key_norm
    matrices = 3 if m.gated else 2
    mlp = matrices * hidden * m.intermediate_size
    mlp += ((matrices - 1) * m.intermediate_size + hidden) * m.mlp_bias
    if m.num_local_experts:
        mlp = mlp * m.num_local_experts + hidden * m.num_local_experts
    block = attention + mlp + norm * m.num_block_norms
    embedding = m.vocab_size * width + (2 * width * hidden if width != hidden else 0)
    if m.position == "learned":
        embedding += (m.max_position_embeddings + m.position_offset) * hidden
    head = 0 if m.tie_word_embeddings else m.vocab_size * width
    return embedding + norm * m.embedding_norm + m.num_hidden_layers * block + norm * m.final_norm + head


@pytest.mark.parametrize("name", catalog.names("model"))
def test_the_published_number_of_parameters(name: str) -> None:
    known = catalog.model_parameters()
    assert num_parameters(read(catalog.model_config(name))) == known[name][0]


def test_every_family_of_the_catalogue_is_known() -> None:
    for name in catalog.names("model"):
        assert catalog.model_config(name)["model_type"] in FAMILIES


def test_falcon_7b_and_40b_differ_as_they_do() -> None:
    small, large = (read(catalog.model_config(f"falcon-{size}b")) for size in (7, 40))
    assert (small.num_key_value_heads, small.num_block_norms, small.parallel_block) == (1, 1, True)
    assert (large.num_key_value_heads, large.num_block_norms, large.parallel_block) == (8, 2, True)


def test_opt_350m_projects_its_embedding_and_has_no_final_norm() -> None:
    m = read(catalog.model_config("opt-350m"))
    assert (m.embedding_width, m.final_norm, m.position_offset) == (512, False, 2)


def test_qwen2_has_biases_on_queries_keys_and_values_alone() -> None:
    m = read(catalog.model_config("qwen2.5-7b"))
    assert (m.attention_bias, m.attention_output_bias, m.mlp_bias) == (True, False, False)


QWEN3 = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936,
         "tie_word_embeddings": True}  # fmt: skip


def test_qwen3_norms_queries_and_keys_and_has_heads_of_its_own_width() -> None:
    m = read(QWEN3)
    assert (m.query_key_norm, m.head_dim, m.attention_bias) == (True, 128, False)
    # Qwen3-0.6B's model card: 0.6B, 0.44B without the embedding
    assert num_parameters(m) - m.vocab_size * m.hidden_size == 440_467_456


def test_what_changes_neither_size_nor_time_is_passed_over() -> None:
    wild = {**QWEN3, "rope_scaling": {"type": "yarn"}, "quantization_config": {"bits": 4}, "torch_dtype": None,
            "transformers_version": "4.51.0", "auto_map": {}, "sliding_window": None, "head_dim": None}  # fmt: skip
    assert read(wild) == read(QWEN3)


def test_architectures_stand_in_for_a_missing_type() -> None:
    config = {**QWEN3, "architectures": ["Qwen3ForCausalLM"]}
    del config["model_type"]
    assert read(config) == read(QWEN3)


def test_an_unknown_architecture_is_named() -> None:
    assert mistakes({"architectures": ["T5ForConditionalGeneration"]}) == [
        "architecture 'T5ForConditionalGeneration' is not one that sim knows"
    ]
    assert mistakes({"model_type": "lama"}) == ["model type 'lama' is not one that sim knows"]


PLAIN = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}


def test_a_model_in_place_is_a_llama_unless_it_says_otherwise() -> None:
    m = read(PLAIN, in_place=True)
    assert (m.norm, m.position, m.hidden_act, m.tie_word_embeddings) == ("rmsnorm", "rope", "silu", False)
    assert (m.head_dim, m.num_key_value_heads) == (16, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_every_bias_of_a_block(bias: bool) -> None:
    m = read({**PLAIN, "bias": bias, "norm": "layernorm"}, in_place=True)
    assert (m.attention_bias, m.attention_output_bias, m.mlp_bias, m.norm_bias) == (bias,) * 4


def test_a_pasted_llama_config_is_read_whole() -> None:
    pasted = {**PLAIN, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "torch_dtype": "bfloat16", "use_cache": True}
    assert read(pasted, in_place=True) == read(PLAIN, in_place=True)


def test_one_mistake_one_problem() -> None:
    wrong = {**PLAIN, "hidden_size": "wide", "hidden_act": "mish", "colour": 1}
    assert mistakes(wrong, in_place=True) == [
        "model.hidden_size: 'wide' is not a whole number",
        "model.hidden_act: 'mish' is not an activation",
        "unknown key model.colour",
    ]
