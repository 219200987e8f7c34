"""Fit how much longer the host takes in whole steps of Megatron-LM than its block does in a hot loop.

    python validation/measure/fit_host.py validation/measure/megatron_iteration_times.yaml

The steps are so small that the host limits them. What a step does once whatever its layout (logging, norms, counts of
zeros) is not simulated: each set of tests has it as one constant of its own, so that only the differences between its
layouts are fitted. Timers of level 2 wait for the device after each pass (megatron/timers.py), and so do the programs
here. Prints the factor that leaves least, the constant, and the root of the mean square of what is left, for each set.

What the tests do a microbatch beside launching (batches sent to tensor-parallel ranks, masks, timers) counts as the
host's here: the least of the sets is what sim/catalog/measured/host.yaml has.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from sim.cost.efficiency import read
from sim.ir.program import COMPUTE, HostWait, Record, World
from sim.pipeline import programs, simulate
from sim.scenario.load import load_scenario_mapping

FACTORS = (1.0, 1.25, 1.5, 1.75, 2.0)
VOCABULARY = 50257
NUM_GPUS = 8


def scenario_of(tests: Mapping[str, Any], tp: int, pp: int) -> Any:
    """Return one test as a scenario; the vocabulary is padded to a multiple of 128 tp (megatron/tokenizer)."""
    mapping = {
        "model": {
            "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
            "vocab_size": -(-VOCABULARY // (128 * tp)) * 128 * tp, "tie_word_embeddings": True, "hidden_act": "gelu",
            "norm": "layernorm", "bias": True, "position": "learned", "max_position_embeddings": 1024,
            "dropout": 0.1, "attention_dropout": 0.1,
        },
        "cluster": {"node": tests["node"], "num_gpus": NUM_GPUS},
        "framework": "megatron",
        "parallelism": {"tp": tp, "pp": pp},
        "training": {
            "sequence_length": 1024, "micro_batch_size": 4, "global_batch_size": 32, "precision": tests["precision"],
            "recompute": "none", "attention": "math", "gradient_clipping": 1.0,
        },
        "megatron": {"gradient_accumulation_fusion": False},
    }  # fmt: skip
    return load_scenario_mapping(mapping, f"{tests['tag']} tp{tp} pp{pp}", folder=".")


def waiting(world: World) -> World:
    """Return programs that wait for the device after each pass."""
    wait = (Record("timer", COMPUTE), HostWait("timer"))

    def timed(name: str) -> bool:
        return name.startswith(("forward", "backward"))

    return replace(
        world,
        programs=tuple(
            replace(p, chunks={name: (*chunk, *wait) if timed(name) else chunk for name, chunk in p.chunks.items()})
            for p in world.programs
        ),
    )


def step_s(tests: Mapping[str, Any], layout: str, factor: float) -> float:
    """Return the simulated step of "tp4 pp1" with the host's times of Megatron multiplied."""
    tp, pp = (int(part[2:]) for part in layout.split())
    read("host.yaml")["megatron_whole"]["value"] = factor
    scenario = scenario_of(tests, tp, pp)
    ledger, world = programs(scenario)
    return simulate(scenario, written=(ledger, waiting(world))).timeline.end / 1e12


def between(times: Mapping[float, float], factor: float) -> float:
    """Return the time at ``factor``, in proportion between the two simulated factors around it."""
    low = max(f for f in FACTORS[:-1] if f <= factor)
    high = FACTORS[FACTORS.index(low) + 1]
    return times[low] + (times[high] - times[low]) * (factor - low) / (high - low)


def main() -> None:
    for tests in yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8")):
        steps: Mapping[str, float] = tests["steps"]
        ours = {layout: {factor: step_s(tests, layout, factor) for factor in FACTORS} for layout in steps}
        best = (float("inf"), 0.0, 0.0)
        for factor in (1 + 0.01 * i for i in range(101)):
            off = [steps[layout] - between(ours[layout], factor) for layout in steps]
            left = mean((each - mean(off)) ** 2 for each in off) ** 0.5
            best = min(best, (left, factor, mean(off)))
        left, factor, constant = best
        share = left / mean(steps.values())
        print(
            f"{tests['node']}, {tests['tests']} of {tests['tag']}: {factor:.2f}, {constant * 1e3:.1f} ms besides, "
            f"{left * 1e3:.1f} ms left ({share:.1%} of a step)",
            flush=True,
        )


if __name__ == "__main__":
    main()
