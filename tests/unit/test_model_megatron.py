"""Which kernels Megatron's modules run, where that depends on the shapes."""

from __future__ import annotations

import pytest
import yaml

from sim.ir.ledger import Attention, Ledger, Pointwise, size
from sim.model.megatron import batches_of_a_block
from sim.model.transformer import describe
from sim.scenario.load import load_scenario_text
from sim.scenario.schema import MegatronSettings


def ledger_of(tp: int, micro_batch_size: int, precision: str = "fp16", *, fused_softmax: bool = True) -> Ledger:
    """Return a block of 16 heads with Megatron's unfused attention."""
    asked = {
        "model": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16,
                  "vocab_size": 1024, "tie_word_embeddings": False},
        "cluster": {"node": "dgx-a100-80gb", "num_gpus": 8},
        "framework": "deepspeed",
        "parallelism": {"tp": tp, "zero": 0},
        "training": {"sequence_length": 1024, "micro_batch_size": micro_batch_size,
                     "global_batch_size": 8 // tp * micro_batch_size, "precision": precision, "attention": "math"},
    }  # fmt: skip
    scenario = load_scenario_text(yaml.safe_dump(asked), "megatron.yaml")
    return describe(
        scenario.model, scenario.training, parameter_dtype="fp16", compute_dtype="fp16", autocast=False, local=True,
        tp=tp, megatron=MegatronSettings(masked_softmax_fusion=fused_softmax),
    )  # fmt: skip


def softmax_kernels(ledger: Ledger) -> tuple[int, int]:
    """Return how many kernels the softmax of a block is, forward and backward."""
    block = ledger.layers[1]
    counts = [
        sum(len(op.kernels) for op in ops if ".softmax" in op.name and isinstance(op.kernels[0], Pointwise))
        for ops in (block.forward, block.backward)
    ]
    return counts[0], counts[1]


@pytest.mark.parametrize(
    ("tp", "micro_batch_size", "kernels"),
    [
        (4, 1, (1, 1)),  # 4 heads of one sequence
        (8, 2, (1, 1)),  # 2 heads of two
        (8, 1, (5, 6)),  # 2 heads of one: not a multiple of 4, so that torch's kernels run one by one
        (2, 1, (1, 1)),
    ],
)
def test_softmax_is_fused_for_multiples_of_four_score_matrices(
    tp: int, micro_batch_size: int, kernels: tuple[int, int]
) -> None:
    assert softmax_kernels(ledger_of(tp, micro_batch_size)) == kernels


def test_torchs_softmax_is_kept_in_fp32() -> None:
    """The fused kernel keeps 2 bytes a score, torch's 4."""
    saved = {}
    for tp in (4, 8):
        block = ledger_of(tp, 1).layers[1]
        (op,) = (op for op in block.forward if op.name.endswith(".softmax"))
        (kept,) = op.saves
        (tensor,) = (t for t in op.writes if t.name == kept)
        saved[tp] = tensor.num_bytes / tensor.num_elements
    assert saved == {4: 2, 8: 4}


@pytest.mark.parametrize(("keys", "batches"), [(4096, 4), (1024, 4), (129, 4), (128, 8), (64, 8), (16, 16)])
def test_batches_of_a_block(keys: int, batches: int) -> None:
    """128 threads: 4 warps, of which each has one row of more than 128 keys or two of fewer."""
    assert batches_of_a_block(keys) == batches


def test_softmax_is_torchs_where_its_fusion_is_turned_off() -> None:
    """``--no-masked-softmax-fusion``: 4 bytes a score are kept, where the fused kernel keeps 2."""
    fused, plain = (softmax_kernels(ledger_of(4, 1, fused_softmax=way)) for way in (True, False))
    assert fused == (1, 1)
    assert plain == softmax_kernels(ledger_of(8, 1))


def test_packed_samples_attend_to_themselves() -> None:
    """1024 tokens of samples of 200: five of 205, as if they were a batch; what is saved stays as it was."""
    kernels: dict[int, list[Attention]] = {}
    saved, flops = {}, {}
    for length in (0, 200):
        asked = {
            "model": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16,
                      "vocab_size": 1024, "tie_word_embeddings": False},
            "cluster": {"node": "dgx-h100", "num_gpus": 8}, "framework": "megatron",
            "training": {"sequence_length": 1024, "micro_batch_size": 1, "global_batch_size": 8, "precision": "bf16",
                         "attention": "cudnn", **({"sample_length": length} if length else {})},
        }  # fmt: skip
        scenario = load_scenario_text(yaml.safe_dump(asked), "packed.yaml")
        ledger = describe(
            scenario.model, scenario.training, parameter_dtype="bf16", compute_dtype="bf16", autocast=False,
            megatron=MegatronSettings(),
        )  # fmt: skip
        block = ledger.layers[1]
        kernels[length] = [
            k for op in (*block.forward, *block.backward) for k in op.kernels if isinstance(k, Attention)
        ]
        saved[length] = [op.saves for op in block.forward]
        flops[length] = ledger.matmul_flops
    assert flops[0] - flops[200] == 3 * 2 * 4 * 1024 * (1024 - 200) * 256
    assert [(size(k.batch), size(k.query), size(k.key)) for k in kernels[200]] == [(5, 205, 205)] * 2
    assert [(size(k.batch), size(k.query)) for k in kernels[0]] == [(1, 1024)] * 2
    assert saved[0] == saved[200]
