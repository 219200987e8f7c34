"""Megatron-Core: bytes a parameter, buckets, and which collectives carry what."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sim.ir.ledger import Gemm
from sim.ir.program import Alloc, Collective, Compute, Free, HostWait, Program, World
from sim.model.transformer import describe
from sim.parallel.frameworks.megatron import BUCKET_ALIGNMENT, PARAM_ALIGNMENT, buckets_of, fused_gradients
from sim.parallel.frameworks.megatron_fsdp import bucket_elements
from sim.pipeline import programs
from sim.scenario.load import load_scenario_text
from sim.scenario.schema import Scenario

HIDDEN, FFN, VOCAB, LAYERS = 256, 1024, 512, 2


def asked(
    parallelism: dict[str, Any] | None = None,
    megatron: dict[str, Any] | None = None,
    *,
    num_gpus: int = 4,
    tied: bool = False,
    num_microbatches: int = 2,
    num_layers: int = LAYERS,
    node: str = "dgx-h100",
    **training: Any,
) -> Scenario:
    parallelism = parallelism or {}
    replicas = num_gpus // (parallelism.get("pp", 1) * parallelism.get("tp", 1))
    text: dict[str, Any] = {
        "model": {
            "num_hidden_layers": num_layers,
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_attention_heads": 8,
            "vocab_size": VOCAB,
            "tie_word_embeddings": tied,
            "hidden_act": "gelu",
        },
        "cluster": {"node": node, "num_gpus": num_gpus},
        "framework": "megatron",
        "parallelism": parallelism,
        "training": {
            "sequence_length": 64,
            "micro_batch_size": 1,
            "global_batch_size": replicas * num_microbatches,
            "precision": "bf16",
            **training,
        },
    }
    if megatron:
        text["megatron"] = megatron
    return load_scenario_text(yaml.safe_dump(text), "megatron.yaml")


def world_of(scenario: Scenario) -> World:
    return programs(scenario)[1]


def parameters_of(scenario: Scenario) -> int:
    return describe(
        scenario.model, scenario.training, parameter_dtype="bf16", compute_dtype="bf16", autocast=False
    ).num_parameters


STATES = ("parameters", "gradients", "optimizer")


def state_bytes(program: Program) -> int:
    """Return the bytes of states after a step: those of the setup, and what the optimizer makes in the first step."""
    found = 0
    for calls, categories in ((program.setup, STATES), (program.first_step, ("optimizer",))):
        for call in calls:
            for i in program.chunks[call.chunk]:
                if isinstance(i, Alloc) and i.storage.category in categories:
                    found += i.storage.num_bytes
    return found


@pytest.mark.parametrize(
    ("precision", "whole", "fixed", "shared"),
    [("bf16", 18, 6, 12), ("fp16", 16, 4, 12), ("fp32", 16, 8, 8)],
)
def test_bytes_a_parameter(precision: str, whole: int, fixed: int, shared: int) -> None:
    """Megatron's table of its distributed optimizer over d ranks (docs dist_optimizer.md).

    18 and 6 + 12/d for bf16 with fp32 gradients; 16 and 8 + 8/d for fp32; 20 and 4 + 16/d for fp16, of which 4 are
    gradients cast to fp32 for the step alone.
    """
    scenario = asked(precision=precision)
    (program,) = world_of(scenario).programs
    count = parameters_of(scenario)
    assert state_bytes(program) == whole * count
    (sharded,) = world_of(asked({"zero": 1}, precision=precision)).programs
    padding = 4 * (fixed + shared) * PARAM_ALIGNMENT * BUCKET_ALIGNMENT
    assert 0 <= state_bytes(sharded) - (fixed + shared / 4) * count < padding


@pytest.mark.parametrize(("zero", "each", "shared"), [(2, 2, 14), (3, 0, 16)])
def test_bytes_a_parameter_of_megatron_fsdp(zero: int, each: int, shared: int) -> None:
    """16-bit parameters (whole or a shard), 16-bit gradients, fp32 master and two states: 16 bytes over the ranks.

    Embedding and head are whole besides, once gathered: 2 bytes each of 512 x 256 and the norm's 256.
    """
    scenario = asked({"zero": zero})
    (program,) = world_of(scenario).programs
    count = parameters_of(scenario)
    gathered = 0 if zero == 2 else 2 * (2 * VOCAB * HIDDEN + HIDDEN)
    padding = (each + shared) * 4 * 3 * FFN * (LAYERS + 2)
    assert 0 <= state_bytes(program) - (each + shared / 4) * count - gathered < padding


def test_megatron_fsdp_gathers_before_each_pass_and_reduces_after_each_backward() -> None:
    """Two microbatches of two layers: a gather a layer and pass, one reduction of each bucket."""
    (program,) = world_of(asked({"zero": 3})).programs
    moved = Counter(
        i.kind
        for call in program.step
        for i in program.chunks[call.chunk]
        if isinstance(i, Collective) and i.axis == "dp"
    )
    assert moved == {"all_gather": 2 * 2 * LAYERS + 2, "reduce_scatter": 2 * (LAYERS + 2)}
    (program,) = world_of(asked({"zero": 2})).programs
    moved = Counter(
        i.kind
        for call in program.step
        for i in program.chunks[call.chunk]
        if isinstance(i, Collective) and i.axis == "dp"
    )
    assert moved == {"all_gather": LAYERS + 2, "reduce_scatter": 2 * (LAYERS + 2)}


@given(
    st.lists(st.tuples(st.integers(1, 500), st.sampled_from([1, 8, 24, 64])), min_size=1, max_size=8),
    st.sampled_from([1, 2, 8]),
)
def test_a_bucket_of_megatron_fsdp_holds_its_parameters_in_whole_rows_of_each_rank(
    shapes: list[tuple[int, int]], dp: int
) -> None:
    count = bucket_elements(shapes, dp)
    own = sum(rows * width for rows, width in shapes)
    assert count >= own
    assert count % dp == 0
    widest = max(width for _, width in shapes)
    assert count // dp % widest == 0


def test_a_bucket_of_a_llama_layer() -> None:
    """Widths of 4,096 and 14,336 divide rows of 28,672 = 7 x 4,096: on 8 ranks a multiple of 229,376 elements.

    218,112,000 parameters, of which 8,192 are norms that fill no row: 950 full multiples and 204,800 more.
    """
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (4096, 1), (4096, 1)]
    own = sum(rows * width for rows, width in shapes)
    assert own == 218_112_000
    assert bucket_elements(shapes, 8) == -(-own // (8 * 28672)) * 8 * 28672


SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=40)


@given(SIZES, st.sampled_from([1, 2, 3, 8, 96]), st.one_of(st.none(), st.integers(1, 20_000)), st.booleans())
def test_buckets_hold_every_parameter_once_last_first(
    sizes: list[int], dp: int, bucket_size: int | None, aligned: bool
) -> None:
    keyed = [((0, f"p{i}"), count) for i, count in enumerate(sizes)]
    buckets = buckets_of(keyed, dp, bucket_size, aligned=aligned)
    assert [key for bucket in buckets for key in bucket.keys] == [key for key, _ in reversed(keyed)]
    counts = dict(keyed)
    for bucket in buckets:
        own = sum(counts[key] for key in bucket.keys)
        if aligned:
            assert bucket.num_elements % dp == bucket.num_elements % BUCKET_ALIGNMENT == 0
            assert 0 <= bucket.num_elements - own < len(bucket.keys) * PARAM_ALIGNMENT + dp * BUCKET_ALIGNMENT
        else:
            assert bucket.num_elements == own
    for bucket in buckets[:-1]:
        assert bucket_size is not None
        assert bucket.num_elements >= bucket_size
    assert bucket_size is not None or len(buckets) == 1


def test_a_weight_of_two_stages_has_a_bucket_of_its_own() -> None:
    keyed = [((0, name), 64) for name in "abc"]
    buckets = buckets_of(keyed, 2, None, aligned=True, alone=[(0, "b")])
    assert [bucket.keys for bucket in buckets] == [((0, "c"),), ((0, "b"),), ((0, "a"),)]


def collectives(program: Program) -> Counter[tuple[str, str]]:
    """Return bytes by (kind, axis) in a step."""
    found: Counter[tuple[str, str]] = Counter()
    for call in program.step:
        for i in program.chunks[call.chunk]:
            if isinstance(i, Collective):
                found[i.kind, i.axis] += i.tensor_bytes
    return found


def test_gradients_are_reduced_once_a_step_in_fp32() -> None:
    scenario = asked()
    (program,) = world_of(scenario).programs
    assert collectives(program) == {("all_reduce", "dp"): 4 * parameters_of(scenario)}


@pytest.mark.parametrize("overlap", [False, True])
def test_the_distributed_optimizer_scatters_gradients_and_gathers_parameters(overlap: bool) -> None:
    """fp32 gradients are twice the bytes of bf16 parameters; the norm is 4 bytes over all ranks."""
    settings = {"overlap_grad_reduce": True, "overlap_param_gather": True} if overlap else {}
    (program,) = world_of(asked({"zero": 1}, settings)).programs
    found = collectives(program)
    assert found["reduce_scatter", "dp"] == 2 * found["all_gather", "dp"] > 0
    assert found["all_reduce", "world"] == 4
    assert len(found) == 3


def test_a_tied_embedding_is_summed_over_both_ends_in_fp32() -> None:
    """VOCAB x HIDDEN gradients of 4 bytes, by the first and the last stage alone."""
    world = world_of(asked({"pp": 2}, tied=True))
    assert [collectives(program)["all_reduce", "embedding"] for program in world.programs] == [4 * VOCAB * HIDDEN] * 2
    untied = world_of(asked({"pp": 2}))
    assert all(("all_reduce", "embedding") not in collectives(program) for program in untied.programs)


def test_tied_embeddings_of_one_rank_are_added_where_they_are() -> None:
    """In a V the first rank has both ends of the model: two copies, and nothing is sent."""
    parallelism = {"pp": 2, "schedule": "zb-v"}
    tied, untied = (world_of(asked(parallelism, tied=tied, num_layers=4)) for tied in (True, False))
    first = tied.programs[0]
    assert collectives(first) == collectives(untied.programs[0])
    added = [i for i in first.chunks["optimizer"] if isinstance(i, Compute) and "tied embedding" in i.op]
    assert [i.op for i in added] == ["add tied embedding", "copy tied embedding"]
    assert state_bytes(first) == state_bytes(untied.programs[0])


@pytest.mark.parametrize("overlap", [False, True])
def test_both_copies_of_dualpipe_are_reduced_together(overlap: bool) -> None:
    """Each rank holds two of four stages; their gradients are added over dp 2 and over both copies, stage by stage.

    So 6 bytes a parameter twice instead of once, and the other 12 over twice the ranks.
    """
    settings = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap, "bucket_size": 100_000}
    shape: dict[str, Any] = {"num_gpus": 8, "num_microbatches": 8, "num_layers": 4}
    both = world_of(asked({"pp": 4, "schedule": "dualpipe", "zero": 1}, settings, **shape))
    once = world_of(asked({"pp": 4, "zero": 1}, settings, **shape))

    def order(program: Program, kind: str) -> list[int]:
        calls = [i for call in program.step for i in program.chunks[call.chunk] if isinstance(i, Collective)]
        return [i.tensor_bytes for i in calls if i.kind == kind and i.axis.startswith("dp")]

    for kind in ("reduce_scatter", "all_gather"):
        for rank in range(4):
            assert order(both.programs[rank], kind) == order(both.programs[3 - rank], kind)
        sums = [sum(sum(order(program, kind)) for program in world.programs) for world in (both, once)]
        assert sums[0] == pytest.approx(2 * sums[1], rel=0.02)
    assert {c.num_ranks for c in both.communicators.values() if c.axis == "dp.mirrored"} == {4}
    states = [sum(state_bytes(program) for program in world.programs) for world in (both, once)]
    assert states[0] / states[1] == pytest.approx((2 * 6 + 12 / 2) / (6 + 12 / 2), rel=0.02)


def test_sequence_parallelism_leaves_norms_to_be_summed_over_tp() -> None:
    """Two norms a block and the last one: RMSNorm weights, 4 bytes of gradient each."""
    (program,) = world_of(asked({"tp": 2, "sp": True}, code="torch")).programs
    whole = collectives(program)["all_reduce", "tp"]
    (without,) = world_of(asked({"tp": 2, "sp": True}, num_microbatches=1, code="torch")).programs
    chunk = [i for i in program.chunks["optimizer"] if isinstance(i, Collective) and i.axis == "tp"]
    assert [(i.kind, i.tensor_bytes) for i in chunk] == [("all_reduce", 4 * HIDDEN * (2 * LAYERS + 1))]
    assert whole >= chunk[0].tensor_bytes
    assert collectives(without)["all_reduce", "tp"] <= whole


def test_only_the_first_rank_of_a_pipeline_hides_reductions_behind_its_last_backward() -> None:
    """Later ranks start theirs after it, together (align_grad_reduce)."""
    world = world_of(asked({"pp": 2, "zero": 1}, {"overlap_grad_reduce": True, "bucket_size": 100_000}))
    first, last = world.programs
    in_backward = [
        sum(isinstance(i, Collective) and i.kind == "reduce_scatter" for i in program.chunks["backward.last"])
        for program in (first, last)
    ]
    assert in_backward[0] > 1
    assert in_backward[1] == 0
    assert sum(isinstance(i, Collective) for i in last.chunks["reduce.0"]) == 1


def test_matmuls_add_weight_gradients_to_the_buffer() -> None:
    """With the fusion no gradient of a linear weight is a tensor; without it each is, in bf16."""
    largest = 2 * HIDDEN * FFN

    def made(fusion: bool) -> int:
        (program,) = world_of(asked(None, {"gradient_accumulation_fusion": fusion})).programs
        return sum(
            i.storage.num_bytes
            for i in program.chunks["backward.first"]
            if isinstance(i, Alloc) and i.storage.category == "gradients"
        )

    assert made(False) - made(True) >= 2 * LAYERS * largest


@pytest.mark.parametrize("fp32", [True, False])
def test_matmuls_that_add_read_and_write_the_buffers_dtype(fp32: bool) -> None:
    """Four weights a block and the head's; lookups and norms have no matmul."""
    settings = {"gradient_accumulation_fusion": True, "accumulate_allreduce_grads_in_fp32": fp32}
    (program,) = world_of(asked(None, settings)).programs
    kernels = [i.kernel for i in program.chunks["backward.first"] if isinstance(i, Compute)]
    adding = [kernel for kernel in kernels if isinstance(kernel, Gemm) and kernel.accumulates]
    assert len(adding) == 4 * LAYERS + 1
    assert {kernel.result for kernel in adding} == {"fp32" if fp32 else "bf16"}


