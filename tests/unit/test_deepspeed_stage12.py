"""ZeRO 0, 1 and 2: bytes that real DeepSpeed holds, derived; buckets, streams and the step's temporaries."""

from __future__ import annotations

import pytest
from deepspeed_world import NUM_PARAMETERS, Job, P, by_category, collectives, gpt, is_host, peak_bytes
from held import live, live_bytes

from sim.ir.program import COMPUTE, Alloc, Collective, HostWait, Wait


def test_the_model_is_the_one_that_was_measured() -> None:
    assert P == 3_716_608
    assert sum(layer.num_parameters for layer in gpt()) == P
    assert sum(len(layer.parameters) for layer in gpt()) == NUM_PARAMETERS == 53


@pytest.mark.parametrize(
    ("stage", "dtype", "dp", "state_bytes"),
    [
        (0, "fp32", 2, 12 * P),  # parameters, two moments
        (0, "bf16", 2, 14 * P),  # 16-bit parameters, fp32 master, two moments
        (1, "fp32", 2, 4 * P + 12 * P // 2),  # a second fp32 copy of the shard, although the model is fp32
        (2, "fp32", 2, 4 * P + 12 * P // 2),
        (1, "bf16", 2, 2 * P + 12 * P // 2),
        (2, "bf16", 2, 2 * P + 12 * P // 2),
        (2, "bf16", 4, 2 * P + 12 * P // 4),
        (2, "fp16", 4, 2 * P + 12 * P // 4),
    ],
)
def test_what_is_held_between_steps(stage: int, dtype: str, dp: int, state_bytes: int) -> None:
    job = Job(stage, dp, dtype, reduce_bucket_size=500_000)
    assert live_bytes(job.chunks) == state_bytes


def test_measured_bytes_between_steps() -> None:
    # what a process held, without 212 bytes of step counters of 53 states, or 8 of one
    assert live_bytes(Job(0, dtype="fp32").chunks) == 44_599_508 - 212
    assert live_bytes(Job(0).chunks) == 52_032_724 - 212
    assert live_bytes(Job(2, dtype="fp32").chunks) == 37_166_088 - 8
    assert live_bytes(Job(1).chunks) == 29_732_872 - 8


def test_a_model_that_does_not_fit_twice_is_flattened_on_the_cpu() -> None:
    # nvmlDeviceGetMemoryInfo's free memory beside the model (2 P) has to hold the flat copy (2 P)
    beside = Job(2, gpu_memory_bytes=4 * P).setup
    aside = Job(2, gpu_memory_bytes=4 * P - 1).setup
    gpu = [[each for each in chunk if not is_host(each)] for chunk in (beside, aside)]
    flat_in = next(i for i, each in enumerate(gpu[1]) if isinstance(each, Alloc) and "flat" in each.storage.name)
    assert peak_bytes([tuple(gpu[1][:flat_in])]) == 2 * P + 4  # the model, and one number in the first one's place
    assert live_bytes([beside]) == live_bytes([aside])
    host = [each for each in aside if is_host(each)]
    assert peak_bytes([tuple(host)]) == 2 * 2 * P and live_bytes([tuple(host)]) == 0
    assert not [each for each in beside if is_host(each)]
    assert Job(1, gpu_memory_bytes=0).setup[-1].storage.name == "grad.partition"  # type: ignore[union-attr]


def test_zero1_keeps_all_gradients_and_its_bucket_until_the_last_microbatch() -> None:
    job = Job(1, num_microbatches=2, reduce_bucket_size=1_000_000)
    (_, first), (_, last) = job.passes
    before = live_bytes([job.setup])
    after = live_bytes([job.setup, *job.passes[0]])
    assert after - before == 9_433_216 == 2 * P + 2 * 1_000_000
    assert collectives(first) == []
    assert sum(size for _, size in collectives(last)) == 2 * P
    whole = live_bytes([job.setup, *job.passes[0], *job.passes[1]])
    assert whole - before < 2 * P  # only this rank's part is left


def test_zero2_keeps_its_partition_and_what_straddles_the_border() -> None:
    job = Job(2, num_microbatches=2, reduce_bucket_size=500_000, dp_rank=0)
    before = live_bytes([job.setup])
    after = live_bytes([job.setup, *job.passes[0]])
    assert after - before == 3_748_352 == 2 * (P // 2 + 15_872)
    assert live_bytes([job.setup, *job.passes[0], *job.passes[1]]) == after  # the second is added to the first
    for _, backward in job.passes:
        assert sum(size for _, size in collectives(backward)) == 2 * P


def test_the_step_of_zero2_needs_an_fp32_copy_of_the_partition() -> None:
    job = Job(2, reduce_bucket_size=500_000, dp_rank=0)
    chunks = [job.setup, *job.passes[0], job.step]
    held = 2 * (P // 2 + 15_872)  # averaged gradients, 16 bit
    flat, fp32, states = 2 * P // 2, 4 * P // 2, 8 * P // 2
    assert peak_bytes(chunks) == live_bytes([job.setup]) + max(held + flat + fp32, fp32 + states)
    assert collectives(job.step) == [("all_reduce", 1), ("all_reduce", 4), ("all_gather", 2 * P)]


def test_torchs_optimizer_adds_a_temporary_copy_of_the_partition() -> None:
    fused = Job(2, reduce_bucket_size=500_000)
    foreach = Job(2, fused=False, reduce_bucket_size=500_000)
    assert peak_bytes(foreach.chunks) == peak_bytes(fused.chunks) + 4 * P // 2


def test_a_bucket_is_reduced_when_the_next_gradient_does_not_fit() -> None:
    job = Job(2, reduce_bucket_size=500_000)
    # measured with real DeepSpeed, bytes of 2-byte elements
    block = [658_432, 921_088]
    assert [size for _, size in collectives(job.passes[0][1])] == [525_824, 526_336, *block * 3, 658_432, 984_064]
    single = Job(2, reduce_bucket_size=100_000)  # the large weights do not fit: each is reduced alone
    sizes = [size // 2 for _, size in collectives(single.passes[0][1])]
    # two in each block, word embedding and head; the one at the partitions' border goes in two parts
    assert sizes.count(4 * 256 * 256) == 2 * 4 + 2 - 1
    assert sizes.count(3 * 256 * 256) == 4
    assert sum(sizes) == P


def test_without_multi_rank_buckets_each_part_is_reduced_to_its_owner() -> None:
    job = Job(2, reduce_bucket_size=10**8, use_multi_rank_bucket_allreduce=False)
    assert collectives(job.passes[0][1]) == [("reduce", P), ("reduce", P)]  # P / 2 elements of 2 bytes each


def test_overlap_reduces_on_its_own_stream_with_two_buckets() -> None:
    job = Job(2, overlap_comm=True, reduce_bucket_size=500_000)
    backward = job.passes[0][1]
    assert {each.stream for each in backward if isinstance(each, Collective)} == {"reduction"}
    assert any(isinstance(each, Wait) and each.stream == "reduction" for each in backward)
    assert sum(isinstance(each, HostWait) for each in backward) == 1  # synchronize() at the end
    held = list(live([job.setup, job.passes[0][0], backward[: len(backward) // 2]]).values())
    assert [s.name for s in held if s.name.startswith("ipg")] == ["ipg.0", "ipg.1"]
    plain = Job(2, reduce_bucket_size=500_000).passes[0][1]
    assert {each.stream for each in plain if isinstance(each, Collective)} == {COMPUTE}


def test_stage_0_reduces_once_a_step_from_a_copy() -> None:
    job = Job(0, num_microbatches=3)
    assert [collectives(backward) for _, backward in job.passes] == [[], [], [("all_reduce", 2 * P)]]
    before, last = [job.setup, *job.passes[0], *job.passes[1], job.passes[2][0]], job.passes[2][1]
    gradients = bucket = 2 * P
    assert peak_bytes([*before, last]) == live_bytes([job.setup]) + gradients + bucket
    assert by_category(job.chunks) == {"parameters": 2 * P, "optimizer": 12 * P}


def test_stage_0_casts_the_gradients_one_by_one_and_then_flattens_them() -> None:
    job = Job(0)
    # 16-bit gradients, fp32 copies of each, a flat fp32 copy: all at once
    assert peak_bytes(job.chunks) == live_bytes([job.setup]) + 2 * P + 4 * P + 4 * P


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3])
def test_nothing_of_a_step_is_held_when_it_ends(stage: int, num_microbatches: int) -> None:
    job = Job(stage, num_microbatches=num_microbatches, reduce_bucket_size=500_000)
    categories = by_category(job.chunks)
    assert categories["activations"] == categories["temporary"] == 0
    if stage < 3:
        assert set(categories) == {"parameters", "optimizer"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_has_nobody_to_talk_to(stage: int) -> None:
    job = Job(stage, dp=1, reduce_bucket_size=500_000)
    assert [c for chunk in job.chunks for c in collectives(chunk)] == []


def test_more_partitioning_never_holds_more_state() -> None:
    held = [live_bytes(Job(stage, 4, reduce_bucket_size=1).chunks) for stage in (0, 1, 2)]
    held.append(live_bytes(Job(3, 4, reduce_bucket_size=1, param_persistence_threshold=0).chunks))
    assert held == sorted(held, reverse=True)


@pytest.mark.parametrize("dp", [2, 4])
def test_the_bf16_optimizer_holds_fp32_gradients_that_no_rank_shares(dp: int) -> None:
    """2 bytes for parameters and for 16-bit gradients, 4 for fp32 ones, 12 / dp for master and moments."""
    job = Job(1, dp, grad_accum_dtype="fp32", num_microbatches=2)
    assert live_bytes(job.chunks) == (2 + 2 + 4) * P + 12 * P // dp


def test_the_bf16_optimizer_reduces_all_gradients_in_fp32_once_a_batch() -> None:
    job = Job(1, 2, grad_accum_dtype="fp32", num_microbatches=2)
    (_, first), (_, last) = job.passes
    assert not collectives(first)
    assert [(i.kind, i.tensor_bytes) for i in last if isinstance(i, Collective)] == [("all_reduce", 4 * P)]
