"""Scenarios that are trained for real and simulated: small enough for a CPU, one for each thing a framework can do."""

from __future__ import annotations

from typing import Any

GPT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 256,
    "hidden_act": "gelu", "norm": "layernorm", "position": "learned", "max_position_embeddings": 32,
    "attention_bias": True, "attention_output_bias": True, "mlp_bias": True,
}  # fmt: skip
UNEVEN = GPT | {"hidden_size": 65, "intermediate_size": 260, "num_attention_heads": 5, "vocab_size": 251}
"""No dimension divides by the ranks."""
LLAMA: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 256, "norm": "layernorm", "norm_bias": False,
}  # fmt: skip
"""With a layernorm: the CPU's RMSNorm is composed of many operators."""
RMS = LLAMA | {"norm": "rmsnorm", "num_key_value_heads": 4}


def scenario(
    framework: str, num_gpus: int = 2, model: dict[str, Any] = GPT, microbatches: int = 2, **given: Any
) -> dict[str, Any]:
    """Return a scenario; ``given`` are keys of ``training``, ``parallelism`` and frameworks' settings."""
    parallelism = given.pop("parallelism", {})
    settings = {name: given.pop(name) for name in ("ddp", "fsdp2", "fsdp1", "deepspeed") if name in given}
    dp = num_gpus // (parallelism.get("tp", 1) * parallelism.get("pp", 1))
    training = {
        "sequence_length": 32, "micro_batch_size": 1, "precision": "fp32", "code": "torch", "attention": "sdpa",
        "global_batch_size": dp * microbatches * given.get("micro_batch_size", 1),
    } | given  # fmt: skip
    cluster = {"node": "dgx-h100", "num_gpus": num_gpus}
    return {
        "model": model, "cluster": cluster, "framework": framework, "training": training, "parallelism": parallelism
    } | settings  # fmt: skip


def deepspeed(stage: int, num_gpus: int = 2, bucket: int = 40_000, **given: Any) -> dict[str, Any]:
    """``zero`` has further keys of ``zero_optimization``, ``accumulation`` is ``grad_accum_dtype``."""
    zero = {"stage": stage, "reduce_bucket_size": bucket} | given.pop("zero", {})
    config: dict[str, Any] = {"zero_optimization": zero, "gradient_clipping": 1.0}
    if "accumulation" in given:
        config["data_types"] = {"grad_accum_dtype": given.pop("accumulation")}
    return scenario("deepspeed", num_gpus, deepspeed=config, **given)


BF16 = {"precision": "bf16"}
SMALL_BUCKETS = {"bucket_cap_mb": 0.25}
TEXTBOOK = {
    "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1,
    "stage3_max_reuse_distance": 0,
}  # fmt: skip
LIMITED = {
    "stage3_prefetch_bucket_size": 20_000, "stage3_param_persistence_threshold": 100,
    "stage3_max_live_parameters": 100_000, "stage3_max_reuse_distance": 60_000, "sub_group_size": 70_000,
}  # fmt: skip
HPZ = TEXTBOOK | {"stage3_param_persistence_threshold": 100, "zero_hpz_partition_size": 2}
TO_CPU = {"offload_optimizer": {"device": "cpu"}}


def ddp_cases(n: int) -> dict[str, dict[str, Any]]:
    def case(model: dict[str, Any] = GPT, **given: Any) -> dict[str, Any]:
        return scenario("ddp", n, model, **given)

    found = {
        "default": case(),
        "small-buckets": case(ddp=SMALL_BUCKETS),
        "unused": case(ddp=SMALL_BUCKETS | {"find_unused_parameters": True}),
        "unused-views": case(
            UNEVEN, ddp=SMALL_BUCKETS | {"find_unused_parameters": True, "gradient_as_bucket_view": True}
        ),
        # torch refuses to start a static graph with a backward that does not synchronise
        "static": case(microbatches=1, ddp=SMALL_BUCKETS | {"static_graph": True}),
    }
    if n > 2:
        return found
    return found | {
        "views": case(ddp=SMALL_BUCKETS | {"gradient_as_bucket_view": True}),
        "static-unused": case(
            microbatches=1, ddp=SMALL_BUCKETS | {"static_graph": True, "find_unused_parameters": True}
        ),
        "buffers": case(LLAMA),
        "recompute": case(LLAMA, recompute="full", ddp=SMALL_BUCKETS),
        "autocast": case(**BF16),
        "pure-bf16": case(ddp={"mixed_precision": "pure"}, **BF16),
        "tied": case(GPT | {"tie_word_embeddings": True}),
        "sgd-clipped": case(optimizer="sgd", gradient_clipping=1.0),
        "rmsnorm": case(RMS, ddp={"mixed_precision": "pure"}, **BF16),
        "huggingface": case(GPT, code="huggingface"),
    }