def test_receives_are_the_hidden_tensor() -> None:
    """[1, 64, HIDDEN] in bf16, one a microbatch; divided by tp with sequence parallelism."""
    from sim.ir.program import Recv

    for parallelism, parts in (({"pp": 2}, 1), ({"pp": 2, "tp": 2, "sp": True}, 2), ({"pp": 2, "tp": 2}, 1)):
        last = world_of(asked(parallelism)).programs[-1]
        sizes = [i.tensor_bytes for call in last.step for i in last.chunks[call.chunk] if isinstance(i, Recv)]
        assert sizes == [2 * 64 * HIDDEN // parts] * 2


def dummies(world: World) -> list[tuple[str, int]]:
    chunks = [world.programs[0].chunks["setup"]] if "setup" in world.programs[0].chunks else []
    chunks = chunks or list(world.programs[0].chunks.values())
    found = [i.storage for chunk in chunks for i in chunk if isinstance(i, Alloc) and "dummy_wgrad" in i.storage.name]
    return list(dict.fromkeys((s.name, s.num_bytes) for s in found))


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_a_linear_with_a_bias_adds_its_weights_gradient_to_the_buffer_too(impl: str) -> None:
    """A block's four weights are added to by their products; its vectors, the bias of the fused projection among
    them, have gradients that a kernel adds. Megatron's own linears add that bias in a kernel of its own."""
    scenario = asked({}, {"transformer_impl": impl}, num_gpus=1)
    block = describe(
        scenario.model.model_copy(update={"bias": True, "attention_bias": True}), scenario.training,
        parameter_dtype="bf16", compute_dtype="bf16", autocast=False, local=impl == "local", megatron=scenario.megatron,
    ).layers[1]  # fmt: skip
    fused = fused_gradients(block)
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert fused == {f"{linear}.weight" for linear in linears}
    assert "self_attention.linear_qkv.bias" in {p.name for p in block.parameters}
    added = [op.name for op in block.forward if op.name.endswith("add_bias")]
    assert added == (["self_attention.linear_qkv.add_bias"] if impl == "local" else [])


def test_fused_gradients_leave_a_tensor_behind() -> None:
    """get_dummy_wgrad: one for each shape of a block's weights, 16 bit, for good; the head's is made anew each time."""
    world = world_of(asked())
    shapes = {(3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)}
    kept = [size for name, size in dummies(world) if "output_layer" not in name]
    assert sorted(kept) == sorted(2 * rows * columns for rows, columns in shapes)
    everything = [i for chunk in world.programs[0].chunks.values() for i in chunk]
    heads = [i for i in everything if "dummy_wgrad.head" in getattr(getattr(i, "storage", None), "name", "")]
    assert [type(i).__name__ for i in heads] == ["Alloc", "Free"] * (len(heads) // 2)
    assert heads


def test_megatrons_own_linears_keep_no_dummies() -> None:
    world = world_of(asked(megatron={"transformer_impl": "local"}))
    kept = [name for name, _ in dummies(world) if name.startswith("dummy_wgrad.") and "x" in name.split(".")[1]]
    assert not kept
    without = world_of(asked(megatron={"gradient_accumulation_fusion": False}))
    assert not dummies(without)


def test_an_eager_loss_gathers_the_logits() -> None:
    """F.cross_entropy wants the whole vocabulary: 4 bytes a logit thrice in backward, beside what is divided."""
    divided, whole = (world_of(asked({"tp": 2}, loss=loss)) for loss in ("vocab-parallel", "eager"))
    gathers = [
        {i.name for chunk in world.programs[0].chunks.values() for i in chunk if isinstance(i, Collective)}
        for world in (divided, whole)
    ]
    assert "logits.all_gather" in gathers[1] - gathers[0]
    sizes = {
        i.storage.name: i.storage.num_bytes
        for chunk in whole.programs[0].chunks.values()
        for i in chunk
        if isinstance(i, Alloc)
    }
    assert sizes["head.log_probabilities"] == 4 * 64 * VOCAB


LINEAR = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * FFN)
"""Elements of the blocks' linears, which are what FP8 quantises."""


@pytest.mark.parametrize(("node", "precision"), [("dgx-h100", "fp8"), ("dgx-b200", "fp8"), ("dgx-b200", "mxfp8")])
def test_weights_kept_in_8_bits_have_no_copy_in_16(node: str, precision: str) -> None:
    """Two bytes an element less. H100: 2 + 1 + 1 -> 1 + 1; B200: 2 + 1 -> 1; MXFP8: 2 + its two copies -> these."""

    def held(gathers: bool) -> int:
        (program,) = world_of(
            asked({"zero": 1}, {"fp8_param_gather": gathers}, node=node, precision=precision)
        ).programs
        return sum(
            i.storage.num_bytes
            for call in program.setup
            for i in program.chunks[call.chunk]
            if isinstance(i, Alloc) and i.storage.name.endswith(("parameters.flat", "weight.low"))
        )

    assert held(False) - held(True) == 2 * LINEAR


def test_weights_in_8_bits_are_gathered_in_8_bits() -> None:
    def gathered(precision: str, gathers: bool) -> int:
        settings = {"fp8_param_gather": gathers}
        (program,) = world_of(asked({"zero": 1}, settings, node="dgx-b200", precision=precision)).programs
        return sum(
            i.tensor_bytes
            for call in program.step
            for i in program.chunks[call.chunk]
            if isinstance(i, Collective) and i.kind == "all_gather"
        )

    assert gathered("fp8", False) - gathered("fp8", True) == LINEAR
    assert gathered("mxfp8", False) == gathered("mxfp8", True)


def test_a_precision_aware_optimizer_holds_what_bf16_lacks() -> None:
    """2 + 2 for parameters and gradients, over d ranks (2 + 4 + 4) / d for remainder and moments, 6 / d with bf16."""
    settings = {"use_precision_aware_optimizer": True, "accumulate_allreduce_grads_in_fp32": False}
    for dtype, shared in (("fp32", 10), ("bf16", 6)):
        moments = {"exp_avg_dtype": dtype, "exp_avg_sq_dtype": dtype}
        (program,) = world_of(asked({"zero": 1}, {**settings, **moments})).programs
        count = parameters_of(asked())
        assert state_bytes(program) == pytest.approx((4 + shared / 4) * count, rel=1e-3)
        step = [i for call in program.step for i in program.chunks[call.chunk]]
        assert not any(isinstance(i, Alloc) and i.storage.name.startswith("grad.") for i in step)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_host_reads_the_loss_after_each_forward(checked: bool, recompute: str) -> None:
    """The last stage's forward ends with it; no other pass, recomputed or not, has any."""
    settings = {"check_for_nan_in_grad": checked}
    for program in world_of(asked({"pp": 2}, settings, num_gpus=2, recompute=recompute)).programs:
        for name, chunk in program.chunks.items():
            reads = [at for at, i in enumerate(chunk) if isinstance(i, HostWait) and i.event == "check loss for NaN"]
            assert len(reads) == (checked and program.stage == 1 and name.startswith("forward"))
            assert all(not isinstance(i, Compute) for at in reads for i in chunk[at:])


def test_a_mask_comes_with_each_microbatch_of_the_first_and_the_last_stage() -> None:
    """A byte for each of 64 * 64 pairs of tokens, while forward runs; none in between, and none if not asked for."""
    parallelism = {"pp": 4}

    def masks(**megatron: Any) -> list[set[int]]:
        world = world_of(asked(parallelism, megatron, num_layers=4))
        named = [
            (rank, i.storage.num_bytes)
            for rank, program in enumerate(world.programs)
            for call in program.step
            for i in program.chunks[call.chunk]
            if isinstance(i, Alloc) and "attention_mask" in i.storage.name
        ]
        return [{num_bytes for rank, num_bytes in named if rank == stage} for stage in range(4)]

    assert masks(create_attention_mask_in_dataloader=True) == [{4096}, set(), set(), {4096}]
    assert not any(masks())


@pytest.mark.parametrize(
    ("node", "attention", "backend", "runs"),
    [
        ("dgx-1", None, "auto", "math"),
        ("dgx-a100-80gb", None, "auto", "flash-2"),
        ("dgx-h100", None, "auto", "cudnn"),
        ("dgx-h100", None, "flash", "flash-2"),
        ("dgx-h100", "flash-2", "auto", "flash-2"),
        ("dgx-b200", "flash-2", "auto", "cudnn"),
        ("dgx-b200", "flash-2", "flash", "flash-2"),
        ("dgx-b200", "math", "auto", "math"),
    ],
)
def test_transformer_engine_chooses_the_attention_kernel(
    node: str, attention: str | None, backend: str, runs: str
) -> None:
    training = {"sequence_length": 1024, "micro_batch_size": 1, "precision": "fp16"}
    text = {
        "model": "llama-2-7b",
        "cluster": {"node": node, "num_gpus": 1},
        "framework": "megatron",
        "megatron": {"attention_backend": backend},
        "training": training if attention is None else {**training, "attention": attention},
    }
    scenario = load_scenario_text(yaml.safe_dump(text), "attention.yaml")
    assert scenario.training.attention == runs
    assert any("runs as cudnn" in w for w in scenario.warnings) == (attention == "flash-2" and runs == "cudnn")


def test_1f1b_still_has_what_the_last_backward_took_and_gave() -> None:
    """Rank 1 of 2: each gradient until the next is made, each input until the next forward is done; 3 microbatches."""
    program = world_of(asked({"pp": 2}, num_microbatches=3)).programs[1]
    seen = [
        f"{'+' if isinstance(i, Alloc) else '-'}{i.storage.name}"
        for call in program.step
        for i in program.chunks[call.chunk]
        if isinstance(i, (Alloc, Free)) and i.storage.name in ("input_tensor_grad", "input_tensor")
    ]
    turn = ["+input_tensor_grad", "+input_tensor", "-input_tensor", "-input_tensor_grad"]
    assert seen == turn * 2
