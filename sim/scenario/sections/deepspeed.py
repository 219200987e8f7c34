"""The section ``deepspeed``: DeepSpeed's own settings, from a file or in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from sim.interop.deepspeed_config import DeepSpeedReading, read_deepspeed_config
from sim.interop.values import Problem, show
from sim.scenario.draft import Draft
from sim.scenario.sections.resolution import Resolution, path_of, read_json


def read_deepspeed(r: Resolution, given: object, framework: str | None) -> None:
    """Read DeepSpeed's own settings, from a file or in place."""
    d = r.draft
    d.deepspeed = None
    if given is None:
        return
    if framework is not None and framework != "deepspeed":
        r.problems.append(
            Problem(
                ("deepspeed",),
                f"deepspeed settings are given, but framework is {framework}",
                "write framework: deepspeed, or remove them",
            )
        )
        return
    hidden = d.model.hidden_size if d.knows("model") and d.model.knows("hidden_size") else None
    overrides: Mapping[str, Any] = {}
    if isinstance(given, Mapping) and "config" in given:
        overrides = {key: value for key, value in given.items() if key != "config"}
        given = given["config"]
    if isinstance(given, str):
        r.ds_name = FilePath(given).name
        doc = read_json(r, path_of(r, given), "DeepSpeed's settings", ("deepspeed",))
        if doc is None:
            d.forget("deepspeed")
            return
        problems: list[Problem] = []
        config = _merged(doc.data, overrides) if overrides else doc.data
        reading = read_deepspeed_config(config, (), problems, hidden)
        for problem in problems:
            ours = ("deepspeed", *problem.path)
            mine = ours in r.doc.lines or ours in r.doc.origin
            r.findings.append(r.doc.finding(problem._replace(path=ours)) if mine else doc.finding(problem))
    elif isinstance(given, Mapping):
        reading = read_deepspeed_config(given, ("deepspeed",), r.problems, hidden)
    else:
        r.problems.append(
            Problem(
                ("deepspeed",),
                f"deepspeed: {show(given)} is neither a path nor a mapping",
                "write the path of a ds_config.json, or its content in place",
            )
        )
        d.forget("deepspeed")
        return
    for key, words in reading.sources.items():
        r.sources[f"deepspeed.{key}"] = words
    prefix = "" if r.ds_name == "deepspeed" else f"{r.ds_name}: "
    r.warnings.extend(prefix + warning for warning in reading.warnings)
    d.deepspeed = reading


def deepspeed_of(r: Resolution) -> DeepSpeedReading | None:
    """Return what was read of DeepSpeed's settings, if anything could be."""
    return r.draft.deepspeed if r.draft.knows("deepspeed") else None


def activations_elsewhere(d: Draft) -> str:
    """Return the setting of ``activation_checkpointing`` by which inputs do not stay on the GPU whole; "" if none."""
    given = d.deepspeed.fields if d.framework == "deepspeed" and d.deepspeed else {}
    return next((name for name in ("partition_activations", "cpu_checkpointing") if given.get(name)), "")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with another laid over it, section by section."""
    merged = dict(base)
    for key, value in over.items():
        mine = merged.get(key)
        merged[key] = _merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return merged
