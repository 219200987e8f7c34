"""Activations kept elsewhere: what goes when, what comes back, and that all of it goes in the end."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from held import live
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.ir.program import COMPUTE, Alloc, Collective, Copy, Free, HostWait, Instruction, Mark, Program, Storage, Wait
from sim.parallel.offload import LEAST_ELEMENTS, windows
from sim.pipeline import programs
from sim.scenario.load import load_scenario_text

HIDDEN, HEADS, FFN, VOCAB, LAYERS = 256, 4, 1024, 512, 6
SEQUENCE = LEAST_ELEMENTS // HIDDEN
"""So that a tensor of the hidden size is just large enough to go."""
INPUT = 2 * SEQUENCE * HIDDEN
"""Bytes of a block's input in bf16."""


def program_of(framework: str, extra: dict[str, Any], tp: int = 1, **training: Any) -> Program:
    text: dict[str, Any] = {
        "model": {
            "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "vocab_size": VOCAB, "hidden_act": "gelu", "norm": "layernorm", "position": "rope", "bias": False,
            "tie_word_embeddings": False, "dropout": 0, "attention_dropout": 0,
        },
        "cluster": {"node": "dgx-h100", "num_gpus": 4},
        "framework": framework,
        "parallelism": {"tp": tp},
        "training": {
            "sequence_length": SEQUENCE, "micro_batch_size": 1, "global_batch_size": 4 // tp, "precision": "bf16",
            "attention": "flash-2", **training,
        },
        **extra,
    }  # fmt: skip
    scenario = load_scenario_text(yaml.safe_dump(text), "a.yaml")
    (program,) = programs(scenario)[1].programs
    return program


def megatron(num_layers: int, legacy: bool = False, **training: Any) -> Program:
    given = {"cpu_offloading_num_layers": num_layers, "nvte_cpu_offload_v1": legacy}
    return program_of("megatron", {"megatron": given}, **training)


def deepspeed(tp: int = 1, **given: Any) -> Program:
    extra = {"deepspeed": {"activation_checkpointing": given}}
    return program_of("deepspeed", extra, tp, recompute="full", code="megatron")


def step(program: Program) -> list[Instruction]:
    return [i for call in program.step for i in program.chunks[call.chunk]]


def passes(program: Program) -> tuple[list[Instruction], list[Instruction]]:
    """Return the forward and the backward of the one microbatch."""
    chunks = program.chunks
    return list(chunks["forward.only"]), list(chunks["backward.only"])


def copied(instructions: list[Instruction], direction: str) -> int:
    return sum(i.num_bytes for i in instructions if isinstance(i, Copy) and i.direction == direction)


def held(instructions: list[Instruction], place: str) -> list[Storage]:
    """Return what activations are there after these instructions."""
    found: dict[int, Storage] = {}
    for i in instructions:
        if isinstance(i, Alloc) and i.storage.category == "activations" and i.storage.place == place:
            found[id(i.storage)] = i.storage
        elif isinstance(i, Free):
            found.pop(id(i.storage), None)
    return list(found.values())


def held_bytes(instructions: list[Instruction], place: str = "gpu") -> int:
    return sum(storage.num_bytes for storage in held(instructions, place))


# --- Transformer Engine ----------------------------------------------------------------------------


def saved_by_a_block(legacy: bool) -> int:
    """Bytes that autograd keeps of a block in bf16 and that are large enough: by the number of its tensors.

    Of the hidden size: its input, the first norm's output, query, key, value, the attention's output, the second
    norm's input and output; four times as wide: the first product of the MLP and what the activation makes of it.
    Before 2.10 small ones went too: of both norms mean and deviation, in fp32; the attention's logsumexp, and the two
    numbers its random state is.
    """
    small = 2 * 2 * 4 * SEQUENCE + 4 * HEADS * SEQUENCE + 16
    return 8 * INPUT + 2 * 4 * INPUT + (small if legacy else 0)


