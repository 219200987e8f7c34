"""Whether pruning loses anything: ``python -m benchmarks.exhaustive [FILE]``.

Simulates every candidate of a plan, ``plans/small_model.yaml`` if none is named, and searches again with bounds. Prints
how much of the work the bounds save, and whether the two fronts are the same; ends with 1 if not.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from time import process_time

from sim.planner.load import load_plan
from sim.planner.run import Runner
from sim.planner.search import search

PLAN = Path(__file__).parents[1] / "plans" / "small_model.yaml"


def main() -> None:
    gc.disable()
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else PLAN
    plan = load_plan(file)
    with Runner(jobs=1) as runner:  # what was simulated for one of them is known to the other
        whole = search(plan, runner, exhaustive=True)
        seconds = process_time()
        pruned = search(plan, runner)
    fronts = [[(one.candidate, one.cost) for one in found.front] for found in (pruned, whole)]
    times = [one.outcome["step_s"] / one.bound.time_s for one in whole.tried if one.outcome["step_s"]]
    same = fronts[0] == fronts[1]
    print(
        f"{file.stem}: {whole.num_candidates:,} candidates simulated in {seconds:.0f} CPU s, "
        f"{len(whole.front)} on the front; with bounds {len(pruned.tried):,} simulated, "
        f"{'the same' if same else 'ANOTHER'} front; a step takes {min(times):.3f} to {max(times):.3f} of its bound"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
