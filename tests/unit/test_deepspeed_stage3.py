"""ZeRO 3: bytes that real DeepSpeed holds, derived; what is gathered when, and what is let go."""

from __future__ import annotations

from dataclasses import replace

import pytest
from deepspeed_world import H, Job, P, V, collectives, gpt, peak_bytes
from held import live, live_bytes

from sim.ir.ledger import Dim
from sim.ir.program import Chunk, Collective, HostCompute, UseOn
from sim.parallel.frameworks.deepspeed_stage3 import ALL_GATHER_STREAM, REDUCE_STREAM, Stage3

PERSISTENT = 308_736
"""Elements of the 39 parameters of at most 100 000 elements: position table, norms, biases, output projections."""
TEXTBOOK = {
    "prefetch_bucket_size": 0,
    "param_persistence_threshold": 0,
    "max_live_parameters": 1,
    "max_reuse_distance": 0,
    "reduce_bucket_size": 500_000,
}


def kinds(chunk: Chunk, kind: str) -> list[int]:
    return [size for each, size in collectives(chunk) if each == kind]


def test_what_is_held_between_steps() -> None:
    job = Job(3, reduce_bucket_size=500_000)
    # shard, fp32 master and moments, gradient shard, small parameters whole, the bucket
    expected = 2 * P // 2 + 12 * P // 2 + 2 * P // 2 + 2 * PERSISTENT + 2 * 500_000
    assert live_bytes(job.chunks) == expected == 31_350_349 - 13  # measured, with 13 bytes of counters
    assert live_bytes(Job(3, 4, reduce_bucket_size=500_000).chunks) == expected - 16 * P // 4


def test_a_small_model_is_gathered_once_and_kept() -> None:
    job = Job(3, reduce_bucket_size=500_000)
    forward, backward = job.passes[0]
    assert kinds(forward, "all_gather") == [2 * (P - PERSISTENT)]
    assert kinds(backward, "all_gather") == []
    assert sum(kinds(backward, "reduce_scatter")) == 2 * P
    assert len(kinds(job.step, "all_gather")) == 39
    assert sum(kinds(job.step, "all_gather")) == 2 * PERSISTENT


def test_without_limits_lifted_everything_is_gathered_twice() -> None:
    job = Job(3, **TEXTBOOK)
    forward, backward = job.passes[0]
    for chunk in (forward, backward):
        assert len(kinds(chunk, "all_gather")) == 4 * 6 + 4  # one a module
        assert sum(kinds(chunk, "all_gather")) == 2 * P
    assert kinds(job.step, "all_gather") == []


def test_every_microbatch_reduces_and_gathers() -> None:
    job = Job(3, num_microbatches=3, **TEXTBOOK)
    for forward, backward in job.passes:
        assert sum(kinds(forward, "all_gather")) == sum(kinds(backward, "all_gather")) == 2 * P
        assert sum(kinds(backward, "reduce_scatter")) == 2 * P


def test_a_group_is_gathered_into_one_buffer_and_copied_out() -> None:
    job = Job(3, reduce_bucket_size=500_000)
    # buffer and copies live together: twice what is not persistent
    assert peak_bytes([job.setup, job.passes[0][0]]) >= live_bytes([job.setup]) + 2 * 2 * (P - PERSISTENT)
    alone = Job(3, **TEXTBOOK, layers=tuple(job.layers))
    largest = 262_144 + 1024  # weight and bias of fc1, the module with most
    forward = alone.passes[0][0]
    activations = 2 * 26
    assert peak_bytes([alone.setup, forward]) <= live_bytes([alone.setup]) + 2 * 2 * largest + activations


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        TEXTBOOK,
        {"prefetch_bucket_size": 200_000, "max_live_parameters": 1_500_000, "max_reuse_distance": 600_000},
        {"param_persistence_threshold": 1_000, "max_reuse_distance": 10_000},
    ],
)
def test_backward_ends_with_the_parameters_partitioned(recompute: str, settings: dict[str, int]) -> None:
    job = Job(3, num_microbatches=2, recompute=recompute, **(settings | {"reduce_bucket_size": 300_000}))
    start = live([job.setup])
    end = live([job.setup, *job.passes[0], *job.passes[1]])
    assert sorted(s.name for s in start.values()) == sorted(s.name for s in end.values())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_first_pass_records_what_the_plans_say(recompute: str) -> None:
    job = Job(3, recompute=recompute, **TEXTBOOK)
    hooks = Stage3(job.layers, job.settings, job.hooks.plan)
    hooks.begin_microbatch(True, True)
    job.emitter.passes(hooks)  # records
    hooks.begin_microbatch(True, True)
    again = job.emitter.passes(hooks)
    assert hooks.trace == job.hooks.trace  # type: ignore[union-attr]
    assert collectives(again.forward) == collectives(job.passes[0][0])
    assert collectives(again.backward) == collectives(job.passes[0][1])


