"""Fit what a power limit leaves of the clock of matmuls that follow each other, on Hopper and Blackwell.

    python validation/measure/fit_power.py

Of power_limits.tsv beside this script. ``r`` is the limit over the card's own power, and

    share = ((r - idle) / (1 - idle)) ^ exponent

is the rate that is left: idle and exponent are those of the least squares of logarithms, on a
grid of hundredths. Prints the lines for sim/catalog/measured/power.yaml.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import median

from sim.catalog.load import gpu
from sim.cost import efficiency
from sim.cost.gemm import gemm_s
from sim.cost.roofline import machine_of


def unlimited(name: str, m: int, n: int, k: int) -> float:
    """Return what sim.cost.gemm gives a product at the clock of the machine that was measured, in TFLOP/s."""
    facts = gpu(name)
    source = efficiency.source_of(facts)
    coefficients, _ = efficiency.gemm_coefficients(source, "bf16")
    coefficients = replace(coefficients, droop=efficiency.sustained_droop(source, "bf16", coefficients.droop))
    return 2 * m * n * k / gemm_s(m, n, k, 1, machine_of(facts, "bf16"), coefficients, sustained=True) / 1e12


def main() -> None:
    with (Path(__file__).parent / "power_limits.tsv").open(encoding="utf-8") as file:
        table = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t"))
    points = []
    for row in table:
        r = float(row["watts"]) / float(row["watts_instead"])
        m, n, k = (int(row[key]) for key in ("m", "n", "k"))
        instead = unlimited(row["gpu"], m, n, k) if row["instead"] == "model" else float(row["instead"])
        points.append((r, float(row["tflops"]) / instead))

    def errors(idle: float, exponent: float) -> list[float]:
        return [exponent * log((r - idle) / (1 - idle)) - log(share) for r, share in points]

    lowest = min(r for r, _ in points)
    grid = [(i / 100, e / 100) for i in range(int(lowest * 100)) for e in range(20, 121)]
    idle, exponent = min(grid, key=lambda at: sum(error**2 for error in errors(*at)))
    left = sorted(abs(error) for error in errors(idle, exponent))
    print(f"idle: {idle}, exponent: {exponent}")
    print(f"residuals: {{count: {len(left)}, median_abs: {median(left):.4f}, largest_abs: {left[-1]:.4f}}}")


if __name__ == "__main__":
    main()
