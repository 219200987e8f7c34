"""Print how long sim takes: ``python -m benchmarks.run``. Whole processes on one core; nothing here is a test.

1. ``sim run scenarios/70b_zero3.yaml`` beside a bare import of what it stands on, interleaved, so that a busy machine
   weighs on both.
2. The large scenarios of the library, from YAML to report, remedies included where they do not fit.
3. The parts of a run that are told by engine and by memory, and memory / engine: the share that memory may take is 1.
4. Synthetic worlds of the size of the largest real jobs: engine only.
5. Whole processes by the number of GPUs, by data parallelism at a fixed tensor and pipeline size; and by the number of
   microbatches.

Times are of the CPU (user and system), medians in 1, the least of some in 3, and once elsewhere; memory is the peak of
the process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.worlds import LLAMA_405B, ONE_TRILLION, build
from sim import pipeline
from sim.catalog import load
from sim.cluster.topology import build_cluster
from sim.cost.model import CostModel
from sim.engine.run import run
from sim.scenario.load import load_scenario
from sim.scenario.schema import ClusterSpec

ROOT = Path(__file__).parent.parent
BARE = ("-c", "import numpy, pydantic, simpy, networkx")
LARGEST = "scenarios/405b_16k_h100.yaml"
LARGE = ("405b_16k_h100", "gpt_1t_a100", "gpt3_175b_a100")
RUN = ("-m", "sim", "run", "scenarios/70b_zero3.yaml")
PARTS = ("70b_zero3", "gpt3_175b_a100", "gpt_1t_a100", "405b_16k_h100")


def spent(arguments: tuple[str, ...]) -> tuple[float, float, int]:
    """Return (seconds of wall clock, seconds of CPU, peak bytes) of a Python process."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 3), f"{arguments} failed"  # 3: does not fit, and what would
    return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def against_imports(times: int) -> None:
    pairs = [(spent(BARE), spent(RUN)) for _ in range(times)]
    print(f"\n{'whole process, median of ' + str(times):46}{'wall':>9}{'CPU':>9}{'peak':>10}")
    for name, index in (("import numpy, pydantic, simpy, networkx", 0), ("sim run scenarios/70b_zero3.yaml", 1)):
        wall, cpu, peak = (median(pair[index][what] for pair in pairs) for what in range(3))
        print(f"{name:46}{wall:8.3f}s{cpu:8.3f}s{peak / 2**20:7.0f} MiB")
    print(f"{'ratio, of CPU time':46}{median(b[1] / a[1] for a, b in pairs):9.2f}")


def scenarios() -> None:
    print(f"\n{'whole process, once':46}{'wall':>9}{'CPU':>9}{'peak':>10}")
    for name in LARGE:
        wall, cpu, peak = spent(("-m", "sim", "run", f"scenarios/{name}.yaml"))
        print(f"{f'sim run scenarios/{name}.yaml':46}{wall:8.2f}s{cpu:8.2f}s{peak / 2**20:7.0f} MiB")


def parts_of(name: str) -> None:
    """Simulate one scenario in this process; print the seconds of CPU that engine and memory took as JSON."""
    gc.disable()
    took: dict[str, float] = {}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begun = time.process_time()
            found = function(*args, **options)
            took[part] = took.get(part, 0.0) + time.process_time() - begun
            return found

        return call

    vars(pipeline)["run"] = timed("engine", pipeline.run)  # type: ignore[attr-defined]
    vars(pipeline)["footprints"] = timed("memory", pipeline.footprints)  # type: ignore[attr-defined]
    pipeline.simulate(load_scenario(ROOT / f"scenarios/{name}.yaml"))
    print(json.dumps(took))


