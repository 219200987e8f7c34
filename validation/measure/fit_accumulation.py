"""Fit how much of the reading and writing of C a product that adds to it in place leaves exposed.

    python validation/measure/fit_accumulation.py validation/measure/gemm_accumulation.tsv

The table has products of 1e11 FLOP and more with and without accumulation, timed in loops on one GPU. What
``sim.cost.gemm.gemm_s`` is off by at the median over those that write 16 bits is divided out first, so that only the
difference is fitted; one shape in five (by checksum) is held out. Prints lines for
sim/catalog/measured/accumulation.yaml, and the held-out error without and with it.
"""

from __future__ import annotations

import csv
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from sim.catalog.load import gpu
from sim.cost import efficiency
from sim.cost.gemm import gemm_s, result_s
from sim.cost.roofline import machine_of

LONG_FLOPS = 1e11
C_BYTES = {"bf16": 4, "fp32": 8}
"""Read and written."""


def main() -> None:
    with Path(sys.argv[1]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t"))
    for name in dict.fromkeys(row["gpu"] for row in rows):
        facts = gpu(name)
        source, machine = efficiency.source_of(facts), machine_of(facts, "bf16")
        c = efficiency.gemm_coefficients(source, "bf16")[0]
        c = replace(c, droop=efficiency.sustained_droop(source, "bf16", c.droop))
        plain: list[float] = []
        adding: list[tuple[bool, float, float, float]] = []  # held out, microseconds, model's, of all bytes exposed
        for row in (row for row in rows if row["gpu"] == name):
            m, n, k = int(row["m"]), int(row["n"]), int(row["k"])
            if 2 * m * n * k < LONG_FLOPS:
                continue
            us, ours = float(row["us"]), gemm_s(m, n, k, 1, machine, c, source.power, sustained=True) * 1e6
            if row["accumulate"] == "0":
                plain.append(us / ours)
            elif row["c"] == "fp32":
                held = zlib.crc32(f"{m},{n},{k}".encode()) % 5 == 0
                all_us = result_s(m, n, 1, C_BYTES[row["c"]], 1.0, machine, c) * 1e6
                adding.append((held, us, ours, all_us))
        off = median(plain)
        exposed = median((us - off * ours) / all_us for held, us, ours, all_us in adding if not held)
        before = [off * ours / us - 1 for held, us, ours, _ in adding if held]
        after = [(off * ours + exposed * all_us) / us - 1 for held, us, ours, all_us in adding if held]
        print(
            f"{source.name}: {{exposed: {exposed:.2f}, kind: measured, residuals: {{count: {len(after)}, "
            f"median_abs: {median(map(abs, after)):.4f}, mean_signed: {mean(after):.4f}}}}}"
            f"  # without it: {median(map(abs, before)):.4f}, {mean(before):.4f}; plain products: {off:.3f}"
        )


if __name__ == "__main__":
    main()
