"""Programs of pipeline ranks: who sends what when, what stays, and one class a pipeline rank."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sim.ir.program import Alloc, Collective, Free, HostWait, Program, Recv, Send, World
from sim.parallel.pipelining import aligned_fetches, fetches
from sim.parallel.schedule import SCHEDULES
from sim.pipeline import programs
from sim.scenario.load import load_scenario_text

HIDDEN_BYTES = 2 * 32 * 64
"""A microbatch's hidden tensor: 32 tokens of width 64, bf16."""


def world_of(
    framework: str, parallelism: dict[str, Any], num_gpus: int = 4, num_microbatches: int = 4, **sections: Any
) -> World:
    ranks = parallelism.get("pp", 1) * parallelism.get("tp", 1) * parallelism.get("cp", 1)
    asked = {
        "model": {
            "num_hidden_layers": 8,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "vocab_size": 256,
            "tie_word_embeddings": False,
        },
        "cluster": {"node": "dgx-h100", "num_gpus": num_gpus},
        "framework": framework,
        "parallelism": parallelism,
        "training": {
            "sequence_length": 32,
            "micro_batch_size": 1,
            "global_batch_size": num_gpus // ranks * num_microbatches,
            "precision": "bf16",
        },
        **sections,
    }
    scenario = load_scenario_text(yaml.safe_dump(asked), "lower.yaml")
    return programs(scenario)[1]


def passes(program: Program) -> list[tuple[str, int]]:
    """Return (forward or backward, microbatch) in the order of calls."""
    return [
        (call.chunk.split(".")[0], call.microbatch)
        for call in program.step
        if call.chunk.startswith(("forward.", "backward.", "weight_gradient."))
    ]


@pytest.mark.parametrize(
    ("framework", "parallelism", "in_group"),
    [
        ("megatron", {}, True),
        ("megatron", {"schedule": "interleaved", "vpp": 2}, False),  # isend and irecv, as it overlaps
        ("megatron", {"schedule": "zb-h1"}, True),
        ("fsdp2", {}, True),
        ("deepspeed", {}, False),
    ],
)
def test_batched_messages_go_in_the_communicator_of_all_stages(
    framework: str, parallelism: dict[str, Any], in_group: bool
) -> None:
    """``batch_isend_irecv`` uses the group's communicator; ``isend`` and ``send`` make one of the two ranks."""
    world = world_of(framework, {"pp": 4, **parallelism})
    pairs = [c for c in world.communicators.values() if c.axis.startswith("pp_")]
    assert {c.within for c in pairs} == {((0, 1, 2, 3),) if in_group else ()}


@pytest.mark.parametrize("framework", ["megatron", "deepspeed", "fsdp2"])
def test_passes_are_in_the_order_of_the_schedule(framework: str) -> None:
    world = world_of(framework, {"pp": 4})
    orders = SCHEDULES["1f1b"].orders(4, 4, 1)
    for program, order in zip(world.programs, orders, strict=True):
        assert passes(program) == [(pass_.kind, pass_.microbatch) for pass_ in order]


def test_ranks_of_one_stage_are_one_class() -> None:
    """Rank r of 8 with tp 2, dp 2, pp 2: the first stage has the lower half of the ranks."""
    world = world_of("megatron", {"tp": 2, "pp": 2}, num_gpus=8)
    assert [program.ranks for program in world.programs] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [program.stage for program in world.programs] == [0, 1]
    pair = world.communicators[world.programs[0].axes["pp_forward.send"]]
    assert pair.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert world.programs[1].axes["pp_forward.recv"] == pair.name


@pytest.mark.parametrize(
    ("framework", "parallelism"),
    [
        ("fsdp2", {"pp": 2}),
        ("fsdp2", {"pp": 2, "vpp": 2}),
        ("fsdp2", {"pp": 2, "schedule": "zb-v"}),
        ("fsdp2", {"tp": 2, "sp": True}),
        ("fsdp2", {"cp": 2}),
        ("fsdp1", {}),
        ("deepspeed", {"pp": 2, "zero": 1}),
        ("deepspeed", {"pp": 2, "tp": 2}),
        ("megatron", {"pp": 2, "cp": 2, "zero": 1}),
        ("megatron", {"pp": 2, "tp": 2, "sp": True, "schedule": "zb-h1"}),
    ],
)
def test_nothing_of_a_step_is_held_when_it_ends(framework: str, parallelism: dict[str, Any]) -> None:
    for program in world_of(framework, parallelism).programs:
        live: set[tuple[int, int]] = set()
        after = []
        for calls in (program.setup, program.first_step, program.step):
            for call in calls:
                for i in program.chunks[call.chunk]:
                    if isinstance(i, (Alloc, Free)) and i.storage.num_bytes:
                        key = (id(i.storage), call.microbatch if i.storage.per_microbatch else 0)
                        assert (key in live) == isinstance(i, Free), (i.storage.name, call)
                        live ^= {key}
            after.append(set(live))
        assert after[1] == after[2]


