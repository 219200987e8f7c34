"""FSDP2's shards, gathers and reductions, by arithmetic; real processes are in tests/real/test_fsdp2_collectives.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from fsdp_world import Job, collectives, gpt_shapes, layers_of, peak
from held import live, live_bytes
from hypothesis import given
from hypothesis import strategies as st

from sim.ir.ledger import Dim, Ledger, Parameter
from sim.ir.program import Alloc, Copy, Free, HostCompute, HostWait, Record, UseOn, Wait
from sim.model.transformer import describe
from sim.parallel.frameworks.fsdp2 import dim0, fsdp2, shard_of
from sim.parallel.frameworks.plan import Plan
from sim.scenario.schema import Fsdp2Settings, ModelConfig, Training

LAYERS = layers_of(gpt_shapes())
BLOCK = 12 * 64 * 64 + 13 * 64
ROOT = 2 * 256 * 64 + 16 * 64 + 2 * 64


def job(
    dtype: Any = "bf16",
    dp: int = 2,
    microbatches: int = 1,
    recompute: str = "none",
    *,
    plan: Any = None,
    **settings: Any,
) -> Job:
    given = Plan(dp, dtype, dtype != "fp32", microbatches, **(plan or {}))
    return Job(fsdp2(LAYERS, Fsdp2Settings(**settings), given), LAYERS, dtype, microbatches, recompute)


def moved(ours: Job, kind: str) -> list[int]:
    return [size for chunk in ours.micro for k, size, _ in collectives(chunk) if k == kind]


def test_a_projections_rows_are_heads_times_their_width() -> None:
    """q: 8 heads of 16 and 64 columns are 128 rows; the output projection has 64 rows whatever its columns are."""
    hidden, heads, width = Dim("hidden", 64), Dim("heads", 8), Dim("head_dim", 16)
    assert dim0(Parameter("q", (heads, width, hidden))) == 128
    assert dim0(Parameter("q.bias", (heads, width))) == 128
    assert dim0(Parameter("qkv", (Dim("kv_heads", 2), Dim("group", 6), width, hidden))) == 192
    assert dim0(Parameter("o", (hidden, heads, width))) == 64
    assert dim0(Parameter("norm", (hidden,))) == 64


@given(rows=st.integers(1, 300), width=st.integers(1, 5), ranks=st.integers(1, 64))
def test_shards_cover_a_parameter_once_and_are_equally_padded(rows: int, width: int, ranks: int) -> None:
    p = Parameter("w", (Dim("ffn", rows), Dim("hidden", width)))
    found = [shard_of(p, ranks, rank) for rank in range(ranks)]
    assert sum(mine for _, mine in found) == rows * width
    assert {whole for whole, _ in found} == {-(-rows // ranks) * ranks * width}
    assert all(mine <= whole // ranks for whole, mine in found)


def test_state_is_sixteen_bytes_a_parameter_over_the_ranks() -> None:
    """fp32 shards, two moments, and while the optimizer runs the gradients: 16 P / N where all rows divide."""
    ours = job(dp=4)
    total = 4 * BLOCK + ROOT
    assert live_bytes([ours.setup]) == 4 * total // 4
    assert live_bytes([ours.setup, *ours.micro]) == 8 * total // 4
    assert live_bytes(ours.two_steps) == 12 * total // 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_group_is_gathered_twice_and_reduced_once_but_the_root(dtype: str) -> None:
    ours, size = job(dtype), {"fp32": 4, "bf16": 2}[dtype]
    assert moved(ours, "all_gather") == [size * ROOT, *[size * BLOCK] * 8]
    assert moved(ours, "reduce_scatter") == [*[4 * BLOCK] * 4, 4 * ROOT]


def test_backward_gathers_one_group_ahead() -> None:
    kinds = [kind for kind, _, _ in collectives(job().passes[0][1])]
    g, r = "all_gather", "reduce_scatter"
    assert kinds == [g, g, r, g, r, g, r, r, r]


def test_a_group_keeps_its_output_until_the_next_one_has_been_copied_out() -> None:
    """In forward two outputs are live when the second gather has been issued; in backward none is when compute runs."""
    ours = job()
    outputs = {id(group.output) for group in ours.hooks.groups}
    held: set[int] = set()
    most = 0
    for each in ours.passes[0][0]:
        if isinstance(each, Alloc) and id(each.storage) in outputs:
            held.add(id(each.storage))
        if isinstance(each, Free) and id(each.storage) in outputs:
            held.discard(id(each.storage))
        most = max(most, len(held))
    assert most == 2
    assert not held


def test_one_reduction_is_in_flight() -> None:
    ours = job()
    inputs = {id(group.reduce_input) for group in ours.hooks.groups}
    held = most = 0
    for each in ours.passes[0][1]:
        held += isinstance(each, Alloc) and id(each.storage) in inputs
        held -= isinstance(each, Free) and id(each.storage) in inputs
        most = max(most, held)
    assert (most, held) == (1, 0)


def test_events_alone_order_the_streams() -> None:
    """No record_stream, no wait of the host; an event is recorded before it is waited for."""
    ours = job(microbatches=2, plan={"replicas": 2})
    recorded: set[str] = set()
    for chunk in ours.two_steps:
        for each in chunk:
            assert not isinstance(each, UseOn | HostWait)
            if isinstance(each, Record):
                recorded.add(each.event)
            if isinstance(each, Wait):
                assert each.event in recorded


def test_gathering_again_from_slices_stays_among_fewer_ranks() -> None:
    """reshard_after_forward=2 of 4: forward gathers over 4, backward over 2, and slices of a half remain between."""
    ours = job(dp=4, reshard_after_forward=2)
    axes = [axis for chunk in ours.micro for kind, _, axis in collectives(chunk) if kind == "all_gather"]
    assert axes == ["dp"] * 5 + ["dp_reshard"] * 4
    whole = job(dp=4, reshard_after_forward=True)
    kept, none = (live_bytes([j.setup, j.passes[0][0]]) for j in (ours, whole))
    assert kept - none == 4 * BLOCK * 2 // 2


def test_whole_parameters_remain_where_nothing_is_resharded() -> None:
    ours, kept = job(), job(reshard_after_forward=False)
    difference = live_bytes([kept.setup, kept.passes[0][0]]) - live_bytes([ours.setup, ours.passes[0][0]])
    assert difference == 4 * BLOCK * 2
    assert len(moved(kept, "all_gather")) == 5


def test_gradients_stay_whole_in_the_reduce_dtype_without_synchronisation() -> None:
    ours = job(microbatches=3, gradient_sync="last")
    whole = 4 * BLOCK + ROOT
    kept = [s for s in live([ours.setup, *ours.passes[0]]).values() if s.category == "gradients"]
    assert sum(s.num_bytes for s in kept) == 4 * whole
    assert [len([k for k, _, _ in collectives(b) if k == "reduce_scatter"]) for _, b in ours.passes] == [0, 0, 5]
    assert live_bytes(ours.two_steps) == 12 * whole // 2


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reshard_after_forward": False, "wrap": "torchtitan"},
        {"reshard_root": True, "cpu_offload": True},
        {"orig_dtype": "bf16", "reduce_dtype": "bf16", "optimizer_implementation": "for-loop"},
        {"gradient_sync": "last", "reshard_after_backward": False},
        {"reduce_dtype": None, "optimizer_implementation": "fused"},
    ],
)
@pytest.mark.parametrize("plan", [{}, {"replicas": 2}, {"pipeline": True}])
def test_a_step_leaves_what_it_found(recompute: str, settings: dict[str, Any], plan: dict[str, Any]) -> None:
    for dp in (1, 2):
        for microbatches in (1, 3):
            ours = job("bf16", dp, microbatches, recompute, plan=plan, **settings)
            chunks = ours.two_steps
            once = live_bytes(chunks[: 2 + 2 * microbatches])
            assert live_bytes(chunks) == once


def test_in_a_pipeline_parameters_stay_and_gradients_are_reduced_after_the_last_backward() -> None:
    ours = job(microbatches=3, plan={"pipeline": True})
    kinds = [[kind for kind, _, _ in collectives(chunk)] for chunk in ours.micro]
    assert kinds == [["all_gather"] * 5, [], [], [], [], ["reduce_scatter"] * 5]


def test_replicas_average_the_shards() -> None:
    ours = job(plan={"replicas": 4})
    found = [(size, axis) for chunk in ours.micro for kind, size, axis in collectives(chunk) if kind == "all_reduce"]
    assert found == [*[(4 * BLOCK // 2, "dp_replicate")] * 4, (4 * ROOT // 2, "dp_replicate")]


def test_offloaded_shards_cross_the_bus_and_the_cpu_updates_them() -> None:
    ours = job(cpu_offload=True)
    held = live(ours.two_steps).values()
    assert {s.place for s in held} == {"host"}
    copies = [each for chunk in ours.micro for each in chunk if isinstance(each, Copy)]
    down = sum(c.num_bytes for c in copies if c.direction == "device_to_host")
    assert down == 4 * (4 * BLOCK + ROOT) // 2
    assert any(isinstance(each, HostCompute) for each in ours.step)


def test_clipping_reduces_the_norms_of_all_parameters_as_one() -> None:
    ours = job(plan={"gradient_clipping": 1.0})
    assert collectives(ours.step) == [("all_reduce", 4 * (4 * 12 + 5), "dp")]


# --- Llama-3-8B on eight GPUs -------------------------------------------------------------------


@cache
def llama() -> Ledger:
    model = ModelConfig(
        name="llama-3-8b",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    training = Training(
        sequence_length=8192,
        micro_batch_size=1,
        global_batch_size=8,
        precision="bf16",
        code="torch",
        attention="flash-2",
    )
    return describe(model, training, parameter_dtype="bf16", compute_dtype="bf16", autocast=False, flash=True)


@cache
def llama_job(recompute: str) -> Job:
    ledger = llama()
    hooks = fsdp2(ledger.layers, Fsdp2Settings(), Plan(8, "bf16", True, 1))
    return Job(hooks, ledger.layers, "bf16", 1, recompute, ledger.batch_inputs)


GIB = 2**30
BSH = 2 * 8192 * 4096
"""batch x sequence x hidden in bf16."""


def test_the_parts_of_llama_3_8b_are_those_of_a_traced_step() -> None:
    """65 gathers of 2 (2 P_blocks + P_root) bytes, 33 reductions of 4 P; 3.739 + 7.479 GiB of states, root 1.957."""
    ours = llama_job("none")
    found = [each for chunk in ours.micro for each in collectives(chunk)]
    gathered = [size for kind, size, _ in found if kind == "all_gather"]
    reduced = [size for kind, size, _ in found if kind == "reduce_scatter"]
    assert (len(gathered), sum(gathered)) == (65, 30_019_690_496)
    assert (len(reduced), sum(reduced)) == (33, 4 * llama().num_parameters)
    held = live([ours.setup, *ours.micro, ours.first_step, ours.passes[0][0]]).values()
    parameters = sum(s.num_bytes for s in held if s.category == "parameters") / GIB
    optimizer = sum(s.num_bytes for s in held if s.category == "optimizer") / GIB
    assert parameters == pytest.approx(3.739 + 1.957, abs=0.001)
    assert optimizer == pytest.approx(7.479, abs=0.001)


@pytest.mark.parametrize(
    ("recompute", "traced_gib", "kept_beside"),
    # The traced model repeats keys and values to all heads (4 x 1/4 -> 1 each) and keeps attention's output twice: 2.5
    # times b s h for each layer, which the blocks here do not keep. Checkpointed blocks keep their input alone.
    [("none", 71.08, 2.5 * 32 * BSH), ("full", 27.05, 0)],
)
def test_the_peak_of_llama_3_8b_is_that_of_a_traced_step(recompute: str, traced_gib: float, kept_beside: float) -> None:
    """``allocated`` at the loss's gradients under LiveTracker (fake tensors, torch 2.14.1, CUDA kernels' shapes)."""
    ours = llama_job(recompute)
    most, _ = peak([ours.setup, *ours.micro, ours.first_step, *ours.micro])
    assert (most + kept_beside) / GIB == pytest.approx(traced_gib, abs=0.005)


def test_gradients_that_tensor_parallel_ranks_share_are_summed_before_they_are_scattered() -> None:
    """The norms of a block, 64 elements in bf16 each, once a reduction, ahead of the block's reduce-scatter."""
    names = ("ln1.weight", "ln2.weight")
    plan = {"tp": 4, "partial": tuple((1, name) for name in names)}
    for sync, times in (("every", 2), ("last", 1)):
        ours = job(microbatches=2, plan=plan, gradient_sync=sync)
        found = [(kind, size, axis) for chunk in ours.micro for kind, size, axis in collectives(chunk)]
        summed = [i for i, each in enumerate(found) if each[2] == "tp"]
        width = 2 if sync == "every" else 4  # accumulated whole gradients are in the dtype of the reduction
        assert [found[i] for i in summed] == [("all_reduce", 64 * width, "tp")] * len(names) * times
        assert [found[i + 1][0] for i in summed[1::2]] == ["reduce_scatter"] * times
        assert live_bytes([*ours.two_steps]) == live_bytes([*job(microbatches=2, gradient_sync=sync).two_steps])