@pytest.mark.parametrize("legacy", [False, True])
@given(num_layers=st.integers(1, LAYERS - 1))
@settings(max_examples=5, deadline=None)
def test_what_goes_comes_back_and_is_gone_after_backward(legacy: bool, num_layers: int) -> None:
    program = megatron(num_layers, legacy)
    forward, backward = passes(program)
    going = num_layers * saved_by_a_block(legacy)
    assert copied(forward, "device_to_host") == copied(backward, "host_to_device") == going
    assert held_bytes(forward, "host") == going
    assert not held([*forward, *backward], "host")
    before = {i for call in program.setup for i in program.chunks[call.chunk]}
    assert not [i for i in before if isinstance(i, Copy)]
    live([program.chunks[call.chunk] for call in (*program.setup, *program.first_step)])  # nothing freed twice


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3, 5])
def test_forward_ends_with_the_other_blocks_on_the_gpu(legacy: bool, num_layers: int) -> None:
    """``_init_offload_synchronization_dicts``: (N - K) T, where T is a block's part."""
    whole = held_bytes(passes(megatron(0))[0])
    assert held_bytes(passes(megatron(num_layers, legacy))[0]) == whole - num_layers * saved_by_a_block(legacy)


def test_each_block_goes_before_one_comes_that_is_as_far_from_the_end() -> None:
    """Of 6 blocks 2 go: theirs are let go before blocks 4 and 5, and come back before the backward of 3 and 4."""
    forward, backward = passes(megatron(2))
    freed = [f"block.{module}" for module in modules_of(forward, lambda i: isinstance(i, Wait) and i.stream == COMPUTE
                                                        and i.event.startswith("offloaded"))]  # fmt: skip
    assert freed == ["block.4", "block.5"]
    came = modules_of(backward, lambda i: isinstance(i, Copy))
    assert list(dict.fromkeys(came)) == ["4", "3"]
    read = modules_of(backward, lambda i: isinstance(i, Wait) and i.event.startswith("reloaded"))
    assert read == ["1", "0"]


def modules_of(instructions: list[Instruction], chosen: Any) -> list[str]:
    """Return the numbers of the blocks in which such instructions stand."""
    module, found = "", []
    for i in instructions:
        if isinstance(i, Mark):
            module = i.module
        elif chosen(i):
            found.append(module.rpartition(".")[2])
    return found


def test_a_second_microbatch_does_the_same() -> None:
    program = megatron(2, global_batch_size=8)
    assert copied(step(program), "device_to_host") == 2 * 2 * saved_by_a_block(False)


