"""Whatever the settings: what is allocated is freed once, volumes are those of ZeRO, a step leaves nothing behind."""

from __future__ import annotations

from typing import Any

from deepspeed_world import Job, by_category, collectives, gpt
from held import live
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.ir.program import HostWait, Record, Wait

SIZE = st.sampled_from([0, 1, 1_000, 70_000, 200_000, 300_000, 700_000, 10**9])
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    stage = draw(st.sampled_from([0, 1, 2, 3]))
    options: dict[str, Any] = {
        "overlap_comm": draw(st.booleans()),
        "contiguous_gradients": draw(st.booleans()),
        "reduce_scatter": draw(st.booleans()),
        "use_multi_rank_bucket_allreduce": draw(st.booleans()),
        "reduce_bucket_size": draw(SIZE.filter(bool)),
        "prefetch_bucket_size": draw(SIZE),
        "param_persistence_threshold": draw(SIZE),
        "max_live_parameters": draw(SIZE),
        "max_reuse_distance": draw(SIZE),
        "sub_group_size": draw(SIZE.filter(bool)),
        "grad_accum_dtype": draw(st.sampled_from([None, "fp32"])) if stage in (2, 3) else None,
        "communication_data_type": draw(st.sampled_from([None, "fp32", "bf16"])),
        "pin_memory": draw(st.booleans()),
    }
    if stage and draw(st.booleans()):
        options["offload_optimizer"] = "cpu"
        options["offload_ratio"] = draw(st.sampled_from([1.0, 0.4])) if stage == 3 else 1.0
    dp = draw(st.sampled_from([1, 2, 3, 8]))
    if stage == 3 and draw(st.booleans()):
        options["offload_param"] = "cpu"
    elif stage == 3:
        options["zero_hpz_partition_size"] = draw(st.sampled_from([1, 1, 2 if dp % 2 == 0 else dp]))
    return Job(
        stage,
        dp,
        draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(["none", "full"])),
        gpt(draw(st.integers(1, 3)), draw(st.booleans())),
        fused=draw(st.booleans()),
        clipping=draw(st.sampled_from([0.0, 1.0])),
        **options,
    )


@settings(max_examples=120, deadline=None)
@given(jobs())
def test_a_step_leaves_what_it_found(job: Job) -> None:
    before = sorted((s.name, s.num_bytes) for s in live([job.setup]).values())
    first = [s for s in live(job.chunks).values() if not s.name.startswith("exp_avg")]
    assert sorted((s.name, s.num_bytes) for s in first) == [
        each for each in before if not each[0].startswith("exp_avg")
    ]
    assert sorted(live(job.two_steps)) == sorted(live(job.chunks))  # the very same storages
    categories = by_category(job.chunks)
    assert categories["activations"] == categories["temporary"] == 0


@settings(max_examples=120, deadline=None)
@given(jobs())
def test_gradients_and_parameters_travel_as_often_as_zero_says(job: Job) -> None:
    dp, stage, count = job.hooks.plan.dp, job.settings.stage, job.hooks.num_elements
    reduced = sum(size for _, b in job.passes for kind, size in collectives(b) if kind != "all_gather")
    gathered = [
        sum(size for kind, size in collectives(f) + collectives(b) if kind == "all_gather") for f, b in job.passes
    ]
    if dp == 1:
        assert reduced == sum(gathered) == 0
        return
    element = ELEMENT[
        {None: job.hooks.dtype}.get(job.settings.communication_data_type, job.settings.communication_data_type)
    ]
    times = 1 if stage < 2 else len(job.passes)
    if stage < 3:
        assert reduced == times * count * element
        assert sum(gathered) == 0
        return
    padded = sum(-(-p.num_elements // dp) * dp for p in job.hooks.parameters)
    assert times * count * element <= reduced <= times * padded * element
    # every parameter at most once in each of forward, recompute and backward of each use, at least once if not kept
    kept = sum(
        -(-p.num_elements // dp) * dp
        for p, keeps in zip(job.hooks.parameters, job.hooks.persistent, strict=True)
        if keeps
    )
    for each in gathered:
        assert (padded - kept) * ELEMENT[job.hooks.dtype] <= each <= 6 * padded * ELEMENT[job.hooks.dtype]


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_nobody_waits_for_what_was_never_recorded_before(job: Job) -> None:
    for chunk in (chunk for pair in job.passes for chunk in pair):
        recorded: set[str] = set()
        for each in chunk:
            if isinstance(each, Record):
                recorded.add(each.event)
            elif isinstance(each, (Wait, HostWait)) and chunk is job.passes[0][0]:
                assert each.event in recorded
