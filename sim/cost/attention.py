"""How long a fused attention kernel takes: tiles of queries, a matrix product and an exponential for each pair.

A thread block owns ``TILE`` queries of one head (backward: keys) and visits all keys that they may see. Each visited
pair of a query and a key costs tensor-core work proportional to ``head_dim`` and softmax work that is not (exponential,
rescaling), which is why small heads are slower:

    pair     = w * head_dim / (f * peak / SMs)  +  softmax clocks / clock,     w = 4 FLOP forward, 10 backward
    block    = prologue + TILE * keys * pair
    compute  = max(longest block, sum of blocks / SMs + tail * longest block)     for more blocks than SMs
    memory   = bytes of q, k, v, o (backward: and their gradients) / achieved bandwidth
    T        = floor + max(compute, memory) + droop * FLOPs / peak

The last term is what the fallen clock takes where kernels that draw more power than the GPU may follow each other, as
in ``sim.cost.gemm``: on B200 forward of 16 heads runs at 1310 TFLOP/s for 3 ms and at 1110 for 60 ms
(validation/measure/attention_training.tsv), and repeated ones lose 15 % within 70 launches, the clock going from 1965
to 1580 MHz (flashinfer-ai/flashinfer#2899).

A causal mask leaves (keys - queries) * queries + queries * (queries + TILE) / 2 pairs: whole blocks on the diagonal.

Sources: Dao, "FlashAttention-2", arXiv 2307.08691 (work partition, five matmuls backward); Shah et al.,
"FlashAttention-3", arXiv 2407.08608, section 3 (exponentials run on a unit with 1/256 of the matmul rate).
Leaves out: what grouped heads save beyond their bytes; dropout inside the kernel.
Checked by: tests/laws/test_cost_laws.py, validation/measure/fit_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from sim.cost.roofline import Machine

TILE = 128
"""Queries (forward) or keys (backward) of a thread block (flash-attention, hopper/tile_size.h)."""


@dataclass(frozen=True, slots=True)
class AttentionCoefficients:
    """Of one kernel and direction on one GPU.

    ``peak_fraction``    share of the dense peak in the matmuls, were there no softmax
    ``softmax_clocks``   clocks of an SM for the softmax of one pair that no matmul hides
    ``prologue_clocks``  clocks to start a block and write its result
    ``tail``             share of the longest block by which the last SM is late
    ``memory_fraction``  share of the memory bandwidth that is achieved
    ``floor_s``          the shortest kernel; backward: with the kernels before and after it
    ``droop``            growth where the clock has settled; 0 of short measurements
    """

    peak_fraction: float
    softmax_clocks: float
    prologue_clocks: float
    tail: float
    memory_fraction: float
    floor_s: float
    droop: float = 0.0


def attention_s(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    causal: bool,
    backward: bool,
    machine: Machine,
    coefficients: AttentionCoefficients,
) -> float:
    """Return the time of one attention kernel (backward: and the two beside it), in seconds, on an idle GPU."""
    c = coefficients
    sms = machine.num_sms
    pair_flops = (10 if backward else 4) * head_dim
    pair_s = pair_flops * sms / (machine.peak_flops * c.peak_fraction)
    pair_s += c.softmax_clocks / machine.clock_hz
    blocks = batch * heads * -(-(keys if backward else queries) // TILE)
    if causal:
        seen = max(0, keys - queries)
        diagonal = min(queries, keys)
        pairs = seen * queries + diagonal * (diagonal + TILE) / 2
    else:
        pairs = float(queries) * keys
    longest_s = TILE * (queries if backward else keys) * pair_s
    prologue_s = c.prologue_clocks / machine.clock_hz
    all_s = (batch * heads * pairs * pair_s + blocks * prologue_s) / sms
    compute_s = max(longest_s + prologue_s, all_s + c.tail * longest_s * min(1.0, blocks / sms))
    tensors = batch * head_dim * machine.element_bytes
    moved = tensors * 2 * (heads * queries + kv_heads * keys)
    if backward:
        moved = 2 * moved + batch * head_dim * 12 * heads * queries
    memory_s = moved / (c.memory_fraction * machine.memory_bytes_per_s)
    droop_s = c.droop * batch * heads * pairs * pair_flops / machine.peak_flops
    return c.floor_s + max(compute_s, memory_s) + droop_s
