"""How long a large plan takes: ``python -m benchmarks.plan [FILE [TOLERANCE]]``.

Prints candidates, pruned, simulated and seconds of ``plans/llama3_70b_six_nodes.yaml``: Llama-3-70B on six kinds of
node, 64 to 1,024 GPUs. Nothing is read from a cache. CPU seconds are those of all processes: what the clock would show
on one core that nobody else uses.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from time import perf_counter

from joblib.externals.loky import get_reusable_executor

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
    stop_workers()
    used = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
    own, others = (usage.ru_utime + usage.ru_stime for usage in used)
    by_memory = sum(bool(one.over_bytes) for one in found.discarded)
    beaten = sum(one.by is not None for one in found.discarded)
    print(
        f"{file.stem}, tolerance {tolerance:g}: {found.num_candidates:,} candidates; pruned {len(found.discarded):,} "
        f"({by_memory:,} by memory, {beaten:,} by what was simulated, {len(found.discarded) - by_memory - beaten:,} by "
        f"the goal's limits); {len(found.tried):,} simulated, {len(found.front)} on the front; {searched:.1f} s to "
        f"search, {seconds:.1f} s in all on {num_cores()} cores; CPU {own + others:.1f} s, {own:.1f} s of it here"
    )


def stop_workers() -> None:
    """Wait for the workers' end: only then is the time they took known."""
    get_reusable_executor().shutdown(wait=True)


if __name__ == "__main__":
    main()
