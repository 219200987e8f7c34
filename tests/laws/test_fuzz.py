"""Whatever the file says, the answer is an answer, a list of findings, or "does not fit"; never a traceback.

Scenarios are drawn valid, then mutated: keys dropped, renamed, added, values replaced by what people and programs write
by mistake; some are mutated as text. The quick form runs in the usual tests, the thorough one (10,000) by
``tests/run real``.
"""

from __future__ import annotations

import random
from copy import copy
from math import prod
from typing import Any

import pytest
import yaml

from sim.errors import ScenarioError
from sim.pipeline import simulate
from sim.scenario.load import load_scenario_text

WRONG: tuple[Any, ...] = (
    None, True, False, "", "yes", "auto", "none", "80", "80 GB", "400 Gbps", "1e12", "0x10", "é", "..", "/", [], {},
    [1], {"a": 1}, -1, 0, 1, 2, 3, 7, 8, 64, 10**6, 10**12, 0.5, -0.5, 1e300, float("inf"), float("nan"), "2024-01-01",
    "fp16", "bf16", "full", "dgx-h100", "llama-2-7b", "deepspeed", "ddp", "flash-2", "math", "megatron", "fsdp2",
    "zb-v",
)  # fmt: skip
KEYS = (
    "model", "cluster", "framework", "parallelism", "training", "deepspeed", "allocator", "ddp", "node", "num_nodes",
    "num_gpus", "gpu", "network", "zero", "dp", "tp", "pp", "micro_batch_size", "precision", "optimizer", "zz", "Model",
    "hidden_size", "num_hidden_layers", "zero_optimization", "stage", "bf16", "fp16", "reduce_bucket_size", "enabled",
    "cp", "ep", "sp", "vpp", "schedule", "order", "layers_per_stage", "faults", "megatron", "fsdp1", "fsdp2",
    "recompute",
)  # fmt: skip
FRAMEWORKS = ("ddp", "deepspeed", "fsdp1", "fsdp2", "megatron")
SCHEDULES = (
    "gpipe", "1f1b", "1f1b", "interleaved", "interleaved", "zb-h1", "zb-2p", "zb-v", "v-half", "v-min", "dualpipev",
    "dualpipe",
)  # fmt: skip
LINKS = (
    ["node0.gpu0", "node0.nvswitch0"], ["node0.gpu0", "node0.gpu1"], ["node0.nic0", "leaf"], ["node1.nic0", "leaf"],
    ["leaf0", "spine"], ["node0.cpu0", "node0.cpu1"],
)  # fmt: skip
BACKENDS: tuple[dict[str, Any], ...] = (
    {"backend": "gloo"}, {"backend": "alpha-beta", "alpha": "5 us", "beta": "20 GB/s"}, {"sharp": True},
)  # fmt: skip


def valid(draw: random.Random) -> dict[str, Any]:
    """A small scenario, of any kind that there is; most should be answered, some ask for what does not go together."""
    framework = draw.choice(FRAMEWORKS)
    axes = _axes(draw, framework)
    num_gpus, micro = prod(axes.values()), draw.choice([1, 1, 2, 3])
    scenario: dict[str, Any] = {
        "model": _model(draw, axes),
        "cluster": _cluster(draw, num_gpus),
        "framework": framework,
        "parallelism": {key: size for key, size in axes.items() if size > 1 or draw.random() < 0.2},
        "training": {
            "sequence_length": draw.choice([16, 32, 100]) * axes["tp"] * axes["cp"],
            "micro_batch_size": micro,
            "global_batch_size": micro * axes["dp"] * draw.choice([1, 2, 3, axes["pp"], 2 * axes["pp"]]),
            "precision": draw.choice(["bf16", "bf16", "fp16", "fp32"]),
            "recompute": draw.choice(["none", "selective", "full"]),
            "attention": draw.choice(["math", "sdpa", "sdpa", "flash-2", "flash-3", "cudnn"]),
            "optimizer": draw.choice(["adamw", "adam", "sgd"]),
            "gradient_clipping": draw.choice([0, 1.0]),
        },
    }
    if draw.random() < 0.3:
        scenario["training"]["code"] = draw.choice(["torch", "huggingface", "megatron"])
    _pipeline(draw, framework, axes, scenario["parallelism"], scenario["model"]["num_hidden_layers"])
    _SETTINGS[framework](draw, axes, scenario)
    if draw.random() < 0.15:
        scenario["faults"] = _faults(draw, num_gpus)
    if draw.random() < 0.1:
        scenario["allocator"] = draw.choice(
            [{"expandable_segments": True}, {"max_split_size": "21 MiB"}, {"roundup_power2_divisions": 4}]
        )
    if draw.random() < 0.2:
        scenario["cluster"] |= draw.choice(BACKENDS)
    return scenario