def test_torch_keeps_a_receive_buffer_for_each_microbatch_and_direction() -> None:
    """Ends of the pipeline receive one way, its middle both: 4 microbatches of a hidden tensor."""
    world = world_of("fsdp2", {"pp": 4})
    sizes = [
        sum(i.storage.num_bytes for i in program.chunks["buffers"] if isinstance(i, Alloc))
        for program in world.programs
    ]
    assert sizes == [4 * HIDDEN_BYTES, 8 * HIDDEN_BYTES, 8 * HIDDEN_BYTES, 4 * HIDDEN_BYTES]


def test_megatrons_batched_messages_end_in_a_synchronisation() -> None:
    """torch.cuda.synchronize() after each exchange of 1F1B; none with interleaving, whose messages overlap."""

    def waits(world: World) -> int:
        return sum(
            isinstance(i, HostWait) and i.event == "exchanged"
            for program in world.programs
            for call in program.step
            for i in program.chunks[call.chunk]
        )

    assert waits(world_of("megatron", {"pp": 2})) > 0
    assert waits(world_of("megatron", {"pp": 2, "vpp": 2})) == 0
    assert waits(world_of("deepspeed", {"pp": 2})) == 0


def test_deepspeed_reduces_when_all_has_been_sent() -> None:
    """ReduceGrads is the last command of the batch."""
    last = world_of("deepspeed", {"pp": 2, "zero": 1}, num_gpus=4).programs[1]
    issued = [i for call in last.step for i in last.chunks[call.chunk] if isinstance(i, (Collective, Send, Recv))]
    first = next(k for k, i in enumerate(issued) if isinstance(i, Collective))
    assert not any(isinstance(i, (Send, Recv)) for i in issued[first:])


def test_messages_are_of_the_hidden_tensor_whatever_is_sharded_by_data() -> None:
    world = world_of("megatron", {"pp": 4}, num_gpus=8)
    sent = [i for p in world.programs for call in p.step for i in p.chunks[call.chunk] if isinstance(i, Send)]
    assert {i.tensor_bytes for i in sent} == {HIDDEN_BYTES}
    assert len(sent) == 2 * 3 * 4  # both ways over three borders, four microbatches


def test_an_order_of_axes_moves_the_neighbours() -> None:
    world = world_of("megatron", {"pp": 2, "tp": 2, "order": "pp-tp-cp-dp"})
    pair = world.communicators[world.programs[0].axes["pp_forward.send"]]
    assert pair.groups == ((0, 1), (2, 3))


def test_stages_are_fetched_before_their_turn() -> None:
    """Three stages ahead: with chunks 0 to 3, the first three at the start, the fourth as the first has done its part.

    ``_add_unshard_reshard`` of torch gives "0UNSHARD 1UNSHARD 2UNSHARD 0F0 0F1 3UNSHARD 1F0 ...".
    """
    order = SCHEDULES["interleaved-torch"].orders(2, 2, 4)[1]
    first = {chunk: next(i for i, p in enumerate(order) if p.chunk == chunk) for chunk in range(4)}
    assert list(fetches(order, 4).items()) == [(2, 0), (1, 0), (0, 0), (3, first[1])]
    program = world_of("fsdp2", {"pp": 2, "vpp": 4}).programs[1]
    calls = [call.chunk for call in program.step]
    assert calls[:3] == ["unshard.0", "unshard.1", "unshard.2"]
    gathers = [
        (name, i.stream, i.axis)
        for name, chunk in program.chunks.items()
        for i in chunk
        if isinstance(i, Collective) and i.kind == "all_gather"
    ]
    assert {name for name, _, _ in gathers} == {f"unshard.{chunk}" for chunk in range(4)}
    assert {stream for _, stream, _ in gathers} == {"nccl:dp"}, "on the process group's own stream"


def test_one_stage_a_rank_gathers_in_its_own_hook() -> None:
    """GPipe and 1F1B run without UNSHARD: FSDP's hook gathers once the stage's input is there."""
    program = world_of("fsdp2", {"pp": 2}).programs[1]
    assert not any(call.chunk.startswith("unshard") for call in program.step)


def test_megatron_gathers_a_chunk_ahead_on_all_ranks_at_one_time() -> None:
    """Two ranks, three chunks, four microbatches in pairs: chunk 2 with the first rank's first pass of chunk 1."""
    orders = SCHEDULES["interleaved"].orders(2, 4, 3)
    assert [aligned_fetches(order, 3, rank) for rank, order in enumerate(orders)] == [
        {1: 0, 0: 0, 2: 2},
        {1: 0, 0: 0, 2: 1},
    ]
    settings = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    world = world_of("megatron", {"pp": 2, "vpp": 2, "zero": 1}, num_gpus=4, megatron=settings)
    for program in world.programs:
        assert [call.chunk for call in program.step[:2]] == ["unshard.0", "unshard.1"]
        gathers = [n for n, c in program.chunks.items() for i in c if getattr(i, "kind", "") == "all_gather"]
        assert set(gathers) == {"unshard.0", "unshard.1"}
