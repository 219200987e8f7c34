"""The scenario's door: a file and ``--set`` in, a complete ``Scenario`` or every problem at once out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from sim.errors import Finding, ScenarioError
from sim.interop.values import show
from sim.scenario.document import Document, UnreadableError, parse_value, parse_yaml, read_text
from sim.scenario.schema import Scenario


def load_scenario(path: str | FilePath, overrides: Sequence[str] = (), simulate: bool = True) -> Scenario:
    """Return the question that a file asks, with ``key.path=value`` laid over it.

    Raises ScenarioError with every finding. ``simulate`` also refuses what cannot be simulated yet.
    """
    file = FilePath(path)
    try:
        text = read_text(file, str(path))
    except UnreadableError as error:
        raise ScenarioError([error.finding]) from None
    return load_scenario_text(text, str(path), overrides, simulate, file.parent)


def load_scenario_text(
    text: str,
    file_name: str,
    overrides: Sequence[str] = (),
    simulate: bool = True,
    folder: str | FilePath = ".",
) -> Scenario:
    """As ``load_scenario``, of a text; paths in it are relative to ``folder``."""
    from sim.scenario.resolve import resolve

    findings: list[Finding] = []
    try:
        document = parse_yaml(text, file_name, findings)
    except UnreadableError as error:
        raise ScenarioError([*findings, error.finding]) from None
    apply_overrides(document, overrides, findings)
    return resolve(document, FilePath(folder), findings, simulate)


def load_scenario_mapping(
    data: dict[str, Any], name: str, simulate: bool = True, folder: str | FilePath = ".", file: str = "", line: int = 0
) -> Scenario:
    """As ``load_scenario``, of a mapping that another file holds (a measured run); it is not changed."""
    from sim.scenario.resolve import resolve

    document = Document(file or name, {"name": name, **data}, {(): line})
    return resolve(document, FilePath(folder), [], simulate)


_NAMED = ("model", "deepspeed")
"""Sections that a name or a path may stand for; a key set below one is laid over what it names."""
_EITHER: dict[tuple[str, ...], tuple[str, ...]] = {
    ("cluster", "num_nodes"): ("cluster", "num_gpus"),
    ("cluster", "num_gpus"): ("cluster", "num_nodes"),
}


def apply_overrides(document: Document, overrides: Sequence[str], findings: list[Finding]) -> None:
    """Lay ``key.path=value`` over a document. A value is YAML; null takes the key away.

    Setting one of num_nodes and num_gpus takes the other away, unless it is set too.
    """
    assigned: list[tuple[str, ...]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            findings.append(
                Finding(
                    "--set",
                    0,
                    f"{show(override)} is not an assignment",
                    "write --set key.path=value, such as --set cluster.num_nodes=2",
                )
            )
            continue
        try:
            value = parse_value(text)
        except UnreadableError as error:
            findings.append(Finding("--set", 0, f"{key}: {show(text)} {error.finding.problem}", error.finding.remedy))
            continue
        if _assign(document, path, value, findings):
            assigned.append(path)
    for path in assigned:
        other = _EITHER.get(path)
        if other and other not in assigned and isinstance(cluster := document.data.get("cluster"), dict):
            cluster.pop(other[1], None)


def _assign(document: Document, path: tuple[str, ...], value: Any, findings: list[Finding]) -> bool:
    at = document.data
    for depth, part in enumerate(path[:-1]):
        below = at.get(part)
        if below is None:
            below = at[part] = {}
        elif isinstance(below, str) and depth == 0 and part in _NAMED:
            below = at[part] = {"config": below}
            document.lines[(part, "config")] = document.lines.get((part,), 0)
        elif not isinstance(below, dict):
            name = ".".join(path[: depth + 1])
            findings.append(
                Finding(
                    "--set", 0, f"{'.'.join(path)}: {name} is {show(below)}, which has no keys", f"set {name} itself"
                )
            )
            return False
        at = below
    at[path[-1]] = value
    document.origin[path] = "--calibration" if path == ("calibration",) else "--set"
    return True


def scenario_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a scenario file."""
    from sim.scenario.fields import scenario_schema

    return scenario_schema()


def dump_resolved(scenario: Scenario) -> str:
    """Return a scenario file with every default written out, which loads to the same Scenario."""
    from sim.scenario.dump import dump

    return dump(scenario)