def test_small_tensors_stay() -> None:
    assert not copied(step(megatron(2, sequence_length=SEQUENCE // 8)), "device_to_host")


def test_activations_may_be_left_where_they_are() -> None:
    given = {"cpu_offloading_num_layers": 2, "cpu_offloading_activations": False}
    assert not copied(step(program_of("megatron", {"megatron": given})), "device_to_host")


@given(st.integers(2, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))))
def test_windows_are_spread_over_all_blocks(numbers: tuple[int, int]) -> None:
    """The last block's forward is the last window's; none is before its own block, and they are even to one block."""
    num_layers, num_offloaded = numbers
    found = windows(num_layers, num_offloaded)
    assert found[-1] == num_layers - 1
    assert all(window >= number for number, window in enumerate(found))
    gaps = {later - earlier for earlier, later in zip([-1, *found], found, strict=False)}
    assert max(gaps) - min(gaps) <= 1


# --- checkpoints -----------------------------------------------------------------------------------


def tp_gathers(program: Program) -> list[int]:
    gathers = [i for i in step(program) if isinstance(i, Collective) and i.name == "checkpoint.gather"]
    assert {(i.kind, i.axis) for i in gathers} <= {("all_gather", "tp")}
    return [i.tensor_bytes for i in gathers]


def test_parts_of_checkpoints_are_all_that_stays() -> None:
    """Each of six inputs a half, and what the head saves, which is no checkpoint."""
    whole, parts = deepspeed(2), deepspeed(2, partition_activations=True)
    assert held_bytes(passes(whole)[0]) - held_bytes(passes(parts)[0]) == LAYERS * INPUT // 2
    assert tp_gathers(parts) == LAYERS * [INPUT]
    assert not tp_gathers(whole)
    live([parts.chunks[call.chunk] for call in (*parts.setup, *parts.first_step)])


def test_parts_on_the_host_are_waited_for_both_ways() -> None:
    whole, parts = deepspeed(2), deepspeed(2, partition_activations=True, cpu_checkpointing=True)
    forward, backward = passes(parts)
    assert held_bytes(passes(whole)[0]) - held_bytes(forward) == LAYERS * INPUT
    assert held_bytes(forward, "host") == LAYERS * INPUT // 2
    assert not held([*forward, *backward], "host")
    assert copied(forward, "device_to_host") == copied(backward, "host_to_device") == LAYERS * INPUT // 2
    waits = [i for i in (*forward, *backward) if isinstance(i, HostWait) and i.event == "checkpoint.sync"]
    assert len(waits) == 2 * LAYERS
    live([parts.chunks[call.chunk] for call in (*parts.setup, *parts.first_step)])


@pytest.mark.parametrize("on_host", [False, True])
def test_places_are_made_at_once(on_host: bool) -> None:
    """Ten places of which six are used; the first backward lets go of the other four."""
    given = {"partition_activations": True, "contiguous_memory_optimization": True, "number_checkpoints": 10}
    apart = passes(deepspeed(2, partition_activations=True, cpu_checkpointing=on_host))[0]
    program = deepspeed(2, **given, cpu_checkpointing=on_host)
    forward, backward = passes(program)
    place = "host" if on_host else "gpu"
    assert held_bytes(forward, place) - held_bytes(apart, place) == 4 * INPUT // 2
    assert not held([*forward, *backward], "host")
    live([program.chunks[call.chunk] for call in (*program.setup, *program.first_step)])


def test_without_tensor_parallelism_a_part_is_all() -> None:
    program = deepspeed(partition_activations=True, cpu_checkpointing=True)
    assert not tp_gathers(program)
    assert held_bytes(passes(program)[0], "host") == LAYERS * INPUT
    live([program.chunks[call.chunk] for call in (*program.setup, *program.first_step)])


def test_inputs_alone_on_the_host_stream_there() -> None:
    """Of six the last stays, the one before it is not brought back: its copy is still on the GPU."""
    whole, program = deepspeed(), deepspeed(cpu_checkpointing=True)
    forward, backward = passes(program)
    assert copied(forward, "device_to_host") == 5 * INPUT
    assert copied(backward, "host_to_device") == 4 * INPUT
    assert held_bytes(passes(whole)[0]) - held_bytes(forward) == 4 * INPUT
    assert not [i for i in (*forward, *backward) if isinstance(i, HostWait) and "checkpoint" in i.event]
    assert not held([*forward, *backward], "host")
    live([program.chunks[call.chunk] for call in (*program.setup, *program.first_step)])


def test_boundaries_are_waited_for() -> None:
    """Before and after each block's forward and backward."""
    program = deepspeed(synchronize_checkpoint_boundary=True)
    waits = [i for i in step(program) if isinstance(i, HostWait) and i.event == "checkpoint.sync"]
    assert len(waits) == 4 * LAYERS


def test_megatron_divides_its_checkpoints() -> None:
    given = {"distribute_saved_activations": True}
    whole = program_of("megatron", {}, 2, recompute="full")
    parts = program_of("megatron", {"megatron": given}, 2, recompute="full")
    assert held_bytes(passes(whole)[0]) - held_bytes(passes(parts)[0]) == LAYERS * INPUT // 2
    assert tp_gathers(parts) == LAYERS * [INPUT]


def test_checkpoints_that_are_torchs_know_nothing_of_deepspeed() -> None:
    extra = {"deepspeed": {"activation_checkpointing": {"cpu_checkpointing": True}}}
    program = program_of("deepspeed", extra, recompute="full", code="huggingface")
    assert not copied(step(program), "device_to_host")


def test_megatrons_loss_around_blocks_op_by_op_gathers_no_logits() -> None:
    """Megatron-LM without fused kernels under DeepSpeed: transformers' eager code stands for its blocks."""

    def gathered(loss: str) -> list[int]:
        program = program_of("deepspeed", {}, 2, code="huggingface", loss=loss)
        return [i.tensor_bytes for i in step(program) if isinstance(i, Collective) and i.kind == "all_gather"
                and i.axis == "tp"]  # fmt: skip

    assert gathered("eager") == [2 * SEQUENCE * VOCAB]
    assert gathered("vocab-parallel") == []
