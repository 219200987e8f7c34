"""A scenario from what people already have: a launch script, a job's configuration, a model's directory.

``sim import`` reads one or several such files (a model's directory and a ds_config.json, say), lays what they say one
over the other, later files over earlier ones, and writes a scenario in which each line says where it comes from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml

from sim.errors import Finding, ScenarioError
from sim.interop.accelerate import read_accelerate
from sim.interop.imported import Imported, Said
from sim.interop.megatron_args import read_megatron_args
from sim.interop.torchtitan import read_torchtitan
from sim.interop.values import Path, Problem, dotted, show
from sim.scenario.document import UnreadableError, parse_value, parse_yaml, read_text

_SECTIONS = (
    "model", "cluster", "framework", "deepspeed", "fsdp1", "fsdp2", "ddp", "megatron", "parallelism", "training",
)  # fmt: skip
_NEEDED = {
    "model": "say the model: --set model=llama-3.1-8b, or name the directory of its config.json too",
    "cluster.node": "say the machine: --set cluster.node=dgx-h100 ('sim catalog node' lists them)",
    "framework": "say whose training loop it is: --set framework=fsdp2",
    "training.sequence_length": "say it: --set training.sequence_length=4096",
    "training.micro_batch_size": "say it: --set training.micro_batch_size=1",
}
"""What no scenario can do without, and how to say it where the files do not."""
_COMMENT_COLUMN = 40
_KEY_DEPTH = 2
"""Keys of a section; what is set below them goes into one line."""


@dataclass(frozen=True, slots=True)
class ImportedScenario:
    """A scenario file's text, and what its reader should know."""

    text: str
    notes: tuple[str, ...]
    unread: tuple[str, ...]


def import_scenario(
    sources: Sequence[str],
    command: str | None = None,
    overrides: Sequence[str] = (),
    folder: FilePath = FilePath(),
) -> ImportedScenario:
    """Return the scenario that the files and the command line stand for, to be written in ``folder``.

    Formats are told apart by what is in the files. Raises ScenarioError.
    """
    findings: list[Finding] = []
    together = Imported()
    given = [(source, _read(source, folder, findings)) for source in sources]
    if command is not None:
        given.append(("--command", read_megatron_args(command)))
    for source, read in given:
        findings += [Finding(source, 0, p.problem, p.remedy) for p in read.problems if not _set(p.path, overrides)]
        together.values.update(read.values)
        together.notes += read.notes
        together.unread += read.unread
    _override(together, overrides, findings)
    names = [name for name, _ in given]
    if not given:
        findings.append(Finding("sim import", 0, "nothing to import", "name a file, a directory, or a --command"))
    if not findings:
        findings += [
            Finding(", ".join(names), 0, f"nothing says {path}", remedy)
            for path, remedy in _NEEDED.items()
            if not _said(together, path)
        ]
    if findings:
        raise ScenarioError(findings)
    return ImportedScenario(_written(together, names), tuple(together.notes), tuple(together.unread))


def _set(path: Path, overrides: Sequence[str]) -> bool:
    """Whether ``--set`` says what a file leaves open."""
    return bool(path) and any(override.partition("=")[0].strip() == dotted(path) for override in overrides)


def _said(together: Imported, path: str) -> bool:
    parts = tuple(path.split("."))
    return any(known[: len(parts)] == parts for known in together.values)


# --- reading ---------------------------------------------------------------------------------------


def _read(source: str, folder: FilePath, findings: list[Finding]) -> Imported:
    """Read one source by what it holds; what cannot be read becomes findings."""
    path = FilePath(source)
    try:
        if path.is_dir():
            return _directory(path, folder)
        text = read_text(path, source, "a configuration or a launch script")
    except UnreadableError as error:
        findings.append(error.finding)
        return Imported()
    if path.suffix == ".json":
        return _json(path, text, folder)
    if path.suffix == ".toml":
        return read_torchtitan(text)
    if path.suffix in (".yaml", ".yml"):
        return _yaml(text, source, findings)
    return read_megatron_args(text, os.environ, path.parent)


def _directory(path: FilePath, folder: FilePath) -> Imported:
    """A Hugging Face model's directory, and DeepSpeed's settings where they lie beside it."""
    said = Imported()
    config = path / "config.json"
    if not config.is_file():
        said.problems.append(
            Problem((), "holds no config.json", "name a model's directory, or the file that holds the configuration")
        )
        return said
    said = _json(config, read_text(config, str(config), "a model's configuration"), folder)
    for beside in sorted(path.glob("*.json")):
        if beside != config:
            found = _json(beside, read_text(beside, str(beside), "settings"), folder)
            if not found.problems and ("deepspeed",) in found.values:
                said.values.update(found.values)
    return said


