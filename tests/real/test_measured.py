"""Real torch and DeepSpeed jobs on the CPU do what our programs say of the same scenario, exactly.

Each configuration is trained by ``validation/real/measure.py``, many to one launch: bytes of the states by category,
all live bytes after each pass and between steps (so also what autograd saved), collectives in order with their kinds,
bytes and ranks, messages between stages, and the order of passes. Where a CPU or gloo holds other bytes than a GPU
would, the cause has a name and a size here; there are no tolerances.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from configurations import CONFIGURATIONS
from simulated import Rank, load, simulated

from sim.parallel.precision import dtypes_of
from sim.parallel.schedule import SCHEDULES
from sim.parallel.stages import blocks_per_stage
from sim.scenario.schema import Scenario
from tests.real.test_saved_bytes import norm_on_cpu
from validation.real.measure import measure

pytestmark = pytest.mark.real
TOKEN_BYTES = 8


@cache
def measured(names: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Train the configurations, those of one number of ranks in one launch."""
    found: dict[str, list[dict[str, Any]]] = measure({name: CONFIGURATIONS[name] for name in names}, strict=False)
    return found


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The configurations of this session's tests."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.module is request.module]
    return tuple(call.params["name"] for call in calls if call is not None)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_real_job_is_as_simulated(name: str, chosen: tuple[str, ...], tmp_path: Path) -> None:
    scenario = load(tmp_path, name, CONFIGURATIONS[name])
    ranks = measured(chosen)[name]
    assert not any("error" in rank for rank in ranks), ranks[0]["error"]
    stages = simulated(scenario)
    each = len(ranks) // len(stages)
    for stage, ours in enumerate(stages):
        mine = ranks[stage * each : (stage + 1) * each]
        for real in mine:
            assert [tuple(c) for c in real["collectives"] if c[0] not in ("send", "recv")] == ours.collectives
            sent = Counter((kind, size) for kind, size, _ in real["collectives"] if kind in ("send", "recv"))
            assert sent == Counter(ours.messages)
        if scenario.parallelism.pp > 1:
            assert [tuple(p) for p in mine[0]["passes"]] == passes_of(scenario, stage, ours)
        # our program is that of the rank of a stage that holds most
        where = borders(scenario, ours)
        held = most(bytes_at_borders(real) for real in mine)
        assert [held[i] for i in where] == [expected_bytes(scenario, stage, ours, i) for i in where]
        if compares_states(scenario):
            assert most(states(real) for real in mine) == [ours.states[category] for category in STATES]


STATES = ("parameters", "gradients", "optimizer")


def states(real: dict[str, Any]) -> list[int]:
    return [real["states"][name] for name in STATES]


def most(found: Any) -> list[int]:
    return [max(values) for values in zip(*found, strict=True)]


def compares_states(scenario: Scenario) -> bool:
    """Under offload the GPU's and the host's copies are one memory here: their sum is in the live bytes."""
    return scenario.deepspeed.offload_optimizer == "none"


def passes_of(scenario: Scenario, rank: int, ours: Rank) -> list[tuple[str, int, int]]:
    """Return our passes with the stage of each instead of the rank's chunk."""
    p = scenario.parallelism
    schedule = SCHEDULES[p.schedule]
    chunks = schedule.num_chunks or p.vpp
    return [(kind, schedule.placement.stage_of(rank, c, p.pp, chunks), m) for kind, c, m in ours.passes]


# --- live bytes ----------------------------------------------------------------------------------


def borders(scenario: Scenario, ours: Rank) -> list[int]:
    """Return which of our marks are compared: all, but with a pipeline forwards and the end of a step.

    After a backward torch's schedules still hold what is on its way; with several chunks they hold more in between.
    """
    kinds = [kind for kind, _, _ in ours.marks]
    if scenario.parallelism.pp == 1:
        return list(range(len(kinds)))
    simple = scenario.framework == "fsdp2" and scenario.parallelism.schedule in ("gpipe", "1f1b")
    return [i for i, kind in enumerate(kinds) if kind == "end" or (kind == "forward" and simple)]


def bytes_at_borders(real: dict[str, Any]) -> list[int]:
    return [live for border, _, live, _ in real["marks"] if border not in ("step", "passes")]


def expected_bytes(scenario: Scenario, stage: int, ours: Rank, mark: int) -> int:
    return ours.marks[mark][2] + sum(causes(scenario, stage, ours, mark).values())


