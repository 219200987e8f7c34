"""The keys of a plan file: one table a section. They are read by it, and the JSON Schema is made from it."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sim import units
from sim.catalog.economy import TERMS
from sim.interop.values import (
    Key,
    WrongValueError,
    boolean,
    choice,
    integer,
    mapping_schema,
    measured,
    number,
    power,
    rate,
    show,
    text,
)
from sim.scenario.fields import ATTENTIONS, FRAMEWORKS, PRECISIONS, RECOMPUTES, SCHEDULES

MAX_LIST = 64


def listed(item: Key, what: str, doc: str = "", required: bool = False) -> Key:
    """A list of values, or one value that stands for a list of one; each once, in the order given."""

    def read(value: object) -> tuple[Any, ...]:
        entries = value if isinstance(value, list) else [value]
        if not entries:
            raise WrongValueError("the list is empty", f"write at least {what}, or leave the key out")
        if len(entries) > MAX_LIST:
            raise WrongValueError(f"the list has {len(entries)} entries", f"write at most {MAX_LIST}")
        return tuple(dict.fromkeys(item.read(entry) for entry in entries))

    schema = {"anyOf": [item.schema, {"type": "array", "items": item.schema, "minItems": 1}]}
    return Key(read, schema, doc, required)


def _anything(schema: dict[str, Any], doc: str = "", required: bool = False) -> Key:
    return Key(lambda value: value, schema, doc, required)


def duration(doc: str = "") -> Key:
    return measured(units.parse_duration, "a duration", "90 days", doc)


def _or_zero(read: Callable[[object], Any]) -> Callable[[object], Any]:
    """Return a reader that takes 0 (with a unit or without) as well."""

    def reader(value: object) -> Any:
        if value == 0 and not isinstance(value, bool):
            return 0.0
        if isinstance(value, str) and re.fullmatch(r"0(\.0+)?\s*[A-Za-z$/]+", value.strip()):
            return 0.0
        return read(value)

    return reader


def money(doc: str = "") -> Key:
    return measured(units.parse_money, "an amount of money", "2 MUSD", doc)


def money_per(per: str, example: str, doc: str = "") -> Key:
    key = measured(lambda value: units.parse_money_per(value, per), f"a price per {per}", example, doc)
    return key._replace(read=_or_zero(key.read))


_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([kMGBT]?)(?:\s*tokens)?")
_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def _tokens(value: object) -> float:
    found = _COUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    given = float(found[1]) * _COUNTS[found[2]] if found else value
    if isinstance(given, bool) or not isinstance(given, int | float) or not 1 <= given <= 1e18:
        raise WrongValueError(f"{show(value)} is not a number of tokens", "write such as 1e12, or '15 T tokens'")
    return float(given)


def _batch(value: object) -> tuple[str, tuple[int, ...]]:
    """Return ("sequences", its ends) or ("tokens", its ends): one number, a range of two, or tokens in words."""
    one = integer(1, 10**7, 512)
    if isinstance(value, list):
        if len(value) != 2:
            raise WrongValueError(f"{show(value)} is not a range", "write one number, or [least, most]: [256, 1024]")
        low, high = (one.read(item) for item in value)
        if low > high:
            raise WrongValueError(f"[{low}, {high}] is not a range", f"write [{high}, {low}]")
        return "sequences", (low, high)
    if isinstance(value, str) and value.strip().endswith("tokens"):
        tokens = round(_tokens(value))
        return "tokens", (tokens, tokens)
    found = one.read(value)
    return "sequences", (found, found)


def _date(value: object) -> str:
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise WrongValueError(f"{show(value)} is not a date", "write year-month-day: 2026-11-01") from None


date = partial(Key, _date, {"type": "string", "format": "date"})

TOP: dict[str, Key] = {
    "name": text("a name", "a name for the report", "What the report calls it; the file's name if left out."),
    "model": _anything({}, "write a name such as llama-3-70b, the path of a config.json, or the config itself", True),
    "workload": _anything({}, "write 'workload: {tokens: 1e12, sequence_length: 8192}'", True),
    "goal": _anything({}, "What counts: cheapest if left out."),
    "candidates": _anything({}, "write 'candidates: {nodes: [dgx-h100], num_gpus: [256, 512]}'", True),
    "frameworks": listed(choice(FRAMEWORKS, "a framework"), "one", "Which are tried: megatron, fsdp2 and deepspeed."),
    "axes": _anything({}, "What is tried of each axis; what makes sense on each machine, if left out."),
    "prices": _anything({}, "What things cost, over what the catalogue knows."),
    "failures": _anything({}, "How often what breaks, and how long it takes to go on."),
    "storage": _anything({}, "Where checkpoints go."),
    "constraints": _anything({}, "What every candidate must keep."),
}

WORKLOAD: dict[str, Key] = {
    "tokens": Key(_tokens, {"anyOf": [{"type": "number", "minimum": 1}, {"type": "string"}]},
                  "Tokens of the whole training."),
    "steps": integer(1, 10**12, 1000, "Optimizer steps of the whole training, instead of tokens."),
    "sequence_length": integer(1, 2**27, 8192, "write the tokens of a sequence, such as 8192", True),
    "global_batch_size": Key(
        _batch,
        {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
                   {"type": "string"}]},
        "Sequences of an optimizer step: a number, a range, or '4M tokens', which is the default.",
    ),
    "precision": choice(PRECISIONS, "a precision", "The best that the GPU trains in, if left out."),
    "attention": choice(ATTENTIONS, "an attention kernel", "flash-2 where the GPU runs it, if left out."),
    "optimizer": choice(("adamw", "adam", "sgd"), "an optimizer that sim knows"),
}  # fmt: skip

GOAL: dict[str, Key] = {
    "deadline": duration("Training has to end by then."),
    "budget": money("Training may cost so much."),
    "cheapest": boolean("The least money."),
    "fastest": boolean("The least time."),
    "least_energy": boolean("The least energy."),
    "fewest_gpus": boolean("The fewest GPUs."),
    "value_of_time": money_per("day", "10 kUSD/day", "A trade-off: what a day sooner is worth."),
}

CANDIDATES: dict[str, Key] = {
    "nodes": _anything({"anyOf": [{"type": "string"}, {"type": "array"}]}, "write 'nodes: [dgx-h100, dgx-a100-80gb]'",
                       True),
    "num_gpus": listed(integer(1, 2**17, 256), "one number of GPUs", "How many GPUs are tried."),
    "networks": listed(text("a network", "a name, a path, or words: '400 Gbit/s RoCE per GPU'"), "one network",
                       "Each node's own, if left out."),
    "owned": _anything({"type": "object"}, "Nodes that are there already, by name: how many GPUs. They cost no rent."),
}  # fmt: skip

NODE: dict[str, Key] = {
    "node": text("a node", "a name such as dgx-h100, or the path of a topology file", "", True),
    "network": text("a network", "a name, a path, or words: '400 Gbit/s RoCE per GPU'"),
    "num_gpus": listed(integer(1, 2**17, 256), "one number of GPUs"),
}

_INT = partial(integer, 1, 2**17)
AXES: dict[str, Key] = {
    "tp": listed(_INT(8), "1", "Tensor parallelism."),
    "pp": listed(_INT(4), "1", "Pipeline stages."),
    "cp": listed(_INT(2), "1", "Context parallelism."),
    "vpp": listed(integer(1, 1000, 2), "1", "Virtual stages of a rank."),
    "zero": listed(integer(0, 3, 3), "3", "What is sharded over dp, where the framework leaves a choice."),
    "micro_batch_size": listed(integer(1, 10**6, 1), "1", "Sequences of a microbatch."),
    "recompute": listed(choice(RECOMPUTES, "a way to recompute"), "full", "What backward computes again."),
    "schedule": listed(choice(SCHEDULES, "a pipeline schedule"), "1f1b", "Order of a pipeline's passes."),
    "shard_size": listed(_INT(8), "8", "Ranks of a shard group of FSDP2; fewer than dp is HSDP."),
}

PRICES: dict[str, Key] = {
    "acquire": choice(("rent", "buy", "either"), "a way to get GPUs", "rent if left out."),
    "rent": _anything({"type": "object"}, "By node or GPU: price of a GPU-hour, '2.10 USD/h'."),
    "buy": _anything({"type": "object"}, "By node or GPU: price of a GPU with its share of node and network."),
    "file": text("a path", "the path of a file with rent and buy, as sim/catalog/prices.yaml has them",
                 "Your own offers, over the catalogue's."),
    "terms": listed(choice(TERMS, "a term"), "one term", "on-demand and reserved if left out."),
    "providers": listed(text("a provider", "a name such as lambda"), "one provider", "All, if left out."),
    "power": money_per("kWh", "0.08 USD/kWh", "Of what is owned or bought."),
    "pue": number(1.0, 5.0, "1.2", "What cooling and conversion add to the power: 1.2 is a fifth."),
    "people": money_per("year", "600 kUSD/year", "Who looks after the cluster, all together."),
    "storage": money_per("TB/month", "23 USD/TB/month", "Of checkpoints."),
    "lifetime": duration("Over which what is bought is written off."),
    "horizon": duration("Of the total cost of ownership; the lifetime if left out."),
}  # fmt: skip

OFFER: dict[str, Key] = {
    "gpu": text("a GPU", "a name of 'sim catalog gpu'"),
    "node": text("a node", "a name of 'sim catalog node'"),
    "provider": text("a provider", "a name such as lambda"),
    "term": choice(TERMS, "a term"),
    "price": _anything({"type": "string"}, "write '2.10 USD/h'", True),
    "date": date("When it was offered."),
    "source": text("a source", "where it was found"),
    "note": text("a note", "a note"),
}

FAILURES: dict[str, Key] = {
    "gpu_mtbf": duration("Mean time between failures of one GPU that end the job."),
    "node_mtbf": duration("The same of the rest of a node."),
    "detect": duration("Until a failure is noticed and found."),
    "restart": duration("Until training goes on from the checkpoint."),
    "repair": duration("Until a broken node is back."),
    "spare_nodes": integer(0, 10_000, 2, "Nodes that wait for others to fail; as many as needed, if left out."),
    "gpu_spread": number(0.0, 0.2, "0.01", "Standard deviation of GPUs' speed beyond that within a step."),
    "checkpoint_interval": duration("The best one, if left out."),
    "replicas": integer(10, 100_000, 200, "Simulated runs behind the distribution."),
    "seed": integer(0, 2**31, 0, "Of the random numbers."),
}

STORAGE: dict[str, Key] = {
    "write_per_node": rate("What a node writes."),
    "write": rate("What the storage takes from all."),
    "bytes_per_parameter": number(0.1, 100, "14", "Of a checkpoint."),
    "kept": integer(1, 10_000, 3, "Checkpoints that are kept."),
}

CONSTRAINTS: dict[str, Key] = {
    "max_power": power("Of the whole cluster, cooling included."),
    "max_gpus": integer(1, 2**17, 1024, "Spare nodes included."),
    "memory_margin": number(0.0, 1.0, "0.05", "Share of a GPU's memory that stays free.", below=True),
}

SECTIONS: dict[str, Mapping[str, Key]] = {
    "workload": WORKLOAD,
    "goal": GOAL,
    "candidates": CANDIDATES,
    "axes": AXES,
    "prices": PRICES,
    "failures": FAILURES,
    "storage": STORAGE,
    "constraints": CONSTRAINTS,
}


def plan_schema() -> dict[str, Any]:
    """Return the JSON Schema of a plan file."""
    schema = mapping_schema(TOP, "What is to be trained, on what it may run, and what counts.")
    for name, table in SECTIONS.items():
        doc = schema["properties"][name].get("description", "")
        schema["properties"][name] = {**mapping_schema(table), **({"description": doc} if doc else {})}
    nodes = {"anyOf": [{"type": "string"}, mapping_schema(NODE)]}
    schema["properties"]["candidates"]["properties"]["nodes"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": nodes, "minItems": 1}]
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "sim plan", **schema}
