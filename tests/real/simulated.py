"""What our programs say of a scenario, in the form in which ``validation/real/measure.py`` writes down a real job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sim.ir.ledger import Ledger
from sim.ir.program import Alloc, Call, Collective, Free, Program, Recv, Send, Storage, World
from sim.model.transformer import describe
from sim.parallel.lower import lower
from sim.parallel.precision import dtypes_of
from sim.scenario.load import load_scenario
from sim.scenario.schema import Scenario

SCALAR_BYTES = 64
"""Smaller storages are left out on both sides: losses, norms, step counts, states of random generators."""
PASSES = ("forward", "backward", "weight_gradient")


@dataclass(slots=True)
class Rank:
    """One pipeline rank, over its last step.

    ``marks``: (border, number of collectives so far, live bytes). ``passes``: (kind, chunk of the rank, microbatch).
    """

    stage: int
    setup: int = 0
    marks: list[tuple[str, int, int]] = field(default_factory=list)
    collectives: list[tuple[str, int, int]] = field(default_factory=list)
    messages: list[tuple[str, int]] = field(default_factory=list)
    passes: list[tuple[str, int, int]] = field(default_factory=list)
    states: dict[str, int] = field(default_factory=dict)


def load(folder: Path, name: str, given: Mapping[str, Any]) -> Scenario:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(dict(given)))
    return load_scenario(path)


def ledger_of(scenario: Scenario) -> Ledger:
    dtypes = dtypes_of(scenario)
    return describe(
        scenario.model,
        scenario.training,
        parameter_dtype=dtypes.parameter,
        compute_dtype=dtypes.compute,
        autocast=dtypes.autocast,
    )


def simulated(scenario: Scenario) -> list[Rank]:
    """Return the pipeline ranks of the scenario's world, in order."""
    world = lower(ledger_of(scenario), scenario)
    return [_rank(world, program) for program in world.programs]


def _rank(world: World, program: Program) -> Rank:
    sizes = {name: len(each.groups[0]) for name, each in world.communicators.items()}
    found = Rank(program.stage)
    live: dict[tuple[int, int], Storage] = {}

    def num_bytes() -> int:
        return sum(s.num_bytes for s in live.values() if s.num_bytes >= SCALAR_BYTES)

    def of_category(category: str) -> int:
        return sum(s.num_bytes for s in live.values() if s.category == category)

    def run(call: Call) -> None:
        for each in program.chunks[call.chunk]:
            if isinstance(each, Alloc | Free):
                storage = each.storage
                key = id(storage), call.microbatch if storage.per_microbatch else 0
                if isinstance(each, Alloc):
                    assert key not in live, storage
                    live[key] = storage
                else:
                    assert key in live, storage
                    del live[key]
            elif isinstance(each, Collective) and sizes[program.axes[each.axis]] > 1:
                found.collectives.append((each.kind, each.tensor_bytes, sizes[program.axes[each.axis]]))
            elif isinstance(each, Send | Recv):
                found.messages.append(("send" if isinstance(each, Send) else "recv", each.tensor_bytes))

    for call in program.setup:
        run(call)
    found.setup = num_bytes()
    for call in program.first_step:
        if call.chunk != "workspaces":  # cuBLAS has none on a CPU
            run(call)
    found.collectives.clear()
    found.messages.clear()
    for call in program.step:
        if call.chunk == "optimizer":
            found.states["gradients"] = of_category("gradients")
        run(call)
        kind, *rest = call.chunk.split(".")
        if kind not in PASSES:
            continue
        halved = kind == "backward" and "split" in rest
        chunk = int(rest[0]) if rest[0].isdigit() else 0
        found.passes.append(("input_gradient" if halved else kind, chunk, call.microbatch))
        found.marks.append((kind, len(found.collectives), num_bytes()))
    found.marks.append(("end", len(found.collectives), num_bytes()))
    found.states |= {category: of_category(category) for category in ("parameters", "optimizer")}
    return found
