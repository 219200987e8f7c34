"""The models are configs as published, and their parameters add up."""

from __future__ import annotations

import pytest

from sim.catalog import load

LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
WIDTHS = ("hidden_size", "n_embd", "n_embed", "d_model")
HEADS = ("num_attention_heads", "n_head", "n_heads")


def only(config, keys):
    found = [config[key] for key in keys if key in config]
    assert len(found) == 1, keys
    return found[0]


@pytest.mark.parametrize("name", load.names("model"))
def test_every_config_says_its_family_and_shape(name):
    config = load.model_config(name)
    assert config["architectures"][0].endswith("ForCausalLM") or config["model_type"] == "gpt2"
    assert config["vocab_size"] > 30_000
    width, heads = only(config, WIDTHS), only(config, HEADS)
    assert only(config, LAYERS) > 0
    assert "head_dim" in config or width % heads == 0


def test_every_model_has_its_exact_number_of_parameters_and_no_other_does():
    assert sorted(load.model_parameters()) == list(load.names("model"))


@pytest.mark.parametrize("name", load.names("model"))
def test_the_number_agrees_with_the_name(name):
    number, fact = load.model_parameters()[name]
    assert fact.source
    size = name.rsplit("-", 1)[-1]
    if size[:-1].replace(".", "").isdigit() and size[-1] in "mb":
        billions = float(size[:-1]) * (1e-3 if size[-1] == "m" else 1)
        assert number / 1e9 == pytest.approx(billions, rel=0.25)


def test_blocks_of_llama_add_up_to_the_published_number():
    # Llama-2-70B: two tables of vocabulary; in a block q and o, k and v (8 of 64 heads), three matrices, two norms.
    h, f, v, layers = 8192, 28672, 32000, 80
    block = 2 * h * h + 2 * h * (8 * 128) + 3 * h * f + 2 * h
    assert load.model_parameters()["llama-2-70b"][0] == 2 * v * h + layers * block + h


def test_a_config_may_be_changed_without_changing_the_next_ones():
    load.model_config("gpt2")["n_layer"] = 99
    assert load.model_config("gpt2")["n_layer"] == 12
