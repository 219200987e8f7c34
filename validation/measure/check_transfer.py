"""How wrong is a whole family at once: products of one GPU predicted with another's coefficients.

    python validation/measure/check_transfer.py DATA.tsv.gz

DATA as for ``fit_gemm.py``. Of each pair of GPUs: the median signed error over the rows of the one, by the coefficients
of the other and its own figures. Rows of 1e10 FLOP and more, the size of a training step's. The mean over the pairs of
its size is what all shapes of a family have in common where another machine was measured: within an architecture for a
machine that differs in nothing but its memory or its host; for one that stands in, a generation by the next one.
"""

from __future__ import annotations

import csv
import gzip
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from fit_gemm import MEASURED, SYSTEMS, machine

from sim.cost.gemm import GemmCoefficients, gemm_s

GENERATIONS = (
    {"a100-sxm"}, {"h100-sxm", "h200-sxm"}, {"b200-sxm", "b300-sxm", "gb300"}, {"l40s"}, {"rtx-pro-6000"}
)  # fmt: skip
NEXT = ((0, 1), (1, 2), (3, 4))
"""A generation, and the next one that was measured (of data-center GPUs, and of those without NVLink)."""
LEAST_FLOPS = 1e10
MOST_ROWS = 250


def main() -> None:
    index = {entry["name"]: entry for entry in yaml.safe_load((MEASURED / "index.yaml").read_text())["measured"]}
    with gzip.open(sys.argv[1], "rt") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["gemm_dtype"] == "bfloat16"]
    coefficients, tables = {}, {}
    for system, name in SYSTEMS.items():
        values = yaml.safe_load((MEASURED / f"gemm_{name.replace('-', '_')}.yaml").read_text())["bf16"]["coefficients"]
        coefficients[name] = GemmCoefficients(**{key: values[key] for key in GemmCoefficients.__dataclass_fields__})
        mine = [(int(r["m"]), int(r["n"]), int(r["k"]), float(r["us"]) * 1e-6) for r in rows if r["system"] == system]
        large = [row for row in mine if 2.0 * row[0] * row[1] * row[2] >= LEAST_FLOPS]
        tables[name] = large[:: max(1, len(large) // MOST_ROWS)]
    biases: dict[str, list[float]] = {"same generation": [], "by the next generation": []}
    generation = {name: number for number, names in enumerate(GENERATIONS) for name in names}
    for target, source in permutations(sorted(generation), 2):
        x = machine(index[target], "bf16")
        errors = [gemm_s(m, n, k, 1, x, coefficients[source]) / s - 1 for m, n, k, s in tables[target]]
        pair = (generation[target], generation[source])
        kind = "same generation" if pair[0] == pair[1] else "by the next generation" if pair in NEXT else ""
        if kind:
            biases[kind].append(float(np.median(errors)))
        print(f"{target:14} by {source:14}{np.median(errors):+8.1%}  {kind}")
    for name, found in biases.items():
        print(f"{name}: {len(found)} pairs, root of mean square {np.sqrt(np.mean(np.square(found))):.1%}")


if __name__ == "__main__":
    main()
