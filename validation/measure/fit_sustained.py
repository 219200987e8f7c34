"""Fit how far the clock falls under matmuls that follow each other, to products that ran long enough for it to settle.

    python validation/measure/fit_sustained.py b200-sxm-180gb validation/measure/gemm_sustained_b200.tsv
    python validation/measure/fit_sustained.py gb200-186gb DATA.tsv.gz [fp8]
    python validation/measure/fit_sustained.py b200-sxm-180gb validation/measure/attention_training.tsv cudnn

The first table has m, n, k and microseconds a product, each timed in a loop of its own on warm operands: what counts
are products of 1e11 FLOP and more. DATA is that of fit_gemm.py: what counts are kernels of 3 ms and more, which are
timed back to back; of fp8 rows, the quantisation fitted there is left out. All coefficients
of ``sim.cost.gemm`` but ``droop`` are those that the GPU uses; ``droop`` is the one that leaves no median error over
the rows not held out (one in five, by checksum). Prints a line for sim/catalog/measured/sustained.yaml, and the held-
out error with the droop of short measurements.

The third is of attention: kernels of 60 ms and more, long after the clock has fallen (5 ms on B200:
flashinfer-ai/flashinfer#2899); its ``droop`` is the mean of what they take longer than by the coefficients, by pass.
"""

from __future__ import annotations

import csv
import gzip
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from fit_gemm import DTYPES, SYSTEMS, quantise_s

from sim.catalog.load import gpu
from sim.cost import efficiency
from sim.cost.attention import attention_s
from sim.cost.gemm import gemm_s
from sim.cost.roofline import machine_of

LONG_FLOPS, LONG_S, LEAST_ROWS = 1e11, 3e-3, 512
SETTLED_S = 60e-3
Row = tuple[int, int, int, float, float]
"""m, n, k, seconds of the product, and of what is timed with it."""


def rows_of(path: Path, name: str, dtype: str) -> list[Row]:
    """Return the long products of a table."""
    facts = gpu(name)
    source, machine = efficiency.source_of(facts), machine_of(facts, dtype)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        table = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t"))
    out: list[Row] = []
    for row in table:
        m, n, k, seconds, beside = int(row["m"]), int(row["n"]), int(row["k"]), float(row["us"]) * 1e-6, 0.0
        if "system" not in row:
            long = 2 * m * n * k >= LONG_FLOPS
        else:
            mine = SYSTEMS.get(row["system"]) == source.name and DTYPES.get(row["gemm_dtype"]) == dtype
            long = mine and seconds >= LONG_S and m >= LEAST_ROWS
        if not long:
            continue
        if "system" in row and dtype == "fp8":
            fitted = efficiency.read(f"gemm_{source.name.replace('-', '_')}.yaml")["fp8"]["coefficients"]
            names = ("row_s", "quantise_fraction", "quantise_floor_s")
            beside = float(quantise_s(m, k, [fitted[key] for key in names], machine))
        out.append((m, n, k, seconds, beside))
    return out


def errors(name: str, dtype: str, rows: Sequence[Row], droop: float) -> list[float]:
    """Return predicted / measured - 1."""
    facts = gpu(name)
    source = efficiency.source_of(facts)
    coefficients = replace(efficiency.gemm_coefficients(source, dtype)[0], droop=droop)
    machine = machine_of(facts, dtype)
    return [
        (gemm_s(m, n, k, 1, machine, coefficients, source.power, sustained=True) + beside) / seconds - 1
        for m, n, k, seconds, beside in rows
    ]


def attention(name: str, path: Path, kernel: str) -> None:
    """Print the droop of both passes of an attention kernel, and by how much single rows are off with it."""
    facts = gpu(name)
    source, machine = efficiency.source_of(facts), machine_of(facts, "bf16")
    with path.open(encoding="utf-8") as file:
        table = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t"))
    for direction in ("forward", "backward"):
        backward = direction == "backward"
        coefficients, _ = efficiency.attention_coefficients(source, kernel, backward)
        found = []
        for row in table:
            seconds = float(row["us"]) * 1e-6
            if (row["gpu"], row["kernel"], row["pass"]) != (name, kernel, direction) or seconds < SETTLED_S:
                continue
            batch, heads, kv_heads, length, width, causal = (
                int(row[key]) for key in ("batch", "heads", "kv_heads", "sequence", "head_dim", "causal")
            )
            short = attention_s(
                batch, heads, kv_heads, length, length, width, bool(causal), backward, machine, coefficients
            )
            peak_s = (10 if backward else 4) * batch * heads * width * length**2 / (1 + causal) / machine.peak_flops
            found.append((short, peak_s, seconds))
        if not found:
            continue
        droop = mean((seconds - short) / peak_s for short, peak_s, seconds in found)
        off = [(short + droop * peak_s) / seconds - 1 for short, peak_s, seconds in found]
        print(f"{kernel} {direction}: droop {droop:.3f}, errors {[round(e, 4) for e in off]}")


def main() -> None:
    if sys.argv[3:] and sys.argv[3] not in DTYPES.values():
        attention(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
        return
    name, path, dtype = sys.argv[1], Path(sys.argv[2]), (*sys.argv[3:], "bf16")[0]
    rows = rows_of(path, name, dtype)
    held = [row for row in rows if zlib.crc32(f"{row[0]},{row[1]},{row[2]}".encode()) % 5 == 0]
    fitted = [row for row in rows if row not in held]
    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if median(errors(name, dtype, fitted, middle)) < 0 else (low, middle)
    found = errors(name, dtype, held, low)
    size = sorted(map(abs, found))
    short = efficiency.gemm_coefficients(efficiency.source_of(gpu(name)), dtype)[0].droop
    before = errors(name, dtype, held, short)
    print(
        f"{dtype}: {{droop: {low:.4f}, residuals: {{count: {len(found)}, median_abs: {median(size):.4f}, "
        f"mean_signed: {mean(found):.4f}, p90_abs: {size[int(0.9 * len(size))]:.4f}}}}}"
        f"  # with {short}: {median(map(abs, before)):.4f}, {mean(before):.4f}"
    )


if __name__ == "__main__":
    main()
