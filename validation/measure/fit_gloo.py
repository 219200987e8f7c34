"""Fit sim/catalog/measured/gloo.yaml to measure_gloo.py's table; print what is off by how much.

    python validation/measure/fit_gloo.py validation/measure/gloo_loopback.tsv [--write]

The terms are those of ``sim/cost/gloo.py``, which is called for them. Only rows of two ranks on two cores tell what a
message and a call cost where nothing else runs; rows of four ranks on two cores are held to what follows from them.
Each row counts by its relative error; the least time of its repeats is taken, as the machine runs other things too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from sim.cost.gloo import Coefficients, byte_s, copy_s, latency_s, sends, thread_s, work

CORES = 2
UNITS = {
    "call_s": "a collective",
    "message_s": "a message",
    "near_s": "a byte into or out of the kernel that caches hold",
    "far_s": "one that they do not hold",
    "copy_s": "a byte copied",
    "fault_s": "a byte of a buffer mapped anew",
}
OUT = Path(__file__).parents[2] / "sim" / "catalog" / "measured" / "gloo.yaml"


class Row(NamedTuple):
    kind: str
    ranks: int
    tensor_bytes: int
    sent_bytes: int
    best_s: float


def read(path: Path) -> list[Row]:
    rows: dict[tuple[str, int, int], Row] = {}
    for line in path.read_text().splitlines():
        if line.startswith(("#", "kind")):
            continue
        kind, ranks, size, sent, _, _, best = line.split("\t")
        row = Row(kind, int(ranks), int(size), int(sent), float(best) * 1e-6)
        key = row[:3]
        if key not in rows or row.best_s < rows[key].best_s:
            rows[key] = row
    return list(rows.values())


def model_s(row: Row, c: Coefficients) -> float:
    """Return the time that a row should take on these cores: tensors are in host memory, ranks in one node."""
    one = work(row.kind, row.ranks, row.tensor_bytes)
    if row.kind == "reduce_scatter":
        one = one._replace(copied_bytes=row.tensor_bytes)
    if row.kind == "send":
        return c.message_s + thread_s(one, 1, c)
    moved = 2 * sum(num_bytes for _, _, num_bytes in sends(row.kind, row.ranks, row.tensor_bytes))
    cores_s = (moved * byte_s(one, row.ranks, c) + row.ranks * copy_s(one, c)) / CORES
    return latency_s(one, row.ranks, CORES, c) + max(thread_s(one, row.ranks, c), cores_s)


def fit(rows: list[Row]) -> Coefficients:
    """Return the coefficients of least relative squares, none below zero: one at a time, round and round."""
    values = [50e-6, 40e-6, 2e-10, 4e-10, 2e-10, 5e-10]

    def loss(trial: list[float]) -> float:
        c = Coefficients(*trial)
        return float(np.sum([np.log(model_s(row, c) / row.best_s) ** 2 for row in rows]))

    best, step = loss(values), 1.5
    while step > 1.0005:
        before = best
        for i in range(len(values)):
            for factor in (step, 1 / step):
                trial = [*values]
                trial[i] *= factor
                if (now := loss(trial)) < best:
                    values, best = trial, now
        if best == before:
            step = step**0.5
    return Coefficients(*values)


def main(path: str, write: bool) -> None:
    rows = read(Path(path))
    c = fit([row for row in rows if row.ranks == CORES])
    print({name: f"{value:.4g}" for name, value in c._asdict().items()})
    residuals = {}
    for ranks in sorted({row.ranks for row in rows}):
        for kind in dict.fromkeys(row.kind for row in rows):
            off = [model_s(row, c) / row.best_s - 1 for row in rows if (row.ranks, row.kind) == (ranks, kind)]
            print(f"{kind:15} {ranks} ranks  " + " ".join(f"{error:+5.0%}" for error in off))
        off = [model_s(row, c) / row.best_s - 1 for row in rows if row.ranks == ranks]
        residuals[ranks] = (median(off), median(map(abs, off)))
        print(f"{ranks} ranks: median {residuals[ranks][0]:+.1%}, median absolute {residuals[ranks][1]:.1%}")
    if write:
        head = next(line for line in Path(path).read_text().splitlines() if line.startswith("#")).lstrip("# ")
        lines = [
            "# What torch's collectives over gloo take beside the wires. Written by validation/measure/fit_gloo.py.",
            f"machine: {head.split(';')[0]}",
            f"date: {head.split(';')[1].strip()}",
            "source: >-",
            "  validation/measure/measure_gloo.py over the machine's loopback: least times of repeats, fp32 tensors in",
            "  host memory, 2 ranks on 2 cores that other work shared",
            "coefficients:",
            *(
                f"  {name.removesuffix('_s')}: {{value: {value:.4g}, unit: s, kind: measured, what: {UNITS[name]}}}"
                for name, value in c._asdict().items()
            ),
            "residuals:  # predicted / measured - 1: median, median absolute",
            *(f"  {n} ranks on {CORES} cores: [{a:.3f}, {b:.3f}]" for n, (a, b) in residuals.items()),
        ]
        OUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], "--write" in sys.argv)
