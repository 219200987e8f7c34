"""The catalogue as plain rows, for ``sim catalog`` and ``sim explain``. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from sim import units
from sim.catalog import load
from sim.catalog.load import Kind
from sim.catalog.schema import Fact, GpuFacts, LinkFacts, NetworkFacts, NodeFacts

KINDS: tuple[Kind, ...] = ("gpu", "node", "network", "link", "model")


@dataclass(frozen=True, slots=True)
class Row:
    """One fact: ``value`` as written with its unit, ``kind`` and ``source`` as in ``schema.Fact``.

    ``kind`` is "" for what is a name and not a fact (a node's GPU, a GPU's architecture).
    """

    name: str
    value: str
    kind: str = ""
    source: str = ""
    note: str = ""


def overview(kind: Kind) -> tuple[tuple[str, str], ...]:
    """Return (name, one line of what it is) for all that is known of a kind."""
    return tuple((name, _line(kind, name)) for name in load.names(kind))


def describe(kind: Kind, name: str) -> tuple[Row, ...]:
    """Return every fact about one entry. Raises KeyError for an unknown name."""
    if kind == "gpu":
        return tuple(_gpu(load.gpu(name)))
    if kind == "node":
        return tuple(_node(load.node(name)))
    if kind == "network":
        return tuple(_network(load.network(name)))
    if kind == "link":
        return tuple(_link(load.link(name)))
    return tuple(_model(name))


def _line(kind: Kind, name: str) -> str:
    if kind == "gpu":
        gpu = load.gpu(name)
        best = "bf16" if "bf16" in gpu.peak_flops else "fp16"
        return (
            f"{gpu.architecture}, {gpu.facts['memory_bytes'].text}, {gpu.facts['memory_bytes_per_s'].text}, "
            f"{best} {gpu.facts[f'peak_flops.{best}'].text}"
        )
    if kind == "node":
        return load.node(name).title
    if kind == "network":
        network = load.network(name)
        rate = network.facts["line_bytes_per_s"].text
        return f"{network.fabric}, {network.nics_per_node} x {rate} per node, {network.topology}"
    if kind == "link":
        link = load.link(name)
        return f"{link.kind}, {link.facts['bytes_per_s'].text} one way"
    known = load.model_parameters().get(name)
    return f"{known[0] / 1e9:.3g} billion parameters" if known else str(load.model_config(name).get("model_type", ""))


def _facts(facts: Mapping[str, Fact]) -> Iterator[Row]:
    for name, fact in facts.items():
        yield Row(name, fact.text, fact.kind, fact.source, fact.note)


def _gpu(gpu: GpuFacts) -> Iterator[Row]:
    yield Row("vendor", gpu.vendor)
    yield Row("architecture", gpu.architecture)
    yield Row("compute_capability", ".".join(map(str, gpu.compute_capability)))
    low, high = gpu.cuda_context_band_bytes
    for row in _facts(gpu.facts):
        if row.name == "cuda_context_bytes" and high:
            band = f"seen from {units.format_bytes(low)} to {units.format_bytes(high)}"
            yield Row(row.name, row.value, row.kind, row.source, f"{band}; {row.note}" if row.note else band)
        else:
            yield row


def _node(node: NodeFacts) -> Iterator[Row]:
    yield Row("title", node.title)
    yield Row("gpu", f"{node.num_gpus} x {node.gpu}")
    if node.default_network:
        yield Row("network", node.default_network)
    yield Row("cpu_vendor", node.cpu_vendor)
    yield Row("devices", ", ".join(f"{len(list(of))} {kind}" for kind, of in groupby(k for _, k in node.devices)))
    yield from _facts(node.facts)
    wiring = node.facts.get("wiring")
    for a, b, kind, count in node.wires:
        times = f"{count} x {kind}" if count > 1 else kind
        yield Row(f"{a} - {b}", times, wiring.kind if wiring else "", wiring.source if wiring else "")


def _network(network: NetworkFacts) -> Iterator[Row]:
    yield Row("fabric", network.fabric)
    yield Row("topology", network.topology)
    yield from _facts(network.facts)


def _link(link: LinkFacts) -> Iterator[Row]:
    yield Row("kind", link.kind)
    yield from _facts(link.facts)


def _model(name: str) -> Iterator[Row]:
    known = load.model_parameters().get(name)
    if known:
        number, fact = known
        yield Row("parameters", f"{number:,}", fact.kind, fact.source, fact.note)
    for key, value in load.model_config(name).items():
        yield Row(key, "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))
