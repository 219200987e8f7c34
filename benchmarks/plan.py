"""How long a large plan takes: ``python -m benchmarks.plan [FILE [TOLERANCE]]``.

Prints candidates, pruned, simulated and seconds of ``plans/llama3_70b_six_nodes.yaml``: Llama-3-70B on six kinds of
node, 64 to 1,024 GPUs. Nothing is read from a cache.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from time import perf_counter, process_time

from sim.planner.answer import answer
from sim.planner.load import load_plan
from sim.planner.run import Runner, num_cores
from sim.planner.search import search

PLAN = Path(__file__).parents[1] / "plans" / "llama3_70b_six_nodes.yaml"


def main() -> None:
    gc.disable()
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else PLAN
    tolerance = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    began = perf_counter()
    plan = load_plan(file)

    def say(words: str) -> None:
        print(f"{perf_counter() - began:7.1f} s  {words}", file=sys.stderr, flush=True)

    with Runner() as runner:
        found = search(plan, runner, say, tolerance=tolerance)
        searched = perf_counter() - began
        answer(found, runner, say)
    seconds = perf_counter() - began
    print(
        f"{file.stem}, tolerance {tolerance:g}: {found.num_candidates:,} candidates, {len(found.discarded):,} pruned "
        f"({sum(bool(one.over_bytes) for one in found.discarded):,} by memory), {len(found.tried):,} simulated, "
        f"{len(found.front)} on the front; {searched:.1f} s to search, {seconds:.1f} s in all, "
        f"{process_time():.1f} s of it this process's CPU, {num_cores()} cores"
    )


if __name__ == "__main__":
    main()
