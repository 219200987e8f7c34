"""Speeds of whole steps that were published without batch sizes, so that they are no rows of validation/runs."""

from __future__ import annotations

import pytest

from sim.pipeline import simulate
from sim.report.report import result
from sim.scenario.load import load_scenario


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "sequence", "tflops"),
    [(2048, 24, 16, 2048, 196), (2048, 24, 16, 8192, 220), (2560, 32, 32, 2048, 205), (2560, 32, 32, 8192, 225)],
)
def test_gpt3_with_flash_attention_2_on_a_dgx_a100(tmp_path, hidden, layers, heads, sequence, tflops):
    """GPT3-1.3B and 2.7B on eight A100 80GB SXM, FLOPs counted as 6 N plus attention in full: 63 to 72 % of the peak.

    Dao, FlashAttention-2, arXiv:2307.08691, Table 1. Microbatches of 16,384 tokens, four of a GPU a step, are taken.
    """
    (tmp_path / "gpt3.yaml").write_text(
        f"model: {{hidden_size: {hidden}, intermediate_size: {4 * hidden}, num_hidden_layers: {layers}, "
        f"num_attention_heads: {heads}, vocab_size: 50304, hidden_act: gelu, norm: layernorm, position: learned, "
        f"max_position_embeddings: {sequence}, bias: true, tie_word_embeddings: true}}\n"
        "cluster: {node: dgx-a100-80gb}\nframework: megatron\nparallelism: {zero: 1}\n"
        f"training: {{sequence_length: {sequence}, micro_batch_size: {16384 // sequence}, "
        f"global_batch_size: {32 * 16384 // sequence}, attention: flash-2}}\n",
        encoding="utf-8",
    )
    step = result(simulate(load_scenario(tmp_path / "gpt3.yaml", ())).report, ())["step"]
    assert step["model_flops_per_s_per_gpu"] / 1e12 == pytest.approx(tflops, rel=0.05)
