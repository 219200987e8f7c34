"""FLOP formulas: what sources' words name, and what each counts."""

from __future__ import annotations

import pytest

from sim.scenario.load import load_scenario_mapping
from sim.validation import formulas
from sim.validation.formulas import (
    CAUSAL,
    EIGHT_BLOCKS,
    EIGHT_N,
    OURS,
    PALM,
    RECOMPUTED,
    SIX_N,
    Counts,
    counts_of,
    formula_of,
)

H, L, S, V = 512, 3, 256, 4096


def scenario():
    return load_scenario_mapping(
        {
            "model": {
                "hidden_size": H,
                "intermediate_size": 4 * H,
                "num_hidden_layers": L,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "vocab_size": V,
                "hidden_act": "gelu",
            },
            "cluster": {"node": "dgx-h100"},
            "framework": "ddp",
            "training": {"sequence_length": S, "micro_batch_size": 2, "global_batch_size": 16, "precision": "bf16"},
        },
        "small",
    )


@pytest.mark.parametrize(
    ("words", "formula"),
    [
        ("SC21 eq.3: 96*B*s*l*h^2*(1+s/6h+V/16lh), includes full activation recomputation", RECOMPUTED),
        ("model: 72BLsh^2(1+s/6h+V/12hL) (paper Appendix A)", OURS),
        ("MFU column: B*s*(6N+12*L*h*s)/(t*GPUs*312e12)", PALM),
        ("Model TFLOP (Megatron num_floating_point_operations; MoE active params)", CAUSAL),
        ("size_B*4*2*seq*gbs/(sec*gpus*1e3)", EIGHT_N),
        ("8*N_non_emb: parameters_in_billions_no_embedding * 4 * 2 * seq * gbs", EIGHT_BLOCKS),
        ("6N", SIX_N),
        ("not stated", None),
        ("", None),
    ],
)
def test_what_a_sources_words_name(words, formula):
    assert formula_of(words) is formula


def test_a_constant_number_of_parameters_counts_two_flop_for_each_pass():
    found = formula_of("1.3e9*4*2*seq*gbs/(sec*gpus)")
    assert found is not None
    assert found.flops(Counts(1.0, 2.0, 3.0, 4.0)) == 1.3e9 * 8


def test_korthikantis_formula_is_ours():
    """72 L h^2 (1 + S/6h + V/12hL) a token, appendix A of arXiv:2205.05198, for an MLP four times as wide."""
    assert OURS.flops(counts_of(scenario())) == pytest.approx(72 * L * H**2 * (1 + S / (6 * H) + V / (12 * H * L)))


def test_narayanans_formula_counts_the_blocks_forward_twice():
    """96 L h^2 (1 + S/6h + V/16Lh) a token, equation 3 of arXiv:2104.04473."""
    expected = 96 * L * H**2 * (1 + S / (6 * H) + V / (16 * L * H))
    assert RECOMPUTED.flops(counts_of(scenario())) == pytest.approx(expected)


def test_causal_formulas_leave_out_half_of_the_scores():
    counts = counts_of(scenario())
    assert OURS.flops(counts) - CAUSAL.flops(counts) == pytest.approx(3 * (4 * L * S * H) / 2)


def test_every_formula_says_where_it_is_from():
    for formula in (OURS, RECOMPUTED, CAUSAL, PALM, SIX_N, EIGHT_N):
        assert formula.source
        assert formula.words
    assert len({pattern for pattern, _ in formulas._KNOWN}) == len(formulas._KNOWN)
