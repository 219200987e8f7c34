"""The section ``model``: a name, a path, or a config written in place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from sim.catalog import load as catalog
from sim.interop.hf_config import MODEL_KEYS, HfModel, complete, read_hf_config
from sim.interop.values import Problem, either, near, read_mapping, show, suggest
from sim.scenario.draft import ModelDraft
from sim.scenario.schema import ModelConfig
from sim.scenario.sections.resolution import OWN_DEFAULT, Resolution, exists, path_of, read_json

_MODEL_DEFAULTS = {
    name: spec.default for name, spec in ModelConfig.model_fields.items() if not spec.is_required() and name != "name"
}


def read_model(r: Resolution, given: object) -> None:
    """Fill ``draft.model`` from a name, a path, or a mapping (which may override what ``config`` names)."""
    found = ModelDraft()
    overrides: Mapping[str, Any] = {}
    if isinstance(given, Mapping) and "config" in given:
        overrides = {key: value for key, value in given.items() if key != "config"}
        given = given["config"]
        if not isinstance(given, str):
            r.problems.append(
                Problem(
                    ("model", "config"),
                    f"model.config: {show(given)} is not a name or a path",
                    "write a name such as llama-2-70b, or the path of a config.json",
                )
            )
            return
    if isinstance(given, Mapping):
        at: Literal["place", "catalogue", "file"] = "place"
        if given.get("model_type"):  # the family's own key may differ from the one that --set names
            overrides = {k: v for k, v in given.items() if k in MODEL_KEYS and ("model", k) in r.doc.origin}
        read = read_hf_config(given, ("model",), r.problems, in_place=True)
        name = given.get("name") or given.get("_name_or_path") or ""
    elif isinstance(given, str):
        loaded = _named_model(r, given.strip())
        if loaded is None:
            return
        read, at, name = loaded
    else:
        r.problems.append(
            Problem(
                ("model",),
                f"model: {show(given)} is neither a name, a path nor a mapping",
                "write a name such as llama-2-70b, the path of a config.json, or the config itself",
            )
        )
        return
    if overrides:
        _override_model(r, read, overrides)
    _model_defaults(r, found, read, at, name if isinstance(name, str) else "")
    r.draft.model = found


def _named_model(r: Resolution, text: str) -> tuple[HfModel, Literal["place", "catalogue", "file"], str] | None:
    names = catalog.names("model")
    if text.lower() in names:
        read = read_hf_config(catalog.model_config(text.lower()), ("model",), r.problems)
        return read, "catalogue", text.lower()
    path = path_of(r, text)
    if not exists(path):
        hub = re.fullmatch(r"[\w-][\w.-]*/([\w.-]+)", text) if not text.endswith(".json") else None
        if hub:
            bare = re.sub(r"(?i)^meta-|-(hf|base|instruct|v[0-9.]+)(?=-|$)", "", hub[1])
            close = near(bare, names)
            r.problems.append(
                Problem(
                    ("model",),
                    f"unknown model {show(text)}: there is no such directory, and nothing is downloaded",
                    (f"did you mean {either(close)}? Or " if close else "") + "give the path of its config.json",
                )
            )
            return None
        if "/" not in text and "\\" not in text and not text.endswith(".json"):
            r.problems.append(Problem(("model",), f"unknown model {show(text)}", suggest(text, names)))
            return None
    if exists(path / "config.json"):
        path = path / "config.json"
    doc = read_json(r, path, "the model's config", ("model",))
    if doc is None:
        return None
    problems: list[Problem] = []
    read = read_hf_config(doc.data, (), problems)
    r.findings.extend(doc.finding(problem) for problem in problems)
    given = doc.data.get("_name_or_path")
    stem = path.parent.name if path.stem == "config" else path.stem
    return read, "file", given if isinstance(given, str) and given else stem


def _override_model(r: Resolution, read: HfModel, overrides: Mapping[str, Any]) -> None:
    values, wrong = read_mapping(overrides, MODEL_KEYS, ("model",), r.problems)
    if "bias" in values:
        bias = values.pop("bias")
        values = {"attention_bias": bias, "attention_output_bias": bias, "mlp_bias": bias, **values}
    derived = {key for key in ("head_dim", "num_key_value_heads") if key in read.sources and key not in values}
    if derived and values.keys() & {"hidden_size", "num_attention_heads"}:
        for key in sorted(derived):
            read.keys.pop(key, None)
    read.keys.update(values)
    read.wrong.update(wrong)
    complete(read.keys, read.sources, read.wrong)


def _model_defaults(
    r: Resolution, found: ModelDraft, read: HfModel, at: Literal["place", "catalogue", "file"], name: str
) -> None:
    for key, value in {**_MODEL_DEFAULTS, **read.keys}.items():
        if key not in read.wrong and key != "name":
            setattr(found, key, value)
    origin = {"catalogue": f"the catalogue's {name}", "file": f"{name}'s config.json", "place": ""}[at]
    for key in ModelConfig.model_fields:
        if key in read.sources:
            r.sources[f"model.{key}"] = read.sources[key]
        elif key in read.keys:
            if origin:
                r.sources[f"model.{key}"] = origin
        elif key in _MODEL_DEFAULTS:
            r.sources[f"model.{key}"] = OWN_DEFAULT
    found.name, found.at, found.family = name, at, read.family
    found.given_positions = "max_position_embeddings" in read.keys and ("max_position_embeddings" not in read.sources)


def is_gpt(model: ModelDraft) -> bool:
    """Return whether a block is GPT-2's: what Megatron builds where its command says nothing else."""
    return model.norm == "layernorm" and model.hidden_act == "gelu" and model.position == "learned"
