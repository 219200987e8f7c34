"""Fit the random numbers that an SM draws in a clock, and print how far off kernels bound by memory are.

    python validation/measure/fit_memory.py validation/measure/memory_bound.tsv

Of sim/cost/memory_bound.py. One rate is fitted for all GPUs of the table, on the rows that draw random numbers and move
more than twice the L2 (smaller ones find some of their input there, which a benchmark's buffers make hard to say): the
median absolute log error, each GPU weighing the same. Shares of the bandwidth stay as they are. Prints residuals
(predicted / measured - 1) of all rows.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import mean, median

from sim.catalog.load import gpu
from sim.cost.efficiency import memory_coefficients
from sim.cost.memory_bound import memory_bound_s
from sim.cost.roofline import Machine

RATES = [i / 20 for i in range(10, 200)]


def predicted_s(row: dict[str, str], rate: float | None = None) -> float:
    facts = gpu(row["gpu"])
    c = memory_coefficients(facts)
    if rate is not None:
        c = replace(c, random_per_clock=rate)
    machine = Machine(
        facts.peak_flops["fp32"], 4, facts.num_sms, facts.boost_clock_hz, facts.memory_bytes_per_s, facts.l2_bytes
    )
    elements = int(row["elements"])
    return memory_bound_s(
        row["family"], elements * int(row["bytes"]), 0, machine, c, elements if row["random"] == "1" else 0
    )


def main() -> None:
    with Path(sys.argv[1]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t"))
    drawing = [
        row for row in rows
        if row["random"] == "1" and int(row["elements"]) * int(row["bytes"]) > 2 * gpu(row["gpu"]).l2_bytes
    ]  # fmt: skip
    names = sorted({row["gpu"] for row in drawing})

    def error(rate: float) -> float:
        return mean(
            median(abs(log(predicted_s(row, rate) / float(row["us"]) * 1e6)) for row in drawing if row["gpu"] == name)
            for name in names
        )

    best = min(RATES, key=error)
    print(f"random_per_clock: {best:g}, mean of the GPUs' median errors {error(best):.4f}")
    for row in rows:
        time_s = predicted_s(row, best if row["random"] == "1" else None)
        print(
            f"{row['gpu']:16} {row['kernel'][:30]:30} {row['elements']:>10} {time_s * 1e6 / float(row['us']) - 1:+.3f}"
        )


if __name__ == "__main__":
    main()
