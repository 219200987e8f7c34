"""Fit how far the clock falls under matmuls that follow each other, to a table of their times in a training loop.

    python validation/measure/fit_sustained.py GPU validation/measure/gemm_sustained_b200.tsv

The table has m, n, k and microseconds a product, each timed in a loop of its own on warm operands. All coefficients of
``sim.cost.gemm`` but ``droop`` are those of the GPU's short measurements; ``droop`` is the one that leaves no median
error over products of 1e11 FLOP and more. Prints a line for sim/catalog/measured/sustained.yaml.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

from sim.catalog.load import gpu
from sim.cost import efficiency
from sim.cost.gemm import gemm_s
from sim.cost.roofline import machine_of

LONG_FLOPS = 1e11


def errors(name: str, rows: list[tuple[int, int, int, float]], droop: float) -> list[float]:
    """Return predicted / measured - 1 of the long products."""
    facts = gpu(name)
    source = efficiency.source_of(facts)
    coefficients = replace(efficiency.gemm_coefficients(source, "bf16")[0], droop=droop)
    machine = machine_of(facts, "bf16")
    return [
        gemm_s(m, n, k, 1, machine, coefficients, source.power, sustained=True) / seconds - 1
        for m, n, k, seconds in rows
        if 2 * m * n * k >= LONG_FLOPS
    ]


def main() -> None:
    name, path = sys.argv[1], Path(sys.argv[2])
    with path.open(encoding="utf-8") as file:
        lines = (line for line in file if not line.startswith("#"))
        rows = [
            (int(r["m"]), int(r["n"]), int(r["k"]), float(r["us"]) * 1e-6)
            for r in csv.DictReader(lines, delimiter="\t")
        ]
    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if median(errors(name, rows, middle)) < 0 else (low, middle)
    found = sorted(abs(error) for error in errors(name, rows, low))
    signed = sum(errors(name, rows, low)) / len(found)
    print(
        f"droop: {low:.4f}, residuals: {{count: {len(found)}, median_abs: {median(found):.4f}, "
        f"mean_signed: {signed:.4f}, p90_abs: {found[int(0.9 * len(found))]:.4f}}}"
    )


if __name__ == "__main__":
    main()