def _axes(draw: random.Random, framework: str) -> dict[str, int]:
    """At most 32 ranks."""
    axes = {"tp": 1, "pp": 1, "cp": 1, "dp": draw.choice([1, 2, 2, 3, 4, 8])}
    if framework == "ddp" and draw.random() < 0.3:
        axes["pp"] = draw.choice([2, 4])
    if framework in ("megatron", "fsdp2", "deepspeed"):
        for axis in ("tp", "pp", "cp"):
            size = draw.choice([1, 1, 1, 2, 2, 4, 3] if axis == "pp" else [1, 1, 2, 4])
            if size * prod(axes.values()) <= 32 and (framework != "deepspeed" or draw.random() < 0.5):
                axes[axis] = size
    return axes


def _model(draw: random.Random, axes: dict[str, int]) -> dict[str, Any]:
    heads = draw.choice([2, 4, 4, 8])
    if draw.random() < 0.9:
        heads = max(heads, axes["tp"] * axes["cp"])
    ffn = draw.choice([128, 344, 130])
    return {
        "hidden_size": heads * draw.choice([16, 32]),
        "intermediate_size": ffn if draw.random() < 0.1 else ffn * axes["tp"],
        "num_hidden_layers": draw.choice([1, 2, 3]) * axes["pp"] + draw.choice([0, 0, 0, 1]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([heads, heads, heads // 2, 1]),
        "vocab_size": draw.choice([100, 1000, 1003]),
        "hidden_act": draw.choice(["silu", "gelu", "relu", "gelu_gated"]),
        "norm": draw.choice(["rmsnorm", "layernorm"]),
        "position": draw.choice(["rope", "learned", "alibi", "none"]),
        "max_position_embeddings": 2048,
        "bias": draw.choice([True, False]),
        "dropout": draw.choice([0, 0.1]),
        "attention_dropout": draw.choice([0, 0, 0.1]),
        "tie_word_embeddings": draw.random() < 0.3,
        "query_key_norm": draw.random() < 0.1,
        "parallel_block": draw.random() < 0.1,
        "embedding_norm": draw.random() < 0.1,
    }


def _cluster(draw: random.Random, num_gpus: int) -> dict[str, Any]:
    """One node where the ranks find room on it, sometimes two; no more nodes than it takes."""
    node = draw.choice(["dgx-h100", "dgx-h100", "dgx-1", "pcie-8x-4090", "dgx-a100-40gb"])
    cluster: dict[str, Any] = {"node": node, "num_gpus": num_gpus}
    if num_gpus > 8:
        nodes = next(n for n in range(2, num_gpus + 1) if num_gpus % n == 0 and num_gpus // n <= 8)
        cluster["num_nodes"] = nodes
    elif num_gpus % 2 == 0 and draw.random() < 0.2:
        cluster["num_nodes"] = 2
    if cluster.get("num_nodes", 1) > 1 and (node == "pcie-8x-4090" or draw.random() < 0.2):
        cluster["network"] = draw.choice(["100 Gbit/s RoCE per node", "10 Gbit/s Ethernet per node"])
    return cluster


def _pipeline(
    draw: random.Random, framework: str, axes: dict[str, int], parallelism: dict[str, Any], num_layers: int
) -> None:
    if axes["tp"] > 1 and draw.random() < 0.5:
        parallelism["sp"] = True
    if axes["cp"] > 1 and draw.random() < 0.6:
        parallelism["cp_comm"] = draw.choice(["p2p", "all_gather", "a2a"])
    if draw.random() < 0.1:
        order = ["tp", "cp", "dp", "pp"]
        draw.shuffle(order)
        parallelism["order"] = "-".join(order)
    pp = axes["pp"]
    if pp == 1:
        return
    if framework != "deepspeed" or draw.random() < 0.1:
        parallelism["schedule"] = draw.choice(SCHEDULES)
    if parallelism.get("schedule") == "interleaved" or draw.random() < 0.05:
        parallelism["vpp"] = draw.choice([2, 2, 3])
    if draw.random() < 0.2:
        stages = pp * draw.choice([1, parallelism.get("vpp", 1)])
        given = [num_layers // stages] * stages
        given[draw.randrange(stages)] += num_layers - sum(given)
        parallelism["layers_per_stage"] = given


def _faults(draw: random.Random, num_gpus: int) -> dict[str, Any]:
    slow = [{"rank": draw.randrange(num_gpus), "factor": draw.choice([0.5, 0.9])}]
    links = [{"between": draw.choice(LINKS), "factor": draw.choice([0.001, 0.5, 1.0])}]
    return draw.choice([{"slow": slow}, {"links": links}, {"slow": slow, "links": links}])


def _of_ddp(draw: random.Random, axes: dict[str, int], scenario: dict[str, Any]) -> None:
    scenario["ddp"] = _some(
        draw,
        bucket_cap_mb=[0.01, 1],
        gradient_as_bucket_view=[True],
        static_graph=[True],
        find_unused_parameters=[True],
        mixed_precision=["autocast", "pure"],
    )


def _of_deepspeed(draw: random.Random, axes: dict[str, int], scenario: dict[str, Any]) -> None:
    stage = draw.choice([0, 1, 1, 2] if axes["pp"] > 1 else [0, 1, 2, 3, 3])
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": draw.choice([5000, 10**6])}
    zero |= _some(
        draw,
        overlap_comm=[True, False],
        contiguous_gradients=[False],
        reduce_scatter=[False],
        round_robin_gradients=[True],
        allgather_bucket_size=[1000],
        stage3_prefetch_bucket_size=[0, 1000],
        stage3_param_persistence_threshold=[0, 10**6],
        stage3_max_live_parameters=[0, 10**4],
        stage3_max_reuse_distance=[0, 10**4],
        sub_group_size=[1000],
        offload_optimizer=[{"device": "cpu"}, {"device": "cpu", "pin_memory": True}] if stage else [{"device": "none"}],
        zero_hpz_partition_size=[2, 4],
        zero_quantized_weights=[True],
        zero_quantized_gradients=[True],
    )
    if stage == 3 and draw.random() < 0.2:
        zero["offload_param"] = {"device": "cpu"}
    if stage == 3 and "offload_optimizer" in zero and draw.random() < 0.2:
        zero["offload_optimizer"]["ratio"] = draw.choice([0.0, 0.3])
    scenario["deepspeed"] = {"zero_optimization": zero}


def _of_fsdp1(draw: random.Random, axes: dict[str, int], scenario: dict[str, Any]) -> None:
    scenario["fsdp1"] = _some(
        draw,
        sharding_strategy=["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"],
        mixed_precision=["DEFAULT", "PURE", "FULL"],
        backward_prefetch=["BACKWARD_PRE", "BACKWARD_POST", "NONE"],
        forward_prefetch=[True],
        limit_all_gathers=[False],
        use_orig_params=[True],
        cpu_offload=[True],
        keep_low_precision_grads=[True],
        gradient_sync=["last"],
        optimizer_implementation=["foreach", "fused", "for-loop"],
    )
    if "HYBRID" in scenario["fsdp1"].get("sharding_strategy", ""):
        scenario["fsdp1"]["shard_size"] = draw.choice([1, 2, axes["dp"]])


def _of_fsdp2(draw: random.Random, axes: dict[str, int], scenario: dict[str, Any]) -> None:
    scenario["fsdp2"] = _some(
        draw,
        reshard_after_forward=[True, False, 2],
        reshard_root=[True],
        param_dtype=["fp32", "bf16"],
        reduce_dtype=["fp32", "bf16"],
        orig_dtype=["fp32", "bf16"],
        shard_size=[1, 2],
        wrap=["blocks", "torchtitan"],
        gradient_sync=["last"],
        reshard_after_backward=[False],
        cpu_offload=[True],
        optimizer_implementation=["foreach", "fused", "for-loop"],
    )


def _of_megatron(draw: random.Random, axes: dict[str, int], scenario: dict[str, Any]) -> None:
    sharded = draw.random() < 0.5
    scenario["parallelism"]["zero"] = int(sharded)
    scenario["megatron"] = _some(
        draw,
        overlap_grad_reduce=[True],
        accumulate_allreduce_grads_in_fp32=[True, False],
        gradient_accumulation_fusion=[False],
        overlap_p2p_communication=[False],
        scatter_gather_tensors_in_pipeline=[True],
        check_for_nan_in_grad=[False],
        bucket_size=[1000],
    )
    if scenario["parallelism"].get("sp") and axes.get("tp", 1) > 1 and draw.random() < 0.25:
        scenario["megatron"]["tp_comm_overlap"] = True
    if draw.random() < 0.25:
        again = scenario["training"].get("recompute") == "full"
        scope = draw.choice(["full_iteration"] if again else ["full", "full_iteration"])
        scenario["megatron"] |= {"cuda_graph_impl": "local", "cuda_graph_scope": scope}
        if scope == "full_iteration":
            scenario["megatron"]["check_for_nan_in_grad"] = False
    if sharded and scenario["megatron"].get("overlap_grad_reduce"):
        scenario["megatron"]["overlap_param_gather"] = draw.choice([True, False])


def _some(draw: random.Random, **choices: list[Any]) -> dict[str, Any]:
    """Set about one key in four."""
    return {key: copy(draw.choice(values)) for key, values in choices.items() if draw.random() < 0.25}


_SETTINGS = {
    "ddp": _of_ddp,
    "deepspeed": _of_deepspeed,
    "fsdp1": _of_fsdp1,
    "fsdp2": _of_fsdp2,
    "megatron": _of_megatron,
}


def mutate(value: Any, draw: random.Random) -> Any:
    """Change one thing somewhere inside."""
    if isinstance(value, dict) and value:
        key = draw.choice(sorted(value, key=str))
        match draw.randrange(6):
            case 0:
                del value[key]
            case 1:
                value[draw.choice(KEYS)] = draw.choice(WRONG)
            case 2:
                value[f"{key}s"] = value.pop(key)
            case 3:
                value[key] = draw.choice(WRONG)
            case _:
                value[key] = mutate(value[key], draw)
        return value
    return draw.choice(WRONG)


def mutate_text(text: str, draw: random.Random) -> str:
    place = draw.randrange(len(text))
    noise = draw.choice(
        ["\n", "  ", "\t", ":", "{", "}", "- ", "&a ", "*a", "!x ", "#", "'", '"', "\x00", "%", "|", "<<: ", "\u2028"]
    )
    return text[:place] + noise + text[place + draw.choice([0, 0, 1, 5]) :]


def outcome(text: str) -> str:
    try:
        scenario = load_scenario_text(text, "fuzz.yaml")
    except ScenarioError as error:
        assert error.findings
        assert all(str(finding).strip() for finding in error.findings)
        return "findings"
    report = simulate(scenario).report
    return "fits" if report.fits else "does not fit"


def fuzz(seed: int, count: int) -> dict[str, int]:
    draw = random.Random(seed)
    seen: dict[str, int] = {}
    for _ in range(count):
        scenario: Any = valid(draw)
        for _ in range(draw.choice([0, 1, 1, 2, 4])):
            scenario = mutate(scenario, draw)
            if not isinstance(scenario, dict):
                break
        text = yaml.safe_dump(scenario, allow_unicode=True)
        if draw.random() < 0.2:
            text = mutate_text(text, draw)
        try:
            found = outcome(text)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\nfor the scenario\n{text}") from error
        seen[found] = seen.get(found, 0) + 1
    return seen


def test_two_hundred_mutated_scenarios():
    seen = fuzz(seed=1, count=200)
    assert set(seen) <= {"findings", "fits", "does not fit"}
    assert seen["findings"] > 20
    assert seen["fits"] > 10


@pytest.mark.real
def test_ten_thousand_mutated_scenarios():
    seen = fuzz(seed=2, count=10_000)
    assert sum(seen.values()) == 10_000
    assert min(seen["findings"], seen["fits"]) > 500  # both doors are really tried
