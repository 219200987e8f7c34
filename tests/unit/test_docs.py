"""The documents say what the program does: keys of a scenario, commands, exit codes, files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sim import cli
from sim.scenario.load import load_scenario_text, scenario_json_schema
from sim.scenario.schema import (
    AllocatorConfig,
    DdpSettings,
    Fsdp1Settings,
    Fsdp2Settings,
    MegatronSettings,
    ModelConfig,
    Parallelism,
    Training,
)

DOCS = Path(__file__).parents[2] / "docs"
MODELS = {
    "model": ModelConfig,
    "cluster": None,
    "cluster.gpu": None,
    "parallelism": Parallelism,
    "training": Training,
    "ddp": DdpSettings,
    "fsdp2": Fsdp2Settings,
    "fsdp1": Fsdp1Settings,
    "megatron": MegatronSettings,
    "allocator": AllocatorConfig,
}
DERIVED = {
    "model.name": "", "model.num_key_value_heads": "num_attention_heads",
    "model.head_dim": "hidden_size / num_attention_heads", "model.attention_output_bias": "attention_bias",
    "model.bias": "false", "model.config": "", "model.model_type": "",
    "cluster.nccl": "`2.30`",
    "cluster.num_nodes": "1", "cluster.num_gpus": "all of num_nodes", "cluster.network": "the node's",
    "cluster.backend": "`nccl`", "cluster.sharp": "the network's", "cluster.alpha": "none", "cluster.beta": "none",
    "cluster.gpu": "the node's", "cluster.gpu.name": "the node's",
    "parallelism.dp": "what remains", "parallelism.zero": "the framework's", "parallelism.schedule": "1f1b",
    "parallelism.cp_comm": "`all_gather` under FSDP2, `a2a` under DeepSpeed, else `p2p`",
    "training.micro_batch_size": "from the batch and DeepSpeed's settings",
    "training.global_batch_size": "one microbatch a rank",
    "training.precision": "the best of the GPU", "training.optimizer": "adamw",
    "training.gradient_clipping": "the framework's", "training.code": "huggingface for Llama-like models, else torch",
    "training.cpu_threads": "as the launcher sets it: `0` under `deepspeed`, else `1`",
    "training.loss": "that of the code", "allocator.memory_fraction": "not set",
    "allocator.cublas_workspace": "that of the GPU",
    "allocator.max_split_size": "no limit",
    "fsdp2.param_dtype": "training.precision", "fsdp2.reduce_dtype": "`fp32`",
    "fsdp2.shard_size": "dp", "fsdp1.shard_size": "a node's GPUs",
    "megatron.accumulate_allreduce_grads_in_fp32": "`true` for bf16", "megatron.bucket_size": "max(40e6, 1e6 dp)",
}  # fmt: skip
"""Defaults that are worked out, in words. The rest are those of the types."""


def _sections() -> dict[str, dict[str, Any]]:
    top = scenario_json_schema()["properties"]
    found = {}
    for name in MODELS:
        schema = top
        for part in name.split("."):
            schema = schema[part] if schema is top else schema["properties"][part]
            schema = next((s for s in schema.get("anyOf", ()) if "properties" in s), schema)
        found[name] = schema
    return found


def _values(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " ".join(f"`{value}`" for value in schema["enum"])
    if "examples" in schema:
        return f"such as `{schema['examples'][0]}`"
    if "anyOf" in schema and "properties" not in schema["anyOf"][-1]:
        return " or ".join(_values(each) for each in schema["anyOf"])
    if schema.get("type") == "boolean":
        return "`true` `false`"
    if schema.get("type") in ("integer", "number"):
        return "a whole number" if schema["type"] == "integer" else "a number"
    return {"string": "text", "array": "a list", "object": "a mapping"}.get(schema.get("type", ""), "text or mapping")


def _default(section: str, key: str, schema: dict[str, Any]) -> str:
    if key in schema.get("required", ()):
        return "**required**"
    if (words := DERIVED.get(f"{section}.{key}")) is not None:
        return words
    fields = MODELS[section].model_fields if MODELS[section] else {}
    if key not in fields or fields[key].is_required():
        return "**required**" if section == "model" else "the catalogue's"
    default = fields[key].default
    return "none" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _table(section: str, schema: dict[str, Any]) -> str:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key, value in schema["properties"].items():
        meaning = "" if value.get("description", "").startswith("write ") else value.get("description", "")
        rows.append(f"| `{key}` | {_values(value)} | {_default(section, key, schema)} | {meaning} |")
    return "\n".join(rows)


def test_the_tables_of_keys_are_those_of_the_schema(update):
    path = DOCS / "scenario.md"
    text = path.read_text(encoding="utf-8")
    for section, schema in _sections().items():
        mark = f"<!-- keys: {section} -->"
        assert mark in text, f"docs/scenario.md lacks {mark}"
        text = re.sub(
            rf"{re.escape(mark)}\n.*?<!-- end -->",
            lambda _, m=mark, s=section, k=schema: f"{m}\n{_table(s, k)}\n<!-- end -->",
            text,
            flags=re.S,
        )
    if update:
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "run pytest tests/unit/test_docs.py --update"


def test_defaults_in_words_are_true():
    scenario = load_scenario_text(
        "model: llama-2-7b\ncluster: {node: dgx-h100}\nframework: deepspeed\nparallelism: {zero: 3}\n"
        "training: {sequence_length: 4096, micro_batch_size: 1}\n",
        "x.yaml",
    )
    assert scenario.cluster.num_nodes == 1
    assert scenario.cluster.num_gpus == scenario.parallelism.dp == 8
    assert scenario.training.global_batch_size == 8
    assert scenario.training.precision == "bf16"
    assert scenario.training.optimizer == "adamw"
    assert scenario.training.code == "huggingface"
    assert scenario.model.head_dim == scenario.model.hidden_size // scenario.model.num_attention_heads


@pytest.mark.parametrize("name", ["scenario.md", "usage.md"])
def test_the_examples_load(name):
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.S)
    for block in blocks:
        if "model" in (yaml.safe_load(block) or {}):
            assert load_scenario_text(block, name).num_microbatches >= 1


def test_every_command_option_exit_code_and_file_is_in_the_usage():
    text = (DOCS / "usage.md").read_text(encoding="utf-8")
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert f"`sim {command.name or command.callback.__name__}" in text
    for option in ("--json", "--out", "--set", "--quiet", "--no-advice", "--version"):
        assert f"`{option}" in text
    for code in (0, cli.EXIT_BAD_INPUT, cli.EXIT_DOES_NOT_FIT, cli.EXIT_DEFECT):
        assert f"| {code} |" in text
    for file in ("scenario.resolved.yaml", "report.json", "report.md", "memory.png", "timeline.png", "trace.json.gz",
                 "memory_snapshot.pickle"):  # fmt: skip
        assert f"`{file}`" in text