def causes(scenario: Scenario, stage: int, ours: Rank, mark: int) -> dict[str, int]:
    """Return what is live at one of our marks beyond what we say: name of the cause -> bytes."""
    before = [kind for kind, _, _ in ours.marks[: mark + 1]]
    in_flight = before.count("forward") - before.count("backward")
    found = {"norms": in_flight * norms_on_cpu(scenario, stage)}
    training = scenario.training
    if scenario.framework == "ddp" and (scenario.ddp.find_unused_parameters or scenario.ddp.static_graph):
        # the reducer keeps the map of used parameters on the host and on the device
        found["map on the host"] = 4 * num_tensors(scenario)
    if training.code == "huggingface" and before[-1] == "forward":
        # labels padded by one at the end, then shifted: of one sequence that is a view
        found["shifted labels"] = TOKEN_BYTES * in_flight
    if scenario.fsdp1.use_orig_params and before[-1] == "end":
        # the flat gradient goes when the next forward finds that no original parameter has one
        found["flat gradient"] = ours.states["gradients"]
    if scenario.parallelism.pp > 1 and scenario.framework == "deepspeed":
        found["pipe buffers"] = deepspeed_pipe_bytes(scenario, stage)
    if scenario.parallelism.pp > 1 and scenario.framework == "fsdp2":
        if before[-1] == "forward":
            found |= pipeline_causes(scenario, stage, before, in_flight)
        # stage_backward_input leaves the gradient at its receive buffer, which the start of a step clears; the stage
        # at the turn of a V receives from its own rank, into no buffer
        local = (0, scenario.parallelism.pp)
        halved = sum(kind == "input_gradient" and at not in local for kind, at, _ in passes_of(scenario, stage, ours))
        found["gradients of receive buffers"] = halved * hidden_bytes(scenario) * (before[-1] == "end")
    return found


def deepspeed_pipe_bytes(scenario: Scenario, stage: int) -> int:
    """What DeepSpeed's pipeline engine keeps when a step has ended.

    Its two pipe buffers: token ids on the first stage; labels and logits on the last, which also keeps the last logits
    for its loss.
    """
    training, last = scenario.training, scenario.parallelism.pp - 1
    tokens = training.micro_batch_size * training.sequence_length
    logits = hidden_bytes(scenario) // scenario.model.hidden_size * scenario.model.vocab_size
    return 2 * tokens * TOKEN_BYTES * (stage in (0, last)) + 3 * logits * (stage == last)


def hidden_bytes(scenario: Scenario) -> int:
    training = scenario.training
    element = 2 if dtypes_of(scenario).parameter == "bf16" else 4
    return training.micro_batch_size * training.sequence_length * scenario.model.hidden_size * element


def norms_on_cpu(scenario: Scenario, stage: int) -> int:
    """Bytes that the CPU's norms keep of one microbatch beyond the GPU's."""
    p, training, dtypes = scenario.parallelism, scenario.training, dtypes_of(scenario)
    rows = training.micro_batch_size * training.sequence_length // (p.tp if p.sp else 1)
    mode = (dtypes.parameter, dtypes.autocast)
    one = norm_on_cpu(scenario.model, training.code, mode, rows, scenario.model.hidden_size)
    blocks = blocks_per_stage(scenario.model.num_hidden_layers, p.pp)[stage]
    return one * ((2 * blocks if training.recompute == "none" else 0) + (stage == p.pp - 1))


def num_tensors(scenario: Scenario) -> int:
    """Parameters of the GPT: two embeddings, twelve tensors a block, norm and head."""
    return 2 + 12 * scenario.model.num_hidden_layers + 3


def pipeline_causes(scenario: Scenario, stage: int, before: list[str], in_flight: int) -> dict[str, int]:
    """What torch's schedules hold: they are given the whole batch, and a variable keeps what was last sent back."""
    training, last = scenario.training, scenario.parallelism.pp - 1
    ids = training.micro_batch_size * training.sequence_length * TOKEN_BYTES
    of_batch = (scenario.num_microbatches - in_flight) * ids * ((stage == 0) + (stage == last))
    sent = stage > 0 and "backward" in before and scenario.parallelism.schedule == "1f1b"
    return {"whole batch": of_batch, "last sent gradient": hidden_bytes(scenario) * sent}
