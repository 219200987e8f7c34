"""From a file to a complete question: defaults, their sources, overrides, and the way back to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.errors import ScenarioError
from sim.scenario.load import (
    dump_resolved,
    load_scenario,
    load_scenario_mapping,
    load_scenario_text,
    scenario_json_schema,
)
from sim.scenario.schema import Scenario

BASE = """\
model: llama-2-7b
cluster:
  node: dgx-h100
  num_nodes: 2
framework: deepspeed
parallelism:
  zero: 3
training:
  sequence_length: 4096
  micro_batch_size: 2
"""


def load(text: str = BASE, *overrides: str, simulate: bool = True, folder: Path | str = ".") -> Scenario:
    return load_scenario_text(text, "base.yaml", overrides, simulate, folder)


def problems(text: str = BASE, *overrides: str, simulate: bool = True, folder: Path | str = ".") -> list[str]:
    with pytest.raises(ScenarioError) as caught:
        load(text, *overrides, simulate=simulate, folder=folder)
    return [finding.problem for finding in caught.value.findings]


def test_defaults_and_where_they_come_from() -> None:
    s = load()
    assert (s.name, s.cluster.num_gpus, s.parallelism.dp) == ("base", 16, 16)
    assert s.training.global_batch_size == 16 * 2
    assert s.num_microbatches == 1
    assert s.cluster.network is not None
    assert s.sources["parallelism.dp"] == "what remains of 16 GPUs"
    assert s.sources["cluster.network"] == "node dgx-h100's default network"
    assert s.sources["cluster.num_gpus"] == "2 x 8 GPUs of dgx-h100"
    assert s.sources["training.global_batch_size"] == "dp x micro_batch_size"
    assert s.sources["deepspeed.reduce_bucket_size"].startswith("DeepSpeed's default")
    assert "training.sequence_length" not in s.sources
    assert "parallelism.zero" not in s.sources


def test_one_node_needs_no_network() -> None:
    assert load(BASE, "cluster.num_nodes=1").cluster.network is None


def test_a_part_of_a_node() -> None:
    s = load(BASE, "cluster.num_gpus=4")  # takes num_nodes away
    assert (s.cluster.num_nodes, s.cluster.num_gpus, s.cluster.gpus_per_node) == (1, 4, 4)


def test_an_equal_part_of_each_node() -> None:
    s = load(BASE, "cluster.num_gpus=8", "cluster.num_nodes=2")
    assert s.cluster.gpus_per_node == 4


def test_null_is_left_out() -> None:
    text = BASE.replace("  zero: 3\n", "  zero: 3\n  dp: 8\n")
    assert "parallelism needs dp 8 = 8 ranks, but the cluster has 16 GPUs" in problems(text)
    assert load(text, "parallelism.dp=null").parallelism.dp == 16


def test_the_last_override_wins_and_makes_sections() -> None:
    s = load(BASE, "allocator.expandable_segments=true", "training.precision=fp16", "training.precision=bf16")
    assert s.allocator.expandable_segments
    assert s.training.precision == "bf16"


def test_a_key_of_a_named_model_can_be_overridden() -> None:
    s = load(BASE, "model.num_hidden_layers=2", "model.num_attention_heads=64")
    assert s.model.num_hidden_layers == 2
    assert s.model.head_dim == 4096 // 64
    assert s.model.vocab_size == 32000


def test_a_key_of_a_pasted_config_can_be_overridden_by_our_name() -> None:
    pasted = "{model_type: gpt2, n_embd: 64, n_layer: 12, n_head: 4, n_positions: 4096, vocab_size: 100}"
    s = load(BASE.replace("llama-2-7b", pasted), "model.num_hidden_layers=3", "model.n_embd=128")
    assert (s.model.num_hidden_layers, s.model.hidden_size, s.model.head_dim) == (3, 128, 32)


def test_gpu_facts_are_overridden_with_their_source() -> None:
    s = load(BASE, "cluster.gpu={memory: 94.99 GiB, memory_bandwidth: 2.4 TB/s, power_limit: 500 W}")
    assert s.cluster.gpu.total_memory_bytes == round(94.99 * 2**30)
    assert s.cluster.gpu.memory_bytes_per_s == 2.4e12
    assert s.cluster.gpu.power_w == 500
    assert s.cluster.gpu.facts["total_memory_bytes"].kind == "user"


@pytest.mark.parametrize(
    ("words", "bytes_per_s"), [("800 Gbit/s per node", 100e9), ("400 Gbit/s RoCE per GPU", 8 * 50e9)]
)
def test_a_network_in_words(words: str, bytes_per_s: float) -> None:
    network = load(BASE, f"cluster.network={words}").cluster.network
    assert network is not None
    # payload is at most the line, and within the few per cent that protocols take
    assert 0.9 * bytes_per_s < network.nic_bytes_per_s * network.nics_per_node <= bytes_per_s


def test_precision_is_the_best_that_the_gpu_has() -> None:
    assert load().training.precision == "bf16"
    assert load(BASE, "cluster.node=dgx-2").training.precision == "fp16"


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        ((), "huggingface"),
        (("model=gpt2-xl", "training.sequence_length=1024"), "megatron"),
        (("framework=ddp", "parallelism.zero=0", "model=gpt2-xl", "training.sequence_length=1024"), "torch"),
        (("model=bloom-560m",), "torch"),
        (("framework=megatron", "parallelism.zero=1"), "megatron"),
        (("framework=fsdp2",), "torch"),
        (("parallelism.tp=2",), "megatron"),
        (("training.code=torch",), "torch"),
    ],
)
def test_whose_modules_run(overrides: tuple[str, ...], code: str) -> None:
    s = load(BASE, *overrides, simulate=False)
    assert s.training.code == code
    assert ("training.code" in s.sources) == ("training.code=torch" not in overrides)


def test_deepspeed_settings_fill_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text(
        json.dumps(
            {
                "fp16": {"enabled": True},
                "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 3,
                "train_batch_size": "auto",
                "gradient_clipping": 1.0,
                "optimizer": {"type": "SGD"},
            }
        )
    )
    text = BASE.replace("parallelism:\n  zero: 3\n", "").replace("  micro_batch_size: 2\n", "")
    s = load(text + "deepspeed: ds_config.json\n", folder=tmp_path)
    assert (s.training.precision, s.training.optimizer, s.training.gradient_clipping) == ("fp16", "sgd", 1.0)
    assert (s.parallelism.zero, s.deepspeed.stage) == (2, 2)
    assert s.training.micro_batch_size == 4
    assert s.training.global_batch_size == 4 * 16 * 3
    assert s.num_microbatches == 3
    assert s.deepspeed.overlap_comm
    assert s.deepspeed.reduce_bucket_size == 4096 * 4096
    assert "Hugging Face" in s.sources["deepspeed.reduce_bucket_size"]
    assert s.sources["training.precision"] == "ds_config.json: fp16.enabled"


def test_a_key_of_a_ds_config_can_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true}}')
    text = BASE.replace("  zero: 3\n", "  tp: 1\n") + "deepspeed: ds.json\n"
    s = load(text, "deepspeed.zero_optimization.stage=3", folder=tmp_path)
    assert (s.parallelism.zero, s.deepspeed.overlap_comm) == (3, True)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 100, "rope_scaling": None, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    for name in ("mine", "mine/config.json", str(tmp_path / "mine")):
        s = load(BASE, f"model={name}", folder=tmp_path)
        assert (s.model.hidden_size, s.model.head_dim, s.model.num_key_value_heads) == (64, 16, 4)
        assert s.model.name == "mine"


def test_unknown_deepspeed_keys_are_warnings() -> None:
    s = load(BASE + "deepspeed: {zero_optimisation: {stage: 3}, bf16: {enabled: true}, amp: {enabled: true}}\n")
    assert s.warnings == (
        "DeepSpeed has no key deepspeed.zero_optimisation; did you mean zero_optimization?",
        "deepspeed.amp is not modelled: Apex would keep copies of its own",
    )


def test_sequence_parallelism_without_tp_is_off() -> None:
    s = load(BASE, "parallelism.sp=true")
    assert not s.parallelism.sp
    assert "parallelism.sp" in s.warnings[0]


def test_what_is_not_simulated_yet_is_refused_only_for_simulation() -> None:
    override = "model=mixtral-8x7b"
    assert load(BASE, override, simulate=False).model.num_local_experts == 8
    assert problems(BASE, override) == ["mixtures of experts are not simulated yet"]


GPT = """
model: {hidden_size: 64, intermediate_size: 256, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 1000,
  hidden_act: gelu, norm: layernorm, bias: true, position: learned, max_position_embeddings: 128}