def parts(times: int) -> None:
    print(f"\n{'CPU, least of ' + str(times):46}{'engine':>9}{'memory':>9}{'memory / engine':>18}")
    for name in PARTS:
        arguments = [sys.executable, "-m", "benchmarks.run", "--parts-of", name]
        found = [
            json.loads(subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
            for _ in range(times)
        ]
        engine, memory = (min(took[part] for took in found) for part in ("engine", "memory"))
        print(f"{f'scenarios/{name}.yaml':46}{engine:8.3f}s{memory:8.3f}s{memory / engine:18.2f}")


def by_gpus() -> None:
    """Run the 405B scenario on 64 to 65,536 GPUs: tp 8 and pp as large as 64 GPUs let it be, or as its file says."""
    for pp, num_gpus in ((8, (64, 256, 1024, 4096, 16384, 65536)), (16, (128, 1024, 16384, 65536))):
        print(f"\nsim run {LARGEST}, tp 8, pp {pp}, 16 microbatches, by data parallelism")
        print(f"{'GPUs':>10}{'wall':>10}{'CPU':>10}{'peak':>13}")
        for gpus in num_gpus:
            dp = gpus // 8 // pp
            given = (f"cluster.num_nodes={gpus // 8}", f"parallelism.pp={pp}", f"training.global_batch_size={16 * dp}")
            options = [word for option in given for word in ("--set", option)]
            wall, cpu, peak = spent(("-m", "sim", "run", LARGEST, "--no-advice", *options))
            print(f"{gpus:10,}{wall:9.2f}s{cpu:9.2f}s{peak / 2**20:9.0f} MiB")


def by_microbatches() -> None:
    print("\nsim run scenarios/8b_accumulation.yaml, by microbatches of a step")
    print(f"{'number':>10}{'wall':>10}{'CPU':>10}{'peak':>13}")
    scenario = load_scenario(ROOT / "scenarios/8b_accumulation.yaml")
    for num in (16, 256, 4096):
        size = num * scenario.parallelism.dp * scenario.training.micro_batch_size
        given = ("--set", f"training.global_batch_size={size}")
        wall, cpu, peak = spent(("-m", "sim", "run", "scenarios/8b_accumulation.yaml", "--no-advice", *given))
        print(f"{num:10,}{wall:9.2f}s{cpu:9.2f}s{peak / 2**20:9.0f} MiB")


def synthetic(name: str, dp: int) -> None:
    """Run one world in this process; print what it took as JSON."""
    gc.disable()
    job = {"405b": LLAMA_405B, "1t": ONE_TRILLION}[name]
    job = replace(job, dp=dp or job.dp)
    facts = load.node("dgx-h100" if name == "405b" else "dgx-a100")
    spec = ClusterSpec(
        node=facts,
        gpu=load.gpu(facts.gpu),
        network=load.network("ib-ndr-400-rail" if name == "405b" else "ib-hdr-200-rail"),
        num_nodes=job.num_gpus // 8,
        num_gpus=job.num_gpus,
    )
    cluster = build_cluster(spec)
    world = build(job, cluster)
    timeline = run(world, CostModel(cluster, spec.gpu))
    print(json.dumps({
        "gpus": job.num_gpus,
        "classes": len(world.programs),
        "cpu_s": time.process_time(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "step_s": timeline.end / 1e12,
    }))  # fmt: skip


def told(name: str, dp: int = 0) -> None:
    arguments = [sys.executable, "-m", "benchmarks.run", "--world", name, "--dp", str(dp)]
    found = json.loads(subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    print(
        f"{name:>8}{found['gpus']:10,}{found['classes']:9,}{found['cpu_s']:9.2f}s"
        f"{found['peak_bytes'] / 2**20:9.0f} MiB{found['step_s']:10.2f}s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--world", choices=("405b", "1t"))
    parser.add_argument("--dp", type=int, default=0)
    parser.add_argument("--parts", action="store_true", help="only what engine and memory take")
    parser.add_argument("--parts-of", metavar="SCENARIO", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.world:
        synthetic(given.world, given.dp)
        return
    if given.parts_of:
        parts_of(given.parts_of)
        return
    if given.parts:
        parts(given.times)
        return
    against_imports(given.times)
    scenarios()
    parts(given.times)
    print(f"\n{'world':>8}{'GPUs':>10}{'classes':>9}{'CPU':>10}{'peak':>13}{'a step':>11}")
    told("405b")
    told("1t")
    by_gpus()
    by_microbatches()


if __name__ == "__main__":
    main()