def test_recompute_gathers_again_what_is_used_too_far_ahead() -> None:
    near = Job(3, recompute="full", **(TEXTBOOK | {"max_reuse_distance": 10**9, "max_live_parameters": 10**9}))
    far = Job(3, recompute="full", **TEXTBOOK)
    assert sum(kinds(near.passes[0][1], "all_gather")) < sum(kinds(far.passes[0][1], "all_gather"))


def test_streams_of_gathers_and_reductions() -> None:
    job = Job(3, **TEXTBOOK)
    streams = {(each.kind, each.stream) for chunk in job.passes[0] for each in chunk if isinstance(each, Collective)}
    assert streams == {("all_gather", "nccl:dp"), ("reduce_scatter", REDUCE_STREAM)}
    gathered = list(live([job.setup, job.passes[0][0][: len(job.passes[0][0]) // 2]]).values())
    assert any(s.stream == ALL_GATHER_STREAM for s in gathered)
    used_on = [each for chunk in job.passes[0] for each in chunk if isinstance(each, UseOn)]
    assert {each.stream for each in used_on} == {"compute", REDUCE_STREAM}
    plain = Job(3, overlap_comm=False, **TEXTBOOK)
    assert not [each for chunk in plain.passes[0] for each in chunk if isinstance(each, UseOn)]


def test_the_step_goes_sub_group_by_sub_group() -> None:
    whole = Job(3, **TEXTBOOK)
    parts = Job(3, **(TEXTBOOK | {"sub_group_size": 700_000}))
    assert len(parts.hooks.groups) == 3  # type: ignore[union-attr]
    assert peak_bytes(parts.chunks) < peak_bytes(whole.chunks)
    assert live_bytes(parts.chunks) == live_bytes(whole.chunks)


def test_fp32_models_have_a_master_copy_too() -> None:
    # measured: 40 001 024 bytes with a bucket of 400 000
    job = Job(3, dtype="fp32", reduce_bucket_size=400_000)
    assert live_bytes(job.chunks) == 40_001_024 == (4 + 12 + 4) * P // 2 + 4 * PERSISTENT + 4 * 400_000


@pytest.mark.parametrize("efficient", [True, False])
def test_a_memory_efficient_linear_hands_over_its_weight_before_its_bias(efficient: bool) -> None:
    """A bucket of fc2's weight: with the weight first it is full at once, with the bias first that goes alone."""
    embedding, block, head = gpt(1)
    weight = 4 * H * H
    shaped = tuple(
        replace(p, shape=(Dim("rows", H), Dim("columns", p.num_elements // H)))
        if p.name.endswith("weight") and p.num_elements > H
        else p
        for p in block.parameters
    )
    job = Job(
        3, layers=(embedding, replace(block, parameters=shaped), head), reduce_bucket_size=weight,
        memory_efficient_linear=efficient,
    )  # fmt: skip
    reduced = [size // 2 for kind, size in collectives(job.passes[0][1]) if kind == "reduce_scatter"]
    assert reduced[: 2 + efficient] == ([V * H, 2 * H, weight] if efficient else [V * H, 3 * H])


def test_a_bias_beside_a_tied_weight_does_not_wait_for_it() -> None:
    """The head's weight comes with the embedding's, at the end of backward; its bias when the head's backward is."""
    embedding, block, head = gpt(1, tied=True)
    bias = replace(head.parameters[-1], name="head.bias", shape=(Dim("numel", V),))
    weight = replace(head.parameters[-1], shape=(Dim("rows", V), Dim("columns", H)))
    product = replace(head.forward[-1], parameters=("head.weight", "head.bias"))
    grads = replace(head.backward[0], gradients=("head.bias", "head.weight"))
    biased = replace(
        head, parameters=(*head.parameters[:-1], weight, bias), forward=(*head.forward[:-1], product),
        backward=(grads, *head.backward[1:]),
    )  # fmt: skip
    job = Job(3, layers=(embedding, block, biased), memory_efficient_linear=True)
    scattered = sum(size // 2 for kind, size in collectives(job.passes[0][1]) if kind == "reduce_scatter")
    assert scattered == sum(p.num_elements for layer in (embedding, block, biased) for p in layer.parameters) - V * H


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_host_passes_the_hooks_of_every_module(recompute: str) -> None:
    """Once forward, once more where a block runs again, once backward; a block of the test model is itself and six."""
    forward, backward = Job(3, recompute=recompute).passes[0]
    hooks = {"zero3_forward": 0, "zero3_backward": 0}
    for each in forward:
        if isinstance(each, HostCompute) and each.kind in hooks:
            hooks[each.kind] += each.num_elements
    modules = hooks["zero3_forward"]
    assert hooks["zero3_backward"] == 0
    for each in backward:
        if isinstance(each, HostCompute) and each.kind in hooks:
            hooks[each.kind] += each.num_elements
    assert hooks["zero3_backward"] == modules
    again = sum(len({"", *(op.module for op in layer.forward)}) for layer in gpt() if layer.kind == "block")
    assert hooks["zero3_forward"] - modules == (again if recompute == "full" else 0)
