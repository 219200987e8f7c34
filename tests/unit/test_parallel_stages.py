"""Layers over stages: even, uneven, and what a stage makes of tied embeddings."""

from __future__ import annotations

import yaml
from hypothesis import given
from hypothesis import strategies as st

from sim.ir.ledger import Ledger
from sim.model.transformer import describe
from sim.parallel.stages import blocks_per_stage, split
from sim.scenario.load import load_scenario_text


def ledger(num_layers: int, tied: bool = False) -> Ledger:
    asked = {
        "model": {
            "num_hidden_layers": num_layers,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "vocab_size": 256,
            "tie_word_embeddings": tied,
        },
        "cluster": {"node": "dgx-h100"},
        "framework": "megatron",
        "training": {"sequence_length": 32, "micro_batch_size": 1},
    }
    scenario = load_scenario_text(yaml.safe_dump(asked), "stages.yaml")
    return describe(scenario.model, scenario.training, parameter_dtype="bf16", compute_dtype="bf16", autocast=False)


def test_llama_405b_has_one_layer_less_at_each_end():
    """126 layers, an embedding and a head are 128: 8 on each of 16 stages (arXiv 2407.21783, section 3.3.2)."""
    assert blocks_per_stage(126, 16) == (7, *[8] * 14, 7)


def test_layers_of_a_rank_are_shared_by_its_virtual_stages():
    """Two ranks with 5 and 3 layers, two chunks each: stages 0 and 2 are the first rank's."""
    assert blocks_per_stage(8, 4, (5, 3)) == (3, 2, 2, 1)
    assert blocks_per_stage(8, 4, (1, 3, 3, 1)) == (1, 3, 3, 1)


def test_layers_of_a_rank_are_shared_by_its_two_stages_in_a_v() -> None:
    """Ranks with 5 and 3 layers: stages 0 and 3 are the first rank's."""
    assert blocks_per_stage(8, 4, (5, 3), in_a_v=True) == (3, 2, 1, 2)


@given(st.integers(1, 200), st.integers(1, 64))
def test_blocks_are_spread_as_evenly_as_they_go(num_blocks: int, num_stages: int) -> None:
    if num_stages > num_blocks + 2:
        return
    counts = blocks_per_stage(num_blocks, num_stages)
    weighed = list(counts)
    if num_blocks % num_stages:
        weighed[0] += 1
        weighed[-1] += 1
    assert sum(counts) == num_blocks
    assert max(weighed) - min(weighed) <= 1
    assert min(counts) >= 0


@given(st.integers(2, 9), st.integers(2, 4), st.booleans())
def test_stages_are_the_model_in_order(num_layers: int, num_stages: int, tied: bool) -> None:
    whole = ledger(num_layers, tied)
    stages = split(whole.layers, whole.batch_inputs, num_stages)
    assert [layer.name for stage in stages for layer in stage.layers] == [layer.name for layer in whole.layers]
    # the first layer of a later stage makes the tables that all blocks share
    blocks = {id(layer) for stage in stages for layer in stage.layers if layer.kind == "block" and not layer.buffers}
    assert len(blocks) <= 1, "equal layers stay one object"
    for stage in stages[1:]:
        has_blocks = any(layer.kind == "block" for layer in stage.layers)
        assert bool(stage.layers[0].buffers) == (has_blocks and bool(whole.layers[0].buffers))
    assert [t.name for t in stages[0].batch_inputs] == ["tokens"]
    assert [t.name for t in stages[-1].batch_inputs] == ["labels"]
    assert not any(stage.batch_inputs for stage in stages[1:-1])


def test_both_ends_hold_a_tied_embedding():
    """The head owns a copy: parameters of the stages are those of the model and one embedding more, 256 x 64."""
    whole = ledger(4, tied=True)
    first, last = split(whole.layers, whole.batch_inputs, 2)
    assert sum(layer.num_parameters for stage in (first, last) for layer in stage.layers) == (
        whole.num_parameters + 256 * 64
    )
    assert [first.layers[index].name for index, _ in first.tied] == [whole.layers[0].name]
    assert [last.layers[index].name for index, _ in last.tied] == [whole.layers[-1].name]


def test_one_stage_is_the_model_as_it_is():
    whole = ledger(2, tied=True)
    (only,) = split(whole.layers, whole.batch_inputs, 1)
    assert only.layers == whole.layers
    assert not only.tied


def test_every_stage_with_blocks_has_the_tables_that_blocks_read() -> None:
    found = ledger(4)
    (table, *_) = found.layers[0].buffers
    stages = split(found.layers, found.batch_inputs, 4)
    assert [[t.name for layer in stage.layers for t in layer.buffers] for stage in stages] == [
        [t.name for t in found.layers[0].buffers]
    ] * 4
    assert table.num_bytes
