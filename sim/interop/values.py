"""Readers of single values, and the words for what is wrong with them.

A *table* (``dict[str, Key]``) says which keys a mapping may have and how each is read; :func:`read_mapping` applies
it and reports every mistake once. The same table gives the JSON Schema of the mapping, so that the two cannot differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sim import units

Path = tuple[str, ...]


class Problem(NamedTuple):
    """A mistake at a path of a document; whoever knows the document's file and lines makes it a ``Finding``."""

    path: Path
    problem: str
    remedy: str = ""


class WrongValueError(ValueError):
    """Raised by a reader: what the value is not, and what to write instead."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


Reader = Callable[[object], Any]


class Key(NamedTuple):
    """One key of a table: how its value is read, its JSON Schema, and whether it has to be there."""

    read: Reader
    schema: dict[str, Any]
    doc: str = ""
    required: bool = False


def show(value: object) -> str:
    """Return a value as a message quotes it: short, as YAML would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 48 else text[:44] + "..." + text[0]


def dotted(path: Iterable[str]) -> str:
    """Return ("cluster", "gpu") as "cluster.gpu"."""
    return ".".join(path)


SYNONYMS: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_layers", "n_layer", "n_layers", "layers"),
    "hidden_size": ("n_embd", "d_model", "dim", "hidden_dim", "n_embed"),
    "num_attention_heads": ("num_heads", "num_head", "n_head", "n_heads", "heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads", "num_query_groups", "kv_heads"),
    "intermediate_size": ("ffn_hidden_size", "ffn_dim", "d_ff", "n_inner", "ffn"),
    "vocab_size": ("vocabulary", "vocab", "n_vocab"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "num_nodes": ("nodes", "n_nodes", "nnodes"),
    "num_gpus": ("gpus", "n_gpus", "world_size", "ngpus"),
    "memory": ("hbm", "vram", "memory_bytes"),
    "memory_bandwidth": ("bandwidth", "hbm_bandwidth"),
    "power_limit": ("power", "tdp"),
    "sequence_length": ("seq_len", "seq_length", "seqlen", "max_seq_length", "context_length"),
    "micro_batch_size": ("micro_batch", "mbs", "per_device_train_batch_size"),
    "global_batch_size": ("global_batch", "gbs", "train_batch_size", "batch_size"),
    "recompute": ("activation_checkpointing", "gradient_checkpointing", "checkpointing"),
    "precision": ("dtype", "torch_dtype"),
    "zero": ("zero_stage", "stage"),
    "dp": ("data_parallel", "data_parallel_size"),
    "tp": ("tensor_parallel", "tensor_parallel_size", "tensor_model_parallel_size"),
    "pp": ("pipeline_parallel", "pipeline_parallel_size", "pipeline_model_parallel_size"),
    "cp": ("context_parallel", "context_parallel_size"),
    "ep": ("expert_parallel", "expert_parallel_size"),
    "sp": ("sequence_parallel",),
    "deepspeed": ("ds_config", "deepspeed_config"),
    "parallelism": ("parallel", "strategy"),
}
"""Our key -> what other programs call it, so that a misnamed key is understood."""


