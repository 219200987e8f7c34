"""FSDP1's flat parameters, rate limiter and gradients; real processes are in tests/real/test_fsdp2_collectives.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fsdp_world import Job, collectives, gpt_shapes, layers_of
from held import live_bytes
from hypothesis import given
from hypothesis import strategies as st

from sim.ir.program import Alloc, Free, HostWait, Record, UseOn, Wait
from sim.parallel.frameworks.fsdp1 import divide_factors, flat_numel, fsdp1
from sim.parallel.frameworks.plan import Plan
from sim.pipeline import simulate
from sim.scenario.load import load_scenario
from sim.scenario.schema import Fsdp1Settings

LAYERS = layers_of(gpt_shapes())
BLOCK = 12 * 64 * 64 + 13 * 64
ROOT = 2 * 256 * 64 + 16 * 64 + 2 * 64
TOTAL = 4 * BLOCK + ROOT


def job(
    dp: int = 2,
    microbatches: int = 1,
    recompute: str = "none",
    *,
    plan: Any = None,
    layers: Any = LAYERS,
    **settings: Any,
) -> Job:
    dtype: Any = "fp32" if settings.get("mixed_precision") == "FULL" else "bf16"
    given = Plan(dp, dtype, dtype != "fp32", microbatches, **(plan or {}))
    return Job(fsdp1(layers, Fsdp1Settings(**settings), given), layers, dtype, microbatches, recompute)


@given(numels=st.lists(st.integers(1, 50), min_size=1, max_size=8), ranks=st.integers(1, 16))
def test_original_parameters_start_at_multiples_of_sixteen_bytes(numels: list[int], ranks: int) -> None:
    total, offsets = flat_numel(numels, "bf16", ranks, use_orig_params=True)
    assert all(offset % 8 == 0 for offset in offsets)
    assert total % ranks == 0
    assert total >= sum(numels)
    assert flat_numel(numels, "bf16", ranks, use_orig_params=False)[0] == sum(numels)


@given(ranks=st.integers(1, 4096))
def test_gradients_are_divided_by_the_ranks_in_two_steps(ranks: int) -> None:
    before, after = divide_factors(ranks)
    assert before * after == pytest.approx(ranks)


def test_state_is_fp32_over_the_ranks() -> None:
    ours = job(dp=4)
    assert live_bytes([ours.setup]) == 4 * TOTAL // 4
    assert live_bytes(ours.two_steps) == 12 * TOTAL // 4


def test_a_model_in_16_bit_is_sharded_and_optimized_in_it() -> None:
    """Half of the bytes of fp32 shards and states, and nothing to cast them into."""
    ours = job(dp=4, orig_dtype="bf16", mixed_precision="PURE")
    assert live_bytes([ours.setup]) == 2 * TOTAL // 4
    assert live_bytes(ours.two_steps) == 6 * TOTAL // 4
    assert not [i for i in (*ours.setup, *ours.two_steps[0]) if isinstance(i, Alloc) and "mp_shard" in i.storage.name]


@pytest.mark.parametrize(
    ("settings", "gathers"),
    [({}, 9), ({"sharding_strategy": "SHARD_GRAD_OP"}, 5), ({"sharding_strategy": "NO_SHARD"}, 0)],
)
def test_what_is_kept_after_forward_is_not_gathered_again(settings: dict[str, Any], gathers: int) -> None:
    kinds = [kind for chunk in job(**settings).micro for kind, _, _ in collectives(chunk)]
    assert kinds.count("all_gather") == gathers
    assert kinds.count("reduce_scatter" if gathers else "all_reduce") == 5


@pytest.mark.parametrize(("precision", "gathered", "reduced"), [("DEFAULT", 2, 4), ("PURE", 2, 2), ("FULL", 4, 4)])
def test_mixed_precision_is_the_width_of_the_collectives(precision: str, gathered: int, reduced: int) -> None:
    sizes = [each for chunk in job(mixed_precision=precision).micro for each in collectives(chunk)]
    assert sum(size for kind, size, _ in sizes if kind == "all_gather") == gathered * (8 * BLOCK + ROOT)
    assert sum(size for kind, size, _ in sizes if kind == "reduce_scatter") == reduced * TOTAL


def test_the_host_waits_before_a_third_gather() -> None:
    """From the third block on, each gather waits for the block two before to be free; without the limiter none does."""
    forward = job().passes[0][0]
    waits = [each.event for each in forward if isinstance(each, HostWait)]
    assert waits == ["fsdp.free.0", "fsdp.free.1"]
    free = job(limit_all_gathers=False)
    assert not any(isinstance(each, HostWait) for chunk in free.micro for each in chunk)


def test_the_limiter_counts_on_through_the_microbatches() -> None:
    """A later microbatch begins with two frees in the queue, so its first gathers wait as well."""
    ours = job(microbatches=3)
    waits = [[each.event for each in forward if isinstance(each, HostWait)] for forward, _ in ours.passes]
    assert waits[1] == waits[2]
    assert len(waits[1]) > len(waits[0])


def test_streams_that_use_what_another_allocated_are_recorded() -> None:
    ours = job()
    used: dict[str, set[str]] = {}
    for chunk in ours.micro:
        for each in chunk:
            if isinstance(each, UseOn):
                used.setdefault(each.storage.name.rpartition(".")[2], set()).add(each.stream)
                assert each.stream != each.storage.stream
    assert used["mp_shard"] == {"unshard"}
    assert used["flat_param"] == {"compute"}


def test_a_units_gradients_are_put_together_beside_their_parts() -> None:
    """The split's node needs all parts while it writes the flat gradient: twice the unit in bf16."""
    ours = job()
    most = now = 0
    for each in ours.passes[0][1]:
        if isinstance(each, Alloc) and each.storage.category == "gradients" and each.storage.stream == "compute":
            now += each.storage.num_bytes
        if isinstance(each, Free) and each.storage.category == "gradients" and each.storage.stream == "compute":
            now -= each.storage.num_bytes
        most = max(most, now)
    assert most == 2 * 2 * BLOCK + 2 * (256 * 64 + 2 * 64)  # the head's wait for the embedding's


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sharding_strategy": "SHARD_GRAD_OP", "mixed_precision": "PURE", "use_orig_params": True},
        {"sharding_strategy": "NO_SHARD"},
        {"sharding_strategy": "NO_SHARD", "mixed_precision": "FULL"},
        {"backward_prefetch": "BACKWARD_POST", "forward_prefetch": True, "limit_all_gathers": False},
        {"backward_prefetch": "NONE", "keep_low_precision_grads": True, "optimizer_implementation": "fused"},
        {"gradient_sync": "last", "mixed_precision": "FULL"},
        {"cpu_offload": True},
    ],
)
@pytest.mark.parametrize("plan", [{}, {"replicas": 2, "gradient_clipping": 1.0}])
def test_a_step_leaves_what_it_found(recompute: str, settings: dict[str, Any], plan: dict[str, Any]) -> None:
    """Nothing is left behind; every event that is waited for has been recorded."""
    for dp in (1, 3):
        for microbatches in (1, 3):
            ours = job(dp, microbatches, recompute, plan=plan, **settings)
            chunks = ours.two_steps
            assert live_bytes(chunks) == live_bytes(chunks[: 2 + 2 * microbatches])
            recorded: set[str] = set()
            for chunk in chunks:
                for each in chunk:
                    if isinstance(each, Record):
                        recorded.add(each.event)
                    if isinstance(each, Wait | HostWait):
                        assert each.event in recorded