cluster: {node: dgx-a100-80gb}
framework: megatron
training: {sequence_length: 128, micro_batch_size: 1}
"""


def test_a_gpt_in_megatron_drops_a_tenth_unless_the_model_says_otherwise() -> None:
    silent = load(GPT)
    assert (silent.model.dropout, silent.model.attention_dropout) == (0.1, 0.1)
    assert any("Megatron's default" in warning for warning in silent.warnings)
    said = load(GPT, "model.dropout=0", "model.attention_dropout=0")
    assert (said.model.dropout, said.model.attention_dropout, said.warnings) == (0.0, 0.0, ())
    assert load(GPT, "framework=ddp").model.dropout == 0.0
    assert load(GPT, "model.norm=rmsnorm").model.dropout == 0.0


def test_a_distributed_optimizer_overlaps_from_hopper_on_unless_the_scenario_says_otherwise() -> None:
    llama = """
model: llama-3-8b
cluster: {node: dgx-h100}
framework: megatron
parallelism: {zero: 1}
training: {sequence_length: 128, micro_batch_size: 1}
"""

    def overlap(*overrides: str) -> tuple[bool, bool]:
        settings = load(llama, *overrides).megatron
        return settings.overlap_grad_reduce, settings.overlap_param_gather

    assert overlap() == (True, True)
    assert overlap("cluster.node=dgx-a100-80gb") == (False, False)
    assert overlap("parallelism.zero=0") == (False, False)
    assert overlap("megatron.overlap_grad_reduce=false") == (False, False)
    assert overlap("megatron.overlap_grad_reduce=true") == (True, False)


def test_megatron_deepspeed_takes_flash_attention_only_where_it_is_asked_for() -> None:
    ours = "framework=deepspeed"
    assert load(GPT, ours).training.attention == "math"
    assert load(GPT, ours, "training.attention=flash-2").training.attention == "flash-2"
    assert load(GPT, ours, "training.code=torch").training.attention == "sdpa"


def test_findings_come_in_the_order_of_the_file() -> None:
    with pytest.raises(ScenarioError) as caught:
        load("training: {sequence_length: x, micro_batch_size: 1}\nframework: y\nmodel: z\ncluster: {node: w}\n")
    assert [f.line for f in caught.value.findings] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("cluster.num_nodes=1",),
        ("framework=ddp", "parallelism.zero=0", "ddp.bucket_cap_mb=50", "model=gpt2", "training.sequence_length=512"),
        ("cluster.gpu={memory: 94.99 GiB, peak_flops: {bf16: 800 TFLOP/s}}", "cluster.network=400 Gbit/s per GPU"),
        ("cluster.gpu=h200-sxm-141gb",),
        ("allocator=max_split_size_mb:512,garbage_collection_threshold:0.8",),
        ("model=mixtral-8x7b",),
        ("model=opt-350m", "training.sequence_length=2048"),
        ("framework=megatron", "parallelism={pp: 4, layers_per_stage: [8, 8, 8, 8]}", "parallelism.vpp=2",
         "parallelism.layers_per_stage=[4, 4, 4, 4, 4, 4, 4, 4]", "training.global_batch_size=64"),
        ("deepspeed={zero_optimization: {stage: 3, offload_optimizer: {device: cpu}}, unheard: 1}",),
        ("deepspeed={data_types: {grad_accum_dtype: fp32}, communication_data_type: fp32}",),
        ("training.precision=fp8",),
    ],
)  # fmt: skip
def test_a_resolved_scenario_loads_to_itself(overrides: tuple[str, ...]) -> None:
    s = load(BASE, *overrides, simulate=False)
    again = load_scenario_text(dump_resolved(s), "other.yaml", simulate=False)
    assert again == s
    assert dump_resolved(again) == dump_resolved(s)


def test_a_resolved_scenario_finds_its_files_from_anywhere(tmp_path: Path) -> None:
    from sim.catalog.load import topologies

    (tmp_path / "mine.yaml").write_text((topologies() / "dgx-a100-80gb.yaml").read_text())
    s = load(BASE, "cluster.node=./mine.yaml", folder=tmp_path)
    again = load_scenario_text(dump_resolved(s), "x.yaml", folder="/")
    assert again.cluster == s.cluster


def test_a_mapping_is_a_scenario_too() -> None:
    data: dict[str, Any] = {
        "model": "llama-2-7b",
        "cluster": {"node": "dgx-h100"},
        "framework": "ddp",
        "training": {"sequence_length": 128, "micro_batch_size": 1},
    }
    before = json.dumps(data)
    assert load_scenario_mapping(data, "run-1").name == "run-1"
    assert json.dumps(data) == before
    with pytest.raises(ScenarioError) as caught:
        load_scenario_mapping({**data, "framework": "dpp"}, "run-1", file="runs.yaml", line=7)
    assert (caught.value.findings[0].file, caught.value.findings[0].line) == ("runs.yaml", 7)


def test_a_relative_path_is_relative_to_a_relative_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenarios" / "configs").mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
    Path("scenarios/configs/m.json").write_text(json.dumps(config))
    Path("scenarios/configs/ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    text = BASE.replace("llama-2-7b", "configs/m.json").replace("  zero: 3\n", "  tp: 1\n")
    Path("scenarios/a.yaml").write_text(text + "deepspeed: configs/ds.json\n")
    s = load_scenario("scenarios/a.yaml")
    assert (s.model.hidden_size, s.parallelism.zero) == (64, 1)


def test_deepspeed_works_out_the_micro_batch_as_deepspeed_does() -> None:
    text = BASE.replace("  micro_batch_size: 2\n", "")
    assert load(text + "deepspeed: {train_batch_size: 64}\n").training.micro_batch_size == 64 // 16
    s = load(text + "deepspeed: {train_batch_size: 64, gradient_accumulation_steps: 2}\n")
    assert (s.training.micro_batch_size, s.num_microbatches) == (2, 2)
    assert problems(text + "deepspeed: {train_batch_size: 40}\n") == ["a batch of 40 does not divide over dp 16"]


def test_a_path_is_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BASE.replace("llama-2-7b", "./m.json"))
    (tmp_path / "m.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2,
                                                 "n_positions": 4096, "vocab_size": 10}))  # fmt: skip
    assert load_scenario(tmp_path / "a.yaml").model.position == "learned"


def test_the_schema_has_every_key_of_the_contract() -> None:
    schema = scenario_json_schema()
    assert schema["required"] == ["model", "cluster", "training"]
    assert set(schema["properties"]["parallelism"]["properties"]) == {
        "dp", "tp", "pp", "cp", "ep", "zero", "sp", "schedule", "vpp", "layers_per_stage",
        "order",
        "cp_comm",
    }  # fmt: skip
    assert json.loads(json.dumps(schema)) == schema


_WORDS = st.sampled_from(
    ["", "~", "true", "-1", "0", "3", "1e400", "nan", "80 GiB", "[]", "{}", "[1, 2]", "{a: b}", "x" * 300, "*a", "&a 1",
     "'", "!!int x", "\\0", "llama-2-7b", "dgx-h100", "99999999999999999999", "auto", "../../etc/passwd", "é", ": :"]
)  # fmt: skip
_KEYS = st.sampled_from(
    ["model", "cluster", "cluster.node", "cluster.num_gpus", "cluster.gpu", "cluster.gpu.memory", "cluster.network",
     "framework", "deepspeed", "deepspeed.zero_optimization", "deepspeed.zero_optimization.stage", "deepspeed.fp16",
     "parallelism", "parallelism.dp", "parallelism.tp", "parallelism.layers_per_stage", "parallelism.vpp", "training",
     "training.micro_batch_size", "training.global_batch_size", "training.sequence_length", "model.num_attention_heads",
     "model.head_dim", "model.num_key_value_heads", "model.dropout", "allocator", "ddp", "sources", "warnings", "name"]
)  # fmt: skip


@given(st.lists(st.tuples(_KEYS, _WORDS), min_size=1, max_size=4))
def test_any_override_is_an_answer_or_a_finding(pairs: list[tuple[str, str]]) -> None:
    try:
        s = load(BASE, *(f"{key}={word}" for key, word in pairs))
    except ScenarioError as error:
        assert error.findings
    else:
        assert s.parallelism.world_size == s.cluster.num_gpus


@given(st.integers(0, len(BASE)), st.integers(0, 12), st.text(max_size=6))
def test_any_mutation_of_the_text_is_an_answer_or_a_finding(start: int, length: int, inserted: str) -> None:
    try:
        load(BASE[:start] + inserted + BASE[start + length :])
    except ScenarioError as error:
        assert error.findings


def test_a_schedule_without_a_pipeline_is_said_to_change_nothing() -> None:
    found = load(BASE, "parallelism.schedule=zb-v", "parallelism.cp_comm=p2p")
    said = [warning for warning in found.warnings if "changes nothing" in warning]
    assert said == [
        "parallelism.schedule zb-v changes nothing: pp is 1",
        "parallelism.cp_comm p2p changes nothing: cp is 1",
    ]