def near(word: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Return the names nearest to a word, best first; empty if none is near."""
    known = sorted(names)
    lower = word.lower()
    if meant := [name for name in known if name.lower() == lower or lower in SYNONYMS.get(name, ())]:
        return meant
    from rapidfuzz import fuzz, process

    # misspelt as a whole, or else a piece of the name
    for scorer, cutoff in ((fuzz.ratio, 70.0), (fuzz.WRatio, 72.0)):
        found = process.extract(lower, known, scorer=scorer, processor=str.lower, limit=limit, score_cutoff=cutoff)
        if found:
            best = found[0][1]
            return [name for name, score, _ in found if score >= best - 6]
    return []


def either(words: Sequence[str]) -> str:
    """Return "a", "a or b", "a, b or c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def suggest(word: str, names: Iterable[str], kind: str = "known", most: int = 12) -> str:
    """Return "did you mean X?" where a name is near, otherwise the list of names (at most ``most``)."""
    known = sorted(names)
    if close := near(word, known):
        return f"did you mean {either(close)}?"
    listed = ", ".join(known[:most]) + (", ..." if len(known) > most else "")
    return f"{kind}: {listed}" if known else ""


# --- readers -------------------------------------------------------------------------------------


def integer(least: int, most: int, example: int, doc: str = "", required: bool = False) -> Key:
    """A whole number within limits. ``1e3`` and ``4096.0`` are whole numbers too."""

    def read(value: object) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        few = f"write {either([str(v) for v in range(least, most + 1)])}" if most - least <= 3 else ""
        if isinstance(value, bool) or not isinstance(value, int):
            raise WrongValueError(
                f"{show(value)} is not a whole number", few or f"write a whole number such as {example}"
            )
        if few and not least <= value <= most:
            raise WrongValueError(f"{value} is out of range", few)
        if value < least:
            raise WrongValueError(
                f"{value} is too small", f"write {least} or more" if example == least else f"write {example}, or "
                f"anything from {least} up",
            )  # fmt: skip
        if value > most:
            raise WrongValueError(f"{value} is too large", f"write at most {most}")
        return value

    return Key(read, {"type": "integer", "minimum": least, "maximum": most}, doc, required)


def number(least: float, most: float, example: str, doc: str = "", below: bool = False) -> Key:
    """A number in [least, most], or [least, most) if ``below``."""
    limits = f"from {least:g} {'to below' if below else 'to'} {most:g}" if math.isfinite(most) else f"{least:g} or more"

    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise WrongValueError(f"{show(value)} is not a number", f"write a number {limits}, such as {example}")
        if value < least or value > most or (below and value == most):
            raise WrongValueError(f"{value:g} is out of range", f"write a number {limits}, such as {example}")
        return float(value)

    schema: dict[str, Any] = {"type": "number", "minimum": least}
    if math.isfinite(most):
        schema["exclusiveMaximum" if below else "maximum"] = most
    return Key(read, schema, doc)


_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


def boolean(doc: str = "") -> Key:
    """true or false; yes, no, on and off too, since YAML 1.1 has them."""

    def read(value: object) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
        raise WrongValueError(f"{show(value)} is neither true nor false", "write true or false")

    return Key(read, {"type": "boolean"}, doc)


def text(what: str, example: str, doc: str = "", required: bool = False) -> Key:
    """A text that is not empty."""

    def read(value: object) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > 4096:
            raise WrongValueError(f"{show(value)} is not {what}", f"write {example}")
        return value.strip()

    return Key(read, {"type": "string"}, doc, required)


def choice(values: Sequence[str], what: str, doc: str = "", required: bool = False, also: str = "") -> Key:
    """One of some words, in any case of letters."""
    by_lower = {value.lower(): value for value in values}

    def read(value: object) -> str:
        if isinstance(value, str) and value.lower() in by_lower:
            return by_lower[value.lower()]
        shown = str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
        close = near(shown, values) if shown else []
        listed = either(list(values)) + also
        remedy = f"did you mean {either(close)}? It is one of {listed}" if close else f"write {listed}"
        raise WrongValueError(f"{show(value)} is not {what}", remedy)

    return Key(read, {"enum": list(values)}, doc, required)


def measured(parse: Callable[[object], float], what: str, pattern: str, doc: str = "") -> Key:
    """A value with its unit, by one of the parsers of ``sim.units``; zero is refused."""

    def read(value: object) -> float:
        try:
            parsed = parse(value)
        except (ValueError, OverflowError) as error:
            problem, _, remedy = str(error).partition("; ")
            raise WrongValueError(problem if len(problem) < 120 else f"{show(value)} is not {what}", remedy) from None
        if parsed <= 0 or not math.isfinite(parsed) or parsed > 1e24:
            raise WrongValueError(f"{show(value)} is out of range", f"write {what} above zero")
        return parsed

    return Key(read, {"type": "string", "examples": [pattern]}, doc)


def size(doc: str = "") -> Key:
    return measured(units.parse_size, "a size", "80 GiB", doc)


def rate(doc: str = "") -> Key:
    return measured(units.parse_rate, "a rate", "2.4 TB/s", doc)


def flops(doc: str = "") -> Key:
    return measured(units.parse_flops, "a rate of arithmetic", "989.4 TFLOP/s", doc)


def power(doc: str = "") -> Key:
    return measured(units.parse_power, "a power", "700 W", doc)


def frequency(doc: str = "") -> Key:
    return measured(units.parse_frequency, "a frequency", "1830 MHz", doc)


# --- tables --------------------------------------------------------------------------------------


def read_mapping(
    given: object, table: Mapping[str, Key], path: Path, problems: list[Problem], word: str = "key"
) -> tuple[dict[str, Any], set[str]]:
    """Read a mapping by its table. Returns the values, and the keys that are wrong (or required and missing).

    ``null`` is as good as left out. Each mistake becomes one problem.
    """
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        problems.append(
            Problem(path, f"{dotted(path)}: {show(given)} is not a mapping", f"write keys under it: {', '.join(table)}")
        )
        return {}, set(table)
    values: dict[str, Any] = {}
    wrong: set[str] = set()
    for key, value in given.items():
        at = (*path, key)
        if key not in table:
            problems.append(Problem(at, f"unknown {word} {dotted(at)}", unknown_key(key, table, path)))
        elif value is not None:
            try:
                values[key] = table[key].read(value)
            except WrongValueError as error:
                problems.append(Problem(at, f"{dotted(at)}: {error.problem}", error.remedy))
                wrong.add(key)
    for key, spec in table.items():
        if spec.required and key not in values and key not in wrong:
            unknown = [name for name in given if name not in table]
            if not any(key in near(name, table, 1) for name in unknown):  # a misspelt key has been named already
                problems.append(Problem(path, f"{dotted((*path, key))} is missing", spec.doc))
            wrong.add(key)
    return values, wrong


def unknown_key(key: str, table: Iterable[str], path: Path = ()) -> str:
    """Return what to write instead of a key that the table does not have."""
    names = list(table)
    if close := near(key, names):
        return f"did you mean {either(close)}?"
    where = f"keys of {dotted(path)}" if path else "keys here"
    return f"{where}: {', '.join(names)}"


def mapping_schema(table: Mapping[str, Key], doc: str = "") -> dict[str, Any]:
    """Return the JSON Schema of a mapping that the table describes."""
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False}
    if doc:
        schema["description"] = doc
    schema["properties"] = {
        key: {**spec.schema, **({"description": spec.doc} if spec.doc else {})} for key, spec in table.items()
    }
    if required := [key for key, spec in table.items() if spec.required]:
        schema["required"] = required
    return schema