def _json(path: FilePath, text: str, folder: FilePath) -> Imported:
    said = Imported()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        said.problems.append(Problem((), f"is not JSON: {error}", "name a config.json or a ds_config.json"))
        return said
    if not isinstance(content, Mapping):
        said.problems.append(Problem((), "is not a mapping", "name a config.json or a ds_config.json"))
        return said
    name = os.path.relpath(path, folder)
    if "zero_optimization" in content or "train_micro_batch_size_per_gpu" in content or "train_batch_size" in content:
        said.say("framework", "deepspeed", path.name)
        said.say("deepspeed", name, "as it is")
        zero = content.get("zero_optimization")
        if isinstance(zero, Mapping) and isinstance(zero.get("stage"), int):
            said.say("parallelism.zero", zero["stage"], "zero_optimization.stage")
        batch = content.get("train_micro_batch_size_per_gpu")
        if isinstance(batch, int):
            said.say("training.micro_batch_size", batch, "train_micro_batch_size_per_gpu")
        steps, whole = content.get("gradient_accumulation_steps"), content.get("train_batch_size")
        if isinstance(batch, int) and isinstance(steps, int) and isinstance(whole, int):
            gpus, rest = divmod(whole, batch * steps or 1)
            if gpus > 0 and not rest:
                origin = "train_batch_size / train_micro_batch_size_per_gpu / gradient_accumulation_steps"
                said.say("cluster.num_gpus", gpus, origin)
    elif "model_type" in content or "hidden_size" in content or "n_embd" in content:
        said.say("model", name, "Hugging Face's config.json")
    else:
        said.problems.append(
            Problem(
                (),
                "is neither a model's config.json nor a ds_config.json",
                "it needs a model_type or a zero_optimization",
            )
        )
    return said


def _yaml(text: str, source: str, findings: list[Finding]) -> Imported:
    try:
        document = parse_yaml(text, source, findings)
    except UnreadableError as error:
        findings.append(error.finding)
        return Imported()
    if any(key in document.data for key in ("distributed_type", "compute_environment", "fsdp_config")):
        return read_accelerate(document.data)
    said = Imported()
    what = "a scenario already" if "cluster" in document.data and "model" in document.data else "no accelerate config"
    said.problems.append(
        Problem(
            (),
            f"is {what}",
            "import reads accelerate's configuration, torchtitan's TOML, Megatron-LM's "
            "scripts, a ds_config.json and a model's directory",
        )
    )
    return said


def _override(together: Imported, overrides: Sequence[str], findings: list[Finding]) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            findings.append(
                Finding("--set", 0, f"{show(override)} is not an assignment", "write --set cluster.node=dgx-h100")
            )
            continue
        try:
            value = parse_value(text)
        except UnreadableError as error:
            findings.append(Finding("--set", 0, f"{key}: {show(text)} {error.finding.problem}", error.finding.remedy))
            continue
        for known in [k for k in together.values if k[: len(path)] == path or path[: len(k)] == k]:
            if known != path:
                del together.values[known]
        together.values[path] = Said(value, "--set")


# --- writing ---------------------------------------------------------------------------------------


def _written(together: Imported, sources: Sequence[str]) -> str:
    """Return the scenario as YAML; each line ends in where its value comes from."""
    lines = [f"# Imported from {', '.join(sources)}"]
    lines += [f"# Note: {note}" for note in together.notes]
    lines += [f"# Not read: {', '.join(together.unread)}"] if together.unread else []
    sections = dict.fromkeys((*_SECTIONS, *(path[0] for path in together.values)))
    for section in sections:
        whole = together.values.get((section,))
        if whole is not None:
            lines.append(_line("", section, whole))
            continue
        keys = {path: said for path, said in together.values.items() if path[0] == section}
        if keys:
            lines.append(f"{section}:")
            lines += [_line("  ", ".".join(path[1:]), said) for path, said in keys.items() if len(path) == _KEY_DEPTH]
            lines += _deeper(keys)
    return "\n".join(lines) + "\n"


def _deeper(keys: Mapping[Path, Said]) -> list[str]:
    """What ``--set`` says below a section's keys, as mappings in one line."""
    below: dict[str, dict[str, Any]] = {}
    for path, said in keys.items():
        if len(path) > _KEY_DEPTH:
            at = below.setdefault(path[1], {})
            for part in path[2:-1]:
                at = at.setdefault(part, {})
            at[path[-1]] = said.value
    return [_line("  ", name, Said(content, "--set")) for name, content in below.items()]


def _line(indent: str, key: str, said: Said) -> str:
    value = yaml.safe_dump(said.value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n")
    text = f"{indent}{key}: {value.strip()}"
    return f"{text:<{_COMMENT_COLUMN - 1}} # {said.origin}" if said.origin else text