def copies_at_once(framework: str, settings: str, tmp_path: Path) -> int:
    """Return the most of autocast's copies of blocks' weights that a forward pass under checkpoints holds at once."""
    (tmp_path / "job.yaml").write_text(
        "model: {hidden_size: 64, intermediate_size: 256, num_hidden_layers: 2, num_attention_heads: 4, "
        "vocab_size: 256, hidden_act: gelu, norm: layernorm, position: learned, bias: true}\n"
        f"cluster: {{node: dgx-a100-80gb, num_gpus: 2}}\nframework: {framework}\n{settings}\n"
        "training: {sequence_length: 64, micro_batch_size: 1, precision: bf16, recompute: full}\n",
        encoding="utf-8",
    )
    program = simulate(load_scenario(tmp_path / "job.yaml", ())).world.programs[0]
    held, most = 0, 0
    chunk = next(chunk for name, chunk in program.chunks.items() if "forward" in name)
    for each in chunk:
        if isinstance(each, Alloc | Free) and each.storage.name.startswith("block.autocast:"):
            held += 1 if isinstance(each, Alloc) else -1
            most = max(most, held)
    return most


def test_autocast_caches_no_copies_of_views_of_flat_parameters(tmp_path: Path) -> None:
    """``cached_cast`` caches leaves that are no views. What FSDP1's modules see are views; what DDP's see, parameters.

    So DDP holds the four weights of both blocks until autocast's region ends, FSDP1 each until its product is done.
    """
    full = "fsdp1: {mixed_precision: FULL}\nparallelism: {zero: 3}"
    assert copies_at_once("ddp", "", tmp_path) == 8
    assert copies_at_once("fsdp1", full, tmp_path) == 1
