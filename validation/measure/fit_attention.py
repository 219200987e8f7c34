"""Fit the coefficients of sim/cost/attention.py on measured times and on the authors' own plots.

    python validation/measure/fit_attention.py DATA.tsv.gz [--write] [--iterations 3000]

(A100 and L40S: ``--only a100-sxm,l40s --iterations 6000``, as the two share what backward takes beside forward.)

DATA has the columns system, kernel_source, batch_size, isl, num_heads, num_key_value_heads, head_dim, latency_us:
causal forward passes in 16 bit (ai-dynamo/aiconfigurator @095f58a51, Apache-2.0). The plots are in
flash_attention_plots.yaml beside this script: forward, backward, and both together.

The measured rows are of serving engines, whose calls also write keys and values into a paged cache and read them from
it: that is fitted beside the kernel, as a time for each byte of keys and values and a constant, and left out of the
coefficients; on A100 those engines' kernel, which finds keys through a table of pages, is slower by a factor too
(``Target.paged``). Where a kernel has both, a plotted point weighs as much as twenty measured rows (a plot has few).
One measured row in five is held out.

attention_training.tsv beside this script has kernels timed in a loop, by a training library (MooreThreads/SimuMax
@4dcaae5) and by cuDNN's own benchmark (NVIDIA/cudnn-frontend @3929da2), both passes: a row weighs as much as a plotted
point, one in five is held out too. A machine with less power
than the one of the coefficients takes as much longer as ``sim.cost.efficiency`` says.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fit_gemm import MEASURED, machine, residuals

from sim.catalog import load
from sim.cost import efficiency
from sim.cost.attention import TILE, AttentionCoefficients, attention_s
from sim.cost.roofline import Machine

HERE = Path(__file__).parent
FIELDS = tuple(field for field in AttentionCoefficients.__dataclass_fields__ if field != "droop")
"""Fitted here; the droop is of kernels that run longer than these (fit_sustained.py)."""


@dataclass(frozen=True)
class Target:
    """A kernel on a GPU, and which measured rows are of it ((system, kernel_source), or none).

    ``paged``: other rows say how long the plain kernel takes, and that those of the serving engine, which finds keys
    and values through a table of pages, take longer: by a factor that is fitted, and left out of the coefficients.
    """

    gpu: str
    kernel: str
    rows: tuple[str, str] | None = None
    paged: bool = False


TARGETS = (
    Target("a100-sxm", "flash-2", ("a100_sxm_attention_vllm_0.14.0", "vllm_flash_attn"), paged=True),
    Target("h100-sxm", "flash-2"),
    Target("h100-sxm", "flash-3", ("h100_sxm_attention_vllm_0.24.0", "vllm_flash_attn_fa3")),
    Target("h100-sxm", "cudnn"),
    Target("h200-sxm", "flash-3", ("h200_sxm_attention_vllm_0.24.0", "vllm_flash_attn_fa3")),
    Target("h200-sxm", "cudnn"),
    Target("l40s", "flash-2", ("l40s_attention_vllm_0.24.0", "vllm_flash_attn_fa2")),
    Target("b200-sxm", "cudnn", ("b200_sxm_attention_vllm_0.24.0", "vllm_flashinfer_trtllmprefill")),
    Target("gb200", "cudnn"),
    Target("gb300", "cudnn"),
)
START = (0.8, 0.1, 2000.0, 0.3, 0.8, 4e-6)
LOW = (0.2, 0.005, 50.0, 0.01, 0.5, 2e-6)
HIGH = (1.0, 2.0, 40000.0, 1.0, 0.95, 8e-6)
BACKWARD_HIGH = (1.0, 2.0, 40000.0, 1.0, 0.95, 1.6e-5)
"""The floor is of one kernel; backward has two small ones beside it (dot of o and its gradient, cast of dq)."""
SCALED = np.array([1, 1, 1, 0, 0, 0], bool)
"""Coefficients whose ratio of backward to forward is carried over to GPUs without a measured backward."""
ALSO_OF = {"h200-sxm": "h100-sxm"}
"""Rows of one machine that count for another of the same chip, as attention is not bound by memory: cuDNN 9.19's
beside the plots of 9.0."""
NAMES = ("batch", "heads", "kv_heads", "sequence", "head_dim", "causal")


def times(theta: np.ndarray, s: np.ndarray, backward: bool, x: Machine) -> np.ndarray:
    """``attention_s`` for rows (batch, heads, kv_heads, sequence, head_dim, causal)."""
    batch, heads, kv_heads, length, width, causal = s.T
    eff, softmax, prologue, tail, fraction, floor = theta
    pair = (10 if backward else 4) * width * x.num_sms / (x.peak_flops * eff) + softmax / x.clock_hz
    blocks = batch * heads * np.ceil(length / TILE)
    pairs = np.where(causal > 0, length * (length + TILE) / 2, length * length)
    longest = TILE * length * pair
    start = prologue / x.clock_hz
    total = (batch * heads * pairs * pair + blocks * start) / x.num_sms
    compute = np.maximum(longest + start, total + tail * longest * np.minimum(1, blocks / x.num_sms))
    moved = batch * width * x.element_bytes * 2 * (heads + kv_heads) * length
    if backward:
        moved = 2 * moved + batch * width * 12 * heads * length
    total_s: np.ndarray = floor + np.maximum(compute, moved / (fraction * x.memory_bytes_per_s))
    return total_s


def plotted(gpu: str, kernel: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows and seconds of the curves of a kernel, by pass."""
    plots = yaml.safe_load((HERE / "flash_attention_plots.yaml").read_text())
    out: dict[str, tuple[list[Any], list[float]]] = {}
    for curve in plots["curves"]:
        if (curve["gpu"], curve["kernel"]) != (gpu, kernel):
            continue
        rows, seconds = out.setdefault(curve["pass"], ([], []))
        width = curve["head_dim"]
        work = {"forward": 4, "backward": 10, "both": 14}[curve["pass"]]
        for length, tflops in zip(plots["sequences"], curve["tflops"], strict=True):
            if tflops is not None:
                batch, heads = 16384 // length, 2048 // width
                rows.append((batch, heads, heads, length, width, curve["causal"]))
                flops = work * batch * heads * width * length**2 / (2 if curve["causal"] else 1)
                seconds.append(flops / (tflops * 1e12))
    return {name: (np.array(rows, float), np.array(seconds)) for name, (rows, seconds) in out.items()}


