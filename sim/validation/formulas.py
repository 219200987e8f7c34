"""How sources count the FLOPs of a step.

A published FLOP/s or MFU is a step time in disguise, by a formula that differs from source to source by up to a third.
So our prediction is expressed in the source's formula: its FLOPs over our step time.

Legend: L layers, S sequence length, A heads * head_dim; per token,

    blocks     weights of the blocks' matrix products
    head       weights of the head's matrix product (vocabulary * hidden)
    N          all parameters, tied ones once
    attention  4 L S A, the two matmuls over the scores, forward, all S * S of them
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from sim.model.transformer import matmul_flops, num_parameters
from sim.scenario.schema import Scenario


class Counts(NamedTuple):
    """What the formulas are made of, FLOP or weights per token."""

    blocks: float
    head: float
    parameters: float
    attention: float


@dataclass(frozen=True, slots=True)
class Formula:
    """``flops`` gives the FLOPs of one token, forward and backward."""

    name: str
    words: str
    source: str
    flops: Callable[[Counts], float]


OURS = Formula(
    "model",
    "6 (blocks + head) + 3 attention",
    "Korthikanti et al., arXiv:2205.05198, appendix A (model FLOPs); NVIDIA NeMo and its benchmark recipes",
    lambda c: 6 * (c.blocks + c.head) + 3 * c.attention,
)
RECOMPUTED = Formula(
    "recomputed",
    "8 blocks + 6 head + 4 attention",
    "Narayanan et al., SC21, arXiv:2104.04473, equation 3: the blocks run forward twice",
    lambda c: 8 * c.blocks + 6 * c.head + 4 * c.attention,
)
CAUSAL = Formula(
    "causal",
    "6 (blocks + head) + 3/2 attention",
    "Megatron-LM, megatron/training/training.py, num_floating_point_operations since 2025: half the scores are masked",
    lambda c: 6 * (c.blocks + c.head) + 1.5 * c.attention,
)
PALM = Formula(
    "palm",
    "6 N + 3 attention",
    "Chowdhery et al., arXiv:2204.02311, appendix B",
    lambda c: 6 * c.parameters + 3 * c.attention,
)
SIX_N = Formula("6N", "6 N", "Kaplan et al., arXiv:2001.08361, section 2.1", lambda c: 6 * c.parameters)
EIGHT_BLOCKS = Formula(
    "8 blocks",
    "8 blocks",
    "bigscience-workshop/Megatron-DeepSpeed@541b967f, megatron/training.py: parameters without embeddings, four passes",
    lambda c: 8 * c.blocks,
)
EIGHT_N = Formula("8N", "8 N", "as 6 N, with the forward pass twice (full recompute)", lambda c: 8 * c.parameters)

_KNOWN: tuple[tuple[str, Formula], ...] = (
    (r"includes (full activation )?recomput|Megatron formula with recompute|96\*?BS?", RECOMPUTED),
    (r"72BLsh\^2|paper Appendix A|attention not causal-halved|\(NeMo\)", OURS),
    (r"num_floating_point_operations", CAUSAL),
    (r"3\*2\*n_params|6N\+12|PaLM", PALM),
    (r"6\*N_non_emb", OURS),
    (r"8\*N_non_emb", EIGHT_BLOCKS),
    (r"size_B\*4\*2", EIGHT_N),
    (r"^\s*6 ?\*? ?N\s*$", SIX_N),
    (r"^\s*8 ?\*? ?N\s*$", EIGHT_N),
)
"""What the texts of ``flops_formula`` say, first match first."""
_CONSTANT = re.compile(r"^([0-9.]+e[0-9]+)\*([34])\*2\*seq\*gbs")
"""BigScience's scripts: a constant number of parameters, three or four passes, 2 FLOP each."""


def formula_of(words: str) -> Formula | None:
    """Return the formula that a source's words name, or None where they name none that is known."""
    if found := _CONSTANT.match(words):
        per_token = float(found[1]) * int(found[2]) * 2
        return Formula("constant", f"{per_token:g} a token", "the source's own script", lambda _: per_token)
    return next((formula for pattern, formula in _KNOWN if re.search(pattern, words)), None)


def counts_of(scenario: Scenario) -> Counts:
    """Return what the formulas are made of. A mixture of experts counts the experts that a token visits."""
    model, training = scenario.model, scenario.training
    tokens = training.micro_batch_size * training.sequence_length
    attention = 4.0 * model.num_hidden_layers * training.sequence_length * model.num_attention_heads * model.head_dim
    weights = (matmul_flops(model, training) / tokens - 3 * attention) / 6
    head = float(model.vocab_size * model.hidden_size)
    return Counts(weights - head, head, float(num_parameters(model)), attention)
