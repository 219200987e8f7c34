"""How much slower older attention kernels are than FlashAttention-2, by head size: attention_others.yaml.

Forward and backward were measured together. The share of forward is given (``FORWARD``: Dao, arXiv 2307.08691, section
4.1, for the Triton kernel; as backward for the others), the rest is backward's: the factor that makes the errors of the
sequences' times even, in the geometric mean.

    python -m validation.measure.fit_attention_others
"""

from __future__ import annotations

from math import exp, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from sim.catalog.load import gpu
from sim.cost.attention import attention_s
from sim.cost.efficiency import attention_coefficients, source_of
from sim.cost.roofline import Machine

DATA = Path(__file__).with_name("attention_others.yaml")
TOKENS, WIDTH = 16384, 2048
FORWARD = {"flash-triton": 1.4}
"""FlashAttention-2 is 1.3 to 1.5 times as fast as FlashAttention in Triton in forward."""


def flash_2_s(sequence: int, head_dim: int, causal: bool, backward: bool) -> float:
    facts = gpu("a100-sxm-80gb")
    machine = Machine(
        facts.peak_flops["fp16"], 2, facts.num_sms, facts.boost_clock_hz, facts.memory_bytes_per_s, facts.l2_bytes
    )  # fmt: skip
    coefficients, _ = attention_coefficients(source_of(facts), "flash-2", backward)
    heads = WIDTH // head_dim
    return attention_s(
        TOKENS // sequence, heads, heads, sequence, sequence, head_dim, causal, backward, machine, coefficients
    )  # fmt: skip


def measured_s(sequence: int, causal: bool, tflops: float) -> float:
    """4 S^2 FLOPs forward and 10 S^2 backward a unit of head_dim, of TOKENS / S sequences."""
    return 14 * TOKENS * sequence * WIDTH / (2 if causal else 1) / (tflops * 1e12)


def fitted(curves: list[dict[str, Any]], sequences: list[int], kernel: str) -> tuple[float, float, list[float]]:
    """Return how much slower forward and backward are, and the signed errors of both together."""
    rows = [
        (measured_s(s, c["causal"], t), *(flash_2_s(s, c["head_dim"], c["causal"], way) for way in (False, True)))
        for c in curves
        for s, t in zip(sequences, c["tflops"], strict=True)
    ]
    given = FORWARD.get(kernel)
    if given is None:
        both = exp(fmean(log(measured / (f + b)) for measured, f, b in rows))
        return both, both, [both * (f + b) / measured - 1 for measured, f, b in rows]
    backward = exp(fmean(log((measured - given * f) / b) for measured, f, b in rows))
    return given, backward, [(given * f + backward * b) / measured - 1 for measured, f, b in rows]


def main() -> None:
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    for kernel in dict.fromkeys(c["kernel"] for c in data["curves"]):
        errors: list[float] = []
        for head_dim in (64, 128):
            curves = [c for c in data["curves"] if c["kernel"] == kernel and c["head_dim"] == head_dim]
            forward, backward, found = fitted(curves, data["sequences"], kernel)
            errors += found
            print(f"{kernel} {head_dim}: forward {forward:.3g}, backward {backward:.3g}")
        sizes = sorted(map(abs, errors))
        print(
            f"  residuals: {{count: {len(errors)}, median_abs: {median(sizes):.4f}, mean_signed: {fmean(errors):.4f}, "
            f"p90_abs: {sizes[int(0.9 * len(sizes))]:.4f}}}"
        )


if __name__ == "__main__":
    main()