@dataclass(frozen=True)
class Loop:
    """Rows and seconds of a kernel timed in a loop; ``power``: share of the clock that the GPU's power leaves."""

    rows: np.ndarray
    seconds: np.ndarray
    held: np.ndarray
    power: float


def looped(gpu: str, kernel: str) -> dict[str, Loop]:
    """Return the rows of attention_training.tsv of a kernel on a machine of the index, by pass."""
    with (HERE / "attention_training.tsv").open(encoding="utf-8") as file:
        table = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t"))
    out = {}
    for direction in ("forward", "backward"):
        mine = []
        power = 1.0
        for row in table:
            source = efficiency.source_of(load.gpu(row["gpu"]))
            names = (source.name, ALSO_OF.get(source.name))
            if gpu in names and (row["kernel"], row["pass"]) == (kernel, direction):
                mine.append(row)
                power = source.power
        if mine:
            rows = np.array([[int(row[key]) for key in NAMES] for row in mine], float)
            held = np.array([zlib.crc32(repr(s).encode()) % 5 == 0 for s in rows.tolist()], dtype=bool)
            out[direction] = Loop(rows, np.array([float(row["us"]) * 1e-6 for row in mine]), held, power)
    return out


def search(loss: Any, start: list[float], low: list[float], high: list[float], iterations: int) -> np.ndarray:
    """Seeded random walk downhill."""
    low_, high_, random = np.array(low), np.array(high), np.random.default_rng(0)
    theta = np.array(start)
    value, step = loss(theta), 0.3
    for i in range(iterations):
        which = random.integers(0, len(theta), 1 if random.random() < 0.6 else 3)
        other = theta.copy()
        other[which] = np.clip(theta[which] * np.exp(random.normal(size=len(which)) * step), low_[which], high_[which])
        if (new := loss(other)) < value:
            theta, value = other, new
        if i % (iterations // 5) == iterations // 5 - 1:
            step *= 0.5
    return theta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", action="store_true", help="write sim/catalog/measured/attention_*.yaml")
    parser.add_argument("--only", default="", help="names of GPUs, separated by commas; others keep their files")
    parser.add_argument("--iterations", type=int, default=3000)
    args = parser.parse_args()
    index = {entry["name"]: entry for entry in yaml.safe_load((MEASURED / "index.yaml").read_text())["measured"]}
    with gzip.open(args.data, "rt") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    out: dict[str, dict[str, Any]] = {}
    ratio: dict[str, np.ndarray] = {}
    print(f"{'gpu':12}{'kernel':9}{'rows':26}{'count':>6}{'median':>8}{'mean':>8}{'p90':>8}")
    for target in TARGETS:
        wanted_here = not args.only or target.gpu in args.only.split(",")
        if not wanted_here and target.kernel in ratio:
            continue
        x = machine(index[target.gpu], "bf16")
        curves = plotted(target.gpu, target.kernel)
        loops = looped(target.gpu, target.kernel)
        mine = [
            row for row in table if (row["system"], row["kernel_source"]) == target.rows and int(row["head_dim"]) <= 256
        ]
        keys = ("batch_size", "num_heads", "num_key_value_heads", "isl", "head_dim")
        shapes = np.array([[int(row[key]) for key in keys] + [1] for row in mine], float).reshape(-1, 6)
        seconds = np.array([float(row["latency_us"]) * 1e-6 for row in mine])
        held = np.array([zlib.crc32(repr(s).encode()) % 5 == 0 for s in shapes.tolist()], dtype=bool)
        cache_bytes = 4 * shapes[:, 0] * shapes[:, 2] * shapes[:, 3] * shapes[:, 4]
        reference = ratio.get(target.kernel)
        has_backward = "backward" in curves or "both" in curves or "backward" in loops

        def parts(
            theta: np.ndarray, reference: Any = reference, own: bool = has_backward
        ) -> tuple[np.ndarray, np.ndarray]:
            backward = theta[6:12] if own or reference is None else np.minimum(theta[:6] * reference, BACKWARD_HIGH)
            return theta[:6], backward

        def errors(
            theta: np.ndarray, x: Any = x, curves: Any = curves, shapes: Any = shapes, cache: Any = cache_bytes,
            seconds: Any = seconds, parts: Any = parts, loops: Any = loops,
        ) -> dict[str, np.ndarray]:  # fmt: skip
            forward, backward = parts(theta)
            found = {}
            for name, (rows, wanted) in curves.items():
                t = times(forward, rows, False, x) if name in ("forward", "both") else 0.0
                if name in ("backward", "both"):
                    t = t + times(backward, rows, True, x)
                found[name] = t / wanted - 1
            for name, loop in loops.items():
                t = times(forward if name == "forward" else backward, loop.rows, name == "backward", x)
                found[f"loop {name}"] = t / loop.power / loop.seconds - 1
            if len(shapes):
                paged = theta[14] if len(theta) > 14 else 1.0
                serving = times(forward, shapes, False, x) * paged + cache * theta[12] + theta[13]
                found["measured"] = serving / seconds - 1
            return found

        def loss(theta: np.ndarray, errors: Any = errors, held: Any = held, loops: Any = loops) -> float:
            total, weight = 0.0, 0.0
            for name, error in errors(theta).items():
                e, w = (error[~held], 1.0) if name == "measured" else (error, 20.0)
                if name.startswith("loop"):
                    e = error[~loops[name.removeprefix("loop ")].held]
                total += w * float(np.minimum(np.abs(np.log1p(np.maximum(e, -0.9))), 0.5).sum())
                weight += w * len(e)
            return total / weight

        start, low, high = (
            [*START, *START, 2e-13, 3e-6],
            [*LOW, *LOW, 1e-15, 1e-8],
            [*HIGH, *BACKWARD_HIGH, 1e-10, 3e-5],
        )
        if target.paged:
            start, low, high = [*start, 1.05], [*low, 1.0], [*high, 1.5]
        theta = search(loss, start, low, high, args.iterations)
        forward, backward = parts(theta)
        if has_backward:
            ratio.setdefault(target.kernel, np.where(SCALED, backward / forward, 1.0))
        found = errors(theta)
        entry: dict[str, Any] = {}
        for name, part in (("forward", forward), ("backward", backward)):
            values = dict(zip(FIELDS, (float(f"{v:.4g}") for v in part), strict=True))
            entry[name] = values
        for row, wanted in zip(shapes[:40], times(forward, shapes[:40], False, x), strict=True):
            b, h, kv, s, d, _ = (int(v) for v in row)
            got = attention_s(b, h, kv, s, s, d, True, False, x, AttentionCoefficients(**entry["forward"]))
            assert abs(got / wanted - 1) < 2e-3, "the script and sim.cost.attention disagree"
        entry["residuals"] = {}
        for name, error in found.items():
            label = "measured forward, held out" if name == "measured" else f"plot, {name}"
            if name.startswith("loop"):
                left_out = loops[name.removeprefix("loop ")].held
                entry["residuals"][f"{name}, fitted"] = residuals(error[~left_out])
                label, error = f"{name}, held out", error[left_out]  # noqa: PLW2901
            stats = residuals(error[held] if name == "measured" else error)
            entry["residuals"][label] = stats
            print(
                f"{target.gpu:12}{target.kernel:9}{label:26}{stats['count']:6}{stats['median_abs']:8.1%}"
                f"{stats['mean_signed']:+8.1%}{stats['p90_abs']:8.1%}",
                flush=True,
            )
        if not has_backward:
            entry["backward_kind"] = (
                "assumed: ratio of backward to forward as on the first GPU where this kernel's backward is known"
            )
        head = {
            "gpu": target.gpu,
            "source": "ai-dynamo/aiconfigurator @095f58a51 (Apache-2.0), systems/data; Dao-AILab/flash-attention "
            "@0251105a assets; arXiv 2307.08691, 2407.08608; MooreThreads/SimuMax @4dcaae5 (Apache-2.0), "
            "configs/system; NVIDIA/cudnn-frontend @3929da2 (MIT), benchmark/sdpa_benchmark_training",
            "date": datetime.date.today().isoformat(),
            "script": "validation/measure/fit_attention.py",
        }
        out.setdefault(target.gpu, head)[target.kernel] = entry
    if args.write:
        for name, content in out.items():
            if args.only and name not in args.only.split(","):
                continue
            text = yaml.safe_dump(content, sort_keys=False, width=1000, default_flow_style=None)
            (MEASURED / f"attention_{name.replace('-', '_')}.yaml").write_text(text)


if __name__ == "__main__":
    main()