def fsdp_cases(n: int) -> dict[str, dict[str, Any]]:
    def two(model: dict[str, Any] = GPT, given: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        return scenario("fsdp2", n, model, fsdp2=given or {}, **more)

    def one(model: dict[str, Any] = GPT, given: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        return scenario("fsdp1", n, model, fsdp1=given or {}, **more)

    both = {
        "fsdp2-bf16": two(**BF16),
        "fsdp2-recompute-uneven": two(UNEVEN, recompute="full", **BF16),
        "fsdp1-recompute-uneven": one(UNEVEN, {"mixed_precision": "PURE"}, recompute="full", **BF16),
    }
    if n > 2:
        return both | {
            "fsdp2-hsdp-clipped": two(GPT, {"shard_size": 2}, gradient_clipping=1.0, **BF16),
            "fsdp2-hsdp-uneven": two(UNEVEN, {"shard_size": 2}),
            "fsdp2-reshard-to-2": two(GPT, {"reshard_after_forward": 2}, **BF16),
            "fsdp1-hybrid": one(GPT, {"sharding_strategy": "HYBRID_SHARD", "shard_size": 2}, **BF16),
        }
    return both | {
        "fsdp2-fp32": two(),
        "fsdp2-reshard-root": two(GPT, {"reshard_root": True}),
        "fsdp2-keep": two(GPT, {"reshard_after_forward": False}),
        "fsdp2-bf16-reduction-uneven": two(UNEVEN, {"reduce_dtype": None}, **BF16),
        "fsdp2-no-sync-clipped": two(GPT, {"gradient_sync": "last"}, gradient_clipping=1.0, microbatches=3, **BF16),
        "fsdp2-torchtitan": two(LLAMA, {"wrap": "torchtitan"}, gradient_clipping=1.0),
        "fsdp2-rmsnorm": two(RMS, {"wrap": "torchtitan"}, **BF16),
        "fsdp2-keep-after-backward": two(LLAMA, {"reshard_after_backward": False}),
        "fsdp2-offload": two(LLAMA, {"cpu_offload": True}),
        "fsdp1-full-clipped": one(gradient_clipping=1.0, **BF16),
        "fsdp1-no-sync": one(GPT, {"mixed_precision": "PURE", "gradient_sync": "last"}, microbatches=3, **BF16),
        "fsdp1-grad-op": one(GPT, {"sharding_strategy": "SHARD_GRAD_OP"}, **BF16),
        "fsdp1-prefetch-forward": one(
            GPT, {"backward_prefetch": "BACKWARD_POST", "forward_prefetch": True, "mixed_precision": "FULL"}
        ),
        "fsdp1-orig-parameters": one(GPT, {"mixed_precision": "PURE", "use_orig_params": True}, **BF16),
    }


def tensor_cases(n: int) -> dict[str, dict[str, Any]]:
    def case(sp: bool, tp: int = 2, **given: Any) -> dict[str, Any]:
        return scenario("fsdp2", n, LLAMA, parallelism={"tp": tp, "sp": sp}, **given)

    if n > 2:
        return {
            "tp4": case(False, tp=4),
            "tp4-sp-recompute": case(True, tp=4, recompute="full"),
            "tp2-dp2": case(False),
            "tp2-dp2-sp": case(True, micro_batch_size=2, **BF16),
        }
    return {"tp": case(False), "tp-sp": case(True), "tp-sp-recompute": case(True, recompute="full")}


def pipeline_cases(n: int) -> dict[str, dict[str, Any]]:
    def case(schedule: str, model: dict[str, Any] = LLAMA, microbatches: int = 4, **given: Any) -> dict[str, Any]:
        parallelism = {"pp": given.pop("pp", n), "schedule": schedule} | given.pop("axes", {})
        return scenario("fsdp2", n, model, microbatches, parallelism=parallelism, **given)

    twice = {"num_hidden_layers": 8}
    found = {
        "gpipe": case("gpipe"),
        "1f1b": case("1f1b"),
        "interleaved": case("interleaved", LLAMA | twice, axes={"vpp": 2}),
        "zb-v": case("zb-v", LLAMA | twice),
    }
    if n > 2:
        return found | {
            "1f1b-dp2": case("1f1b", pp=2),
            "gpipe-dp2-bf16": case("gpipe", pp=2, **BF16),
            "interleaved-dp2": case("interleaved", pp=2, axes={"vpp": 2}),
        }  # fmt: skip
    return found | {
        "gpipe-gpt": case("gpipe", GPT),
        "1f1b-recompute": case("1f1b", recompute="full"),
        "dualpipev": case("dualpipev", LLAMA | twice),
    }


def deepspeed_cases(n: int) -> dict[str, dict[str, Any]]:
    def case(stage: int, **given: Any) -> dict[str, Any]:
        return deepspeed(stage, n, **given)

    both = {
        "zero0-bf16": case(0, **BF16),
        "zero1-bf16": case(1, bucket=60_000, **BF16),
        "zero2-bf16": case(2, **BF16),
        "zero2-bf16-reduce": case(2, zero={"use_multi_rank_bucket_allreduce": False}, microbatches=1, **BF16),
        "zero2-bf16-offload": case(2, zero=TO_CPU, **BF16),
        "zero3-bf16": case(3, **BF16),
        "zero3-textbook": case(3, zero=TEXTBOOK, **BF16),
        "zero3-limits": case(3, zero=LIMITED, model=LLAMA),
        "zero3-hpz": case(3, zero=HPZ, **BF16),
    }
    if n > 2:
        return both
    return both | {
        "zero0-fp32": case(0),
        "zero1-fp32": case(1),
        "zero1-bf16-overlap": case(1, zero={"overlap_comm": True}, microbatches=1, **BF16),
        "zero1-bf16-offload": case(1, zero=TO_CPU, **BF16),
        "zero2-fp32-small-bucket": case(2, bucket=20_000, microbatches=1),
        "zero2-recompute": case(2, bucket=20_000, model=LLAMA, recompute="full", microbatches=1),
        "zero2-fp32-accumulation": case(2, accumulation="fp32", **BF16),
        "zero2-fp32-offload": case(2, zero=TO_CPU, microbatches=1),
        "zero2-fp32-accumulation-offload": case(2, zero=TO_CPU, accumulation="fp32", **BF16),
        "zero3-fp32": case(3),
        "zero3-fp32-accumulation": case(3, zero={"reduce_scatter": False}, accumulation="fp32", **BF16),
        "zero3-recompute": case(3, zero=LIMITED, recompute="full", code="huggingface", microbatches=1),
        "zero3-offload": case(3, zero=TO_CPU | {"sub_group_size": 70_000}, **BF16),
        "zero3-offload-parameters": case(
            3,
            zero=TO_CPU | {
                "offload_param": {"device": "cpu"}, "stage3_prefetch_bucket_size": 20_000,
                "stage3_param_persistence_threshold": 100,
            },
            microbatches=1,
            **BF16,
        ),
    }  # fmt: skip


def deepspeed_pipeline_cases(n: int) -> dict[str, dict[str, Any]]:
    def case(stage: int, **given: Any) -> dict[str, Any]:
        return deepspeed(stage, n, model=LLAMA, microbatches=4, parallelism={"pp": 2}, **given)

    return {"zero0": case(0)} if n == 2 else {"zero0-dp2": case(0), "zero1-dp2-bf16": case(1, **BF16)}


FAMILIES = {
    "ddp": ddp_cases,
    "fsdp": fsdp_cases,
    "tensor": tensor_cases,
    "pipeline": pipeline_cases,
    "deepspeed": deepspeed_cases,
    "deepspeed-pipeline": deepspeed_pipeline_cases,  # it leaves a grid of ranks behind: last
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    f"{family}-{name}-{n}": given
    for n in (2, 4)
    for family, cases in FAMILIES.items()
    for name, given in cases(n).items()
}
